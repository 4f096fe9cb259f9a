"""Local folders, the embedded model and Multi30K's download; the hub itself is in end_to_end."""

import gzip
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from composable import files
from composable.errors import FormatError, UserError
from composable.models import hub
from composable.tasks import multi30k
from tests.hub_server import HubServer
from tests.paths import SHARED

TEXTS = {"train.en": b"a dog\na cat\n", "train.de": b"ein Hund\neine Katze\n"}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a pretrained model; nothing here builds it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    save_file({"shared.weight": np.ones((4, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        name: (text.count(b"\n"), hashlib.sha256(text).hexdigest()) for name, text in TEXTS.items()
    }
    monkeypatch.setattr(multi30k, "MULTI30K", table)


@pytest.fixture
def server(tmp_path: Path, small_table: None, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    folder = tmp_path / "served"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(text))
    with HubServer(plain=folder) as running:
        monkeypatch.setenv("COMPOSABLE_MULTI30K_URL", running.url + "/multi30k/")
        yield running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_local_folder_has_no_commit(model: Path) -> None:
    assert hub.resolve_model(str(model), None) == (model, None)


def test_home_is_expanded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert hub.resolve_model("~/model", None) == (model, None)


def test_sharded_weights(model: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(model / shard)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"shared.weight": shard}}))
    assert hub.resolve_model(str(model), None) == (model, None)
    (model / shard).unlink()
    with pytest.raises(FormatError, match=f"{shard}: a part of the weights is missing"):
        hub.resolve_model(str(model), None)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_map(model: Path, content: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="no weight_map"):
        hub.resolve_model(str(model), None)


def test_pickled_weights_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(
        FormatError, match=r"no model\.safetensors; pickled weights \(\.bin\) can run"
    ):
        hub.resolve_model(str(model), None)


def test_folder_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(FormatError, match=r"model: no config\.json"):
        hub.resolve_model(str(model), None)


def test_file_instead_of_folder(model: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: a file, a model folder was expected"):
        hub.resolve_model(str(model / "config.json"), None)


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_truncated_weights(model: Path, cut: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(FormatError, match=r"model\.safetensors: damaged or cut off"):
        hub.resolve_model(str(model), None)


def test_extended_weights(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="damaged or cut off"):
        hub.resolve_model(str(model), None)


def test_weights_without_tensors(model: Path) -> None:
    save_file({}, model / "model.safetensors")
    with pytest.raises(FormatError, match="holds no weights"):
        hub.resolve_model(str(model), None)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_truncated_json(model: Path, name: str) -> None:
    (model / name).write_text('{"model_type": "t')
    with pytest.raises(FormatError, match=f"{name}: damaged, not JSON"):
        hub.resolve_model(str(model), None)


def test_config_must_be_an_object(model: Path) -> None:
    (model / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="an object was expected"):
        hub.resolve_model(str(model), None)


@pytest.mark.parametrize("name", ["./absent", "/no/such/folder", "a/b/c", "two words", ""])
def test_neither_folder_nor_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='give "embedded", a local folder or a hub id'):
        hub.resolve_model(name, None)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "merges.txt", "model.safetensors"]
)
def test_a_pipe_in_a_folder_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(FormatError, match=rf"{name}: a pipe or device, a file was expected"):
        hub.resolve_model(str(model))


@pytest.mark.parametrize("name", ["pipe", "pipe.gguf"])
def test_a_pipe_is_no_model(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(FormatError, match=rf"{name}: a pipe or device, a model was expected"):
        hub.resolve_model(str(tmp_path / name))


def test_links_that_lead_nowhere(model: Path) -> None:
    loop = model.with_name("loop")
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop: a link that leads nowhere; give a folder or"):
        hub.resolve_model(str(loop))
    (model / "tokenizer.json").symlink_to(model / "tokenizer.json")
    with pytest.raises(FormatError, match=r"tokenizer\.json: a link that leads nowhere;"):
        hub.resolve_model(str(model))
    (model / "tokenizer.json").unlink()
    (model / "more").symlink_to(model)  # nothing reads these
    (model / "pytorch_model.bin").symlink_to(model / "absent")
    assert hub.resolve_model(str(model)) == (model, None)


def test_revision_of_a_local_folder(model: Path) -> None:
    with pytest.raises(UserError, match=r'revision "v1": .* has no revisions'):
        hub.resolve_model(str(model), "v1")


def test_embedded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "__file__", str(tmp_path / "composable" / "files.py"))
    with pytest.raises(UserError, match="assets/embedded is not in this installation"):
        hub.resolve_model("embedded", None)
    target = tmp_path / "assets" / "embedded"
    shutil.copytree(model, target)
    assert hub.resolve_model("embedded", None) == (target.resolve(), None)
    with pytest.raises(UserError, match="has no revisions"):
        hub.resolve_model("embedded", "v1")


def test_table_equals_the_shared_data() -> None:
    folder = SHARED / "data" / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set COMPOSABLE_SHARED)")
    faults = {
        name: multi30k.fault(name, gzip.decompress((folder / f"{name}.gz").read_bytes()))
        for name in multi30k.MULTI30K
    }
    assert len(faults) == 6
    assert set(faults.values()) == {None}


def test_fetch_writes_all_files_once(server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    multi30k.fetch_multi30k(folder)
    assert {path.name for path in folder.iterdir()} == {"train.en.gz", "train.de.gz"}
    assert gzip.decompress((folder / "train.de.gz").read_bytes()) == TEXTS["train.de"]
    assert len(server.requests) == 2
    multi30k.fetch_multi30k(folder)
    assert len(server.requests) == 2


def test_fetch_only_what_is_absent_or_wrong(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "train.en").write_bytes(TEXTS["train.en"])  # plain is as good
    (tmp_path / "train.de.gz").write_bytes(b"not gzip")
    multi30k.fetch_multi30k(tmp_path)
    assert server.requests == ["GET /multi30k/train.de.gz"]
    assert not (tmp_path / "train.en.gz").exists()
    assert gzip.decompress((tmp_path / "train.de.gz").read_bytes()) == TEXTS["train.de"]


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (gzip.compress(b"a dog\na cow\n"), "SHA-256 of the text is"),
        (gzip.compress(b"a dog\n"), "1 lines, 2 were expected"),
        (gzip.compress(TEXTS["train.en"])[:-9], "not a whole gzip file"),
        (b"<html>", "not a whole gzip file"),
    ],
    ids=["other text", "fewer lines", "cut off", "not gzip"],
)
def test_fetch_refuses_other_content(
    server: HubServer, tmp_path: Path, served: bytes, message: str
) -> None:
    (server.plain / "train.en.gz").write_bytes(served)
    folder = tmp_path / "data"
    with pytest.raises(FormatError, match=f"is not the published text: {message}.*embedded"):
        multi30k.fetch_multi30k(folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_fetch_interrupted(server: HubServer, tmp_path: Path) -> None:
    server.cut_at["train.en.gz"] = 10
    with pytest.raises(UserError, match=r"train\.en\.gz was interrupted; run it again"):
        multi30k.fetch_multi30k(tmp_path / "data")
    server.cut_at.clear()
    multi30k.fetch_multi30k(tmp_path / "data")
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_fetch_absent_file(server: HubServer, tmp_path: Path) -> None:
    (server.plain / "train.en.gz").unlink()
    with pytest.raises(UserError, match=r"answered 404; use the data .embedded."):
        multi30k.fetch_multi30k(tmp_path / "data")


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "no-url"])
def test_fetch_without_network(
    small_table: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("COMPOSABLE_MULTI30K_URL", url.format(port=free_port()))
    with pytest.raises(UserError, match=r"no network to .* use the data .embedded."):
        multi30k.fetch_multi30k(tmp_path / "data")


def test_fetch_into_a_file(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(OSError, match="data"):
        multi30k.fetch_multi30k(tmp_path / "data")
