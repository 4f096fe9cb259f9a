"""The calibration: one pass of the dense model that measures the inputs of its linears."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from composable.calibration.batching import Texts
from composable.calibration.second_moments import (
    InputMoments,
    SharedInput,
    eval_mode,
    shared_inputs,
    stacks_of,
)
from composable.errors import MismatchError
from composable.formats.calibration_file import (
    REMEDY,
    SPLITS,
    Calibration,
    Header,
    Input,
    open_calibration,
    write,
)
from composable.linalg.grams import Gram
from composable.models.checkpoint import Checkpoint
from composable.progress import Stage

log = logging.getLogger("composable")
BYTES_PER_MOMENT = 8 + 4  # float64, and float32 while it is summed
TOO_FEW, ENOUGH = 4, 20  # tokens for each input of a linear
Batches = Sequence[Mapping[str, Tensor]]


def obtain(
    dense: Checkpoint,
    texts: Sequence[Texts],
    path: Path,
    budget: int,
    device: str = "cpu",
    linears: Sequence[str] | None = None,
) -> Calibration:
    """Open the calibration at `path`; measure and write what is not there.

    Args:
        dense: see `measure`, as for all others.
        texts: must be those of the file where it has them. Held-out ones that the file was
            measured without are measured now.
        path: the .npy file.
        budget: bytes.
        device: to measure on.
        linears: that the file must have; by default all modules of kind linear.

    Raises:
        FormatError: the file is no calibration, or damaged.
        MismatchError: it is of another model or other texts, or lacks some of the linears.
    """
    if not Path(path).exists():
        return measure(dense, texts, path, budget, device, linears)
    found = open_calibration(path, dense.fingerprint)
    _check_texts(found, texts)
    found.require(_wanted(dense, linears))
    if len(texts) > len(found.info):
        log.info("calibration: %s is of this model and these texts, held-out ones are added", path)
        return measure(dense, texts, path, budget, device, found.names, found)
    log.info("calibration: %s is of this model and these texts, reused", path)
    return found


def _check_texts(found: Calibration, texts: Sequence[Texts]) -> None:
    """Refuse a calibration on other texts, or on the same as another tokenizer splits them."""
    for split, ours in zip(found.header.splits, texts, strict=False):
        theirs = found.info[split]
        if theirs["identity"] != ours.identity:
            name = f"{ours.corpus.name} {ours.corpus.split}"
            raise MismatchError(
                f"{found.path}: measured on other texts, or on texts that were tokenised in "
                f"another way ({split}: {_label(theirs['samples'], theirs['identity'])}; now "
                f"{name}, {_label(len(ours), ours.identity)}); {REMEDY}."
            )


def _label(samples: int, identity: str) -> str:
    return f"{samples} samples, SHA-256 {identity[:12]}"


def measure(
    dense: Checkpoint,
    texts: Sequence[Texts],
    path: Path,
    budget: int,
    device: str = "cpu",
    linears: Sequence[str] | None = None,
    known: Calibration | None = None,
) -> Calibration:
    """Run the dense model over texts and write the second moments of its linears' inputs.

    The model runs in eval mode, without dropout, on the given targets; padding does not count.

    Args:
        dense: the dense model; it is moved to `device`.
        texts: calibration texts, and perhaps held-out ones.
        path: the .npy file to write.
        budget: bytes that all moments held at once may take; inputs that do not fit wait for
            another pass. It has no influence on the result.
        device: where the model runs and the moments are summed.
        linears: paths; by default all modules of kind linear.
        known: a calibration of the first of the texts, whose moments are copied.

    Returns:
        The file, opened.

    Raises:
        UserError: there is no such linear, or its inputs are not finite.
        OSError: the file cannot be written.
    """
    started = time.perf_counter()
    stacks = stacks_of(dense.model, dense.family, _wanted(dense, linears))
    info = dict(known.info) if known else {}
    new = texts[len(info) :]
    batches = [part.batches(device) for part in new]
    for name, part, some in zip(SPLITS[len(info) :], new, batches, strict=False):
        tokens = real_tokens(dense, some)
        info[name] = {"identity": part.identity, "samples": len(part), "tokens": tokens}
    model: nn.Module = dense.model
    with eval_mode(model.to(device)):
        probe = {name: tensor[:1].to(device) for name, tensor in batches[0][-1].items()}
        shared = shared_inputs(model, dense.family, stacks, probe)
        groups = _groups(shared, budget)
        with Stage(
            None, "calibrate", len(groups) * sum(map(len, batches)), unit="batches"
        ) as stage:
            grams = _all_moments(dense, groups, batches, known, stage)
            write(path, Header(dense.fingerprint, info, _records(shared, info)), grams)
    log.info(
        "calibration: %s tokens, %d linears with %d different inputs, passes: %d, %.1f s",
        " and ".join(f"{count} {stack}" for stack, count in info["train"]["tokens"].items()),
        sum(len(item.linears) for item in shared),
        *(len(shared), len(groups), time.perf_counter() - started),
    )
    _warn_of_little(shared, info["train"]["tokens"])
    return open_calibration(path, dense.fingerprint)


def real_tokens(dense: Checkpoint, batches: Batches) -> dict[str, int]:
    """Count the tokens of each stack that are no padding."""
    tokens: Counter[str] = Counter()
    for batch in batches:
        masks = dense.family.valid_tokens(dense.model, batch)
        tokens.update({stack: int(mask.sum()) for stack, mask in masks.items()})
    return dict(tokens)


def _wanted(dense: Checkpoint, linears: Sequence[str] | None) -> list[str]:
    modules = dense.family.modules(dense.model)
    named = [module.name for module in modules if module.kind == "linear"]
    return named if linears is None else list(linears)


def _records(shared: Iterable[SharedInput], info: Mapping[str, Any]) -> list[Input]:
    """Describe the inputs for the header, with their tokens on the texts of `info`."""
    return [
        Input(
            item.linears,
            item.width,
            {name: texts["tokens"][item.stack] for name, texts in info.items()},
        )
        for item in shared
    ]


def _groups(shared: Sequence[SharedInput], budget: int) -> list[list[SharedInput]]:
    """Divide the inputs, in their order, into groups whose moments fit into `budget` bytes."""
    groups: list[list[SharedInput]] = []
    room = 0
    for item in shared:
        size = BYTES_PER_MOMENT * item.width**2
        if size > room:
            groups.append([])
            room = budget
        groups[-1].append(item)
        room -= size
    widest = max(shared, key=lambda item: item.width)
    if (size := BYTES_PER_MOMENT * widest.width**2) > budget:
        log.warning(
            'calibration: the moments of the inputs of "%s" alone take %d bytes, more than the '
            "memory budget of %d; they are measured all the same",
            *(widest.linears[0], size, budget),
        )
    return groups


def _all_moments(
    dense: Checkpoint,
    groups: Sequence[Sequence[SharedInput]],
    splits: Sequence[Batches],
    known: Calibration | None,
    stage: Stage,
) -> Iterator[Gram]:
    """Yield the moments of every input, split by split; each group takes a pass over a split."""
    if known:
        yield from (known.inputs(item.linears[0]) for group in groups for item in group)
    for batches in splits:
        for group in groups:
            grams = _group_moments(dense, group, batches, stage)
            while grams:  # one that was given away must not be held here
                yield grams.pop(0)


def _group_moments(
    dense: Checkpoint, group: Sequence[SharedInput], batches: Batches, stage: Stage
) -> list[Gram]:
    moments = InputMoments(dense.model, dense.family, group)
    for batch in batches:
        moments.measure(batch)
        stage.update()
    return moments.results()


def _warn_of_little(shared: Sequence[SharedInput], tokens: Mapping[str, int]) -> None:
    """Say so where the calibration texts are too few for the widest input."""
    poorest = min(shared, key=lambda item: tokens[item.stack] / item.width)
    if tokens[poorest.stack] < TOO_FEW * poorest.width:
        log.warning(
            'calibration: only %d tokens for the %d inputs of "%s": with less than %d for each '
            "input the fit is poor, %d are enough; take more text",
            *(tokens[poorest.stack], poorest.width, poorest.linears[0], TOO_FEW, ENOUGH),
        )
