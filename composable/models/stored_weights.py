"""What the weight files of a pretrained model hold, and which of it a model does not use."""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from composable import families, files
from composable.errors import FormatError, UserError, listed

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
#: What transformers leaves out of its report for every model.
_HIDDEN = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
#: How names of the scales, zero points and codes of quantised weights end.
_QUANTISED = re.compile(
    r".*(\.SCB|\.weight_format|(weight|input|output|[qkv])_scale(_inv|_2)?|\.scales|\.qweight"
    r"|\.qzeros|\.g_idx|\.(nested_)?absmax|\.quant_map|\.quant_state\..*"
    r"|\.weight_(packed|shape)|_zero_point)"
)
UNQUANTISED = "weights that are not quantised are needed, in float32, float16 or bfloat16."


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors calls it ("F32").
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, name: str) -> list[Path]:
    """List the safetensors files of a model, sharded or not; the index says how shards are called.

    Args:
        folder: of the model.
        name: what messages call it.

    Raises:
        FormatError: there are none, or the index is not one.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise FormatError(
            f"{name}: no {WEIGHTS}; pickled weights (.bin) can run code and are never opened; "
            "take a revision or a copy of the model with safetensors weights."
        )
    return [folder / shard for shard in shards(folder / WEIGHTS_INDEX)]


def shards(index: Path) -> list[str]:
    """Read the names of the weight files out of their index.

    Raises:
        FormatError: it is not an index, or names a file outside of its folder.
    """
    content = files.read_bytes(index)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{index}: damaged, not JSON ({error}); fetch the model again."
        ) from error
    found = value.get("weight_map") if isinstance(value, dict) else None
    if not found or not isinstance(found, dict):
        raise FormatError(f"{index}: no weight_map; fetch the model again.")
    if not isinstance(value.get("metadata"), dict):  # transformers asks for it
        raise FormatError(f'{index}: no metadata; add "metadata": {{}}, or fetch the model again.')
    names = sorted({str(name) for name in found.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(
                f"{index}: names the file {name!r}; the name of a .safetensors file beside the "
                "index was expected."
            )
    return names


def read_headers(paths: Iterable[Path], remedy: str) -> dict[str, Stored]:
    """Read what is in safetensors files without their data, which also compares their sizes.

    Args:
        paths: of all files of a model.
        remedy: what a message says is to be done.

    Returns:
        Name of every tensor -> what it is.

    Raises:
        FormatError: a file is missing or damaged, holds nothing, or what another one holds.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                held = {
                    name: Stored(part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except FileNotFoundError as error:
            raise FormatError(f"{path}: a part of the weights is missing; {remedy}") from error
        except SafetensorError as error:
            raise FormatError(f"{path}: damaged or cut off ({error}); {remedy}") from error
        if not held:
            raise FormatError(f"{path}: holds no weights; {remedy}")
        if twice := sorted(found.keys() & held.keys()):
            raise FormatError(f"{path}: holds {listed(twice)}, as another file does; {remedy}")
        found |= held
    return found


def check_dtypes(source: Path, stored: dict[str, Stored], leftovers: str) -> None:
    """Refuse quantised weights: their codes would be taken for weights.

    `leftovers` are of the family (`Family.leftovers`), and may be of any type.

    Raises:
        UserError: there are such.
    """
    codes = [
        name
        for name, tensor in stored.items()
        if (tensor.dtype not in FLOATS and not re.fullmatch(leftovers, name))
        or _QUANTISED.fullmatch(name)
    ]
    if codes:
        dtypes = ", ".join(sorted({stored[name].dtype for name in codes}))
        raise UserError(
            f"{source}: its weights are quantised ({listed(sorted(codes))}: {dtypes}); "
            f"{UNQUANTISED}"
        )


def unused(
    model: Any, unexpected: Collection[str], stored: Collection[str]
) -> tuple[list[str], list[str]]:
    """Find what a checkpoint holds and a model does not use.

    Args:
        model: of transformers, as it was loaded.
        unexpected: names that transformers reports.
        stored: names in the files.

    Returns:
        What belongs to the part that all heads share, or to the model's own head; and what belongs
        to heads that the model does not have. Both sorted.
    """
    # the report leaves out what fits a pattern, even if it only resembles the known leftovers
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_HIDDEN]
    own = {_bare(name, model) for name in model.state_dict()}
    hidden = {
        name
        for name in stored
        if any(re.search(pattern, name) for pattern in patterns) and _bare(name, model) not in own
    }
    # a weight under two names: with the trunk's name before its own, and without
    doubled = {name for name in stored if f"{model.base_model_prefix}.{name}" in set(stored)}
    leftovers = families.of(model).leftovers
    left = {name for name in {*unexpected, *hidden} if not re.fullmatch(leftovers, name)} | doubled
    is_headless = not any(name.startswith(f"{model.base_model_prefix}.") for name in stored)
    heads = {name for name in left - doubled if _is_of_other_head(name, model, is_headless)}
    return sorted(left - heads), sorted(heads)


def _bare(name: str, model: Any) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def _is_of_other_head(name: str, model: Any, is_headless: bool) -> bool:
    """Tell whether a weight belongs to a head that the model does not have; a pooler is one."""
    first = name.partition(".")[0]
    if f".{_bare(name, model)}".startswith(".pooler."):
        return True
    children = {child for child, _ in (*model.named_children(), *model.base_model.named_children())}
    if first in children or first == model.base_model_prefix:
        return False
    # beside weights that do not say what they belong to, only what is known to be a head
    return not is_headless or first in HEADS


#: What transformers calls the heads of its models.
HEADS = (
    "classifier", "cls_classifier", "distillation_classifier", "qa_outputs", "score", "lm_head",
    "cls", "discriminator_predictions", "generator_predictions", "generator_lm_head",
    "vocab_transform", "vocab_layer_norm", "vocab_projector", "pre_classifier",
    "classification_head", "multiple_choice_head", "sequence_summary", "v_head",
)  # fmt: skip
