"""Make every variant that the scheme asks for, once, and write them as one bundle."""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from composable.commands import cli, options

log = logging.getLogger("composable")
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
    measured = _measure(settings, dense, scheme, needs)
    whole_groups = settings.gqa == bundle.WHOLE_GROUPS
    variants = pruning.make_variants(dense, scheme, settings.chosen, measured.sources, whole_groups)
    if settings.test_model:
        # made before anything is written
        test = compose.compose(dense, compose.that_fit(dense, variants))
    origin = {"methods": settings.chosen, "source": dense.info["source"], **measured.origin}
    origin["reading"] = dense.reading
    bundle.write(settings.output, bundle.Bundle(dense.fingerprint, variants, origin))
    report: dict[str, object] = {
        "wrote": str(settings.output),
        "variants": len(variants),
        "modules": len(scheme),
        "bytes": settings.output.stat().st_size,
        **measured.facts,
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
    texts = options.given().keys() & {"data", "limit", "calibration", "memory_budget"}
    if texts and not {"inputs", "states"} & set(needs):
        # not refused: who prunes many schemes of one model names its data every time
        log.info("no method of this scheme looks at texts, so none are read.")


def _measure(settings: Settings, dense: Any, scheme: Any, needs: Any) -> Any:
    """Read or measure what methods need; say which options help where there is nothing."""
    from composable.errors import NoDataError, UserError
    from composable.formats import scores_file
    from composable.variants.sources import Read, measure

    scores = None
    if "scores" in needs:
        if settings.scores is None:
            raise UserError("the method ranked needs --scores; rank_importance.py measures them.")
        scores = scores_file.load(settings.scores)
        scores.require_model(dense.fingerprint, settings.scores)
        dense.require_reading(settings.scores, scores.reading)
    read = Read(
        settings.data,
        settings.limit,
        settings.calibration,
        settings.memory_budget,
        settings.device,
        scores,
        settings.gqa,
        settings.seed,
    )
    try:
        return measure(dense, scheme, needs, read)
    except NoDataError as error:
        raise NoDataError(
            "no texts to calibrate on, and the methods of the scheme look at inputs: the model "
            "file names no data; give --data, or methods that read weights alone "
            "(--attention head_l1 --ffn neuron_l1 --linear l1)."
        ) from error
