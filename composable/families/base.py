"""What a model family is: the names of its prunable modules, as data."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a family is a table; reading configuration files must not load torch
    from torch import nn

KINDS = ("attention", "ffn", "linear", "layer")


@dataclass(frozen=True)
class Module:
    """A named prunable part of a model.

    Attributes:
        name: path in `named_modules()`.
        kind: one of `KINDS`.
        stack: "encoder" or "decoder", whose tokens flow through it.
        parts: (role, child name) pairs; roles q, k, v, o of an attention, up and down of an ffn.
        heads: attention heads it has now.
        head_size: width of one head.
        is_cross: keys and values come from the other stack.
    """

    name: str
    kind: str
    stack: str
    parts: tuple[tuple[str, str], ...] = ()
    heads: int = 0
    head_size: int = 0
    is_cross: bool = False

    def part(self, role: str) -> str:
        """Child name of the only part with this role."""
        return next(child for known, child in self.parts if known == role)


@dataclass(frozen=True)
class Family:
    """One model family as a table of name patterns.

    Patterns are regular expressions for `re.fullmatch` on a module's path; the named group
    `stack` says which stack a module belongs to.

    Attributes:
        name: how the family is called in messages and tables.
        model_types: values of `config.model_type` that it covers.
        layer: pattern of a whole layer, with the group `index`.
        layer_lists: (path of a list of layers, config values that count them) tuples.
        attention: pattern of an attention.
        cross_attention: pattern of those attentions that read the other stack.
        attention_parts: role -> child name.
        ffn: pattern of a feed-forward.
        ffn_parts: (role, child name) of all linears an ffn may have.
        head_size: name of the config value that holds the width of a head.
        auto_class: transformers class that loads a pretrained folder.
        default_prefix: text that checkpoints of this family expect before a source sentence.
        adapt_attention: makes one attention run with the given heads (None: all it has), in a
            model in which others may have lost some; called for every attention of such a model.
        before_layer_removal: saves what the others need of the layers (by index) that are to go.
        replay: turns the recorded call of a dense attention into one its variants can take.
        run_trunk: runs a model on a batch up to its last layer, without the vocabulary projection.
    """

    name: str
    model_types: tuple[str, ...]
    layer: str
    layer_lists: tuple[tuple[str, ...], ...]
    attention: str
    cross_attention: str
    attention_parts: tuple[tuple[str, str], ...]
    ffn: str
    ffn_parts: tuple[tuple[str, str], ...]
    head_size: str
    auto_class: str
    default_prefix: str
    adapt_attention: Callable[["nn.Module", list[int] | None], None]
    before_layer_removal: Callable[["nn.ModuleList", set[int]], None]
    replay: Callable[[Sequence[Any], dict[str, Any], Any], tuple[tuple[Any, ...], dict[str, Any]]]
    run_trunk: Callable[[Any, dict[str, Any]], None]

    @property
    def output_part(self) -> str:
        """Child name of an attention's output projection."""
        return next(child for role, child in self.attention_parts if role == "o")

    def modules(self, model: "nn.Module") -> list[Module]:
        """List every prunable module, in the order of `named_modules()`.

        Args:
            model: dense or composed; head counts are read from the shapes it has now.
        """
        found: list[Module] = []
        linears: dict[str, Module] = {}
        for name, child in model.named_modules():
            if match := re.fullmatch(self.layer, name):
                found.append(Module(name, "layer", match["stack"]))
            elif match := re.fullmatch(self.attention, name):
                found.append(self._attention(model, name, match["stack"], child))
                linear = f"{name}.{self.output_part}"
                linears[linear] = Module(linear, "linear", match["stack"])
            elif match := re.fullmatch(self.ffn, name):
                parts = tuple(pair for pair in self.ffn_parts if hasattr(child, pair[1]))
                found.append(Module(name, "ffn", match["stack"], parts))
                for _, part in parts:
                    linear = f"{name}.{part}"
                    linears[linear] = Module(linear, "linear", match["stack"])
            elif name in linears:
                found.append(linears[name])
        return found

    def _attention(self, model: Any, name: str, stack: str, child: Any) -> Module:
        head_size = int(getattr(model.config, self.head_size))
        role_q = next(part for role, part in self.attention_parts if role == "q")
        heads = getattr(child, role_q).weight.shape[0] // head_size
        is_cross = re.fullmatch(self.cross_attention, name) is not None
        return Module(name, "attention", stack, self.attention_parts, heads, head_size, is_cross)
