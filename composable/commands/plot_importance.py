"""Draw how much every block of layers changes its input, and which blocks change it least."""

from pathlib import Path

import click

from composable.commands import cli
from composable.commands.paths import Use


@cli.command()
@cli.path_argument("scores", cli.READ, default=Path("scores.npz"))
@cli.path_option(
    "-o",
    "--output",
    use=Use(writes=True, default=lambda options: options["scores"].with_suffix(".png")),
    text="PNG to write.  [default: SCORES.png]",
)
@cli.choice_options
@click.option("--raw", is_flag=True, help="Colours of the distances, not of each row's range.")
@click.option("--title", help="Over the picture.  [default: the model's name]")
def main(
    scores: Path,
    output: Path,
    stack: str | None,
    distance: str | None,
    reference_offset: bool,
    raw: bool,
    title: str | None,
) -> dict[str, object]:
    """Draw all blocks as a heat map, the best of every size marked, and a strip of the layers."""
    from composable import files
    from composable.errors import UserError
    from composable.formats import scores_file
    from composable.reports import importance_plot

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: only .png can be written; give -o a name that ends in .png.")
    found = scores_file.load(scores)
    stacks = [stack] if stack else found.stacks or [""]
    tables = [found.blocks(name, distance) for name in stacks]
    files.check_writable(output)
    source = found.origin.model if found.origin else ""
    title = source if title is None else title
    files.write_bytes(output, importance_plot.png(tables, title, raw, reference_offset))
    return {"wrote": str(output), "stacks": stacks, "distance": tables[0].distance}
