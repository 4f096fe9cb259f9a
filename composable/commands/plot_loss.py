"""Draw the loss curves of one or more fine-tuning runs into one picture."""

from dataclasses import dataclass
from pathlib import Path

from composable.commands import cli, options
from composable.commands.paths import Use


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    csvs: tuple[Path, ...] = options.argument(
        "csvs", Use(reads=True), (Path("stats_model.csv"),), nargs=-1, metavar="[CSV]..."
    )
    output: Path = options.output("loss.png", "The picture, a PNG file.", type=options.PNG)


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Draw validation (solid) and training loss (dashed) over epochs, one colour per CSV.

    CSV is a file that a fine-tuning script wrote with --stats; stats_model.csv if none is given.
    """
    from composable import files
    from composable.formats import stats_file
    from composable.reports import loss_plot

    curves = stats_file.read_all(settings.csvs)
    files.check_writable(settings.output)
    files.write_bytes(settings.output, loss_plot.loss_png(curves))
    return {
        "wrote": str(settings.output),
        "curves": [
            {
                "file": str(path),
                "epochs": len(curve.epochs),
                "first_validation_loss": curve.validation[0],
                "best_validation_loss": min(curve.validation),
            }
            for path, curve in zip(settings.csvs, curves, strict=True)
        ],
    }
