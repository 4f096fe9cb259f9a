"""Compose a configuration out of fine-tuned variants and fine-tune it as a whole."""

from dataclasses import dataclass
from pathlib import Path

import click

from composable.commands import cli, options


@dataclass(frozen=True, kw_only=True)
class Settings(options.WholeModel):
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    bundles: tuple[Path, ...] = options.bundles("modules_finetuned.npy")
    config: Path = options.config()
    index: int = options.index()
    output: Path = options.output("model/finetuned.pth", "The model file to write.")
    stats: Path = options.stats("stats_model.csv")
    heal: str = options.option(
        "--heal",
        help="What learns: all weights; the layers beside those that are gone; or low-rank "
        "adapters of the ffns, which are merged at the end.",
        default="full",
        type=click.Choice(["full", "neighbours", "lora"]),
    )
    rank: int = options.option(
        "--rank", help="Rank of the adapters.", default=64, type=options.COUNT,
        only=("heal", ("lora",)),
    )  # fmt: skip
    lr: float | None = options.lr(
        "Peak learning rate, relative to the size of each matrix; with --heal lora that of AdamW. "
        "[default: 0.002; with --heal lora 0.0003]"
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Finish a configuration with a short fine-tuning of the whole model."""
    from composable import files
    from composable.training import finetune
    from composable.training.heal import Heal
    from composable.variants import compose

    files.check_writable(settings.output, settings.stats)
    composed, _ = compose.compose_files(
        settings.model, settings.bundles, settings.config, settings.index
    )
    return finetune.tune_model(
        composed,
        settings.output,
        settings.stats,
        options.training_of(settings),
        label="model",
        heal=Heal(settings.heal, settings.rank),
        data=settings.data,
        limit=settings.limit,
    )
