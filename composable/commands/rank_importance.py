"""Measure what matters in a model, once: heads, neurons, layers, by a method of choice."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from composable.commands import cli
from composable.errors import ConfigError

#: Options of every ranker, of those that read texts, and of the tables of blocks.
ALWAYS = ("model", "method", "output", "device", "verbose", "quiet", "debug")
OF_TEXTS = ("calibration_data", "key", "calibration_samples", "max_length")
OF_BLOCKS = ("threshold", "reference_offset")


@cli.command()
@cli.model_option("model/t5-small.pth")
@click.option(
    "--method",
    default="layer_distance",
    help="What is measured. layer_distance: how much every block of layers changes its input; "
    "stat: heads and neurons by how little the others make up for them; l1: by the size of their "
    "weights; random: by lot, as a control.",
)
@click.option(
    "--distance",
    "distances",
    multiple=True,
    default=("angular_all",),
    metavar="NAME..",
    help="Of layer_distance: angular_all, angular_last, angular_token:I, bi_score, "
    "relative_magnitude, relative_residual, euclidean_last, linear_approximation_last (both also "
    "token:I), linear_fit; several are measured in one pass.",
)
@cli.path_option(
    "--calibration-data",
    use=cli.DATA,
    type=str,
    text="File with a text a line, or .jsonl (--key); or a folder with the data of the model's "
    "task, as --data of the other scripts, whose training split is read.  [default: what the "
    "model file says]",
)
@click.option("--key", default="text", help="Of the text in a line of .jsonl.")
@click.option(
    "--calibration-samples",
    type=cli.COUNT,
    help="The first so many samples; of a language model's folder, lines.  "
    f"[default: {cli.UNTIL_ENOUGH}]",
)
@click.option("--max-length", type=cli.COUNT, help="Tokens of a text at most.")
@click.option(
    "--batch-size",
    type=cli.COUNT,
    help="Samples of a batch.  [default: as many as are 2,048 tokens]",
)
@cli.path_option("-o", "--output", use=cli.WRITTEN, default="scores.npz", text="File to write.")
@click.option("--threshold", type=cli.Finite(), help="List blocks up to this score only.")
@cli.offset_option
@click.option(
    "--iterative",
    type=cli.COUNT,
    help="Also let so many layers go one by one, by the first distance, measuring again each time.",
)
@click.option(
    "--stack",
    type=click.Choice(["encoder", "decoder"]),
    help="Whose layers --iterative takes, where a model has both.",
)
@click.option("--protect", default="", help="Layers that --iterative leaves, e.g. 0,29.")
@click.option(
    "--largest", type=cli.COUNT, help="Most layers of a block by linear_fit.  [default: all]"
)
@click.option(
    "--memory-budget",
    type=cli.BYTES,
    help="Memory for the moments of linear_fit and stat; what does not fit takes more passes.  "
    "[default: 2G]",
)
@cli.path_option(
    "--calibration",
    use=cli.BOTH,
    default="calibration.npy",
    text="Of the method stat: statistics of the inputs, which prune.py shares; read if it exists, "
    "else measured and written.",
)
@cli.gqa_option
@click.option("--seed", type=cli.SEED, default=42, help="Of the method random.")
@cli.device_option
def main(
    model: Path,
    method: str,
    output: Path,
    threshold: float | None,
    reference_offset: bool,
    protect: str,
    memory_budget: int | None,
    calibration: Path,
    device: str,
    **settings: Any,
) -> dict[str, object]:
    """Measure what matters in a model, and write it as scores.

    config_generator.py --scores chooses layers by their distances, which plot_importance.py draws:
    the smaller the distance between what enters a block and what leaves it, the less is lost with
    the block. With --sizes it chooses by scores of the method stat how many heads and neurons every
    layer keeps. prune.py --scores keeps the heads and neurons of the highest importance.
    """
    from composable import devices, files, ranking
    from composable.calibration import collect
    from composable.formats import scores_file
    from composable.models import checkpoint
    from composable.ranking import base, block_table

    ranker = ranking.by_name(method)
    settings |= {
        "protect": cli.parse_numbers(protect, "--protect"),
        "memory_budget": memory_budget,
        "calibration": str(calibration),
    }
    options = _options(ranker, settings)
    files.check_writable(output)
    dense = checkpoint.load(model)
    dense.require_dense(model, "rank_importance.py")
    dense.model.float().to(devices.select_device(device))  # type: ignore[arg-type]
    reading = {name: settings[name] for name in OF_TEXTS}
    texts = collect.calibration_set(dense, *reading.values()) if ranker.reads_texts else None
    scores = base.rank(ranker, dense, texts, options)
    scores_file.save(output, scores)
    report: dict[str, object] = {"wrote": str(output), "method": method}
    if read := scores.origin and scores.origin.texts:
        report["calibration_data"] = {"name": read.name, "sha256": read.sha256}
        report |= {"samples": read.samples, "tokens": read.tokens}
        report["tokens_per_input"] = collect.tokens_per_input(dense, read.tokens)
    if scores.units:
        report["units"] = {name: len(one.importance) for name, one in scores.units.items()}
    if scores.distances:
        report["blocks"] = block_table.tables(scores, threshold, reference_offset)
        report["removal"] = [order.modules for order in scores.orders]
    return report


def _options(ranker: Any, settings: dict[str, Any]) -> Any:
    """Make the options of a ranker; refuse what it does not look at."""
    own = {field.name for field in dataclasses.fields(ranker.options)}
    known = {*ALWAYS, *own, *(OF_TEXTS if ranker.reads_texts else ())}
    known |= {*OF_BLOCKS} if "distances" in own else set()
    for name, flag in cli.given_options().items():
        if name not in known:
            raise ConfigError(f"{flag}: is no option of the method {ranker.name}; leave it out.")
    return ranker.options(**{name: value for name, value in settings.items() if name in own})
