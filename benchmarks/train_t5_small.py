#!/usr/bin/env python3
"""Train a T5 of T5-small's shape from scratch on Multi30K, with the original T5 tokenizer.

python benchmarks/train_t5_small.py -o out/bench/t5_small.pth --device cuda
python benchmarks/train_t5_small.py --limit 256 --epochs 1 --device cpu -o out/try.pth

The recipe behind the benchmarks on a GPU; the weights are not kept in the repository. The file it
writes is a dense model like that of download_model.py. An interrupted training continues when the
same command runs again.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_embedded

from benchmarks import geometry
from composable.commands import cli

#: what later trainings use, as in the config of T5-small
DROPOUT_OF_FILE = 0.1


@cli.command()
@cli.path_option(
    "-o",
    "--output",
    use=cli.WRITTEN,
    default="out/bench/t5_small.pth",
    text="Model file to write.",
)
@cli.path_option("--tokenizer", use=cli.READ, text="A tokenizers file, plain or .gz.")
@click.option("--data", default="multi30k", help="As of the scripts.")
@click.option("--epochs", default=40)
@click.option("--batch-size", default=128)
@click.option("--lr", default=1e-2)
@click.option("--dropout", default=0.3, help="29,000 pairs are few for 60 M parameters.")
@click.option("--prefix", default="", help="Text before every source sentence.")
@click.option("--seed", default=42)
@click.option("--device", default="auto")
@click.option("--dtype", default="bfloat16")
@click.option("--checkpoint-dir", type=click.Path(path_type=Path), default=Path("checkpoints"))
@click.option("--limit", type=int, default=None, help="Pairs of each split, to try the script.")
def main(
    output: Path, tokenizer: Path | None, data: str, epochs: int, batch_size: int, lr: float,
    dropout: float, prefix: str, seed: int, device: str, dtype: str, checkpoint_dir: Path,
    limit: int | None,
) -> dict[str, object]:  # fmt: skip
    """Train, and write a model file."""
    import torch

    from composable import files
    from composable.models import checkpoint
    from composable.tasks import translation
    from composable.training.options import Options

    files.check_writable(output)
    torch.manual_seed(seed)
    folder = translation.corpus_folder(data)
    corpora = [translation.read_corpus(folder, split, limit) for split in ("train", "valid")]
    words = geometry.load_tokenizer(tokenizer or geometry.find_tokenizer())
    model = geometry.make_model("small", len(words), dropout, prefix)
    options = Options(
        epochs=epochs, batch_size=batch_size, lr=lr, early_stop=0, seed=seed, dtype=dtype,
        device=device, warmup=0.06, smoothing=0.1, final_lr=0.02, checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    identity = {"shape": "small", "vocabulary": len(words), "dropout": dropout, "prefix": prefix}
    outcome = train_embedded.fit(
        model, words, (corpora[0], corpora[1]), options, identity, "t5_small", prefix
    )
    model.config.dropout_rate = DROPOUT_OF_FILE
    made = geometry.as_checkpoint(model, words, "trained from scratch", prefix)
    made.info["history"].append({"trained": options.identity()})
    made.fingerprint = checkpoint.fingerprint_of(made.config, made.model.state_dict())
    checkpoint.save(output, made)
    outcome.clean_up()
    return {"wrote": str(output), "parameters": made.info["dense_parameters"], **outcome.report()}


if __name__ == "__main__":
    main()
