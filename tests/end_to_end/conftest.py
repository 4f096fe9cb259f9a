"""A tiny model with all files of the chain, and the scripts called in this process as users do."""

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from composable.models import checkpoint
from tests import tiny
from tests.end_to_end.forked import Ended
from tests.paths import ROOT

#: The warnings that Python shows by itself; pytest would swallow them.
SHOWN = [("default", UserWarning), ("default", FutureWarning), ("default", RuntimeWarning)]


def load_script(name: str) -> ModuleType:
    """Import a top-level script from its path, not from wherever Python finds the name."""
    spec = importlib.util.spec_from_file_location(f"script_{name[:-3]}", ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: str, *args: Any, cwd: Path) -> Ended:
    """Run a script in this process, in folder `cwd`, with the environment put back afterwards.

    stderr has all that a process of its own would write there: log lines, warnings, the error.
    """
    main = load_script(script).main
    out, err, code = io.StringIO(), io.StringIO(), None
    with _surroundings(cwd, out, err):
        try:
            main.main(args=[str(arg) for arg in args], standalone_mode=True)
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int), f"{script} ended with {code!r}, not with an exit code"
    return Ended(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _surroundings(cwd: Path, out: io.StringIO, err: io.StringIO) -> Iterator[None]:
    environment, root = dict(os.environ), logging.getLogger()
    verbosity = transformers.logging.get_verbosity()
    handlers, level = root.handlers, root.level
    foreign = [
        h for name in ("transformers", "accelerate") for h in logging.getLogger(name).handlers
    ]
    streams = [h for h in foreign if isinstance(h, logging.StreamHandler)]
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(cwd)
        os.environ.pop("COMPOSABLE_WORKDIR", None)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda text, kind, *_: err.write(f"{kind.__name__}: {text}\n")
        for action, kind in SHOWN:
            warnings.simplefilter(action, kind)  # type: ignore[arg-type]
        transformers.logging.set_verbosity_error()  # cli.py asks for it before the first import
        root.handlers = []  # pytest's would keep basicConfig from logging to stderr
        before = [(handler, handler.setStream(err)) for handler in streams]
        try:
            yield
        finally:
            transformers.logging.set_verbosity(verbosity)
            root.handlers = handlers
            root.setLevel(level)
            logging.getLogger("composable").setLevel(logging.NOTSET)
            for handler, stream in before:
                handler.setStream(stream or sys.__stderr__)
            os.environ.clear()
            os.environ.update(environment)


@dataclass(frozen=True)
class Workshop:
    """Files of a finished chain that tests read and never change.

    Attributes:
        folder: holds them all.
        model: a dense model whose corpus is `corpus`.
        other: another dense model of the same shape.
        corpus: 60 training pairs.
        conf: the configurations that config_generator.py makes by default.
        scheme: their conf_prune.json.
        modules: the variants of the scheme.
        finetuned: the same, fine-tuned.
        composed: configuration 0 of `modules`.
        stats: losses of the fine-tuning.
    """

    folder: Path
    model: Path
    other: Path
    corpus: Path
    conf: Path
    scheme: Path
    modules: Path
    finetuned: Path
    composed: Path
    stats: Path


def save_model(path: Path, corpus: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model that knows where its corpus is."""
    made = tiny.checkpoint(seed, **changes)
    made.info["data"] = str(corpus)
    checkpoint.save(path, made)
    return path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """All files of a chain on a tiny model; at the end they must be as they were."""
    folder = tmp_path_factory.mktemp("workshop")
    corpus = tiny.corpus(folder / "corpus")
    save_model(folder / "model.pth", corpus)
    save_model(folder / "other.pth", corpus, seed=1)
    for script, args in (
        ("config_generator.py", "-m model.pth"),
        ("prune_scheme_generator.py", ""),
        ("prune.py", "-m model.pth --attention head_l1"),
        ("compose_model.py", "-m model.pth -o composed.pth"),
        ("block_level_finetuning.py", "-m model.pth --epochs 2 --device cpu"),
    ):
        assert call(script, "-q", *args.split(), cwd=folder).code == 0, script
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    names = ("model.pth", "other.pth", "corpus", "conf.json", "conf_prune.json", "modules.npy")
    made = (*names, "modules_finetuned.npy", "composed.pth", "stats_block.csv")
    before = _state(folder)
    yield Workshop(folder, *(folder / name for name in made))
    assert _state(folder) == before


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def files_in(folder: Path) -> list[str]:
    """All files below a folder, hidden and temporary ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
