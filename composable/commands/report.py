"""Put the evaluations of a pipeline run into one table."""

from pathlib import Path

import click

from composable.commands import cli
from composable.reports.summary import (
    configurations,
    existing_plot,
    main_score,
    notes,
    read_evaluation,
    row_of,
    seconds_of,
    stages_of,
    table,
)


@cli.command()
@click.option(
    "-d",
    "--directory",
    type=click.Path(path_type=Path),
    default=Path("out"),
    help="Holds eval_dense.json and eval_{pruned,block,model}_K.json of each configuration K.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Markdown file to write.  [default: report.md in the directory]",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Picture of the losses to name.")
def main(directory: Path, output: Path | None, plot: Path | None) -> dict[str, object]:
    """Put the evaluations of a pipeline run into one table, on stderr and as Markdown.

    Every row is one configuration: the main score of its task (BLEU, accuracy, perplexity, ...)
    when composed of modules as pruned, after module-level and after model-level fine-tuning, and
    what the model costs in the end.
    """
    from composable import files

    output = output or directory / "report.md"
    files.check_writable(output)
    dense = read_evaluation(directory / "eval_dense.json", None)
    indices = configurations(directory)
    stages = stages_of(directory, indices)
    evaluations = {
        index: {
            stage: read_evaluation(directory / f"eval_{stage}_{index}.json", dense)
            for stage in stages
        }
        for index in indices
    }
    rows = [row_of("dense", {"dense": dense}, dense, None)]
    for index, reports in evaluations.items():
        rows.append(row_of(str(index), reports, dense, seconds_of(directory, f"model_{index}")))
    about = notes(dense, seconds_of(directory, "block"), existing_plot(plot))
    text = f"{table(rows, stages, dense)}\n{about}"
    files.write_text(output, text)
    click.echo(text, err=True)
    return {
        "wrote": str(output),
        "configurations": indices,
        "rows": rows,
        "signature": dense[main_score(dense)]["signature"],
        "plot": str(plot) if plot else None,
    }
