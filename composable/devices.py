"""Where to compute and in which number type: which GPU, and whether bfloat16 pays."""

import os
import re

import torch

from composable.errors import UserError

#: Instructions of a CPU that computes in bfloat16.
NATIVE_BFLOAT16 = ("avx512_bf16", "amx_tile")


def select_device(device: str) -> str:
    """Turn auto, cuda:1 and the like into cpu or cuda, and hide all GPUs but the chosen one."""
    name, _, index = device.partition(":")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device, re.ASCII):
        raise UserError(f"device {device}: expected auto, cpu, cuda or cuda:N.")
    if name == "cuda" and index and not torch.cuda.is_initialized():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        listed = [str(int(index))] if visible is None else visible.split(",")[int(index) :]
        if not listed:
            raise UserError(f"device {device}: CUDA_VISIBLE_DEVICES is {visible!r}; count from 0.")
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[0]
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError(f"device {device}: no CUDA device is available; use cpu.")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


def select_dtype(dtype: str, device: str, trains: bool = True) -> str:
    """Turn auto or the name of a number type into float32, bfloat16 or float16.

    Args:
        dtype: auto takes bfloat16 where the hardware computes in it, else float32.
        device: from `select_device`.
        trains: on a CPU only a training gains from bfloat16.
    """
    if dtype != "auto":
        return dtype
    if device == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        tests = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in NATIVE_BFLOAT16)
        has_it = trains and any(test() for test in tests if test)
    return "bfloat16" if has_it else "float32"
