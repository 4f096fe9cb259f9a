"""Calibration sets: read, tokenised, and measured as the options of a command say."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from composable import devices, tasks
from composable.calibration import layer_states
from composable.calibration.batching import PlainTextSamples, Texts, batches_of
from composable.calibration.layer_states import Pair
from composable.calibration.obtain import Calibration, obtain, parse_bytes
from composable.errors import UserError
from composable.linalg.grams import Regression
from composable.models.checkpoint import Checkpoint
from composable.tasks.plain_texts import is_plain, read_texts, refuse_unknown

#: First and last layer of a block, and its moments on the calibration and on held-out texts.
Block = tuple[str, str]
States = Callable[[Block], tuple[Regression, Regression]]
log = logging.getLogger("composable")


def calibrate(
    dense: Checkpoint,
    calibration: Path,
    calibration_data: str | None,
    calibration_samples: int,
    memory_budget: str,
    device: str,
    data: str | None = None,
    limit: int | None = None,
    **_: Any,
) -> tuple[Calibration, tuple[Any, Any]]:
    """Read or measure the statistics of the inputs of every module.

    Args:
        dense: the dense model.
        calibration: file that holds them, or will.
        calibration_data: whose texts, as `--data`.
        calibration_samples: so many of the training split.
        memory_budget: such as "4G".
        device: the `--device` option.
        data: the `--data` option, where there is one.
        limit: pairs of each split.

    Returns:
        The statistics, and the texts: of the training split, and at most as many of the validation
        split.
    """
    dense.model.float()
    corpora = _calibration_texts(dense, calibration_data or data, calibration_samples, limit)
    budget, device = parse_bytes(memory_budget), devices.select_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return obtain(dense, corpora, calibration, budget, device), corpora
    with PartialState(cpu=device == "cpu").main_process_first():  # the others read what it wrote
        return obtain(dense, corpora, calibration, budget, device), corpora


def block_moments(
    dense: Checkpoint,
    blocks: Sequence[Block],
    calibration_data: str | None,
    calibration_samples: int,
    device: str,
    **_: Any,
) -> States:
    """Measure the states before and after some blocks of layers.

    Args:
        dense: the dense model.
        blocks: first and last layer of each. The moments of all are held at once, 32 bytes for
            each pair of features of each block.
        calibration_data: as for `calibrate`, like the other options.
        calibration_samples: so many of the training split.
        device: the `--device` option.

    Returns:
        Block -> its moments on the calibration texts and on the held-out ones.
    """
    device = devices.select_device(device)
    reader = layer_states.Reader.of(dense.model.float().to(device), dense.family)  # type: ignore[arg-type]
    places = {block: _place(dense, block) for block in blocks}
    pairs: dict[str, list[Pair]] = {}
    for stack, pair in places.values():
        pairs.setdefault(stack, []).append(pair)
    found = [
        layer_states.moments(reader, batches_of(dense, corpus, device), pairs)
        for corpus in _calibration_texts(dense, calibration_data, calibration_samples)
    ]
    return lambda block: (found[0][places[block]], found[1][places[block]])


def _place(dense: Checkpoint, block: Block) -> tuple[str, Pair]:
    """Find the stack of a block, and the states before and after it."""
    place = dense.family.place(block[0])
    assert place is not None  # the scheme was checked against the model
    first, last = (int(name.rpartition(".")[2]) for name in block)
    return place[0], (first, last + 1)


def _calibration_texts(
    dense: Checkpoint, data: str | None, samples: int, limit: int | None = None
) -> tuple[Any, Any]:
    """Read some of the training split, and at most as many of the validation split."""
    task, default = tasks.by_name(dense.info["task"]), dense.info.get("data")
    count = min(samples, limit or samples)
    return task.read(data, default, "train", count), task.read(data, default, "valid", count)


def calibration_set(
    dense: Checkpoint,
    calibration_data: str | None,
    key: str,
    calibration_samples: int,
    max_length: int | None,
) -> Texts:
    """Read a calibration set and tokenise it.

    Args:
        dense: whose tokenizer, and whose task.
        calibration_data: a file of texts, or data of the task.
        key: of the text in a .jsonl file.
        calibration_samples: the first so many.
        max_length: tokens of a text.

    Raises:
        UserError: there is no such data, or it is not what it should be.
    """
    task = tasks.by_name(dense.info["task"])
    if max_length and not task.has_length:
        raise UserError(f"max_length {max_length}: not for {task.name}; leave it out.")
    if max_length:
        dense.info["max_length"] = max_length
    if dense.tokenizer is not None and is_plain(calibration_data):
        corpus = read_texts(Path(str(calibration_data)), key, calibration_samples)
        if len(dense.family.stacks) > 1:
            log.info("plain texts have no targets: the decoder is not measured.")
        return PlainTextSamples(dense, corpus)
    refuse_unknown(calibration_data)
    data = dense.info.get("data")
    return Texts(dense, task.read(calibration_data, data, "train", calibration_samples))
