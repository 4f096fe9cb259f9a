#!/usr/bin/env python3
"""Draw the loss curves of one or more fine-tuning runs into one picture.

./plot_loss.py                                           # stats_model.csv -> loss.png
./plot_loss.py stats_baseline.csv stats_model.csv -o both.png
"""

from pathlib import Path

import click

from composable import cli


@cli.command()
@click.argument("csvs", nargs=-1, type=click.Path(path_type=Path), metavar="[CSV]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("loss.png"),
    help="Picture to write, a PNG.",
)
def main(csvs: tuple[Path, ...], output: Path) -> dict[str, object]:
    """Draw validation (solid) and training loss (dashed) over epochs, one colour per CSV.

    CSV is a file that a fine-tuning script wrote with --stats; stats_model.csv if none is given.
    """
    from composable import files, plots
    from composable.errors import UserError

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: only .png can be written; give -o a name that ends in .png.")
    paths = csvs or (Path("stats_model.csv"),)
    curves = plots.read_all(paths)
    files.check_writable(output)
    plots.write_loss_plot(curves, output)
    return {
        "wrote": str(output),
        "curves": [
            {
                "file": str(path),
                "epochs": len(curve.epochs),
                "first_validation_loss": curve.validation[0],
                "best_validation_loss": min(curve.validation),
            }
            for path, curve in zip(paths, curves, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
