"""Measure how much every block of layers changes its input, on a calibration set."""

from pathlib import Path
from typing import Any

import click

from composable.commands import cli


@cli.command()
@cli.model_option("model/t5-small.pth")
@click.option(
    "--method", type=click.Choice(["layer_distance"]), default="layer_distance", help="Of scoring."
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=("angular_all",),
    metavar="NAME..",
    help="angular_all, angular_last, angular_token:I, bi_score, relative_magnitude, "
    "relative_residual, euclidean_last, linear_approximation_last (both also token:I), linear_fit; "
    "several are measured in one pass.",
)
@click.option(
    "--calibration-data",
    help="File with a text a line, or .jsonl (--key); or a folder with the data of the model's "
    "task, as --data of the other scripts, whose training split is read.  [default: what the "
    "model file says]",
)
@click.option("--key", default="text", help="Of the text in a line of .jsonl.")
@click.option(
    "--calibration-samples",
    type=click.IntRange(min=1),
    default=256,
    help="The first so many samples; of a language model's folder, lines.",
)
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of a text at most.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Samples of a batch.  [default: as many as are 2,048 tokens]",
)
@cli.path_option("-o", "--output", default="distances.npz", text="File to write.")
@click.option("--threshold", type=float, help="List blocks up to this score only.")
@click.option(
    "--reference-offset",
    is_flag=True,
    help="Choose a block of N layers by the scores of N + 1, as short-transformers does.",
)
@click.option(
    "--iterative",
    type=click.IntRange(min=1),
    help="Also let so many layers go one by one, by the first metric, measuring again each time.",
)
@click.option(
    "--stack",
    type=click.Choice(["encoder", "decoder"]),
    help="Whose layers --iterative takes, where a model has both.",
)
@click.option("--protect", default="", help="Layers that --iterative leaves, e.g. 0,29.")
@click.option(
    "--largest",
    type=click.IntRange(min=1),
    help="Most layers of a block by linear_fit.  [default: all]",
)
@click.option(
    "--memory-budget",
    type=cli.BYTES,
    default="2G",
    help="Memory for the moments of linear_fit; what does not fit takes more passes.",
)
@cli.device_option
def main(
    model: Path,
    method: str,
    metrics: tuple[str, ...],
    output: Path,
    threshold: float | None,
    reference_offset: bool,
    iterative: int | None,
    stack: str | None,
    protect: str,
    largest: int | None,
    memory_budget: int,
    device: str,
    **texts: Any,
) -> dict[str, object]:
    """Measure how much every block of layers changes its input, on a calibration set.

    The smaller the distance between what enters a block and what leaves it, the less is lost with
    the block. config_generator.py --scores chooses layers by the file, plot_importance.py draws it.
    """
    from composable import devices, files
    from composable.calibration import collect, layer_states
    from composable.formats import scores_file
    from composable.linalg.state_distances import Metric
    from composable.models import checkpoint
    from composable.ranking import layer_choice, layer_distance

    wanted = [Metric.parse(name) for name in dict.fromkeys(metrics)]
    files.check_writable(output)
    dense = checkpoint.load(model)
    dense.require_dense(model, "rank_importance.py")
    device = devices.select_device(device)
    dense.model.float().to(device)
    batches, facts = collect.batches(dense, device=device, **texts)
    reader = layer_states.Reader.of(dense.model, dense.family)
    protected = layer_choice.parse_numbers(protect, "--protect")
    removing = layer_distance.removing(reader, batches, wanted[0], stack, iterative, protected)
    found = layer_distance.measure(reader, batches, wanted, largest, memory_budget)
    scores = layer_distance.scores_of(found, dense.info["source"], dense.fingerprint)
    if removing:
        scores.removals.append(layer_distance.removal(removing, batches))
    scores_file.save(output, scores)
    return {
        "wrote": str(output),
        "method": method,
        **facts,
        "tokens": {one.stack: one.tokens for one in found},
        "blocks": layer_choice.tables(scores, threshold, reference_offset),
        "removal": {one.stack: one.order for one in scores.removals},
    }
