"""Module-level fine-tuning by least squares, and a short gradient phase for pruned attentions."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from composable import files, progress
from composable.calibration.obtain import Calibration
from composable.errors import MismatchError
from composable.families import Module
from composable.formats.bundle import Variant
from composable.formats.config import Entry
from composable.linalg import solver
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import own_tensors, unit_rows
from composable.variants import attention_phase
from composable.variants.attention_phase import Trained
from composable.variants.linear_fit import How, Problem, fit_linear, fit_output
from composable.variants.store import Fit, Store

log = logging.getLogger("composable")
SOLVERS = ("hybrid", "ls")
#: Kinds of modules that lose units, whose last linear is refitted to those that stay.
UNITS = ("attention", "ffn")
#: A module that has lost heads or neurons: its name, and what it has of them.
Units = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    """How variants are refitted.

    Attributes:
        solver: "hybrid" trains head-pruned attentions after their refit, "ls" does not.
        linear_solver: "pcg" or "exact", see `solver.refit`.
        ridge: pull toward the dense weights, relative to the mean squares of the inputs.
        device: where the solves run.
        phase: settings of the attentions' gradient phase.
    """

    solver: str = "hybrid"
    linear_solver: str = "pcg"
    ridge: float = 1e-2
    device: str = "cpu"
    phase: attention_phase.Settings = dataclasses.field(default_factory=attention_phase.Settings)

    @property
    def how(self) -> How:
        """The part that the solves need."""
        return How(self.ridge, self.linear_solver, self.device)


@dataclass
class Result:
    """What least squares made of the variants.

    Attributes:
        variants: in the order given, with `error_before` and `error_after` in their stats.
        seconds: of each variant; a solve for several counts in equal parts.
        rows: the stats: 0 as pruned, 1 solved, 2 after the attentions' gradient phase.
        is_main: whether this process writes the files.
        folder: finished parts, to be removed when the results are safe.
    """

    variants: list[Variant]
    seconds: list[float]
    rows: list[dict[str, Any]]
    is_main: bool
    folder: Path

    def report(self) -> dict[str, Any]:
        """Summarise for the closing JSON report."""
        report = {
            "validation_loss_start": self.rows[0]["validation_loss"],
            "validation_loss": self.rows[-1]["validation_loss"],
            "solve_seconds": self.rows[1]["training_seconds"],
        }
        if len(self.rows) > 2:
            report["attention_seconds"] = self.rows[2]["training_seconds"]
        return report

    def clean_up(self) -> None:
        """Remove the finished parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def tune(
    dense: Checkpoint,
    variants: list[Variant],
    calibration: Calibration,
    corpora: tuple[Any, Any],
    settings: Settings,
    checkpoints: Path = Path("checkpoints"),
    resume: bool = True,
) -> Result:
    """Refit all variants to the outputs of their dense modules, each as if it were alone.

    With several processes each takes its share of the modules; no result depends on the split.

    Args:
        dense: the dense model; left as it is.
        variants: as `pruning.make_variants` makes them; those that are removed pass through.
        calibration: statistics of the model's inputs.
        corpora: calibration and held-out texts, for the attentions' gradient phase.
        settings: how.
        checkpoints: where finished parts are kept, in a folder of this very run.
        resume: go on where an interrupted run stopped.

    Raises:
        MismatchError: an attention was changed by more than the removal of heads.
    """
    run = _Run(dense, variants, calibration, settings)
    run.open_store(checkpoints, resume)
    run.solve_linears()
    if settings.solver == "hybrid":
        run.train_attentions(corpora)
    return run.collect()


class _Run:
    """One run of `tune`."""

    def __init__(
        self,
        dense: Checkpoint,
        variants: list[Variant],
        calibration: Calibration,
        settings: Settings,
    ):
        self.dense, self.variants = dense, variants
        self.calibration, self.settings = calibration, settings
        self.modules = {module.name: module for module in dense.family.modules(dense.model)}
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        for variant in variants:
            if variant.kept_units is not None and variant.tensors:
                self._check_units(variant)

    def open_store(self, checkpoints: Path, resume: bool) -> None:
        """Find what an earlier run of the same inputs has finished."""
        identity = {
            "model": self.dense.fingerprint,
            "variants": [variant.digest for variant in self.variants],
            "calibration": self.calibration.info,
            "settings": dataclasses.asdict(self.settings),
            "torch": torch.__version__,
        }
        folder = checkpoints / f"{self.settings.solver}-{files.digest_of(identity)[:16]}"
        if not resume and self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._wait()
        self.store = Store(folder)

    def solve_linears(self) -> None:
        """Refit every linear at all its rates: this process's share of those not done yet."""
        self.problems = self._problems()
        mine = sorted(self.problems)[self.rank :: self.world]
        bar = tqdm(mine, "solve", unit="linear", disable=not self._shows_progress())
        for name in bar:
            if self.store.load(name) is None:
                self.store.save(name, self._solve(name, self.problems[name]))
        self._wait()
        self.solved = {name: self._loaded(name) for name in self.problems}

    def train_attentions(self, corpora: tuple[Any, Any]) -> None:
        """Train q, k, v and o of every pruned attention, starting from its refitted o.

        Units first, for all variants that have them; then each pair with its masked `o`, which was
        refitted to the trained heads, for half as long with half the steps' size.
        """
        phase, heads_of = self.settings.phase, self._units("attention")
        paired = {index: heads for index, heads in heads_of.items() if self.variants[index].masks}
        starts = {heads: self._start(heads) for heads in sorted(set(heads_of.values()))}
        self._train(starts, corpora, phase, self._finish, set(paired.values()))
        half = dataclasses.replace(phase, epochs=-(-phase.epochs // 2), lr=phase.lr / 2)
        pairs = {index: self._tuned_pair(index, heads) for index, heads in paired.items()}
        self._train(pairs, corpora, half, self._finish_pair)

    def _train(
        self,
        starts: Mapping[Any, Variant],
        corpora: tuple[Any, Any],
        phase: attention_phase.Settings,
        finish: Callable[[Any, Trained], dict[str, Fit]],
        wants_moments: Collection[Any] = (),
    ) -> None:
        """Train this process's share of attentions, and store what `finish` makes of each."""
        modules = sorted({start.module for start in starts.values()})[self.rank :: self.world]
        mine = {key: start for key, start in starts.items() if start.module in modules}
        attention_phase.run(
            self.dense,
            mine,
            corpora,
            phase,
            wants_moments=wants_moments,
            on_done=lambda key, trained: self.store.save(key, finish(key, trained)),
            skip={key for key in mine if self.store.load(key) is not None},
        )
        self._wait()

    def collect(self) -> Result:
        """Put the fits into copies of the variants."""
        fits = [self._fits_of(index) for index in range(len(self.variants))]
        variants = [_tuned(v, some) for v, some in zip(self.variants, fits, strict=True)]
        seconds = [sum(fit.facts["seconds"] for fit in some) for some in fits]
        return Result(variants, seconds, self._rows(fits), self.rank == 0, self.store.folder)

    def _wait(self) -> None:
        """Let all processes come to this point."""
        if self.world > 1:
            PartialState(cpu=self.settings.device == "cpu").wait_for_everyone()

    def _shows_progress(self) -> bool:
        return progress.shows_progress() and self.rank == 0

    def _loaded(self, name: Any) -> dict[str, Fit]:
        fits = self.store.load(name)
        assert fits is not None, name
        return fits

    def _columns(self, units: Units) -> Tensor:
        """Columns of a module's last linear that belong to some of its units."""
        module = self.modules[units[0]]
        role = next(role for role, child in module.parts if child == module.output)
        return unit_rows(module, list(units[1]))[role]

    def _units(self, *kinds: str) -> dict[int, Units]:
        """Index of every variant of these kinds that has lost units -> what is left."""
        return {
            index: (variant.module, tuple(variant.kept_units))
            for index, variant in enumerate(self.variants)
            if variant.learns
            and variant.kind in kinds
            and variant.kept_units is not None
            and len(variant.kept_units) < self.modules[variant.module].units
        }

    def _check_units(self, variant: Variant) -> None:
        """Refuse a module whose last linear sees other inputs than the dense one's columns."""
        module = self.modules[variant.module]
        holder = self.dense.model.get_submodule(module.holder)
        for name, dense in own_tensors(holder, module, variant.kept_units).items():
            is_output = name.startswith(f"{module.output}.")
            if not is_output and not torch.equal(variant.tensors[name], dense.float()):
                raise MismatchError(
                    f'"{variant.module}" at {variant.entry}: its {name} is not that of the dense '
                    "model, so it was tuned before; give the bundle that prune.py wrote, or use "
                    "--solver grad."
                )

    def _problems(self) -> dict[str, dict[str, Problem]]:
        """Linear -> name of a problem -> problem; those of heads alone are starts, too."""
        found: dict[str, dict[str, Problem]] = {}
        for index, variant in enumerate(self.variants):
            if not variant.learns:
                continue
            problems = found.setdefault(self.modules[variant.module].output_path, {})
            units = self._units(*UNITS).get(index)
            if units and (self.settings.solver == "hybrid" or not variant.masks):
                problems.setdefault(_name_of(units), self._units_problem(units))
            if not units or variant.masks:
                problems[str(index)] = self._problem(variant)
        return found

    def _units_problem(self, units: Units) -> Problem:
        weight = self._dense_weight(units[0])
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[:, self._columns(units)] = True
        return Problem(torch.where(mask, weight, 0.0), mask)

    def _dense_weight(self, module: str) -> Tensor:
        """Weight of the linear that is refitted for a module."""
        path = self.modules[module].output_path
        return self.dense.model.get_parameter(f"{path}.weight").detach().float()

    def _problem(self, variant: Variant) -> Problem:
        """Spread a variant's weight and mask over the columns of its dense linear."""
        module = self.modules[variant.module]
        own = f"{module.output}.weight" if module.parts else "weight"
        weight = variant.tensors[own]
        mask = variant.masks.get(own, torch.ones(weight.shape, dtype=torch.bool))
        if variant.kept_units is None:
            return Problem(weight, mask)
        columns = self._columns((variant.module, tuple(variant.kept_units)))
        width = self._dense_weight(variant.module).shape[1]
        wide = torch.zeros(len(weight), width), torch.zeros(len(mask), width, dtype=torch.bool)
        for target, source in zip(wide, (weight, mask), strict=True):
            target[:, columns] = source
        return Problem(*wide)

    def _solve(self, name: str, problems: dict[str, Problem]) -> dict[str, Fit]:
        """Refit one linear for all its problems together."""
        linear = self.dense.model.get_submodule(name)
        texts = self.calibration.inputs(name), self.calibration.held_out(name)
        if solver.tells_nothing(texts[0].matrix):
            log.warning("%s: its inputs never vary; the weights stay as pruned.", name)
        return fit_linear(linear, problems, texts, self.settings.how)

    def _start(self, heads: Units) -> Variant:
        """The attention without those heads, its `o` refitted."""
        module = self.modules[heads[0]]
        holder = self.dense.model.get_submodule(module.holder)
        tensors = {
            name: weight.float()
            for name, weight in own_tensors(holder, module, list(heads[1])).items()
            if not name.startswith(f"{module.output}.")
        }
        fit = self.solved[module.output_path][_name_of(heads)]
        tensors.update(self._own_tensors(module, fit, self._columns(heads)))
        rate = 1 - len(heads[1]) / module.units
        kept = list(heads[1])
        return Variant(module.name, module.kind, Entry(rate), kept_units=kept, tensors=tensors)

    def _own_tensors(self, module: Module, fit: Fit, columns: Tensor | None) -> dict[str, Tensor]:
        """Name a problem's tensors as the variant does, without the columns it has not."""
        prefix = f"{module.output}." if module.parts else ""
        tensors = {f"{prefix}{name}": tensor for name, tensor in fit.tensors.items()}
        if columns is not None:
            tensors[f"{prefix}weight"] = tensors[f"{prefix}weight"][:, columns].contiguous()
        return tensors

    def _finish(self, heads: Units, trained: Trained) -> dict[str, Fit]:
        """Make the fits of all variants of one trained attention; masked `o`s are solved anew."""
        norm = self.solved[self.modules[heads[0]].output_path][_name_of(heads)].facts["norm"]
        indices = [index for index, known in self._units("attention").items() if known == heads]
        facts = {"norm": norm, "seconds": trained.seconds / len(indices)}
        fits = {}
        for index in indices:
            variant = self.variants[index]
            tensors = trained.tensors
            errors = {"train": trained.training_loss, "after": trained.error_after * norm}
            if variant.masks:
                tensors, errors = self._refit_output(variant, trained)
            fits[str(index)] = Fit(tensors, {**facts, **errors})
        return fits

    def _tuned_pair(self, index: int, heads: Units) -> Variant:
        variant, fit = self.variants[index], self._loaded(heads)[str(index)]
        return dataclasses.replace(variant, tensors={**variant.tensors, **fit.tensors})

    def _finish_pair(self, index: int, trained: Trained) -> dict[str, Fit]:
        """Make the fit of a pair that was trained with its mask."""
        norm = self._fits_of(index)[0].facts["norm"]
        facts = {"train": trained.training_loss, "after": trained.error_after * norm}
        return {str(index): Fit(trained.tensors, {**facts, "seconds": trained.seconds})}

    def _refit_output(
        self, variant: Variant, trained: Trained
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Solve for a masked `o` on the inputs that the trained heads give it."""
        assert trained.moments is not None
        o, tuned = self.modules[variant.module].output, trained.tensors
        own = {name: tuned[f"{o}.{name}"] for name in ("weight", "bias") if f"{o}.{name}" in tuned}
        fit = fit_output(own, variant.masks[f"{o}.weight"], trained.moments, self.settings.how)
        tensors = {**tuned, **{f"{o}.{name}": t for name, t in fit.tensors.items()}}
        return tensors, fit.facts

    def _fits_of(self, index: int) -> list[Fit]:
        """A variant's fits: solved, then, where it was, trained; none for a removed module.

        A pair that was not trained with its mask yet has the fit of its heads' training last.
        """
        variant = self.variants[index]
        if not variant.learns:
            return []
        module, units = self.modules[variant.module], self._units(*UNITS).get(index)
        key = _name_of(units) if units and not variant.masks else str(index)
        solved = self.solved[module.output_path][key]
        columns = None
        if variant.kept_units is not None:
            columns = self._columns((module.name, tuple(variant.kept_units)))
        fits = [Fit(self._own_tensors(module, solved, columns), solved.facts)]
        if units and self.settings.solver == "hybrid" and module.kind == "attention":
            fits.append(self._loaded(units)[str(index)])
            fits.extend((self.store.load(index) or {}).values())
        return fits

    def _rows(self, fits: list[list[Fit]]) -> list[dict[str, Any]]:
        """The stats: sums over the variants, as the gradient form has them."""
        first = [some[0].facts for some in fits if some]
        rows = [
            _row(0, None, sum(facts["before"] for facts in first), 0.0, 0.0),
            _row(
                1,
                sum(facts["train"] for facts in first),
                sum(facts["after"] for facts in first),
                sum(facts["seconds"] for facts in first),
                0.0,
            ),
        ]
        trained = [fit.facts["seconds"] for some in fits for fit in some[1:]]
        if trained:
            best = [_best(some).facts for some in fits if some]
            training, validation = (sum(facts[key] for facts in best) for key in ("train", "after"))
            rows.append(_row(2, training, validation, sum(trained), self.settings.phase.lr))
        return rows


def _row(
    epoch: int, training: float | None, validation: float, seconds: float, lr: float
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "training_loss": training,
        "validation_loss": validation,
        "training_seconds": round(seconds, 3),
        "validation_seconds": 0.0,
        "learning_rate": lr,
    }


def _best(fits: list[Fit]) -> Fit:
    """Choose by the error on held-out texts, as the gradient form chooses its epoch."""
    return min(fits, key=lambda fit: fit.facts["after"])


def _tuned(variant: Variant, fits: list[Fit]) -> Variant:
    if not fits:
        return variant
    best, norm = _best(fits), max(fits[0].facts["norm"], 1e-30)
    stats = {
        **variant.stats,
        "error_before": fits[0].facts["before"] / norm,
        "error_after": best.facts["after"] / norm,
    }
    return dataclasses.replace(variant, tensors={**variant.tensors, **best.tensors}, stats=stats)


def _name_of(units: Units) -> str:
    return "units " + ",".join(map(str, units[1]))
