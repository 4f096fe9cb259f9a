"""Variants from Python: pruned, fitted, put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composable import methods
from composable.api.arguments import (
    Configuration,
    Data,
    copy_of,
    in_float32,
    place_of,
    plain,
    positive,
    require_dense,
    scores_of,
    scratch,
    training_options,
)
from composable.errors import ConfigError, UserError
from composable.formats import bundle, config
from composable.formats.bundle import PER_GROUP, WHOLE_GROUPS, Bundle
from composable.formats.scores import Scores
from composable.linalg.solver import RIDGE
from composable.models.checkpoint import Checkpoint
from composable.reports.notebook import ShownBundle
from composable.variants import compose as composing
from composable.variants import pruning, tuning
from composable.variants.sources import Read, measure

BUDGET = 2 * 1024**3
#: Arguments of `fit` that a solver does not look at.
UNUSED = {
    "hybrid": (),
    "ls": ("epochs", "batch_size", "lr"),
    "grad": ("ridge", "calibration"),
}


def prune(
    dense: Checkpoint,
    wanted: Configuration | Sequence[Configuration],
    *,
    attention: str | None = None,
    ffn: str | None = None,
    linear: str | None = None,
    scores: Scores | str | Path | None = None,
    gqa: str = PER_GROUP,
    seed: int = 42,
    data: Data = None,
    limit: int | None = None,
    calibration: str | Path | None = None,
    memory_budget: int = BUDGET,
    device: str = "auto",
) -> ShownBundle:
    """Make every variant that some configurations need, each once.

    Args:
        dense: the dense model; it stays as it is.
        wanted: a configuration, or several; or a scheme, {module: [rate, ...]}.
        attention: method that chooses heads; None: head_gram. All names are in `methods.METHODS`.
        ffn: method that chooses neurons; None: exchange.
        linear: method that chooses weights; None: l1.
        scores: for the method ranked.
        gqa: how heads leave that share a key/value head, per-group or whole-groups.
        seed: of the method random.
        data: folder or file with data of the model's task, whose training split is the calibration
            set; or texts themselves, of which every tenth is held out. None: what the model names.
        limit: the first so many samples; None: until there are 65,536 tokens.
        calibration: file of the statistics of the modules' inputs; read if it exists, else
            measured and written. None: they are measured anew and not kept.
        memory_budget: bytes for these statistics.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: a configuration that the model cannot have, a method that cannot do what it is
            asked for or lacks what it needs, data that cannot be read.
    """
    require_dense(dense, "pruning")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    scheme = _scheme(wanted, modules)
    chosen = _chosen({"attention": attention, "ffn": ffn, "linear": linear})
    if gqa not in (PER_GROUP, WHOLE_GROUPS):
        raise ConfigError(f"gqa {gqa}: expected {PER_GROUP} or {WHOLE_GROUPS}.")
    needs = pruning.needs(dense, scheme, chosen)
    found = scores_of(dense, scores)
    if found is not None and "scores" not in needs:
        raise UserError('scores: no module is pruned by the method "ranked"; leave them out.')
    given = {"data": data, "limit": limit, "calibration": calibration}
    unused = [name for name, value in given.items() if value is not None]
    if unused and not {"inputs", "states"} & needs:
        raise UserError(f"{unused[0]}: no method here looks at texts; leave it out.")
    with scratch() as folder, in_float32(dense, device) as working:
        read = Read(
            place_of(data),
            positive("limit", limit),
            Path(calibration or folder / "calibration.npy"),
            memory_budget,
            device,
            found,
            gqa,
            seed,
        )
        measured = measure(working, scheme, needs, read)
        variants = pruning.make_variants(
            working, scheme, chosen, measured.sources, gqa == WHOLE_GROUPS
        )
    origin = {"methods": chosen, "source": dense.info["source"], **measured.origin}
    origin["reading"] = dense.reading
    return ShownBundle(dense.fingerprint, variants, origin)


def _scheme(wanted: Any, modules: Mapping[str, Any]) -> config.Scheme:
    """Read what is wanted of `prune`."""
    names = [method.name for method in methods.METHODS]
    if isinstance(wanted, Mapping) and any(isinstance(each, list) for each in wanted.values()):
        return config.parse_scheme(plain(wanted), "scheme", modules, names)
    several = [wanted] if isinstance(wanted, Mapping) else list(wanted)
    configurations = [
        config.parse_configuration(plain(one), f"configuration {i}", modules, names)
        for i, one in enumerate(several)
    ]
    return config.scheme_of(configurations, "configuration")[0]


def _chosen(asked: Mapping[str, str | None]) -> dict[str, str]:
    """Kind of a module -> method for it, where one is asked for."""
    chosen = {kind: name for kind, name in asked.items() if name is not None}
    for kind, name in chosen.items():
        if kind not in methods.by_name(name).kinds:
            able = ", ".join(m.name for m in methods.METHODS if kind in m.kinds)
            raise ConfigError(f"{kind} {name}: it does not prune them; those that do: {able}.")
    return chosen


def fit(
    dense: Checkpoint,
    variants: Bundle | str | Path,
    *,
    solver: str = "hybrid",
    ridge: float | None = None,
    data: Data = None,
    limit: int | None = None,
    calibration: str | Path | None = None,
    memory_budget: int = BUDGET,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    early_stop: int = 2,
    seed: int = 42,
    device: str = "auto",
    dtype: str = "auto",
    checkpoints: str | Path | None = None,
) -> ShownBundle:
    """Fit all variants to the outputs of their dense modules, each as if it were alone.

    Args:
        dense: the dense model; it stays as it is.
        variants: a bundle, or the path of one.
        solver: hybrid: least squares, then a short training of what lost heads or neurons; ls:
            least squares alone; grad: gradient steps alone.
        ridge: of the least squares, how strongly they pull toward the weights as pruned; None:
            0.01.
        data: see `prune`; the held-out part is of the validation split, or of the texts. The solver
            grad reads whole splits of the task's data, no texts.
        limit: the first so many samples, of the held-out ones a quarter; of the solver grad, of
            each split.
        calibration: see `prune`, as for the next.
        memory_budget: bytes.
        epochs: see `training.options.Options`, as for those that follow; None: the solver's.
        batch_size: samples of a step.
        lr: peak learning rate.
        early_stop: epochs without improvement before a variant stops; 0 never.
        seed: of sampling.
        device: where to compute.
        dtype: of autocast.
        checkpoints: folder from which an interrupted run goes on; None: it starts anew.

    Returns:
        New variants, with `error_before` and `error_after` in their `stats`: squared error over
        squared dense output, on held-out data.

    Raises:
        UserError: variants of another model, an argument that the solver does not look at, data
            that cannot be read.
    """
    require_dense(dense, "fitting")
    given = {"ridge": ridge, "calibration": calibration, "epochs": epochs, "lr": lr,
             "batch_size": batch_size}  # fmt: skip
    if solver not in UNUSED:
        raise UserError(f"solver {solver}: unknown; known are {', '.join(UNUSED)}.")
    if unused := [name for name in UNUSED[solver] if given[name] is not None]:
        raise UserError(f"{unused[0]}: the solver {solver} does not look at it; leave it out.")
    texts = place_of(data)
    if solver == "grad" and not isinstance(texts, str | None):
        raise UserError("data: the solver grad reads data of the task, no texts; give a path.")
    readers = composing.open_bundles(dense, [variants])
    with scratch(checkpoints) as folder, in_float32(dense, "cpu", solver == "grad") as working:
        training = training_options(
            folder, epochs, batch_size, lr, early_stop=early_stop, seed=seed, device=device,
            dtype=dtype,
        )  # fmt: skip
        result, made, _ = tuning.fit(
            working,
            readers,
            training,
            solver,
            RIDGE if ridge is None else ridge,
            data=texts,
            limit=positive("limit", limit),
            calibration=Path(calibration or folder / "calibration.npy"),
            memory_budget=memory_budget,
        )
        result.clean_up()
    return ShownBundle(made.fingerprint, made.variants, made.options)


def compose(
    dense: Checkpoint,
    variants: Bundle | str | Path | Sequence[Bundle | str | Path],
    configuration: Configuration,
) -> Checkpoint:
    """Put one model together out of the dense one and variants.

    Args:
        dense: the dense model; it stays as it is.
        variants: one or several bundles, or paths of them.
        configuration: what is wanted of which module.

    Raises:
        UserError: a variant is missing, or two different ones answer; variants of another model.
    """
    require_dense(dense, "composing")
    modules = {module.name: module for module in dense.family.modules(dense.model)}
    names = [method.name for method in methods.METHODS]
    wanted = config.parse_configuration(plain(configuration), "configuration", modules, names)
    several = [variants] if isinstance(variants, Bundle | str | Path) else variants
    readers = composing.open_bundles(dense, several)
    pairs = bundle.choose(readers, config.merge_parts(wanted))
    chosen = composing.load_variants(dense, pairs)
    composed = composing.compose(copy_of(dense), chosen)
    composed.info["history"].append({"composed": {"variants": len(chosen)}})
    return composed
