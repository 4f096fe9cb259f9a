"""What a ranker is: it measures a whole model once and returns scores, by which others choose."""

import dataclasses
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import composable
from composable import files, runs
from composable.calibration.amount import TOKENS
from composable.calibration.batching import Texts
from composable.calibration.obtain import real_tokens
from composable.errors import FormatError, UserError
from composable.families import Module
from composable.formats.scores import ModuleCost, Numbers, Origin, Scores, TextsRead
from composable.models import cost
from composable.models.checkpoint import Checkpoint
from composable.tasks.plain_texts import PlainTexts

log = logging.getLogger("composable")


@dataclass(frozen=True)
class NoOptions:
    """Of a ranker that has none."""


#: Options without influence on what is measured.
FREE = ("calibration", "memory_budget", "checkpoints")


@dataclass(frozen=True)
class Ranker:
    """A way of measuring importance.

    Attributes:
        name: the word used in files and options.
        reference: paper or program it follows.
        measure: (dense model, its calibration set, options) -> the tables of `Scores`, without
            their origin. The model is where it should run; the calibration set is None for a ranker
            that reads no texts.
        options: frozen dataclass of what can be set, with a default for each.
        reads_texts: whether it looks at a calibration set.
        tokens: of each stack that this has, where no number of samples is given.
        is_comparable: whether importances of different modules are on one scale.
    """

    name: str
    reference: str
    measure: Callable[[Checkpoint, Texts | None, Any], Scores]
    options: type[Any] = NoOptions
    reads_texts: bool = False
    tokens: int = TOKENS
    is_comparable: bool = True


class Parts:
    """What is done of a measurement, so that an interrupted one goes on; a context.

    Args:
        folder: of this measurement and no other; None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self._run = None if folder is None else runs.RunFolder(folder)

    @classmethod
    def of(cls, origin: Origin, checkpoints: str | None) -> "Parts":
        """Open those of a measurement, among `checkpoints`; UserError: an equal one is at work."""
        return cls(None if checkpoints is None else folder_of(origin, Path(checkpoints)))

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: object) -> None:
        if self._run is not None:
            self._run.release()

    def read(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Numbers] | None:
        """Return the arrays of a part, of these names and shapes; None: not done, or damaged."""
        if self._run is None:
            return None
        path = self._run.path / f"{name}.npz"
        try:
            with np.load(io.BytesIO(runs.read_sealed(path)), allow_pickle=False) as stored:
                found = dict(stored)
            if {key: one.shape for key, one in found.items()} == shapes and all(
                one.dtype == np.float64 and np.isfinite(one).all() for one in found.values()
            ):
                return found
            why = "holds something else"
        except FileNotFoundError:
            return None
        except (FormatError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            why = str(error) if isinstance(error, FormatError) else "is damaged"
        log.warning("%s: %s; it is measured again.", path, why)
        return None

    def write(self, name: str, arrays: Mapping[str, Numbers]) -> None:
        """Keep the arrays of a part."""
        if self._run is not None:
            content = io.BytesIO()
            np.savez(content, allow_pickle=False, **arrays)
            runs.write_sealed(self._run.path / f"{name}.npz", content.getvalue())


def unit_modules(dense: Checkpoint) -> list[Module]:
    """List the attentions and ffns that have units."""
    modules = dense.family.modules(dense.model)
    return [m for m in modules if m.kind in ("attention", "ffn") and m.units]


def require_targets(dense: Checkpoint, texts: Texts) -> None:
    """Raise UserError for plain texts where a decoder has to be measured beside an encoder."""
    if isinstance(texts.corpus, PlainTexts) and len(dense.family.stacks) > 1:
        raise UserError(
            f"{texts.name}: plain texts have no targets, which the decoder is measured on; give "
            "data of the model's task."
        )


def folder_of(origin: Origin, checkpoints: Path) -> Path:
    """Name the folder of what is done of a measurement."""
    options = {name: value for name, value in origin.options.items() if name != "reading"}
    texts = origin.texts and origin.texts.sha256
    identity = [origin.method, options, origin.fingerprint, texts, dict(origin.versions)]
    return checkpoints / f"rank-{files.digest_of(identity)[:16]}"


def forget(scores: Scores, checkpoints: Path) -> None:
    """Remove what was kept of a measurement, once its scores are written."""
    if scores.origin is not None:
        runs.remove(folder_of(scores.origin, checkpoints))


def rank(ranker: Ranker, dense: Checkpoint, texts: Texts | None, options: Any) -> Scores:
    """Measure a model, and say what was measured and how; for the arguments see `Ranker`.

    Raises:
        UserError: no unit of the model matters, and what the ranker refuses.
    """
    found = ranker.measure(dense, texts, options)
    if found.units and not any(one.importance.any() for one in found.units.values()):
        raise UserError(
            f"{ranker.name}: all importances are 0, nothing changes without any unit; check the "
            "weights of the model and, where texts are read, that they are long enough."
        )
    origin = origin_of(ranker, dense, texts, options)
    if texts is not None:
        origin = dataclasses.replace(origin, options={**origin.options, "reading": dense.reading})
    return dataclasses.replace(found, origin=origin)


def origin_of(ranker: Ranker, dense: Checkpoint, texts: Texts | None, options: Any) -> Origin:
    """Say what a ranker measured, how and on what; the weights may be on the meta device."""
    read = None
    if texts is not None:
        tokens = real_tokens(dense, texts.batches())
        read = TextsRead(texts.name, texts.identity, len(texts), tokens)
    macs = cost.macs_per_unit(dense.model, dense.family, read.mean_tokens if read else None)
    modules = [
        ModuleCost(m.name, m.kind, m.stack, _units(dense, m), macs[m.name])
        for m in dense.family.modules(dense.model)
    ]
    return Origin(
        method=ranker.name,
        options={k: v for k, v in dataclasses.asdict(options).items() if k not in FREE},
        model=dense.info.get("source", ""),
        fingerprint=dense.fingerprint,
        modules=modules,
        texts=read,
        versions={
            "composable": composable.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _units(dense: Checkpoint, module: Any) -> int:
    if module.kind == "linear":
        return dense.model.get_parameter(f"{module.name}.weight").numel()
    return 1 if module.kind == "layer" else module.units  # type: ignore[no-any-return]
