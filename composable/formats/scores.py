"""Scores of a whole model: what matters how much, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composable.errors import UserError
from composable.formats.config import Entry
from composable.formats.container import Format

FORMAT = Format(
    "composable.scores",
    "2",
    noun="a file of scores",
    made="measured on",
    remedy="make it again with rank_importance.py",
    remedy_for_model="run rank_importance.py on this one",
)
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ModuleCost:
    """A module of the measured model, see `families.Module`, and what one unit of it costs.

    Attributes:
        units: heads of an attention, neurons of an ffn, weights of a linear; a layer is one.
        macs_per_unit: multiply-accumulates for one sample of the mean length of the texts; of the
            usual lengths (`models.cost`) in a stack that no text passed.
    """

    name: str
    kind: str
    stack: str
    units: int
    macs_per_unit: float


@dataclass(frozen=True)
class TextsRead:
    """The calibration set of a measurement.

    Attributes:
        name: of the data.
        sha256: of all samples as the model sees them, see `tasks.samples.identity_of`.
        tokens: stack -> real tokens of all samples, for the stacks that they pass.
    """

    name: str
    sha256: str
    samples: int
    tokens: Mapping[str, int]

    @property
    def mean_tokens(self) -> dict[str, float]:
        """Stack -> real tokens of a sample on average."""
        return {stack: count / self.samples for stack, count in self.tokens.items()}


@dataclass(frozen=True)
class Origin:
    """What was measured, how, and on what.

    Attributes:
        method: name of the ranker.
        options: all of its options, as JSON has them.
        model: where the dense model, of which `fingerprint` and `modules` are, came from.
        texts: None for a ranker that reads none.
        versions: package -> its version.
    """

    method: str
    options: Mapping[str, Any]
    model: str
    fingerprint: str
    modules: Sequence[ModuleCost]
    texts: TextsRead | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class UnitImportance:
    """How much every unit of a module matters.

    Attributes:
        importance: (units,) float64; higher is kept.
        components: name -> what it was made of: (units,) or (units, K) float64.
    """

    importance: Numbers
    components: Mapping[str, Numbers] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BlockDistances:
    """How much every block of layers of one stack changes its input, by one distance.

    Attributes:
        stack, distance: names; "" in files of other programs.
        values: (layers, layers) float64 by block size - 1 and first layer; NaN where there is no
            block, or where it was not measured.
        samples: of the calibration set; 0 where that is not known.
    """

    stack: str
    distance: str
    values: Numbers
    samples: int = 0

    @property
    def layers(self) -> int:
        """Layers of the stack."""
        return len(self.values)


@dataclass(frozen=True)
class Order:
    """An order in which modules leave one by one, each chosen when the ones before it had left.

    Attributes:
        modules: names, the first to go first.
        scores: of each when it was chosen; the lower, the less it mattered.
        distance: by which it was chosen; "" where by none.
        protected: names of modules that had to stay.
    """

    modules: Sequence[str]
    scores: Sequence[float]
    distance: str = ""
    protected: Sequence[str] = ()


@dataclass(frozen=True)
class Tree:
    """Weights that can only leave together.

    Attributes:
        root: the module, or the path of a linear in one, that leaves by choice.
        units: of the root that leave; () for all of it.
        dependents: paths of linears that lose rows or columns with it.
        operations: paths of what has nothing left to do, such as an activation.
        parameters: how many leave.
        importance: of all of them; higher is kept.
    """

    root: str
    units: Sequence[int]
    dependents: Sequence[str]
    operations: Sequence[str]
    parameters: int
    importance: float


@dataclass(frozen=True, eq=False)
class Candidates:
    """Variants that could be made, and what each would cost or save.

    Attributes:
        modules: name of the module of each.
        entries: of each, as conf.json has it.
        columns: name -> (candidates,) float64, such as error or macs; NaN where not measured.
    """

    modules: Sequence[str]
    entries: Sequence[Entry]
    columns: Mapping[str, Numbers]


@dataclass(frozen=True)
class Scores:
    """What a file of scores holds: where it comes from, and any of five tables.

    Attributes:
        origin: None in files of other programs.
        units: by name of the module.
        distances: every stack by every distance; the first is the main one.
        constants: numbers of the whole model that the importances were made with.
    """

    origin: Origin | None = None
    units: Mapping[str, UnitImportance] = field(default_factory=dict)
    distances: Sequence[BlockDistances] = ()
    orders: Sequence[Order] = ()
    trees: Sequence[Tree] = ()
    candidates: Candidates | None = None
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def stacks(self) -> list[str]:
        """Stacks of which there are distances of blocks."""
        return list(dict.fromkeys(one.stack for one in self.distances))

    def require_model(self, fingerprint: str, path: Path) -> None:
        """Raise MismatchError for scores of another model, which other programs' do not name."""
        if self.origin is not None:
            FORMAT.check_model(path, self.origin.fingerprint, fingerprint)

    @property
    def reading(self) -> Any:
        """What the model made of the texts, see `Checkpoint.reading`; None where it is not said."""
        return self.origin.options.get("reading") if self.origin else None

    def blocks(self, stack: str | None = None, distance: str | None = None) -> BlockDistances:
        """Return a stack's distances of blocks: of its only one, by the first, where None.

        Raises:
            UserError: there are none, or a model of two stacks leaves open which one is meant.
        """
        if not self.distances:
            method = self.origin.method if self.origin else "another program"
            raise UserError(
                f"the scores (of {method}) hold no distances of blocks of layers; measure them "
                "with rank_importance.py, method layer_distance."
            )
        if stack is None and len(self.stacks) > 1:
            raise UserError(f"the scores are of {' and '.join(self.stacks)}; name one stack.")
        here = [one for one in self.distances if one.stack in (stack or self.stacks[0], "")]
        if not here:
            raise UserError(f"no scores of the {stack}; the file has those of {self.stacks[0]}.")
        found = [one for one in here if distance in (None, one.distance)]
        if not found:
            names = ", ".join(one.distance or "one without a name" for one in here)
            raise UserError(f'no scores by "{distance}"; the file has {names}.')
        return found[0]

    def order_of_layers(self, stack: str) -> Order:
        """Return the order in which layers of a stack leave; UserError if it was not measured."""
        modules = self.origin.modules if self.origin else ()
        layers = {one.name for one in modules if (one.kind, one.stack) == ("layer", stack)}
        for one in self.orders:
            if layers.issuperset(one.modules):
                return one
        raise UserError(
            f"the scores hold no order of removal of the {stack}; measure it with "
            "rank_importance.py, option iterative."
        )

    def importance(self, module: str) -> Numbers:
        """Return the importance of a module's units, (units,); UserError if it is not measured."""
        if module in self.units:
            return self.units[module].importance
        has = f"those of {len(self.units)} modules" if self.units else "those of none"
        raise UserError(
            f'the scores hold no importance of the units of "{module}" (they have {has}); measure '
            "it with rank_importance.py, for example by the method l1."
        )
