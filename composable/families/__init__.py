"""The table of model families."""

from typing import TYPE_CHECKING

from composable.errors import UserError
from composable.families.base import Family, Module
from composable.families.t5 import T5

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: tuple[Family, ...] = (T5,)

__all__ = ["FAMILIES", "Family", "Module", "by_model_type", "of", "output_parts"]


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


def output_parts() -> tuple[str, ...]:
    """Child names of attention output projections in all families: ("o", ...)."""
    return tuple(dict.fromkeys(family.output_part for family in FAMILIES))
