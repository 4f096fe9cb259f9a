"""Fine-tune a whole model, composed or dense, with no module-level fine-tuning before (control)."""

from dataclasses import dataclass
from pathlib import Path

from composable.commands import cli, options


@dataclass(frozen=True, kw_only=True)
class Settings(options.WholeModel):
    """Options of the command."""

    model: Path = options.model("model/composed.pth", "The model file, dense or composed.")
    output: Path = options.output("model/baseline.pth", "The model file to write.")
    stats: Path = options.stats("stats_baseline.csv")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Fine-tune a model file as a whole; pruned weights stay zero."""
    from composable import files
    from composable.models import checkpoint
    from composable.training import finetune

    files.check_writable(settings.output, settings.stats)
    return finetune.tune_model(
        checkpoint.load(settings.model),
        settings.output,
        settings.stats,
        options.training_of(settings),
        label="baseline",
        data=settings.data,
        limit=settings.limit,
    )
