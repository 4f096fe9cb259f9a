"""The calibration: one pass of the dense model that measures the inputs of its linears."""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from composable import tasks
from composable.calibration.batching import batches_of
from composable.calibration.meter import Meter, Shared, eval_mode, shared_inputs, stacks_of
from composable.errors import MismatchError, UserError
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
from composable.progress import shows_progress

log = logging.getLogger("composable")
BYTES_PER_MOMENT = 8 * len(SPLITS) + 4  # float64 for each split, float32 while one is summed
TOO_FEW, ENOUGH = 4, 20  # tokens for each input of a linear
POWERS = {"": 0, "K": 1, "M": 2, "G": 3}


def parse_bytes(text: str) -> int:
    """Read the value of --memory-budget, such as 512M or 1.5G; K, M and G are powers of 1024.

    Raises:
        UserError: it is no size, or not above 0.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)", text.strip().upper())
    size = int(Fraction(match[1]) * 1024 ** POWERS[match[2]]) if match else 0
    if size < 1:
        raise UserError(
            f"--memory-budget {text}: expected a number of bytes above 0, which may end in K, M or "
            "G, such as 512M or 4G."
        )
    return size


def obtain(
    dense: Checkpoint,
    corpora: tuple[Any, Any],
    path: Path,
    budget: int,
    device: str = "cpu",
    linears: Sequence[str] | None = None,
) -> Calibration:
    """Open the calibration at `path`; where there is none, measure and write it.

    Args:
        dense: see `measure`, as for all others.
        corpora: must be the texts of the file where there is one.
        path: the .npy file.
        budget: bytes.
        device: to measure on.
        linears: that the file must have; by default all modules of kind linear.

    Raises:
        FormatError: the file is no calibration, or damaged.
        MismatchError: it is of another model or other texts, or lacks some of the linears.
    """
    if not Path(path).exists():
        return measure(dense, corpora, path, budget, device, linears)
    found = open_calibration(path, dense.fingerprint)
    _check_texts(found, dense, corpora)
    found.require(_wanted(dense, linears))
    log.info("calibration: %s is of this model and these texts, reused", path)
    return found


def _check_texts(found: Calibration, dense: Checkpoint, corpora: tuple[Any, Any]) -> None:
    """Refuse a calibration on other texts than `corpora`."""
    for split, corpus in zip(SPLITS, corpora, strict=True):
        texts = found.info[split]
        if texts["sha256"] != corpus.sha256:
            samples = len(tasks.by_name(dense.info["task"]).dataset(corpus, dense))
            ours = _label(corpus.name, corpus.split, samples, corpus.sha256)
            theirs = _label(*(texts[key] for key in ("name", "split", "samples", "sha256")))
            raise MismatchError(
                f"{found.path}: measured on other texts ({theirs}; now {ours}); {REMEDY}."
            )
    if found.info["prefix"] != dense.info["prefix"]:
        raise MismatchError(
            f'{found.path}: measured with the prefix "{found.info["prefix"]}", this model has '
            f'"{dense.info["prefix"]}"; {REMEDY}.'
        )


def _label(name: str, split: str, samples: int, sha256: str) -> str:
    return f"{name} {split}, {samples} samples, SHA-256 {sha256[:12]}"


def measure(
    dense: Checkpoint,
    corpora: tuple[Any, Any],
    path: Path,
    budget: int,
    device: str = "cpu",
    linears: Sequence[str] | None = None,
) -> Calibration:
    """Run the dense model over two texts and write the second moments of its linears' inputs.

    The model runs in eval mode, without dropout, on the given targets; padding does not count.

    Args:
        dense: the dense model; it is moved to `device`.
        corpora: calibration texts and held-out texts of the model's task.
        path: the .npy file to write.
        budget: bytes that all moments held at once may take; inputs that do not fit wait for
            another pass. It has no influence on the result.
        device: where the model runs and the moments are summed.
        linears: paths; by default all modules of kind linear.

    Returns:
        The file, opened.

    Raises:
        UserError: there is no such linear, or its inputs are not finite.
        OSError: the file cannot be written.
    """
    started = time.perf_counter()
    stacks = stacks_of(dense.model, dense.family, _wanted(dense, linears))
    texts = {
        split: _Texts.of(dense, corpus, device)
        for split, corpus in zip(SPLITS, corpora, strict=True)
    }
    model: nn.Module = dense.model
    with eval_mode(model.to(device)):
        probe = {name: tensor[:1].to(device) for name, tensor in texts["train"].batches[-1].items()}
        shared = shared_inputs(model, dense.family, stacks, probe)
        groups = _groups(shared, budget)
        grams = _measure_groups(dense, groups, texts)
        write(path, _header(dense, shared, texts), grams)
    _report(shared, texts, len(groups), time.perf_counter() - started)
    return open_calibration(path, dense.fingerprint)


@dataclass
class _Texts:
    """One split, tokenised and padded; `tokens` counts those of each stack that are no padding."""

    corpus: Any
    batches: list[dict[str, Tensor]]
    tokens: dict[str, int]

    @classmethod
    def of(cls, dense: Checkpoint, corpus: Any, device: str) -> "_Texts":
        """Make the batches of a corpus."""
        batches = batches_of(dense, corpus, device)
        valid = [dense.family.valid_tokens(dense.model, batch) for batch in batches]
        tokens = {stack: sum(int(masks[stack].sum()) for masks in valid) for stack in valid[0]}
        return cls(corpus, batches, tokens)

    def info(self) -> dict[str, Any]:
        """Say what was read, for the file."""
        return {
            "name": self.corpus.name,
            "samples": sum(len(next(iter(batch.values()))) for batch in self.batches),
            "sha256": self.corpus.sha256,
            "split": self.corpus.split,
            "tokens": self.tokens,
        }


def _wanted(dense: Checkpoint, linears: Sequence[str] | None) -> list[str]:
    modules = dense.family.modules(dense.model)
    named = [module.name for module in modules if module.kind == "linear"]
    return named if linears is None else list(linears)


def _header(dense: Checkpoint, shared: Iterable[Shared], texts: Mapping[str, _Texts]) -> Header:
    info = {"prefix": dense.info["prefix"], **{k: part.info() for k, part in texts.items()}}
    inputs = [
        Input(
            item.linears,
            item.width,
            {split: part.tokens[item.stack] for split, part in texts.items()},
        )
        for item in shared
    ]
    return Header(dense.fingerprint, info, inputs)


def _groups(shared: Sequence[Shared], budget: int) -> list[list[Shared]]:
    """Split the inputs, in their order, into groups whose moments fit into `budget` bytes."""
    groups: list[list[Shared]] = []
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


def _measure_groups(
    dense: Checkpoint, groups: list[list[Shared]], texts: Mapping[str, _Texts]
) -> Iterator[dict[str, Gram]]:
    """Yield the moments of every input by split; each group takes a pass over all texts."""
    steps = len(groups) * sum(len(part.batches) for part in texts.values())
    with tqdm(total=steps, desc="calibrate", unit="batch", disable=not shows_progress()) as bar:
        for group in groups:
            grams = {k: _measure_group(dense, group, part, bar) for k, part in texts.items()}
            for index in range(len(group)):
                pair = {split: found[index] for split, found in grams.items()}
                yield pair
                pair.clear()  # whoever still has it must not hold what it was while others come
            grams.clear()


def _measure_group(dense: Checkpoint, group: list[Shared], texts: _Texts, bar: Any) -> list[Gram]:
    meter = Meter(dense.model, dense.family, group)
    for batch in texts.batches:
        meter.measure(batch)
        bar.update()
    return meter.results()


def _report(
    shared: Sequence[Shared], texts: Mapping[str, _Texts], passes: int, seconds: float
) -> None:
    """Log what was measured; warn where it is too little."""
    tokens = texts["train"].tokens
    log.info(
        "calibration: %s tokens, %d linears with %d different inputs, passes: %d, %.1f s",
        " and ".join(f"{count} {stack}" for stack, count in tokens.items()),
        sum(len(item.linears) for item in shared),
        *(len(shared), passes, seconds),
    )
    poorest = min(shared, key=lambda item: tokens[item.stack] / item.width)
    if tokens[poorest.stack] < TOO_FEW * poorest.width:
        log.warning(
            'calibration: only %d tokens for the %d inputs of "%s": with less than %d for each '
            "input the fit is poor, %d are enough; take more text",
            *(tokens[poorest.stack], poorest.width, poorest.linears[0], TOO_FEW, ENOUGH),
        )
