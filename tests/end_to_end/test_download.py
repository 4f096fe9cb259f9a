"""download_model.py with the real hub client against a hub on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from composable.models import checkpoint
from tests import tiny
from tests.end_to_end.conftest import call
from tests.hub_server import HubServer, write_t5_tokenizer
from tests.paths import ROOT, SHARED

SCRIPT = ROOT / "download_model.py"
ID = "someone/tiny-t5"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.t5(seed=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folder


@pytest.fixture
def server(pretrained: Path) -> Iterator[HubServer]:
    with HubServer({ID: pretrained}) as running:
        yield running


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.pth"


def environment(tmp_path: Path, endpoint: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}


def download(
    tmp_path: Path, endpoint: str, output: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "-o", str(output), *options],
        env=environment(tmp_path, endpoint),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def report_of(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def resolve(tmp_path: Path, endpoint: str, source: str, **extra: str) -> list[str]:
    """Do the hub's part alone in a process of its own: no model is built, so no second is lost."""
    code = (
        "import sys; from composable.models import hub;"
        " print(*hub.resolve_model(sys.argv[1], None))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, source],
        env={**environment(tmp_path, endpoint), **extra},
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def assert_refused(run: subprocess.CompletedProcess[str], output: Path, *parts: str) -> None:
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("Error: ")
    assert run.stderr.count("\n") == 1, run.stderr
    for part in parts:
        assert part in run.stderr
    assert not output.parent.exists() or not list(output.parent.iterdir())


def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_download_then_reuse_without_network(
    server: HubServer, tmp_path: Path, output: Path
) -> None:
    report = report_of(download(tmp_path, server.url, output, "-m", ID, "--prefix", "say: "))
    made = checkpoint.load(output)
    assert report["source"] == made.info["source"] == ID
    assert report["revision"] == made.info["revision"] == server.commit(ID)
    assert report["fingerprint"] == made.fingerprint
    assert report["parameters"] == sum(p.numel() for p in made.model.parameters())
    assert report["modules"] == {"layer": 4, "attention": 6, "linear": 14, "ffn": 4}
    assert made.info["prefix"] == "say: "
    dense = tiny.t5(seed=3).state_dict()
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, dense[name]), name
    text = "a man runs ."
    assert made.tokenizer(text).input_ids == tiny.tokenizer()(text).input_ids

    fetched = {request.rsplit("/", 1)[-1] for request in server.requests if "GET" in request}
    assert "model.safetensors" in fetched
    assert "pytorch_model.bin" not in fetched

    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert resolve(tmp_path, nobody(), ID, **more)[1] == server.commit(ID)


def test_second_run_fetches_no_file_again(server: HubServer, tmp_path: Path) -> None:
    first = resolve(tmp_path, server.url, ID)
    server.requests.clear()
    assert resolve(tmp_path, server.url, ID) == first
    assert server.requests
    assert not [request for request in server.requests if "/resolve/" in request]


def test_missing_model(server: HubServer, tmp_path: Path, output: Path) -> None:
    run = download(tmp_path, server.url, output, "-m", "someone/absent")
    assert_refused(run, output, "someone/absent", "no such repository on the hub")


def test_missing_revision(server: HubServer, tmp_path: Path, output: Path) -> None:
    run = download(tmp_path, server.url, output, "-m", ID, "--revision", "v9")
    assert_refused(run, output, ID, 'no revision "v9"', "branch, a tag or a full commit hash")


def test_gated_model(server: HubServer, tmp_path: Path, output: Path) -> None:
    server.gated.add(ID)
    assert_refused(
        download(tmp_path, server.url, output, "-m", ID), output, ID, "gated", "HF_TOKEN"
    )


def test_no_network(tmp_path: Path, output: Path) -> None:
    run = download(tmp_path, nobody(), output)
    assert_refused(run, output, "google-t5/t5-small: no network and not", "-m embedded")


def test_interrupted_transfer_then_rerun(server: HubServer, tmp_path: Path, output: Path) -> None:
    server.cut_at["model.safetensors"] = 1000
    run = download(tmp_path, server.url, output, "-m", ID)
    assert_refused(run, output, ID, "transfer was interrupted", "run the same command again")
    # what is in the cache now is not taken for the model
    run = download(tmp_path, nobody(), output, "-m", ID)
    assert_refused(run, output, "no network and not (wholly) in the cache")
    server.cut_at.clear()
    server.requests.clear()
    folder, commit = resolve(tmp_path, server.url, ID)
    assert commit == server.commit(ID)
    assert not [request for request in server.requests if request.endswith("/config.json")]
    weights = Path(folder, "model.safetensors").read_bytes()
    assert weights == (server.repositories[ID] / "model.safetensors").read_bytes()


def test_ctrl_c_during_a_stalled_transfer(server: HubServer, tmp_path: Path, output: Path) -> None:
    server.cut_at["model.safetensors"] = 1000
    server.stalls = True
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "-o", str(output), "-m", ID],
        env=environment(tmp_path, server.url),
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not any("GET" in r and "model.safetensors" in r for r in server.requests):
        assert time.monotonic() < limit
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=8)  # the client's own retries take a minute
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    assert not list(output.parent.iterdir())


def test_damaged_cache_is_refused(server: HubServer, tmp_path: Path, output: Path) -> None:
    weights = Path(resolve(tmp_path, server.url, ID)[0], "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1])
    run = download(tmp_path, server.url, output, "-m", ID)
    assert_refused(run, output, "model.safetensors: damaged or cut off", "run this again")
    folder = run.stderr.split("delete ")[1].split(" and run")[0]
    shutil.rmtree(folder)  # as the message says
    whole = Path(resolve(tmp_path, server.url, ID)[0], "model.safetensors").read_bytes()
    assert whole == (server.repositories[ID] / "model.safetensors").read_bytes()


def test_a_login_page_is_no_hub(server: HubServer, tmp_path: Path, output: Path) -> None:
    server.page = b"<html>Please log in</html>"
    run = download(tmp_path, server.url, output, "-m", ID)
    assert_refused(run, output, f"{ID}: what answered is no hub", "login page")


def test_chat_templates_and_shards_of_any_name(pretrained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pretrained, tmp_path / "repository")
    shard = "weights [a].safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    names = tiny.t5(seed=3).state_dict()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "unused.safetensors").write_bytes(b"of another format")
    texts = {"chat_template.jinja": "one", "additional_chat_templates/rag.jinja": "two"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with HubServer({"someone/chat": folder}) as running:
        fetched, _ = resolve(tmp_path, running.url, "someone/chat")
        assert {name: Path(fetched, name).read_text() for name in texts} == texts
        assert Path(fetched, shard).read_bytes() == (folder / shard).read_bytes()
        assert not Path(fetched, "unused.safetensors").exists()
        offline = resolve(tmp_path, nobody(), "someone/chat")
        assert offline == [fetched, running.commit("someone/chat")]
    tokenizer = AutoTokenizer.from_pretrained(fetched)
    assert tokenizer.chat_template == {"default": "one", "rag": "two"}


def test_repository_with_pickled_weights_only(
    server: HubServer, pretrained: Path, tmp_path: Path, output: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"):
        (folder / name).write_bytes((pretrained / name).read_bytes())
    server.repositories["someone/pickled"] = folder
    run = download(tmp_path, server.url, output, "-m", "someone/pickled")
    assert_refused(run, output, "someone/pickled: no model.safetensors", "pickled weights (.bin)")
    assert not [request for request in server.requests if request.endswith(".bin")]


def test_repository_without_config(
    server: HubServer, pretrained: Path, tmp_path: Path, output: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((pretrained / "model.safetensors").read_bytes())
    server.repositories["someone/bare"] = folder
    run = download(tmp_path, server.url, output, "-m", "someone/bare")
    assert_refused(run, output, "someone/bare: no config.json")


def test_local_folder_goes_before_the_hub(pretrained: Path, tmp_path: Path, output: Path) -> None:
    (tmp_path / "someone").mkdir()
    (tmp_path / ID).symlink_to(pretrained)
    report = call("download_model.py", "-m", ID, "-o", output, cwd=tmp_path).report
    assert (report["source"], report["revision"]) == (ID, None)
    assert report["fingerprint"] == checkpoint.load(output).fingerprint


def test_weights_without_a_use(tmp_path: Path, output: Path) -> None:
    tiny.build("llama", attention_bias=True).save_pretrained(tmp_path / "hf")
    tiny.tokenizer().save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(
        config.read_text().replace('"attention_bias": true', '"attention_bias": false')
    )
    refused = call("download_model.py", "-m", "hf", "-o", output, cwd=tmp_path)
    assert refused.code == 1
    assert (
        "Error: hf: the model that its config describes does not use model.layers.0.self_attn."
        in (refused.err)
    )
    assert not output.exists()
    taken = call("download_model.py", "-m", "hf", "-o", output, "--ignore-unused", cwd=tmp_path)
    assert taken.code == 0
    assert len(checkpoint.load(output).info["unused"]) == 12


def test_unwritable_output_is_found_before_the_download(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("kept")
    for output in (tmp_path / "taken" / "model.pth", tmp_path):
        run = download(tmp_path, server.url, output, "-m", ID)
        assert run.returncode == 1
        assert run.stderr.count("\n") == 1, run.stderr
        assert run.stderr.startswith(f"Error: {tmp_path}")
    assert server.requests == []
    assert (tmp_path / "taken").read_text() == "kept"


def test_real_tokenizer_as_the_hub_serves_it(tmp_path: Path, output: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED} (set COMPOSABLE_SHARED)")
    folder = tmp_path / "t5"
    tiny.t5(vocab_size=32128).save_pretrained(folder)
    write_t5_tokenizer(folder, SHARED)
    with HubServer({"google-t5/t5-small": folder}) as running:
        report_of(download(tmp_path, running.url, output))  # the default model
    tokens = checkpoint.load(output).tokenizer("translate English to German:").input_ids
    assert tokens == [13959, 1566, 12, 2968, 10, 1]
