#!/usr/bin/env python3
"""Fine-tune every variant once, beside its dense module: its input in, its output as the target.

python block_level_finetuning.py -p modules.npy -o modules_finetuned.npy
"""

from pathlib import Path

from composable import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules.npy")
@cli.path_option("-o", "--output", default="modules_finetuned.npy", text="Bundle to write.")
@cli.path_option("--stats", default="stats_block.csv", text="Losses per epoch, CSV.")
@cli.training_options(epochs=4, batch_size=64, lr=4e-2, early_stop=2)
def main(
    model: Path,
    bundles: tuple[Path, ...],
    output: Path,
    stats: Path,
    training: object,
    **data: object,
) -> dict[str, object]:
    """Train all variants in one pass over the data, each as if it were alone.

    Beside the CSV of the summed losses, NAME_variants.csv lists every variant with its relative
    error before and after.
    """
    from composable import files, tune

    table = stats.with_name(f"{stats.stem}_variants.csv")
    files.check_writable(output, stats, table)
    return tune.tune_variants(model, bundles, output, stats, table, training, **data)


if __name__ == "__main__":
    main()
