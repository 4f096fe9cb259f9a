"""Put the evaluations of a pipeline run into one table."""

from pathlib import Path

import click

from composable import files
from composable.commands import cli
from composable.commands.paths import Use
from composable.commands.terminal import printable
from composable.reports import summary


@cli.command()
@cli.path_option(
    "-d",
    "--directory",
    use=Use(reads=True, inside=r"(eval_[^/]*|conf|json/.*)\.json"),
    default="out",
    text="Holds eval_dense.json and eval_{pruned,block,model}_K.json of each configuration K.",
)
@cli.path_option(
    "-o",
    "--output",
    use=Use(
        writes=True,
        default=lambda options: options["directory"] / "report.md",
        also=lambda output: output.with_name(summary.PICTURE),
    ),
    text="Markdown file to write; quality.png is written beside it.  [default: report.md in the "
    "directory]",
)
@cli.path_option("--plot", use=cli.READ, text="Picture of the losses to name.")
def main(directory: Path, output: Path, plot: Path | None) -> dict[str, object]:
    """Put the evaluations of a pipeline run into one table, on stderr and as Markdown.

    Every row is one configuration: the main score of its task (BLEU, accuracy, perplexity, ...)
    when composed of modules as pruned, after module-level and after model-level fine-tuning, and
    what the model costs in the end. A picture shows quality against cost.
    """
    quality = output.with_name(summary.PICTURE)
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
