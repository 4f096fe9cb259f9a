"""The two kinds of fine-tuning from files to files, as the scripts offer them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composable import bundle, checkpoint, cost, distill, tasks, train
from composable.bundle import Bundle, Variant
from composable.checkpoint import Checkpoint
from composable.errors import MismatchError


def tune_model(
    composed: Checkpoint,
    output: Path,
    stats: Path,
    training: train.Options,
    label: str,
    data: str | None = None,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fine-tune a whole model on the training split and write it.

    Args:
        composed: the model, composed or dense; pruned weights stay zero.
        output: model file to write.
        stats: CSV to write.
        training: settings.
        label: name of the run.
        data: the `--data` option.
        limit: pairs of each split.

    Returns:
        The closing report.
    """
    corpora = _corpora(composed, data, limit)
    identity = {
        "model": checkpoint.fingerprint_of(composed.config, composed.model.state_dict()),
        "masks": checkpoint.fingerprint_of({}, composed.masks),
        "structure": composed.structure,
        "data": [corpus.sha256 for corpus in corpora],
        "prefix": composed.info["prefix"],
    }
    outcome = train.run(
        composed.model,
        composed.masks,
        train.data_of(composed, corpora),
        tasks.by_name(composed.info["task"]).functions(training.smoothing),
        training,
        identity,
        stats,
        label=label,
    )
    report = {**outcome.report(), "stats": str(stats), "data": corpora[0].name}
    composed.info["history"].append({label: {**training.identity(), **report}})
    if outcome.is_main:
        _forget_seconds(composed.info["history"][-1][label])
        checkpoint.save(output, composed)
        outcome.write_stats(stats)
        outcome.clean_up()
    return {
        "wrote": str(output),
        **report,
        "parameters": cost.parameters(composed.model),
        "nonzero_parameters": cost.nonzero_parameters(composed.model),
    }


def tune_variants(
    model: Path,
    bundles: Sequence[Path],
    output: Path,
    stats: Path,
    table: Path,
    training: train.Options,
    data: str | None = None,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fine-tune all variants of the bundles beside the dense model and write one bundle.

    Args:
        model: the dense model.
        bundles: what to tune; equal variants are tuned once.
        output: bundle to write.
        stats: CSV of the summed losses per epoch.
        table: CSV of the variants' relative errors.
        training: settings.
        data: the `--data` option.
        limit: pairs of each split.

    Returns:
        The closing report.
    """
    dense = checkpoint.load(model)
    dense.require_dense(model, "module-level fine-tuning")
    readers = [bundle.open_bundle(path, dense.fingerprint) for path in bundles]
    variants = _union(readers)
    result = distill.tune(dense, variants, _corpora(dense, data, limit), training, stats)
    outcome = result.outcome
    report: dict[str, Any] = {"variants": len(variants), "stats": str(stats), "table": str(table)}
    if outcome is None or outcome.is_main:
        options = {**readers[0].options, "tuned": training.identity()}
        bundle.write(output, Bundle(dense.fingerprint, result.variants, options))
        distill.write_variants(table, result.variants)
        if outcome:
            outcome.write_stats(stats)
            outcome.clean_up()
    errors = [v.stats for v in result.variants if "error_after" in v.stats]
    summary = outcome.report() if outcome else {}
    summary.pop("best_epoch", None)  # every variant has its own
    return {
        "wrote": str(output),
        **summary,
        **report,
        "mean_error_before": _mean([stats["error_before"] for stats in errors]),
        "mean_error_after": _mean([stats["error_after"] for stats in errors]),
    }


def _corpora(model: Checkpoint, data: str | None, limit: int | None) -> tuple[Any, Any]:
    """Read the training and the validation split for the model's task."""
    task, default = tasks.by_name(model.info["task"]), model.info.get("data")
    return task.read(data, default, "train", limit), task.read(data, default, "valid", limit)


def _union(readers: list[bundle.Reader]) -> list[Variant]:
    """Load all variants; those made for one (module, entry) by two bundles must be equal."""
    found: dict[Any, tuple[Path, Variant]] = {}
    for reader in readers:
        for variant in reader.load_all():
            path, first = found.setdefault((variant.module, variant.entry), (reader.path, variant))
            if first.digest != variant.digest:
                raise MismatchError(
                    f'"{variant.module}" at {variant.entry} differs between {path} and '
                    f"{reader.path}; leave one of the bundles out."
                )
            first.plain |= variant.plain
            first.plain_o |= variant.plain_o
    return [variant for _, variant in found.values()]


def _forget_seconds(report: dict[str, Any]) -> None:
    """Leave wall time and paths out of the file: same input, same bytes."""
    for key in ("training_seconds", "resumed_from_epoch", "stats", "data"):
        report.pop(key, None)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
