"""device and dtype: what auto stands for, what is refused."""

import os

import pytest
import torch

from composable import devices
from composable.errors import UserError
from composable.training.options import Options


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:1", "auto:1", "cuda:-1", ""])
def test_unknown_device(device: str) -> None:
    with pytest.raises(UserError, match=r"expected auto, cpu, cuda or cuda:N\.$") as caught:
        devices.select_device(device)
    assert f"device {device}:" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_such_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "x")  # so that the end of the test removes it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    message = rf"^device {device}: no CUDA device is available; use cpu\.$"
    with pytest.raises(UserError, match=message):
        devices.select_device(device)
    assert devices.select_device("auto") == devices.select_device("cpu") == "cpu"


def test_device_counts_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(UserError, match=r"^device cuda:2: CUDA_VISIBLE_DEVICES is '4,7'"):
        devices.select_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.select_device("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize("native", [(), ("avx512_bf16",), ("amx_tile",)])
def test_auto_is_bfloat16_where_the_processor_has_it(
    native: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in native)
    expected = "bfloat16" if native else "float32"
    assert devices.select_dtype("auto", "cpu") == expected
    assert devices.select_dtype("auto", "cpu", trains=False) == "float32"
    for dtype in ("float32", "bfloat16", "float16"):
        assert devices.select_dtype(dtype, "cpu") == devices.select_dtype(dtype, "cuda") == dtype
    options = Options(
        epochs=1, batch_size=2, lr=1, early_stop=0, device="cpu", dtype="auto"
    ).resolved()
    assert (options.device, options.dtype) == ("cpu", expected)
    assert options.resolved() == options


def test_auto_asks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it, **_: has_it)
        for trains in (True, False):
            found = devices.select_dtype("auto", "cuda", trains)
            assert found == ("bfloat16" if has_it else "float32")
