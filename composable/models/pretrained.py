"""Import of pretrained models: Hugging Face folders and GGUF files, with or without a task head."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from composable import families, tasks
from composable.errors import FormatError, UserError, as_user_error, listed
from composable.families import Family
from composable.models import (
    adapters,
    config_checks,
    gguf_files,
    stored_weights,
    tokenizer_files,
    trial,
)
from composable.models.checkpoint import Checkpoint, config_dict, fingerprint_of
from composable.tasks.base import Classification, Task
from composable.tasks.images import Preparation, default_settings

log = logging.getLogger("composable")
#: Files one of which every tokenizer has.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model")


def import_model(
    source: Path,
    name: str,
    revision: str | None = None,
    prefix: str | None = None,
    task: str | None = None,
    labels: int | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    seed: int = 42,
    ignore_unused: bool = False,
) -> Checkpoint:
    """Make a dense checkpoint of a local pretrained model.

    Args:
        source: a Hugging Face folder (config.json, safetensors weights, tokenizer files), which may
            hold an adapter that is then merged, or a .gguf file.
        name: what the user called it, kept in the file.
        revision: commit of the hub, kept in the file.
        prefix: text before every source sentence; by default what the folder's config says for
            English to German, else what the family expects.
        task: name of the task; by default that of the checkpoint's architecture. Where its head is
            missing, a fresh one is added.
        labels: outputs of a classifier's head; by default those it has, 2 for a fresh one.
        max_length: tokens of a text at most; of a language model, the window.
        dtype: of the weights.
        seed: of a fresh head.
        ignore_unused: go on where the model does not use all of the weights; their names are kept
            in the file.

    Raises:
        UserError: the architecture or the task is not supported; weights are missing, not used,
            quantised or not finite; config, weights and tokenizer do not fit together.
    """
    found = _open(source)
    family = families.by_model_type(found.config.model_type)
    chosen = _task(found, task)
    _check(source, found.config, family, chosen)
    if isinstance(chosen, Classification) and labels is None:
        config_checks.check_names(found.base / "config.json", found.said)
    if max_length and not chosen.has_length:
        raise UserError(f"max_length {max_length}: not for {chosen.name}; leave it out.")
    torch.manual_seed(seed)
    outputs, may_add = chosen.outputs(labels), task is not None or labels is not None
    # what a call hands out beside its result: memory for nothing, and transformers writes no such
    # config for attentions that do not know their weights
    less = {"output_attentions": False, "output_hidden_states": False}
    weights = {**found.reading, **less, "dtype": getattr(torch, dtype)}
    if outputs is not None:
        found.config.num_labels = weights["num_labels"] = outputs
    model, unused = _model(found, chosen, may_add, weights)
    if unused and not ignore_unused:
        raise UserError(
            f"{source}: the model that its config describes does not use {listed(unused)}, so it "
            "may compute something else than it was trained for; correct the config, or give "
            "ignore_unused."
        )
    if family.prepare is not None:
        family.prepare(model)
    is_image = family.image_tokens is not None
    tokenizer = None if is_image else _tokenizer(found, model)
    checkpoint = Checkpoint(model, tokenizer, config_dict(model))
    checkpoint.tokenizer_files = tokenizer_files.files_of(tokenizer)  # as it was read
    trial.try_out(source, model, tokenizer, checkpoint.config)
    checkpoint.info = {
        "source": name,
        "revision": revision,
        "task": chosen.name,
        "prefix": "",
        "data": "embedded" if name == "embedded" else None,
        "dense_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": [],
        **({"unused": unused} if unused else {}),
        **({"max_length": max_length} if max_length else {}),
        **({"image_processor": _image_processor(found, model.config, family)} if is_image else {}),
        **chosen.knows(model.config),
    }
    if model.config.is_encoder_decoder:
        checkpoint.info["prefix"] = _prefix(found.config, family) if prefix is None else prefix
    elif prefix:
        raise UserError(f"prefix {prefix!r}: a {chosen.name} model has none; leave it out.")
    checkpoint.fingerprint = fingerprint_of(checkpoint.config, model.state_dict())
    return checkpoint


@dataclass
class _Found:
    """What is known of a pretrained model before it is built.

    Attributes:
        source: its folder, or .gguf file.
        base: the folder of its config and weights; another one where `source` is an adapter alone.
        reading: arguments of `from_pretrained`.
        config: of transformers.
        said: what config.json says; nothing of a .gguf file.
        stored: name of every tensor -> what it is; empty for a .gguf file.
        reader: of a .gguf file, else None.
    """

    source: Path
    base: Path
    reading: dict[str, Any]
    config: Any
    said: dict[str, Any]
    stored: dict[str, stored_weights.Stored]
    reader: Any = None


def _open(source: Path) -> _Found:
    """Read config and names of the weights, and refuse what cannot be built."""
    # a folder may bring code along, which is never run
    reading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if source.suffix == ".gguf" and not source.is_dir():
        base, reader = source.parent, gguf_files.read(source)
        reading["gguf_file"] = source.name
        problem = f"{source}: no model can be built of what it says"
        with as_user_error(problem), gguf_files.shared(reader):
            config = AutoConfig.from_pretrained(base, **reading)
        return _Found(source, base, reading, config, {}, {}, reader)
    base = adapters.base_of(source)
    path = base / "config.json"
    said = config_checks.read_config(path)
    config_checks.read_generation_config(base / GENERATION_CONFIG_NAME)
    with as_user_error(f"{path}: no model can be built of it"):
        config = AutoConfig.from_pretrained(base, **reading)
    files_of_it = stored_weights.weight_files(base, str(base))
    stored = stored_weights.read_headers(files_of_it, "fetch it again.")
    leftovers = families.by_model_type(config.model_type).leftovers
    stored_weights.check_dtypes(base, stored, leftovers)
    return _Found(source, base, reading, config, said, stored)


def _task(found: _Found, name: str | None) -> Task:
    """Find the task that was asked for, or that a checkpoint's architecture is made for."""
    if name is not None:
        return tasks.by_name(name)
    config, source = found.config, found.source
    architecture = (config.architectures or ["ForCausalLM" if found.reader else "none"])[0]
    task = tasks.of_architecture(architecture, config.num_labels)
    if task is None:
        raise UserError(
            f"{source}: its architecture {architecture} has no head for a task; give the task and, "
            f"for classes, the number of labels (tasks: {', '.join(tasks.names())})."
        )
    return task


def _check(source: Path, config: Any, family: Family, task: Task) -> None:
    """Refuse what a family cannot do, and forms of it that nobody has tried."""
    if family.stacks not in task.stacks:
        raise UserError(
            f"{source}: {family.name} has {' and '.join(family.stacks)} layers, with which "
            f"{task.name} is not done here; choose another task."
        )
    if config.is_encoder_decoder != (len(family.stacks) > 1):
        raise UserError(
            f"{source}: is_encoder_decoder of its config is {config.is_encoder_decoder}, a "
            f"{family.name} has {' and '.join(family.stacks)} layers; correct it."
        )
    is_half = len(family.stacks) == 1 and getattr(config, "add_cross_attention", False)
    if is_half or (family.stacks == ("encoder",) and getattr(config, "is_decoder", False)):
        raise UserError(
            f"{source}: its config says that it is the decoder of another model "
            "(add_cross_attention or is_decoder); a model of its own is needed."
        )


def _model(
    found: _Found, task: Task, may_add: bool, reading: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Load a model with its adapter, if there is one, and check all of its weights.

    Returns:
        The model in eval mode, and the names of weights and settings that it does not use.
    """
    counts = (len(found.stored), sum(math.prod(one.shape) for one in found.stored.values()))
    counts = gguf_files.counts(found.reader) if found.reader else counts
    auto_class = getattr(transformers, task.auto_class)
    config_checks.check_size(found.source, auto_class, found.config, *counts)
    with adapters.set_aside(found.base) as plain, gguf_files.shared(found.reader):
        model, unexpected = _load(plain, task, may_add, reading)
    if found.reader:
        unused = gguf_files.unused(found.source, found.reader, model)
    else:
        unused, heads = stored_weights.unused(model, unexpected, found.stored)
        if heads:
            log.info("%s: not used, of heads for other tasks: %s", found.base, listed(heads))
    model = adapters.merge(model, found.source)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{found.source}: {name} holds NaN or infinity; a sound checkpoint is needed."
            )
    return model.eval(), unused


def _load(
    folder: Path, task: Task, may_add: bool, reading: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """Load the weights, every one from the folder; return the names of those without a place, too.

    With `may_add` a head that is missing, or of another size, is replaced by a fresh one.
    """
    place = folder / reading.get("gguf_file", "")
    model, report = _read(folder, task, reading)
    if prefix := _other_prefix(model, report):  # some heads call what they share by another name
        renamed = {rf"^{prefix}\.": f"{model.base_model_prefix}."}
        model, report = _read(folder, task, {**reading, "key_mapping": renamed})
    other = {name: shapes for name, *shapes in report["mismatched_keys"]}
    missing = sorted({*report["missing_keys"], *other})
    fresh = [name for name in missing if may_add and _is_head(name, model)]
    for name, (stored, wanted) in sorted(other.items()):
        if name not in fresh:
            remedy = "correct config.json, or fetch the model again"
            if _is_head(name, model):
                remedy = "name the task or the number of labels, and a fresh head replaces it"
            raise UserError(
                f"{place}: {name} is of shape {tuple(stored)}, its config asks for "
                f"{tuple(wanted)}; {remedy}."
            )
    if lost := [name for name in missing if name not in fresh]:
        raise UserError(f"{place}: the weights lack {listed(lost)}{_remedy(lost, model, report)}.")
    _refuse_other_head(place, task, model, set(missing))
    if model.config.problem_type == config_checks.SEVERAL:
        if not fresh:
            raise UserError(
                f'{place}: problem_type is "{config_checks.SEVERAL}", which is not supported here: '
                "several classes of a sample cannot be trained or measured; name another task or "
                "number of labels, and a fresh head for one class of each sample replaces it."
            )
        model.config.problem_type = None
    if fresh:
        log.info("%s: a fresh head for %s: %s", place, task.name, ", ".join(fresh))
    if not task.fits(model.config.num_labels):
        raise UserError(
            f"{place}: {task.name} is not done with {model.config.num_labels} outputs; give "
            "the number of labels, or another task."
        )
    return model, set(report["unexpected_keys"])


def _remedy(lost: list[str], model: Any, report: dict[str, Any]) -> str:
    """Say what can be done about weights that a folder lacks, as the end of a sentence."""
    if {*lost} <= {*(getattr(model, "_tied_weights_keys", None) or ())}:
        return "; set tie_word_embeddings to true where they are those of the embeddings"
    if all(_is_head(name, model) for name in lost):
        return "; name the task"
    others = sorted(report["unexpected_keys"])
    return f", and hold {listed(others)}, which it does not know; rename them" if others else ""


def _read(folder: Path, task: Task, reading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its table of what is missing: we say it
    try:
        with as_user_error(f"{folder}: weights cannot be loaded"):
            model, report = getattr(transformers, task.auto_class).from_pretrained(
                folder,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, too
                **reading,
            )
    finally:
        transformers.utils.logging.set_verbosity(said)
    return model, report


def _other_prefix(model: Any, report: dict[str, Any]) -> str | None:
    """Find by what name a checkpoint calls the trunk, where that is why all of it is missing."""
    own = f"{model.base_model_prefix}."
    wanted = {name.removeprefix(own) for name in report["missing_keys"] if name.startswith(own)}
    for prefix in {name.partition(".")[0] for name in report["unexpected_keys"]}:
        if wanted and all(f"{prefix}.{name}" in report["unexpected_keys"] for name in wanted):
            return prefix
    return None


def _refuse_other_head(place: Path, task: Task, model: Any, missing: set[str]) -> None:
    """Refuse a head of the right shape that the checkpoint's architecture has for another task."""
    architecture = (model.config.architectures or [""])[0]
    shared = {id(parameter) for parameter in model.base_model.parameters()}
    heads = [name for name, parameter in model.named_parameters() if id(parameter) not in shared]
    found = [name for name in heads if name not in missing]
    if architecture and not architecture.endswith(task.heads) and found:
        raise UserError(
            f"{place}: {found[0]} is the head of a {architecture}, not one for {task.name}; give "
            "another task or number of labels, or take this head out of the weights."
        )


def _is_head(name: str, model: Any) -> bool:
    """Tell whether a parameter lies outside of what all heads share; a pooler counts as head."""
    trunk = {id(parameter) for parameter in model.base_model.parameters()}
    return id(model.get_parameter(name)) not in trunk or ".pooler." in f".{name}"


def _tokenizer(found: _Found, model: Any) -> Any:
    """Read the tokenizer, the adapter's own before that of its model, and compare it with both."""
    has_own = any((found.source / name).is_file() for name in TOKENIZERS)
    folder = found.source if has_own else found.base
    with as_user_error(f"{folder}: no readable tokenizer"), gguf_files.shared(found.reader):
        tokenizer = AutoTokenizer.from_pretrained(folder, **found.reading)
        rows = model.get_input_embeddings().num_embeddings
        if not found.reader and (unknown := tokenizer_files.drop_special(tokenizer, rows)):
            log.info("%s: left out, as the model has no row for it: %s", folder, listed(unknown))
        ids = tokenizer.get_vocab().values()
        last = gguf_files.tokens(found.reader) - 1 if found.reader else max(ids)
    if last >= rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {last}, the model embeds {rows} tokens; the "
            "tokenizer that belongs to these weights is needed."
        )
    if model.config.is_encoder_decoder:
        start = getattr(model.config, "decoder_start_token_id", None)
        said = model.generation_config  # made of the config where there is no such file
        for what, token in (
            ("the config has no decoder_start_token_id", start),
            ("the config has no pad_token_id", model.config.pad_token_id),
            ("generation_config.json has no decoder_start_token_id", said.decoder_start_token_id),
            ("generation_config.json has no pad_token_id", said.pad_token_id),
            ("the tokenizer has no pad token", tokenizer.pad_token_id),
            ("the tokenizer has no end token (eos)", tokenizer.eos_token_id),
        ):
            if not isinstance(token, int) or not 0 <= token < rows:
                raise UserError(
                    f"{folder}: {what}, or not one below {rows}, which a translation needs; add "
                    "what the model was trained with."
                )
    return tokenizer


def _image_processor(found: _Found, config: Any, family: Family) -> dict[str, Any]:
    """Return the settings of transformers' image processor for a folder, and try them."""
    folder = found.base
    names = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        settings = default_settings(config, family)
        log.info("%s: no %s; images are prepared by %s", folder, names[0], settings)
    else:
        settings = _stored_processor(folder, name)
    try:
        return Preparation(settings, config).settings
    except FormatError as error:
        raise UserError(f"{folder / (name or '')}: {error}") from error


def _stored_processor(folder: Path, name: str) -> dict[str, Any]:
    with as_user_error(f"{folder / name}: is no image processor that transformers can build"):
        said = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)[0]
        kind = said.get("image_processor_type")
        if isinstance(kind, str) and kind.endswith("FeatureExtractor"):
            # as transformers called them until version 4, and wrote them under either key
            kind = kind.replace("FeatureExtractor", "ImageProcessor")
            return {**said, "image_processor_type": kind}
        found = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        return json.loads(found.to_json_string())  # type: ignore[no-any-return]


def _prefix(config: Any, family: Family) -> str:
    """Source prefix that the checkpoint was trained with."""
    found = (getattr(config, "task_specific_params", None) or {}).get("translation_en_to_de")
    found = found if isinstance(found, dict) else {}
    if others := sorted(found.keys() - {"prefix"}):
        log.info("of the config's task_specific_params not taken: %s", ", ".join(others))
    said = found.get("prefix")
    return said if isinstance(said, str) else family.default_prefix
