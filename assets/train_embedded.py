#!/usr/bin/env python3
"""Train the embedded model: a small T5 on Multi30K and the train part of the embedded captions.

    python assets/train_embedded.py --data data/multi30k -o assets/embedded

Its folder then holds config.json, model.safetensors (bfloat16), the tokenizer and the training
record; the model card (README.md) is written by hand from it. An interrupted training continues
when the same command runs again.
"""

import dataclasses
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from composable.commands import cli, options

WIDTH = {"d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 768, "num_layers": 3}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the script; those of the training have the names of `training.options`."""

    data: Path = options.path(
        "--data", use=options.READ, default=Path("data/multi30k"), help="Folder of Multi30K."
    )
    output: Path = options.output("assets/embedded", "Folder to write.")
    limit: int | None = options.limit("Pairs of each corpus, to try the script.")
    epochs: int = options.epochs(15)
    batch_size: int = options.batch_size("", default=48)
    lr: float = options.lr("Peak learning rate.", default=1e-2)
    vocabulary: int = options.option("--vocabulary", help="Tokens at most.", default=6000)
    seed: int = options.seed("Of the weights and the training.")
    dtype: str = options.option("--dtype", help="As of the commands.", default="bfloat16")
    threads: int = options.option("--threads", help="0 leaves it to torch.", default=0)
    workdir: Path = Path()
    device: str = "cpu"


@cli.command(Settings)
def main(settings: Settings) -> dict[str, object]:
    """Train the embedded model from scratch and write it as a Hugging Face folder."""
    import torch

    from composable.tasks import translation

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    output = settings.output
    folders = (settings.data, translation.corpus_folder("embedded"))
    training, validation = (
        join([translation.read_corpus(folder, split, settings.limit) for folder in folders])
        for split in ("train", "valid")
    )
    tokenizer = make_tokenizer(training.source + training.target, settings.vocabulary)
    model = make_model(len(tokenizer))
    how = dataclasses.replace(
        options.training_of(settings), early_stop=0, warmup=0.06, smoothing=0.1, final_lr=0.02
    )
    identity = {"width": WIDTH, "vocabulary": settings.vocabulary}
    outcome = fit(model, tokenizer, (training, validation), how, identity, "embedded")
    write_folder(output, model, tokenizer)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": settings.seed,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_pairs": len(training.source),
        **outcome.report(),
        "stats": outcome.rows,
        "bleu": scores(output, folders),
    }
    (output / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    outcome.clean_up()
    return {"wrote": str(output), **{key: record[key] for key in ("parameters", "epochs")}}


def fit(
    model: object,
    tokenizer: object,
    corpora: tuple[object, object],
    options: object,
    identity: dict[str, object],
    label: str,
    prefix: str = "",
) -> object:
    """Train a model with random weights to translate; its best epoch is kept.

    Args:
        model: the model, changed in place.
        tokenizer: its tokenizer.
        corpora: training and validation pairs.
        options: `training.options.Options`.
        identity: what else the result depends on, beside options and texts.
        label: name of the run.
        prefix: text before every source sentence.

    Returns:
        The `train.Outcome`.
    """
    from composable.tasks import translation
    from composable.training import train

    training, validation = corpora
    return train.run(
        model,
        {},
        (
            translation.Pairs(training, tokenizer, prefix),
            translation.Pairs(validation, tokenizer, prefix, is_sorted=True),
            translation.Collator(tokenizer.pad_token_id, model.config.decoder_start_token_id),
        ),
        translation.training_functions(options.smoothing),
        options,
        {"data": [training.sha256, validation.sha256], **identity},
        label=label,
    )


def scores(output: Path, folders: tuple[Path, Path]) -> dict[str, object]:
    """Measure the folder that was written, greedy, on the test split of both corpora."""
    from composable.models import pretrained
    from composable.tasks import metrics, translation, translation_decode

    model = pretrained.import_model(output, "embedded")
    found: dict[str, object] = {"decoding": "greedy, at most 80 tokens"}
    for name, folder in zip(("multi30k_test_2016_flickr", "captions_test"), folders, strict=True):
        corpus = translation.read_corpus(folder, "test")
        lines = translation_decode.translate(model.model, model.tokenizer, corpus.source)
        score = metrics.sacrebleu_score(lines, corpus.target)
        found |= {name: round(score.value, 4), "signature": score.signature}
    return found


def join(corpora: list) -> object:
    """Concatenate corpora; the hash is that of their hashes."""
    from composable import files
    from composable.tasks.translation import Corpus

    return Corpus(
        name="+".join(corpus.name for corpus in corpora),
        split=corpora[0].split,
        source=[line for corpus in corpora for line in corpus.source],
        target=[line for corpus in corpora for line in corpus.target],
        sha256=files.digest_of([corpus.sha256 for corpus in corpora]),
    )


def make_tokenizer(sentences: list[str], vocabulary: int) -> object:
    """Train a unigram tokenizer with T5's special tokens on both languages."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    inner.train_from_iterator(sentences, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512,
    )  # fmt: skip


def make_model(vocabulary: int) -> object:
    """Make the T5 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **WIDTH,
        vocab_size=vocabulary,
        dropout_rate=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        task_specific_params={"translation_en_to_de": {"prefix": ""}},
    )
    return T5ForConditionalGeneration(config)


def write_folder(output: Path, model: object, tokenizer: object) -> None:
    """Write weights in bfloat16, config and tokenizer."""
    import copy

    import torch

    output.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main()
