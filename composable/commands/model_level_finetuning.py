"""Compose a configuration out of fine-tuned variants and fine-tune it as a whole."""

from pathlib import Path
from typing import Any

import click

from composable.commands import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.bundle_option("modules_finetuned.npy")
@cli.configuration_options
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="model/finetuned.pth", text="Model file to write."
)
@cli.path_option(
    "--stats", use=cli.WRITTEN, default="stats_model.csv", text="Losses per epoch, CSV."
)
@click.option(
    "--heal",
    "how",
    type=click.Choice(["full", "neighbours", "lora"]),
    default="full",
    help="What learns: all weights; the layers beside those that are gone; or low-rank adapters of "
    "the ffns, merged at the end.",
)
@click.option("--rank", type=cli.COUNT, default=64, help="Of the adapters of lora.")
@cli.training_options(epochs=4, lr=None, early_stop=2, is_whole_model=True)
def main(
    model: Path,
    bundles: tuple[Path, ...],
    config: Path,
    index: int,
    output: Path,
    stats: Path,
    how: str,
    rank: int,
    training: Any,
    **data: Any,
) -> dict[str, object]:
    """Finish configuration N with a short fine-tuning of the whole model.

    The peak learning rate is 0.002 unless --lr says otherwise; with --heal lora 0.0003, which is
    AdamW's and not relative to the size of a matrix.
    """
    from composable import files
    from composable.training import finetune
    from composable.training.heal import Heal
    from composable.variants import compose

    files.check_writable(output, stats)
    composed, _ = compose.compose_files(model, bundles, config, index)
    return finetune.tune_model(
        composed, output, stats, training, label="model", heal=Heal(how, rank), **data
    )
