"""The trainings behind composability: individual ones, and those of composed models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.context import MODEL, PRUNED, STATS, TUNED, Context
from benchmarks.levels import Configuration, Levels, drawn
from benchmarks.runs import Artifact, Run

#: optimizer steps of the individual trainings, each with a schedule of its own; then early stop
STEPS = (100, 300, 1000)
EARLY = "early stop"
EARLY_OPTIONS = ("--epochs", "10")
#: optimizer steps that a composed model gets, as long as it has not yet got below all individual
#: losses; BLEU is measured at some of them
COMPOSED = (0, 1, 25, 50, 100, 300, 1000)
COMPOSED_BLEU = (0, 100, 300, 1000)
FAMILIES = (4, 16, 64)
#: how shared variants are fine-tuned: name -> options of block_level_finetuning.py, and the last of
#: the individual trainings whose loss is worth reaching with them
DEFAULT = "hybrid"
PROCEDURES: dict[str, tuple[tuple[str, ...], str | None]] = {
    DEFAULT: ((), None),
    "hybrid, 1 epoch": (("--epochs", "1"), "300"),
}


@dataclass
class Point:
    """A model on its way.

    Attributes:
        steps: optimizer steps it had.
        loss: validation cross-entropy.
        seconds: of its steps, without what a command of one step takes.
        command: of all commands that made it.
        bleu: on the test split, where it was measured.
    """

    steps: float
    loss: float
    seconds: float
    command: float
    bleu: float | None = None


@dataclass
class Path:
    """One configuration: `alone` by label, `composed` by steps."""

    alone: dict[str, Point] = field(default_factory=dict)
    composed: list[Point] = field(default_factory=list)


@dataclass
class Family:
    """One set of configurations.

    Attributes:
        levels: what they are drawn from.
        procedure: how their variants are fine-tuned, key of `PROCEDURES`.
        shared: number of configurations -> seconds of pruning and module-level fine-tuning of the
            variants they need.
        variants: number of configurations -> how many those are.
        paths: of the configurations that were trained.
    """

    levels: Levels
    procedure: str
    shared: dict[int, float]
    variants: dict[int, int]
    paths: list[Path]


def draw_configurations(context: Context, levels: Levels) -> list[Configuration]:
    """Draw as many as the largest family has."""
    return drawn(max(FAMILIES), *context.names(), levels)


def share(
    context: Context, found: list[Configuration], count: int, procedure: str
) -> tuple[Run, Run]:
    """Prune and fine-tune the variants that the first `count` configurations need."""
    scheme = context.scheme(context.write("drawn", found[:count]))
    pruned = context.prune(scheme)
    return pruned, context.tune("hybrid", pruned, *PROCEDURES[procedure][0])


def trained(
    context: Context, run: Run, idle: Run, steps: float, before: float, has_bleu: bool = True
) -> Point:
    """Read a training.

    Args:
        context: settings.
        run: the training.
        idle: the same command with one step, whose cost is not that of the steps.
        steps: of the run.
        before: seconds of the commands that made what is trained.
        has_bleu: whether the model is translated with.
    """
    bleu = _bleu(context, run.output(MODEL)) if has_bleu else None
    context.runner.drop(run.output(MODEL))
    command = context.seconds(run)
    seconds = max(0.0, command - context.seconds(idle))
    return Point(steps, run.report["validation_loss"], seconds, before + command, bleu)


def _bleu(context: Context, model: Artifact) -> float:
    return float(context.evaluate(model)["bleu"]["value"])


def _start(context: Context, composing: Run, idle: Run) -> Point:
    """The composed model as it is, without a step."""
    loss = idle.report["validation_loss_start"]
    bleu = _bleu(context, composing.output(MODEL))
    return Point(0, loss, 0.0, context.seconds(composing), bleu)


def alone(context: Context, composing: Run, has_early_stop: bool) -> dict[str, Point]:
    """Train one configuration by itself, from the pruned-only model that `composing` made."""
    model, before = composing.output(MODEL), context.seconds(composing)
    idle = context.train_alone(model, "--steps", "1")
    found = {"0": _start(context, composing, idle)}
    for steps in STEPS[: context.few(len(STEPS), 1)]:
        count = context.few(steps, 3)
        run = context.train_alone(model, "--steps", str(count))
        found[str(steps)] = trained(context, run, idle, count, before)
    if has_early_stop:
        options = EARLY_OPTIONS if not context.is_quick else ("--epochs", "1")
        run = context.train_alone(model, *options)
        epochs = float(run.rows(STATS)[-1]["epoch"])
        found[EARLY] = trained(context, run, idle, epochs, before)
    return found


def composed(
    context: Context, bundle: Artifact, configurations: Artifact, index: int, lowest: float
) -> list[Point]:
    """Compose one configuration out of shared variants, and train it on.

    Args:
        context: settings.
        bundle: the shared variants.
        configurations: conf.json.
        index: of the configuration.
        lowest: loss below which no more steps are tried.
    """

    def train(steps: int) -> Run:
        return context.train_composed(bundle, configurations, index, "--steps", str(steps))

    idle = train(1)
    points = [_start(context, context.compose([bundle], configurations, index), idle)]
    for steps in COMPOSED[1 : context.few(len(COMPOSED), 3)]:
        if min(point.loss for point in points) <= lowest:
            break
        points.append(trained(context, train(steps), idle, steps, 0.0, steps in COMPOSED_BLEU))
    return points


def follow(
    context: Context, wanted: Sequence[tuple[Levels, int, int, Sequence[str]]]
) -> list[Family]:
    """Measure sets of configurations.

    Args:
        context: settings.
        wanted: what each set is drawn from, how many of its configurations are trained, how many of
            these by themselves until early stop, and by which procedures variants are shared.
    """
    sizes = FAMILIES[: context.few(len(FAMILIES), 1)]
    sets = [
        (levels, draw_configurations(context, levels)[: sizes[-1]], repeats, early, procedure)
        for levels, repeats, early, procedures in wanted
        for procedure in procedures
    ]
    shares = context.runner.parallel(
        [partial(share, context, one[1], count, one[4]) for one in sets for count in sizes]
    )
    families = []
    for place, (levels, _, repeats, _, procedure) in enumerate(sets):
        mine = dict(zip(sizes, shares[place * len(sizes) :], strict=False))
        families.append(
            Family(
                levels,
                procedure,
                {n: sum(map(context.seconds, runs)) for n, runs in mine.items()},
                {n: tuned.report["variants"] for n, (_, tuned) in mine.items()},
                [Path() for _ in range(context.few(repeats, 1))],
            )
        )

    def walk(place: int, index: int) -> None:
        _, drawing, _, early, procedure = sets[place]
        pruned, tuned = shares[(place + 1) * len(sizes) - 1]
        configurations = context.write("drawn", drawing)
        composing = context.compose([pruned.output(PRUNED)], configurations, index)
        path, last = families[place].paths[index], PROCEDURES[procedure][1]
        known = alone(context, composing, index < early and last is None)
        names = list(known)
        path.alone = (
            known if last is None else {n: known[n] for n in names[: names.index(last) + 1]}
        )
        lowest = min(point.loss for point in path.alone.values())
        path.composed = composed(context, tuned.output(TUNED), configurations, index, lowest)

    context.runner.parallel(
        [
            partial(walk, place, index)
            for place, family in enumerate(families)
            for index in range(len(family.paths))
        ]
    )
    return families
