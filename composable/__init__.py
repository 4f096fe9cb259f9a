"""Prune a pretrained transformer into a family of models out of shared, once-tuned parts."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composable import depth
    from composable.api.choice import configuration, rank
    from composable.api.models import evaluate, fine_tune, load
    from composable.api.variants import compose, fit, prune

__version__ = "0.1.0"
__all__ = [
    "compose", "configuration", "depth", "evaluate", "fine_tune", "fit", "load", "prune", "rank",
]  # fmt: skip
#: Where each of them is; it is imported, and torch with it, when it is first asked for.
_PLACES = {
    "compose": "api.variants",
    "configuration": "api.choice",
    "depth": "depth",
    "evaluate": "api.models",
    "fine_tune": "api.models",
    "fit": "api.variants",
    "load": "api.models",
    "prune": "api.variants",
    "rank": "api.choice",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PLACES[name]}")
    return module if name == "depth" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
