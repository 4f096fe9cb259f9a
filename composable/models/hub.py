"""Where a pretrained model is: on the Hugging Face hub, in a local folder, a .gguf file."""

import glob
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub.utils
from huggingface_hub import constants, errors

from composable import files, progress
from composable.errors import FormatError, UserError
from composable.models import adapters
from composable.models.stored_weights import (
    WEIGHTS,
    WEIGHTS_INDEX,
    read_headers,
    shards,
    weight_files,
)
from composable.progress import log

EMBEDDED = "embedded"
GGUF = ".gguf"
# Weights in formats that run code on loading (.bin, .pt, .h5) and other copies of them stay out.
# The shards of large models are called as the index says.
WANTED = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    WEIGHTS,
    WEIGHTS_INDEX,
    adapters.CONFIG,
    adapters.WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def resolve_model(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Find the folder of a pretrained model, downloading it where it is on the hub.

    Args:
        source: "embedded", a local folder with a config.json, a .gguf file, or a hub id
            (owner/name); what is there goes before a hub id of the same name.
        revision: branch, tag or commit of a hub id; None is its main branch.

    Returns:
        The folder (checked: weights are safetensors and whole) or the .gguf file, and the commit
        hash where it came from the hub, else None.

    Raises:
        UserError: there is no such model, it may not be read, or the hub cannot be reached.
        FormatError: the folder is not a model's, is damaged, or has pickled weights only.
        OSError: the cache cannot be written.
    """
    local = files.assets(EMBEDDED) if source == EMBEDDED else Path(source).expanduser()
    if source and local.exists():  # an empty name would be the working folder
        if revision is not None:
            raise UserError(
                f'revision "{revision}": "{source}" is on this disk and has no revisions; '
                "leave the option out, or give a hub id."
            )
        if local.suffix == GGUF and local.is_file():
            return local, None
        _check_folder(local, f"give a folder with config.json and {WEIGHTS}.")
        return local, None
    if source and local.is_symlink():
        raise UserError(f"{source}: a link that leads nowhere; give a folder or a .gguf file.")
    _check_hub_id(source)
    folder = _download(source, revision)
    kept = folder.parent.parent  # with what its links lead to
    _check_folder(folder, f"if it should be whole, delete {kept} and run this again.", source)
    return folder, folder.name


def _check_hub_id(source: str) -> None:
    """Refuse what cannot be a hub id, a path above all."""
    try:
        huggingface_hub.utils.validate_repo_id(source)
    except errors.HFValidationError as error:
        raise UserError(
            f'"{source}": no such folder, and not a hub id; '
            f'give "{EMBEDDED}", a local folder or a hub id (owner/name).'
        ) from error


def _download(source: str, revision: str | None) -> Path:
    """Fetch a snapshot of a repository into the hub's own cache, or take it from there."""
    # progress bars of large files alone (`_fetch`), and one line of our own on a failure
    if not log.isEnabledFor(logging.DEBUG):
        huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    try:
        return _snapshot(source, revision)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise UserError(_refusal(source, revision, error)) from error
    except (errors.HTTPError, RuntimeError) as error:  # a broken connection; of the Xet client
        raise UserError(_interruption(source, error)) from error
    except OSError as error:
        if error.errno is None:  # the client's check of a file's size
            raise UserError(_interruption(source, error)) from error
        error.filename = error.filename or constants.HF_HUB_CACHE
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source}: what answered is no hub ({type(error).__name__}: {error}); a proxy or a "
            "login page may be in between: open the hub's page in a browser, then try again."
        ) from error


def _snapshot(source: str, revision: str | None) -> Path:
    """Bring the wanted files of a revision into the cache, one after the other.

    `snapshot_download` alone would do, but its threads go on after Ctrl-C until their file is
    there or all retries have failed.
    """
    fetch = huggingface_hub.snapshot_download
    first = ["config.json", WEIGHTS_INDEX]
    folder = Path(fetch(source, revision=revision, allow_patterns=first))
    commit = folder.name
    try:
        info = huggingface_hub.HfApi().model_info(source, revision=revision or "main")
    except (errors.HTTPError, ConnectionError):
        names = []  # no network: the cache must have it all, as the last call checks
    else:
        names = [file.rfilename for file in info.siblings or []]
    patterns = list(WANTED)
    if (folder / WEIGHTS_INDEX).is_file():
        patterns += map(glob.escape, shards(folder / WEIGHTS_INDEX))
    wanted = list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns))
    _fetch(source, commit, wanted)
    return Path(fetch(source, revision=commit, allow_patterns=patterns, local_files_only=True))


def _fetch(source: str, commit: str, names: Sequence[str]) -> None:
    """Download files; on a terminal with the client's own bar for the bytes of each."""
    if progress.shows_bars() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        huggingface_hub.utils.enable_progress_bars()
    try:
        with progress.Stage(names, f"fetch {source}", unit="files") as stage:
            for name in stage:
                huggingface_hub.hf_hub_download(source, name, revision=commit)
    finally:
        huggingface_hub.utils.disable_progress_bars()


def _refusal(source: str, revision: str | None, error: Exception) -> str:
    """Say in one line why the hub gave nothing, and what to do."""
    # The client wraps what went wrong once it has found nothing in its cache either.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"{source}: gated; accept its terms on the model's page and set HF_TOKEN, "
            "or use another model."
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"{source}: no such folder here, and no such repository on the hub (or it is private); "
            "check the name, or set HF_TOKEN to a token that may read it."
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f'{source}: the repository has no revision "{revision}"; '
            "give a branch, a tag or a full commit hash."
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return (
            f"{source}: the hub answered {cause.response.status_code}, "
            f"and the cache does not have it; try again later, or use -m {EMBEDDED}."
        )
    return (
        f"{source}: no network and not (wholly) in the cache; "
        f"use -m {EMBEDDED} or a local folder, or try again with a network."
    )


def _interruption(source: str, error: Exception) -> str:
    reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"{source}: the transfer was interrupted ({reason}); "
        "run the same command again, files that are complete are kept."
    )


def _check_folder(folder: Path, remedy: str, source: str | None = None) -> None:
    """Refuse a folder that is not a whole pretrained model with safetensors weights."""
    name = source or str(folder)
    if folder.is_file():
        raise FormatError(f"{name}: a file, a model folder was expected; {remedy}")
    _check_kinds(folder, remedy)
    base = adapters.base_of(folder)
    if not (base / "config.json").is_file():
        raise FormatError(f"{name}: no config.json, so not a pretrained model; {remedy}")
    if base != folder:
        _check_kinds(base, remedy)
    for path in sorted({*base.glob("*.json"), *folder.glob("*.json")}):
        _check_json(path, remedy)
    read_headers(weight_files(base, name if base == folder else str(base)), remedy)


def _check_kinds(folder: Path, remedy: str) -> None:
    """Refuse pipes and devices, the reading of which would wait for ever, and links to nothing."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: a pipe or device, a model was expected; {remedy}")
    for path in sorted(folder.iterdir()):
        if not path.exists() and path.suffix in (".json", ".safetensors"):
            raise FormatError(f"{path}: a link that leads nowhere; {remedy}")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FormatError(f"{path}: a pipe or device, a file was expected; {remedy}")


def _check_json(path: Path, remedy: str) -> None:
    content = files.read_bytes(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    if path.name == "config.json" and not isinstance(value, dict):
        raise FormatError(f"{path}: not a model's configuration, an object was expected; {remedy}")
