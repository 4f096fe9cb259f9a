"""Write conf_prune.json: every variant that the configurations need, each once."""

from pathlib import Path

from composable import files
from composable.commands import cli
from composable.formats import config


@cli.command()
@cli.path_option(
    "-i", "--input", "source", use=cli.READ, default="conf.json", text="Configurations to read."
)
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="conf_prune.json", text="Scheme to write."
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
