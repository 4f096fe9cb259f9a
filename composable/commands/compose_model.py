"""Put one configuration together out of the dense model and a bundle of variants."""

from dataclasses import dataclass
from pathlib import Path

from composable.commands import cli, options


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    bundles: tuple[Path, ...] = options.bundles("modules.npy")
    config: Path = options.config()
    index: int = options.index()
    output: Path = options.output("model/composed.pth", "The composed model, a model file.")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Compose one configuration; only the variants that it needs are read."""
    from composable import files
    from composable.models import checkpoint, cost
    from composable.variants import compose

    output = settings.output
    files.check_writable(output)
    composed, chosen = compose.compose_files(
        settings.model, settings.bundles, settings.config, settings.index
    )
    checkpoint.save(output, composed)
    return {
        "wrote": str(output),
        "configuration": settings.index,
        "variants": len(chosen),
        "parameters": cost.parameters(composed.model),
        "nonzero_parameters": cost.nonzero_parameters(composed.model),
        "bytes": output.stat().st_size,
    }
