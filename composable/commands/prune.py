"""Make every variant that the scheme asks for, once, and write them as one bundle."""

import functools
from pathlib import Path
from typing import Any

import click

from composable.commands import cli

HEADS = {"l1": "head_l1", "gram": "head_gram"}
#: Option -> what methods must need for it to matter, and what those are called.
MATTERS = {
    "seed": ("seed", "method random"),
    "held_out_samples": ("states", "linear map in the place of layers"),
}


@cli.command()
@cli.model_option("model/t5-small.pth")
@cli.path_option(
    "-c", "--config", use=cli.READ, default="conf_prune.json", text="Which variants must exist."
)
@cli.path_option("-o", "--output", use=cli.WRITTEN, default="modules.npy", text="Bundle to write.")
@cli.path_option(
    "-p", "--test-model", use=cli.WRITTEN, text="Also compose a model of first variants."
)
@click.option(
    "--mask",
    type=click.Choice(["l1", "wanda", "wanda_matrix", "obs", "sparsegpt", "alps"]),
    help="Which weights go at plain rates.  [default: l1]",
)
@click.option(
    "--heads",
    type=click.Choice(list(HEADS)),
    help="Which heads go at plain rates.  [default: gram]",
)
@click.option(
    "--method",
    "preferred",
    multiple=True,
    help="Method for plain rates of the kinds it can prune, by its name in conf.json; others "
    "keep their default (attention: head_gram, linear: l1, ffn: exchange).",
)
@cli.gqa_option
@cli.path_option(
    "--scores",
    use=cli.READ,
    text="Scores that rank_importance.py wrote: the heads and neurons of the highest importance "
    "stay at plain rates that no other option decides (method ranked).",
)
@click.option("--seed", type=cli.SEED, default=42, help="Of the method random.")
@cli.calibration_options
@cli.device_option
def main(
    model: Path,
    config: Path,
    output: Path,
    test_model: Path | None,
    preferred: tuple[str, ...],
    mask: str | None,
    heads: str | None,
    gqa: str,
    scores: Path | None,
    seed: int,
    **options: Any,
) -> dict[str, object]:
    """Prune every module at every rate of the scheme; heads, neurons and weights go for good.

    Heads and neurons are chosen by the inputs of the modules, and weights by all masks but l1. The
    inputs are measured once and written to --calibration, or read from it where it exists. The
    methods head_l1, neuron_l1 and random, and --scores, need no texts. Linear maps in the place of
    layers are fitted to the same texts.
    """
    from composable import files, methods
    from composable.calibration import collect
    from composable.formats import bundle
    from composable.formats.config import read_scheme
    from composable.methods import random
    from composable.models import checkpoint
    from composable.variants import compose, pruning

    preferred = _preferred(preferred, mask, HEADS[heads] if heads else None)
    if scores:
        preferred = tuple(dict.fromkeys((*preferred, methods.RANKED.name)))
    files.check_writable(output, test_model)
    dense = checkpoint.load(model)
    dense.require_dense(model, "pruning")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    scheme = read_scheme(config, modules, [method.name for method in methods.METHODS])
    needs, facts, inputs, states = pruning.needs(dense, scheme, preferred), {}, None, None
    texts: tuple[Any, ...] = ()
    whole_groups = gqa == bundle.WHOLE_GROUPS
    importance, measured = _importance(scores, dense, needs, gqa)
    _refuse_unused(needs)
    measured |= {"seed": seed} if "seed" in needs else {}
    if "inputs" in needs:
        calibration, texts = _calibrate(dense, options)
        inputs, facts = calibration.inputs, collect.facts_of(calibration)
    if "states" in needs:
        blocks = pruning.blocks_of(scheme)
        states = collect.block_moments(dense, blocks, texts=texts, **options)
    seeds = functools.partial(random.seed_of, seed)
    sources = pruning.Sources(inputs, states, importance, seeds)
    variants = pruning.make_variants(dense, scheme, preferred, sources, whole_groups)
    if test_model:
        # made before anything is written
        test = compose.compose(dense, compose.that_fit(dense, variants))
    origin = {"preferred": list(preferred), "source": dense.info["source"], **measured}
    origin["reading"] = dense.reading
    bundle.write(output, bundle.Bundle(dense.fingerprint, variants, origin))
    report: dict[str, object] = {
        "wrote": str(output),
        "variants": len(variants),
        "modules": len(scheme),
        "bytes": output.stat().st_size,
        **facts,
        **pruning.maps_of(variants),
        **pruning.head_rates_of(variants, modules),
    }
    if test_model:
        checkpoint.save(test_model, test)
        report["test_model"] = str(test_model)
    return report


def _preferred(preferred: tuple[str, ...], *chosen: str | None) -> tuple[str, ...]:
    """Join --method with what --mask and --heads stand for; refuse two answers for one kind."""
    from composable import methods
    from composable.errors import UserError

    names = tuple(dict.fromkeys((*preferred, *filter(None, chosen))))
    answers: dict[str, str] = {}
    for name in names:
        for kind in methods.by_name(name).kinds:
            if answers.setdefault(kind, name) != name and name in chosen:
                raise UserError(
                    f"{answers[kind]} and {name} are both asked for {kind}s; name one of them."
                )
    return names


def _refuse_unused(needs: Any) -> None:
    """Refuse options that the methods of the scheme have no use for."""
    from composable.errors import UserError

    for name, flag in cli.given_options().items():
        need, what = MATTERS.get(name, (None, ""))
        if need and need not in needs:
            raise UserError(f"{flag}: the scheme asks for no {what}; leave it out.")


def _calibrate(dense: Any, options: dict[str, Any]) -> Any:
    """Read or measure the inputs; say what helps where there are no texts."""
    from composable.calibration import collect
    from composable.errors import NoDataError

    try:
        return collect.calibrate(dense, held_out=False, **options)
    except NoDataError as error:
        raise NoDataError(
            "no texts to calibrate on, and the methods of the scheme look at inputs: the model "
            "file names no data; give --calibration-data, or methods that read weights alone "
            "(--heads l1, --method neuron_l1, --mask l1)."
        ) from error


def _importance(
    scores: Path | None, dense: Any, needs: Any, gqa: str
) -> tuple[Any, dict[str, Any]]:
    """Read a file of scores: a function from a module to its importance, and what to remember."""
    import torch

    from composable.errors import UserError
    from composable.formats import scores_file

    if scores is None:
        return None, {}
    if "scores" not in needs:
        raise UserError(
            f"--scores {scores}: other options or methods decide on every attention and ffn of the "
            "scheme, or it has none; leave it out."
        )
    found = scores_file.load(scores)
    found.require_model(dense.fingerprint, scores)
    dense.require_reading(scores, found.reading)
    origin = found.origin
    if origin and origin.options.get("gqa", gqa) != gqa:
        raise UserError(
            f"--gqa {gqa}: the scores {scores} are of heads that leave {origin.options['gqa']}; "
            "give the same --gqa, or measure the scores again."
        )
    remembered = {"method": origin.method, "options": dict(origin.options)} if origin else {}
    return lambda module: torch.from_numpy(found.importance(module)), {"scores": remembered}
