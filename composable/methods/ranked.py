"""Units by scores: those that a ranker found the least important go."""

from torch import nn

from composable.errors import ShapeError
from composable.families import Module
from composable.methods.base import Evidence, Method, Pruned, keep_best


def _prune(holder: nn.Module, module: Module, rate: float, evidence: Evidence) -> Pruned:
    scores = evidence.scores
    assert scores is not None  # it is needed
    if scores.shape != (module.units,):
        raise ShapeError(
            f'"{module.name}": the scores are of shape {tuple(scores.shape)}, it has '
            f"{module.units} units; measure this model."
        )
    return keep_best(scores, module, rate)


RANKED = Method(
    name="ranked",
    kinds=("attention", "ffn"),
    reference="the ranker's, see rank_importance.py",
    prune=_prune,
    needs=("scores",),
)
