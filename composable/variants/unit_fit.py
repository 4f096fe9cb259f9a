"""Train the variants of a module that lost units, then those whose last linear is masked, too."""

import dataclasses
import time
from collections.abc import Mapping

from composable.calibration.recorded_calls import RecordedModule
from composable.formats.bundle import Variant
from composable.models.checkpoint import Checkpoint
from composable.variants import unit_phase
from composable.variants.last_linear import LastLinear
from composable.variants.linear_fit import Refit, fit_output
from composable.variants.store import Fit, Fits, best
from composable.variants.unit_phase import Trained


def fit_units(
    dense: Checkpoint,
    linear: LastLinear,
    variants: Mapping[str, Variant],
    solved: Mapping[str, Fits],
    recorded: RecordedModule,
    phase: unit_phase.Settings,
    refit: Refit,
) -> dict[str, Fits]:
    """Train all linears of all variants of an attention or ffn that lost units.

    Units train with the whole last linear, once for all variants that then have the same weights.
    Variants with a masked one get it refitted to what the trained units give it, and train on with
    their mask.

    Args:
        dense: the dense model, within `recorded_modules`.
        linear: the module's last linear.
        variants: digest -> variant.
        solved: digest of a variant, and of it unmasked -> fits "pruned" and "ls".
        recorded: the module and its calls.
        phase: settings of the training of units; see `second_phase` for that with a mask.
        refit: of the masked linear in between, see `linear_fit.fit_linear`.

    Returns:
        The same digests -> fit "trained".
    """
    started = time.perf_counter() - recorded.seconds
    unmasked = {digest: linear.unmasked(variant) for digest, variant in variants.items()}
    units_of = {digest: variant.digest for digest, variant in unmasked.items()}
    masked = {digest: units for digest, units in units_of.items() if digest != units}
    starts = {}
    for variant in unmasked.values():
        fits = solved[variant.digest]
        tensors = variant.tensors | fits[best(fits)].tensors
        starts[variant.digest] = dataclasses.replace(variant, tensors=tensors)
    trained = unit_phase.train(dense, starts, recorded, phase, set(masked.values()))
    results = {digest: trained[units] for digest, units in units_of.items()}
    seconds = dict.fromkeys(variants, (time.perf_counter() - started) / len(variants))
    if masked:
        started = time.perf_counter()
        pairs = {d: _refitted(linear, variants[d], results[d], refit) for d in masked}
        results |= unit_phase.train(dense, pairs, recorded, second_phase(phase))
        for digest in masked:
            seconds[digest] += (time.perf_counter() - started) / len(masked)
    found: dict[str, Fits] = {}
    for digest, units in units_of.items():
        result, known = results[digest], solved[digest][best(solved[digest])]
        is_new = result.is_better or trained[units].is_better
        # weights that stayed must not win or lose against themselves by rounding
        error = result.error if is_new else known.held_out
        found[digest] = {
            "trained": Fit(result.tensors, result.training_loss, error, known.norm, seconds[digest])
        }
    return found


def second_phase(phase: unit_phase.Settings) -> unit_phase.Settings:
    """Return the settings for units that were trained already: half as long, half the step."""
    return dataclasses.replace(phase, epochs=-(-phase.epochs // 2), lr=phase.lr / 2)


def _refitted(linear: LastLinear, variant: Variant, trained: Trained, refit: Refit) -> Variant:
    """Give a variant trained units, and its masked last linear refitted to them."""
    assert trained.moments is not None
    whole = dataclasses.replace(variant, tensors=trained.tensors)
    refitted = fit_output(linear, whole, trained.moments, refit)
    return dataclasses.replace(whole, tensors=whole.tensors | refitted)
