"""Put one configuration together out of the dense model and a bundle of variants."""

from pathlib import Path

from composable.commands import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules.npy")
@cli.configuration_options
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="model/composed.pth", text="Model file to write."
)
def main(
    model: Path, bundles: tuple[Path, ...], config: Path, index: int, output: Path
) -> dict[str, object]:
    """Compose configuration N; only the variants that it needs are read."""
    from composable import files
    from composable.models import checkpoint, cost
    from composable.variants import compose

    files.check_writable(output)
    composed, chosen = compose.compose_files(model, bundles, config, index)
    checkpoint.save(output, composed)
    return {
        "wrote": str(output),
        "configuration": index,
        "variants": len(chosen),
        "parameters": cost.parameters(composed.model),
        "nonzero_parameters": cost.nonzero_parameters(composed.model),
        "bytes": output.stat().st_size,
    }
