"""Tiny random models with the heads of all tasks, and tiny data of every kind of file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from composable.models.checkpoint import Checkpoint, config_dict, fingerprint_of

WORDS = (
    "a the man woman dog cat child house garden street red blue green old good bad nice awful runs "
    "sits sleeps plays in on of and is was not who where what does . , ? ="
).split()
SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
ENCODER = {
    **SIZE, "vocab_size": 64, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
TASKS = (
    "text_classification",
    "text_similarity",
    "question_answering",
    "language_modeling",
    "image_classification",
)


def tokenizer(pairs: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; with special tokens around one text or two, or without any."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if pairs:
        inner.post_processor = TemplateProcessing(
            single="<cls> $A <sep>",
            pair="<cls> $A <sep> $B:1 <sep>:1",
            special_tokens=[("<cls>", 2), ("<sep>", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>",
        sep_token="<sep>", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def checkpoint(
    task: str, seed: int = 0, kind: str = "", labels: int = 2, **info: Any
) -> Checkpoint:
    """A dense checkpoint with the head of a task; `kind` names another family than the usual."""
    torch.manual_seed(seed)
    model: Any = _BUILDERS[kind or task](labels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0, 0.2)
    config = config_dict(model)
    reads = None if task == "image_classification" else tokenizer(task != "language_modeling")
    return Checkpoint(
        model=model.eval(),
        tokenizer=reads,
        config=config,
        fingerprint=fingerprint_of(config, model.state_dict()),
        info={
            "source": "tiny", "revision": None, "task": task, "prefix": "", "data": None,
            "history": [], "dense_parameters": sum(p.numel() for p in model.parameters()), **info,
        },
    )  # fmt: skip


def _image_model(labels: int) -> ViTForImageClassification:
    config = ViTConfig(**SIZE, image_size=8, patch_size=4, num_channels=3, num_labels=labels)
    return ViTForImageClassification(config)


def _llama(_: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(**SIZE, vocab_size=64, num_key_value_heads=2, max_position_embeddings=64)
    )


def _opt(_: int) -> OPTForCausalLM:
    config = OPTConfig(
        hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    return OPTForCausalLM(config)


def _gpt2_classifier(labels: int) -> GPT2ForSequenceClassification:
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, pad_token_id=0,
        num_labels=labels, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


_BUILDERS: dict[str, Any] = {
    "text_classification": lambda labels: BertForSequenceClassification(
        BertConfig(**ENCODER, num_labels=labels)
    ),
    "text_similarity": lambda _: BertForSequenceClassification(BertConfig(**ENCODER, num_labels=1)),
    "question_answering": lambda _: BertForQuestionAnswering(BertConfig(**ENCODER)),
    "language_modeling": _llama,
    "image_classification": _image_model,
    "opt": _opt,
    "gpt2": _gpt2_classifier,
}


def data(task: str, folder: Path, samples: int = 40) -> Path:
    """Write train, valid and test of a task into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[task](folder, samples)
    return folder


def _pick(generator: torch.Generator, *words: str) -> str:
    return words[int(torch.randint(len(words), (), generator=generator))]


def _sentence(generator: torch.Generator, mood: str) -> str:
    who = _pick(generator, "man", "woman", "dog", "cat")
    where = _pick(generator, "house", "garden", "street")
    return f"the {mood} {who} {_pick(generator, 'runs', 'sits')} in the {where} ."


def _splits(samples: int) -> list[tuple[str, int, torch.Generator]]:
    counts = {"train": samples, "dev": max(8, samples // 4), "test": max(8, samples // 4)}
    return [
        (split, count, torch.Generator().manual_seed(number))
        for number, (split, count) in enumerate(counts.items())
    ]


def _classes(folder: Path, samples: int) -> None:
    """SST-2's columns: good and nice are positive, bad and awful negative."""
    for split, count, generator in _splits(samples):
        moods = [_pick(generator, "good", "nice", "bad", "awful") for _ in range(count)]
        rows = [f"{_sentence(generator, m)} \t{int(m in ('good', 'nice'))}" for m in moods]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def _similarities(folder: Path, samples: int) -> None:
    """STS-B's columns: 5 where both sentences are of one mood, else 1."""
    head = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    for split, count, generator in _splits(samples):
        lines = ["\t".join(head.split())]
        for number in range(count):
            first, second = (_pick(generator, "good", "bad") for _ in range(2))
            texts = _sentence(generator, first), _sentence(generator, second)
            score = "5.000" if first == second else "1.000"
            cells = [number, "g", "f", 2012, "0001", "none", "none", *texts, score]
            lines.append("\t".join(map(str, cells)))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def squad(paragraphs: list[dict[str, Any]], version: str = "1.1") -> str:
    """A file of SQuAD's form."""
    return json.dumps({"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]})


def asked(number: int, text: str, context: str, *answers: str, fails: bool | None = None) -> Any:
    """One question; `answers` are found in the context."""
    found = [{"text": each, "answer_start": context.index(each)} for each in answers]
    possible = {} if fails is None else {"is_impossible": fails}
    return {"id": f"q{number}", "question": text, "answers": found, **possible}


def _questions(folder: Path, samples: int) -> None:
    """Who is where? The answer is the word after "the good"."""
    for split, count, generator in _splits(samples):
        paragraphs = []
        for number in range(count):
            who = _pick(generator, "man", "woman", "dog", "cat")
            context = f"{_sentence(generator, 'old')} the good {who} plays in the garden ."
            qas = [asked(number, "who plays ?", context, who)]
            paragraphs.append({"context": context, "qas": qas})
        (folder / f"{split}-v1.1.json").write_text(squad(paragraphs))


def _texts(folder: Path, samples: int) -> None:
    for split, count, generator in _splits(samples):
        lines = [
            f" {_sentence(generator, _pick(generator, 'good', 'bad'))} \n" for _ in range(count)
        ]
        (folder / f"wiki.{split.replace('dev', 'valid')}.tokens").write_text(" \n".join(lines))


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 by 8 pixels: class 1 is brighter on the left."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 128, (count, 8, 8, 3))
    labels = np.arange(count) % 2
    images[labels == 1, :, :4] += 120
    return images.astype(np.uint8), labels


def _images(folder: Path, samples: int) -> None:
    from PIL import Image

    for seed, (split, count, _) in enumerate(_splits(samples)):
        for number, (image, label) in enumerate(zip(*pictures(count, seed), strict=True)):
            place = folder / split.replace("dev", "val") / ("dark", "left")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03}.png")


_WRITERS: dict[str, Any] = {
    "text_classification": _classes,
    "text_similarity": _similarities,
    "question_answering": _questions,
    "language_modeling": _texts,
    "image_classification": _images,
}
