"""Cross-entropy of tokens: only those that count meet the projection to the vocabulary."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from composable.linalg import kernels


def token_losses(model: Any, batch: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Run the model on a batch; only tokens that count meet the projection to the vocabulary.

    Args:
        model: gives logits.
        batch: of the collator; labels (batch, length) are the token that the logits of a position
            should name, -100 where a position does not count. They are not shifted here.
        smoothing: weight of the uniform distribution in the target.

    Returns:
        Cross-entropies (batch, length), float32, 0 where the label is -100.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"].flatten()
    valid = (labels != -100).nonzero()[:, 0]
    with _only_rows(model, valid):
        logits = model(**inputs, use_cache=False).logits
    if logits.dim() == 3:
        logits = logits.flatten(0, 1)[valid]
    found = kernels.cross_entropy(logits, labels[valid], smoothing)
    losses = found.new_zeros(labels.shape).index_put((valid,), found)
    return losses.view(batch["labels"].shape)


@contextmanager
def _only_rows(model: Any, rows: Tensor) -> Iterator[None]:
    """Give the projection to the vocabulary some rows only, unless the model is compiled."""
    model = getattr(model, "module", model)  # of several processes
    head = model.get_output_embeddings()
    if head is None or model._compiled_call_impl is not None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[rows],))
    try:
        yield
    finally:
        hook.remove()


def sample_losses(
    model: Any, batch: dict[str, Tensor], smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run the model on a batch.

    Returns:
        Summed cross-entropy and number of tokens that count of every sample, each (batch,).
    """
    return token_losses(model, batch, smoothing).sum(1), (batch["labels"] != -100).sum(1)


def training_functions(
    smoothing: float = 0.0, losses_of: Any = sample_losses
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return (step, measure), see `Task.functions`; targets are smoothed for the steps only.

    `losses_of` is (model, batch, smoothing) -> loss and count of every sample, each (batch,).
    """

    def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses, counts = losses_of(model, batch, smoothing)
        return losses.sum(), counts.sum()

    return step, losses_of


def mean_functions(
    run: Any, smoothing: float = 0.0
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As `training_functions`, where every sample has one loss: `run` is `Task.run`."""

    def losses_of(
        model: Any, batch: dict[str, Tensor], smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        losses = run(model, batch, smoothing)[-1]
        return losses, losses.new_ones(len(losses))

    return training_functions(smoothing, losses_of)


def output_of(model: Any, batch: dict[str, Tensor], labels: Collection[str] = ("labels",)) -> Any:
    """Run a model on a batch without its labels, and without storing keys that nobody reads."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in labels}
    config = getattr(model, "module", model).config  # of several processes
    return model(**inputs, **({"use_cache": False} if hasattr(config, "use_cache") else {}))
