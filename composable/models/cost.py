"""What a model costs: parameters, zeros, multiply-accumulates (the formula is in docs/costs.md)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from composable.errors import ShapeError
from composable.families import Family, Module
from composable.models.surgery import LinearMap

SOURCE_LENGTH = 32
TARGET_LENGTH = 32
USUAL_LENGTHS = {"encoder": SOURCE_LENGTH, "decoder": TARGET_LENGTH}


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates of one forward pass over one sequence (or one pair of sequences).

    Attributes:
        by_module: name of each attention and ffn -> its MACs, 0 where it was removed; and of each
            linear map in the place of layers.
        tokens: that pass the model, of all its stacks.
    """

    by_module: dict[str, float]
    tokens: float

    @property
    def total(self) -> float:
        """MACs of the whole pass, embeddings and vocabulary projection excluded."""
        return sum(self.by_module.values())

    @property
    def per_token(self) -> float:
        """MACs for each token that passes the model, of source and target together."""
        return self.total / self.tokens


def parameters(model: nn.Module) -> int:
    """Count the stored weights; tied ones once, a masked one (0.0) like any other."""
    return sum(weight.numel() for weight in _stored(model))


def nonzero_parameters(model: nn.Module) -> int:
    """Count the stored weights that are not 0; tied ones once."""
    return sum(int(weight.count_nonzero()) for weight in _stored(model))


def sparsity(model: nn.Module, dense_parameters: int) -> float:
    """Share of the `parameters` of the dense model it was made from that is gone or 0 in this one.

    Raises:
        ShapeError: the dense model cannot have so few parameters.
    """
    if dense_parameters < max(1, parameters(model)):
        raise ShapeError(
            f"dense_parameters is {dense_parameters}, but the model itself stores "
            f"{parameters(model)}; give the count of the dense model it was made from."
        )
    return 1 - nonzero_parameters(model) / dense_parameters


def macs(
    model: nn.Module,
    family: Family,
    source_length: float = SOURCE_LENGTH,
    target_length: float = TARGET_LENGTH,
    nonzero: bool = False,
) -> MACs:
    """Count the multiply-accumulates of all attentions and ffns.

    Every weight of a linear costs one MAC for each token that passes it; scores and context of
    an attention cost 2 * heads * head_size * queries * keys. Target tokens pass the decoder
    once, as in training or with a key/value cache; no token is saved by causality.

    Args:
        model: dense or composed; on the meta device as well, unless `nonzero`.
        family: names the attentions and ffns.
        source_length: tokens of the encoder, also on average.
        target_length: tokens of the decoder.
        nonzero: count only weights that are not 0; attention scores stay as they are.

    Raises:
        ShapeError: a length is not a positive number, or no token passes at all.
    """
    lengths = {"encoder": source_length, "decoder": target_length}
    if min(lengths.values()) < 0 or source_length + target_length == 0:
        raise ShapeError(
            f"source length {source_length} and target length {target_length}: both must be 0 "
            "or more, and one of them above 0."
        )
    by_module = {
        module.name: _module_macs(model, module, lengths, nonzero)
        for module in family.modules(model)
        if module.kind in ("attention", "ffn")
    }
    for module in family.modules(model):
        layer = model.get_submodule(module.holder)
        if module.kind == "layer" and isinstance(layer, LinearMap):
            count = layer.weight.count_nonzero() if nonzero else layer.weight.numel()
            by_module[module.name] = int(count) * lengths[module.stack]
    return MACs(by_module, sum(lengths[stack] for stack in family.stacks))


def lengths_of(
    model: Any, family: Family, known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Say how many tokens a sample has in every stack.

    Args:
        model: dense or composed; on the meta device as well.
        family: of the model.
        known: stack -> tokens, also on average.

    Returns:
        Those known; where nothing is, those that every image has, or of texts `USUAL_LENGTHS`.
    """
    found: dict[str, float] = {**USUAL_LENGTHS}
    if family.image_tokens is not None:
        found["encoder"] = family.image_tokens(model.config)
    return {**found, **(known or {})}


def macs_per_unit(
    model: nn.Module, family: Family, lengths: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Count the multiply-accumulates that leave with one unit of a module, in one forward pass.

    Args:
        model: dense; on the meta device as well.
        family: names its modules.
        lengths: what is known of them, see `lengths_of`.

    Returns:
        Name of every module -> MACs of a head, a neuron, a weight of a linear, or a whole layer;
        those of a key/value head are shared by the query heads that read it.
    """
    tokens = lengths_of(model, family, lengths)
    modules = family.modules(model)
    wholes = {
        module.name: _module_macs(model, module, tokens)
        for module in modules
        if module.kind in ("attention", "ffn")
    }
    found: dict[str, float] = {}
    for module in modules:
        if module.kind == "linear":
            found[module.name] = tokens[module.stack]
        elif module.kind == "layer":
            inside = f"{module.name}."
            found[module.name] = sum(n for name, n in wholes.items() if name.startswith(inside))
        else:
            found[module.name] = wholes[module.name] / max(1, module.units)
    return found


def total(
    model: nn.Module, family: Family, metric: str, lengths: Mapping[str, float] | None = None
) -> float:
    """Measure a whole model by one of `formats.config.METRICS`.

    Args:
        model: dense or composed; on the meta device as well.
        family: names its modules.
        metric: "macs": of one forward pass; "parameters": all that are stored;
            "layer-parameters": those inside layers.
        lengths: see `macs_per_unit`.
    """
    if metric == "macs":
        tokens = lengths_of(model, family, lengths)
        return macs(model, family, tokens["encoder"], tokens["decoder"]).total
    if metric == "parameters":
        return parameters(model)
    layers = [module.holder for module in family.modules(model) if module.kind == "layer"]
    return sum(parameters(model.get_submodule(layer)) for layer in layers)


def step_cost(
    model: nn.Module, module: Module, metric: str, lengths: Mapping[str, float] | None = None
) -> float:
    """Say by how much `total` falls with every step (`Module.steps`) that a module loses.

    Args:
        model: that has the module with all its units; on the meta device as well.
        module: an attention or ffn.
        metric: see `total`.
        lengths: stack -> tokens of a sample; others have `USUAL_LENGTHS`.
    """
    tokens = {**USUAL_LENGTHS, **(lengths or {})}
    holder = model.get_submodule(module.holder)
    is_macs, units = metric == "macs", module.units // module.steps
    groups = 0 if module.keeps_groups else module.groups // module.steps
    found: float = 0
    for role, child in module.parts:
        linear: Any = holder.get_submodule(child)
        rows, columns = linear.weight.shape
        lines = (groups if role in ("k", "v") else units) * (module.head_size or 1)
        is_output = child == module.output  # it loses columns, the others rows
        weights = lines * (rows if is_output else columns)
        biases = 0 if is_output or linear.bias is None else lines
        found += weights * _tokens(module, role, tokens) if is_macs else weights + biases
    return found + (_score_macs(module, units, tokens) if is_macs else 0)


def report(
    model: nn.Module,
    family: Family,
    dense_parameters: int | None = None,
    source_length: int = SOURCE_LENGTH,
    target_length: int = TARGET_LENGTH,
) -> dict[str, Any]:
    """Return every cost of a model with real weights as the scripts report it.

    The sparsity is None without `dense_parameters`; the lengths are those of `macs`.
    """
    shapes = macs(model, family, source_length, target_length)
    weights = macs(model, family, source_length, target_length, nonzero=True)
    return {
        "parameters": parameters(model),
        "nonzero_parameters": nonzero_parameters(model),
        "sparsity": round(sparsity(model, dense_parameters), 6) if dense_parameters else None,
        "macs_per_token": round(shapes.per_token, 2),
        "macs_per_token_nonzero": round(weights.per_token, 2),
        "source_length": source_length,
        "target_length": target_length,
    }


def _stored(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each stored weight once, also where two parameters share one memory."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for weight in model.parameters():
        place = (0 if weight.is_meta else weight.data_ptr(), tuple(weight.shape))
        if place[0] and place in seen:
            continue
        seen.add(place)
        yield weight


def _module_macs(
    model: nn.Module, module: Module, lengths: Mapping[str, float], nonzero: bool = False
) -> float:
    """MACs of one attention or ffn: weights times the tokens that pass them, scores, context."""
    holder = model.get_submodule(module.holder)
    total: float = 0
    for role, child in module.parts:
        weight = holder.get_parameter(f"{child}.weight")
        weights = weight.count_nonzero() if nonzero else weight.numel()
        total += int(weights) * _tokens(module, role, lengths)
    return total + _score_macs(module, module.units, lengths)


def _tokens(module: Module, role: str, lengths: Mapping[str, float]) -> float:
    """Tokens that pass a part."""
    return lengths["encoder" if module.is_cross and role in ("k", "v") else module.stack]


def _score_macs(module: Module, heads: int, lengths: Mapping[str, float]) -> float:
    """MACs of so many heads without their weights: queries by keys, and scores by values."""
    return (
        2 * heads * module.head_size * _tokens(module, "q", lengths) * _tokens(module, "k", lengths)
    )
