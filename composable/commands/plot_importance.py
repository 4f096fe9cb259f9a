"""Draw how much every block of layers changes its input, and which blocks change it least."""

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
        "--distance", help="Which distance is drawn. [default: the first of the file]"
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Draw all blocks as a heat map, the best of every size marked, and a strip of the layers."""
    from composable import files
    from composable.formats import scores_file
    from composable.reports import importance_plot

    found = scores_file.load(settings.scores)
    stacks = found.stacks or [""]
    tables = [found.blocks(name, settings.distance) for name in stacks]
    files.check_writable(settings.output)
    title = found.origin.model if found.origin else ""
    files.write_bytes(settings.output, importance_plot.png(tables, title))
    return {"wrote": str(settings.output), "stacks": stacks, "distance": tables[0].distance}
