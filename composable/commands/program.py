"""The command `composable`, which has all others as subcommands: composable prune is prune.py."""

import importlib

import click

from composable.commands import cli

#: The order in which a pipeline runs the commands; others follow by name.
ORDER = (
    "download_model",
    "config_generator",
    "prune_scheme_generator",
    "prune",
    "compose_model",
    "block_level_finetuning",
    "model_level_finetuning",
    "baseline_finetuning",
    "evaluate",
    "plot_loss",
    "report",
)
COMMANDS = (*ORDER, "export_model", "plot_importance", "rank_importance")


class _Group(cli.Program, click.Group):
    """Imports a command when it is asked for."""

    @property
    def program(self) -> str:
        """Return the name of the program."""
        return str(self.name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the pipeline."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command; its name may be spelled with hyphens."""
        name = cmd_name.replace("-", "_")
        if name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"composable.commands.{name}").main
        return found

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, then the general options."""
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)


main = _Group(
    "composable",
    help="Prune a pretrained transformer into a family of smaller models.\n\nThe commands run one "
    "after another without arguments, since their defaults chain; `composable COMMAND --help` "
    "explains each.",
    context_settings=cli.CONTEXT,
    no_args_is_help=True,
)
