"""Models as plain transformers folders, as far as transformers can build them."""

from pathlib import Path
from typing import Any

from composable import depth
from composable.checkpoint import Checkpoint
from composable.errors import MismatchError
from composable.surgery import layer_lists


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
    removed = structure["removed_layers"]
    for stack, left in layer_lists(model, checkpoint.family).items():
        gone = [
            int(name.rpartition(".")[2])
            for name in removed
            if (place := checkpoint.family.place(name)) and place[0] == stack
        ]
        if gone:
            depth.record(model.config, stack, gone, len(left) + len(gone))
    extra = {"preprocessor_config.json": _preprocessor(checkpoint)}
    depth.save(model, folder, checkpoint.tokenizer, {k: v for k, v in extra.items() if v})
    return removed


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
