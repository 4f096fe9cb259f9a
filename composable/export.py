"""Models as plain transformers folders, as far as transformers can build them."""

from pathlib import Path
from typing import Any

from composable import depth
from composable.checkpoint import Checkpoint
from composable.errors import MismatchError


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
    for name in (*structure["kept_units"], *structure["linear_maps"]):
        what = "a linear map stands in its place" if name in structure["linear_maps"] else "pruned"
        raise MismatchError(
            f'{path}: "{name}" ({what}) has a shape that transformers cannot build; models that '
            "have lost nothing but whole layers and single weights can be exported."
        )
    if removed := structure["removed_layers"]:
        record: dict[str, Any] = {}
        for layers in checkpoint.family.layers:
            gone = sorted(
                int(name.rpartition(".")[2])
                for name in removed
                if (place := checkpoint.family.place(name)) and place[0] == layers.stack
            )
            stays = checkpoint.config[_stored(checkpoint, layers.counts)]
            kept = [number for number in range(stays) if number not in gone]
            record[layers.stack] = {"removed": gone, "kept": kept}
        setattr(model.config, depth.RECORD, record)
    extra = {"preprocessor_config.json": _preprocessor(checkpoint)}
    depth.save(model, folder, checkpoint.tokenizer, {k: v for k, v in extra.items() if v})
    return removed


def _stored(checkpoint: Checkpoint, counts: tuple[str, ...]) -> str:
    """Name under which the stored config counts layers; some have names of their own for it."""
    names = type(checkpoint.model.config).attribute_map
    stored = (names.get(count, count) for count in counts)
    return next(name for name in stored if name in checkpoint.config)


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Say how images are prepared, as transformers does."""
    image = checkpoint.info.get("image")
    if image is None:
        return None
    height, width = image["size"]
    return {
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
