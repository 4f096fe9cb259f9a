"""Reading parallel text: plain and gzipped, Multi30K checked, one line for what is wrong."""

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from composable import tasks
from composable.errors import FormatError, UserError
from composable.tasks import translation
from composable.tasks.translation_decode import translate
from composable.training.options import Options
from composable.variants import gradient
from tests import tiny, tiny_tasks


def folder_of(path: Path, **contents: bytes) -> Path:
    """A folder with files; `test__en` is written as test.en."""
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def test_plain_and_gzipped_are_read_alike(tmp_path: Path) -> None:
    plain = folder_of(
        tmp_path / "p", test__en=b"a dog\na cat\n", test__de=b"ein Hund\neine Katze\n"
    )
    packed = tmp_path / "g"
    packed.mkdir()
    for file in plain.iterdir():
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    read = [translation.read_corpus(folder, "test") for folder in (plain, packed)]
    assert read[0].source == ["a dog", "a cat"]
    assert read[0].target == ["ein Hund", "eine Katze"]
    assert dataclasses.replace(read[1], name=read[0].name) == read[0]
    assert translation.read_corpus(plain, "test", limit=1).source == ["a dog"]


@pytest.mark.parametrize(
    ("contents", "error", "message"),
    [
        ({}, UserError, r"no test_2016_flickr\.en\(\.gz\) or test\.en\(\.gz\)"),
        ({"test__en": b"a\n"}, UserError, r"test\.de\(\.gz\): no such file"),
        (
            {"test__en": b"a\nb\n", "test__de": b"a\n"},
            FormatError,
            r"test\.en has 2 lines and test\.de has 1",
        ),
        ({"test__en": b"", "test__de": b""}, FormatError, "has 0 lines"),
        ({"test__en": b"\xff\n", "test__de": b"a\n"}, FormatError, "cannot be read as text"),
        (
            {"test_2016_flickr__en": b"a\n", "test_2016_flickr__de": b"a\n"},
            FormatError,
            r"test_2016_flickr\.en: not Multi30K's \(1 lines, 1000 were expected\); delete it",
        ),
        (
            {"test_2016_flickr__en": b"a\n" * 1000, "test_2016_flickr__de": b"a\n"},
            FormatError,
            r"not Multi30K's \(SHA-256 of the text is [0-9a-f]{12}\.\.\., 399a4382932c",
        ),
    ],
)
def test_refused_with_one_line(
    contents: dict[str, bytes], error: type[UserError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        translation.read_corpus(folder_of(tmp_path / "x", **contents), "test")
    assert "\n" not in str(caught.value)


TEXT, OTHER = "Ein Hund läuft.\nZwei Katzen.\n", "a dog\ntwo cats\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode("utf-8-sig"),
        TEXT.removesuffix("\n").encode(),
    ],
)
def test_marks_and_line_ends_are_no_text(content: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "x", test__de=content, test__en=OTHER.encode())
    found = translation.read_corpus(folder, "test")
    assert (found.source, found.target) == (OTHER.splitlines(), TEXT.splitlines())
    plain = folder_of(tmp_path / "y", test__de=TEXT.encode(), test__en=OTHER.encode())
    assert found.sha256 == translation.read_corpus(plain, "test").sha256


def test_a_model_of_infinite_weights_has_no_score(tmp_path: Path) -> None:
    """Its translations are words, and would have a BLEU."""
    made = tiny.checkpoint()
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(torch.inf)
    corpus = translation.read_corpus(tiny.corpus(tmp_path / "x", pairs=4), "test")
    settings = {"device": "cpu", "dtype": "float32", "num_beams": 1, "batch_tokens": 99}
    with pytest.raises(UserError, match="the model's loss is nan, a finite number was expected"):
        translation.TRANSLATION.evaluate(made, corpus, settings | {"max_length": 4})


def test_pairs_without_a_token_are_refused() -> None:
    """A tokenizer that adds an end token gives an empty line one."""
    corpus = translation.Corpus("x", "test", ["a dog", ""], ["ein Hund", "b"], "0")
    made = tiny.checkpoint()
    assert translation.Pairs(corpus, made.tokenizer, "").sizes[1][1] == 1
    bare = tiny_tasks.tokenizer(pairs=False)
    with pytest.raises(FormatError, match="x: source, line 2: the text has no token"):
        translation.Pairs(corpus, bare, "")
    with pytest.raises(FormatError, match="sentence 2: the text has no token"):
        translation.translate(made.model, bare, corpus.source)


def test_an_unknown_task_names_the_known_ones() -> None:
    assert tasks.by_name("translation").name == "translation"
    with pytest.raises(UserError, match='unknown task "summaries"; known are translation'):
        tasks.by_name("summaries")


def test_variants_are_not_trained_in_float16(corpora: Any) -> None:
    options = Options(epochs=1, batch_size=8, lr=0.01, early_stop=0, dtype="float16")
    with pytest.raises(UserError, match="float16 would couple the variants; use bfloat16"):
        gradient.tune(tiny.checkpoint(), [], corpora, options)


def test_a_model_that_asks_for_more_than_tokens() -> None:
    """Its settings of `generate` want scores, and an object around everything."""
    model, tokenizer = tiny.t5(), tiny.tokenizer()
    texts = ["a man runs", "a dog"]
    expected = translate(model, tokenizer, texts, num_beams=2, max_length=9)
    model.generation_config.update(return_dict_in_generate=True, output_scores=True)
    assert translate(model, tokenizer, texts, num_beams=2, max_length=9) == expected
