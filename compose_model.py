#!/usr/bin/env python3
"""Put one configuration together out of the dense model and a bundle of variants.

python compose_model.py -p modules.npy -n 0 -o model/composed.pth
python compose_model.py -p modules_l1.npy -p modules_other.npy -n 1 -o model/mixed.pth
"""

from pathlib import Path

from composable import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules.npy")
@cli.configuration_options
@cli.path_option("-o", "--output", default="model/composed.pth", text="Model file to write.")
def main(
    model: Path, bundles: tuple[Path, ...], config: Path, index: int, output: Path
) -> dict[str, object]:
    """Compose configuration N; only the variants that it needs are read."""
    from composable import checkpoint, compose, cost, files

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


if __name__ == "__main__":
    main()
