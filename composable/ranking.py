"""What rank_importance.py reads and prints: batches of a calibration set, tables of blocks."""

import logging
from pathlib import Path
from typing import Any

from composable import depth, importance, tasks
from composable.calibration import batches_of
from composable.checkpoint import Checkpoint
from composable.errors import UserError
from composable.importance import Scores
from composable.layer_states import Batch
from composable.tasks.plain_texts import is_plain, read_texts

log = logging.getLogger("composable")
#: Tables of more blocks go to the report alone.
SHOWN = 16


def batches(
    dense: Checkpoint,
    calibration_data: str | None,
    key: str | None,
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
    data = calibration_data or dense.info.get("data")
    if dense.tokenizer is not None and is_plain(calibration_data, key):
        corpus: Any = read_texts(Path(str(calibration_data)), key, calibration_samples)
        if max_length:
            dense.info["max_length"] = max_length
        found = list(depth.text_batches(dense, corpus.texts, batch_size))
        missing = sorted(set(dense.family.stacks) - set(dense.family.valid_tokens(None, found[0])))
        if missing:
            log.info("plain texts have no targets: the %s is not measured.", missing[0])
    else:
        if key or max_length or batch_size:
            raise UserError(
                f"--key, --max-length and --batch-size are for files of texts; {data} is read as "
                f"data of {dense.info['task']}."
            )
        task = tasks.by_name(dense.info["task"])
        corpus = task.read(calibration_data, dense.info.get("data"), "train", calibration_samples)
        found = list(batches_of(dense, corpus, device))
    samples = sum(len(next(iter(batch.values()))) for batch in found)
    return found, {
        "calibration_data": {"name": corpus.name, "sha256": corpus.sha256},
        "samples": samples,
    }


def tables(scores: Scores, threshold: float | None, offset: bool) -> dict[str, Any]:
    """Return the best blocks by stack and metric, and log them as tables."""
    found: dict[str, Any] = {}
    for one in scores.distances:
        rows = list(importance.block_table(one, threshold, offset))
        found.setdefault(one.stack, {})[one.metric] = rows
        more = f"... {len(rows) - SHOWN} more in the report\n" if len(rows) > SHOWN else ""
        log.info(
            "%s, %s, %d samples:\n%s%s",
            *(one.stack, one.metric, one.samples),
            *(importance.as_markdown(rows[:SHOWN]), more),
        )
    return found
