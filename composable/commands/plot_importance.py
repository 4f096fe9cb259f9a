"""Draw scores: importances of heads and neurons, and how much blocks of layers change."""

from dataclasses import dataclass
from pathlib import Path

from composable.commands import cli, options
from composable.commands.paths import Use


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    scores: Path = options.argument("scores", options.READ, Path("scores.npz"))
    output: Path = options.output(
        None,
        "The picture, a PNG file. [default: SCORES.png]",
        use=Use(writes=True, default=lambda options: options["scores"].with_suffix(".png")),
        type=options.PNG,
    )
    distance: str | None = options.option(
        "--distance", help="Which distance of layers is drawn. [default: the first of the file]"
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Draw whatever a file of scores holds.

    Heads are a map of layers and heads, neurons a curve for each layer, from the most important
    on, and blocks of layers a heat map with the best of every size marked, and a strip of the
    single layers.
    """
    from composable import files
    from composable.formats import scores_file
    from composable.reports import importance_plot

    found = scores_file.load(settings.scores)
    if not found.distances:
        options.refuse(["distance"], "has no effect: the scores hold no distances of layers")
    files.check_writable(settings.output)
    files.write_bytes(settings.output, importance_plot.png(found, settings.distance))
    report: dict[str, object] = {"wrote": str(settings.output), "modules": len(found.units)}
    if found.distances:
        report["stacks"] = found.stacks
        report["distance"] = settings.distance or found.distances[0].distance
    return report
