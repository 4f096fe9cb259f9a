"""What the config.json of a pretrained model may say: checked before anything is built from it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING

from composable import families, files
from composable.errors import FormatError, UserError, as_user_error, shortened
from composable.models.stored_weights import UNQUANTISED
from composable.tasks.labels import are_numbers, ordered, same

#: Keys that say how large something is.
SIZES = (
    "vocab_size", "hidden_size", "d_model", "dim", "n_embd", "embedding_size",
    "word_embed_proj_dim", "intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner",
    "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
    "d_kv", "max_position_embeddings", "n_positions", "n_ctx", "type_vocab_size", "image_size",
    "patch_size", "num_channels", "relative_attention_num_buckets",
    "relative_attention_max_distance", "pooler_output_size", "num_labels",
)  # fmt: skip
LARGEST = 2**31 - 1
#: More layers or classes than any model has.
MOST_LAYERS, MOST_LABELS = 10_000, 1_000_000
SEVERAL = "multi_label_classification"
#: How attentions may be computed: on all devices, without another package.
KERNELS = ("sdpa", "eager")
#: Keys that say how many layers there are.
LAYERS = (
    "num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers", "n_layer",
    "n_layers",
)  # fmt: skip
#: Keys that transformers no longer reads, or never did for these models, and would change what a
#: model computes -> the values of them that change nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({},),
    "alibi": (False,),
    "use_mean_pooling": (False,),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "dual_chunk_attention_config": (),
    "per_layer_config": ({},),
}
#: The same, where the config class of a model does not have the key, or the other one.
ONLY_WHERE_DECLARED = {
    "sliding_window": ("sliding_window", (0,)),
    "rope_scaling": ("rope_parameters", ({},)),
    "rope_parameters": ("rope_parameters", ({},)),
}


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json and refuse what cannot be built, or would be built otherwise.

    Returns:
        What it says.

    Raises:
        UserError: the message names the key, its value and what was expected.
    """
    try:
        said = files.read_json(path)
    except OSError as error:
        raise UserError(f"{path.parent}: no readable config.json ({error.strerror}).") from error
    if not isinstance(said, dict):
        raise FormatError(f"{path}: not a model's configuration, an object was expected.")
    kind = said.get("model_type")
    if not isinstance(kind, str):
        raise _refusal(path, "model_type", kind, "the name of a type")
    family = families.by_model_type(kind)  # transformers may not know it either
    for key in SIZES:
        _check_size(path, key, said.get(key))
    for key in LAYERS:
        _check_layers(path, key, said.get(key))
    for key in ("dtype", "torch_dtype"):
        name = said.get(key)
        if name is not None and not isinstance(getattr(torch, str(name), None), torch.dtype):
            raise _refusal(path, key, name, 'the name of a type such as "float32"')
    if said.get("return_dict") not in (True, None):
        raise _refusal(path, "return_dict", said["return_dict"], "true")
    for key in ("attn_implementation", "_attn_implementation"):
        if said.get(key) not in (None, *KERNELS):
            raise _refusal(path, key, said[key], f"{' or '.join(KERNELS)}, or no such key,")
    _check_architectures(path, said.get("architectures"))
    _check_labels(path, said)
    _check_quantisation(path, said)
    _check_without_effect(path, said, family.stacks == ("decoder",))
    if not isinstance(said.get("task_specific_params"), dict | None):
        raise _refusal(path, "task_specific_params", said["task_specific_params"], "an object")
    return said


def _refusal(path: Path, key: str, value: Any, expected: str) -> UserError:
    return FormatError(
        f"{path}: {key} is {shortened(repr(value))}; {expected} was expected; correct it."
    )


def _check_size(path: Path, key: str, value: Any) -> None:
    most = MOST_LABELS if key == "num_labels" else LARGEST
    listed = value if isinstance(value, list) and key in ("image_size", "patch_size") else [value]
    are_whole = all(isinstance(one, int) and not isinstance(one, bool) for one in listed)
    is_pair = listed == [value] or len(listed) == 2
    if value is not None and not (are_whole and is_pair and all(0 < one <= most for one in listed)):
        raise _refusal(path, key, value, f"a whole number from 1 to {most}")


def _check_layers(path: Path, key: str, value: Any) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and 0 < value <= MOST_LAYERS):
        raise _refusal(path, key, value, f"a number of layers from 1 to {MOST_LAYERS}")


def _check_architectures(path: Path, value: Any) -> None:
    is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
    if value is not None and not is_list:
        raise _refusal(path, "architectures", value, "a list with the name of a class")


def _check_labels(path: Path, said: dict[str, Any]) -> None:
    """Names of the classes are those of the outputs 0, 1, ..."""
    names = said.get("id2label")
    if names is not None:
        wanted = [str(index) for index in range(len(names))] if isinstance(names, dict) else []
        if not isinstance(names, dict) or sorted(names) != sorted(wanted):
            expected = 'an object with the name of the outputs "0", "1", and so on'
            raise _refusal(path, "id2label", names, expected)
        if not all(isinstance(name, str | int) for name in names.values()):
            raise _refusal(path, "id2label", names, "a name for every output")
        numbers = said.get("label2id")
        for name, index in numbers.items() if isinstance(numbers, dict) else ():
            if name in names.values() and names.get(str(index)) != name:
                expected = f"what id2label says of {name!r}"
                raise _refusal(path, "label2id", numbers, expected)
    kind = said.get("problem_type")
    known = (None, "regression", "single_label_classification", SEVERAL)
    if kind not in known:
        raise _refusal(path, "problem_type", kind, f"one of {', '.join(map(str, known[1:]))}")


def check_names(path: Path, said: dict[str, Any]) -> None:
    """Refuse names of classes that transformers would forget, so that labels lose their outputs.

    Args:
        path: of a config.json.
        said: what it says.

    Raises:
        UserError: the message names both keys.
    """
    names, numbers, count = (said.get(key) for key in ("id2label", "label2id", "num_labels"))
    if names is None and isinstance(numbers, dict) and not _say_nothing(numbers):
        expected = "an id2label with the same names by their numbers"
        raise _refusal(path, "label2id", numbers, expected)
    if names and count not in (None, len(names)) and not _say_nothing(names.values()):
        expected = f"{len(names)}, for so many names in id2label,"
        raise _refusal(path, "num_labels", count, expected)


def _say_nothing(names: Iterable[Any]) -> bool:
    return are_numbers(ordered(same(str(name)) for name in names))


def read_generation_config(path: Path) -> None:
    """Refuse settings of `generate` that transformers would go on without.

    Args:
        path: of a generation_config.json, which need not exist.

    Raises:
        UserError: it is none.
    """
    if path.is_file() and not isinstance(files.read_json(path), dict):
        raise FormatError(f"{path}: an object was expected; correct it, or take it away.")


def _check_quantisation(path: Path, said: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config", "quantization"):
        if said.get(key) is not None:
            how = said[key]
            name = how.get("quant_method", key) if isinstance(how, dict) else key
            raise UserError(f"{path}: {key} says quantised weights ({name}); {UNQUANTISED}")


def _check_without_effect(path: Path, said: dict[str, Any], is_causal: bool) -> None:
    plain = CONFIG_MAPPING[said["model_type"]]()
    table = WITHOUT_EFFECT | ({"is_causal": (True,)} if is_causal else {})
    for key, (needed, harmless) in ONLY_WHERE_DECLARED.items():
        table |= {} if hasattr(plain, needed) else {key: harmless}
    rope = said.get("rope_parameters")
    inner = rope if isinstance(rope, dict) else {}
    for key, harmless in table.items():
        value = said.get(key, inner.get(key))
        if value is not None and value not in harmless:
            raise UserError(
                f"{path}: {key} is {shortened(repr(value))}, which transformers "
                f"{transformers.__version__} does not build here; give a model without it."
            )


def check_size(source: Path, model_class: Any, config: Any, tensors: int, weights: int) -> None:
    """Refuse a config that describes a much larger model than the weights are of.

    Args:
        source: of the model, for messages.
        model_class: of transformers, with `from_config`.
        config: of the model.
        tensors: how many there are in the files.
        weights: how many numbers these hold.

    Raises:
        UserError: memory for it would be asked for in vain.
    """
    for key in ("num_hidden_layers", "num_decoder_layers"):
        layers = getattr(config, key, None) or 0
        if layers > tensors:
            raise UserError(
                f"{source}: {key} is {layers}, and the weights are {tensors} tensors; config and "
                "weights of one model are needed."
            )
    with as_user_error(f"{source}: no model can be built of its config"), init_empty_weights(True):
        try:
            model = model_class.from_config(config)
        except KeyError as error:  # of a table of activations, of kinds of positions
            raise ValueError(f"{_key_of(config, error.args[0])} is not known") from error
        tied = getattr(model, "all_tied_weights_keys", {})
        named = model.named_parameters()
        wanted = sum(parameter.numel() for name, parameter in named if name not in tied)
    if wanted > 2 * weights + MOST_LABELS * 10:
        raise UserError(
            f"{source}: its config describes a model of {wanted} parameters, its weights hold "
            f"{weights}; config and weights of one model are needed."
        )


def _key_of(config: Any, value: Any) -> str:
    """Name the key that has a value."""
    said = config.to_dict()
    for table in (said, *(inner for inner in said.values() if isinstance(inner, dict))):
        for key, found in table.items():
            if found == value:
                return f"{key} {value!r}"
    return repr(value)
