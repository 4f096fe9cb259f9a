"""Module-level fine-tuning by least squares, and a short training of modules that lost units."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from composable import files, runs
from composable.calibration.batching import Texts
from composable.calibration.obtain import Calibration
from composable.calibration.recorded_calls import recorded_modules
from composable.errors import MismatchError, UserError
from composable.formats.bundle import Variant
from composable.linalg.solver import RIDGE, solve
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_tensors
from composable.progress import Stage
from composable.variants import unit_phase
from composable.variants.last_linear import LastLinear
from composable.variants.linear_fit import Refit, fit_linear
from composable.variants.result import Result
from composable.variants.store import Fit, Fits, Store, best
from composable.variants.unit_fit import fit_units

SOLVERS = ("hybrid", "ls")
#: What was done to a module -> the fits of each of its variants.
FITS = {"solved": ("pruned", "ls"), "trained": ("trained",)}
HELD_OUT_BATCH = 64  # samples; of no influence on the result


@dataclass(frozen=True)
class Settings:
    """How variants are refitted.

    Attributes:
        solver: "hybrid" trains attentions and ffns that lost units after their refit, "ls" does
            not.
        linear_solver: "pcg" or "exact", see `solver.solve`.
        ridge: pull toward the variant's weights, relative to the mean squares of the inputs.
        device: where the solves run.
        phase: settings of that training.
    """

    solver: str = "hybrid"
    linear_solver: str = "pcg"
    ridge: float = RIDGE
    device: str = "cpu"
    phase: unit_phase.Settings = dataclasses.field(default_factory=unit_phase.Settings)

    @property
    def refit(self) -> Refit:
        """`solver.solve` with these settings."""
        return functools.partial(
            solve, ridge=self.ridge, linear_solver=self.linear_solver, device=self.device
        )


def tune(
    dense: Checkpoint,
    variants: list[Variant],
    calibration: Calibration,
    texts: tuple[Texts, Texts],
    settings: Settings,
    checkpoints: Path = Path("checkpoints"),
    resume: bool = True,
) -> Result:
    """Refit all variants to the outputs of their dense modules, each as if it were alone.

    Of its weights as pruned, solved and trained, each variant gets those with the lowest error on
    the held-out texts. With several processes each takes its share of the modules; no result
    depends on the split.

    Args:
        dense: the dense model; left as it is.
        variants: as `pruning.make_variants` makes them; those that are removed pass through.
        calibration: statistics of the model's inputs.
        texts: calibration and held-out texts, for the training of modules that lost units.
        settings: how.
        checkpoints: where finished parts are kept, in a folder of this very run.
        resume: go on where an interrupted run stopped.

    Raises:
        MismatchError: what precedes the last linear of a module differs from the dense model.
    """
    run = _Run(dense, variants, calibration, texts, settings)
    run.open_store(checkpoints, resume)
    try:
        run.solve_linears()
        run.train_units()
        return run.collect()
    except BaseException:
        run.folder.release()
        raise


class _Run:
    """One run of `tune`; variants of equal tensors are one, named by their digest."""

    def __init__(
        self,
        dense: Checkpoint,
        variants: list[Variant],
        calibration: Calibration,
        texts: tuple[Texts, Texts],
        settings: Settings,
    ):
        self.dense, self.variants = dense, variants
        self.calibration, self.texts, self.settings = calibration, texts, settings
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.digests = [variant.digest for variant in variants]
        self.distinct = {
            digest: variant
            for digest, variant in zip(self.digests, variants, strict=True)
            if variant.learns
        }
        wanted = {variant.module for variant in self.distinct.values()}
        self.linears = {
            module.name: LastLinear.of(dense.model, module)
            for module in dense.family.modules(dense.model)
            if module.name in wanted
        }
        for variant in self.distinct.values():
            self._check_inputs(variant)
        self.solved: dict[str, Fits] = {}
        self.trained: dict[str, Fits] = {}

    def open_store(self, checkpoints: Path, resume: bool) -> None:
        """Find what an earlier run of the same inputs has finished."""
        identity = {
            "model": self.dense.fingerprint,
            "variants": self.digests,
            "calibration": self.calibration.info,
            "texts": [part.identity for part in self.texts],
            "settings": dataclasses.asdict(self.settings),
            "torch": torch.__version__,
        }
        path = checkpoints / f"{self.settings.solver}-{files.digest_of(identity)[:16]}"
        self.folder = runs.RunFolder(path, is_main=self.rank == 0)
        if not resume and self.rank == 0:
            self.folder.clear()
        self._wait()
        self.store = Store(path)

    def solve_linears(self) -> None:
        """Refit every linear at all its rates: this process's share of those not done yet."""
        problems: dict[str, dict[str, Variant]] = {}
        for digest, variant in self.distinct.items():
            problems.setdefault(variant.module, {})[digest] = variant
        for name, pruned in self._pruned().items():
            whole = [self.linears[name].unmasked(variant) for variant in pruned.values()]
            problems[name] |= {variant.digest: variant for variant in whole}
        with Stage(self._share(problems), "solve", unit="linears") as stage:
            for name in stage:
                if self._finished("solved", name, problems[name]) is None:
                    linear = self.linears[name]
                    path = linear.module.output_path
                    texts = self.calibration.inputs(path), self.calibration.held_out(path)
                    found = fit_linear(linear, problems[name], texts, self.settings.refit)
                    self.store.save(f"solved {name}", found)
        self._wait()
        self.solved = self._loaded("solved", problems)

    def train_units(self) -> None:
        """Train every attention and ffn that lost units on the recorded calls of the dense one."""
        pruned, phase = self._pruned(), self.settings.phase
        mine = [
            name
            for name in self._share(pruned)
            if self._finished("trained", name, pruned[name]) is None
        ]
        modules = [linear.module for name, linear in self.linears.items() if name in mine]
        if modules:
            train, held_out = (
                part.batches(phase.device, rows)
                for part, rows in zip(self.texts, (phase.batch_size, HELD_OUT_BATCH), strict=True)
            )
            with (
                recorded_modules(
                    self.dense, modules, (train, held_out), phase.device, phase.budget
                ) as calls,
                Stage(calls, "train", len(modules), unit="modules") as stage,
            ):
                for recorded in stage:
                    name = recorded.module.name
                    found = fit_units(
                        self.dense, self.linears[name], pruned[name], self.solved, recorded,
                        phase, self.settings.refit,
                    )  # fmt: skip
                    self.store.save(f"trained {name}", found)
        self._wait()
        self.trained = self._loaded("trained", pruned)

    def collect(self) -> Result:
        """Give each variant the weights with the lowest error on the held-out texts."""
        times = Counter(self.digests)
        variants, kept, seconds, learned = [], [], [], []
        for digest, variant in zip(self.digests, self.variants, strict=True):
            # none of a removed module
            fits = self.solved.get(digest, {}) | self.trained.get(digest, {})
            chosen = best(fits) if fits else None
            if chosen:
                path = self.linears[variant.module].module.output_path
                variant = _with(variant, fits, chosen, self.calibration.tokens_per_input(path))
            variants.append(variant)
            kept.append(chosen)
            seconds.append(sum(fit.seconds for fit in fits.values()) / times[digest])
            learned += [fits] if fits else []
        rows = _rows(learned, self.settings.phase.lr)
        report = {
            "validation_loss_start": rows[0]["validation_loss"],
            "validation_loss": rows[-1]["validation_loss"],
            "solve_seconds": rows[1]["training_seconds"],
        }
        if len(rows) > 2:
            report["training_seconds"] = rows[2]["training_seconds"]
        is_main = self.rank == 0
        return Result(variants, kept, seconds, rows, report, is_main, self.folder)

    def _pruned(self) -> dict[str, dict[str, Variant]]:
        """Modules to be trained: name -> digest -> variant that lost units."""
        found: dict[str, dict[str, Variant]] = {}
        for digest, variant in self.distinct.items():
            kept, module = variant.kept_units, self.linears[variant.module].module
            if kept is not None and len(kept) < module.units:
                found.setdefault(module.name, {})[digest] = variant
        return found if self.settings.solver == "hybrid" else {}

    def _check_inputs(self, variant: Variant) -> None:
        """Refuse a module whose last linear sees other inputs than the dense one's columns."""
        linear = self.linears[variant.module]
        holder = self.dense.model.get_submodule(linear.module.holder)
        for name, dense in own_tensors(holder, linear.module, variant.kept_units).items():
            is_last = name.startswith(linear.prefix)
            if not is_last and not torch.equal(variant.tensors[name], dense.float().cpu()):
                raise MismatchError(
                    f'"{variant.module}" at {variant.entry}: its {name} is not that of the dense '
                    "model, so least squares have no statistics of what enters its last linear; "
                    "give the bundle that prune.py wrote, or tune it by gradient (solver grad)."
                )

    def _share(self, names: Iterable[str]) -> list[str]:
        """Those of some modules that this process works on."""
        return sorted(names)[self.rank :: self.world]

    def _finished(self, what: str, name: str, digests: Iterable[str]) -> dict[str, Fits] | None:
        """Read a finished part: digest -> fits."""
        wanted = {(digest, kind) for digest in digests for kind in FITS[what]}
        return self.store.load(f"{what} {name}", wanted)

    def _loaded(self, what: str, parts: dict[str, dict[str, Variant]]) -> dict[str, Fits]:
        """Read the finished parts of all processes: digest -> fits."""
        found: dict[str, Fits] = {}
        for name, variants in parts.items():
            part = self._finished(what, name, variants)
            if part is None:
                raise UserError(
                    f"{self.folder.path}: what was finished of {name} is gone; run the same "
                    "command again."
                )
            found |= part
        return found

    def _wait(self) -> None:
        """Let all processes come to this point."""
        if self.world > 1:
            PartialState(cpu=self.settings.device == "cpu").wait_for_everyone()


def _with(variant: Variant, fits: Fits, kind: str, tokens_per_input: float) -> Variant:
    """Put the chosen weights, and what is known of the refit, into a copy of a variant."""
    norm, largest = max(fits[kind].norm, 1e-30), fits["ls"].largest_coefficient
    stats = {
        **variant.stats,
        "error_before": fits["pruned"].held_out / norm,
        "error_after": fits[kind].held_out / norm,
        "tokens_per_input": tokens_per_input,
        **({} if largest is None else {"largest_coefficient": largest}),
    }
    return dataclasses.replace(variant, tensors=variant.tensors | fits[kind].tensors, stats=stats)


def _train(fit: Fit) -> float:
    assert fit.train is not None  # these weights are taken
    return fit.train


def _rows(learned: list[Fits], lr: float) -> list[dict[str, Any]]:
    """The stats: sums over the variants, as the gradient form has them."""
    stages: list[tuple[tuple[str, ...], float]] = [((), 0.0), (("ls",), 0.0)]
    if any("trained" in fits for fits in learned):
        stages.append((("ls", "trained"), lr))
    rows = []
    for epoch, (kinds, rate) in enumerate(stages):
        reached = [{k: fits[k] for k in ("pruned", *kinds) if k in fits} for fits in learned]
        taken = [fits[best(fits)] for fits in reached]
        spent = sum(fits[kinds[-1]].seconds for fits in reached if kinds and kinds[-1] in fits)
        rows.append(
            {
                "epoch": epoch,
                "training_loss": sum(map(_train, taken)) if kinds else None,
                "validation_loss": sum(fit.held_out for fit in taken),
                "training_seconds": round(spent, 3),
                "validation_seconds": 0.0,
                "learning_rate": rate,
            }
        )
    return rows
