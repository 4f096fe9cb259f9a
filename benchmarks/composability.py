"""What N configurations cost: individual training against shared variants, at equal loss."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks import spread
from benchmarks.composability_picture import draw
from benchmarks.composability_runs import (
    COMPOSED,
    DEFAULT,
    EARLY,
    PROCEDURES,
    STEPS,
    Family,
    Path,
    Point,
    follow,
)
from benchmarks.context import Context
from benchmarks.levels import MILD, STRONG
from benchmarks.page import Section, Table
from benchmarks.spread import EXTRAPOLATED, Crossing, number

#: sets of configurations, how many of each are trained, how many of those also until early stop,
#: and how the shared variants are fine-tuned
WANTED = ((MILD, 5, 1, tuple(PROCEDURES)), (STRONG, 3, 0, (DEFAULT,)))


@dataclass(frozen=True)
class Needed:
    """What a composed model still needs to a loss: steps, their seconds, those of the command."""

    crossing: Crossing
    seconds: float
    command: float


def needed(points: list[Point], level: float) -> Needed | None:
    """Find the steps after which a composed model is at a loss, and what they cost.

    Between two measured numbers of steps loss, seconds and the command's seconds are taken to run
    straight.
    """
    crossing = spread.crossing([(point.steps, point.loss) for point in points], level)
    if crossing is None:
        return None
    seconds, command = (
        _between([(p.steps, getattr(p, key)) for p in points], crossing.place)
        for key in ("seconds", "command")
    )
    return Needed(crossing, seconds, command)


def _between(points: list[tuple[float, float]], place: float) -> float:
    for (left, low), (right, high) in pairwise(points):
        if left <= place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return points[0][1]


def ratio(family: Family, path: Path, label: str, count: int, whole: bool) -> float | None:
    """How many times cheaper N configurations of this path's kind are with shared variants.

    Args:
        family: what is shared.
        path: the configuration that stands for all N.
        label: which individual training gives the loss to reach.
        count: N.
        whole: count whole commands, else the trainings' steps alone.

    Returns:
        None where the composed model does not reach the loss, or nothing was trained.
    """
    point = path.alone[label]
    found = needed(path.composed, point.loss)
    if found is None:
        return None
    one = point.command if whole else point.seconds
    other = found.command if whole else found.seconds
    return count * one / (family.shared[count] + count * other)


def cost_table(context: Context, family: Family) -> Table:
    """Individual against shared seconds at every loss L(s), of the steps and of whole commands."""
    rows = []
    # the individual trainings are those of the default procedure
    shown = ["L(s)", "BLEU"] if family.procedure == DEFAULT else ["L(s)"]
    for label in [str(steps) for steps in STEPS] + [EARLY]:
        paths = [path for path in family.paths if label in path.alone]
        if not paths:
            continue
        points = [path.alone[label] for path in paths]
        quality = _quality(points)[: len(shown)]
        said = [_label(label, paths, family), *quality, _steps(paths, label)]
        for whole, counted in ((False, "steps"), (True, "commands")):
            each = spread.of([p.command if whole else p.seconds for p in points]).text()
            cells = [_cell(family, paths, label, count, whole) for count in family.shared]
            rows.append([*([""] * len(said) if whole else said), counted, each, *cells])
    shared = ", ".join(
        f"{number(seconds)} s for N = {count} ({family.variants[count]} variants)"
        for count, seconds in family.shared.items()
    )
    return Table(
        ["s", *shown, "composed needs steps", "seconds of", "individual, s each",
         *(f"N = {count}" for count in family.shared)],
        rows,
        title=f"**Rates {family.levels.title}, `{family.procedure}`**: how many times fewer "
        f"{context.clock} N configurations take with shared variants, over {len(family.paths)} "
        f"configurations. Made once: {shared}.",
    )  # fmt: skip


def _label(text: str, found: list[Any], family: Family) -> str:
    return text if len(found) == len(family.paths) else f"{text} ({len(found)})"


def _steps(paths: list[Path], label: str) -> str:
    found = [needed(path.composed, path.alone[label].loss) for path in paths]
    places = [one.crossing.place for one in found if one]
    if not places:
        return "not reached"
    mark = EXTRAPOLATED if any(one.crossing.is_between for one in found if one) else ""
    missing = len(found) - len(places)
    rest = f", {missing} not reached" if missing else ""
    return spread.of(places).text(3, mark) + rest


def _cell(family: Family, paths: list[Path], label: str, count: int, whole: bool) -> str:
    values = [ratio(family, path, label, count, whole) for path in paths]
    reached = [value for value in values if value is not None]
    if not reached:
        return "not reached"
    mark = EXTRAPOLATED if count > len(paths) else ""
    rest = f", {len(values) - len(reached)} not reached" if len(reached) < len(values) else ""
    return spread.of(reached).text(3, mark) + rest


def curve_table(family: Family) -> Table:
    """Loss and BLEU after so many steps of composed models, and as pruned."""
    points = [path.alone["0"] for path in family.paths]
    rows = [["pruned only", *_quality(points)]] if family.procedure == DEFAULT else []
    for index, steps in enumerate(COMPOSED):
        points = [path.composed[index] for path in family.paths if index < len(path.composed)]
        if points:
            rows.append([_label(f"composed, {steps}", points, family), *_quality(points)])
    return Table(["steps", "validation loss", "BLEU", "seconds of the steps"], rows)


def _quality(points: list[Point]) -> list[str]:
    scores = [point.bleu for point in points if point.bleu is not None]
    return [
        spread.of([point.loss for point in points]).text(4),
        spread.of(scores).text(4) if scores else "",
        spread.of([point.seconds for point in points]).text(),
    ]


def measure(context: Context) -> Section:
    """Fill the tables and draw the picture, for mild and for strong rates."""
    families = follow(context, WANTED[: context.few(2, 1)])
    tables = [
        table
        for family in families
        for table in (
            cost_table(context, family),
            curve_table(family),
        )
    ]  # fmt: skip
    notes = [
        "Seconds of steps: of a training, less what the same command takes with one step; of "
        "commands: with start, reading, composing, validation before and after, and writing. Made "
        "once: pruning, calibration, solve and training of units. In brackets behind s or steps: "
        "so many configurations only.",
        "Configurations are drawn with seed 0: every attention, as a pair with its output "
        "projection, and every linear draws one of three rates ("
        + "; ".join(
            f"{family.levels.title}, {len(family.paths)} of which were trained: attentions "
            f"{_rates(family.levels.attention)}, linears {_rates(family.levels.linear)}"
            for family in _usual(families)
        )
        + ").",
        "L(s), BLEU: validation cross-entropy and test BLEU after s individual model-level steps "
        "from the pruned-only model (batches of 64, its own schedule for every s); early stop: at "
        "most 10 epochs, patience 2. A composed model trains on while its loss is above an "
        f"individual one; not reached: not within {COMPOSED[-1]:,} steps. Single runs.",
        "`hybrid` trains modules that lost units for 4 epochs by default.",
        f"{EXTRAPOLATED} at N: more configurations than were trained. What they share was "
        "measured; each trained one then stands for all N. "
        f"{EXTRAPOLATED} at steps: interpolated.",
    ]
    return Section(
        "Does composing pay?", tables, notes, figures(families),
        draw(_usual(families), context.clock),
        "Validation loss and BLEU against the seconds spent, individual and composed",
    )  # fmt: skip


def _rates(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _usual(families: list[Family]) -> list[Family]:
    return [family for family in families if family.procedure == DEFAULT]


def figures(families: list[Family]) -> dict[str, Any]:
    """Return all that was measured."""
    return {
        f"{family.levels.title}, {family.procedure}": {
            "shared": {str(count): value for count, value in family.shared.items()},
            "variants": {str(count): value for count, value in family.variants.items()},
            "paths": [
                {
                    "alone": {label: point.__dict__ for label, point in path.alone.items()},
                    "composed": [point.__dict__ for point in path.composed],
                }
                for path in family.paths
            ],
        }
        for family in families
    }
