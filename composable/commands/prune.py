"""Make every variant that the scheme asks for, once, and write them as one bundle."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from composable.commands import cli, options

#: Kind of module -> methods that can prune it, for --help; the registry itself needs torch.
METHODS = {
    "attention": ("head_gram", "head_l1", "stat", "unit_wanda", "fluctuation", "ranked", "random"),
    "ffn": ("exchange", "neuron_l1", "stat", "unit_wanda", "fluctuation", "ranked", "random"),
    "linear": ("l1", "wanda", "wanda_matrix", "obs", "sparsegpt", "alps"),
}


class _Method(options.Registered):
    """The name of a method that can prune modules of a kind."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; a rate is given to config_generator.py under the same flag."""
        if options.is_number(value):
            self.fail("a rate belongs in config_generator.py; name a method here.", param, ctx)
        return super().convert(value, param, ctx)


def _able(kind: str) -> list[str]:
    from composable import methods

    return [method.name for method in methods.METHODS if kind in method.kinds]


def _method(kind: str, what: str) -> Any:
    """Declare the option of a kind."""
    names = METHODS[kind]
    text = f"Which {what} at rates that name no method: {', '.join(names)}. [default: {names[0]}]"
    known = _Method(names, functools.partial(_able, kind))
    return options.option(f"--{kind}", help=text, type=known, metavar="METHOD")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the command."""

    model: Path = options.model("model/dense.pth")
    config: Path = options.path(
        "-c",
        "--config",
        use=options.READ,
        default=Path("conf_prune.json"),
        help="The scheme: which variants are to be made.",
    )
    output: Path = options.output("modules.npy", "The bundle to write.")
    test_model: Path | None = options.path(
        "-p",
        "--test-model",
        use=options.WRITTEN,
        help="Also compose a model of the first variant of every module, as a test.",
    )
    scores: Path | None = options.path(
        "--scores",
        use=options.READ,
        help="Scores that rank_importance.py wrote, by which the method ranked chooses.",
    )
    data: str | None = options.data(options.MEASURED)
    limit: int | None = options.limit(options.CALIBRATED)
    calibration: Path = options.calibration()
    attention: str | None = _method("attention", "heads go")
    ffn: str | None = _method("ffn", "neurons of the ffns go")
    linear: str | None = _method("linear", "weights of the linears go")
    gqa: str = options.gqa()
    seed: int = options.seed("Seed of the method random.")
    memory_budget: int = options.memory_budget()
    device: str = options.device()

    @property
    def chosen(self) -> dict[str, str]:
        """Kind -> method for plain rates."""
        named = {"attention": self.attention, "ffn": self.ffn, "linear": self.linear}
        return {kind: name for kind, name in named.items() if name}


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Prune every module at every rate of the scheme; heads, neurons and weights go for good.

    Most methods look at the inputs of the modules. These are measured once and written to
    --calibration, or read from it where it exists. The methods head_l1, neuron_l1, l1, ranked and
    random need no texts. Linear maps in the place of layers are fitted to the same texts.
    """
    from composable import files, methods
    from composable.formats import bundle
    from composable.formats.config import read_scheme
    from composable.models import checkpoint
    from composable.variants import compose, pruning

    files.check_writable(settings.output, settings.test_model)
    dense = checkpoint.load(settings.model)
    dense.require_dense(settings.model, "pruning")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    names = [method.name for method in methods.METHODS]
    scheme = read_scheme(settings.config, modules, names)
    needs = pruning.needs(dense, scheme, settings.chosen)
    _refuse_unused(settings, scheme, modules, needs)
    sources, facts, origin = _measure(settings, dense, scheme, needs)
    whole_groups = settings.gqa == bundle.WHOLE_GROUPS
    variants = pruning.make_variants(dense, scheme, settings.chosen, sources, whole_groups)
    if settings.test_model:
        # made before anything is written
        test = compose.compose(dense, compose.that_fit(dense, variants))
    origin = {"methods": settings.chosen, "source": dense.info["source"], **origin}
    origin["reading"] = dense.reading
    bundle.write(settings.output, bundle.Bundle(dense.fingerprint, variants, origin))
    report: dict[str, object] = {
        "wrote": str(settings.output),
        "variants": len(variants),
        "modules": len(scheme),
        "bytes": settings.output.stat().st_size,
        **facts,
        **pruning.maps_of(variants),
        **pruning.head_rates_of(variants, modules),
    }
    if settings.test_model:
        checkpoint.save(settings.test_model, test)
        report["test_model"] = str(settings.test_model)
    return report


def _refuse_unused(settings: Settings, scheme: Any, modules: Any, needs: Any) -> None:
    """Refuse options that the scheme has no use for."""
    entries = [(modules[name].kind, entry) for name, many in scheme.items() for entry in many]
    entries += [("linear", part) for _, entry in entries for part in entry.parts.values()]
    plain = {kind for kind, entry in entries if entry.method is None and entry.rate < 1}
    for kind in METHODS.keys() - plain:
        options.refuse([kind], f"has no effect: no {kind} has a rate that names no method")
    if "scores" not in needs:
        options.refuse(["scores"], "has no effect: add --attention ranked, --ffn ranked or both")
    if "seed" not in needs:
        options.refuse(["seed"], "has no effect: no method here is random")
    if not {"inputs", "states"} & set(needs):
        texts = ("data", "limit", "calibration", "memory_budget")
        options.refuse(texts, "has no effect: no method here looks at texts")


def _measure(
    settings: Settings, dense: Any, scheme: Any, needs: Any
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Measure or read what methods need: it, what a report and what a bundle say of it."""
    from composable.calibration import collect
    from composable.methods import random
    from composable.variants import pruning

    importance, origin = _importance(settings, dense) if "scores" in needs else (None, {})
    inputs, states, facts = None, None, {}
    texts: tuple[Any, ...] = ()
    if "seed" in needs:
        origin["seed"] = settings.seed
    if "inputs" in needs:
        calibration, texts = _calibrate(settings, dense)
        inputs, facts = calibration.inputs, collect.facts_of(calibration)
    if "states" in needs:
        blocks = pruning.blocks_of(scheme)
        states = collect.block_moments(
            dense, blocks, settings.data, settings.limit, settings.device, texts=texts
        )
    seeds = functools.partial(random.seed_of, settings.seed)
    return pruning.Sources(inputs, states, importance, seeds), facts, origin


def _calibrate(settings: Settings, dense: Any) -> Any:
    """Read or measure the inputs; say what helps where there are no texts."""
    from composable.calibration import collect
    from composable.errors import NoDataError

    try:
        return collect.calibrate(
            dense,
            settings.calibration,
            settings.data,
            settings.limit,
            settings.memory_budget,
            settings.device,
            held_out=False,
        )
    except NoDataError as error:
        raise NoDataError(
            "no texts to calibrate on, and the methods of the scheme look at inputs: the model "
            "file names no data; give --data, or methods that read weights alone "
            "(--attention head_l1 --ffn neuron_l1 --linear l1)."
        ) from error


def _importance(settings: Settings, dense: Any) -> tuple[Any, dict[str, Any]]:
    """Read a file of scores: a function from a module to its importance, and what to remember."""
    import torch

    from composable.errors import UserError
    from composable.formats import scores_file

    path = settings.scores
    if path is None:
        raise UserError("the method ranked needs --scores; rank_importance.py measures them.")
    found = scores_file.load(path)
    found.require_model(dense.fingerprint, path)
    dense.require_reading(path, found.reading)
    origin = found.origin
    if origin and origin.options.get("gqa", settings.gqa) != settings.gqa:
        raise UserError(
            f"--gqa {settings.gqa}: the scores {path} are of heads that leave "
            f"{origin.options['gqa']}; give the same --gqa, or measure the scores again."
        )
    remembered = {"method": origin.method, "options": dict(origin.options)} if origin else {}
    return lambda module: torch.from_numpy(found.importance(module)), {"scores": remembered}
