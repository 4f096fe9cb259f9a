"""Names of the parts of a model: a table of patterns for each family, and the table of them."""

from typing import TYPE_CHECKING

from composable.errors import UserError
from composable.families.base import Family, Module, Owner
from composable.families.bert import BERT, DISTILBERT
from composable.families.gpt2 import GPT2
from composable.families.llama import LLAMA
from composable.families.opt import OPT
from composable.families.t5 import T5
from composable.families.vit import VIT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: tuple[Family, ...] = (T5, BERT, DISTILBERT, OPT, GPT2, LLAMA, VIT)

__all__ = ["Family", "Module", "Owner"]


def by_model_type(model_type: str) -> Family:
    """Find the family of a `config.model_type`; UserError with the known ones if there is none."""
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    if model_type not in known:
        raise UserError(
            f'architecture "{model_type}" is not supported; known are {", ".join(sorted(known))} '
            "(docs/adding.md says how to add one)."
        )
    return known[model_type]


def of(model: "PreTrainedModel") -> Family:
    """Find the family of a model."""
    return by_model_type(model.config.model_type)


def owner(name: str) -> Owner | None:
    """Find what a linear is a part of, by its name; None if it is no part of a module."""
    found = (family.owner(name) for family in FAMILIES)
    return next((each for each in found if each), None)


def kind_of(name: str) -> str | None:
    """Tell which of the `base.KINDS` a module is, by its name; None if it is none of any family."""
    found = (family.kind_of(name) for family in FAMILIES)
    return next((each for each in found if each), None)


def part_path(module: str, key: str) -> str:
    """Name a part of a module, the reverse of `owner`; one unknown to it is taken for a child."""
    beside = f"{module.rpartition('.')[0]}.{key}"
    found = owner(beside)
    return beside if found is not None and found.module == module else f"{module}.{key}"


def contains(whole: str, part: str) -> bool:
    """Tell whether a module is a part of another one, by their names."""
    found = owner(part)
    return part.startswith(f"{whole}.") or (found is not None and found.module == whole)
