"""Low-rank adapters beside a pretrained model's weights: merged into them."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from composable import files
from composable.errors import FormatError, UserError, as_user_error, listed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def base_of(folder: Path) -> Path:
    """Find the folder of the model that an adapter belongs to.

    Args:
        folder: with or without an adapter.

    Returns:
        The folder itself where it holds a whole model; else the one that the adapter names.

    Raises:
        UserError: it names none.
    """
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return folder
    base = _config(folder).get("base_model_name_or_path")
    if isinstance(base, str) and base and (Path(base) / "config.json").is_file():
        return Path(base)
    raise UserError(
        f"{folder}: an adapter of {base!r} without its model; put config.json, weights and "
        "tokenizer of that model into a folder together with the adapter, and give this folder."
    )


def _config(folder: Path) -> dict[str, Any]:
    said = files.read_json(folder / CONFIG)
    if not isinstance(said, dict):
        raise FormatError(f"{folder / CONFIG}: an object was expected; give the adapter's own.")
    return said


@contextmanager
def set_aside(folder: Path) -> Iterator[Path]:
    """Yield a folder without the adapter, which transformers would read by itself, unmerged."""
    if not (folder / CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for path in folder.iterdir():
            if not path.name.startswith("adapter_"):
                (Path(made) / path.name).symlink_to(path.resolve())
        try:
            yield Path(made)
        except UserError as error:
            raise type(error)(str(error).replace(made, str(folder))) from error


def merge(model: Any, folder: Path) -> Any:
    """Add an adapter to the weights of its model.

    Args:
        model: of transformers; it is changed.
        folder: of the adapter.

    Returns:
        The model, as peft's `merge_and_unload` makes it; without an adapter, as it was.

    Raises:
        UserError: there is no peft, or the adapter is no safetensors file of this model.
    """
    if not (folder / CONFIG).is_file():
        return model
    _config(folder)
    names = _names(folder)
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"{folder}: holds an adapter; pip install -r requirements-lora.txt, so that it can be "
            "merged, or take the files adapter_* away to have the model without it."
        ) from error
    with warnings.catch_warnings(), as_user_error(f"{folder}: its adapter cannot be merged"):
        warnings.simplefilter("ignore")  # that it lacks something: we refuse it
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        lost = sorted((names - wanted - set(adapted.state_dict())) | (wanted - names))
        if lost:
            raise UserError(
                f"{folder}: its adapter and the model differ in {listed(lost)}; the adapter of "
                "this model is needed."
            )
        _refuse_unmergeable(folder, adapted)
        return adapted.merge_and_unload()


def _refuse_unmergeable(folder: Path, adapted: Any) -> None:
    """Refuse what is no part of the weights, and what would be added to a shared one twice."""
    settings = adapted.active_peft_config
    if settings.is_prompt_learning:
        raise UserError(
            f"{folder}: its adapter ({settings.peft_type.value}) puts tokens before the text and "
            "cannot be merged; one that changes weights, such as LORA, is needed."
        )
    named = [*adapted.get_base_model().named_parameters(remove_duplicate=False)]
    counts = Counter(id(parameter) for _, parameter in named)
    inner = ".base_layer.weight"
    for name, parameter in named:
        if name.endswith(inner) and counts[id(parameter)] > 1:
            raise UserError(
                f"{folder}: its adapter changes {name.removesuffix(inner)}, whose weight the model "
                "shares with another layer that it would change, too; an adapter of other layers, "
                "or a model with tie_word_embeddings false and both weights, is needed."
            )


def _names(folder: Path) -> set[str]:
    """Read what an adapter holds."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path}: is missing; the adapter's weights are needed as safetensors, since pickled "
            "ones (.bin) can run code and are never opened."
        )
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise FormatError(
            f"{path}: damaged or cut off ({error}); copy the adapter again."
        ) from error
