"""The .pth of a model: equal bytes, equality after loading, and everything that is refused."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from composable.errors import FormatError, MismatchError, UserError
from composable.formats.config import Entry
from composable.formats.container import unpack_mask
from composable.models.checkpoint import Checkpoint, fingerprint_of, load, save
from composable.models.pretrained import import_model
from composable.models.structure import Edit, from_json, to_json
from composable.variants.compose import compose
from composable.variants.pruning import make_variants
from tests import tiny

MASKED = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
KINDS = [{}, {"gated": True}, {"gated": True, "mt5": True}]
TIED = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]


def composed() -> Checkpoint:
    """A model with everything that can be in a file: heads, masks, a removed ffn and layer."""
    scheme = {
        "encoder.block.0": [Entry(1.0)],
        "decoder.block.0.layer.2.DenseReluDense": [Entry(1.0)],
        "decoder.block.1.layer.0.SelfAttention": [Entry(0.25, None, {"o": Entry(0.3)})],
        "encoder.block.1.layer.1.DenseReluDense.wi": [Entry(0.5)],
    }
    return compose(tiny.checkpoint(), make_variants(tiny.checkpoint(), scheme, tiny.BY_WEIGHTS))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model's file."""
    path = tmp_path_factory.mktemp("composed") / "model.pth"
    save(path, composed())
    return path


def assert_equal(one: Checkpoint, other: Checkpoint) -> None:
    left, right = one.model.state_dict(), other.model.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(tensor.dtype == torch.float32 for tensor in left.values())
    assert sorted(one.masks) == sorted(other.masks)
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    for name in ("config", "structure", "fingerprint", "info", "is_dense"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert one.tokenizer("ein hund läuft").input_ids == other.tokenizer("ein hund läuft").input_ids
    assert (
        one.model.generation_config.to_diff_dict() == other.model.generation_config.to_diff_dict()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_checkpoints_give_equal_bytes(kind: dict[str, Any], tmp_path: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "deep" / "a longer name.bin"
    save(first, tiny.checkpoint(**kind))
    save(second, tiny.checkpoint(**kind))
    assert first.read_bytes() == second.read_bytes()
    save(second, load(first))
    assert first.read_bytes() == second.read_bytes()
    assert_equal(load(first), tiny.checkpoint(**kind))
    save(second, tiny.checkpoint(seed=1, **kind))
    assert first.read_bytes() != second.read_bytes()


def test_a_composed_model_survives_the_file(file: Path, tmp_path: Path) -> None:
    loaded = load(file)
    assert_equal(loaded, composed())
    assert len(loaded.masks) == 2
    assert not loaded.model.training
    save(tmp_path / "again.pth", loaded)
    assert (tmp_path / "again.pth").read_bytes() == file.read_bytes()
    with pytest.raises(
        MismatchError, match=r"m\.pth: is a composed model, pruning needs the dense"
    ):
        loaded.require_dense(Path("m.pth"), "pruning")


def test_a_file_is_not_larger_than_its_model(tmp_path: Path) -> None:
    """Views into bigger storages would be stored whole."""
    save(tmp_path / "dense.pth", tiny.checkpoint())
    save(tmp_path / "half.pth", composed())
    parameters = sum(p.numel() for p in composed().model.parameters())
    overhead = 40_000
    assert (tmp_path / "half.pth").stat().st_size < 4 * parameters + overhead
    assert (tmp_path / "half.pth").stat().st_size < (tmp_path / "dense.pth").stat().st_size


def test_tied_weights_stay_tied_and_count_once(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    save(tmp_path / "m.pth", made)
    model = load(tmp_path / "m.pth").model
    weights = {id(model.get_submodule(name).weight) for name in TIED}
    assert len(weights) == 1
    count = sum(p.numel() for p in made.model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert count * 4 <= (tmp_path / "m.pth").stat().st_size < count * 4 + 64 * 32 * 4 + 30_000
    with torch.no_grad():
        model.shared.weight.add_(1.0)
    assert torch.equal(model.lm_head.weight, model.shared.weight)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_vocabulary_projection_of_its_own_stays_so(kind: dict[str, Any], tmp_path: Path) -> None:
    """T5 v1.1, Flan and mT5: their config says tied, their weights are not."""
    made = tiny.t5(**kind)
    made.save_pretrained(tmp_path / "hf")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    save(tmp_path / "m.pth", import_model(tmp_path / "hf", "tiny"))
    model = load(tmp_path / "m.pth").model
    assert len({id(model.get_submodule(name).weight) for name in TIED}) == 2
    tokens = torch.tensor([[5, 9, 3, 1]])
    composed_model = compose(load(tmp_path / "m.pth"), []).model
    for found in (model, composed_model):
        with torch.no_grad():
            logits = found(input_ids=tokens, decoder_input_ids=tokens).logits
            expected = made(input_ids=tokens, decoder_input_ids=tokens).logits
        assert torch.equal(logits, expected)


def test_writing_to_a_loaded_model_leaves_its_file_alone(file: Path) -> None:
    before = file.read_bytes()
    loaded = load(file)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.fill_(1.0)
    assert file.read_bytes() == before
    assert_equal(load(file), composed())


def test_torch_reads_it_without_running_code(file: Path) -> None:
    stored = torch.load(file, weights_only=True)
    assert {key: type(value) for key, value in stored.items()} == {
        "format": str, "version": int, "fingerprint": str, "config": str,
        "generation_config": str, "structure": str, "info": str, "tokenizer": dict, "masks": dict,
        "state_dict": dict,
    }  # fmt: skip
    assert stored["format"] == "composable.model"
    assert stored["version"] == 4
    assert all(str(file.parent) not in str(value) for value in stored.values())


def test_the_fingerprint_sees_every_tensor_and_every_value() -> None:
    made = tiny.checkpoint()
    state = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    seen = {fingerprint_of(made.config, state)}
    for number, name in enumerate(state, 2):
        flat = state[name].view(-1)
        flat[-1] += 1.0
        seen.add(fingerprint_of(made.config, state))
        flat[-1] -= 1.0
        assert len(seen) == number, name
    for number, key in enumerate(made.config, len(seen) + 1):
        seen.add(fingerprint_of({**made.config, key: "other"}, state))
        assert len(seen) == number, key
    first = next(iter(state))
    for changed in (state[first].double(), state[first].t(), state[first][:1]):
        seen.add(fingerprint_of(made.config, {**state, first: changed}))
    seen.add(
        fingerprint_of(made.config, {("x" + n if n == first else n): t for n, t in state.items()})
    )
    assert len(seen) == 1 + len(state) + len(made.config) + 4


@pytest.mark.parametrize("template", ["{{ x }}", {"default": "{{ x }}", "tool_use": "{{ y }}"}])
def test_chat_templates_come_along(template: Any, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    made.tokenizer.chat_template = template
    save(tmp_path / "m.pth", made)
    again = load(tmp_path / "m.pth")
    assert again.tokenizer.chat_template == template
    assert again.reading != tiny.checkpoint().reading


def test_the_fingerprint_is_what_the_documentation_says() -> None:
    made = tiny.checkpoint()
    state = made.model.state_dict()
    plain = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    total = hashlib.sha256(json.dumps(made.config, **plain).encode())  # type: ignore[arg-type]
    for name in sorted(state):
        # tied weights count once, under the first of their names
        if name not in ("encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"):
            shape = ",".join(map(str, state[name].shape))
            total.update(f'["{name}","torch.float32",[{shape}]]'.encode())
            total.update(state[name].numpy().tobytes())
    assert made.fingerprint == total.hexdigest()


def test_the_settings_of_generation_are_stored(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    made.model.generation_config.num_beams = 3
    made.model.generation_config.max_length = 77
    save(tmp_path / "m.pth", made)
    found = load(tmp_path / "m.pth").model.generation_config
    assert (found.num_beams, found.max_length) == (3, 77)
    assert (found.pad_token_id, found.eos_token_id, found.decoder_start_token_id) == (0, 1, 0)


def test_the_fingerprint_belongs_to_the_content(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    expected = fingerprint_of(made.config, made.model.state_dict())
    shuffled = dict(reversed(made.model.state_dict().items()))
    assert fingerprint_of(dict(reversed(made.config.items())), shuffled) == expected
    for name in ("a.pth", "b.pth"):
        save(tmp_path / name, made)
        assert load(tmp_path / name).fingerprint == expected


def test_saving_leaves_its_argument_alone(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    before = dataclasses.replace(made, info=copy.deepcopy(made.info))
    save(tmp_path / "a.pth", made)
    assert made == before
    assert load(tmp_path / "a.pth").fingerprint == made.fingerprint
    made.fingerprint = "f" * 64
    save(tmp_path / "b.pth", made)
    with pytest.raises(FormatError, match=r"b\.pth: its fingerprint is ffffffffffff, that of its"):
        load(tmp_path / "b.pth")
    (tmp_path / "b.pth").unlink()
    made.fingerprint = ""
    with pytest.raises(FormatError, match=r"b\.pth: not written: the model has no fingerprint"):
        save(tmp_path / "b.pth", made)
    assert not (tmp_path / "b.pth").exists()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def rewritten(path: Path, **changes: Any) -> bytes:
    """The file with other values and a right checksum; None removes a value."""
    stored = {**torch.load(path, weights_only=True), **changes}
    stored = {key: value for key, value in stored.items() if value is not None}
    target = path.parent / "rewritten.pth"
    torch.save(stored, target)
    return sealed(target.read_bytes())


def sealed(archive: bytes) -> bytes:
    """The documented seal, made by hand."""
    body = archive[:-2] + (71).to_bytes(2, "little") + b"sha256:"
    return body + hashlib.sha256(body).hexdigest().encode()


def changed_json(path: Path, key: str, **changes: Any) -> str:
    return json.dumps({**json.loads(torch.load(path, weights_only=True)[key]), **changes})


def pickled(value: Any, path: Path, **options: Any) -> bytes:
    torch.save(value, path, **options)
    return path.read_bytes()


def exchanged(path: Path, content: bytes) -> bytes:
    """The same archive with another data.pkl."""
    target = path.parent / "exchanged.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            new.writestr(item, content if item.filename.endswith("data.pkl") else old.read(item))
    return target.read_bytes()


def compressed(path: Path) -> bytes:
    """The same archive with deflated entries, and a right seal."""
    target = path.parent / "compressed.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item) + bytes(10**6))
    return sealed(target.read_bytes())


Make = Callable[[Path, Path], bytes]
REFUSED: dict[str, tuple[Make, str]] = {
    "empty": (lambda f, t: b"", "not a model file of this tool (starts with b'')"),
    "text": (lambda f, t: b"no weights here\n", "starts with b'no w'"),
    "a bundle": (lambda f, t: b"\x93NUMPY\x01\x00", "starts with b'\\x93NUM'"),
    "a zip of nothing": (lambda f, t: b"PK\x05\x06" + bytes(18), "starts with b'PK\\x05\\x06'"),
    "the start of a zip": (lambda f, t: b"PK\x03\x04 and more", "13 bytes do not end as a model"),
    "a plain pickle": (lambda f, t: pickle.dumps(Bomb(t)), "not a model file of this tool"),
    "a pickle of old torch": (
        lambda f, t: pickled(Bomb(t), f.parent / "x", _use_new_zipfile_serialization=False),
        "not a model file of this tool",
    ),
    "a pickled model": (
        lambda f, t: pickled(tiny.t5(), f.parent / "x"),
        "holds pickled Python objects, which are never executed; a file made by download_model.py",
    ),
    "a pickle in a torch archive": (
        lambda f, t: pickled({"format": "composable.model", "model": Bomb(t)}, f.parent / "x"),
        "holds pickled Python objects, which are never executed",
    ),
    "a pickle in a model file": (
        lambda f, t: exchanged(f, pickle.dumps(Bomb(t), protocol=2)),
        "holds pickled Python objects, which are never executed",
    ),
    "a sealed pickle": (
        lambda f, t: sealed(pickled({"format": "composable.model", "x": Bomb(t)}, f.parent / "x")),
        ": holds pickled Python objects",
    ),
    "a state dict": (
        lambda f, t: pickled(tiny.t5().state_dict(), f.parent / "x"),
        "do not end as a model file does",
    ),
    "a sealed tensor": (
        lambda f, t: sealed(pickled(torch.ones(3), f.parent / "x")), "not a model file of this"
    ),
    "half": (lambda f, t: f.read_bytes()[: f.stat().st_size // 2], "was cut off, or something was"),
    "one byte less": (lambda f, t: f.read_bytes()[:-1], "was cut off, or something was appended"),
    "one byte more": (lambda f, t: f.read_bytes() + b"\0", "or something was appended"),
    "a zip comment": (
        lambda f, t: f.read_bytes()[:-2] + b"\x03\0abc", "was cut off, or something was appended"
    ),
    "two end records": (
        lambda f, t: f.read_bytes() + f.read_bytes()[-22:], "was cut off, or something was appended"
    ),
    "two archives": (lambda f, t: f.read_bytes() * 2, "checksum does not match"),
    "a hole": (
        lambda f, t: f.read_bytes()[:30_000] + f.read_bytes()[30_100:], "checksum does not match"
    ),
    "another version": (
        lambda f, t: rewritten(f, version=3), "version 3 of the format, this program reads 4"
    ),
    "no version": (lambda f, t: rewritten(f, version=None), "version None of the format"),
    "another format": (lambda f, t: rewritten(f, format="other.model"), "not a model file of this"),
    "an unknown architecture": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", architectures=["FooModel"])),
        "unknown architecture 'FooModel'",
    ),
    "an architecture that is no model": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", architectures=["T5Config"])),
        "unknown architecture 'T5Config'",
    ),
    "a model type without a family": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", model_type="mamba")),
        'architecture "mamba" is not supported; known are bert, camembert, deit',
    ),
    "other widths": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", d_model=16)),
        "its parts do not fit together",
    ),
    "no weights": (lambda f, t: rewritten(f, state_dict={}), "its parts do not fit together"),
    "no tokenizer": (lambda f, t: rewritten(f, tokenizer=None), "its tokenizer is not what docs"),
    "weights that are numbers": (
        lambda f, t: rewritten(f, state_dict={"a": 1}), "its state_dict is not what docs/formats.md"
    ),
    "weights that are no numbers": (
        lambda f, t: rewritten(f, state_dict={"a": torch.tensor([1, float("nan"), 2])}),
        "a holds NaN or infinity",
    ),
    "infinite weights": (
        lambda f, t: rewritten(f, state_dict={"a": torch.tensor([1, -float("inf")])}),
        "a holds NaN or infinity",
    ),
    "a tokenizer's file that leads elsewhere": (
        lambda f, t: rewritten(f, tokenizer={"../vocab.txt": torch.zeros(1, dtype=torch.uint8)}),
        "'../vocab.txt' is no name of a tokenizer's file",
    ),
    "no padding": (
        lambda f, t: rewritten(
            f, generation_config=changed_json(f, "generation_config", pad_token_id=None)
        ),
        "its generation_config has pad_token_id None, a token below",
    ),
    "two tokens to start with": (
        lambda f, t: rewritten(
            f, generation_config=changed_json(f, "generation_config", decoder_start_token_id=[0])
        ),
        "its generation_config has decoder_start_token_id [0], a token below",
    ),
    "a million layers": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", num_layers=10**9)),
        "its config has num_layers 1000000000, at most 10000 were expected",
    ),
    "more layers than tensors": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", num_decoder_layers=5000)),
        "its config has 5000 layers, its",
    ),
    "a vocabulary that fills the memory": (
        lambda f, t: rewritten(f, config=changed_json(f, "config", vocab_size=2**50)),
        "its config and structure ask for shape (1125899906842624, 32)",
    ),
    "one value as many": (
        lambda f, t: rewritten(f, state_dict={"a": torch.ones(1).expand(2**40)}),
        "its state_dict is not what docs/formats.md says",
    ),
    "a compressed archive": (
        lambda f, t: compressed(f), "bytes that says it holds"
    ),
    "another key": (lambda f, t: rewritten(f, more="1"), "has not the keys of docs/formats.md"),
    "no history": (
        lambda f, t: rewritten(f, info=changed_json(f, "info", history=None)),
        "its info has history None",
    ),
    "a tokenizer without sense": (
        lambda f, t: rewritten(f, tokenizer={"tokenizer.json": torch.ones(9, dtype=torch.uint8)}),
        "its parts do not fit together",
    ),
    "masks of unknown weights": (
        lambda f, t: rewritten(f, masks={"nobody.weight": torch.zeros(4, dtype=torch.uint8)}),
        "its parts do not fit together (KeyError: 'nobody.weight')",
    ),
    "masks with bits of no weight": (
        lambda f, t: rewritten(f, masks={MASKED: torch.full((192 + 1,), 255, dtype=torch.uint8)}),
        "a mask of shape (193,) for 1536 values",
    ),
    "a structure of version 3": (
        lambda f, t: rewritten(f, structure='{"kept_units":{},"removed_layers":[]}'),
        "its structure is {'kept_units': {}, 'removed_layers': []}, expected a list of edits",
    ),
    "a structure of another model": (
        lambda f, t: rewritten(f, structure='[{"module":"x.ffn","remove":true}]'),
        'no module "x.ffn" in this model',
    ),
    "a module twice in the structure": (
        lambda f, t: rewritten(f, structure='[{"module":"x","module":"y","remove":true}]'),
        'key "module" occurs twice in one object',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line(case: str, file: Path, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    target = tmp_path / "bomb"
    path = tmp_path / "bad.pth"
    path.write_bytes(make(file, target))
    with pytest.raises(UserError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not target.exists()  # nothing ran


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "none.pth")
    assert str(caught.value.filename) == str(tmp_path / "none.pth")


def test_a_folder_is_no_model_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a folder, a model file was expected; download_model"):
        load(tmp_path)


def test_every_flipped_bit_is_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    generator = random.Random(7)
    places = [*range(8), *range(len(content) - 120, len(content))]
    places += [generator.randrange(len(content)) for _ in range(200)]
    path = tmp_path / "flipped.pth"
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(FormatError) as caught:
            load(path)
        assert "\n" not in str(caught.value), place


@pytest.mark.parametrize("shape", [(3, 5), (1,), (8,), (4, 16), (0, 4)])
def test_masks_are_packed_row_by_row(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(1).random(shape) > 0.5
    packed = np.packbits(mask)
    bits = "".join(str(int(bit)) for bit in mask.flatten())
    expected = [int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)]
    assert packed.tolist() == expected
    np.testing.assert_array_equal(unpack_mask(packed, shape), mask)
    with pytest.raises(FormatError, match="a mask of shape"):
        unpack_mask(np.append(packed, packed[:1] if len(packed) else 0), shape)
    if spare := -len(bits) % 8:
        packed[-1] |= 1 << (spare - 1)
        with pytest.raises(FormatError, match=f"has bits after its {len(bits)} values"):
            unpack_mask(packed, shape)


EDITS = [
    {"keep": [0, 2], "module": "a"}, {"module": "b", "remove": True}, {"map": True, "module": "c"},
]  # fmt: skip


def test_edits_have_one_form() -> None:
    read = from_json(copy.deepcopy(EDITS))
    assert read == (Edit("a", "keep", (0, 2)), Edit("b", "remove"), Edit("c", "map"))
    assert to_json(read) == to_json(read[::-1]) == EDITS
    assert from_json([]) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "structure is {}, expected a list of edits"),
        (EDITS[::-1], "not in the order of their modules"),
        ([EDITS[0], {"module": "a", "remove": True}], '"a" has two edits, keep and remove'),
        (["a"], "expected a module and one of keep, remove, map"),
        ([{"module": "a"}], "expected a module and one of"),
        ([{"module": "a", "remove": True, "map": True}], "expected a module and one of"),
        ([{"module": 1, "remove": True}], "expected a module and one of"),
        ([{"module": "a", "remove": False}], "expected a module and one of"),
        ([{"module": "a", "remove": 1}], "expected a module and one of"),
        ([{"module": "a", "keep": []}], "expected a module and one of"),
        ([{"module": "a", "tokens": True}], '"a": unknown edit "tokens"; known are keep, remove'),
        ([{"module": "a", "keep": True}], "keep expects ids of the units that stay"),
        ([{"module": "a", "map": [1]}], "map expects no ids of units"),
        ([{"module": "a", "keep": [1, 0]}], "keep [1, 0]; expected ascending ids"),
        ([{"module": "a", "keep": [True]}], "keep [True]; expected ascending ids"),
        ([{"module": "a", "keep": [[0]]}], "keep [[0]]; expected ascending ids"),
    ],
)
def test_edits_that_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_json(value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- import of Hugging Face folders ---


def folder_of(path: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    model = tiny.t5()
    for key, value in config.items():
        setattr(model.config, key, value)
    model.to(dtype).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_imported_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    made = import_model(folder_of(tmp_path / "hf", dtype), "me/tiny", "abc")
    expected = tiny.t5().to(dtype).float().state_dict()
    found = made.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert made.is_dense
    assert not made.model.training
    assert (made.info["source"], made.info["revision"]) == ("me/tiny", "abc")
    assert made.info["dense_parameters"] == sum(p.numel() for p in tiny.t5().parameters())
    assert made.fingerprint == fingerprint_of(made.config, found)
    save(tmp_path / "m.pth", made)
    assert_equal(load(tmp_path / "m.pth"), made)
    # neither the folder's name nor its stored type is part of the model
    again = import_model(folder_of(tmp_path / "other folder", dtype), "me/tiny", "abc")
    save(tmp_path / "again.pth", again)
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "m.pth").read_bytes()


TASKS = {"translation_en_to_de": {"prefix": "to German: "}, "summarization": {"prefix": "sum: "}}


@pytest.mark.parametrize(
    ("tasks", "given", "expected"),
    [
        (None, None, "translate English to German: "),
        ({}, None, "translate English to German: "),
        ({"summarization": {"prefix": "sum: "}}, None, "translate English to German: "),
        ({"translation_en_to_de": {"num_beams": 4}}, None, "translate English to German: "),
        (TASKS, None, "to German: "),
        ({"translation_en_to_de": {"prefix": ""}}, None, ""),
        (TASKS, "mine: ", "mine: "),
        (TASKS, "", ""),
    ],
)
def test_where_the_prefix_comes_from(
    tasks: Any, given: str | None, expected: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, task_specific_params=tasks)
    assert import_model(folder, "x", None, given).info["prefix"] == expected


def mamba(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mamba"}')


def change_weights(value: float | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder_of(folder) / "model.safetensors"
        weights = load_file(path)
        name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
        if value is None:
            del weights[name]
        else:
            weights[name][3, 5] = value
        save_file(weights, path, metadata={"format": "pt"})

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder_of(folder) / name).unlink()


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder_of(folder) / name).write_bytes(content)

    return change


def pickled_weights(folder: Path) -> None:
    without("model.safetensors")(folder)
    torch.save({"shared.weight": Bomb(folder / "bomb")}, folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    path = folder_of(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_shape(folder: Path) -> None:
    path = folder_of(folder) / "config.json"
    path.write_text(path.read_text().replace('"d_ff": 48', '"d_ff": 40'))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "no readable config.json"),
        (lambda folder: None, "no readable config.json"),
        (holding("config.json", b"{"), "config.json: not a JSON file"),
        (holding("config.json", b"{}"), "model_type is None; the name of a type was expected"),
        (mamba, 'architecture "mamba" is not supported; known are bert, camembert, deit'),
        (without("model.safetensors"), "no model.safetensors; pickled weights (.bin) can run"),
        (pickled_weights, "no model.safetensors; pickled weights (.bin) can run code"),
        (cut_weights, "model.safetensors: damaged or cut off"),
        (holding("model.safetensors", b"not weights"), "model.safetensors: damaged or cut off"),
        (other_shape, "wi.weight is of shape (48, 32), its config asks for (40, 32); correct"),
        (change_weights(None), "the weights lack decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        (change_weights(float("nan")), "block.1.layer.2.DenseReluDense.wo.weight holds NaN"),
        (change_weights(float("inf")), "block.1.layer.2.DenseReluDense.wo.weight holds NaN"),
        (change_weights(-float("inf")), "wo.weight holds NaN or infinity"),
        (without("tokenizer.json"), "no readable tokenizer"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    make(folder)
    with pytest.raises(UserError) as caught:
        import_model(folder, "me/tiny")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "bomb").exists()


def test_tiny_checkpoints_are_what_import_makes(tmp_path: Path) -> None:
    """Guards the other tests: the helper's config and fingerprint are those of a real import."""
    made = import_model(folder_of(tmp_path), "tiny")
    other = copy.deepcopy(tiny.checkpoint().config)
    assert {k: v for k, v in made.config.items() if other.get(k, "absent") != v} == {}
