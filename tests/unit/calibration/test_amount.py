"""How much of a split is measured: the cut, the portions that are read, what is held out."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composable import tasks
from composable.calibration import amount, collect
from composable.calibration.amount import Amount, amounts, take
from composable.calibration.batching import Texts
from composable.calibration.obtain import real_tokens
from composable.commands import options
from composable.models.checkpoint import Checkpoint
from composable.tasks.plain_texts import read_texts
from tests import tiny, tiny_tasks


def reader(task: str, folder: Path, split: str = "train") -> tuple[list[int | None], Any]:
    """What reads a split, and the limits it was called with."""
    limits: list[int | None] = []
    read = functools.partial(tasks.by_name(task).read, str(folder), None, split)

    def watched(limit: int | None) -> Any:
        limits.append(limit)
        return read(limit)

    return limits, watched


def fewest(dense: Checkpoint, read: Callable[[None], Any], tokens: int) -> Texts:
    """The first samples of the whole split, one more each time until their tokens are enough."""
    whole = Texts(dense, read(None))
    for count in range(1, len(whole) + 1):
        items = [whole.dataset[i] for i in range(count)]
        found = real_tokens(dense, [whole._collate([item]) for item in items])
        if min(found.values()) >= tokens:
            return whole.first(count)
    return whole


@pytest.fixture
def model_and_text(tmp_path: Path) -> tuple[Checkpoint, Path]:
    """A language model with windows of 8 tokens, and 60 lines of 1 to 7 words, some empty."""
    dense = tiny_tasks.checkpoint("language_modeling", max_length=8)
    lines = [" ".join(tiny_tasks.WORDS[i % 9 : i % 9 + i % 8]) for i in range(3, 63)]
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "valid.txt").write_text("a man runs .\n" * 40)
    return dense, tmp_path


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40, 41, 200, 10**6])
@pytest.mark.parametrize("portion", [3, 4, 1024])
def test_the_fewest_windows_with_so_many_tokens(
    model_and_text: Any, tokens: int, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever portions are read, a window at the end of one is not taken for whole."""
    dense, folder = model_and_text
    monkeypatch.setattr(amount, "PORTION", portion)
    _, read = reader("language_modeling", folder)
    found, wanted = take(dense, read, Amount(tokens=tokens)), fewest(dense, read, tokens)
    assert (len(found), found.identity) == (len(wanted), wanted.identity)
    assert sum(found.dataset.lengths[:-1]) < tokens
    assert found.dataset.sizes == [(length, length) for length in found.dataset.lengths]
    batches = found.batches()
    assert sum(len(batch["input_ids"]) for batch in batches) == len(found)


def test_no_more_is_read_than_needed(model_and_text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, folder = model_and_text
    monkeypatch.setattr(amount, "PORTION", 3)
    tokenised: list[int] = []
    dataset = type(tasks.by_name("language_modeling")).dataset

    def watched(self: Any, corpus: Any, *args: Any) -> Any:
        tokenised.append(corpus.text.count("\n"))
        return dataset(self, corpus, *args)

    monkeypatch.setattr(type(tasks.by_name("language_modeling")), "dataset", watched)
    for tokens, portions in ((1, [3]), (40, [3, 12]), (10**6, [3, 12, 48, 192, 768])):
        limits, read = reader("language_modeling", folder)
        tokenised.clear()
        take(dense, read, Amount(tokens=tokens))
        assert limits == portions
        assert tokenised == [min(portion, 60) for portion in portions[:4]]  # the whole text once


@pytest.mark.parametrize(("limit", "portions"), [(2, [2]), (3, [3]), (20, [3, 12, 20])])
def test_a_limit_of_lines_holds(
    model_and_text: Any, limit: int, portions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, folder = model_and_text
    monkeypatch.setattr(amount, "PORTION", 3)
    limits, read = reader("language_modeling", folder)
    found = take(dense, read, Amount(tokens=10**6), limit)
    assert limits == portions
    assert found.identity == Texts(dense, read(limit)).identity
    limits.clear()
    take(dense, read, Amount(samples=50), limit)
    take(dense, read, Amount(samples=2), limit)
    assert limits == [limit, 2]


@pytest.mark.parametrize("longer", ["source", "target"])
def test_both_stacks_have_so_many(
    longer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny.checkpoint()
    monkeypatch.setattr(amount, "PORTION", 2)
    sides = {"en": "a dog sits .\n", "de": "ein hund\n"}
    if longer == "target":
        sides = {"en": "a dog\n", "de": "ein hund sitzt auf der straße\n"}
    for ending, line in sides.items():
        (tmp_path / f"train.{ending}").write_text(line * 50)
    _, read = reader("translation", tmp_path)
    found = take(dense, read, Amount(tokens=40))
    assert len(found) == 14  # three tokens of the shorter side, with that of its end
    assert found.identity == fewest(dense, read, 40).identity
    assert min(real_tokens(dense, found.batches()).values()) == 42


def test_plain_texts_pass_one_stack_only(tmp_path: Path) -> None:
    dense = tiny.checkpoint()
    (tmp_path / "x.txt").write_text("a dog sits .\n" * 50)
    found = collect.calibration_set(dense, str(tmp_path / "x.txt"), None)
    assert len(found) == 50  # shorter than wanted: all of it
    read = functools.partial(read_texts, tmp_path / "x.txt", "text")
    assert len(take(dense, read, Amount(tokens=21))) == 5


def test_images_count_by_their_patches(tmp_path: Path) -> None:
    dense, path = tiny_tasks.checkpoint("image_classification"), tmp_path / "a.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(path, train_images=pictures, train_labels=np.arange(30) % 2)
    for tokens, images in ((1, 1), (5, 1), (6, 2), (50, 10), (10**6, 27)):
        limits, read = reader("image_classification", path)
        found = take(dense, read, Amount(tokens=tokens))  # 2 by 2 patches and a class token
        assert len(found) == images
        assert real_tokens(dense, found.batches())["encoder"] == 5 * images
        assert limits == [-(-tokens // 5)], "images are not read to count them"


def test_a_quarter_is_held_out() -> None:
    assert amounts(None, None) == (Amount(None, 65_536), Amount(None, 16_384))
    assert amounts(12, None)[1].samples == 3
    assert amounts(13, None)[1].samples == 4
    assert amounts(12, 9)[1].samples == 9
    assert amounts(None, 9) == (Amount(), Amount(9))


def test_calibrations_hold_a_quarter_out(model_and_text: Any, tmp_path: Path) -> None:
    dense, folder = model_and_text
    settings = {"data": str(folder), "memory_budget": 1 << 30, "device": "cpu"}

    def split(name: str, lines: int) -> str:
        corpus = tasks.by_name("language_modeling").read(str(folder), None, name, lines)
        return Texts(dense, corpus).identity

    for index, (samples, held_out, wanted) in enumerate(((40, None, 10), (40, 15, 15))):
        how = settings | {"limit": samples, "held_out_samples": held_out}
        found, texts = collect.calibrate(dense, tmp_path / f"{index}.npy", **how)
        assert [part.identity for part in texts] == [split("train", 40), split("valid", wanted)]
        assert [found.info[name]["samples"] for name in ("train", "valid")] == [*map(len, texts)]
        (first,) = collect.calibrate(dense, tmp_path / "c.npy", held_out=False, **how)[1]
        assert first.identity == texts[0].identity
    layer = next(m.name for m in dense.family.modules(dense.model) if m.kind == "layer")
    del how["memory_budget"]
    states = collect.block_moments(dense, [(layer, layer)], **how)((layer, layer))
    assert [side.inputs.count for side in states] == [
        found.info[name]["tokens"]["decoder"] for name in ("train", "valid")
    ]


def test_facts_for_reports(model_and_text: Any, tmp_path: Path) -> None:
    """The widest linear of the model has 48 inputs."""
    dense, folder = model_and_text
    found, (texts,) = collect.calibrate(
        dense, tmp_path / "c.npy", str(folder), None, 1 << 30, "cpu", held_out=False
    )
    tokens = sum(texts.dataset.lengths)
    assert collect.facts_of(found) == {
        "calibration": str(tmp_path / "c.npy"),
        "calibration_tokens": {"decoder": tokens},
        "tokens_per_input": round(tokens / 48, 2),
    }
    assert collect.tokens_per_input(dense, {"decoder": tokens}) == round(tokens / 48, 2)
    both = tiny.checkpoint()
    assert collect.tokens_per_input(both, {"encoder": 960, "decoder": 480}) == 10
    assert collect.tokens_per_input(both, {"encoder": 960}) == 20


def test_help_says_how_much() -> None:
    assert f"{amount.TOKENS:,}" in options.UNTIL_ENOUGH
