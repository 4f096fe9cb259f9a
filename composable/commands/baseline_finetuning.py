"""Fine-tune a whole model, composed or dense, with no module-level fine-tuning before (control)."""

from pathlib import Path
from typing import Any

from composable.commands import cli


@cli.command()
@cli.model_option("model/composed.pth")
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="model/baseline.pth", text="Model file to write."
)
@cli.path_option(
    "--stats", use=cli.WRITTEN, default="stats_baseline.csv", text="Losses per epoch, CSV."
)
@cli.training_options(epochs=4, lr=2e-3, early_stop=2, is_whole_model=True)
def main(model: Path, output: Path, stats: Path, training: Any, **data: Any) -> dict[str, object]:
    """Fine-tune a model file as a whole; pruned weights stay zero."""
    from composable import files
    from composable.models import checkpoint
    from composable.training import finetune

    files.check_writable(output, stats)
    return finetune.tune_model(
        checkpoint.load(model), output, stats, training, label="baseline", **data
    )
