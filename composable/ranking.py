"""What rank_importance.py reads and prints: batches of a calibration set, tables of blocks."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from composable import depth, distances, tasks
from composable.calibration import batches_of
from composable.checkpoint import Checkpoint
from composable.distances import Removal, Scores, check_protected
from composable.errors import ConfigError, UserError
from composable.layer_states import Batch, Reader, Removing
from composable.methods.layer_distance import Metric
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
