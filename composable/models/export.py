"""Models as plain transformers folders, as far as transformers can build them."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from composable import families, files
from composable.errors import MismatchError
from composable.models.checkpoint import Checkpoint
from composable.models.structure import ACTIONS, removed_layers
from composable.models.surgery import layer_paths

log = logging.getLogger("composable")


def write(checkpoint: Checkpoint, path: Path, folder: Path) -> list[str]:
    """Write a model as a folder.

    Args:
        checkpoint: its model is spent: it gets the layout that the library has.
        path: where it was read, for messages.
        folder: to be made.

    Returns:
        Names of the layers that are gone, in the dense model.

    Raises:
        MismatchError: it has shapes or modules that transformers cannot build.
        UserError: there is something in the folder.
    """
    structure, model = checkpoint.structure, checkpoint.model
    removed = removed_layers(structure, checkpoint.family)
    for edit in structure:
        if edit.module not in removed:
            raise MismatchError(
                f'{path}: "{edit.module}" ({ACTIONS[edit.action].result}) has a shape that '
                "transformers cannot build; models that have lost nothing but whole layers and "
                "single weights can be exported."
            )
    for stack, layers in layer_paths(model, checkpoint.family).items():
        gone = [int(name[len(layers) + 1 :]) for name in removed if name.startswith(f"{layers}.")]
        if gone:
            left: Any = model.get_submodule(layers)
            record(model.config, stack, gone, len(left) + len(gone))
    if names := checkpoint.info.get("labels"):  # which a training may have given
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    save(model, folder, checkpoint.tokenizer, _preprocessor(checkpoint))
    return removed


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Make the file that says how images are prepared, as transformers does; {} for texts."""
    image = checkpoint.info.get("image")
    if image is None:
        return {}
    height, width = image["size"]
    content = {
        "image_processor_type": checkpoint.family.image_processor,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": image.get("resample", 2),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
    }
    return {"preprocessor_config.json": content}


#: Key of a config under which a cut is recorded.
RECORD = "depth_pruning"


def record(
    config: Any,
    stack: str,
    gone: Collection[int],
    layers: int,
    why: Mapping[str, Any] | None = None,
) -> None:
    """Write into a config which layers are gone, in the numbers of the original model.

    Args:
        config: of the model; what it says of earlier cuts is taken into account.
        stack: whose layers.
        gone: numbers, as they were before this cut.
        layers: of the stack, before this cut.
        why: further entries.
    """
    known = dict(getattr(config, RECORD, None) or {})
    before = known.get(stack, {})
    numbers = before.get("kept", list(range(layers)))
    kept = [number for place, number in enumerate(numbers) if place not in gone]
    removed = sorted({*before.get("removed", []), *numbers} - set(kept))
    known[stack] = {"removed": removed, "kept": kept, **(why or {})}
    setattr(config, RECORD, known)


def save(
    model: Any, folder: Path | str, tokenizer: Any = None, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a plain transformers folder, whole or not at all; AutoModel reads it.

    The folder may exist if it is empty; `extra` has further JSON files, name -> content.

    Raises:
        UserError: there is something in the folder.
        OSError: it cannot be written.
    """
    with files.atomic_folder(Path(folder)) as inner:
        family = families.of(model)
        if family.restore is not None:
            family.restore(model)
        model.save_pretrained(inner)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        for name, content in (extra or {}).items():
            files.write_json(inner / name, content)
