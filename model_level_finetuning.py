#!/usr/bin/env python3
"""Compose a configuration out of fine-tuned variants and fine-tune it as a whole.

python model_level_finetuning.py -p modules_finetuned.npy -n 0 -o model/finetuned.pth
torchrun --nproc-per-node 2 model_level_finetuning.py -n 1 -o model/finetuned_1.pth
"""

from pathlib import Path

from composable import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules_finetuned.npy")
@cli.configuration_options
@cli.path_option("-o", "--output", default="model/finetuned.pth", text="Model file to write.")
@cli.path_option("--stats", default="stats_model.csv", text="Losses per epoch, CSV.")
@cli.training_options(epochs=4, lr=2e-3, early_stop=2, is_whole_model=True)
def main(
    model: Path,
    bundles: tuple[Path, ...],
    config: Path,
    index: int,
    output: Path,
    stats: Path,
    training: object,
    **data: object,
) -> dict[str, object]:
    """Finish configuration N with a short fine-tuning of the whole model."""
    from composable import compose, files, tune

    files.check_writable(output, stats)
    composed, _ = compose.compose_files(model, bundles, config, index)
    return tune.tune_model(composed, output, stats, training, label="model", **data)


if __name__ == "__main__":
    main()
