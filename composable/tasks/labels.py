"""Names of classes: which labels are the same, which are missing, which output a class has."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from composable.errors import MismatchError, listed

_WHOLE = re.compile(r"(?:LABEL_)?([+-]?)0*([0-9]+)(?:\.0*)?", re.ASCII | re.IGNORECASE)
#: As numpy, C and others write a number; without the sign it may be a name of four letters.
_EXPONENT = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*)?e[+-][0-9]{1,2}", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-][0-9]{1,2})?", re.ASCII)
#: What pandas reads as missing where nothing else is said.
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


def same(label: str) -> str:
    """Return what stands for a label: 3 for "3", "3.0", "03", "3.0e+00" and "LABEL_3".

    Others stay as they are, but for letters that are written as one character or two (ü).
    """
    label = unicodedata.normalize("NFC", label)
    if _EXPONENT.fullmatch(label) and float(label).is_integer():
        label = str(int(float(label)))
    found = _WHOLE.fullmatch(label)
    if found is None:
        return label
    sign, digits = found.groups()
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels, each once: numbers by their value, then the others by the alphabet."""

    def place(label: str) -> tuple[bool, float, str]:
        is_number = _NUMBER.fullmatch(label) is not None
        return not is_number, float(label) if is_number else 0.0, label

    return tuple(sorted(set(labels), key=place))


def class_names(checkpoint: Any) -> list[str]:
    """Names of a classifier's outputs; where the model file has none, their numbers."""
    count = checkpoint.model.config.num_labels
    return [str(name) for name in checkpoint.info.get("labels") or range(count)]


def are_numbers(names: Sequence[str]) -> bool:
    """Tell whether names of outputs are no more than their numbers: 0, 1, 2, ..."""
    return [same(name) for name in names] == [str(number) for number in range(len(names))]


def class_ids(
    labels: Collection[str],
    known: Sequence[str],
    names: Sequence[str],
    documented: Sequence[str] = (),
    trusts_order: bool = False,
    numbers: Mapping[str, str] = MappingProxyType({}),
    where: Callable[[str], str] = lambda _: "the data",
) -> tuple[dict[str, int], str]:
    """Find the output of a model for every class.

    Args:
        labels: of the samples at hand.
        known: all classes of the data, of all splits, in their order.
        names: of the model's outputs.
        documented: classes in the order of their numbers, where the data set says it.
        trusts_order: `known` are in the model's order, where it has other names for all of them.
        numbers: what stands for the classes in the file, where that may be names of outputs.
        where: says for messages where a label is.

    Returns:
        Class -> number of the output, for all `labels` at least; and how they were brought
        together. By "name", whatever the case. By "number", where the labels are numbers, and the
        names are not. And if the names are but the numbers of the outputs, and there are as many
        classes: by "order", if it is documented, else by "alphabet", in which numbers come first
        and in their order.

    Raises:
        MismatchError: none of these is possible.
    """
    is_unnamed = are_numbers(names)
    # which number a class gets must not depend on the classes of one split
    wanted = known if is_unnamed else labels
    found = _by_name(known, names)
    if found.keys() >= {*wanted}:
        return found, "name"
    has_numbers = any(_WHOLE.fullmatch(name) for name in names)
    places = {str(number): number for number in range(len(names))}
    if not documented and not has_numbers and places.keys() >= {*known}:
        return {each: places[each] for each in known}, "number"
    stated = _by_name([numbers[each] for each in known if each in numbers], names)
    if numbers and {numbers.get(each) for each in wanted} <= stated.keys():
        return {each: stated[numbers[each]] for each in known if numbers[each] in stated}, "number"
    if len(known) == len(names) and (is_unnamed or (trusts_order and not found)):
        how = "order" if documented or trusts_order else "alphabet"
        return {each: number for number, each in enumerate(known)}, how
    said = f"{listed(names, 10)} ({len(names)})"
    if is_unnamed:
        raise MismatchError(
            f"the data has the classes {listed(known, 10)} ({len(known)}) in all its splits, the "
            f"model {said}; the same names, or as many without names, were expected; correct the "
            "labels, or take a model with as many outputs."
        )
    unknown = next(label for label in labels if label not in found)
    is_double = same(unknown).lower() in {same(name).lower() for name in names}
    what = "is the name of several" if is_double else "is none"
    raise MismatchError(
        f'{where(unknown)}: the class "{unknown}" {what} of the model\'s, which are {said}; '
        "correct it, or take a model that has it."
    )


def _by_name(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Find the labels that are names, whatever the case; not what two outputs are called."""
    exact = _single([same(name) for name in names])
    folded = _single([same(name).lower() for name in names])
    both = {each: exact.get(same(each), folded.get(same(each).lower())) for each in labels}
    return {each: number for each, number in both.items() if number is not None}


def _single(names: Sequence[str]) -> dict[str, int]:
    """Number the names, without those that occur more than once."""
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}
