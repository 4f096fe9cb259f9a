#!/usr/bin/env python3
"""Train a T5 of T5-small's shape from scratch on Multi30K, with the original T5 tokenizer.

python benchmarks/train_t5_small.py -o out/bench/t5_small.pth --device cuda
python benchmarks/train_t5_small.py --limit 256 --epochs 1 --device cpu -o out/try.pth

The recipe behind the benchmarks on a GPU; the weights are not kept in the repository. The file it
writes is a dense model like that of download_model.py. An interrupted training continues when the
same command runs again.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_embedded

from benchmarks import geometry
from composable.commands import cli, options

#: what later trainings use, as in the config of T5-small
DROPOUT_OF_FILE = 0.1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script; those of the training have the names of `training.options`."""

    output: Path = options.output("out/bench/t5_small.pth", "Model file to write.")
    tokenizer: Path | None = options.path(
        "--tokenizer", use=options.READ, help="A tokenizers file, plain or .gz."
    )
    data: str = options.option("--data", help="As of the commands.", default="multi30k")
    limit: int | None = options.limit("Pairs of each split, to try the script.")
    epochs: int = options.epochs(40)
    batch_size: int = options.batch_size("", default=128)
    lr: float = options.lr("Peak learning rate.", default=1e-2)
    dropout: float = options.option(
        "--dropout", help="29,000 pairs are few for 60 M parameters.", default=0.3
    )
    prefix: str = options.option("--prefix", help="Text before every source.", default="")
    seed: int = options.seed("Of the weights and the training.")
    device: str = options.device()
    dtype: str = options.option("--dtype", help="As of the commands.", default="bfloat16")
    workdir: Path = Path()


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Train, and write a model file."""
    import torch

    from composable import files
    from composable.models import checkpoint
    from composable.tasks import translation

    files.check_writable(settings.output)
    torch.manual_seed(settings.seed)
    folder, prefix = translation.corpus_folder(settings.data), settings.prefix
    corpora = [
        translation.read_corpus(folder, split, settings.limit) for split in ("train", "valid")
    ]
    words = geometry.load_tokenizer(settings.tokenizer or geometry.find_tokenizer())
    model = geometry.make_model("small", len(words), settings.dropout, prefix)
    how = dataclasses.replace(
        options.training_of(settings), early_stop=0, warmup=0.06, smoothing=0.1, final_lr=0.02
    )
    identity = {"shape": "small", "vocabulary": len(words), "prefix": prefix}
    identity["dropout"] = settings.dropout
    outcome = train_embedded.fit(
        model, words, (corpora[0], corpora[1]), how, identity, "t5_small", prefix
    )
    model.config.dropout_rate = DROPOUT_OF_FILE
    made = geometry.as_checkpoint(model, words, "trained from scratch", prefix)
    made.info["history"].append({"trained": how.identity()})
    made.fingerprint = checkpoint.fingerprint_of(made.config, made.model.state_dict())
    checkpoint.save(settings.output, made)
    outcome.clean_up()
    parameters = made.info["dense_parameters"]
    return {"wrote": str(settings.output), "parameters": parameters, **outcome.report()}


if __name__ == "__main__":
    main()
