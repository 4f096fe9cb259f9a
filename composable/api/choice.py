"""What is wanted: configurations by rates or by a size, and scores of what matters."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composable import ranking
from composable.api.arguments import (
    Data,
    in_float32,
    place_of,
    plain,
    positive,
    require_dense,
    scores_of,
    scratch,
)
from composable.calibration import collect
from composable.errors import ConfigError, UserError
from composable.formats import config
from composable.formats.config import METRICS, POLICIES, Entry
from composable.formats.scores import Scores
from composable.models.checkpoint import Checkpoint
from composable.ranking import base as rankers
from composable.ranking import layer_choice, sizes
from composable.reports.notebook import ShownScores


def configuration(
    dense: Checkpoint,
    *,
    attention: float = 0.0,
    ffn: float = 0.0,
    linear: float = 0.0,
    layers: Sequence[int] = (),
    stack: str | None = None,
    size: float | None = None,
    metric: str | None = None,
    scores: Scores | str | Path | None = None,
    allocation: str | None = None,
    grid: int | None = None,
    gqa: str | None = None,
) -> dict[str, Any]:
    """Write down what is wanted of every module: the same rate everywhere, or a size.

    Args:
        dense: the dense model.
        attention: fraction of the heads of every attention to remove.
        ffn: fraction of the neurons of every ffn.
        linear: fraction of the weights of the linears: output projections of the attentions and,
            where no neurons go, those of the ffns.
        layers: numbers of layers to remove.
        stack: "encoder" or "decoder", whose layers; where the model has both.
        size: instead of rates: fraction of the dense model that stays.
        metric: what `size` is a fraction of: macs (the default), parameters, layer-parameters.
        scores: see `ranking.sizes.Allocator`, as for the next three.
        allocation: uniform, stat or global; None: what the scores allow.
        grid: the most widths that an ffn may have; 0: any number of neurons may leave.
        gqa: per-group or whole-groups.

    Returns:
        Name of a module -> rate; what is untouched is left out. It may be edited by hand.

    Raises:
        UserError: a rate outside 0..1, a size that cannot be reached, no such layers.
    """
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    rates = {"attention": attention, "ffn": ffn, "linear": linear}
    if size is not None:
        if layers or any(rates.values()):
            raise ConfigError("size: chooses all rates by itself; leave rates and layers out.")
        found = scores_of(dense, scores)
        if metric not in (None, *METRICS):
            raise ConfigError(f"metric {metric}: unknown; known are {', '.join(METRICS)}.")
        how = (metric or METRICS[0], allocation, found, gqa, grid)
        chosen = sizes.Allocator(dense, *how).configuration(size)
    else:
        for name, value in {"metric": metric, "scores": scores, "allocation": allocation,
                            "grid": grid, "gqa": gqa}.items():  # fmt: skip
            if value is not None:
                raise ConfigError(f"{name}: has a meaning with size only; leave it out.")
        parsed = {kind: [Entry.parse(plain(r), kind).rate] for kind, r in rates.items()}
        gone = _gone(dense, layers, stack)
        chosen = config.uniform_configurations([*modules.values()], parsed, [gone])[0]
    config.check_configuration(chosen, modules, "configuration")
    return {name: entry.to_json() for name, entry in chosen.items() if entry.removals}


def _gone(dense: Checkpoint, layers: Sequence[int], stack: str | None) -> config.Configuration:
    """Write down which layers go."""
    if not layers and stack is None:
        return {}
    chosen = layer_choice.configurations(
        dense, [[*layers]], POLICIES[0], None, stack, protect=(), linear_map=False
    )
    return chosen[0]


def rank(
    dense: Checkpoint,
    method: str = "layer_distance",
    *,
    data: Data = None,
    limit: int | None = None,
    device: str = "auto",
    **options: Any,
) -> ShownScores:
    """Measure what matters in a model: which layers change little, which heads and neurons.

    Args:
        dense: the dense model.
        method: layer_distance, trajectory, logit_kl, fisher, stat, l1 or random.
        data: see `prune`, as for the next two; not for l1 and random.
        limit: samples; None: until there are 65,536 tokens, or 256 for trajectory and logit_kl.
        device: where the model runs.
        options: of the method, the fields of its options in `ranking` (distances, iterative, ...).

    Returns:
        Scores: for `configuration(size=)` and `prune(scores=)`; those of layers also for
        `depth.best_cut`.

    Raises:
        UserError: an unknown method, or one without such an option; data that cannot be read.
    """
    ranker = ranking.by_name(method)
    require_dense(dense, "ranking")
    known = [field.name for field in dataclasses.fields(ranker.options)]
    if unknown := [name for name in options if name not in known]:
        has = ", ".join(known) or "none"
        raise UserError(f"{unknown[0]}: {method} has no such option (it has {has}).")
    if not ranker.reads_texts and (data is not None or limit is not None):
        raise UserError(f"data, limit: {method} reads no data; leave them out.")
    with scratch() as folder, in_float32(dense, device) as working:
        if "calibration" in known:
            options.setdefault("calibration", str(folder / "calibration.npy"))
        texts = None
        if ranker.reads_texts:
            many = positive("limit", limit)
            texts = collect.calibration_set(working, place_of(data), many, tokens=ranker.tokens)
        scores = rankers.rank(ranker, working, texts, ranker.options(**options))
    if options.get("checkpoints"):
        rankers.forget(scores, Path(options["checkpoints"]))
    return ShownScores.of(scores)
