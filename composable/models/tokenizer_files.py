"""The files of a tokenizer, as a model file holds them."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
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


def drop_special(tokenizer: Any, rows: int) -> list[str]:
    """Take away the special tokens that a model has no row for, so that it cannot know them.

    Several popular language models come with a tokenizer to which a padding token was added, and
    with weights to which it was not (the first release of Llama 2 had 32,000 rows and <pad> as
    token 32000). What is not special stays: it would be in texts, and shows a wrong tokenizer.

    Args:
        tokenizer: of transformers; it is changed.
        rows: of the model's embedding.

    Returns:
        The tokens that are gone, sorted.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    gone = {token.content for number, token in added.items() if number >= rows and token.special}
    if inner is None or not gone:
        return []
    said = json.loads(inner.to_str())
    said["added_tokens"] = [each for each in said["added_tokens"] if each["content"] not in gone]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(said))
    for name, value in tokenizer.special_tokens_map.items():
        if isinstance(value, list):
            setattr(tokenizer, name, [each for each in value if each not in gone])
        elif value in gone:
            setattr(tokenizer, name, None)
    return sorted(gone)
