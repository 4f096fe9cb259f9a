"""OPTIN: a unit matters as much as the features of all later layers change without it."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composable.calibration.batching import Texts
from composable.calibration.second_moments import eval_mode
from composable.errors import ConfigError, UserError
from composable.families import Module
from composable.formats.bundle import PER_GROUP, WHOLE_GROUPS
from composable.formats.scores import Numbers, Scores, UnitImportance
from composable.linalg import kernels
from composable.linalg.grams import full_float32
from composable.linalg.manifold import Divergence, ManifoldLoss
from composable.models.checkpoint import Checkpoint
from composable.models.surgery import head_rows
from composable.progress import Stage, duration
from composable.ranking import base
from composable.ranking.base import Ranker
from composable.ranking.masked_runs import Inside, Layer, MaskedRuns

log = logging.getLogger("composable")
#: Rows of all copies of the model that run side by side: on a CPU what a layer makes of them should
#: stay in the cache.
ROWS = {"cpu": 2048, "cuda": 65536}
MEMORY = 2 << 30  # bytes for their logits, and for the moments of their features
MANY = 20_000  # neurons from which groups are advised
TOKENS = 256

#: Changes of features, (units, layers of the trajectory), and of logits, (units,).
Measured = tuple[Numbers, Numbers]


@dataclass(frozen=True)
class MaskingOptions:
    """Options of the ranker logit_kl, and of all that mask units.

    Attributes:
        group: neurons that are masked together. They are of like size in what they add, and
            share what is measured by the squares of these sizes.
        gqa: "per-group": every query head is measured; "whole-groups": all heads of a key/value
            head together, each of which gets an equal share.
        include_pads: whether padding counts like real tokens.
        checkpoints: folder from which an interrupted run goes on; None: it starts anew.
    """

    group: int = 1
    gqa: str = PER_GROUP
    include_pads: bool = False
    checkpoints: str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        if self.group < 1:
            raise ConfigError(f"group {self.group}: expected 1 neuron or more.")
        if self.gqa not in (PER_GROUP, WHOLE_GROUPS):
            raise ConfigError(f"gqa {self.gqa}: expected {PER_GROUP} or {WHOLE_GROUPS}.")


@dataclass(frozen=True)
class TrajectoryOptions(MaskingOptions):
    """Options of the ranker trajectory.

    Attributes:
        kl_weight: of the change of the logits, relative to that of the features.
    """

    kl_weight: float = 0.1

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        super().__post_init__()
        if not 0 <= self.kl_weight < float("inf"):
            raise ConfigError(f"kl_weight {self.kl_weight}: expected a number of 0 or more.")


@dataclass(frozen=True)
class Groups:
    """Units of a module that are masked together.

    Attributes:
        columns: of each, the inputs of the module's output linear; all have equally many but the
            last.
        share: (units,) part of what is measured of its group that a unit gets.
        owner: (units,) number of the group of each.
    """

    columns: list[Tensor]
    share: Tensor
    owner: Tensor


def groups_of(
    module: Module, inputs: Sequence[Tensor], weight: Tensor, options: MaskingOptions
) -> Groups:
    """Say which units of a module are masked together.

    Args:
        module: an attention or ffn.
        inputs: of its output linear, (tokens, units * size) of every batch.
        weight: of that, (width, units * size).
        options: of the ranker.
    """
    units = module.units
    if module.kind == "attention":
        each = units // module.groups if options.gqa == WHOLE_GROUPS else 1
        owner = torch.arange(units) // each
        columns = [
            head_rows(list(range(first, first + each)), module.head_size)
            for first in range(0, units, each)
        ]
        return Groups(columns, torch.full((units,), 1 / each), owner)
    power = sum(one.double().square().sum(0) for one in inputs) * weight.double().square().sum(0)
    sizes: Tensor = power.cpu()  # type: ignore[union-attr]
    if options.group == 1:
        return Groups(list(torch.arange(units)[:, None]), torch.ones(units), torch.arange(units))
    order = torch.sort(sizes, descending=True, stable=True).indices
    columns = list(order.split(options.group))
    owner = torch.empty(units, dtype=torch.long)
    owner[order] = torch.arange(units) // options.group
    # what cannot be told apart shares equally
    sizes = sizes + 1e-12 * sizes.max() + torch.finfo(torch.float64).tiny
    totals = torch.zeros(len(columns), dtype=torch.float64).index_add(0, owner, sizes)
    return Groups(columns, sizes / totals[owner], owner)


class Measuring:
    """Masks every unit of a model once.

    Args:
        dense: the model, where it runs.
        texts: the calibration set.
        options: of the ranker.
        has_features: whether features are compared, beside logits.
    """

    def __init__(
        self, dense: Checkpoint, texts: Texts, options: MaskingOptions, has_features: bool
    ):
        self.dense, self.options = dense, options
        device = next(dense.model.parameters()).device
        self.runs = MaskedRuns(dense, texts.batches(device), options.include_pads)
        self._device = device.type
        if has_features and max(map(self.runs.tokens, range(len(self.runs.features)))) < 2:
            raise UserError(
                f"{texts.name}: one token has no pairs, whose features the method trajectory "
                "compares; give more texts."
            )
        self._losses = [
            ManifoldLoss([run.features[z] for run in self.runs.runs])
            for z in range(len(self.runs.features) if has_features else 0)
        ]
        self._divergences = [Divergence(run.answers) for run in self.runs.runs]

    @property
    def compared(self) -> int:
        """How many features are compared, of earlier layers too."""
        return len(self._losses)

    @property
    def passes(self) -> dict[str, int]:
        """Path of a layer -> layers that run for all of its units, each one by one."""
        layers, found = self.runs.layers, {}
        for number, layer in enumerate(layers):
            found[layer.path] = sum(
                self._masked_together(module) * (len(layers) - number) for module in layer.modules
            )
        return found

    def _masked_together(self, module: Module) -> int:
        if module.kind == "ffn":
            return -(-module.units // self.options.group)
        return module.groups if self.options.gqa == WHOLE_GROUPS else module.units

    def seconds_per_pass(self, layer: Layer) -> float:
        """Try how long a layer takes for one copy, on average from `layer` on."""
        inside = [self.runs.inside(run, layer) for run in self.runs.runs]
        module = layer.modules[-1]
        columns = torch.arange(min(self._side_by_side, module.units))[:, None]
        columns = columns.to(next(self.dense.model.parameters()).device)
        self._copies(layer, module, inside, columns)  # the first time takes longer
        began = time.perf_counter()
        self._copies(layer, module, inside, columns)
        left = len(self.runs.layers) - self.runs.layers.index(layer)
        return (time.perf_counter() - began) / (len(columns) * left)

    def layer(self, layer: Layer, stage: Stage) -> dict[str, Measured]:
        """Measure all units of a layer.

        Returns:
            Name of a module -> md, (units, layers of the trajectory), of every later feature, 0 of
            others; of the last layer its own. And kl, (units,).
        """
        inside = [self.runs.inside(run, layer) for run in self.runs.runs]
        return {module.name: self._module(layer, module, inside, stage) for module in layer.modules}

    def _module(self, layer: Layer, module: Module, inside: list[Inside], stage: Stage) -> Measured:
        weight = self.dense.model.get_parameter(f"{module.output_path}.weight")
        inputs = [
            one.inputs[module.name][run.rows[layer.stack]]
            for run, one in zip(self.runs.runs, inside, strict=True)
        ]
        groups = groups_of(module, inputs, weight, self.options)
        left = len(self.runs.layers) - self.runs.layers.index(layer)
        md: list[Tensor] = []
        kl: list[Tensor] = []
        for columns in self._chunks(groups.columns):
            changed, diverged = self._copies(layer, module, inside, columns.to(weight.device))
            md.append(changed)
            kl.append(diverged)
            stage.update(len(columns) * left)
        share = groups.share.double()
        features = torch.cat(md)[groups.owner] * share[:, None]
        return features.numpy(), (torch.cat(kl)[groups.owner] * share).numpy()

    def _chunks(self, columns: list[Tensor]) -> Iterator[Tensor]:
        """Stack groups of equally many columns, as many as should run side by side."""
        whole = [one for one in columns if len(one) == len(columns[0])]
        yield from torch.stack(whole).split(self._side_by_side)
        if len(whole) < len(columns):
            yield torch.stack(columns[len(whole) :])

    @cached_property
    def _side_by_side(self) -> int:
        """How many copies of the model, each with a group of its own off, run at once."""
        rows = max(run.leaving[path].shape[:2].numel() for run in self.runs.runs
                   for path in run.leaving)  # fmt: skip
        numbers = 4 * max(run.answers.numel() for run in self.runs.runs)
        numbers += sum(loss.size for loss in self._losses)
        return max(1, min(ROWS[self._device] // rows, MEMORY // (4 * numbers)))

    def _copies(
        self, layer: Layer, module: Module, inside: list[Inside], columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Measure some groups side by side: md (groups, layers) and kl (groups,)."""
        wanted = self._wanted(layer)
        for z in wanted:
            self._losses[z].start()
        kl = torch.zeros(len(columns), dtype=torch.float64, device=columns.device)
        for part, (run, one) in enumerate(zip(self.runs.runs, inside, strict=True)):
            features, logits = self.runs.masked(run, layer, module, one, columns, wanted)
            for z in wanted:
                self._losses[z].add(part, features[z])
            kl += self._divergences[part].of(logits)
        md = torch.zeros(len(columns), self.compared, dtype=torch.float64)
        for z in wanted:
            md[:, z] = self._losses[z].values().double().cpu() / self.runs.tokens(z) ** 2
        return md, (kl / sum(len(run.answers) for run in self.runs.runs)).cpu()

    def _wanted(self, layer: Layer) -> list[int]:
        """Numbers of the features that are compared: of later layers; of the last one its own."""
        own = self.runs.features.get(layer.path, -1)
        if not self._losses:
            return []
        return [*range(own + 1, len(self._losses))] or [own]


def _by_layer(measuring: Measuring, parts: base.Parts) -> dict[str, Measured]:
    """Measure all units, layer by layer, but for those layers that an earlier run measured."""
    found: dict[str, Measured] = {}
    missing = []
    for layer in measuring.runs.layers:
        units = {module.name: module.units for module in layer.modules}
        shapes = {f"{name}/md": (count, measuring.compared) for name, count in units.items()}
        stored = parts.read(layer.path, shapes | {f"{n}/kl": (one,) for n, one in units.items()})
        if stored is None:
            missing.append(layer)
        else:
            found |= {name: (stored[f"{name}/md"], stored[f"{name}/kl"]) for name in units}
    if found:
        done = len(measuring.runs.layers) - len(missing)
        log.info("score: %d layers were measured by an earlier run, which goes on", done)
    passes = {layer.path: measuring.passes[layer.path] for layer in missing}
    if missing:
        _announce(measuring, missing, sum(passes.values()))
    with Stage(None, "score", sum(passes.values()), unit="layer passes") as stage:
        for layer in missing:
            new = measuring.layer(layer, stage)
            arrays = {f"{name}/{key}": one for name, both in new.items()
                      for key, one in zip(("md", "kl"), both, strict=True)}  # fmt: skip
            parts.write(layer.path, arrays)
            found |= new
    return {m.name: found[m.name] for layer in measuring.runs.layers for m in layer.modules}


def _announce(measuring: Measuring, layers: Sequence[Layer], passes: int) -> None:
    """Say what it will take, from a first trial."""
    modules = [module for layer in layers for module in layer.modules]
    heads, neurons = (
        sum(module.units for module in modules if module.kind == kind)
        for kind in ("attention", "ffn")
    )
    tokens = max(measuring.runs.tokens(z) for z in range(len(measuring.runs.features)))
    seconds = measuring.seconds_per_pass(layers[0]) * passes
    group = measuring.options.group
    said = f"{neurons} neurons" + (f" in groups of {group}" if group > 1 else "")
    log.info(
        "score: %d heads, %s on %d tokens, %d passes of a layer, about %s%s",
        *(heads, said, tokens, passes),
        duration(seconds),
        "; groups of 16 neurons take less" if neurons > MANY and group == 1 else "",
    )


def importances(
    measured: Mapping[str, Measured], attentions: Collection[str], kl_weight: float
) -> tuple[dict[str, Numbers], float]:
    """Add up what was measured: the changes of all features, and those of the logits.

    Args:
        measured: by name of the module.
        attentions: names of those that are attentions.
        kl_weight: how much the logits count, relative to the features.

    Returns:
        Importances (units,) by name, and the number that brings changes of logits to the size of
        those of features: the mean of these over that of those, over all heads.
    """
    features, logits = (
        float(np.concatenate([pick(measured[name]) for name in attentions]).mean())
        for pick in (lambda one: one[0].sum(1), lambda one: one[1])
    )
    scale = features / logits if logits > 0 else 0.0
    return {name: md.sum(1) + kl_weight * scale * kl for name, (md, kl) in measured.items()}, scale


def _measure(dense: Checkpoint, texts: Texts | None, options: Any, has_features: bool) -> Scores:
    assert texts is not None  # it reads them
    base.require_targets(dense, texts)
    model: nn.Module = dense.model
    device = next(model.parameters()).device
    ranker = TRAJECTORY if has_features else LOGIT_KL
    parts = base.Parts.of(base.origin_of(ranker, dense, texts, options), options.checkpoints)
    with (
        parts,
        eval_mode(model),
        torch.inference_mode(),
        full_float32(device),
        kernels.for_cpu(model, device, _longest(dense, texts)),
    ):
        measured = _by_layer(Measuring(dense, texts, options, has_features), parts)
    for name, both in measured.items():
        if not all(np.isfinite(one).all() for one in both):
            raise UserError(f'"{name}": what its units change is not finite; check the weights.')
    if not has_features:
        return Scores(units={n: UnitImportance(kl, {"kl": kl}) for n, (_, kl) in measured.items()})
    kinds = {module.name: module.kind for module in dense.family.modules(model)}
    attentions = [name for name in measured if kinds[name] == "attention"]
    found, scale = importances(measured, attentions, options.kl_weight)
    units = {
        name: UnitImportance(found[name], {"md": md, "kl": kl})
        for name, (md, kl) in measured.items()
    }
    return Scores(units=units, constants={"kl_scale": scale})


def _longest(dense: Checkpoint, texts: Texts) -> int:
    """Tokens of the longest sample, of any stack."""
    masks = [dense.family.valid_tokens(dense.model, batch) for batch in texts.batches()]
    return max(mask.shape[1] for by_stack in masks for mask in by_stack.values())


TRAJECTORY = Ranker(
    name="trajectory",
    reference="Khaki and Plataniotis 2024, OPTIN (arXiv 2403.17921)",
    measure=partial(_measure, has_features=True),
    options=TrajectoryOptions,
    reads_texts=True,
    tokens=TOKENS,
)
LOGIT_KL = Ranker(
    name="logit_kl",
    reference="the term of the logits in OPTIN (arXiv 2403.17921), by itself",
    measure=partial(_measure, has_features=False),
    options=MaskingOptions,
    reads_texts=True,
    tokens=TOKENS,
)
