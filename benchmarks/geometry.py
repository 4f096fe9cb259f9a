#!/usr/bin/env python3
"""Models of T5's geometries with random weights and T5's tokenizer, to measure speed and memory.

python benchmarks/geometry.py small -o out/t5-small-random.pth
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: width, layers of each stack, heads of 64, width of the ffn
SIZES = {
    "small": (512, 6, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}
HEAD = 64
TOKENIZER = "shared/data/tokenizers/t5-tokenizer.json.gz"


def find_tokenizer() -> Path | None:
    """Find the original T5 tokenizer beside the repository or within it; None where it is not."""
    places = (ROOT.parent / TOKENIZER, ROOT / TOKENIZER)
    return next((path for path in places if path.is_file()), None)


def load_tokenizer(path: Path | None) -> Any:
    """Load a tokenizers file, plain or .gz; without one the embedded model's tokenizer."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from composable import files

    if path is None:
        return AutoTokenizer.from_pretrained(files.assets("embedded"), local_files_only=True)
    raw = path.read_bytes()
    described = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    described["model"].setdefault("type", "Unigram")
    for part in (described["pre_tokenizer"], described["decoder"]):
        for piece in part.get("pretokenizers", [part]):  # as files said it before version 0.14
            if "add_prefix_space" in piece:
                piece["prepend_scheme"] = "always" if piece.pop("add_prefix_space") else "never"
                piece.pop("str_rep", None)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "tokenizer.json"
        converted.write_text(json.dumps(described))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(converted), pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
            model_max_length=512,
        )  # fmt: skip


def make_model(size: str, vocabulary: int, dropout: float = 0.1, prefix: str = "") -> Any:
    """Make a T5 of one of `SIZES` with random weights.

    Args:
        size: name of the geometry.
        vocabulary: rows of the embedding, rounded up to a multiple of 128.
        dropout: of the training.
        prefix: text before every source sentence, kept in the config.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    width, layers, heads, inner = SIZES[size]
    config = T5Config(
        d_model=width, d_kv=HEAD, num_heads=heads, d_ff=inner, num_layers=layers,
        vocab_size=-(-vocabulary // 128) * 128, dropout_rate=dropout, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
        task_specific_params={"translation_en_to_de": {"prefix": prefix}},
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def make_checkpoint(size: str, tokenizer: Any, prefix: str = "") -> Any:
    """Make a dense checkpoint of a geometry, without its fingerprint, which takes a while."""
    return as_checkpoint(make_model(size, len(tokenizer), prefix=prefix), tokenizer, size, prefix)


def as_checkpoint(model: Any, tokenizer: Any, source: str, prefix: str = "") -> Any:
    """Make a dense checkpoint of a model and its tokenizer."""
    from composable.models import checkpoint

    made = checkpoint.Checkpoint(
        model=model, tokenizer=tokenizer, config=checkpoint.config_dict(model)
    )
    made.info = {
        "source": source, "revision": None, "task": "translation", "prefix": prefix,
        "languages": ["en", "de"], "data": "multi30k",
        "dense_parameters": sum(p.numel() for p in model.parameters()), "history": [],
    }  # fmt: skip
    return made


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0)
def main(size: str, output: Path, seed: int) -> None:
    """Write a model file with random weights."""
    import torch

    from composable.models import checkpoint

    torch.manual_seed(seed)
    made = make_checkpoint(size, load_tokenizer(find_tokenizer()))
    made.fingerprint = checkpoint.fingerprint_of(made.config, made.model.state_dict())
    checkpoint.save(output, made)
    click.echo(json.dumps({"parameters": made.info["dense_parameters"]}))


if __name__ == "__main__":
    main()
