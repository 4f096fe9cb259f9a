"""Cases of damaged and crafted files: made by number, run, judged."""

import csv
import json
import os
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

from tests.end_to_end.forked import Server
from tests.faults import craft, damage, runner, sound
from tests.faults.documents import Document
from tests.faults.runner import Job, Kind, Pool, Trial

#: What a document says of an edit that cannot be written, or of a file that is no tree.
UNWRITABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError),
    *(csv.Error, pickle.PickleError),
)
FOUND = Path(__file__).parent / "found"


class Corruption:
    """One kind of file, its sound state, and what is read of that."""

    def __init__(self, kind: Kind, home: Path, pool: Pool):
        self.kind, self.home, self.pool = kind, home, pool
        names = {path for pattern in kind.files for path in home.glob(pattern) if path.is_file()}
        names = {path for path in names if path.name != "lock"}  # without a content that is read
        self.files = sorted(str(path.relative_to(home)) for path in names)
        assert self.files, f"{kind.name}: no file {kind.files} in {home}"
        with pool.place() as (server, folder):
            self._bring(folder)
            ended = runner.run(server, kind.commands, folder)
            assert ended.code == 0, f"{kind.name}: {ended.err}"
            self.expected = {
                each: runner.digest(folder, each) for each in (kind.results, kind.answers)
            }

    def random(self, count: int) -> list[Trial]:
        """Damage files by chance, so many times, always in the same ways."""
        first = zlib.crc32(self.kind.name.encode())
        cases = [{"seed": first + number} for number in range(count)]
        return self.run("random damage", cases)

    def crafted(self, count: int) -> list[Trial]:
        """Edit what files say, so many times, always in the same ways, and seal them."""
        cases: list[dict[str, Any]] = []
        for edit in craft.edits(3 * count, zlib.crc32(self.kind.name.encode())):
            if len(cases) < count and self._content(edit) is not None:
                cases.append(edit)
        return self.run("crafted content", cases)

    def kept(self) -> list[Trial]:
        """Repeat what failed once, from the folder `found`."""
        path = FOUND / f"{slug(self.kind.name)}.json"
        cases = json.loads(path.read_text()) if path.exists() else []
        stale = [case for case in cases if self._content(case) is None]
        assert not stale, f"{path}: these change nothing any more: {stale}"
        return self.run("kept cases", cases)

    def run(self, fault: str, cases: list[dict[str, Any]]) -> list[Trial]:
        """Run cases side by side."""
        return self.pool.run([self._job(fault, case) for case in cases])

    def _job(self, fault: str, case: dict[str, Any]) -> Job:
        def job(server: Server, folder: Path) -> Trial:
            made = self._content(case)
            assert made is not None
            name, content, is_other_sound, path = made
            self._bring(folder)
            (folder / name).unlink()
            (folder / name).write_bytes(content)
            self.seal(folder, name, case)
            ended = runner.run(server, self.kind.commands, folder)
            results = (
                self.kind.results if "seed" in case else self.kind.answers or self.kind.results
            )
            found, expected = runner.digest(folder, results), self.expected[results]
            outcome, said = runner.judge(ended, found, expected, is_other_sound)
            return Trial(self.kind.name, fault, {"file": name, **case, **path}, outcome, said)

        return job

    def seal(self, folder: Path, name: str, case: dict[str, Any]) -> None:
        """Make seals right that lie in other files, of crafted contents."""

    def _bring(self, folder: Path) -> None:
        sound.copy(self.home, folder, self.kind.needs)

    def _content(self, case: dict[str, Any]) -> tuple[str, bytes, bool, dict[str, Any]] | None:
        """The file, its content in this case, whether it may be sound, what was edited.

        None where nothing changed, or nothing could be written.
        """
        number = case["seed"] if "seed" in case else case.get("at", 0) // 2
        name = case.get("file") or self.files[number // 9 % len(self.files)]
        data = (self.home / name).read_bytes()
        if "seed" in case:
            return name, damage.damaged(data, case["seed"]), not self.kind.is_sealed, {}
        document = self._document(name)
        try:
            tree, path, is_sound = craft.apply(document.read(data), case)
            content = document.write(tree, path)
        except (*UNWRITABLE, ArithmeticError):
            return None
        if content == data:
            return None
        is_free = re.search(self.kind.free, "/".join(map(str, path))) is not None
        is_sound = (is_sound or is_free) and case.get("must") != "refuse"
        return name, content, is_sound, {"path": list(path)}

    def _document(self, name: str) -> Document:
        ends = [end for end in self.kind.documents if name.endswith(end)]
        found: Document = self.kind.documents[max(ends, key=len)]
        return found


def slug(name: str) -> str:
    """Name of a file for a name of a row."""
    return "".join(each if each.isalnum() else "_" for each in name)


def keep(trials: list[Trial], limit: int = 12) -> None:
    """Add cases that failed to the folder `found`, one of each way to fail."""
    FOUND.mkdir(exist_ok=True)
    for kind in {trial.kind for trial in trials}:
        path = FOUND / f"{slug(kind)}.json"
        cases = json.loads(path.read_text()) if path.exists() else []
        ways = {
            trial.said.split("(")[-1] + trial.outcome: trial.case
            for trial in trials
            if trial.kind == kind
        }
        cases += [case for case in list(ways.values())[:limit] if case not in cases]
        path.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")


def keeps() -> bool:
    """Whether failures are to be kept: COMPOSABLE_KEEP is set."""
    return bool(os.environ.get("COMPOSABLE_KEEP"))
