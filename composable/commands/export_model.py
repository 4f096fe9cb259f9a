"""Write a model as a plain transformers folder, which AutoModel reads."""

from pathlib import Path

import click

from composable.commands import cli


@cli.command()
@cli.model_option("model/composed.pth")
@cli.path_option("-o", "--output", use=cli.WRITTEN, default="exported", text="Folder to write.")
@click.option(
    "--pad",
    is_flag=True,
    help="Fill up what has fewer heads or neurons than the folder's config can say with zeros.",
)
def main(model: Path, output: Path, pad: bool) -> dict[str, object]:
    """Write a model as a plain transformers folder.

    Such a folder has one number of heads and one of neurons for all layers; --pad fills up layers
    that have fewer with zeros, which changes no output.
    """
    from composable import files
    from composable.models import checkpoint, cost, export

    files.check_folder(output)
    written = export.write(checkpoint.load(model), model, output, pad)
    return {
        "wrote": str(output),
        "architecture": type(written.model).__name__,
        "parameters": cost.parameters(written.model),
        "removed_layers": written.removed,
        "padded_modules": written.padded,
        "files": sorted(path.name for path in output.iterdir()),
    }
