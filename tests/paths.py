"""Where the repository is, and the data that lies beside it on some machines."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Data and results of other programs; tests that need them skip where they are absent.
SHARED = Path(os.environ.get("COMPOSABLE_SHARED") or ROOT.parent / "shared").resolve()
