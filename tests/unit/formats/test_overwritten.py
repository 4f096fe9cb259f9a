"""Files that another program overwrites in place, as cp does, while they are read."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from composable.errors import FormatError
from composable.formats import sealed_file
from composable.formats.bundle import Bundle, Variant, open_bundle, write
from composable.formats.config import Entry
from composable.formats.container import Data
from composable.models import checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model files of equal size."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        checkpoint.save(folder / f"{seed}.pth", tiny.checkpoint(seed))
    assert (folder / "0.pth").stat().st_size == (folder / "1.pth").stat().st_size
    return folder / "0.pth", folder / "1.pth"


def at_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, act: Callable[[], Any]
) -> list[int]:
    """Act before call `number` of a function, counted from 0; return a list that counts them."""
    calls: list[int] = []
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        if len(calls) == number:
            act()
        calls.append(number)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or None and the message of its FormatError."""
    try:
        return call(), ""
    except FormatError as error:
        return None, str(error)


@pytest.mark.parametrize("damage", ["other", "cut", "one byte"])
def test_a_model_is_the_one_that_was_verified(
    damage: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.pth"
    first = models[0].read_bytes()
    by_hash = {hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
               for p in checkpoint.load(models[0]).model.parameters()}  # fmt: skip
    content = {
        "other": models[1].read_bytes(),
        "cut": b"",
        "one byte": first[: len(first) // 2] + bytes([first[len(first) // 2] ^ 1])
        + first[len(first) // 2 + 1 :],
    }[damage]  # fmt: skip

    def overwrite() -> None:
        with path.open("r+b") as file:  # the file stays the same one, as with cp
            file.truncate(len(content))
            file.write(content)

    outcomes = []
    for number in range(20):
        path.write_bytes(first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sealed_file, "PIECE", 4096)
            calls = at_call(patch, sealed_file._Verified, "_verified", number * 30, overwrite)
            found, said = outcome(lambda: checkpoint.load(path))
        if found is None:
            assert said == (
                f"{path}: was overwritten while it was read; run the command again when it is "
                "complete."
            )
            outcomes.append("refused")
            continue
        if len(calls) <= number * 30:
            break
        parameters = [p.detach().numpy().tobytes() for p in found.model.parameters()]
        assert {hashlib.sha256(each).hexdigest() for each in parameters} == by_hash
        outcomes.append("old")
    assert outcomes.count("refused") >= 3


def test_a_model_overwritten_while_it_is_verified(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.pth"
    for number in (1, 3, 20):
        shutil.copy(models[0], path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sealed_file, "PIECE", 4096)
            at_call(patch, sealed_file, "_digest", number, lambda: shutil.copy(models[1], path))
            with pytest.raises(FormatError, match=r"m\.pth: checksum does not match"):
                checkpoint.load(path)


def test_a_model_does_not_change_once_it_is_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    shutil.copy(models[0], path)
    found, expected = checkpoint.load(path), checkpoint.load(models[0])
    shutil.copy(models[1], path)
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


def digests(path: Path) -> dict[str, str]:
    return {variant.module: variant.digest for variant in open_bundle(path, "f").load_all()}


def _bundle(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(128, 256, generator=generator) for _ in range(3)]
    variants = [
        Variant(f"m.{i}", "linear", Entry(0.5, "l1"), tensors={"weight": weight * (weight > 0)},
                masks={"weight": weight > 0})
        for i, weight in enumerate(weights)
    ]  # fmt: skip
    write(path, Bundle("f", variants))
    return path


@pytest.mark.parametrize("replace", ["in place", "renamed"])
def test_a_bundle_gives_the_old_variants_or_none(replace: str, tmp_path: Path) -> None:
    other, path = _bundle(tmp_path / "other.npy", 1), tmp_path / "b.npy"

    def act() -> None:
        if replace == "in place":
            shutil.copy(other, path)
        else:
            Path(shutil.copy(other, tmp_path / "copy.npy")).replace(path)

    outcomes = []
    for number in range(2, 20):
        old = digests(_bundle(path, 0))
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, Data, "read", number, act)
            found, said = outcome(lambda: digests(path))
        if found is None:
            assert "is damaged (" in said
            outcomes.append("refused")
            continue
        assert found == old
        outcomes.append("old")
        if len(calls) <= number:
            break
    assert outcomes.count("refused") == (len(outcomes) - 1 if replace == "in place" else 0)


def test_a_bundle_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """As cp begins; memory that was mapped would end the process by a signal."""
    reader = open_bundle(_bundle(tmp_path / "b.npy", 0))
    (tmp_path / "b.npy").write_bytes(b"")
    with pytest.raises(FormatError, match="the file was cut off while it was read"):
        reader.load(reader.records[0])


def test_numbers_are_copies(tmp_path: Path) -> None:
    path = _bundle(tmp_path / "b.npy", 0)
    reader = open_bundle(path)
    variant = reader.load(reader.records[0])
    before = variant.tensors["weight"].clone()
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(np.full(64, 255, np.uint8).tobytes())
    assert torch.equal(variant.tensors["weight"], before)
