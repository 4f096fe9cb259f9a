#!/usr/bin/env python3
"""Make a small ViT with random weights, and scikit-learn's pictures of digits to train it on.

python examples/digits.py -o out/digits        # needs scikit-learn
python download_model.py -m out/digits/model -o model/vit.pth
python baseline_finetuning.py -m model/vit.pth --data out/digits/digits.npz --epochs 40 --lr 1e-2
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from composable.commands import cli, options

#: Of 1,797 pictures in a fixed random order: these to validate, these to test, the rest to train.
VALID, TEST = 200, 400


def split() -> dict[str, Any]:
    """Return the arrays of the .npz: 8 by 8 grey pixels, 0 to 255, and classes 0 to 9."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pictures = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    parts = {
        "valid": slice(0, VALID),
        "test": slice(VALID, VALID + TEST),
        "train": slice(VALID + TEST, None),
    }
    return {
        f"{name}_{what}": array[part]
        for name, part in parts.items()
        for what, array in (("images", pictures), ("labels", labels))
    }


def model(seed: int) -> Any:
    """Build a ViT of 4 layers, 4 heads of 16 and patches of 2 by 2 pixels, untrained."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0.1,
        id2label={i: str(i) for i in range(10)},
    )  # fmt: skip
    return ViTForImageClassification(config)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script."""

    output: Path = options.output("out/digits", "Folder to write.")
    seed: int = options.seed("Of the weights.")


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Write a folder with the model (model/) and the data (digits.npz)."""
    import numpy as np

    from composable import files

    output, made, arrays = settings.output, model(settings.seed), split()
    made.save_pretrained(output / "model")
    with files.atomic_write(output / "digits.npz") as file:
        np.savez(file, **arrays)
    return {
        "wrote": str(output),
        "parameters": sum(parameter.numel() for parameter in made.parameters()),
        "images": {name: len(array) for name, array in arrays.items() if name.endswith("labels")},
    }


if __name__ == "__main__":
    main()
