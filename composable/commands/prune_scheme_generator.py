"""Write conf_prune.json: every variant that the configurations need, each once."""

from pathlib import Path

import click

from composable import files
from composable.commands import cli
from composable.formats import config


@cli.command()
@click.option(
    "-i",
    "--input",
    "source",
    type=click.Path(path_type=Path),
    default=Path("conf.json"),
    help="Configurations to read.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("conf_prune.json"),
    help="Scheme to write.",
)
def main(source: Path, output: Path) -> dict[str, object]:
    """Write conf_prune.json: every variant that the configurations need, each once.

    It is the transpose of conf.json: module -> rates, rate 0 left out. A module and a part of it
    that are pruned together, as an attention and its output projection, become one entry.
    """
    files.check_writable(output)
    configurations = config.read_configurations(source)
    scheme, asked, needed = config.scheme_of(configurations, source)
    config.write_scheme(output, scheme)
    return {
        "wrote": str(output),
        "configurations": len(configurations),
        "modules": len(scheme),
        "variants_asked": asked,
        "variants_needed": needed,
        "share_saved": round(1 - needed / asked, 4) if asked else 0.0,
    }
