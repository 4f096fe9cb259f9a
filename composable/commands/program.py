"""The command `composable`, which has all others as subcommands: composable prune is prune.py."""

import importlib

import click

from composable.commands import cli

#: In the order of the README; those that not every pipeline needs come last.
COMMANDS = (
    *("download_model", "config_generator", "prune_scheme_generator", "prune", "compose_model"),
    *("baseline_finetuning", "block_level_finetuning", "model_level_finetuning", "evaluate"),
    *("plot_loss", "report", "rank_importance", "plot_importance", "export_model"),
)
#: Longer than the first sentence of any command.
WHOLE = 1000


class _Group(cli.Program, click.Group):
    """Imports a command when it is asked for."""

    @property
    def program(self) -> str:
        """Return the name of the program."""
        return str(self.name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command; its name may be spelled with hyphens."""
        name = cmd_name.replace("-", "_")
        if name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(f"composable.commands.{name}").main
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help where nothing is asked for; click itself would call that an error."""
        return super().parse_args(ctx, args or ["--help"])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their whole first sentences, which click would cut off."""
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(WHOLE)) for name, one in found.items() if one]
            )

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
)
