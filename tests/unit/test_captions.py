"""The example captions: files agree, splits share no sentence or frame, the German is inflected."""

import importlib.util
import shutil
import string
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import ROOT

FOLDER = ROOT / "assets" / "captions"
SPLITS = ("train", "val", "test")
CAPTION_FILES = ("train_handwritten", "val", "test")


def load_generator() -> ModuleType:
    """Import make_captions.py, which lies outside the package."""
    spec = importlib.util.spec_from_file_location("make_captions", FOLDER / "make_captions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


captions = load_generator()


def lines(name: str) -> list[str]:
    """Read the captions of one file, insisting on a newline after each."""
    text = (FOLDER / name).read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\r" not in text
    return text.removesuffix("\n").split("\n")


def frames(split: str) -> dict[str, str]:
    """Map the frames of a split to a sentence that has it; short sentences have none.

    A frame is the sentence in lower case, without punctuation, each word outside the closed list
    FUNCTION_WORDS (articles, pronouns, prepositions, conjunctions, auxiliaries) replaced by "_".
    """
    found = {captions.frame(line): line for line in lines(f"{split}.en")}
    return {frame: line for frame, line in found.items() if frame is not None}


@pytest.mark.parametrize("split", [*SPLITS, "train_handwritten"])
def test_both_languages_have_a_caption_on_every_line(split):
    english, german = lines(f"{split}.en"), lines(f"{split}.de")
    assert len(english) == len(german)
    assert all(line and line == line.strip() for line in english + german)


def test_sizes():
    handwritten = sum(len(lines(f"{name}.en")) for name in CAPTION_FILES)
    total = sum(len(lines(f"{split}.en")) for split in SPLITS)
    assert handwritten >= 300
    assert 1450 <= total <= 1550
    assert total - handwritten == captions.DRAWN == 1130


def test_no_english_sentence_occurs_twice():
    plain = str.maketrans("", "", string.punctuation)
    every = [line.lower().translate(plain) for split in SPLITS for line in lines(f"{split}.en")]
    assert [line for line, times in Counter(every).items() if times > 1] == []


def test_drawn_german_sentences_are_distinct():
    drawn = lines("train.de")[-captions.DRAWN :]
    assert len(set(drawn)) == captions.DRAWN


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_no_frame_is_shared_between_splits(one, other):
    ours, theirs = frames(one), frames(other)
    shared = [(ours[frame], theirs[frame]) for frame in ours if frame in theirs]
    assert shared == []


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man in a red coat is waiting at a bus stop.", "a _ in a _ _ is _ at a _ _"),
        ("A dog in a blue coat is sleeping at a bus stop!", "a _ in a _ _ is _ at a _ _"),
        ("In the park, two girls are reading.", "in the _ _ _ are _"),
        ("Two girls are reading a book.", None),
    ],
)
def test_frame(caption, expected):
    assert captions.frame(caption) == expected


def test_train_begins_with_the_handwritten_captions():
    for tongue in ("en", "de"):
        handwritten = lines(f"train_handwritten.{tongue}")
        assert lines(f"train.{tongue}")[: len(handwritten)] == handwritten


def copied(folder: Path) -> Path:
    """Copy the hand-written files, from which the others are made."""
    for name in CAPTION_FILES:
        for tongue in ("en", "de"):
            shutil.copy(FOLDER / f"{name}.{tongue}", folder)
    return folder


def test_generator_reproduces_the_files(tmp_path):
    assert captions.main(["--check"]) == 0
    assert captions.main(["--folder", str(copied(tmp_path))]) == 0
    for name in ("train.en", "train.de"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 8


def test_check_names_the_file_that_differs_and_leaves_it(tmp_path, capsys):
    captions.main(["--folder", str(copied(tmp_path))])
    (tmp_path / "train.de").write_text("Ein Hund.\n", encoding="utf-8")
    assert captions.main(["--check", "--folder", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message == "train.de: not what make_captions.py writes; run it again\n"
    assert (tmp_path / "train.de").read_text(encoding="utf-8") == "Ein Hund.\n"


@pytest.mark.parametrize(
    ("noun", "case", "determiner", "adjective", "plural", "expected"),
    [
        ("man", "nominative", "definite", "alt", False, "der alte Mann"),
        ("man", "accusative", "definite", "alt", False, "den alten Mann"),
        ("man", "dative", "definite", "alt", False, "dem alten Mann"),
        ("man", "nominative", "indefinite", "alt", False, "ein alter Mann"),
        ("man", "accusative", "indefinite", "alt", False, "einen alten Mann"),
        ("man", "dative", "indefinite", "alt", False, "einem alten Mann"),
        ("jacket", "nominative", "definite", "rot", False, "die rote Jacke"),
        ("jacket", "accusative", "definite", "rot", False, "die rote Jacke"),
        ("jacket", "dative", "definite", "rot", False, "der roten Jacke"),
        ("jacket", "nominative", "indefinite", "rot", False, "eine rote Jacke"),
        ("jacket", "accusative", "indefinite", "rot", False, "eine rote Jacke"),
        ("jacket", "dative", "indefinite", "rot", False, "einer roten Jacke"),
        ("dress", "nominative", "definite", "lang", False, "das lange Kleid"),
        ("dress", "dative", "definite", "lang", False, "dem langen Kleid"),
        ("dress", "nominative", "indefinite", "lang", False, "ein langes Kleid"),
        ("dress", "accusative", "indefinite", "lang", False, "ein langes Kleid"),
        ("dress", "dative", "indefinite", "lang", False, "einem langen Kleid"),
        ("boy", "nominative", "definite", "klein", False, "der kleine Junge"),
        ("boy", "accusative", "definite", "klein", False, "den kleinen Jungen"),
        ("boy", "dative", "indefinite", "klein", False, "einem kleinen Jungen"),
        ("gentleman", "dative", "indefinite", "älter", False, "einem älteren Herrn"),
        ("tourist", "accusative", "indefinite", "", False, "einen Touristen"),
        ("child", "nominative", "definite", "klein", True, "die kleinen Kinder"),
        ("child", "dative", "definite", "klein", True, "den kleinen Kindern"),
        ("child", "nominative", "none", "klein", True, "kleine Kinder"),
        ("coat", "dative", "none", "gelb", True, "gelben Mänteln"),
        ("car", "dative", "none", "neu", True, "neuen Autos"),
        ("woman", "dative", "none", "jung", True, "jungen Frauen"),
        ("dog", "accusative", "none", "", True, "Hunde"),
        ("gentleman", "nominative", "none", "älter", True, "ältere Herren"),
    ],
)
def test_noun_phrase(noun, case, determiner, adjective, plural, expected):
    phrase = captions.noun_phrase(captions.LEXICON[noun], case, determiner, adjective, plural)
    assert phrase == expected


@pytest.mark.parametrize(
    ("count", "case", "expected"),
    [
        ("two", "dative", ("two small boys", "zwei kleinen Jungen")),
        ("several", "nominative", ("several small boys", "mehrere kleine Jungen")),
        ("several", "dative", ("several small boys", "mehreren kleinen Jungen")),
        ("the", "accusative", ("the small boy", "den kleinen Jungen")),
    ],
)
def test_phrase_in_both_languages(count, case, expected):
    phrase = captions.phrase(captions.LEXICON["boy"], case, count, "small")
    assert (phrase.en, phrase.de) == expected


def test_article_before_a_vowel():
    phrase = captions.phrase(captions.LEXICON["umbrella"], "nominative", "a", "")
    assert (phrase.en, phrase.de) == ("an umbrella", "ein Regenschirm")


def test_no_indefinite_plural():
    with pytest.raises(ValueError, match='"Hund" has no indefinite plural; use the determiner'):
        captions.noun_phrase(captions.LEXICON["dog"], "nominative", "indefinite", plural=True)


def test_word_order():
    what = captions.Clause({}, "sieht", "einem Kind", "zu", ("in the park", "im Park"))
    assert captions.main_clause("ein Mann", what) == "ein Mann sieht im Park einem Kind zu"
    assert captions.inverted("im Park", "ein Mann", what) == "im Park sieht ein Mann einem Kind zu"
    assert captions.subordinate("ein Mann", what) == "ein Mann im Park einem Kind zusieht"


def test_a_grammar_that_is_used_up_says_so(monkeypatch):
    monkeypatch.setattr(captions, "TRIES", 10)
    with pytest.raises(RuntimeError, match=r"10 tries gave .* captions, 1130 expected"):
        captions.drawn_pairs(set(), set())
