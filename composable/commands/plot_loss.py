"""Draw the loss curves of one or more fine-tuning runs into one picture."""

from pathlib import Path

from composable.commands import cli
from composable.commands.paths import Use


@cli.command()
@cli.path_argument(
    "csvs",
    Use(reads=True, default=lambda _: (Path("stats_model.csv"),)),
    nargs=-1,
    metavar="[CSV]...",
)
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="loss.png", text="Picture to write, a PNG."
)
def main(csvs: tuple[Path, ...], output: Path) -> dict[str, object]:
    """Draw validation (solid) and training loss (dashed) over epochs, one colour per CSV.

    CSV is a file that a fine-tuning script wrote with --stats; stats_model.csv if none is given.
    """
    from composable import files
    from composable.errors import UserError
    from composable.formats import stats_file
    from composable.reports import loss_plot

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: only .png can be written; give -o a name that ends in .png.")
    curves = stats_file.read_all(csvs)
    files.check_writable(output)
    files.write_bytes(output, loss_plot.loss_png(curves))
    return {
        "wrote": str(output),
        "curves": [
            {
                "file": str(path),
                "epochs": len(curve.epochs),
                "first_validation_loss": curve.validation[0],
                "best_validation_loss": min(curve.validation),
            }
            for path, curve in zip(csvs, curves, strict=True)
        ],
    }
