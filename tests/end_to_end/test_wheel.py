"""A wheel of the package: installs, imports, and carries the embedded model and captions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.nightly
def test_the_wheel_has_all_it_needs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves build/ where it builds
    ignored = shutil.ignore_patterns(".*", "out", "data", "model", "build", "checkpoints")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([*pip, "wheel", "--no-deps", str(source), "-w", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("composable-*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = (
        "import composable; from composable import tasks; from composable.models import hub;"
        "folder, _ = hub.resolve_model('embedded');"
        "corpus = tasks.by_name('translation').read('embedded', None, 'test', None);"
        "print(composable.__file__, folder, len(corpus.source), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    package, folder, count = ran.stdout.decode().split("\n")[:3]
    assert Path(package).is_relative_to(target)
    assert Path(folder).is_relative_to(target)
    assert int(count) == 130
