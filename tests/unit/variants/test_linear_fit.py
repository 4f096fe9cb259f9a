"""Fits of last linears: errors and coefficients against plain products over the inputs."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from composable.formats.config import Entry
from composable.linalg import solver
from composable.linalg.grams import Gram
from composable.variants.last_linear import LastLinear
from composable.variants.linear_fit import fit_linear
from composable.variants.pruning import make_variants
from tests import tiny


def inputs(tokens: int, width: int, seed: int) -> Tensor:
    """Correlated, and not around 0."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return 0.2 + torch.randn(tokens, width, generator=random) @ mixed


def moments(x: Tensor) -> Gram:
    """Exact ones."""
    rows = x.double()
    return Gram(rows.T @ rows, rows.sum(0), len(x))


def problem(layout: str) -> Any:
    """Down projection of an ffn: neurons gone, also with weights of its own; weights gone."""
    dense = tiny.dense(layout)
    modules = dense.family.modules(dense.model)
    ffn = next(module for module in modules if module.kind == "ffn")
    names = {ffn.name: [Entry(0.25), Entry(0.5)], ffn.output_path: [Entry(0.5)]}
    units, half, mask = make_variants(dense, names, tiny.BY_WEIGHTS)
    changed = half.tensors[f"{ffn.output}.weight"]
    half.tensors[f"{ffn.output}.weight"] = changed * (1 + 0.2 * torch.randn(changed.shape))
    whole = LastLinear.of(dense.model, ffn)
    alone = next(module for module in modules if module.name == ffn.output_path)
    return [
        (whole, {"units": units, "changed": half}),
        (LastLinear.of(dense.model, alone), {"mask": mask}),
    ]


@pytest.mark.parametrize("layout", ["bert", "llama"])
@pytest.mark.parametrize(("tokens", "better"), [(400, "ls"), (12, "pruned")])
def test_errors_are_those_over_the_inputs(layout: str, tokens: int, better: str) -> None:
    """With 12 tokens the refit learns them by heart, so weights as pruned are taken."""
    for linear, variants in problem(layout):
        width = linear.weight.shape[1] - linear.has_bias
        texts = inputs(tokens, width, 1), inputs(300, width, 2)
        refit = functools.partial(solver.solve, ridge=0.0 if tokens < 20 else 1e-2)
        found = fit_linear(linear, variants, tuple(map(moments, texts)), refit)
        rows = [torch.cat([x.double(), torch.ones(len(x), linear.has_bias)], 1) for x in texts]

        def mean_square(weight: Tensor, side: int, rows: list[Tensor] = rows) -> float:
            return float((rows[side] @ weight.double().T).square().mean())

        assert found.keys() == variants.keys()
        for name, fits in found.items():
            own = variants[name]
            for kind, fit in fits.items():
                one = own.tensors | fit.tensors
                places = linear._places(own)
                weight = torch.zeros_like(linear.weight)
                weight[:, places] = torch.cat(
                    [
                        part.reshape(len(weight), -1)
                        for end in ("weight", "bias")
                        if (part := one.get(f"{linear.prefix}{end}")) is not None
                    ],
                    1,
                )
                change = weight - linear.weight
                assert fit.held_out == pytest.approx(mean_square(change, 1), rel=1e-6)
                assert fit.norm == pytest.approx(mean_square(linear.weight, 1), rel=1e-6)
                if kind == "ls" or better == "pruned":
                    size = mean_square(linear.weight, 0)
                    wanted = pytest.approx(mean_square(change, 0), rel=1e-6, abs=1e-12 * size)
                    assert fit.train == wanted
                else:
                    assert fit.train is None
            assert min(fits, key=lambda kind: fits[kind].held_out) == better
            assert fits["pruned"].largest_coefficient is None
            assert fits["ls"].seconds > fits["pruned"].seconds == 0


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_lost_neurons_have_a_coefficient(layout: str, ridge: float) -> None:
    """Also where the method changed the weights; without a ridge all by numpy's lstsq."""
    for linear, variants in problem(layout):
        width = linear.weight.shape[1] - linear.has_bias
        x = inputs(400, width, 1)
        refit = functools.partial(solver.solve, ridge=ridge)
        found = fit_linear(linear, variants, (moments(x), moments(x)), refit)
        rows = np.hstack([x.double().numpy(), np.ones((400, int(linear.has_bias)))])
        for name, fits in found.items():
            fit = fits["ls"]
            if name == "mask":
                assert fit.largest_coefficient is None
                continue
            kept = linear._places(variants[name]).tolist()
            removed = sorted({*range(rows.shape[1])} - {*kept})
            block = rows[:, kept].T @ rows[:, kept]
            block += ridge * np.diag(np.diag(block))
            wanted = np.linalg.solve(block, rows[:, kept].T @ rows[:, removed])
            assert fit.largest_coefficient == pytest.approx(np.abs(wanted).max(), rel=1e-6)
            if ridge == 0:
                outputs = rows @ linear.weight.double().numpy().T
                direct = np.linalg.lstsq(rows[:, kept], outputs, rcond=None)[0].T
                ends = [fit.tensors[f"{linear.prefix}weight"].numpy()]
                if linear.has_bias:
                    ends.append(fit.tensors[f"{linear.prefix}bias"].numpy()[:, None])
                np.testing.assert_allclose(np.hstack(ends), direct, rtol=1e-4, atol=1e-4)
