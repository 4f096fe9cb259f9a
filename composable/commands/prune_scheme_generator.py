"""Write conf_prune.json: every variant that the configurations need, each once."""

from dataclasses import dataclass
from pathlib import Path

from composable import files
from composable.commands import cli, options
from composable.formats import config


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    source: Path = options.path(
        "-i", "--input", use=options.READ, default=Path("conf.json"), help="The configurations."
    )
    output: Path = options.output(
        "conf_prune.json", "The scheme: which variants the configurations need."
    )


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Write conf_prune.json: every variant that the configurations need, each once.

    It is the transpose of conf.json: module -> rates, rate 0 left out. A module and a part of it
    that are pruned together, as an attention and its output projection, become one entry.
    """
    files.check_writable(settings.output)
    configurations = config.read_configurations(settings.source)
    scheme, asked, needed = config.scheme_of(configurations, settings.source)
    config.write_scheme(settings.output, scheme)
    return {
        "wrote": str(settings.output),
        "configurations": len(configurations),
        "modules": len(scheme),
        "variants_asked": asked,
        "variants_needed": needed,
        "share_saved": round(1 - needed / asked, 4) if asked else 0.0,
    }
