"""Write conf.json: which rate every prunable module has in each wanted model."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from composable import files
from composable.commands import cli, options
from composable.errors import ConfigError
from composable.formats import config
from composable.formats.config import ALLOCATIONS, METRICS, POLICIES

KINDS = ("attention", "linear", "ffn")
DEFAULT_RATES = {"attention": (0.25, 0.5, 0.25), "linear": (0.3, 0.3, 0.5)}


def _rates(kind: str, text: str) -> Any:
    """Declare the rates of a kind."""
    return options.option(f"--{kind}", help=text, default=(), type=options.RATE, metavar="R..")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    output: Path = options.output("conf.json", "The configurations to write.")
    scores: Path | None = options.path(
        "--scores",
        use=options.READ,
        help="Scores that rank_importance.py wrote, by which --drop-layers and --sizes choose.",
    )
    attention: tuple[float, ...] = _rates(
        "attention",
        "Fraction of heads to remove from every attention, one rate for each configuration. "
        "[default: 0.25 0.5 0.25]",
    )
    linear: tuple[float, ...] = _rates(
        "linear",
        "Fraction of weights to remove from every linear, one rate for each configuration. "
        "[default: 0.3 0.3 0.5]",
    )
    ffn: tuple[float, ...] = _rates(
        "ffn",
        "Fraction of neurons to remove from every ffn, one rate for each configuration; where it "
        "is above 0 the linears of the ffns stay as they are.",
    )
    drop_layers: tuple[int, ...] = options.option(
        "--drop-layers",
        help="How many whole layers to remove, one number for each configuration.",
        type=click.IntRange(min=0),
        default=(),
        metavar="N..",
    )
    layers: tuple[tuple[int, ...], ...] = options.option(
        "--layers",
        help="Which layers to remove, their numbers separated by commas, one list for each "
        "configuration.",
        type=options.LAYERS,
        default=(),
        metavar="I,J..",
    )
    policy: str = options.option(
        "--policy",
        help="Which layers --drop-layers takes. block: neighbours that together change their input "
        "least; singles: those that do so alone; iterative: in the order that rank_importance.py "
        "--iterative found; deepest: the last, but never the very last, without scores.",
        type=click.Choice(POLICIES),
        default=POLICIES[0],
    )
    stack: str | None = options.stack("Whose layers are removed, where a model has both.")
    protect: tuple[int, ...] = options.protect("Layers that must stay, such as 0,29.")
    linear_map: bool = options.option(
        "--linear-map",
        help="Put a linear map, which prune.py fits, in the place of every run of layers that go.",
        is_flag=True,
        default=False,
    )
    sizes: tuple[float, ...] = options.option(
        "--sizes",
        help="Instead of rates: fraction of the dense model that stays, one for each "
        "configuration.",
        type=options.SIZE,
        default=(),
        metavar="S..",
    )
    metric: str | None = options.option(
        "--metric",
        help="What a size is a fraction of: MACs, at the mean lengths of the texts of --scores "
        "(without scores at 32 tokens, or those of an image); all parameters; or those inside "
        "layers. [default: macs]",
        type=click.Choice(METRICS),
    )
    allocate: str | None = options.option(
        "--allocate",
        help="How a size is shared out. uniform: every attention keeps the same share of its "
        "heads, every ffn of its neurons; stat: modules that lose least by it give up most, by "
        "scores of rank_importance.py --method stat; global: of all modules the units with the "
        "highest sum of importances stay, which those of stat and random do not allow. [default: "
        "stat with scores of stat; global with scores by texts that allow it; else uniform]",
        type=click.Choice(ALLOCATIONS),
    )
    grid: int | None = options.option(
        "--grid",
        help="Widths that an ffn may have at most, so that configurations share variants: its "
        "neurons leave in steps of 1/N of them, rounded up. 0: any number may leave. [default: 16 "
        "with global, else 0]",
        type=click.IntRange(min=0),
        metavar="N",
    )
    gqa: str | None = options.gqa(
        None,
        "Matters for --sizes; give prune.py the same. [default: as --scores were measured, else "
        "per-group]",
    )

    def check(self) -> None:
        """Refuse values that contradict each other, or would have no effect."""
        if self.sizes:
            rates = (*KINDS, "drop_layers", "layers", "policy", "stack", "protect", "linear_map")
            options.refuse(
                rates, "has no effect beside --sizes, which says what every module keeps"
            )
            return
        options.refuse(("metric", "allocate", "grid", "gqa"), "has no effect without --sizes")
        if self.drop_layers and self.layers:
            raise ConfigError("--drop-layers and --layers both say which layers go; give one.")
        choice = ("policy", "scores", "protect")
        if not self.drop_layers:
            options.refuse(choice, "has no effect without --drop-layers")
        if not (self.drop_layers or self.layers):
            options.refuse(("stack", "linear_map"), "has no effect without --drop-layers N")
        if self.policy == "deepest":
            options.refuse(["scores"], "has no effect with --policy deepest")
        self.rates()

    def rates(self) -> dict[str, list[float]]:
        """Return one rate per configuration for each kind: the defaults where none was given.

        Raises:
            ConfigError: the options have unequal numbers of values.
        """
        asked = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}
        given = {f"--{kind}": len(rates) for kind, rates in asked.items()}
        flag = "--layers" if self.layers else "--drop-layers"
        cuts = self.layers or self.drop_layers
        given |= {flag: len(cuts)} if cuts else {}
        if not given:
            asked = dict(DEFAULT_RATES)
        counts = {*given.values()} or {len(DEFAULT_RATES["attention"])}
        if len(counts) > 1:
            said = " and ".join(f"{flag} has {count} values" for flag, count in given.items())
            raise ConfigError(f"{said}; give one for each configuration to every option.")
        (count,) = counts
        kinds = KINDS if "ffn" in asked else KINDS[:2]
        return {kind: list(asked.get(kind, (0.0,) * count)) for kind in kinds}


def sized_configurations(
    dense: Any, sizes: tuple[float, ...], scores: Path | None, **how: Any
) -> tuple[list[Any], dict[str, Any], tuple[dict[str, float], bool]]:
    """Divide sizes among the modules of a dense model.

    Args:
        dense: the dense model.
        sizes: fractions that stay.
        scores: a file.
        how: the other arguments of `ranking.sizes.Allocator`.

    Returns:
        A configuration for each size, linears at 0; what the report says of how they were chosen;
        and the lengths of texts, and whether heads leave as whole groups.

    Raises:
        UserError: the scores are of another model, and what `Allocator` refuses.
    """
    from composable.formats import scores_file
    from composable.ranking.sizes import Allocator

    found = scores_file.load(scores) if scores else None
    if found and scores:
        found.require_model(dense.fingerprint, scores)
        dense.require_reading(scores, found.reading)
    made = Allocator(dense, scores=found, **how)
    chosen = [made.configuration(size) for size in sizes]
    names = [m.name for m in dense.family.modules(dense.model) if m.kind != "layer"]
    untouched = config.Entry(0.0)
    configurations = [{name: one.get(name, untouched) for name in names} for one in chosen]
    said = {"metric": made.metric, "allocation": made.allocation, "grid": made.grid}
    return configurations, {"sizes": sizes, **said}, (made.lengths, made.whole_groups)


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


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Write conf.json: which rate every prunable module has in each wanted model.

    A rate is the fraction removed: 0 leaves a module untouched, 1 removes it. Once a rate is
    given, kinds without one get 0. Listed are all attentions and linears (the output projection
    of every attention, all of the ffns), with --ffn the ffns as well, to be edited by hand.

    --drop-layers and --layers remove whole layers (rate 1) and leave what lies in them at 0.

    --sizes chooses the rates of all attentions and ffns so that a fraction of the dense model
    stays, and never more than that. The report says what every configuration keeps and costs.
    """
    from composable.models import checkpoint

    files.check_writable(settings.output)
    dense = checkpoint.load(settings.model)
    dense.require_dense(settings.model, "config_generator.py")
    by_name = {module.name: module for module in dense.family.modules(dense.model)}
    how: tuple[Any, ...] = ()
    if settings.sizes:
        configurations, said, how = sized_configurations(
            dense,
            settings.sizes,
            settings.scores,
            metric=settings.metric or METRICS[0],
            allocation=settings.allocate,
            gqa=settings.gqa,
            grid=settings.grid,
        )
    else:
        configurations, said = _with_rates(settings, dense, [*by_name.values()])
    for i, configuration in enumerate(configurations):
        config.check_configuration(configuration, by_name, f"{settings.output}[{i}]")
    costs = shares(dense, configurations, *how)
    config.write_configurations(settings.output, configurations)
    kinds = [by_name[name].kind for name in configurations[0] if by_name[name].kind != "layer"]
    return {
        "wrote": str(settings.output),
        "configurations": len(configurations),
        "modules": Counter(kinds),
        **said,
        **costs,
    }


def _with_rates(
    settings: Settings, dense: Any, modules: list[Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Make configurations of rates and of layers that go, and what the report says of them."""
    from composable.ranking import layer_choice

    dropped = None
    if cuts := settings.layers or settings.drop_layers:
        if settings.stack is None and len(dense.family.stacks) > 1:
            stacks = " and ".join(dense.family.stacks)
            raise click.UsageError(f"the model has {stacks} layers; say which with --stack.")
        dropped = layer_choice.configurations(
            dense,
            cuts,
            policy=settings.policy,
            scores=settings.scores,
            stack=settings.stack,
            protect=settings.protect,
            linear_map=settings.linear_map,
        )
    rates = settings.rates()
    configurations = config.uniform_configurations(modules, rates, dropped)
    gone = {"dropped": [config.all_covered(one) for one in dropped]} if dropped else {}
    return configurations, {"rates": rates, **gone}
