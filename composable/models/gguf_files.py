"""What is in a .gguf file, and what transformers does not read of it."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from composable.errors import UserError, as_user_error
from composable.progress import MOMENT, Stage

#: Numbers of a model that say nothing new, or not how it computes.
_HARMLESS = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count")


def read(path: Path) -> Any:
    """Read what a .gguf file says of itself.

    Args:
        path: of the file.

    Returns:
        A `gguf.GGUFReader`, which maps the weights.

    Raises:
        UserError: the package gguf is missing, or the file is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"{path}: .gguf files need the package gguf; pip install -r requirements-gguf.txt."
        ) from error

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """The library's reader, which goes on past the end of a file for ever."""

        @property
        def data(self) -> Any:
            """The bytes of the file: a plain array, of which parts are taken twice as fast."""
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **more: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **more)
            stage.update()
            if len(found) != count:
                raise ValueError(f"it ends before byte {int(offset)} and what was expected there")
            return found

    with (
        Stage(None, f"read {path.name}", unit="values", delay=MOMENT) as stage,
        as_user_error(f"{path}: no readable .gguf file"),
    ):
        reader: Any = Reader(path)
        key = f"{_text(reader, 'general.architecture')}.block_count"
        layers = reader.fields[key].contents() if key in reader.fields else 0
    if not isinstance(layers, int) or layers > len(reader.tensors):
        raise UserError(
            f"{path}: {key} is {layers!r}, and its weights are {len(reader.tensors)} tensors; a "
            "whole file is needed."
        )
    return reader


@contextmanager
def shared(reader: Any) -> Iterator[None]:
    """Let transformers use a reader, or none where it is None, instead of readers of its own.

    It would read the whole file again for the config, the weights and the tokenizer, and make the
    table of names again for every module of the model, which is most of the time of an import.
    """
    if reader is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    def stage(tensors: Any, **_: Any) -> Stage:
        return Stage(tensors, "read weights", unit="tensors")

    used: Any = (
        (gguf, "GGUFReader", lambda path: reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (reading, "tqdm", stage),
    )
    before = [getattr(place, name) for place, name, _ in used]
    try:
        for place, name, ours in used:
            setattr(place, name, ours)
        yield
    finally:
        for (place, name, _), theirs in zip(used, before, strict=True):
            setattr(place, name, theirs)


def unused(path: Path, reader: Any, model: Any) -> list[str]:
    """Find what a model that was read from a .gguf file does not use of it.

    Args:
        path: of the file.
        reader: of it.
        model: of transformers, as it was loaded.

    Returns:
        Names of tensors and settings, sorted.
    """
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    problem = f"{path}: its names cannot be compared with those of the model"
    with as_user_error(problem), shared(reader):
        architecture = _text(reader, "general.architecture")
        made = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
        known = reading.get_gguf_hf_weights_map(model, made(config=model.config.to_dict()))
        tensors = [tensor.name for tensor in reader.tensors if tensor.name not in known]
        settings: Any = GGUF_CONFIG_MAPPING.get(model.config.model_type, {})
        prefix = f"{architecture}."
        said = [name.removeprefix(prefix) for name in reader.fields if name.startswith(prefix)]
        unknown = [name for name in said if name not in settings and name not in _HARMLESS]
        left = [prefix + name for name in unknown if not _is_off(reader, prefix + name)]
    return sorted([*tensors, *left])


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _is_off(reader: Any, key: str) -> bool:
    """Tell whether a setting says that there is nothing of the kind."""
    value: Any = reader.fields[key].contents()
    return value in (0, "none", False)


def counts(reader: Any) -> tuple[int, int]:
    """Count the tensors, and the numbers in them."""
    return len(reader.tensors), sum(int(tensor.n_elements) for tensor in reader.tensors)


def tokens(reader: Any) -> int:
    """Count the tokens of its tokenizer, to which transformers may add some that no text has."""
    field = reader.fields.get("tokenizer.ggml.tokens")
    return 0 if field is None else len(field.data)
