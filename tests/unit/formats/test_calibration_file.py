"""The .npy of a calibration: what is written, what is refused, what is read."""

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from composable.errors import FormatError, MismatchError, UserError
from composable.formats import bundle
from composable.formats.calibration_file import (
    REMEDY,
    Calibration,
    Header,
    Input,
    open_calibration,
    write,
)
from composable.linalg.grams import Gram
from tests.npy import read_sizes, rewrite_header

GOLDEN_SHA256 = "b706a48dc4852fa71763f6eb5590914e10246abd651ce20633860cce6943c33c"
GOLDEN_SIZE = 2312
QKV = ("encoder.0.q", "encoder.0.k", "encoder.0.v")


def gram(rows: list[list[float]]) -> Gram:
    x = torch.tensor(rows, dtype=torch.float64)
    return Gram(x.T @ x, x.sum(0), len(x))


def golden() -> tuple[Header, list[Gram]]:
    """Two inputs on two splits; the moments of both inputs on one split, then on the other."""

    def texts(identity: str, samples: int, tokens: dict[str, int]) -> dict[str, Any]:
        return {"identity": identity * 32, "samples": samples, "tokens": tokens}

    info = {
        "train": texts("ab", 2, {"encoder": 3, "decoder": 1}),
        "valid": texts("cd", 1, {"encoder": 1, "decoder": 2}),
    }
    grams = [
        gram([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0], [0.0, 1.0, 1.0]]),
        gram([[1.5]]),
        gram([[3.0, 1.0, 0.25]]),
        gram([[2.0], [-4.0]]),
    ]
    inputs = [
        Input(QKV, 3, {"train": 3, "valid": 1}),
        Input(("decoder.0.o",), 1, {"train": 1, "valid": 2}),
    ]
    return Header("f" * 64, info, inputs), grams


def training_half() -> tuple[Header, list[Gram]]:
    """The same without held-out texts."""
    header, grams = golden()
    inputs = [Input(it.linears, it.width, {"train": it.tokens["train"]}) for it in header.inputs]
    return Header(header.fingerprint, {"train": header.info["train"]}, inputs), grams[:2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "calibration.npy", *golden())
    return tmp_path / "calibration.npy"


def load_all(calibration: Calibration) -> list[Gram]:
    loads = (calibration.inputs, calibration.held_out)
    return [load(name) for name in calibration.names for load in loads]


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        load_all(open_calibration(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"; {REMEDY}.")
    return message


def assert_same(left: Gram, right: Gram) -> None:
    assert left.count == right.count
    assert torch.equal(left.matrix, right.matrix)
    assert torch.equal(left.total, right.total)
    assert left.matrix.dtype == left.total.dtype == torch.float64


# ------------------------------------------------------------------------------- round trip


def test_what_was_written_is_read(path: Path) -> None:
    header, grams = golden()
    found = open_calibration(path, "f" * 64)
    assert (found.path, found.fingerprint, found.info) == (path, "f" * 64, header.info)
    assert found.names == (*QKV, "decoder.0.o")
    for name, index in zip(found.names, (0, 0, 0, 1), strict=True):
        assert_same(found.inputs(name), grams[index])
        assert_same(found.held_out(name), grams[2 + index])


def test_held_out_moments_may_be_missing(path: Path) -> None:
    """They are appended: what is there without them lies at the same place in the data."""
    half = path.with_name("half.npy")
    write(half, *training_half())
    found = open_calibration(half)
    for name, index in zip(found.names, (0, 0, 0, 1), strict=True):
        assert_same(found.inputs(name), golden()[1][index])
    with pytest.raises(MismatchError) as caught:
        found.held_out("decoder.0.o")
    assert str(caught.value) == f"{half}: was measured without held-out texts; {REMEDY}."
    data = [each.read_bytes()[136 + length_of(each) :] for each in (half, path)]
    assert data[1].startswith(data[0])
    assert len(data[0]) * 2 == len(data[1])


def length_of(path: Path) -> int:
    return int(struct.unpack_from("<Q", path.read_bytes(), 128)[0])


def test_golden_bytes(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) == GOLDEN_SIZE
    assert hashlib.sha256(content).hexdigest() == GOLDEN_SHA256, "raise the version, then the pin"


def read_as_the_page_says(path: Path) -> tuple[dict[str, Any], dict[str, list[tuple[Any, ...]]]]:
    """Read a calibration with nothing but docs/formats.md: no numpy, no torch, no safetensors."""
    content = path.read_bytes()
    size = len(content) - 128
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".ljust(117) + "\n"
    assert content[:128] == b"\x93NUMPY\x01\x00v\x00" + text.encode()
    (length,) = struct.unpack_from("<Q", content, 128)
    header, data = content[136 : 136 + length], content[136 + length :]
    metadata = json.loads(header)["__metadata__"]
    blank = header[:29] + b"0" * 64 + header[93:]
    assert hashlib.sha256(blank).hexdigest() == metadata["checksum"]
    found: dict[str, list[tuple[Any, ...]]] = {}
    begin = 0
    for split in ("train", "valid"):
        if split not in json.loads(metadata["info"]):
            continue
        for item in json.loads(metadata["inputs"]):
            n = item["width"]
            packed, begin = data[begin : begin + 4 * n * (n + 1)], begin + 4 * n * (n + 1)
            total, begin = data[begin : begin + 8 * n], begin + 8 * n
            for name, raw in (("matrix", packed), ("total", total)):
                assert hashlib.sha256(raw).hexdigest() == item["sha256"][f"{split}.{name}"]
            upper = iter(struct.unpack(f"<{n * (n + 1) // 2}d", packed))
            matrix = {(i, j): next(upper) for i in range(n) for j in range(i, n)}
            moments = (item["tokens"][split], matrix, struct.unpack(f"<{n}d", total))
            for linear in item["linears"]:
                found.setdefault(linear, []).append(moments)
    assert begin == len(data)
    return metadata, found


@pytest.mark.parametrize("made", [golden, training_half])
def test_a_reader_written_from_the_page_alone(tmp_path: Path, made: Any) -> None:
    header, grams = made()
    write(tmp_path / "c.npy", header, grams)
    metadata, found = read_as_the_page_says(tmp_path / "c.npy")
    assert json.loads(metadata["info"]) == header.info
    assert metadata["fingerprint"] == "f" * 64
    for linear, index in [*((name, 0) for name in QKV), ("decoder.0.o", 1)]:
        for (tokens, matrix, total), written in zip(found[linear], grams[index::2], strict=True):
            assert tokens == written.count
            assert total == tuple(written.total.tolist())
            assert all(written.matrix[at] == value for at, value in matrix.items())


def test_the_safetensors_library_reads_the_payload(path: Path) -> None:
    tensors = safetensors.torch.load(np.load(path, allow_pickle=False).tobytes())
    assert sorted(tensors) == [
        f"{index}/{split}.{moment}"
        for index in range(2)
        for split in ("train", "valid")
        for moment in ("matrix", "total")
    ]
    matrix = golden()[1][0].matrix
    rows, columns = np.triu_indices(3)
    assert tensors["0/train.matrix"].tolist() == matrix[rows, columns].tolist()
    assert tensors["0/valid.total"].tolist() == [3.0, 1.0, 0.25]
    assert tensors["1/valid.matrix"].tolist() == [20.0]
    assert all(tensor.dtype == torch.float64 for tensor in tensors.values())


@pytest.mark.parametrize("width", [1, 2, 5, 64, 257])
def test_widths(tmp_path: Path, width: int) -> None:
    torch.manual_seed(width)
    grams = [gram(torch.randn(7, width).tolist()) for _ in range(2)]
    header = golden()[0]._replace(inputs=[Input(("a",), width, {"train": 7, "valid": 7})])
    write(tmp_path / "c.npy", header, grams)
    size = 2 * 8 * (width * (width + 1) // 2 + width)
    assert size < (tmp_path / "c.npy").stat().st_size < size + 2500
    found = open_calibration(tmp_path / "c.npy").inputs("a")
    assert torch.equal(found.matrix.triu(), grams[0].matrix.triu())
    assert torch.equal(found.matrix, found.matrix.T)


def test_what_was_read_is_a_copy(path: Path) -> None:
    found = open_calibration(path)
    found.inputs("encoder.0.q").matrix.zero_()
    found.inputs("encoder.0.q").total.zero_()
    assert_same(found.inputs("encoder.0.k"), golden()[1][0])


# ---------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("older", [None, b"an older file"])
def test_a_file_appears_when_all_of_it_is_written(tmp_path: Path, older: bytes | None) -> None:
    path = tmp_path / "calibration.npy"
    if older:
        path.write_bytes(older)

    def one_by_one(fails: bool) -> Iterator[Gram]:
        for each in golden()[1][: 3 if fails else 4]:
            assert (path.read_bytes() if path.exists() else None) == older
            yield each
        if fails:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, golden()[0], one_by_one(fails=True))
    assert list(tmp_path.iterdir()) == ([path] if older else [])
    write(path, golden()[0], one_by_one(fails=False))
    assert len(path.read_bytes()) == GOLDEN_SIZE
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("moment", ["matrix", "total"])
def test_values_that_are_not_finite_are_not_written(
    tmp_path: Path, value: float, moment: str
) -> None:
    header, grams = golden()
    getattr(grams[3], moment)[-1] = value
    expected = (
        'the inputs of "decoder.0.o" hold NaN or infinity, or their squares do: finite values '
        "were expected; check the model with evaluate.py."
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        write(tmp_path / "c.npy", header, grams)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    header, grams = golden()
    header.inputs[1].linears = ("encoder.0.q",)
    with pytest.raises(FormatError, match="a linear reads two inputs"):
        write(tmp_path / "c.npy", header, grams)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- refused


def test_bundles_and_calibrations_are_not_confused(path: Path) -> None:
    other = path.with_name("modules.npy")
    bundle.write(other, bundle.Bundle("f", []))
    expected = "format 'composable.bundle', expected 'composable.calibration'"
    assert expected in refused(other)
    with pytest.raises(FormatError, match=r"format 'composable\.calibration', expected"):
        bundle.open_bundle(path)


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version(path: Path, version: str) -> None:
    rewrite_header(path, '"version":"2"', f'"version":"{version}"')
    message = refused(path)
    assert f"another version (format version '{version}', this program reads '2'" in message
    assert "delete it, or name another file, and it will be measured again" in message


def test_every_byte_of_the_data_is_checked(path: Path) -> None:
    """The container's own checks are in test_container.py."""
    content = path.read_bytes()
    start = 136 + length_of(path)
    assert len(content) - start == 2 * 8 * (6 + 3) + 2 * 8 * (1 + 1)
    for position in range(start, len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert "is damaged (its SHA-256 differs" in refused(path)


def test_a_flipped_tensor_is_named_and_others_load(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the column sums of the last input, held out
    path.write_bytes(content)
    found = open_calibration(path)
    found.inputs("decoder.0.o")
    found.held_out("encoder.0.v")
    with pytest.raises(FormatError) as caught:
        found.held_out("decoder.0.o")
    assert str(caught.value) == (
        f'{path}: tensor "1/valid.total", of "decoder.0.o", is damaged (its SHA-256 differs from '
        f"the header's); {REMEDY}."
    )


def test_values_that_are_not_finite_are_not_read(path: Path) -> None:
    content = path.read_bytes()
    bad = struct.pack("<d", float("nan"))
    old = hashlib.sha256(content[-8:]).hexdigest()
    path.write_bytes(content[:-8] + bad)
    rewrite_header(path, old, hashlib.sha256(bad).hexdigest())
    assert "is damaged (NaN or infinite values)" in refused(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"data_offsets":[0,', '"data_offsets":[1,', "names, types, shapes or offsets"),
        ('\\"width\\":3', '\\"width\\":2', "names, types, shapes or offsets"),
        ('\\"width\\":3', '\\"width\\":0', "width is a count above 0"),
        ('\\"width\\":3', '\\"width\\":-3', "width is a count above 0"),
        ('\\"width\\":3', '\\"width\\":3.0', "width 3.0 has the wrong type"),
        ('\\"width\\":3', '\\"width\\":true', "width True has the wrong type"),
        ('\\"width\\":3', '\\"width\\":3,\\"x\\":1', "has not the keys"),
        ('\\"width\\":3', '\\"width\\":3,\\"width\\":3', 'key "width" occurs twice'),
        ('\\"tokens\\":{\\"train\\":3', '\\"tokens\\":{\\"train\\":-3', "tokens are counts"),
        ('\\"tokens\\":{\\"train\\":3', '\\"tokens\\":{\\"train\\":3.5', "has the wrong type"),
        ('\\"tokens\\":{\\"train\\":3', '\\"tokens\\":{\\"test\\":3', "has not the keys"),
        ('[\\"decoder.0.o\\"]', "[]", "linears are names, at least one"),
        ('[\\"decoder.0.o\\"]', '[\\"\\"]', "linears are names, at least one"),
        ('[\\"decoder.0.o\\"]', "[1]", "linears are names, at least one"),
        ('[\\"decoder.0.o\\"]', '[\\"a\\",\\"a\\"]', "a linear reads two inputs"),
        ('[\\"decoder.0.o\\"]', '[\\"encoder.0.k\\"]', "a linear reads two inputs"),
        ('train.total\\":\\"', 'train.total\\":\\"x', "digests are 64 hex digits"),
        ('train.total\\"', 'train.totla\\"', "has not the keys"),
        ('"info":"{\\"train\\"', '"info":"{\\"tarin\\"', "info: "),
        (
            '{\\"identity\\":\\"a',
            '{\\"identity\\":\\"x',
            "train: identity is not 64 hex digits",
        ),
        ('\\"samples\\":2', '\\"samples\\":-2', "info, train: samples and tokens are not counts"),
        ('\\"samples\\":2', '\\"samples\\":\\"2\\"', "has the wrong type"),
        ('{\\"decoder\\":1', '{\\"decoder\\":-1', "samples and tokens are not counts"),
        ('{\\"decoder\\":1', '{\\"decoder\\":NaN', "NaN is not a number that JSON knows"),
        ('"info":"{', '"info":"[{', "header: "),
        ('"info"', '"inof"', "has not the keys"),
        ('"fingerprint":"', '"fingerprint":1,"x":"', "has not the keys"),
    ],
)
def test_a_wrong_header_with_a_right_checksum(
    path: Path, old: str, new: str, expected: str
) -> None:
    rewrite_header(path, old, new)
    assert expected in refused(path)


def test_another_models_calibration(path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        open_calibration(path, "e" * 64)
    assert str(caught.value) == (
        f"{path}: measured on another model (fingerprint ffffffffffff, this one has eeeeeeeeeeee); "
        f"{REMEDY}."
    )


def test_a_linear_that_was_not_measured(path: Path) -> None:
    found = open_calibration(path)
    for load in (found.inputs, found.held_out):
        with pytest.raises(MismatchError) as caught:
            load("decoder.0.q")
        assert str(caught.value) == (
            f'{path}: has no moments of "decoder.0.q" (has those of 4 linears); {REMEDY}.'
        )


# -------------------------------------------------------------------------------- resources


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    width, count = 64, 8
    moments = Gram(torch.eye(width).double(), torch.zeros(width).double(), 3)
    tokens = {"train": 3, "valid": 3}
    inputs = [Input((f"l{index}",), width, dict(tokens)) for index in range(count)]
    grams = [moments] * (2 * count)
    write(tmp_path / "big.npy", golden()[0]._replace(inputs=inputs), grams)
    sizes = read_sizes(monkeypatch)
    found = open_calibration(tmp_path / "big.npy")
    assert sum(sizes) < 16 * 1024, "the header alone"
    sizes.clear()
    assert_same(found.held_out("l5"), moments)
    assert sizes == [width * (width + 1) // 2 * 8, width * 8]
