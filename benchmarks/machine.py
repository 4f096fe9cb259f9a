"""What a figure depends on beside the code: machine, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "numpy")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Describe where and with what a run takes place.

    Args:
        device: cpu or cuda; the GPU is named where it was used.

    Returns:
        cpu, cores, memory_gb, gpu (or None), versions, commit, is_changed (None where git does
        not know), date.
    """
    commit = _git("rev-parse", "--short", "HEAD")
    # what a benchmark writes itself is no change of the program
    changed = _git("status", "--porcelain", "--", ".", ":!docs/benchmark*")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": _gpu() if device.startswith("cuda") else None,
        "versions": _versions(),
        "commit": commit,
        "is_changed": None if changed is None else bool(changed),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def name(facts: dict[str, Any]) -> str:
    """Name the machine in a few words."""
    gpu = f", {facts['gpu']}" if facts["gpu"] else ""
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB{gpu}"


def _versions() -> dict[str, str]:
    import composable

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"composable": composable.__version__}


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _gpu() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return text.splitlines()[0].strip() if text else None


def _git(*words: str) -> str | None:
    return _output("git", *words)


def _output(*words: str) -> str | None:
    """Return what a program prints; None where it is missing or fails."""
    try:
        found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
