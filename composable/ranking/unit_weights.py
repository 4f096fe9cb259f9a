"""Rankers that read no texts: heads and neurons by the size of their weights, or at random."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from composable.calibration.batching import Texts
from composable.families import Module
from composable.formats.scores import Scores, UnitImportance
from composable.methods import head_l1, neuron_l1, random
from composable.models.checkpoint import Checkpoint
from composable.ranking.base import NoOptions, Ranker, unit_modules

#: Kind of a module -> (holder of its weights, module) -> importance of its units.
BY_L1: Mapping[str, Callable[[nn.Module, Module], Tensor]] = {
    "attention": head_l1.importance_of,
    "ffn": neuron_l1.importance_of,
}


@dataclass(frozen=True)
class RandomOptions:
    """Options of the ranker random.

    Attributes:
        seed: of the numbers.
    """

    seed: int = 42


def _by_l1(dense: Checkpoint, texts: Texts | None, options: NoOptions) -> Scores:
    found = {
        module.name: BY_L1[module.kind](dense.model.get_submodule(module.holder), module)
        for module in unit_modules(dense)
    }
    return Scores(units={name: UnitImportance(one.cpu().numpy()) for name, one in found.items()})


def _at_random(dense: Checkpoint, texts: Texts | None, options: RandomOptions) -> Scores:
    lots = {
        m.name: random.draw(m.units, random.seed_of(options.seed, m.name))
        for m in unit_modules(dense)
    }
    return Scores(units={name: UnitImportance(one.numpy()) for name, one in lots.items()})


L1 = Ranker(
    name="l1",
    reference="Michel et al. 2019 (arXiv 1905.10650), Li et al. 2017 (arXiv 1608.08710)",
    measure=_by_l1,
)
RANDOM = Ranker(
    name="random",
    reference="a control: what any ranker has to beat",
    measure=_at_random,
    options=RandomOptions,
    is_comparable=False,
)
