"""What a model family is: the names of its prunable modules, as data."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


KINDS = ("attention", "ffn", "linear", "layer")
#: Name of an ffn whose linears lie in the layer itself: that of the layer and this.
FFN = "ffn"
#: What a model without its head reads of a batch.
INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "pixel_values")
#: What transformers calls the keys and values of earlier tokens: since 5.24, and before.
CACHE = ("cache", "past_key_values")
#: Positional and keyword arguments of a module.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Module:
    """A named prunable part of a model, of one of the `KINDS`.

    Attributes:
        name: path in `named_modules()`; of an ffn that is no module of its own, that of its layer
            and `.ffn`.
        stack: "encoder" or "decoder", whose tokens flow through it.
        parts: (role, child name) pairs; roles q, k, v, o of an attention, gate, up and down of an
            ffn. Child names may have dots.
        holder: path of the module that has the parts.
        units: what leaves one by one: heads of an attention, neurons of an ffn it has now.
        head_size: width of one head.
        groups: key/value heads; fewer than `units` where several query heads read one.
        is_cross: keys and values come from the other stack.
        whole_groups: whether heads leave as whole groups with their key/value head, or the same
            number from every group.
    """

    name: str
    kind: str
    stack: str
    parts: tuple[tuple[str, str], ...] = ()
    holder: str = ""
    units: int = 0
    head_size: int = 0
    groups: int = 0
    is_cross: bool = False
    whole_groups: bool = False

    def part(self, role: str) -> str:
        """Child name of the part with this role, relative to `holder`."""
        return next(child for known, child in self.parts if known == role)

    @property
    def keeps_groups(self) -> bool:
        """Whether its key/value heads stay while query heads leave."""
        return self.groups != self.units and not self.whole_groups

    @property
    def steps(self) -> int:
        """In how many equal steps its units leave: neurons, heads, heads of a group, or groups."""
        if self.kind == "ffn":
            return self.units
        return self.units // self.groups if self.keeps_groups else self.groups

    @property
    def output(self) -> str:
        """Child name of the linear that all units flow into: o of an attention, down of an ffn."""
        return self.part("o" if self.kind == "attention" else "down")

    @property
    def linears(self) -> tuple[str, ...]:
        """Keys of its parts that are pruned by themselves too: o, or all linears of an ffn."""
        if self.kind == "attention":
            return (self.output,) if self.parts else ()
        return tuple(child for _, child in self.parts)

    @property
    def output_path(self) -> str:
        """Path of the linear that is fitted to a module's output: a linear is its own."""
        return self.name if self.kind == "linear" else f"{self.holder}.{self.output}"


class Owner(NamedTuple):
    """The attention or ffn that a linear is a part of; its path from the holder is the key."""

    module: str
    kind: str
    key: str


@dataclass(frozen=True)
class Layers:
    """A list of layers, and the pattern of its path.

    Attributes:
        counts: config values that hold its length.
        lists: config values that are lists with one entry per layer.
    """

    path: str
    stack: str
    counts: tuple[str, ...]
    lists: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model family as a table of name patterns.

    Patterns are regular expressions for `re.fullmatch`. What lies in a layer is named from there.

    Attributes:
        model_types: values of `config.model_type` that it covers.
        attention, cross_attention: patterns of all attentions, and of those that read the other
            stack.
        attention_parts: (role, child name) of q, k, v and o.
        head_size: attribute of the attention, or of its `core`, with the width of a head.
        ffn: pattern of a feed-forward; "" where its linears lie in the layer itself.
        ffn_parts: (role, child name) of all linears an ffn may have: gate, up, down. Where there is
            a gate, the activation is the gate's.
        activation: child or attribute of the ffn (of the layer) that is its activation function.
        core: child of an attention that computes all but o; "" where the attention does so itself.
        counters: (attribute of the attention's core, what it counts) pairs to correct after heads
            went: "heads", "width" (heads times head size) or "per_group" (query heads of a group).
        sizes: (what, config key) pairs of what is one number for all layers: "neurons" of an ffn,
            "heads" of an attention, its key/value heads ("groups"), the width of a head
            ("head_size"). Without "heads" the config cannot say that heads are gone.
        head_table: path, in an attention, of a table that all of its stack read, with a column for
            each head; "" where there is none.
        leftovers: pattern of whole names of what checkpoints hold and no model uses: buffers that
            older versions of transformers stored, weights that never had a use.
        default_prefix: text that checkpoints of this family expect before a source sentence.
        image_tokens: config -> tokens that an image has; None for text.
        image_processor: class of transformers that prepares images where a checkpoint names none.
        prepare: turns a model of transformers, as it was built, into one with four linears in every
            attention; where they are fused in the library.
        restore: undoes `prepare`, and gives every layer what the library would compute of its
            number, so that a model that has lost layers is what its folder is read as.
        adapt_attention: makes one attention run with the given heads (None: all it has), in a
            model in which others may have lost some; called for every attention of such a model.
            None: `counters` are enough.
        before_layer_removal: saves what the others need of the layers (by index) that are to go.
        replay: turns the recorded call of a dense attention into one its variants can take; None:
            it is taken without the cache.
        run_trunk: runs a model on a batch up to its last layer; None: without its head.
        layer_output: (states, arguments of the call) -> what a layer returns; None: the states.
    """

    name: str
    model_types: tuple[str, ...]
    layers: tuple[Layers, ...]
    attention: str
    attention_parts: tuple[tuple[str, str], ...]
    head_size: str
    ffn: str
    ffn_parts: tuple[tuple[str, str], ...]
    activation: str
    cross_attention: str = "(?!)"
    core: str = ""
    counters: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    head_table: str = ""
    leftovers: str = "(?!)"
    default_prefix: str = ""
    image_tokens: Callable[[Any], int] | None = None
    image_processor: str = ""
    prepare: Callable[["nn.Module"], None] | None = None
    restore: Callable[["nn.Module"], None] | None = None
    adapt_attention: Callable[["nn.Module", list[int] | None], None] | None = None
    before_layer_removal: Callable[["nn.ModuleList", set[int]], None] | None = None
    replay: Callable[[Sequence[Any], dict[str, Any], Any], Call] | None = None
    run_trunk: Callable[[Any, dict[str, Any]], None] | None = None
    layer_output: Callable[[Any, tuple[Any, ...]], Any] | None = None

    def place(self, name: str) -> tuple[str, str, str] | None:
        """Take a path apart: stack, path of the layer, rest of the path; None outside of layers."""
        for layers in self.layers:
            if match := re.fullmatch(rf"((?:{layers.path})\.\d+)(?:\.(?P<inner>.+))?", name):
                return layers.stack, match[1], match["inner"] or ""
        return None

    def modules(self, model: "nn.Module") -> list[Module]:
        """List a model's prunable modules as they are now, in the order of `named_modules()`."""
        found: list[Module] = []
        waiting: dict[str, list[Module]] = {}  # path -> what is listed when it comes
        for name, child in model.named_modules():
            for module in self._at(name, child):
                paths = [f"{module.holder}.{key}" for key in module.linears]
                # an ffn that is no module of its own comes with its first linear
                first = paths[0] if paths and module.name != name else name
                waiting.setdefault(first, []).append(module)
                for path in paths:
                    linear = Module(path, "linear", module.stack, holder=path)
                    waiting.setdefault(path, []).append(linear)
            found += waiting.pop(name, [])
        return found

    def _at(self, name: str, child: "nn.Module") -> Iterator[Module]:
        """Describe the layer, attention or ffn at a path, if there is one."""
        place = self.place(name)
        if place is None:
            return
        stack, _, inner = place
        if not inner:
            yield Module(name, "layer", stack, holder=name)
            if not self.ffn:
                yield self._ffn(f"{name}.{FFN}", stack, child, name)
        elif re.fullmatch(self.attention, inner):
            yield self._attention(name, stack, child, inner)
        elif self.ffn and re.fullmatch(self.ffn, inner):
            yield self._ffn(name, stack, child, name)

    def _attention(self, name: str, stack: str, child: "nn.Module", inner: str) -> Module:
        parts = _present(child, self.attention_parts)
        is_cross = re.fullmatch(self.cross_attention, inner) is not None
        module = Module(name, "attention", stack, parts, name, is_cross=is_cross)
        if len(parts) < len(self.attention_parts):
            return module  # without heads
        core: Any = child.get_submodule(self.core)
        size = int(getattr(core, self.head_size))
        units, groups = (len(child.get_parameter(f"{module.part(r)}.weight")) // size for r in "qk")
        return replace(module, units=units, head_size=size, groups=groups)

    def _ffn(self, name: str, stack: str, holder: "nn.Module", path: str) -> Module:
        parts = _present(holder, self.ffn_parts)
        module = Module(name, "ffn", stack, parts, path)
        if not parts:
            return module
        return replace(module, units=len(holder.get_parameter(f"{module.part('up')}.weight")))

    def owner(self, name: str) -> Owner | None:
        """Find what a linear is a part of, by its name; None if it is no part of a module."""
        _, layer, inner = self.place(name) or ("", "", "")
        ffn = [child for _, child in self.ffn_parts]
        if not self.ffn and inner in ffn:
            return Owner(f"{layer}.{FFN}", "ffn", inner)
        o = [child for role, child in self.attention_parts if role == "o"]
        for kind, pattern, keys in (("attention", self.attention, o), ("ffn", self.ffn, ffn)):
            for key in keys:
                module = inner.removesuffix(f".{key}")
                if module != inner and re.fullmatch(pattern, module):
                    return Owner(f"{layer}.{module}", kind, key)
        return None

    def kind_of(self, name: str) -> str | None:
        """Tell which of the `KINDS` a module is, by its name; None if it is none of them."""
        place = self.place(name)
        if place is None:
            return None
        inner = place[2]
        if not inner:
            return "layer"
        if re.fullmatch(self.attention, inner):
            return "attention"
        if re.fullmatch(self.ffn or FFN, inner):
            return "ffn"
        return "linear" if self.owner(name) else None

    def valid_tokens(self, model: Any, batch: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Mark the tokens of each stack that are no padding: stack -> (batch, length), bool.

        Without targets nothing passes a decoder of two stacks.
        """
        if self.image_tokens is not None:
            pixels = batch["pixel_values"]
            every = pixels.new_ones(len(pixels), self.image_tokens(model.config)).bool()
            return dict.fromkeys(self.stacks, every)
        found = {self.stacks[0]: batch["attention_mask"].bool()}
        if len(self.stacks) > 1 and "labels" in batch:
            found["decoder"] = batch["labels"] != -100
        elif len(self.stacks) > 1 and "decoder_input_ids" in batch:
            ids = batch["decoder_input_ids"]
            found["decoder"] = batch.get("decoder_attention_mask", ids.new_ones(ids.shape)).bool()
        return found

    @property
    def stacks(self) -> tuple[str, ...]:
        """Which of encoder and decoder it has."""
        return tuple(layers.stack for layers in self.layers)

    def run(self, model: Any, batch: Mapping[str, "Tensor"]) -> None:
        """Run a model on a batch up to its last layer; the hooks of the caller see the rest."""
        if self.run_trunk is not None:
            self.run_trunk(model, dict(batch))
            return
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        model.base_model(**inputs, **({"use_cache": False} if "decoder" in self.stacks else {}))

    def replayed(self, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> Call:
        """Turn the recorded call of a dense attention into one that its variants can take."""
        if self.replay is not None:
            return self.replay(args, kwargs, output)
        return tuple(args), without_cache(kwargs)


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of an attention; None where there is none."""
    return next((kwargs[name] for name in CACHE if name in kwargs), None)


def cache_name(model: Any) -> str:
    """Return the name by which a model takes and returns its cache."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in CACHE if name in taken)


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Say the same without a cache."""
    return {**kwargs, **{name: None for name in CACHE if name in kwargs}}


def _present(holder: "nn.Module", parts: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Leave out the parts that a module does not have, or that are no linears any more."""
    children = dict(holder.named_modules())
    return tuple(pair for pair in parts if hasattr(children.get(pair[1]), "weight"))
