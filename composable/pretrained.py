"""Import of pretrained models: Hugging Face folders and GGUF files, with or without a task head."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from composable import families, files, tasks
from composable.checkpoint import Checkpoint, config_dict, fingerprint_of
from composable.errors import UserError
from composable.families import Family

if TYPE_CHECKING:
    from composable.tasks.base import Task

log = logging.getLogger("composable")
DTYPES = ("float32", "bfloat16")
#: What images are normalised with where a folder does not say it.
MEAN = STD = 0.5


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
    reading: dict[str, Any] = {"local_files_only": True, **({"gguf_file": gguf} if gguf else {})}
    config = _config(folder, reading)
    family = families.by_model_type(config.model_type)
    chosen = _task(config, source, task, bool(gguf))
    if family.stacks not in chosen.stacks:
        raise UserError(
            f"{source}: {family.name} has {' and '.join(family.stacks)} layers, with which "
            f"{chosen.name} is not done here; choose another --task."
        )
    model = _load(folder, family, chosen, reading, getattr(torch, dtype), labels, seed, bool(task))
    if family.prepare is not None:
        family.prepare(model)
    is_image = family.image_tokens is not None
    checkpoint = Checkpoint(
        model=model,
        tokenizer=None if is_image else _tokenizer(folder, reading),
        config=config_dict(model),
    )
    checkpoint.info = {
        "source": name,
        "revision": revision,
        "task": chosen.name,
        "prefix": "",
        "data": "embedded" if name == "embedded" else None,
        "dense_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "history": [],
        **({"max_length": max_length} if max_length else {}),
        **({"image": _image(folder, model.config)} if is_image else {}),
        **chosen.knows(model.config),
    }
    if model.config.is_encoder_decoder:
        checkpoint.info["prefix"] = _prefix(config, family) if prefix is None else prefix
    elif prefix:
        raise UserError(f"--prefix {prefix!r}: a {chosen.name} model has none; leave it out.")
    checkpoint.fingerprint = fingerprint_of(checkpoint.config, model.state_dict())
    return checkpoint


def _config(folder: Path, reading: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **reading)
    except (ValueError, KeyError, OSError, ImportError) as error:
        what = reading.get("gguf_file", "config.json")
        raise UserError(f"{folder}: no readable {what} ({_first_line(error)}).") from error


def _task(config: Any, source: Path, name: str | None, is_gguf: bool) -> "Task":
    """Find the task that was asked for, or that a checkpoint's architecture is made for."""
    if name is not None:
        return tasks.by_name(name)
    architecture = (config.architectures or ["ForCausalLM" if is_gguf else "none"])[0]
    found = tasks.of_architecture(architecture, config.num_labels)
    if found is None:
        raise UserError(
            f"{source}: its architecture {architecture} has no head for a task; give --task and, "
            f"for classes, --labels (tasks: {', '.join(tasks.names())})."
        )
    return found


def _load(
    folder: Path, family: Family, task: "Task", reading: dict[str, Any], dtype: torch.dtype,
    labels: int | None, seed: int, may_add: bool,
) -> PreTrainedModel:  # fmt: skip
    """Load the weights; every one must be in the folder, but those of a fresh head, and finite."""
    torch.manual_seed(seed)
    try:
        model, report = getattr(transformers, task.auto_class).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **reading,
            **_head(task, labels, reading),
        )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded ({_first_line(error)}).") from error
    missing = sorted(report["missing_keys"])
    fresh = [name for name in missing if may_add and _is_head(name, model, family)]
    if len(fresh) < len(missing):
        raise UserError(
            f"{folder}: the weights lack {', '.join(name for name in missing if name not in fresh)}"
            f"{'' if may_add else '; if that is the head of a task, name it with --task'}."
        )
    if fresh:
        log.info("%s: a fresh head for %s: %s", folder, task.name, ", ".join(fresh))
    _check_finite(model, folder)
    return model.eval()  # type: ignore[no-any-return]


def _head(task: "Task", labels: int | None, reading: dict[str, Any]) -> dict[str, Any]:
    """Arguments that shape the head of a model."""
    count = task.outputs(labels)
    return {} if count is None else {"num_labels": count}


def _is_head(name: str, model: Any, family: Family) -> bool:
    """Tell whether a parameter lies outside of what all models of a family share."""
    trunk = f"{model.base_model_prefix}."
    return not name.startswith(trunk) or name.startswith(f"{trunk}pooler.")


def _check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{folder}: {name} holds NaN or infinity; a sound checkpoint is needed."
            )


def _tokenizer(folder: Path, reading: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, **reading)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: no readable tokenizer ({_first_line(error)}).") from error


def _image(folder: Path, config: Any) -> dict[str, Any]:
    """Say how images are prepared: size, mean and standard deviation of every channel."""
    path = folder / "preprocessor_config.json"
    stored = files.read_json(path) if path.is_file() else {}
    if stored.get("do_center_crop") and stored.get("crop_size"):
        log.warning("%s: its images are cropped; here they are resized as a whole.", path)
    size = config.image_size
    channels = config.num_channels

    def listed(value: Any) -> list[float]:
        return list(value) if isinstance(value, Sequence) else [value] * channels

    return {
        "size": [size, size] if isinstance(size, int) else list(size),
        "mean": listed(stored.get("image_mean", MEAN)),
        "std": listed(stored.get("image_std", STD)),
    }


def _prefix(config: Any, family: Family) -> str:
    """Source prefix that the checkpoint was trained with."""
    found = getattr(config, "task_specific_params", None) or {}
    return str(found.get("translation_en_to_de", {}).get("prefix", family.default_prefix))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
