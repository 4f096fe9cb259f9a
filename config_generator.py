#!/usr/bin/env python3
"""Write conf.json: which rate every prunable module has in each wanted model.

./config_generator.py
./config_generator.py -m model/t5-small.pth -o conf.json --attention 0.25 0.5 --linear 0.3 0.5
./config_generator.py --attention 0.25 0.5 --ffn 0.25 0.5
"""

from collections import Counter
from pathlib import Path

import click

from composable import cli, config, files
from composable.errors import ConfigError

DEFAULT_RATES = {"attention": (0.25, 0.5, 0.25), "linear": (0.3, 0.3, 0.5)}


def chosen_rates(given: dict[str, tuple[float, ...]], number: int | None) -> dict[str, list[float]]:
    """Complete and check the rates of the command line.

    Args:
        given: kind -> rates after its flag, () where the flag is absent.
        number: how many configurations were asked for, None for as many as there are rates.

    Returns:
        Kind -> one rate per configuration: the defaults where no flag was given, else 0 for
        kinds without a flag.

    Raises:
        ConfigError: the lengths disagree, or a rate is not in 0..1.
    """
    listed = {kind: rates for kind, rates in given.items() if rates} or DEFAULT_RATES
    lengths = {len(rates) for rates in listed.values()}
    if len(lengths) > 1 or (number is not None and {number} != lengths):
        asked = "" if number is None else f"-n asks for {number} configurations, "
        found = " and ".join(f"--{kind} has {len(rates)} rates" for kind, rates in listed.items())
        raise ConfigError(f"{asked}{found}; give one rate per configuration to each.")
    zeros = dict.fromkeys(given, (0.0,) * lengths.pop())
    return {
        kind: [config.Entry.parse(rate, f"--{kind}").rate for rate in rates]
        for kind, rates in (zeros | listed).items()
    }


@cli.command()
@click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path),
    default=Path("model/t5-small.pth"),
    help="The dense model.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("conf.json"),
    help="Configurations to write.",
)
@click.option(
    "--attention",
    type=float,
    multiple=True,
    metavar="R..",
    help="Fraction of heads to remove, one rate per configuration.  [default: 0.25 0.5 0.25]",
)
@click.option(
    "--linear",
    type=float,
    multiple=True,
    metavar="R..",
    help="Fraction of weights to remove, one rate per configuration.  [default: 0.3 0.3 0.5]",
)
@click.option(
    "--ffn",
    type=float,
    multiple=True,
    metavar="R..",
    help="Fraction of neurons to remove, one rate per configuration; where it is above 0 the "
    "linears of the ffns stay as they are.",
)
@click.option(
    "-n",
    "--number",
    type=click.IntRange(min=1),
    help="Number of configurations.  [default: as many as there are rates]",
)
def main(
    model: Path,
    output: Path,
    attention: tuple[float, ...],
    linear: tuple[float, ...],
    ffn: tuple[float, ...],
    number: int | None,
) -> dict[str, object]:
    """Write conf.json: which rate every prunable module has in each wanted model.

    A rate is the fraction removed: 0 leaves a module untouched, 1 removes it. Once a rate flag is
    given, kinds without a flag get 0. Listed are all attentions and linears (the output projection
    of every attention, all of the ffns), with --ffn the ffns as well, to be edited by hand; a whole
    layer ("encoder.block.0") may be written in with rate 1, where the modules inside it are set to
    0.
    """
    given = {"attention": attention, "linear": linear, **({"ffn": ffn} if ffn else {})}
    rates = chosen_rates(given, number)
    files.check_writable(output)
    from composable import checkpoint, families

    loaded = checkpoint.load(model)
    loaded.require_dense(model, "config_generator.py")
    modules = families.of(loaded.model).modules(loaded.model)
    configurations = config.uniform_configurations(modules, rates)
    by_name = {module.name: module for module in modules}
    for i, configuration in enumerate(configurations):
        config.check_configuration(configuration, by_name, f"{output}[{i}]")
    config.write_configurations(output, configurations)
    return {
        "wrote": str(output),
        "configurations": len(configurations),
        "modules": Counter(module.kind for module in modules if module.kind in rates),
        "rates": rates,
    }


if __name__ == "__main__":
    main()
