"""Module-level fine-tuning from bundles of variants to one bundle, by each of the solvers."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composable import devices, files, tasks
from composable.calibration.collect import calibrate, facts_of
from composable.errors import MismatchError
from composable.formats import bundle, stats_file
from composable.formats.bundle import Bundle, Variant
from composable.models import checkpoint
from composable.models.checkpoint import Checkpoint
from composable.training.finetune import corpora_of, with_defaults
from composable.training.options import Options
from composable.variants import gradient, least_squares
from composable.variants.compose import open_bundles
from composable.variants.fitting import load_variants
from composable.variants.result import Result
from composable.variants.unit_phase import Settings as Phase

log = logging.getLogger("composable")


def tune_variants(
    model: Path,
    bundles: Sequence[Path],
    output: Path,
    stats: Path,
    training: Options,
    solver: str,
    ridge: float,
    *,
    data: str | None,
    limit: int | None,
    calibration: Path,
    memory_budget: int,
    linear_solver: str = "pcg",
    held_out_samples: int | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Fine-tune all variants of the bundles beside the dense model and write one bundle.

    Args:
        model: the dense model.
        bundles: what to tune; equal variants are tuned once.
        output: bundle to write.
        stats: CSV of the summed losses per epoch.
        training: see `fit`, as for all others.
        solver: hybrid, ls or grad.
        ridge: of the least squares.
        data: of the model's task.
        limit: samples.
        calibration: file of the statistics.
        memory_budget: bytes.
        linear_solver: pcg or exact.
        held_out_samples: of the validation split.

    Returns:
        What became of the variants, to be cleaned up once all is written, and the closing report.
    """
    dense = checkpoint.load(model)
    dense.require_dense(model, "module-level fine-tuning")
    readers = open_bundles(dense, bundles)
    result, made, facts = fit(
        dense,
        readers,
        training,
        solver,
        ridge,
        data=data,
        limit=limit,
        calibration=calibration,
        memory_budget=memory_budget,
        linear_solver=linear_solver,
        held_out_samples=held_out_samples,
        stats=stats,
    )
    if result.is_main:
        bundle.write(output, made)
        if result.rows:
            files.write_text(stats, stats_file.stats_csv(result.rows))
    return result, {"wrote": str(output), **facts, "stats": str(stats)}


def fit(
    dense: Checkpoint,
    readers: Sequence[bundle.Reader],
    training: Options,
    solver: str,
    ridge: float,
    *,
    data: str | Sequence[str] | None,
    limit: int | None,
    calibration: Path,
    memory_budget: int,
    linear_solver: str = "pcg",
    held_out_samples: int | None = None,
    stats: Path | None = None,
) -> tuple[Result, Bundle, dict[str, Any]]:
    """Fit all variants of the bundles to the outputs of the dense model's modules.

    Args:
        dense: the dense model, in float32 afterwards; by the solver grad its hooks are left behind.
        readers: of the bundles.
        training: settings; of epochs, batch_size and lr those may be None that the defaults fill.
        solver: hybrid, ls or grad; what follows on calibration and least squares is not of grad.
        ridge: pull toward the weights as pruned, see `solver.solve`.
        data: see `calibrate`, as for the others; the solver grad takes no texts.
        limit: with grad, samples of each split.
        calibration: file of the statistics.
        memory_budget: bytes.
        linear_solver: see `solver.solve`.
        held_out_samples: of the validation split.
        stats: of the solver grad, CSV of the losses that is rewritten after every epoch.

    Returns:
        What became of the variants, to be cleaned up once all is written; the bundle of them; and
        the report.
    """
    started = time.perf_counter()
    variants = _union(dense, readers)
    dense.model.float()
    task = tasks.by_name(dense.info["task"])
    if solver == "grad":
        options = with_defaults(training, epochs=4, batch_size=task.batch_size, lr=4e-2)
        assert data is None or isinstance(data, str)
        corpora = corpora_of(dense, data, limit)
        result = gradient.tune(dense, variants, corpora, options, stats)
        facts: dict[str, Any] = {}
        tuned = options.identity()
        remedy = f"lower lr (now {options.lr:g}), or give more training data"
    else:
        found, (texts, held_out) = calibrate(
            dense, calibration, data, limit, memory_budget, training.device, held_out_samples
        )
        seconds = round(time.perf_counter() - started, 3)
        facts = {**facts_of(found), "calibration_seconds": seconds}
        size = task.batch_size // 4
        training = with_defaults(training, epochs=Phase.epochs, batch_size=size, lr=Phase.lr)
        settings = _settings(training, solver, linear_solver, ridge, memory_budget)
        folder = training.checkpoint_dir
        result = least_squares.tune(
            dense, variants, found, (texts, held_out), settings, folder, training.resume
        )
        tuned = dataclasses.asdict(settings) | {"calibration": found.info}
        tokens = min(facts["calibration_tokens"].values())
        remedy = f"measure more samples (now {tokens} tokens)"
    if result.is_main:
        _warn(result.variants, result.kept, remedy)
    made = {**readers[0].options, "solver": solver, "tuned": tuned}
    errors = [v.stats for v in result.variants if "error_after" in v.stats]
    return result, Bundle(dense.fingerprint, result.variants, made), {
        **result.report,
        **facts,
        "variants": len(variants),
        "solver": solver,
        "kept": dict(sorted(Counter(filter(None, result.kept)).items())),
        "mean_error_before": _mean([stats["error_before"] for stats in errors]),
        "mean_error_after": _mean([stats["error_after"] for stats in errors]),
    }  # fmt: skip


def _settings(
    training: Options, solver: str, linear_solver: str, ridge: float, memory_budget: int
) -> least_squares.Settings:
    """Turn the options of the script into settings of the least-squares forms."""
    device = devices.select_device(training.device)
    is_half = devices.select_dtype(training.dtype, device) == "bfloat16"
    phase = Phase(
        epochs=training.epochs,
        batch_size=training.batch_size,
        lr=training.lr,
        patience=training.early_stop,
        seed=training.seed,
        device=device,
        dtype="bfloat16" if is_half else "float32",
        budget=memory_budget,
    )
    return least_squares.Settings(solver, linear_solver, ridge, device, phase)


def _warn(variants: list[Variant], kept: list[str | None], remedy: str) -> None:
    """Say once how many variants are as they were pruned, although they have an error."""
    learned = [variant for variant, kind in zip(variants, kept, strict=True) if kind]
    count = sum(
        kind == "pruned" and variant.stats["error_before"] > 0
        for variant, kind in zip(variants, kept, strict=True)
    )
    if count:
        log.warning(
            "%d of %d variants stay as pruned, no better by fine-tuning on the held-out texts; %s.",
            *(count, len(learned), remedy),
        )


def _union(dense: Checkpoint, readers: Sequence[bundle.Reader]) -> list[Variant]:
    """Load all variants; those made for one (module, entry) by two bundles must be equal."""
    found: dict[Any, tuple[Path, Variant]] = {}
    for reader in readers:
        for variant in load_variants(dense, ((reader, record) for record in reader.records)):
            path, first = found.setdefault((variant.module, variant.entry), (reader.path, variant))
            if first.digest != variant.digest:
                raise MismatchError(
                    f'"{variant.module}" at {variant.entry} differs between {path} and '
                    f"{reader.path}; leave one of the bundles out."
                )
            first.plain |= variant.plain
    return [variant for _, variant in found.values()]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
