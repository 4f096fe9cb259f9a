"""Fine-tune every variant once, beside its dense module: its input in, its output as the target."""

import logging
from dataclasses import dataclass
from pathlib import Path

import click

from composable.commands import cli, options
from composable.commands.paths import Use

log = logging.getLogger("composable")
MEASURES = ("solver", ("hybrid", "ls"))
TRAINS = ("solver", ("hybrid", "grad"))


def _table(stats: Path) -> Path:
    """Name the CSV of all variants."""
    return stats.with_name(f"{stats.stem}_variants.csv")


def _picture(stats: Path) -> Path:
    """Name the heat map of their errors."""
    return _table(stats).with_suffix(".png")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    bundles: tuple[Path, ...] = options.bundles("modules.npy")
    output: Path = options.output("modules_finetuned.npy", "The bundle to write.")
    stats: Path = options.stats(
        "stats_block.csv", use=Use(writes=True, also=lambda path: (_table(path), _picture(path)))
    )
    data: str | None = options.data()
    limit: int | None = options.limit(
        f"{options.HELD_OUT} With --solver grad read the first N samples of each split only."
    )
    calibration: Path = options.calibration(only=MEASURES)
    solver: str = options.option(
        "--solver",
        help="hybrid: least squares, then a short training of attentions and ffns that lost heads "
        "or neurons; ls: least squares alone, which is faster; grad: all variants by gradient.",
        default="hybrid",
        type=click.Choice(["hybrid", "ls", "grad"]),
    )
    ridge: float = options.option(
        "--ridge",
        help="How strongly least squares pull toward the weights as pruned, in parts of the "
        "inputs' mean squares; 0: not at all, as in STAT's paper.",
        default=0.01,
        type=options.Finite(min=0),
        only=MEASURES,
    )
    epochs: int | None = options.epochs(None, ". [default: 4]", only=TRAINS)
    batch_size: int | None = options.batch_size(
        "[default: of grad 64, or 8 windows of a language model; of hybrid a quarter]", only=TRAINS
    )
    lr: float | None = options.lr(
        "Peak learning rate, relative to the size of each matrix. [default: of grad 0.04, of "
        "hybrid 0.02]",
        only=TRAINS,
    )
    seed: int = options.seed("Seed of the order of samples.", options.TRAINING, only=TRAINS)
    memory_budget: int = options.memory_budget(only=MEASURES)
    device: str = options.device()
    dtype: str = options.dtype(trains=True, only=TRAINS)
    workdir: Path = Path()

    def check(self) -> None:
        """Refuse a number type in which recorded calls are not kept."""
        if self.solver == "hybrid" and self.dtype == "float16":
            raise click.UsageError(
                "--dtype float16: --solver hybrid trains in float32 or bfloat16; name one of them."
            )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Fit all variants to their dense modules' outputs, each as if it were alone.

    Least squares measure the inputs of every module once (--calibration) and solve. Training
    follows the dense modules' outputs by gradient: of all variants on the whole training split
    (grad), or of attentions and ffns that lost heads or neurons on the calibration texts (hybrid).
    It ends after 2 epochs that were no better.

    A variant stays as it was pruned where that is better on the held-out texts. Beside the CSV of
    the summed losses, NAME_variants.csv lists every variant with its relative error before and
    after, and NAME_variants.png draws these errors.
    """
    from composable import files
    from composable.reports import variant_table
    from composable.variants import tuning

    stats = settings.stats
    table, picture = _table(stats), _picture(stats)
    files.check_writable(settings.output, stats, table, picture)
    result, report = tuning.tune_variants(
        settings.model,
        settings.bundles,
        settings.output,
        stats,
        options.training_of(settings),
        settings.solver,
        settings.ridge,
        data=settings.data,
        limit=settings.limit,
        calibration=settings.calibration,
        memory_budget=settings.memory_budget,
    )
    report |= {"table": str(table), "picture": str(picture)}
    if result.is_main:
        rows = variant_table.rows_of(result.variants, result.seconds, result.kept)
        variant_table.write(table, rows)
        files.write_bytes(picture, variant_table.errors_png(rows))
        log.info("%s", variant_table.as_text(rows))
        result.clean_up()
    return report
