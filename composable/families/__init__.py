"""The table of model families."""

from typing import TYPE_CHECKING

from composable.errors import UserError
from composable.families.base import FFN, Family, Module
from composable.families.bert import BERT
from composable.families.distilbert import DISTILBERT
from composable.families.gpt2 import GPT2
from composable.families.llama import LLAMA
from composable.families.opt import OPT
from composable.families.t5 import T5
from composable.families.vit import VIT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: tuple[Family, ...] = (T5, BERT, DISTILBERT, OPT, GPT2, LLAMA, VIT)

__all__ = ["FAMILIES", "FFN", "Family", "Module", "by_model_type", "contains", "is_pair", "of"]


def by_model_type(model_type: str) -> Family:
    """Find the family of a `config.model_type`.

    Raises:
        UserError: no family covers it; the message names the known ones.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
    raise UserError(
        f'architecture "{model_type}" is not supported; known are {known} '
        "(docs/adding.md says how to add one)."
    )


def of(model: "PreTrainedModel") -> Family:
    """Find the family of a model."""
    return by_model_type(model.config.model_type)


def is_pair(whole: str, part: str) -> bool:
    """Tell whether two names are those of an attention and its output projection."""
    return any(family.is_pair(whole, part) for family in FAMILIES)


def contains(whole: str, part: str) -> bool:
    """Tell whether a module is a part of another one, by their names."""
    return any(family.contains(whole, part) for family in FAMILIES)
