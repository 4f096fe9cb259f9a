"""Which heads and neurons go, on small models: MiniLM and the embedded T5."""

from benchmarks.context import Context
from benchmarks.page import Section
from benchmarks.unit_choice import section, small_models, try_methods


def measure(context: Context) -> Section:
    """Try all methods on both models."""
    setups = small_models(context)
    return section(
        "Which units go, on small models", setups,
        [try_methods(context, setup) for setup in setups],
        [("BERT", "text_classification"), ("T5", "translation")],
        "As [above](#which-units-go). Of MiniLM's 12 heads 20 % is 2, of T5's 6 it is 1. "
        "Differences of scores below a point are noise, those of the errors are not.",
    )  # fmt: skip
