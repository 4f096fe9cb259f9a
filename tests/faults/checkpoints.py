"""What unfinished trainings leave: all files of their folders, damaged and crafted."""

import shutil
from pathlib import Path
from typing import Any

from tests.faults import documents as form
from tests.faults import sound
from tests.faults.corruption import Corruption
from tests.faults.runner import Kind, Pool

IN_CHECKPOINTS = {
    ".json": form.JSON, ".safetensors": form.SAFETENSORS, ".part": form.PART, "": form.TORCH,
}  # fmt: skip


def _kind(name: str, training: str) -> Kind:
    command = sound.TRAININGS[training]
    results = tuple(str(each) for each in command if str(each).startswith("trained"))
    needs = (*sound.CHAIN_FILES, "checkpoints")
    files = ("checkpoints/**/*",)
    return Kind(name, files, needs, (command,), results, is_sealed=True, documents=IN_CHECKPOINTS)


#: Name of a row -> the training, and what is damaged.
CHECKPOINTS: dict[str, tuple[str, Kind]] = {
    name: (training, _kind(name, training))
    for name, training in (
        ("checkpoint of a training", "baseline"),
        ("checkpoint of module-level training", "block_level"),
        ("parts of least squares", "ls"),
        ("parts of hybrid", "hybrid"),
    )
}


class Left(Corruption):
    """The folder of an unfinished training; the same command goes on from it."""

    def __init__(self, name: str, home: Path, pool: Pool, place: Path):
        training, kind = CHECKPOINTS[name]
        left = place / f"left_{training}"
        with pool.place() as (server, _):
            sound.leave_checkpoints(server, home, training, left)
        super().__init__(kind, left, pool)

    def _bring(self, folder: Path) -> None:
        """Copies, no links: some files of a run are written in place."""
        shutil.copytree(self.home, folder, dirs_exist_ok=True)

    def seal(self, folder: Path, name: str, case: dict[str, Any]) -> None:
        """Make the digests right again, as the program itself makes them."""
        if "seed" in case:
            return
        from composable import runs

        path = folder / name
        if path.suffix == ".part":
            runs.write_sealed(path, path.read_bytes())
        elif path.name != runs.SEAL and (path.parent / runs.SEAL).exists():
            (path.parent / runs.SEAL).unlink()
            runs.seal(path.parent)
