"""STAT: orders units by its pivots, and gives the errors by which layers share a size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from composable.calibration.batching import Texts
from composable.calibration.obtain import obtain
from composable.errors import ConfigError
from composable.families import Module
from composable.formats.bundle import PER_GROUP, WHOLE_GROUPS
from composable.formats.scores import Scores, UnitImportance
from composable.linalg.systems import cholesky
from composable.methods.base import Evidence
from composable.methods.inputs import outgoing
from composable.methods.stat import STAT as METHOD
from composable.methods.stat import head_order, neuron_pivots
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import head_rows
from composable.progress import Stage
from composable.ranking.base import Ranker, require_targets, unit_modules

BUDGET = 2 * 1024**3


@dataclass(frozen=True)
class StatOptions:
    """Options of the ranker stat.

    Attributes:
        gqa: how heads leave that share key/value heads, "per-group" or "whole-groups".
        calibration: file of the second moments; read if it exists, else measured and written.
        memory_budget: bytes for the moments while they are measured; None: `BUDGET`.
    """

    gqa: str = PER_GROUP
    calibration: str = "calibration.npy"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown way of leaving."""
        if self.gqa not in (PER_GROUP, WHOLE_GROUPS):
            raise ConfigError(f"gqa {self.gqa}: expected {PER_GROUP} or {WHOLE_GROUPS}.")


def head_errors(weight: Tensor, matrix: Tensor, order: Sequence[int], step: int) -> Tensor:
    """Measure what is lost when only the first heads of an order stay, for every number of them.

    Args:
        weight: of the output projection, (rows, heads * head_size).
        matrix: second moments of its inputs, (heads * head_size, heads * head_size).
        order: of all heads.
        step: heads that come and go together.

    Returns:
        (heads,) float64, in this order: |(Z - Z_I T) Wo^T| with the heads before the step of each,
        after an exact least-squares fit: without a ridge, and without a bias that would help.
    """
    size = weight.shape[1] // len(order)
    rows = head_rows(list(order), size)
    moments = matrix.double()[rows][:, rows]
    scale = moments.diagonal().sqrt()
    unit = torch.where(scale > 0, scale, 1.0)
    correlations = moments / unit / unit[:, None]
    correlations.diagonal().fill_(1.0)  # also of inputs that are always 0, whose weight is 0 here
    values = weight.detach().double()[:, rows] * scale
    # columns from a place on of values @ factor are what the inputs before it leave of the output
    lost = (values @ cholesky(correlations)).square().sum(0)
    left = lost.flip(0).cumsum(0).flip(0)[:: step * size]
    return left.sqrt().repeat_interleave(step)


def _of_ffn(weight: Tensor, matrix: Tensor) -> UnitImportance:
    found = neuron_pivots(weight, matrix)
    return _by_unit(found.order, "left", found.left)


def _of_attention(weight: Tensor, matrix: Tensor, module: Module) -> UnitImportance:
    order = head_order(weight, matrix, module)
    errors = head_errors(weight, matrix, order, module.units // module.steps)
    return _by_unit(order, "error", errors)


def _by_unit(order: list[int], component: str, values: Tensor) -> UnitImportance:
    """Turn values in an order of the units to values by unit; the first matters most."""
    place = np.argsort(order)
    importance = (len(order) - place).astype(np.float64)
    return UnitImportance(importance, {component: values.numpy()[place]})


def _measure(dense: Checkpoint, texts: Texts | None, options: StatOptions) -> Scores:
    assert texts is not None  # it reads them
    require_targets(dense, texts)
    device = str(next(dense.model.parameters()).device)
    budget = options.memory_budget or BUDGET
    calibration = obtain(dense, [texts], Path(options.calibration), budget, device)
    units = {}
    for each in Stage(unit_modules(dense), "rank", unit="modules"):
        module = replace(each, whole_groups=options.gqa == WHOLE_GROUPS)
        holder = dense.model.get_submodule(module.holder)
        evidence = Evidence(calibration.inputs(module.output_path))
        weight, inputs = outgoing(holder, module, METHOD.name, evidence)
        found = (weight.cpu(), inputs.matrix)
        is_ffn = module.kind == "ffn"
        units[module.name] = _of_ffn(*found) if is_ffn else _of_attention(*found, module)
    return Scores(units=units)


STAT = Ranker(
    name="stat",
    reference=METHOD.reference,
    measure=_measure,
    options=StatOptions,
    reads_texts=True,
    is_comparable=False,
)
