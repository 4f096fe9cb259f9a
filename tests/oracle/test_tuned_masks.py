"""Tuned masks against least squares on explicit activations."""

import pytest
import torch
from torch import Tensor

from benchmarks import tuned_masks
from benchmarks.tuned_masks import scales, unit_products
from composable.formats.config import Entry
from composable.linalg.grams import Gram
from composable.variants import pruning
from tests import tiny

KEPT = {8: [0, 2, 3, 6], 3: [0, 2]}


def activations(units: int, size: int, tokens: int = 50) -> tuple[Tensor, Tensor]:
    """Draw inputs (tokens, units * size) that go together, and a weight (5, units * size)."""
    generator = torch.Generator().manual_seed(units)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mixed = draw(tokens, units * size) @ draw(units * size, units * size)
    return mixed, draw(5, units * size)


def outputs(inputs: Tensor, weight: Tensor, units: int) -> Tensor:
    """What every unit adds, one column a unit: (tokens * rows, units), token by token."""
    size = weight.shape[1] // units
    return torch.stack(
        [
            (inputs[:, i : i + size] @ weight[:, i : i + size].T).flatten()
            for i in range(0, units * size, size)
        ],
        dim=1,
    )


@pytest.mark.parametrize(("units", "size"), [(8, 1), (3, 4)], ids=["neurons", "heads"])
def test_scales_are_those_of_least_squares(units: int, size: int) -> None:
    inputs, weight = activations(units, size)
    columns, kept = outputs(inputs, weight, units), KEPT[units]
    products = unit_products(weight, inputs.T @ inputs, units)
    torch.testing.assert_close(products, columns.T @ columns, rtol=1e-10, atol=1e-10)
    found = scales(products, kept, ridge=0.0)
    wanted = torch.linalg.lstsq(columns[:, kept], columns.sum(1)).solution
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_the_ridge_pulls_toward_one() -> None:
    inputs, weight = activations(8, 1)
    columns, kept = outputs(inputs, weight, 8), KEPT[8]
    ridge = 0.3
    # rows that ask for no change, as heavy as the ridge says
    own = columns[:, kept]
    pull = torch.diag((ridge * own.square().sum(0)).sqrt())
    rows = torch.cat([own, pull])
    target = torch.cat([columns.sum(1), pull.diagonal()])
    found = scales(columns.T @ columns, kept, ridge)
    assert found is not None
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, target).solution)


def test_a_module_whose_scales_leave_the_range_stays_untuned() -> None:
    column = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    columns = torch.cat([column, 11 * column], dim=1)  # the one that is kept would have to be 12
    assert scales(columns.T @ columns, [0], ridge=0.0) is None
    columns[:, 1] = 8 * column[:, 0]
    torch.testing.assert_close(
        scales(columns.T @ columns, [0], ridge=0.0), torch.tensor([9.0], dtype=torch.float64)
    )


def test_units_that_are_always_zero_stay_as_they_are() -> None:
    inputs, weight = activations(8, 1)
    inputs[:, 2] = 0.0
    columns = outputs(inputs, weight, 8)
    found = scales(columns.T @ columns, KEPT[8])
    assert found is not None
    assert found[1] == 1.0
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("layout", ["t5", "bert", "llama"])
def test_scales_are_folded_into_what_reads_the_units(layout: str) -> None:
    dense = tiny.dense(layout)
    modules = [m for m in dense.family.modules(dense.model) if m.kind in ("attention", "ffn")]
    samples = {}
    for number, module in enumerate(modules):
        generator = torch.Generator().manual_seed(number)
        width = dense.model.get_parameter(f"{module.output_path}.weight").shape[1]
        samples[module.output_path] = torch.randn(90, width, generator=generator).abs()

    def moments(path: str) -> Gram:
        gram = Gram.zeros(samples[path].shape[1])
        gram.add(samples[path])
        return gram

    scheme = {module.name: [Entry(0.5)] for module in modules}
    variants = pruning.make_variants(dense, scheme, tiny.BY_WEIGHTS)
    tuned, untuned = tuned_masks.tune(dense, variants, moments)
    assert untuned == 0
    for module, before, after in zip(modules, variants, tuned, strict=True):
        name, kept = f"{module.output}.weight", before.kept_units
        assert kept is not None
        weight = dense.model.get_parameter(f"{module.output_path}.weight").detach()
        columns = outputs(samples[module.output_path], weight, module.units).double()
        own = columns[:, kept]
        pull = torch.diag((tuned_masks.RIDGE * own.square().sum(0)).sqrt())
        target = torch.cat([columns.sum(1), pull.diagonal()])
        wanted = torch.linalg.lstsq(torch.cat([own, pull]), target).solution
        size = before.tensors[name].shape[1] // len(kept)
        scaled = before.tensors[name] * wanted.float().repeat_interleave(size)
        torch.testing.assert_close(after.tensors[name], scaled, rtol=1e-4, atol=1e-6)
        others = [key for key in before.tensors if key != name]
        assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in others)
