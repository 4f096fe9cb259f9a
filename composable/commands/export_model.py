"""Write a model as a plain transformers folder, which AutoModel reads."""

from pathlib import Path

from composable.commands import cli


@cli.command()
@cli.model_option("model/composed.pth")
@cli.path_option("-o", "--output", use=cli.WRITTEN, default="exported", text="Folder to write.")
def main(model: Path, output: Path) -> dict[str, object]:
    """Write a dense model, or one that has lost whole layers or masked weights, as a folder.

    Models that have lost heads or neurons have shapes that transformers cannot build.
    """
    from composable import files
    from composable.models import checkpoint, cost, export

    files.check_folder(output)
    loaded = checkpoint.load(model)
    removed = export.write(loaded, model, output)
    return {
        "wrote": str(output),
        "architecture": type(loaded.model).__name__,
        "parameters": cost.parameters(loaded.model),
        "removed_layers": removed,
        "files": sorted(path.name for path in output.iterdir()),
    }
