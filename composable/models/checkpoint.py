"""The .pth of a model: read, rebuild, write."""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from composable import families, files
from composable.errors import FormatError, MismatchError, UserError, said_by, shortened
from composable.families import Family
from composable.formats.container import unpack_mask
from composable.formats.sealed_file import SEAL_SIZE, check_sizes, open_sealed, sealed
from composable.models import tokenizer_files
from composable.models.config_checks import MOST_LABELS, MOST_LAYERS
from composable.models.structure import Structure, from_json, to_json
from composable.models.surgery import apply_structure
from composable.progress import Stage, bytes_of

transformers.utils.logging.disable_progress_bar()  # its bars say nothing that ours do not


FORMAT, VERSION = "composable.model", 4
#: What decides, beside the tokenizer, how a model reads: keys of a checkpoint's info.
READING = ("prefix", "max_length", "image_processor")
# values that say where a config was read, not what the model is
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


@dataclass
class Checkpoint:
    """A model file in memory.

    Attributes:
        model: in eval mode, weights tied.
        tokenizer: its tokenizer; None for models of images.
        config: the dense model's config as stored, whatever was removed since.
        structure: how its shapes differ from the dense model's.
        masks: parameter name -> boolean tensor, True where the weight stays.
        fingerprint: of the dense model that this one was made of.
        tokenizer_files: those of the tokenizer as they were read, name -> bytes; it remembers how
            it was used last, and would write that down. None: what the tokenizer writes.
        info: source, revision, task, prefix, data, dense_parameters, history, and what the task
            needs to know of the model: languages, labels, max_length, image_processor.
    """

    model: PreTrainedModel
    tokenizer: Any
    config: dict[str, Any]
    structure: Structure = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: Mapping[str, Tensor] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing was pruned."""
        return not self.masks and not self.structure

    @property
    def family(self) -> Family:
        """The model's family."""
        return families.of(self.model)

    @property
    def stored_tokenizer(self) -> Mapping[str, Tensor]:
        """Its tokenizer's files as a model file has them."""
        if self.tokenizer_files is None:
            return tokenizer_files.files_of(self.tokenizer)
        return self.tokenizer_files

    @property
    def reading(self) -> dict[str, Any]:
        """What the model makes of texts and images before it sees them; JSON.

        Results that follow from data are kept with it: with the same weights (`fingerprint`) and
        another tokenizer, prefix or size they are of no use.
        """
        files_of = sorted(self.stored_tokenizer.items())
        digests = {name: hashlib.sha256(_bytes_of(tensor)).hexdigest() for name, tensor in files_of}
        said = {key: self.info.get(key) or None for key in READING}
        return {"tokenizer": files.digest_of(digests), **said}

    def require_reading(self, path: Path, reading: Any) -> None:
        """Compare the `reading` with that of a file, which is None where it has none.

        Raises:
            MismatchError: they differ.
        """
        ours, theirs = self.reading, reading if isinstance(reading, dict) else {}
        other = [key for key in ours if ours[key] != theirs.get(key)]
        if reading is not None and other:
            raise MismatchError(
                f"{path}: made with another {' and another '.join(other)} than that of this model; "
                "make it again, or name the model file that it was made with."
            )

    def require_dense(self, path: Path, purpose: str) -> None:
        """Refuse a composed model where only a dense one makes sense.

        Raises:
            MismatchError: the model is composed.
        """
        if not self.is_dense:
            raise MismatchError(
                f"{path}: is a composed model, {purpose} needs the dense one "
                "(the file that download_model.py wrote)."
            )


def config_dict(model: PreTrainedModel) -> dict[str, Any]:
    """Return the config as it is stored: without the values that change from machine to machine."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def unique_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in order of the names, tied weights once."""
    seen: set[tuple[int, int]] = set()
    for name in sorted(tensors):
        tensor = tensors[name]
        place = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        yield name, tensor


def fingerprint_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a model: SHA-256 over its config and the bytes of all its tensors.

    Args:
        config: as stored in the model file.
        tensors: the state dict; tied weights count once, under the first of their sorted names.

    Returns:
        64 hexadecimal digits. The hash runs over the canonical JSON of the config, then, for each
        name in sorted order, the JSON list [name, dtype, shape] and the raw little-endian bytes.
    """
    with bytes_of("fingerprint", sum(t.nbytes for _, t in unique_tensors(tensors))) as stage:
        return fingerprint_of_stream(config, _counted(unique_tensors(tensors), stage))


def _counted(tensors: Iterable[tuple[str, Tensor]], stage: Stage) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        stage.update(tensor.nbytes)


def fingerprint_of_stream(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash as `fingerprint_of` does, with one tensor of `unique_tensors` at a time in memory."""
    total = hashlib.sha256(files.canonical_json(dict(config)).encode())
    for name, tensor in tensors:
        total.update(files.canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(_bytes_of(tensor))
    return total.hexdigest()


def load(path: Path) -> Checkpoint:
    """Read a model file and check every byte of it.

    Returns:
        The model in eval mode, made of the bytes that were checked, which were read once.

    Raises:
        FormatError: not a model file of this project, or damaged.
        OSError: the file cannot be read.
    """
    stored = _read(path)
    try:
        return _rebuild(stored)
    except UserError as error:
        raise FormatError(f"{path}: {str(error).rstrip('.')}.") from error
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers have errors of many kinds
        if getattr(error, "errno", None) in files.DISK_FULL:  # the tokenizer is read from a folder
            raise
        raise FormatError(
            f"{path}: its parts do not fit together ({shortened(said_by(error))}); make it again."
        ) from error


def _rebuild(stored: Mapping[str, Any]) -> Checkpoint:
    """Make the model of what a file holds."""
    config = files.parse_json(stored["config"])
    structure = from_json(files.parse_json(stored["structure"]))
    state: dict[str, Tensor] = stored["state_dict"]
    with torch.device("meta"):  # costs nothing, whatever sizes the config has
        _check_shapes(build(config, structure, len(state)), state)
    model = build(config, structure, len(state))
    model.load_state_dict(state, strict=True, assign=True)
    tie_shared(model)
    model.eval()
    generation = files.parse_json(stored["generation_config"])
    if generation is not None:
        _check_token_ids(generation, model)
        model.generation_config = GenerationConfig.from_dict(generation)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    masks = {
        name: torch.from_numpy(unpack_mask(packed.numpy(), shapes[name]))
        for name, packed in stored["masks"].items()
    }
    if not structure and not masks:
        _check_fingerprint(stored["fingerprint"], config, model)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer_files.load(stored["tokenizer"]),
        config=config,
        structure=structure,
        masks=masks,
        fingerprint=stored["fingerprint"],
        info=_info(files.parse_json(stored["info"])),
        tokenizer_files={name: tensor.clone() for name, tensor in stored["tokenizer"].items()},
    )


def _check_fingerprint(fingerprint: str, config: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse a dense model that is not the one it says it is."""
    if (found := fingerprint_of(config, model.state_dict())) != fingerprint:
        problem = (
            f"its fingerprint is {fingerprint:.12}, that of its config and weights {found:.12}"
        )
        raise FormatError(f"{problem}; make it again")


def _check_token_ids(generation: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse ids that are no numbers; the two that a translation needs have to be tokens."""
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.num_embeddings
    needed = ("decoder_start_token_id", "pad_token_id") if model.config.is_encoder_decoder else ()
    for key in sorted({*needed, *(key for key in generation if key.endswith("_token_id"))}):
        value = generation.get(key)
        if key in needed:
            is_sound = type(value) is int and 0 <= value < rows
        else:  # may be odd, as nothing uses it: early Llamas say -1
            may_be_several = key in ("eos_token_id", "forced_eos_token_id")
            listed = value if may_be_several and isinstance(value, list) else [value]
            is_sound = all(each is None or type(each) is int for each in listed)
        if not is_sound:
            raise FormatError(
                f"its generation_config has {key} {value!r:.40}, a token below {rows} was "
                "expected; make it again"
            )


def _info(value: Any) -> dict[str, Any]:
    """Check the keys of `info` that are known; others may come later."""
    found = value if isinstance(value, dict) else {}
    for key, hints in _INFO.items():
        met = found.get(key)
        is_bounded = type(met) is not int or 0 < met < 2**53
        if type(met) not in hints or not is_bounded:
            raise FormatError(f"its info has {key} {met!r:.40}, see docs/formats.md; make it again")
    return found


_INFO: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "task": (str,),
    "history": (list,),
    "prefix": (str, type(None)),
    "data": (str, type(None)),
    "dense_parameters": (int, type(None)),
    "max_length": (int, type(None)),
}


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a model file, whole or not at all; equal checkpoints give equal bytes.

    Whoever makes or trains a dense model sets its fingerprint, see `fingerprint_of`.

    Raises:
        FormatError: it has none.
        OSError: the file cannot be written; an older one stays.
    """
    if not checkpoint.fingerprint:
        raise FormatError(f"{path}: not written: the model has no fingerprint; give it one.")
    model = checkpoint.model
    state = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    generation = _generation(model)
    stored: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": files.canonical_json(checkpoint.config),
        "generation_config": files.canonical_json(generation),
        "structure": files.canonical_json(to_json(checkpoint.structure)),
        "info": files.canonical_json(checkpoint.info),
        "fingerprint": checkpoint.fingerprint,
        "tokenizer": dict(checkpoint.stored_tokenizer),
        "masks": {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy()))
            for name, mask in sorted(checkpoint.masks.items())
        },
        "state_dict": state,
    }
    # torch.save writes the name of its target into the archive: equal models need one name
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    content = buffer.getbuffer()
    size = len(content) + SEAL_SIZE
    with files.atomic_write(path) as file, bytes_of(f"write {path.name}", size) as stage:
        for piece in sealed(content):
            file.write(piece)
            stage.update(len(piece))


def _generation(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the settings of `generate`; None for models that do not generate."""
    if not isinstance(getattr(model, "generation_config", None), GenerationConfig):
        return None
    found = json.loads(model.generation_config.to_json_string(use_diff=True))
    return {key: value for key, value in found.items() if key not in _VOLATILE}


def _read(path: Path) -> dict[str, Any]:
    """Load the stored dict without executing anything."""
    if path.is_dir():
        raise FormatError(
            f"{path}: a folder, a model file was expected; download_model.py makes one of a "
            "pretrained model's folder."
        )
    try:
        with open_sealed(path, _MADE_BY) as file:
            _check_archive(path, file)
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except (UserError, OSError):
        raise
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path}: holds pickled Python objects, which are never executed; {_MADE_BY}"
        ) from error
    except Exception as error:
        raise FormatError(
            f"{path}: unreadable ({shortened(said_by(error))}); make it again."
        ) from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise FormatError(f"{path}: not a model file of this tool; {_MADE_BY}")
    if stored.get("version") != VERSION:
        raise FormatError(
            f"{path}: version {stored.get('version')} of the format, this program reads {VERSION}; "
            "make it again with download_model.py or compose_model.py."
        )
    _check_stored(path, stored)
    return stored


def _check_archive(path: Path, file: BinaryIO) -> None:
    try:
        check_sizes(file)
    except FormatError as error:
        raise FormatError(f"{path}: {error}; make it again.") from error


def _check_stored(path: Path, stored: Mapping[str, Any]) -> None:
    """Refuse what `save` does not write: other keys or types, numbers that are not finite."""
    found = {key: type(value) for key, value in stored.items()}
    for key, dtypes in _TENSORS.items():
        group = stored.get(key)
        is_sound = isinstance(group, dict) and all(
            type(name) is str and isinstance(each, Tensor) and each.dtype in dtypes
            and each.is_contiguous() and each.device.type == "cpu"
            for name, each in group.items()
        )  # fmt: skip
        if not is_sound:
            raise FormatError(f"{path}: its {key} is not what docs/formats.md says; make it again.")
    if found != dict.fromkeys(_TEXTS, str) | {"version": int} | dict.fromkeys(_TENSORS, dict):
        raise FormatError(f"{path}: has not the keys of docs/formats.md; make it again.")
    for name in stored["tokenizer"]:
        if name != Path(name).name:  # it will be a file in a folder of ours
            raise FormatError(
                f"{path}: {name!r:.80} is no name of a tokenizer's file; make it again."
            )
    for name, weight in stored["state_dict"].items():
        if weight.numel() and not all(map(math.isfinite, map(float, weight.aminmax()))):
            raise FormatError(f"{path}: {name} holds NaN or infinity; make it again.")


_TEXTS = ("format", "config", "generation_config", "structure", "info", "fingerprint")
_TENSORS = {
    "tokenizer": (torch.uint8,),
    "masks": (torch.uint8,),
    "state_dict": (torch.float32, torch.bfloat16),
}
_MADE_BY = "a file made by download_model.py or compose_model.py was expected."


def _bytes_of(tensor: Tensor) -> memoryview:
    """View the raw bytes of a tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw) if flat.numel() else memoryview(b"")


#: Ends of the names of keys -> the most that a model may have.
_MOST = {"layer": MOST_LAYERS, "layers": MOST_LAYERS, "labels": MOST_LABELS}


def build(
    config: Mapping[str, Any], structure: Structure, tensors: int | None = None
) -> PreTrainedModel:
    """Make a model without weights: the dense shapes, then the structure.

    Args:
        config: of the dense model.
        structure: how the model's shapes differ from it.
        tensors: how many a file has, of which every layer needs one at least; None: any number.

    Raises:
        FormatError: there is no such architecture, or the config asks for too much.
    """
    for key, value in config.items():
        most = _MOST.get(key.rpartition("_")[2], value)
        if isinstance(value, int) and value > most:
            raise FormatError(f"its config has {key} {value}, at most {most} were expected.")
    architecture = getattr(transformers, str(config["architectures"][0]), None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise FormatError(f"unknown architecture {config['architectures'][0]!r}.")
    family = families.by_model_type(config["model_type"])
    settings = AutoConfig.for_model(**config)
    for count in (count for stack in family.layers for count in stack.counts):
        layers = getattr(settings, count, 0)
        if tensors is not None and layers > tensors + len(structure):
            raise FormatError(f"its config has {layers} layers, its {tensors} tensors are fewer.")
    with init_empty_weights(include_buffers=False):  # buffers are computed, not stored
        model = architecture(settings)
    if family.prepare is not None:
        family.prepare(model)
    apply_structure(model, family, structure)
    return model


def _check_shapes(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of a model on the meta device."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        met = f"shape {tuple(state[name].shape)}" if name in state else "no weights"
        wanted = f"shape {tuple(expected[name])}" if name in expected else "none"
        if met != wanted:
            problem = f'"{name}" has {met}, its config and structure ask for {wanted}'
            raise FormatError(f"its parts do not fit together: {problem}; make it again.")


def tie_shared(model: PreTrainedModel) -> None:
    """Make one parameter of the names that share their storage in the file, and of no others.

    load_state_dict(assign=True) leaves them separate: an optimizer would step each. Not
    model.tie_weights(): it ties the vocabulary projection of T5 v1.1, Flan and mT5, which is
    their own, since the config of these models says "tied" as well.
    """
    first: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.numel():
            parent, _, child = name.rpartition(".")
            shared = first.setdefault(parameter.data_ptr(), parameter)
            setattr(model.get_submodule(parent), child, shared)
    for target, source in list(model.all_tied_weights_keys.items()):
        if model.get_parameter(target) is not model.get_parameter(source):
            model.all_tied_weights_keys.pop(target)  # as from_pretrained does
