"""Fine-tune every variant once, beside its dense module: its input in, its output as the target."""

import logging
from pathlib import Path
from typing import Any

import click

from composable.commands import cli
from composable.commands.paths import Use
from composable.errors import ConfigError

log = logging.getLogger("composable")
#: Options that the solver grad does not look at, and those that only it does.
OF_LEAST_SQUARES = (
    *("linear_solver", "ridge", "calibration", "calibration_data", "calibration_samples"),
    *("held_out_samples", "memory_budget"),
)
OF_GRADIENT = ("save_steps",)


def _table(stats: Path) -> Path:
    """Name the CSV of all variants."""
    return stats.with_name(f"{stats.stem}_variants.csv")


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules.npy")
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="modules_finetuned.npy", text="Bundle to write."
)
@cli.path_option(
    "--stats",
    use=Use(writes=True, also=_table),
    default="stats_block.csv",
    text="Losses per epoch, CSV.",
)
@cli.path_option("--plot", use=cli.WRITTEN, text="Heat map of the errors, PNG.")
@click.option(
    "--solver",
    type=click.Choice(["hybrid", "ls", "grad"]),
    default="hybrid",
    help="hybrid: least squares, then a short training of attentions and ffns that lost heads or "
    "neurons; ls: least squares alone, faster; grad: all variants by gradient.",
)
@click.option(
    "--linear-solver",
    type=click.Choice(["pcg", "exact"]),
    default="pcg",
    help="Of the least squares: conjugate gradients, or a factorisation per row (slow).",
)
@click.option(
    "--ridge",
    type=cli.Finite(min=0),
    default=0.01,
    help="Of the least squares: how strongly they pull toward the weights as pruned, in parts of "
    "the inputs' mean squares; 0: not at all, as in STAT's paper.",
)
@cli.calibration_options
@cli.training_options(epochs=None, lr=None, early_stop=2)
def main(
    model: Path,
    bundles: tuple[Path, ...],
    output: Path,
    stats: Path,
    plot: Path | None,
    solver: str,
    **options: Any,
) -> dict[str, object]:
    """Fit all variants to their dense modules' outputs, each as if it were alone.

    The least-squares forms measure the inputs of every module once (--calibration) and solve.
    --epochs, --batch-size, --lr and --early-stop are those of the gradient steps: of all variants
    on the whole training split (grad: 4 epochs, batches of 64, lr 0.04), or of attentions and ffns
    that lost heads or neurons on the calibration texts (hybrid: 4 epochs, batches of 16, of ffns
    as many tokens as 16 samples have, lr 0.02).

    A variant stays as it was pruned where that is better on the held-out texts. Beside the CSV of
    the summed losses, NAME_variants.csv lists every variant with its relative error before and
    after.
    """
    from composable import files
    from composable.reports import variant_table
    from composable.variants import tuning

    _refuse(OF_LEAST_SQUARES if solver == "grad" else OF_GRADIENT, solver)
    table = _table(stats)
    files.check_writable(output, stats, table, plot)
    result, report = tuning.tune_variants(model, bundles, output, stats, solver=solver, **options)
    report["table"] = str(table)
    if result.is_main:
        rows = variant_table.rows_of(result.variants, result.seconds, result.kept)
        variant_table.write(table, rows)
        if plot:
            files.write_bytes(plot, variant_table.errors_png(rows))
            report["plot"] = str(plot)
        log.info("%s", variant_table.as_text(rows))
        result.clean_up()
    return report


def _refuse(names: tuple[str, ...], solver: str) -> None:
    """Refuse options of the other solvers."""
    for name, flag in cli.given_options().items():
        if name in names:
            raise ConfigError(f"{flag}: is no option of the solver {solver}; leave it out.")
