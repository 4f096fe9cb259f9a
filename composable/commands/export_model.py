"""Write a model as a plain transformers folder, which AutoModel reads."""

from dataclasses import dataclass
from pathlib import Path

from composable.commands import cli, options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/composed.pth", "The model file, dense or composed.")
    output: Path = options.output("exported", "The folder to make.")
    pad: bool = options.option(
        "--pad",
        is_flag=True,
        default=False,
        help="Fill layers that have fewer heads or neurons than others up with zeros, so that "
        "one number holds for all.",
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Write a model as a plain transformers folder.

    Such a folder has one number of heads and one of neurons for all layers; --pad fills up layers
    that have fewer with zeros, which changes no output.
    """
    from composable import files
    from composable.models import checkpoint, cost, export

    model, output = settings.model, settings.output
    files.check_folder(output)
    written = export.write(checkpoint.load(model), model, output, settings.pad)
    return {
        "wrote": str(output),
        "architecture": type(written.model).__name__,
        "parameters": cost.parameters(written.model),
        "removed_layers": written.removed,
        "padded_modules": written.padded,
        "files": sorted(path.name for path in output.iterdir()),
    }
