"""Where the repository is, and what lies beside it on some machines."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Data and reference results for tests that skip where it is absent.
SHARED = ROOT.parent / "shared"
