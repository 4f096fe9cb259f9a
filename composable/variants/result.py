"""What module-level fine-tuning made of the variants, by whichever solver."""

from dataclasses import dataclass
from typing import Any

from composable.formats.bundle import Variant
from composable.runs import RunFolder


@dataclass
class Result:
    """What became of the variants.

    Attributes:
        variants: in the order given, with `error_before` and `error_after` in their stats: squared
            error over squared dense output on the held-out data.
        kept: whose weights each has: "pruned", "ls" or "trained"; None for a removed module.
        seconds: spent on each; what is spent on several counts in equal parts.
        rows: the stats, one per epoch; those of least squares are 0 as pruned, 1 solved, 2 after
            the training of modules that lost units.
        report: for the closing JSON report.
        is_main: whether this process writes the files.
        folder: finished parts or checkpoints, to be removed when the results are safe.
    """

    variants: list[Variant]
    kept: list[str | None]
    seconds: list[float]
    rows: list[dict[str, Any]]
    report: dict[str, Any]
    is_main: bool = True
    folder: RunFolder | None = None

    def clean_up(self) -> None:
        """Remove what an interrupted run would go on from."""
        if self.folder:
            self.folder.release(remove=True)
