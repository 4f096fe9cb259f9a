"""Write conf.json: which rate every prunable module has in each wanted model."""

from collections import Counter
from pathlib import Path
from typing import Any

import click

from composable import files
from composable.commands import cli
from composable.errors import ConfigError
from composable.formats import config
from composable.formats.config import ALLOCATIONS, METRICS, POLICIES

#: Options that go with --sizes alone, and those that go with it, too.
OF_SIZES = ("metric", "allocation", "gqa")
WITH_SIZES = ("sizes", "scores", "model", "output", "number", "verbose", "quiet", "debug")
DEFAULT_RATES = {"attention": (0.25, 0.5, 0.25), "linear": (0.3, 0.3, 0.5)}


def chosen_rates(
    given: dict[str, tuple[float, ...]], number: int | None, cuts: tuple[str, int] | None = None
) -> dict[str, list[float]]:
    """Complete and check the rates of the command line.

    Args:
        given: kind -> rates after its flag, () where the flag is absent.
        number: of configurations that were asked for; None: as many as there are rates.
        cuts: flag and number of values of the option that says which layers go.

    Returns:
        Kind -> one rate per configuration: the defaults where no flag was given, else 0.

    Raises:
        ConfigError: the lengths disagree, or a rate is not in 0..1.
    """
    listed = {kind: rates for kind, rates in given.items() if rates}
    listed = listed or ({} if cuts else dict(DEFAULT_RATES))
    lengths = {len(rates) for rates in listed.values()} | ({cuts[1]} if cuts else set())
    if len(lengths) > 1 or (number is not None and {number} != lengths):
        asked = "" if number is None else f"-n asks for {number} configurations, "
        parts = [f"--{kind} has {len(rates)} rates" for kind, rates in listed.items()]
        found = " and ".join([*parts, *([f"{cuts[0]} has {cuts[1]} values"] if cuts else [])])
        raise ConfigError(f"{asked}{found}; give one rate per configuration to each.")
    zeros = dict.fromkeys(given, (0.0,) * lengths.pop())
    return {
        kind: [config.Entry.parse(rate, f"--{kind}").rate for rate in rates]
        for kind, rates in (zeros | listed).items()
    }


def refuse_unused_choices(options: dict[str, Any]) -> None:
    """Refuse options that say which layers go where none are to go."""
    for name, value in options.items():
        if value not in (None, "", False) and (name, value) != ("policy", POLICIES[0]):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} needs --drop-layers N or --layers; add one of them.")


def asked_rates(
    given: dict[str, tuple[float, ...]],
    number: int | None,
    drop_layers: tuple[int, ...],
    layers: tuple[str, ...],
    choice: dict[str, Any],
) -> tuple[Any, dict[str, list[float]]]:
    """Read what the command line says without --sizes; for the errors see `chosen_rates`.

    Returns:
        For every configuration the number of layers to drop, or their numbers; () where none are.
        And the rates by kind. `protect` of `choice` becomes a list of numbers.
    """
    if drop_layers and layers:
        raise ConfigError("--drop-layers and --layers both say which layers go; give one of them.")
    flag = "--layers" if layers else "--drop-layers"
    cuts = [cli.parse_numbers(text, "--layers") for text in layers] or drop_layers
    if not cuts:
        refuse_unused_choices(choice)
    choice["protect"] = cli.parse_numbers(choice["protect"], "--protect")
    return cuts, chosen_rates(given, number, (flag, len(cuts)) if cuts else None)


def refuse_beside_sizes(sizes: tuple[float, ...], number: int | None) -> None:
    """Refuse what says something else than --sizes, or belongs to it where it is not given."""
    for name, flag in cli.given_options().items():
        if sizes and name not in (*OF_SIZES, *WITH_SIZES):
            raise ConfigError(
                f"{flag}: --sizes says what every module keeps; leave one of the two out."
            )
        if not sizes and name in OF_SIZES:
            raise ConfigError(f"{flag} needs --sizes; add it.")
    if sizes and number not in (None, len(sizes)):
        raise ConfigError(
            f"-n asks for {number} configurations, --sizes has {len(sizes)} values; give one size "
            "per configuration."
        )


def sized_configurations(
    dense: Any,
    sizes: tuple[float, ...],
    scores: Path | None,
    gqa: str | None,
    metric: str,
    allocation: str | None,
) -> tuple[list[Any], str, tuple[dict[str, float], bool]]:
    """Divide sizes among the modules of a dense model, see `ranking.sizes.Allocator`.

    Returns:
        A configuration for each size, linears at 0; the allocation, which is
        `ranking.sizes.best_allocation` where none is named; and the lengths of texts, and whether
        heads leave as whole groups.

    Raises:
        ConfigError: scores that would not be looked at, and what `Allocator` refuses.
    """
    from composable.formats import scores_file
    from composable.ranking.sizes import Allocator, best_allocation

    found = scores_file.load(scores) if scores else None
    allocation = allocation or best_allocation(found)
    if found and scores:
        found.require_model(dense.fingerprint, scores)
        dense.require_reading(scores, found.reading)
        if allocation == "uniform" and not (found.origin and found.origin.texts):
            raise ConfigError(
                f"--scores {scores}: were measured on no texts, and --allocate uniform looks at "
                "nothing but the lengths of texts; leave them out."
            )
    allocator = Allocator(dense, metric, allocation, found, gqa)
    chosen = [allocator.configuration(size) for size in sizes]
    names = [m.name for m in dense.family.modules(dense.model) if m.kind != "layer"]
    untouched = config.Entry(0.0)
    configurations = [{name: one.get(name, untouched) for name in names} for one in chosen]
    return configurations, allocation, (allocator.lengths, allocator.whole_groups)


def shares(
    dense: Any,
    configurations: list[Any],
    lengths: dict[str, float] | None = None,
    whole_groups: bool = False,
) -> dict[str, Any]:
    """Report what the dense model and every configuration cost, and which share that is."""
    from composable.models import cost
    from composable.variants.planned_costs import planned_costs

    lengths = cost.lengths_of(dense.model, dense.family, lengths)
    whole = planned_costs(dense, {}, lengths, whole_groups)
    found = [planned_costs(dense, one, lengths, whole_groups) for one in configurations]
    return {
        "lengths": {stack: lengths[stack] for stack in dense.family.stacks},
        "dense": {name: round(n, 2) for name, n in whole.items()},
        "costs": [
            {
                **{name: round(n, 2) for name, n in one.items()},
                "shares": {name: round(n / whole[name], 6) for name, n in one.items()},
            }
            for one in found
        ],
    }


def _rates(kind: str, text: str) -> Any:
    return click.option(f"--{kind}", type=float, multiple=True, metavar="R..", help=text)


@cli.command()
@cli.model_option("model/t5-small.pth", "The dense model.")
@cli.path_option(
    "-o", "--output", use=cli.WRITTEN, default="conf.json", text="Configurations to write."
)
@_rates(
    "attention",
    "Fraction of heads to remove, one rate per configuration.  [default: 0.25 0.5 0.25]",
)
@_rates(
    "linear", "Fraction of weights to remove, one rate per configuration.  [default: 0.3 0.3 0.5]"
)
@_rates(
    "ffn",
    "Fraction of neurons to remove, one rate per configuration; where it is above 0 the linears "
    "of the ffns stay as they are.",
)
@click.option(
    "--drop-layers",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N..",
    help="Whole layers to remove, one number per configuration.",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="I,J..",
    help="Numbers of the layers to remove, separated by commas, one list per configuration.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=POLICIES[0],
    help="Which layers --drop-layers takes. block: neighbours that together change their input "
    "least; singles: those that do so alone; iterative: in the order that rank_importance.py "
    "--iterative found; deepest: the last, but never the very last, without scores.",
)
@cli.path_option("--scores", use=cli.READ, text="Scores that rank_importance.py wrote.")
@cli.choice_options
@click.option("--protect", default="", help="Layers that must stay, e.g. 0,29.")
@click.option(
    "--linear-map",
    is_flag=True,
    help="Put a fitted linear map in the place of every run of layers that go.",
)
@click.option(
    "--sizes",
    type=float,
    multiple=True,
    metavar="S..",
    help="Instead of rates: fraction of the dense model that stays, one per configuration.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="What --sizes are fractions of: MACs, at the mean lengths of the texts of --scores "
    "(without scores at 32 tokens, or those of an image); all parameters; or those inside layers.  "
    "[default: macs]",
)
@click.option(
    "--allocate",
    "allocation",
    type=click.Choice(ALLOCATIONS),
    help="Of --sizes. uniform: every attention keeps the same share of its heads, every ffn of "
    "its neurons; stat: modules that lose least by it give up most, by --scores of "
    "rank_importance.py --method stat.  [default: stat with such scores, else uniform]",
)
@click.option(
    "--gqa",
    type=click.Choice(["per-group", "whole-groups"]),
    help="Of --sizes: how heads leave that share a key/value head; give prune.py the same.  "
    "[default: as --scores were measured, else per-group]",
)
@click.option(
    "-n",
    "--number",
    type=cli.COUNT,
    help="Number of configurations.  [default: as many as there are rates]",
)
def main(
    model: Path,
    output: Path,
    attention: tuple[float, ...],
    linear: tuple[float, ...],
    ffn: tuple[float, ...],
    number: int | None,
    drop_layers: tuple[int, ...],
    layers: tuple[str, ...],
    sizes: tuple[float, ...],
    metric: str | None,
    allocation: str | None,
    gqa: str | None,
    **choice: Any,
) -> dict[str, object]:
    """Write conf.json: which rate every prunable module has in each wanted model.

    A rate is the fraction removed: 0 leaves a module untouched, 1 removes it. Once a rate flag is
    given, kinds without a flag get 0. Listed are all attentions and linears (the output projection
    of every attention, all of the ffns), with --ffn the ffns as well, to be edited by hand.

    --drop-layers and --layers remove whole layers (rate 1) and leave what lies in them at 0.

    --sizes chooses the rates of all attentions and ffns so that a fraction of the dense model
    stays, and never more than that. The report says what every configuration keeps and costs.
    """
    refuse_beside_sizes(sizes, number)
    given = {"attention": attention, "linear": linear, **({"ffn": ffn} if ffn else {})}
    cuts, rates = ((), {}) if sizes else asked_rates(given, number, drop_layers, layers, choice)
    files.check_writable(output)
    from composable.models import checkpoint
    from composable.ranking import layer_choice

    loaded = checkpoint.load(model)
    loaded.require_dense(model, "config_generator.py")
    by_name = {module.name: module for module in loaded.family.modules(loaded.model)}
    how: tuple[Any, ...] = ()
    if sizes:
        metric = metric or METRICS[0]
        configurations, allocation, how = sized_configurations(
            loaded, sizes, choice["scores"], gqa, metric, allocation
        )
        said: dict[str, Any] = {"sizes": sizes, "metric": metric, "allocation": allocation}
    else:
        dropped = layer_choice.configurations(loaded, cuts, **choice) if cuts else None
        configurations = config.uniform_configurations([*by_name.values()], rates, dropped)
        gone = {"dropped": [config.all_covered(one) for one in dropped]} if dropped else {}
        said = {"rates": rates, **gone}
    for i, configuration in enumerate(configurations):
        config.check_configuration(configuration, by_name, f"{output}[{i}]")
    costs = shares(loaded, configurations, *how)
    config.write_configurations(output, configurations)
    kinds = [by_name[name].kind for name in configurations[0] if by_name[name].kind != "layer"]
    return {
        "wrote": str(output),
        "configurations": len(configurations),
        "modules": Counter(kinds),
        **said,
        **costs,
    }
