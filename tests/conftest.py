"""What all tests share: one thread, and a tiny corpus."""

import logging
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes too

from collections.abc import Iterator

import pytest
import torch

from composable.tasks import translation
from composable.tasks.translation import Corpus
from tests import tiny

# a shell that starts the tests in the background leaves Ctrl-C ignored, here and in child processes
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads are ordered by chance; tolerances are for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    """A command sets the level of the log; the next test must not find it so."""
    log = logging.getLogger("composable")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """Training and validation sentences of a word-for-word language."""
    folder = tiny.corpus(tmp_path_factory.mktemp("corpus"), pairs=44)
    return translation.read_corpus(folder, "train"), translation.read_corpus(folder, "valid")
