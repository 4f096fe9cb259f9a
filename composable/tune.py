"""The two kinds of fine-tuning from files to files, as the scripts offer them."""

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn

from composable import (
    attention_phase,
    bundle,
    callbacks,
    checkpoint,
    cost,
    devices,
    distill,
    files,
    layer_states,
    reconstruct,
    tasks,
    train,
    variant_table,
)
from composable.bundle import Bundle, Variant
from composable.calibration import Calibration, batches_of, obtain, parse_bytes
from composable.checkpoint import Checkpoint
from composable.errors import MismatchError
from composable.heal import Heal, prepare
from composable.layer_states import Pair
from composable.pruning import Block, States

log = logging.getLogger("composable")


def tune_model(
    composed: Checkpoint,
    output: Path,
    stats: Path,
    training: train.Options,
    label: str,
    data: str | None = None,
    limit: int | None = None,
    heal: Heal | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fine-tune a whole model on the training split and write it.

    Weights are trained in float32, and written as the file had them.

    Args:
        composed: the model, composed or dense; pruned weights stay zero.
        output: model file to write.
        stats: CSV to write.
        training: settings.
        label: name of the run.
        data: the `--data` option.
        limit: pairs of each split.
        heal: which weights learn; None: all.

    Returns:
        The closing report.
    """
    heal = heal or Heal()
    training = dataclasses.replace(training, optimizer=heal.optimizer)
    size = tasks.by_name(composed.info["task"]).batch_size
    training = _with_defaults(training.resolved(), batch_size=size, lr=heal.lr)
    corpora, stored = _corpora(composed, data, limit), composed.model.dtype
    identity = {
        "model": checkpoint.fingerprint_of(composed.config, composed.model.state_dict()),
        "masks": checkpoint.fingerprint_of({}, composed.masks),
        "structure": composed.structure,
        "data": [corpus.sha256 for corpus in corpora],
        "prefix": composed.info["prefix"],
        "heal": heal.identity(),
    }
    composed.model.float()
    finish = prepare(composed, heal)
    learning = sum(p.numel() for p in composed.model.parameters() if p.requires_grad)
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
    finish()
    report = {
        **outcome.report(),
        **({} if heal.how == "full" else {"heal": heal.how, "learning_parameters": learning}),
        "stats": str(stats),
        "data": corpora[0].name,
        "dtype": training.dtype,
    }
    composed.info["history"].append({label: {**training.identity(), **report}})
    if outcome.is_main:
        _forget_seconds(composed.info["history"][-1][label])
        nn.Module.to(composed.model, stored)
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
    plot: Path | None,
    training: train.Options,
    solver: str,
    linear_solver: str,
    **texts: Any,
) -> dict[str, Any]:
    """Fine-tune all variants of the bundles beside the dense model and write one bundle.

    Args:
        model: the dense model.
        bundles: what to tune; equal variants are tuned once.
        output: bundle to write.
        stats: CSV of the summed losses per epoch.
        table: CSV of the variants' relative errors.
        plot: heat map of the errors to draw, or None.
        training: settings; of epochs, batch_size and lr those may be None that the defaults fill.
        solver: hybrid, ls or grad.
        linear_solver: see `solver.refit`.
        texts: options of the data and of the calibration, see `calibrate`.

    Returns:
        The closing report.
    """
    started = time.perf_counter()
    dense = checkpoint.load(model)
    dense.require_dense(model, "module-level fine-tuning")
    readers = [bundle.open_bundle(path, dense.fingerprint) for path in bundles]
    variants = _union(readers)
    dense.model.float()
    task = tasks.by_name(dense.info["task"])
    if solver == "grad":
        options = _with_defaults(training, epochs=4, batch_size=task.batch_size, lr=4e-2)
        corpora = _corpora(dense, texts["data"], texts["limit"])
        result: Any = distill.tune(dense, variants, corpora, options, stats)
        facts: dict[str, Any] = {}
        tuned = options.identity()
    else:
        calibration, corpora = calibrate(dense, **texts)
        facts = {"calibration": str(calibration.path)}
        facts["calibration_seconds"] = round(time.perf_counter() - started, 3)
        training = _with_defaults(training, batch_size=task.batch_size // 4)
        settings = _settings(training, solver, linear_solver, texts["memory_budget"])
        folder = training.checkpoint_dir
        result = reconstruct.tune(
            dense, variants, calibration, corpora, settings, folder, training.resume
        )
        tuned = dataclasses.asdict(settings) | {"calibration": calibration.info}
    rows = variant_table.rows_of(result.variants, result.seconds)
    report = {
        **result.report(),
        **facts,
        "variants": len(variants),
        "solver": solver,
        "stats": str(stats),
        "table": str(table),
    }
    if result.is_main:
        made = {**readers[0].options, "solver": solver, "tuned": tuned}
        bundle.write(output, Bundle(dense.fingerprint, result.variants, made))
        variant_table.write(table, rows)
        if result.rows:
            files.write_text(stats, callbacks.stats_csv(result.rows))
        if plot:
            variant_table.write_plot(plot, rows)
            report["plot"] = str(plot)
        result.clean_up()
        log.info("%s", variant_table.as_text(rows))
    errors = [v.stats for v in result.variants if "error_after" in v.stats]
    return {
        "wrote": str(output),
        **report,
        "mean_error_before": _mean([stats["error_before"] for stats in errors]),
        "mean_error_after": _mean([stats["error_after"] for stats in errors]),
    }


def calibrate(
    dense: Checkpoint,
    calibration: Path,
    calibration_data: str | None,
    calibration_samples: int,
    memory_budget: str,
    device: str,
    data: str | None = None,
    limit: int | None = None,
    **_: Any,
) -> tuple[Calibration, tuple[Any, Any]]:
    """Read or measure the statistics of the inputs of every module.

    Args:
        dense: the dense model.
        calibration: file that holds them, or will.
        calibration_data: whose texts, as `--data`.
        calibration_samples: so many of the training split.
        memory_budget: such as "4G".
        device: the `--device` option.
        data: the `--data` option, where there is one.
        limit: pairs of each split.

    Returns:
        The statistics, and the texts: of the training split, and at most as many of the validation
        split.
    """
    dense.model.float()
    corpora = _calibration_texts(dense, calibration_data or data, calibration_samples, limit)
    budget, device = parse_bytes(memory_budget), devices.select_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return obtain(dense, corpora, calibration, budget, device), corpora
    with PartialState(cpu=device == "cpu").main_process_first():  # the others read what it wrote
        return obtain(dense, corpora, calibration, budget, device), corpora


def block_moments(
    dense: Checkpoint,
    blocks: Sequence[Block],
    calibration_data: str | None,
    calibration_samples: int,
    device: str,
    **_: Any,
) -> States:
    """Measure the states before and after some blocks of layers.

    Args:
        dense: the dense model.
        blocks: first and last layer of each. The moments of all are held at once, 32 bytes for
            each pair of features of each block.
        calibration_data: as for `calibrate`, like the other options.
        calibration_samples: so many of the training split.
        device: the `--device` option.

    Returns:
        Block -> its moments on the calibration texts and on the held-out ones.
    """
    device = devices.select_device(device)
    reader = layer_states.Reader.of(dense.model.float().to(device), dense.family)  # type: ignore[arg-type]
    places = {block: _place(dense, block) for block in blocks}
    pairs: dict[str, list[Pair]] = {}
    for stack, pair in places.values():
        pairs.setdefault(stack, []).append(pair)
    found = [
        layer_states.moments(reader, batches_of(dense, corpus, device), pairs)
        for corpus in _calibration_texts(dense, calibration_data, calibration_samples)
    ]
    return lambda block: (found[0][places[block]], found[1][places[block]])


def _place(dense: Checkpoint, block: Block) -> tuple[str, Pair]:
    """Find the stack of a block, and the states before and after it."""
    place = dense.family.place(block[0])
    assert place is not None  # the scheme was checked against the model
    first, last = (int(name.rpartition(".")[2]) for name in block)
    return place[0], (first, last + 1)


def _calibration_texts(
    dense: Checkpoint, data: str | None, samples: int, limit: int | None = None
) -> tuple[Any, Any]:
    """Read some of the training split, and at most as many of the validation split."""
    task, default = tasks.by_name(dense.info["task"]), dense.info.get("data")
    count = min(samples, limit or samples)
    return task.read(data, default, "train", count), task.read(data, default, "valid", count)


def _settings(
    training: train.Options, solver: str, linear_solver: str, memory_budget: str
) -> reconstruct.Settings:
    """Turn the options of the script into settings of the least-squares forms."""
    default = attention_phase.Settings()
    phase = attention_phase.Settings(
        epochs=training.epochs or default.epochs,
        batch_size=training.batch_size,
        lr=training.lr or default.lr,
        patience=training.early_stop,
        seed=training.seed,
        device=devices.select_device(training.device),
        budget=parse_bytes(memory_budget),
    )
    return reconstruct.Settings(solver, linear_solver, device=phase.device, phase=phase)


def _with_defaults(training: train.Options, **defaults: Any) -> train.Options:
    """Fill in the options that were not given."""
    open_ones = {key: value for key, value in defaults.items() if getattr(training, key) is None}
    return dataclasses.replace(training, **open_ones)


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
