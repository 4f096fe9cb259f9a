"""Settings of a training, as the scripts' options give them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from composable.devices import select_device, select_dtype

#: Epochs without a lower validation loss after which the commands end a training.
EARLY_STOP = 2


@dataclass(frozen=True)
class Options:
    """Settings of a training, as the scripts' options give them.

    Attributes:
        epochs: passes over the training data at most.
        batch_size: sentences per optimizer step, over all processes.
        lr: peak learning rate, after linear warm-up; linear decay to 0 at the last epoch.
        early_stop: epochs without a lower validation loss before training stops; 0 never stops.
        seed: of the sampler and of dropout.
        device: auto, cpu, cuda or cuda:N.
        dtype: of autocast, or auto, see `select_dtype`; weights stay float32.
        resume: continue from a checkpoint of the same run.
        checkpoint_dir: folder under which the run keeps its checkpoints.
        report_to: none, tensorboard or wandb.
        warmup: share of all steps that warm up.
        clip: gradient norm above which gradients are scaled down; 0 never.
        smoothing: label smoothing.
        final_lr: share of `lr` that the last step still has.
        workers: processes that prepare batches.
        compile: whether torch compiles the model.
        steps: optimizer steps after which training ends, and the schedule with it; 0: `epochs` say.
        save_steps: steps after which a checkpoint is written within an epoch; 0: at the ends of
            epochs only; None: as 0, and in a single process about every ten minutes.
        optimizer: adafactor, with steps relative to the size of each matrix; or adamw.
    """

    epochs: int
    batch_size: int
    lr: float
    early_stop: int
    seed: int = 42
    device: str = "auto"
    dtype: str = "float32"
    resume: bool = True
    checkpoint_dir: Path = Path("checkpoints")
    report_to: str = "none"
    warmup: float = 0.05
    clip: float = 1.0
    smoothing: float = 0.0
    final_lr: float = 0.0
    workers: int = 0
    compile: bool = False
    steps: int = 0
    save_steps: int | None = None
    optimizer: str = "adafactor"

    def resolved(self) -> "Options":
        """Name the device and the dtype that auto stands for."""
        device = select_device(self.device)
        return replace(self, device=device, dtype=select_dtype(self.dtype, device))

    def identity(self) -> dict[str, Any]:
        """Return those options on which the result depends."""
        free = ("resume", "checkpoint_dir", "report_to", "workers", "save_steps")
        return {key: value for key, value in asdict(self).items() if key not in free}
