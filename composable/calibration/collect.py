"""Calibration sets: read, tokenised, and measured as the options of a command say."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from composable import devices, tasks
from composable.calibration import layer_states
from composable.calibration.amount import TOKENS, Amount, amounts, take
from composable.calibration.batching import Texts
from composable.calibration.layer_states import Pair
from composable.calibration.obtain import Calibration, obtain
from composable.calibration.second_moments import stacks_of
from composable.errors import UserError
from composable.formats.calibration_file import SPLITS
from composable.linalg.grams import Regression
from composable.models.checkpoint import Checkpoint
from composable.tasks.plain_texts import given_texts, is_plain, read_texts, refuse_unknown

#: First and last layer of a block, and its moments on the calibration and on held-out texts.
Block = tuple[str, str]
States = Callable[[Block], tuple[Regression, Regression]]
log = logging.getLogger("composable")


def calibrate(
    dense: Checkpoint,
    calibration: Path,
    data: str | Sequence[str] | None,
    limit: int | None,
    memory_budget: int,
    device: str,
    held_out_samples: int | None = None,
    held_out: bool = True,
) -> tuple[Calibration, tuple[Texts, ...]]:
    """Read or measure the statistics of the inputs of every module.

    Args:
        dense: the dense model.
        calibration: file that holds them, or will.
        data: see `tasks.base.Task.read`; or the texts, see `plain_texts.given_texts`.
        limit: the first so many samples of the training split; None: see `Amount`.
        memory_budget: bytes.
        device: where it is measured: auto, cpu, cuda or cuda:N.
        held_out_samples: so many of the validation split; None: a quarter of the calibration.
        held_out: whether held-out texts are wanted, too.

    Returns:
        The statistics, and the texts they are of: of the training split, then the held-out ones.
    """
    dense.model.float()
    wanted = amounts(limit, held_out_samples)[: 1 + held_out]
    texts = tuple(_split_texts(dense, data, wanted))
    device = devices.select_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return obtain(dense, texts, calibration, memory_budget, device), texts
    with PartialState(cpu=device == "cpu").main_process_first():  # the others read what it wrote
        return obtain(dense, texts, calibration, memory_budget, device), texts


def _split_texts(
    dense: Checkpoint,
    data: str | Sequence[str] | None,
    wanted: Sequence[Amount],
    first: int = 0,
) -> list[Texts]:
    """Read the wanted amounts of the splits, from number `first` on, and tokenise them."""
    task, default = tasks.by_name(dense.info["task"]), dense.info.get("data")
    if data is None or isinstance(data, str):
        read: Callable[..., Any] = functools.partial(task.read, data, default)
    elif dense.family.stacks in (("encoder",), ("decoder",)) and dense.tokenizer is not None:
        read = functools.partial(given_texts, data)
    else:
        raise UserError(
            f"data: texts alone say too little for {task.name}; give a folder or file with data "
            "of the task."
        )
    return [
        take(dense, functools.partial(read, split), amount)
        for split, amount in list(zip(SPLITS, wanted, strict=False))[first:]
    ]


def block_moments(
    dense: Checkpoint,
    blocks: Sequence[Block],
    data: str | Sequence[str] | None,
    limit: int | None,
    device: str,
    held_out_samples: int | None = None,
    texts: Sequence[Texts] = (),
) -> States:
    """Measure the states before and after some blocks of layers.

    Args:
        dense: the dense model.
        blocks: first and last layer of each. The moments of all are held at once, 32 bytes for
            each pair of features of each block.
        data: as for `calibrate`, like the other options.
        limit: of the training split.
        device: where the model runs.
        held_out_samples: of the validation split.
        texts: those of `calibrate` with the same options, where they have been read.

    Returns:
        Block -> its moments on the calibration texts and on the held-out ones.
    """
    device = devices.select_device(device)
    reader = layer_states.Reader(dense.model.float().to(device), dense.family)  # type: ignore[arg-type]
    places = {block: _place(dense, block) for block in blocks}
    pairs: dict[str, list[Pair]] = {}
    for stack, pair in places.values():
        pairs.setdefault(stack, []).append(pair)
    wanted = amounts(limit, held_out_samples)
    missing = _split_texts(dense, data, wanted, len(texts))
    found = [
        layer_states.moments(reader, part.batches(device), pairs) for part in (*texts, *missing)
    ]
    return lambda block: (found[0][places[block]], found[1][places[block]])


def _place(dense: Checkpoint, block: Block) -> tuple[str, Pair]:
    """Find the stack of a block, and the states before and after it."""
    place = dense.family.place(block[0])
    assert place is not None  # the scheme was checked against the model
    first, last = (int(name.rpartition(".")[2]) for name in block)
    return place[0], (first, last + 1)


def calibration_set(
    dense: Checkpoint,
    data: str | Sequence[str] | None,
    limit: int | None,
    key: str = "text",
    max_length: int | None = None,
    tokens: int = TOKENS,
) -> Texts:
    """Read the first samples of a calibration set, without a limit as many as have `tokens`.

    They are a file of texts (`key` is that of the text in a .jsonl file), the texts themselves, or
    the training split of data of the task. A text has up to `max_length` tokens. All are tokenised.

    Raises:
        UserError: there is no such data, or it is not what it should be.
    """
    task = tasks.by_name(dense.info["task"])
    if max_length and not task.has_length:
        raise UserError(f"max_length is {max_length}: not for {task.name}; leave it out.")
    if max_length:
        dense = dataclasses.replace(dense, info=dense.info | {"max_length": max_length})
    amount = Amount(limit, tokens)
    if data is not None and not isinstance(data, str):
        return _split_texts(dense, data, (amount,))[0]
    if dense.tokenizer is not None and is_plain(data):
        if len(dense.family.stacks) > 1:
            log.info("plain texts have no targets: the decoder is not measured.")
        read = functools.partial(read_texts, Path(str(data)), key)
        return take(dense, read, amount)
    refuse_unknown(data)
    return _split_texts(dense, data, (amount,))[0]


def facts_of(calibration: Calibration) -> dict[str, Any]:
    """Say for a report where a calibration is, its tokens by stack, and the tokens per input.

    These are of the linear with the fewest, which is the widest where there is one stack.
    """
    inputs = calibration.header.inputs
    return {
        "calibration": str(calibration.path),
        "calibration_tokens": calibration.info["train"]["tokens"],
        "tokens_per_input": min(calibration.tokens_per_input(it.linears[0]) for it in inputs),
    }


def tokens_per_input(dense: Checkpoint, tokens: Mapping[str, int]) -> float:
    """Return how many tokens of a calibration set there are for each input of the widest linear.

    Args:
        dense: the dense model.
        tokens: by stack; linears of stacks that are not named do not count.
    """
    names = [it.name for it in dense.family.modules(dense.model) if it.kind == "linear"]
    stacks = stacks_of(dense.model, dense.family, names)
    widths = {name: dense.model.get_parameter(f"{name}.weight").shape[1] for name in names}
    return min(
        round(tokens[stack] / widths[name], 2) for name, stack in stacks.items() if stack in tokens
    )
