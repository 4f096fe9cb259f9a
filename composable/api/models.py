"""Models from Python: loaded, fine-tuned, measured."""

from pathlib import Path
from typing import Any

from composable import devices, tasks
from composable.api.arguments import (
    copy_of,
    in_float32,
    moved,
    place_of,
    positive,
    scratch,
    training_options,
)
from composable.errors import UserError
from composable.models import checkpoint, hub, pretrained
from composable.models.checkpoint import Checkpoint
from composable.reports import evaluation
from composable.reports.evaluation import Evaluation
from composable.training import finetune
from composable.training.heal import Heal


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    prefix: str | None = None,
    task: str | None = None,
    labels: int | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    ignore_unused: bool = False,
) -> Checkpoint:
    """Load a model.

    Args:
        source: "embedded", a hub id (owner/name), a folder of transformers, a .gguf file, or a
            model file, which says all that follows by itself.
        revision: branch, tag or commit of a hub id.
        prefix: see `models.pretrained.import_model`, as for the others.
        task: what the model is for.
        labels: classes of a fresh head.
        max_length: tokens of a text at most.
        dtype: of the weights, float32 or bfloat16; None: float32.
        ignore_unused: go on where the model does not use all of the weights.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    path = Path(source).expanduser()
    options: dict[str, Any] = {
        "prefix": prefix,
        "task": task,
        "labels": labels,
        "max_length": max_length,
    }
    if path.suffix == ".pth" or (path.is_file() and path.suffix != hub.GGUF):
        given = options | {"revision": revision, "dtype": dtype}
        if unused := [name for name, value in given.items() if value is not None]:
            raise UserError(
                f"{unused[0]}: {source} is a model file, which says so itself; leave it out."
            )
        if not path.exists():
            raise UserError(f"{source}: no such model file.")
        return checkpoint.load(path)
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype}: expected float32 or bfloat16.")
    folder, commit = hub.resolve_model(str(source), revision)
    options |= {"dtype": dtype or "float32", "ignore_unused": ignore_unused}
    return pretrained.import_model(folder, str(source), commit, **options)


def fine_tune(
    model: Checkpoint,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    epochs: int = 4,
    steps: int = 0,
    batch_size: int | None = None,
    lr: float | None = None,
    early_stop: int = 2,
    heal: str = "full",
    rank: int = 64,
    seed: int = 42,
    device: str = "auto",
    dtype: str = "auto",
    checkpoints: str | Path | None = None,
) -> Checkpoint:
    """Fine-tune a whole model on its task; pruned weights stay zero.

    Args:
        model: composed or dense; it stays as it is.
        data: folder or file with data of the model's task; None: what the model names.
        limit: the first so many samples of each split.
        epochs: at most.
        steps: optimizer steps after which training ends; 0: `epochs` say.
        batch_size: samples of a step; None: the task's.
        lr: peak learning rate; None: 0.002, with lora 0.0003.
        early_stop: epochs without improvement before training stops; 0 never.
        heal: what learns: full, neighbours or lora, see `training.heal.Heal`.
        rank: of lora.
        seed: of sampling and dropout.
        device: where to train.
        dtype: of autocast.
        checkpoints: see `fit`.

    Returns:
        A model with the weights of the best epoch; the last entry of `info["history"]` has the
        losses.

    Raises:
        UserError: data that cannot be read, settings that do not work here.
    """
    if heal not in ("full", "neighbours", "lora"):
        raise UserError(f"heal {heal}: unknown; known are full, neighbours, lora.")
    tuned = copy_of(model)
    with scratch(checkpoints) as folder:
        training = training_options(
            folder, epochs, batch_size, lr, early_stop=early_stop, seed=seed, device=device,
            dtype=dtype, steps=steps,
        )  # fmt: skip
        where, limit = place_of(data), positive("limit", limit)
        label = "baseline" if model.is_dense else "model"
        outcome, _ = finetune.tune(tuned, training, label, where, limit, Heal(heal, rank))
        outcome.clean_up()
    return tuned


def evaluate(
    model: Checkpoint,
    *,
    data: str | Path | None = None,
    split: str = "test",
    limit: int | None = None,
    num_beams: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    device: str = "auto",
    dtype: str = "auto",
) -> Evaluation:
    """Measure a model: the scores of its task, speed, parameters, MACs.

    Args:
        model: composed or dense; it stays as it is.
        data: folder or file with data of the model's task; None: what the model names.
        split: train, valid or test.
        limit: the first so many samples.
        num_beams: of a translation; None: 1, greedy.
        max_length: tokens of a translation at most (None: 80), or of a window of a language model
            (None: what the model says).
        batch_tokens: tokens of a batch at most.
        device: where to run.
        dtype: of autocast.

    Raises:
        UserError: data that cannot be read, an argument that the task does not have.
    """
    if split not in ("train", "valid", "test"):
        raise UserError(f"split {split}: expected train, valid or test.")
    task, device = tasks.by_name(model.info["task"]), devices.select_device(device)
    settings = {
        **evaluation.settings_of(task, num_beams=num_beams, max_length=max_length),
        "batch_tokens": batch_tokens,
        "limit": positive("limit", limit),
        "device": device,
        "dtype": devices.select_dtype(dtype, device, trains=False),
    }
    corpus = task.read(place_of(data), model.info.get("data"), split, settings["limit"])
    is_float32 = settings["dtype"] == "float32"
    with in_float32(model, device) if is_float32 else moved(model, device) as working:
        return evaluation.evaluate(working, corpus, settings)
