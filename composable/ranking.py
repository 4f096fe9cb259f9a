"""What the scripts make of distances: calibration sets, tables, configurations without layers."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from composable import depth, distances, tasks
from composable.calibration import batches_of
from composable.checkpoint import Checkpoint
from composable.config import Configuration, Entry
from composable.distances import Choice, Removal, Scores, check_protected
from composable.errors import ConfigError, UserError
from composable.layer_states import Batch, Reader, Removing
from composable.methods.layer_distance import Metric
from composable.methods.linear_map import LINEAR_MAP
from composable.tasks.plain_texts import is_plain, read_texts, refuse_unknown

log = logging.getLogger("composable")
#: Tables of more blocks go to the report alone.
SHOWN = 16


def batches(
    dense: Checkpoint,
    calibration_data: str | None,
    key: str,
    calibration_samples: int,
    max_length: int | None,
    batch_size: int | None,
    device: str,
) -> tuple[list[Batch], dict[str, Any]]:
    """Read a calibration set.

    Args:
        dense: whose tokenizer, and whose task.
        calibration_data: a file of texts, or data of the task.
        key: of the text in a .jsonl file.
        calibration_samples: the first so many.
        max_length: tokens of a text.
        batch_size: texts of a batch.
        device: for the size of batches.

    Returns:
        Batches, and what the report says of them.

    Raises:
        UserError: there is no such data, or it is not what it should be.
    """
    task = tasks.by_name(dense.info["task"])
    if max_length and not task.has_length:
        raise UserError(f"--max-length {max_length}: not for {task.name}; leave it out.")
    if max_length:
        dense.info["max_length"] = max_length
    if dense.tokenizer is not None and is_plain(calibration_data):
        corpus: Any = read_texts(Path(str(calibration_data)), key, calibration_samples)
        found = list(depth.text_batches(dense, corpus.texts, batch_size))
        missing = sorted(set(dense.family.stacks) - set(dense.family.valid_tokens(None, found[0])))
        if missing:
            log.info("plain texts have no targets: the %s is not measured.", missing[0])
    else:
        refuse_unknown(calibration_data)
        corpus = task.read(calibration_data, dense.info.get("data"), "train", calibration_samples)
        found = list(batches_of(dense, corpus, device, batch_size))
    samples = sum(len(next(iter(batch.values()))) for batch in found)
    return found, {
        "calibration_data": {"name": corpus.name, "sha256": corpus.sha256},
        "samples": samples,
    }


def removing(
    reader: Reader,
    batches: Sequence[Batch],
    metric: Metric,
    stack: str | None,
    count: int | None,
    protected: Collection[int],
) -> Removing | None:
    """Check before the first pass what `--iterative` asks for.

    Raises:
        ConfigError: a protected layer does not exist; options without --iterative.
        UserError: so many layers cannot go; two stacks leave open which one is meant.
    """
    if count is None:
        if stack or protected:
            raise ConfigError("--stack and --protect need --iterative N; add it, or leave them.")
        return None
    names = list(reader.masks(batches[0]))
    if stack is None and len(names) > 1:
        raise UserError(f"the model has {' and '.join(names)}; say which with --stack.")
    if stack is not None and stack not in names:
        raise UserError(f"--stack {stack}: only the {' and '.join(names)} is measured here.")
    name = stack or names[0]
    check_protected(protected, len(reader.stacks[name]))
    return Removing(reader, metric, name, count, protected)


def removal(asked: Removing, batches: Sequence[Batch]) -> Removal:
    """Measure the order in which layers go."""
    order, scores = asked.order(batches)
    return Removal(asked.stack, order, scores, asked.metric.name, sorted(asked.protected))


def tables(scores: Scores, threshold: float | None, offset: bool) -> dict[str, Any]:
    """Return the best blocks by stack and metric, and log them as tables."""
    found: dict[str, Any] = {}
    for one in scores.distances:
        rows = list(distances.block_table(one, threshold, offset))
        found.setdefault(one.stack, {})[one.metric] = rows
        more = f"... {len(rows) - SHOWN} more in the report\n" if len(rows) > SHOWN else ""
        log.info(
            "%s, %s, %d samples:\n%s%s",
            *(one.stack, one.metric, one.samples),
            *(distances.as_markdown(rows[:SHOWN]), more),
        )
    return found


def configurations(
    dense: Checkpoint,
    cuts: Sequence[int | str],
    policy: str,
    scores: Path | None,
    stack: str | None,
    metric: str | None,
    reference_offset: bool,
    protect: str,
    linear_map: bool,
) -> list[Configuration]:
    """Choose layers as the options of config_generator.py say.

    Args:
        dense: the model.
        cuts: for every configuration how many layers go, or their numbers ("3,4").
        policy: see `distances.Choice`, as for the options below.
        scores: file.
        stack: whose layers, where there are two.
        metric: of the scores.
        reference_offset: see `distances.best_block`.
        protect: numbers of layers that stay.
        linear_map: whether a linear map comes in the place of every run of layers.

    Returns:
        The entries of the layers that go, for every configuration.

    Raises:
        ConfigError: so many cannot go, or not those.
        UserError: the scores do not have what is needed.
    """
    modules = dense.family.modules(dense.model)
    names: dict[str, list[str]] = {}
    for module in modules:
        if module.kind == "layer":
            names.setdefault(module.stack, []).append(module.name)
    if stack is None and len(names) > 1:
        raise ConfigError(f"the model has {' and '.join(names)}; say which with --stack.")
    if stack is not None and stack not in names:
        raise ConfigError(f"--stack {stack}: this model has only {' and '.join(names)}.")
    name = stack or next(iter(names))
    found = distances.load(scores) if scores else None
    if found and found.fingerprint not in ("", dense.fingerprint):
        raise ConfigError(f"{scores}: measured on another model; run rank_importance.py on this.")
    protected = parse_numbers(protect, "--protect")
    check_protected(protected, len(names[name]))
    choice = Choice(policy, found, name, metric, protected, reference_offset)
    chosen = [
        choice.layers(one, len(names[name]))
        if isinstance(one, int)
        else parse_numbers(one, "--layers")
        for one in cuts
    ]
    for layer in {layer for layers in chosen for layer in layers}:
        if layer >= len(names[name]) or layer in protected:
            raise ConfigError(
                f"--layers {layer}: expected one of the {name}'s layers 0 to "
                f"{len(names[name]) - 1} that is not protected."
            )
    return [layer_entries(names[name], layers, linear_map) for layers in chosen]


def parse_numbers(text: str, where: str) -> list[int]:
    """Read numbers of layers, separated by commas; each once, ascending.

    Raises:
        ConfigError: they are none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{where} {text}: expected numbers of layers from 0, such as 3,4,5.")
    return sorted({int(part) for part in parts})


def layer_entries(
    names: Sequence[str], layers: Sequence[int], is_mapped: bool = False
) -> Configuration:
    """Write down that some layers go.

    Args:
        names: of all layers of a stack.
        layers: numbers of those that go, ascending.
        is_mapped: whether a linear map comes in the place of every run of neighbours.
    """
    if not is_mapped:
        return {names[layer]: Entry(1.0) for layer in layers}
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return {names[run[0]]: Entry(1.0, LINEAR_MAP.name, through=names[run[-1]]) for run in runs}
