"""Put the evaluations of a pipeline run into one table."""

from dataclasses import dataclass
from pathlib import Path

import click

from composable import files
from composable.commands import cli, options
from composable.commands.paths import Use
from composable.commands.terminal import printable
from composable.reports import summary


def _page(directory: Path) -> Path:
    return directory / "report.md"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    directory: Path = options.path(
        "-d",
        "--directory",
        use=Use(
            reads=True, inside=r"(eval_[^/]*|conf|json/.*)\.json", also=lambda path: (_page(path),)
        ),
        default=Path("out"),
        help="Folder with eval_dense.json and eval_{pruned,block,model}_K.json of every "
        "configuration K; report.md is written there.",
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Put the evaluations of a pipeline run into one table, on stderr and as Markdown.

    Every row is one configuration: the main score of its task (BLEU, accuracy, perplexity, ...)
    when composed of modules as pruned, after module-level and after model-level fine-tuning, and
    what the model costs in the end.
    """
    directory, output = settings.directory, _page(settings.directory)
    files.check_writable(output)
    dense = summary.read_evaluation(directory / "eval_dense.json", None)
    indices = summary.configurations(directory)
    stages = summary.stages_of(directory, indices)
    rows = [summary.row_of("dense", {"dense": dense}, dense, None)]
    for index in indices:
        paths = {stage: directory / f"eval_{stage}_{index}.json" for stage in stages}
        reports = {stage: summary.read_evaluation(path, dense) for stage, path in paths.items()}
        seconds = summary.seconds_of(directory, f"model_{index}")
        rows.append(summary.row_of(str(index), reports, dense, seconds))
    picture = directory / "loss.png"
    plot = picture if picture.is_file() else None
    about = summary.notes(dense, summary.seconds_of(directory, "block"), plot)
    text = f"{summary.table(rows, stages, dense)}\n{about}"
    files.write_text(output, text)
    click.echo(printable(text), err=True)
    return {
        "wrote": str(output),
        "configurations": indices,
        "rows": rows,
        "signature": dense[summary.main_score(dense)]["signature"],
        "plot": str(plot) if plot else None,
    }
