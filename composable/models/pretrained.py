"""Import of pretrained models: Hugging Face folders and GGUF files, with or without a task head."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from composable import families, files, tasks
from composable.errors import FormatError, UserError
from composable.families import Family
from composable.models import tokenizer_files
from composable.models.checkpoint import Checkpoint, config_dict, fingerprint_of, first_line
from composable.tasks.base import Task
from composable.tasks.images import Preparation, default_settings

log = logging.getLogger("composable")


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
) -> Checkpoint:
    """Make a dense checkpoint of a local pretrained model.

    Args:
        source: a Hugging Face folder (config.json, safetensors weights, tokenizer files), or a
            .gguf file.
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

    Raises:
        UserError: the architecture or the task is not supported, weights are missing or not finite.
    """
    folder, gguf = (source.parent, source.name) if source.suffix == ".gguf" else (source, None)
    # a folder may bring code along, which is never run
    reading: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf:
        reading["gguf_file"] = gguf
    config = _config(folder, reading)
    family = families.by_model_type(config.model_type)
    chosen = _task(config, source, task, bool(gguf))
    _check(source, config, family, chosen)
    if max_length and not chosen.has_length:
        raise UserError(f"max_length {max_length}: not for {chosen.name}; leave it out.")
    torch.manual_seed(seed)
    outputs, may_add = chosen.outputs(labels), task is not None or labels is not None
    weights = {**reading, "dtype": getattr(torch, dtype)}
    weights |= {} if outputs is None else {"num_labels": outputs}
    model = _load(folder, chosen, may_add, weights)
    if family.prepare is not None:
        family.prepare(model)
    is_image = family.image_tokens is not None
    tokenizer = None if is_image else _tokenizer(folder, reading)
    checkpoint = Checkpoint(model, tokenizer, config_dict(model))
    checkpoint.tokenizer_files = tokenizer_files.files_of(tokenizer)
    checkpoint.info = {
        "source": name,
        "revision": revision,
        "task": chosen.name,
        "prefix": "",
        "data": "embedded" if name == "embedded" else None,
        "dense_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": [],
        **({"max_length": max_length} if max_length else {}),
        **({"image_processor": _image_processor(folder, model.config, family)} if is_image else {}),
        **chosen.knows(model.config),
    }
    if model.config.is_encoder_decoder:
        checkpoint.info["prefix"] = _prefix(config, family) if prefix is None else prefix
    elif prefix:
        raise UserError(f"prefix {prefix!r}: a {chosen.name} model has none; leave it out.")
    checkpoint.fingerprint = fingerprint_of(checkpoint.config, model.state_dict())
    return checkpoint


def _config(folder: Path, reading: dict[str, Any]) -> Any:
    stored = folder / "config.json"
    if "gguf_file" not in reading and stored.is_file():  # transformers may not know it either
        kind = files.read_json(stored)
        if isinstance(kind, dict) and isinstance(kind.get("model_type"), str):
            families.by_model_type(kind["model_type"])
    try:
        return AutoConfig.from_pretrained(folder, **reading)
    except (ValueError, KeyError, OSError, ImportError) as error:
        what = reading.get("gguf_file", "config.json")
        raise UserError(f"{folder}: no readable {what} ({first_line(error)}).") from error


def _task(config: Any, source: Path, name: str | None, is_gguf: bool) -> Task:
    """Find the task that was asked for, or that a checkpoint's architecture is made for."""
    if name is not None:
        return tasks.by_name(name)
    architecture = (config.architectures or ["ForCausalLM" if is_gguf else "none"])[0]
    found = tasks.of_architecture(architecture, config.num_labels)
    if found is None:
        raise UserError(
            f"{source}: its architecture {architecture} has no head for a task; give the task and, "
            f"for classes, the number of labels (tasks: {', '.join(tasks.names())})."
        )
    return found


def _check(source: Path, config: Any, family: Family, task: Task) -> None:
    """Refuse what a family cannot do, and forms of it that nobody has tried."""
    if family.stacks not in task.stacks:
        raise UserError(
            f"{source}: {family.name} has {' and '.join(family.stacks)} layers, with which "
            f"{task.name} is not done here; choose another task."
        )
    is_half = len(family.stacks) == 1 and getattr(config, "add_cross_attention", False)
    if is_half or (family.stacks == ("encoder",) and getattr(config, "is_decoder", False)):
        raise UserError(
            f"{source}: its config says that it is the decoder of another model "
            "(add_cross_attention or is_decoder); a model of its own is needed."
        )


def _load(folder: Path, task: Task, may_add: bool, reading: dict[str, Any]) -> PreTrainedModel:
    """Load the weights, all of them finite, every one from the folder.

    With `may_add` a head that is missing, or of another size, is replaced by a fresh one.
    """
    model, report = _read(folder, task, reading)
    if prefix := _other_prefix(model, report):  # some heads call what they share by another name
        renamed = {rf"^{prefix}\.": f"{model.base_model_prefix}."}
        model, report = _read(folder, task, {**reading, "key_mapping": renamed})
    other = {name: shapes for name, *shapes in report["mismatched_keys"]}
    missing = sorted({*report["missing_keys"], *other})
    fresh = [name for name in missing if may_add and _is_head(name, model)]
    for name, (stored, wanted) in sorted(other.items()):
        if name not in fresh:
            raise UserError(
                f"{folder}: {name} is of shape {tuple(stored)}, the model needs {tuple(wanted)}"
                f"{'; another task or labels replace it' if _is_head(name, model) else ''}."
            )
    lost = [name for name in missing if name not in fresh]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(
            f"{folder}: the weights lack {', '.join(lost[:3])}{more}"
            f"{'; name the task' if _is_head(lost[0], model) else ''}."
        )
    if fresh:
        log.info("%s: a fresh head for %s: %s", folder, task.name, ", ".join(fresh))
    if not task.fits(model.config.num_labels):
        raise UserError(
            f"{folder}: {task.name} is not done with {model.config.num_labels} outputs; give "
            "the number of labels, or another task."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{folder}: {name} holds NaN or infinity; a sound checkpoint is needed."
            )
    return model.eval()  # type: ignore[no-any-return]


def _read(folder: Path, task: Task, reading: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    said = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # its table of what is missing: we say it
    try:
        model, report = getattr(transformers, task.auto_class).from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, too
            **reading,
        )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded ({first_line(error)}).") from error
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


def _is_head(name: str, model: Any) -> bool:
    """Tell whether a parameter lies outside of what all heads share; a pooler counts as head."""
    trunk = {id(parameter) for parameter in model.base_model.parameters()}
    return id(model.get_parameter(name)) not in trunk or ".pooler." in f".{name}"


def _tokenizer(folder: Path, reading: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, **reading)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: no readable tokenizer ({first_line(error)}).") from error


def _image_processor(folder: Path, config: Any, family: Family) -> dict[str, Any]:
    """Return the settings of transformers' image processor for a folder, and try them."""
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
    try:
        found = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        return json.loads(found.to_json_string())  # type: ignore[no-any-return]
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / name}: is no image processor that transformers can build "
            f"({first_line(error)})."
        ) from error


def _prefix(config: Any, family: Family) -> str:
    """Source prefix that the checkpoint was trained with."""
    found = getattr(config, "task_specific_params", None) or {}
    return str(found.get("translation_en_to_de", {}).get("prefix", family.default_prefix))
