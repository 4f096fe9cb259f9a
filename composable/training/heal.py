"""Which weights learn as a composed model is fine-tuned: all, those around a cut, or adapters."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from composable.errors import MismatchError, UserError
from composable.models.checkpoint import Checkpoint
from composable.models.structure import mapped_layers, name_after_removal, removed_layers
from composable.models.surgery import layer_paths, put


@dataclass(frozen=True)
class Heal:
    """What learns.

    Attributes:
        how: "full": every weight; "neighbours": the layers on both sides of every run of layers
            that are gone, and what stands in its place; "lora": low-rank adapters of the ffns'
            linears, merged at the end (Hu et al. 2021; so heal Gromov et al. 2024).
        rank: of the adapters; their output is scaled by 1.
        dropout: of what enters the adapters.
    """

    how: str = "full"
    rank: int = 64
    dropout: float = 0.05

    def identity(self) -> dict[str, Any]:
        """Return that on which the result depends."""
        return asdict(self) if self.how == "lora" else {"how": self.how}

    @property
    def optimizer(self) -> str:
        """Adapters start at 0, where steps relative to a matrix's size would be none."""
        return "adamw" if self.how == "lora" else "adafactor"

    @property
    def lr(self) -> float:
        """Peak learning rate if nothing else is said."""
        return 3e-4 if self.how == "lora" else 2e-3


def prepare(composed: Checkpoint, heal: Heal) -> Callable[[], object]:
    """Let only some weights of a model learn; the model is changed.

    Returns:
        What undoes it after the training: adapters are merged, every weight may learn again.

    Raises:
        MismatchError: no layer is gone; weights that adapters would change are masked.
        UserError: the package for adapters is missing.
    """
    model: nn.Module = composed.model
    if heal.how == "neighbours":
        learning = tuple(f"{name}." for name in neighbours(composed))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(learning))
    elif heal.how == "lora":
        return _adapt(composed, heal)
    return lambda: model.requires_grad_(True)


def neighbours(composed: Checkpoint) -> list[str]:
    """Paths, in the composed model, of the layers beside a cut, and of what stands in its place.

    Raises:
        MismatchError: there is no cut.
    """
    family = composed.family
    removed = removed_layers(composed.structure, family)
    mapped = mapped_layers(composed.structure)
    found, gone = [], {*removed, *mapped}
    for path in layer_paths(composed.model, family).values():
        left: Any = composed.model.get_submodule(path)
        count = len(left) + sum(name.startswith(f"{path}.") for name in removed)
        names = [f"{path}.{number}" for number in range(count)]
        for i, name in enumerate(names):
            if name not in gone and not gone.isdisjoint(names[max(0, i - 1) : i + 2]):
                found.append(name)
        found += [name for name in names if name in mapped]
    if not found:
        raise MismatchError("heal neighbours: no layer of this model is gone; use full or lora.")
    now = (name_after_removal(name, family, removed) for name in found)
    return [name for name in now if name is not None]


def _adapt(composed: Checkpoint, heal: Heal) -> Callable[[], None]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise UserError(
            "heal lora needs the package peft; pip install -r requirements-lora.txt."
        ) from error
    model: nn.Module = composed.model
    targets = [
        f"{module.holder}.{child}"
        for module in composed.family.modules(model)
        if module.kind == "ffn"
        for _, child in module.parts
    ]
    if masked := [name for name in targets if f"{name}.weight" in composed.masks]:
        raise MismatchError(
            f'heal lora: weights of "{masked[0]}" are masked, and adapters would fill them; use '
            "full or neighbours."
        )
    if not targets:
        raise MismatchError("heal lora: this model has no ffn that adapters could go to.")
    config = LoraConfig(
        r=heal.rank,
        lora_alpha=heal.rank,
        lora_dropout=heal.dropout,
        target_modules=targets,
        bias="none",
    )
    inject_adapter_in_model(config, model)  # type: ignore[arg-type]

    def merge() -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()  # type: ignore[operator]
                put(model, name, module.get_base_layer())
        model.requires_grad_(True)

    return merge
