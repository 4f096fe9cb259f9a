"""Models as plain transformers folders, as far as transformers can build them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME

from composable import families, files
from composable.models import plain
from composable.models.checkpoint import Checkpoint
from composable.models.structure import removed_layers
from composable.models.surgery import layer_paths


class Exported(NamedTuple):
    """What was written.

    Attributes:
        model: of transformers' own classes.
        removed: names of the layers that are gone, in the dense model.
        padded: how many attentions and ffns were filled up with zeros.
    """

    model: PreTrainedModel
    removed: list[str]
    padded: int


def write(checkpoint: Checkpoint, path: Path, folder: Path, pad: bool = False) -> Exported:
    """Write a model as a folder.

    Args:
        checkpoint: its model is spent: the one that is written takes its tensors.
        path: where it was read, for messages.
        folder: to be made.
        pad: whether attentions and ffns may be filled up with zeros, see `plain.build`.

    Raises:
        MismatchError: it has shapes or modules that transformers cannot build.
        UserError: there is something in the folder.
        OSError: it cannot be written.
    """
    model, padded = plain.build(checkpoint, path, pad)
    removed = removed_layers(checkpoint.structure, checkpoint.family)
    for stack, layers in layer_paths(model, checkpoint.family).items():
        gone = [int(name[len(layers) + 1 :]) for name in removed if name.startswith(f"{layers}.")]
        if gone:
            left: Any = model.get_submodule(layers)
            record(model.config, stack, gone, len(left) + len(gone))
    if names := checkpoint.info.get("labels"):  # which a training may have given
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    image = checkpoint.info.get("image_processor")
    extra = {} if image is None else {IMAGE_PROCESSOR_NAME: image}
    save(model, folder, checkpoint.tokenizer, extra)
    return Exported(model, removed, padded)


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

    The folder may exist if it is empty; `extra` has further JSON files, name -> content. Settings
    of `generate` are written as they are, also those that its present way does not use (chat models
    come with a `temperature` and without `do_sample`), which transformers refuses to write.

    Raises:
        UserError: there is something in the folder.
        OSError: it cannot be written.
    """
    with files.atomic_folder(Path(folder)) as inner, files.os_errors(folder):
        family = families.of(model)
        if family.restore is not None:
            family.restore(model)
        is_plain = getattr(model, "hf_quantizer", None) is None
        if is_plain and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # of the .gguf file it came from
        generation: Any = getattr(model, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(inner)
        finally:
            model.generation_config = generation
        if (inner / GENERATION_CONFIG_NAME).exists():
            generation.to_json_file(inner / GENERATION_CONFIG_NAME)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        for name, content in (extra or {}).items():
            files.write_json(inner / name, content)
