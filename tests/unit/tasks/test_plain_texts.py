"""Files of plain texts: a text a line, or a text under a key of every line's object."""

import gzip
from pathlib import Path

import pytest

from composable.errors import FormatError
from composable.tasks.plain_texts import is_plain, read_texts, refuse_unknown


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" one\n\n two\u2028three \n   \nfour")
    found = read_texts(path)
    assert found.texts == ["one", "two\u2028three", "four"]
    assert read_texts(path, limit=2).texts == ["one", "two\u2028three"]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_texts(packed).texts == found.texts
    assert read_texts(packed).sha256 == found.sha256 != read_texts(path, limit=2).sha256


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "body": "one"}\n\n{"id": 2, "body": " "}\n{"body": "t\\nwo"}\n')
    assert read_texts(path, "body").texts == ["one", "t\nwo"]
    with pytest.raises(
        FormatError, match=r'line 1 has no text under the key "text" \(has id, body\)'
    ):
        read_texts(path, "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "no text in it"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[1]", r'no text under the key "text" \(has list\)'),
        ("a.jsonl", '{"text": 3}', r'no text under the key "text" \(has \'3\' there\); correct it'),
        ("a.jsonl", "", "no text in it"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match=message):
        read_texts(tmp_path / name, "text")
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="cannot be read as text"):
        read_texts(tmp_path / name, "text")


def test_which_files_are_plain(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz", "wiki.valid.tokens", "a.raw", "a.jsonl", "a.tsv", "a.npz"):
        (tmp_path / name).write_text("x")
    plain = {path.name for path in tmp_path.iterdir() if is_plain(str(path))}
    assert plain == {"a.txt", "a.txt.gz", "wiki.valid.tokens", "a.raw", "a.jsonl"}
    assert not is_plain(str(tmp_path))
    assert not is_plain(None)


@pytest.mark.parametrize("name", ["a.json", "b.parquet", "c.JSON.gz"])
def test_files_that_would_pass_for_a_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]")
    with pytest.raises(FormatError, match=r"is not read here; give a text a line \(\.txt\)"):
        refuse_unknown(str(tmp_path / name))
    refuse_unknown(str(tmp_path))
    refuse_unknown(None)
