#!/usr/bin/env python3
"""Fine-tune a whole model, composed or dense, with no module-level fine-tuning before (control).

python baseline_finetuning.py -m model/composed.pth -o model/baseline.pth
torchrun --nproc-per-node 2 baseline_finetuning.py --epochs 3
"""

from pathlib import Path

from composable import cli


@cli.command()
@cli.model_option("model/composed.pth")
@cli.path_option("-o", "--output", default="model/baseline.pth", text="Model file to write.")
@cli.path_option("--stats", default="stats_baseline.csv", text="Losses per epoch, CSV.")
@cli.training_options(epochs=4, lr=2e-3, early_stop=2, is_whole_model=True)
def main(
    model: Path, output: Path, stats: Path, training: object, **data: object
) -> dict[str, object]:
    """Fine-tune a model file as a whole; pruned weights stay zero."""
    from composable import checkpoint, files, tune

    files.check_writable(output, stats)
    return tune.tune_model(
        checkpoint.load(model), output, stats, training, label="baseline", **data
    )


if __name__ == "__main__":
    main()
