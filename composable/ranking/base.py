"""What a ranker is: it measures a whole model once and returns scores, by which others choose."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import composable
from composable.calibration.batching import Texts
from composable.calibration.obtain import real_tokens
from composable.formats.scores import ModuleCost, Origin, Scores, TextsRead
from composable.models import cost
from composable.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class NoOptions:
    """Of a ranker that has none."""


#: Options without influence on what is measured.
FREE = ("calibration", "memory_budget")


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
    """

    name: str
    reference: str
    measure: Callable[[Checkpoint, Texts | None, Any], Scores]
    options: type[Any] = NoOptions
    reads_texts: bool = False


def rank(ranker: Ranker, dense: Checkpoint, texts: Texts | None, options: Any) -> Scores:
    """Measure a model, and say what was measured and how; for the arguments see `Ranker`."""
    found = ranker.measure(dense, texts, options)
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
