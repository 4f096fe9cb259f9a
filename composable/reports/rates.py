"""What a configuration is called in tables and pictures: its rates, by kind of what goes."""

from collections.abc import Sequence

from composable import families
from composable.formats.config import Configuration, all_covered, covered

#: What is removed at a rate between 0 and 1, by kind of module, in the order of a name.
REMOVED = {"attention": "heads", "ffn": "neurons", "linear": "weights"}


def names(configurations: Sequence[Configuration]) -> list[str]:
    """Name configurations by their numbers, which `-n` takes, and their rates.

    Returns:
        For each a name like "0: heads 25 %, weights 30 %". Where the rates of a kind differ from
        module to module it has the lowest and the highest: "heads 0 to 50 %". A module that only
        other configurations list is untouched in this one.
    """
    known = dict.fromkeys(name for one in configurations for name in one)
    return [f"{i}: {_rates(one, list(known))}" for i, one in enumerate(configurations)]


def _rates(configuration: Configuration, known: list[str]) -> str:
    rates: dict[str, list[float]] = {}
    decided = [name for name in known if not _lies_in_removed(name, configuration)]
    for name in decided:
        entry = configuration.get(name)
        rates.setdefault(families.kind_of(name) or "linear", []).append(entry.rate if entry else 0)
    found = [
        _range(word, kind, rates[kind])
        for kind, word in REMOVED.items()
        if any(rate > 0 for rate in rates.get(kind, ()))
    ]
    if layers := _removed_layers(configuration):
        found.append(f"{layers} layer{'s' if layers > 1 else ''} removed")
    return ", ".join(found) or "nothing removed"


def _lies_in_removed(name: str, configuration: Configuration) -> bool:
    """Tell whether a module is untouched only because what it is a part of loses something."""
    if name in configuration and configuration[name].rate > 0:
        return False
    return any(
        families.contains(whole, name)
        for other, entry in configuration.items()
        if entry.rate > 0
        for whole in covered(other, entry)
    )


def _removed_layers(configuration: Configuration) -> int:
    layers = {n: e for n, e in configuration.items() if families.kind_of(n) == "layer"}
    return len(all_covered({name: entry for name, entry in layers.items() if entry.rate == 1}))


def _range(word: str, kind: str, rates: list[float]) -> str:
    """Say one rate, or the lowest and the highest; of a single module that it is one only."""
    lowest, highest = min(rates), max(rates)
    if f"{lowest:.2f}" != f"{highest:.2f}":
        return f"{word} {100 * lowest:.0f} to {100 * highest:.0f} %"
    percent = f"{100 * highest:.1f}".removesuffix(".0") if lowest == highest else ""
    single = f" of one {kind}" if len(rates) == 1 else ""
    return f"{word} {percent or f'{100 * highest:.0f}'} %{single}"
