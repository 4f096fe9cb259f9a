"""Measure what matters in a model, once: heads, neurons, layers, by a method of choice."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from composable.commands import cli, options


def _rankers() -> list[str]:
    from composable import ranking

    return [ranker.name for ranker in ranking.RANKERS]


#: Those that mask units, one after the other.
MASKING = ("trajectory", "logit_kl")
#: Settings of every ranker, and of those that read texts.
ALWAYS, OF_TEXTS = {"model", "output", "method", "device"}, {"data", "limit"}

#: Names of the rankers, which are not imported for the help.
METHODS = ("layer_distance", "trajectory", "logit_kl", "fisher", "stat", "l1", "random")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    output: Path = options.output("scores.npz", "The scores to write.")
    data: str | None = options.path(
        "--data",
        use=options.DATA,
        type=str,
        help="Texts to measure: a file with one a line, or with one under the key text in each "
        "line (.jsonl); or a folder with the data of the model's task, whose training split is "
        "read. [default: what the model file names]",
    )
    limit: int | None = options.limit(
        "Measure the first N texts only (lines, of a language model's folder). "
        f"[default: {options.ENOUGH}; 256 with {' and '.join(MASKING)}]"
    )
    calibration: Path = options.calibration()
    method: str = options.option(
        "--method",
        help="layer_distance: how much every block of layers changes its input; trajectory: heads "
        "and neurons by how much the features of all later layers change without them; logit_kl: "
        "by how much the logits do; fisher: by how steeply the loss changes with them, which takes "
        "labels; stat: by how little others make up for them; l1: by the size of their weights; "
        "random: by lot, as a control.",
        default="layer_distance",
        type=options.Registered(METHODS, _rankers),
        metavar="METHOD",
    )
    distances: tuple[str, ...] = options.option(
        "--distance",
        help="Distances to measure, all in one pass: angular_all, angular_last, angular_token:I, "
        "bi_score, relative_magnitude, relative_residual, euclidean_last, "
        "linear_approximation_last (both also token:I), linear_fit.",
        default=("angular_all",),
        metavar="NAME..",
    )
    iterative: int | None = options.option(
        "--iterative",
        help="Also find an order in which so many layers go one by one, by the first distance, "
        "measured again each time.",
        type=options.COUNT,
        metavar="N",
    )
    stack: str | None = options.stack("Whose layers --iterative takes, where a model has both.")
    protect: tuple[int, ...] = options.protect("Layers that --iterative leaves, such as 0,29.")
    group: int = options.option(
        "--group",
        help="Measure neurons in groups of N of like size, which takes an Nth of the time; with 16 "
        "the choice was no worse.",
        default=1,
        type=options.COUNT,
        only=("method", MASKING),
        metavar="N",
    )
    gqa: str = options.gqa()
    seed: int = options.seed("Seed of the method random.")
    device: str = options.device()
    workdir: Path = Path()

    def check(self) -> None:
        """Refuse what only a removal of layers one by one looks at."""
        if not self.iterative:
            options.refuse(["stack", "protect"], "has no effect without --iterative")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Measure what matters in a model, and write it as scores.

    plot_importance.py draws them. config_generator.py --scores chooses layers by their distances:
    the smaller the distance between what enters a block and what leaves it, the less is lost with
    the block. With --sizes it chooses by the scores of units how many heads and neurons every layer
    keeps. prune.py --scores keeps the heads and neurons of the highest importance.

    trajectory and logit_kl keep what is done layer by layer: after an interruption the same command
    goes on from there.
    """
    from composable import devices, files, ranking
    from composable.calibration import collect
    from composable.formats import scores_file
    from composable.models import checkpoint
    from composable.ranking import base

    ranker = ranking.by_name(settings.method)
    fields = {field.name for field in dataclasses.fields(ranker.options)}
    names = fields & {*vars(settings)}
    known = names | ALWAYS | (OF_TEXTS if ranker.reads_texts else set())
    options.refuse(vars(settings).keys() - known, f"has no effect with --method {ranker.name}")
    own: dict[str, Any] = {name: getattr(settings, name) for name in names}
    checkpoints = settings.workdir / options.CHECKPOINTS
    if "checkpoints" in fields:
        own["checkpoints"] = str(checkpoints)
    how = ranker.options(**own)
    files.check_writable(settings.output)
    dense = checkpoint.load(settings.model)
    dense.require_dense(settings.model, "rank_importance.py")
    if settings.iterative and settings.stack is None and len(dense.family.stacks) > 1:
        stacks = " and ".join(dense.family.stacks)
        raise click.UsageError(f"the model has {stacks} layers; say which with --stack.")
    dense.model.float().to(devices.select_device(settings.device))  # type: ignore[arg-type]
    texts = None
    if ranker.reads_texts:
        texts = collect.calibration_set(dense, settings.data, settings.limit, tokens=ranker.tokens)
    scores = base.rank(ranker, dense, texts, how)
    scores_file.save(settings.output, scores)
    base.forget(scores, checkpoints)
    return _report(settings, dense, scores)


def _report(settings: Settings, dense: Any, scores: Any) -> dict[str, object]:
    """Say what was measured, and on what."""
    from composable.calibration import collect
    from composable.ranking import block_table

    report: dict[str, object] = {"wrote": str(settings.output), "method": settings.method}
    if read := scores.origin and scores.origin.texts:
        report["calibration_data"] = {"name": read.name, "sha256": read.sha256}
        report |= {"samples": read.samples, "tokens": read.tokens}
        report["tokens_per_input"] = collect.tokens_per_input(dense, read.tokens)
    if scores.units:
        report["units"] = {name: len(one.importance) for name, one in scores.units.items()}
    report |= scores.constants
    if scores.distances:
        report["blocks"] = block_table.tables(scores)
        report["removal"] = [order.modules for order in scores.orders]
    return report
