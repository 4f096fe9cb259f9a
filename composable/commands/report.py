"""Put the evaluations of a pipeline run into one table."""

from dataclasses import dataclass
from pathlib import Path

import click

from composable import files
from composable.commands import cli, options
from composable.commands.paths import Use
from composable.commands.terminal import printable
from composable.reports import summary


def _written(directory: Path) -> tuple[Path, Path]:
    """Name the page, and the picture of quality against cost."""
    return directory / "report.md", directory / summary.PICTURE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    directory: Path = options.path(
        "-d",
        "--directory",
        use=Use(reads=True, inside=r"(eval_[^/]*|conf|json/.*)\.json", also=_written),
        default=Path("out"),
        help="Folder with eval_dense.json and eval_{pruned,block,model}_K.json of every "
        "configuration K; report.md and quality.png are written there.",
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Put the evaluations of a pipeline run into one table, on stderr and as Markdown.

    Every row is one configuration: the main score of its task (BLEU, accuracy, perplexity, ...)
    when composed of modules as pruned, after module-level and after model-level fine-tuning, and
    what the model costs in the end. A picture shows quality against cost.
    """
    directory = settings.directory
    output, quality = _written(directory)
    files.check_writable(output, quality)
    dense = summary.read_evaluation(directory / "eval_dense.json", None)
    names = summary.configurations(directory)
    stages = summary.stages_of(directory, [*names])
    rows = [summary.row_of("dense", {"dense": dense}, dense, None)]
    for index, name in names.items():
        paths = {stage: directory / f"eval_{stage}_{index}.json" for stage in stages}
        reports = {stage: summary.read_evaluation(path, dense) for stage, path in paths.items()}
        seconds = summary.seconds_of(directory, f"model_{index}")
        rows.append(summary.row_of(name, reports, dense, seconds))
    files.write_bytes(quality, summary.picture(rows, stages, dense))
    losses = [directory / "loss_control.png", directory / "loss.png"]
    plot = next((path for path in losses if path.is_file()), None)
    pictures = {
        "Quality against cost, configurations of equal cost side by side": quality,
        **({"Losses": plot} if plot else {}),
    }
    about = summary.notes(dense, stages, summary.seconds_of(directory, "block"), pictures)
    text = f"{summary.table(rows, stages, dense)}\n{about}"
    files.write_text(output, text)
    click.echo(printable(text), err=True)
    return {
        "wrote": str(output),
        "configurations": [*names],
        "rows": rows,
        "signature": dense[summary.main_score(dense)]["signature"],
        "picture": str(quality),
        "plot": str(plot) if plot else None,
    }
