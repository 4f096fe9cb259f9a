"""The files of a tokenizer, as a model file holds them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from composable import files


def files_of(tokenizer: Any) -> dict[str, Tensor]:
    """Return the tokenizer's files as byte tensors."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder, files.os_errors(folder):
        # several chat templates would become files in a folder; as JSON they are in the config
        has_several = isinstance(getattr(tokenizer, "chat_template", None), dict)
        tokenizer.save_pretrained(folder, save_jinja_files=not has_several)
        _forget_origin(Path(folder) / "tokenizer_config.json")
        return {
            file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for file in sorted(Path(folder).iterdir())
            if file.is_file()
        }


def _forget_origin(path: Path) -> None:
    """Drop the values that say where a tokenizer was read: equal tokenizers, equal bytes."""
    if path.exists():
        values = files.read_json(path)
        for key in ("is_local", "local_files_only", "name_or_path"):
            values.pop(key, None)
        files.write_json(path, values)


def load(stored: Mapping[str, Tensor]) -> Any:
    """Make the tokenizer; None for models that have none."""
    if stored == {}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in stored.items():
            (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
