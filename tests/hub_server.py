"""A hub on loopback: the Hugging Face routes the client asks for, and plain files under /multi30k.

python -m tests.hub_server --t5-small PORT_FILE   # serves random weights as google-t5/t5-small;
                                                  # HF_ENDPOINT=http://127.0.0.1:$(cat PORT_FILE)
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.paths import SHARED

TOKENIZER = "data/tokenizers/t5-tokenizer.json.gz"


class HubServer:
    """Serves folders as repositories; use as a context manager.

    Attributes:
        repositories: id -> folder.
        plain: folder whose files are served under /multi30k, or None.
        gated: ids whose files are refused (their metadata is public, as on the real hub).
        cut_at: file name -> number of bytes after which the connection is always closed.
        stalls: whether such a connection is left open instead, and nothing comes any more.
        page: what is sent for everything, status 200, as login pages are; None: nothing such.
        requests: "METHOD path" of all that was asked.
    """

    def __init__(
        self, repositories: Mapping[str, Path] | None = None, plain: Path | None = None
    ) -> None:
        self.repositories = dict(repositories or {})
        self.plain = plain
        self.gated: set[str] = set()
        self.cut_at: dict[str, int] = {}
        self.stalls = False
        self.page: bytes | None = None
        self.requests: list[str] = []
        self.closing = threading.Event()
        self._commits: dict[str, str] = {}
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        # how often it looks whether it is to end; half a second is the default
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str) -> str:
        """40 hexadecimal digits over names and content when first asked, as a commit's would be."""
        if repository not in self._commits:
            total = hashlib.sha1()
            for path in _files(self.repositories[repository]):
                total.update(path.name.encode() + hashlib.sha1(path.read_bytes()).digest())
            self._commits[repository] = total.hexdigest()
        return self._commits[repository]


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer

    def do_GET(self) -> None:
        self._answer(sends_body=True)

    def do_HEAD(self) -> None:
        self._answer(sends_body=False)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def _answer(self, sends_body: bool) -> None:
        hub = self.server_hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.page is not None:
            self._send(hub.page, "text/html", sends_body)
        elif path.startswith("/multi30k/"):
            self._plain(path.removeprefix("/multi30k/"), sends_body)
        elif match := re.fullmatch(r"/api/models/(.+?)/tree/(.+)", path):
            self._api(*match.groups(), self._tree)
        elif match := re.fullmatch(r"/api/models/(.+?)/revision/(.+)", path):
            self._api(*match.groups(), self._info)
        elif match := re.fullmatch(r"/api/models/(.+)", path):
            self._api(match[1], "main", self._info)
        elif match := re.fullmatch(r"/(.+?)/resolve/(.+?)/(.+)", path):
            self._resolve(*match.groups(), sends_body)
        else:
            self._error(404, "")

    def _knows(self, repository: str, revision: str) -> bool:
        if repository not in self.server_hub.repositories:
            self._error(404, "RepoNotFound")
            return False
        if revision not in ("main", self.server_hub.commit(repository)):
            self._error(404, "RevisionNotFound")
            return False
        return True

    def _api(self, repository: str, revision: str, answer: Any) -> None:
        if self._knows(repository, revision):
            self._json(answer(repository))

    def _info(self, repository: str) -> dict[str, Any]:
        folder = self.server_hub.repositories[repository]
        names = [path.relative_to(folder).as_posix() for path in _files(folder)]
        return {
            "_id": "0",
            "id": repository,
            "modelId": repository,
            "sha": self.server_hub.commit(repository),
            "private": False,
            "gated": "manual" if repository in self.server_hub.gated else False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": name} for name in names],
        }

    def _tree(self, repository: str) -> list[dict[str, Any]]:
        folder = self.server_hub.repositories[repository]
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": _etag(path.read_bytes()),
            }
            for path in _files(folder)
        ]

    def _resolve(self, repository: str, revision: str, name: str, sends_body: bool) -> None:
        if not self._knows(repository, revision):
            return
        path = self.server_hub.repositories[repository] / name
        if repository in self.server_hub.gated:
            self._error(403, "GatedRepo")
        elif not path.is_file():
            self._error(404, "EntryNotFound")
        else:
            self._send_file(path, sends_body, self.server_hub.commit(repository))

    def _plain(self, name: str, sends_body: bool) -> None:
        folder = self.server_hub.plain
        if folder is None or not (folder / name).is_file():
            self._error(404, "")
        else:
            self._send_file(folder / name, sends_body)

    def _send_file(self, path: Path, sends_body: bool, commit: str | None = None) -> None:
        """Send from the asked byte to the end, or to where transfers of this file are cut."""
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(content)}"')
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if sends_body:
            self._send_body(content[start : self.server_hub.cut_at.get(path.name)], path.name)

    def _send_body(self, content: bytes, name: str) -> None:
        hub = self.server_hub
        with contextlib.suppress(ConnectionError):  # the client was stopped
            self.wfile.write(content)
            self.wfile.flush()
        if hub.stalls and name in hub.cut_at:
            hub.closing.wait()

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json", True)

    def _send(self, content: bytes, kind: str, sends_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if sends_body:
            self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def make_t5_small(folder: Path, shared: Path, seed: int = 0) -> None:
    """Write a model of T5-small's shape with random weights, and the real T5 tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_decoder_layers=6,
        num_heads=8,
        decoder_start_token_id=0,
        task_specific_params={
            "translation_en_to_de": {"prefix": "translate English to German: ", "max_length": 300}
        },
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    write_t5_tokenizer(folder, shared)


def write_t5_tokenizer(folder: Path, shared: Path) -> None:
    """Write the original T5 tokenizer as the hub has it: tokenizer.json and its config."""
    with gzip.open(shared / TOKENIZER) as file:
        value = json.load(file)
    value["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 100,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a T5-small-shaped model on 127.0.0.1.")
    parser.add_argument("--t5-small", metavar="PORT_FILE", type=Path, required=True)
    port_file = parser.parse_args().t5_small
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed
    with tempfile.TemporaryDirectory() as name:
        make_t5_small(Path(name), SHARED)
        with HubServer({"google-t5/t5-small": Path(name)}, SHARED / "data" / "multi30k") as hub:
            unfinished = port_file.with_name(port_file.name + ".tmp")
            unfinished.write_text(f"{hub.port}\n")
            unfinished.replace(port_file)
            sys.stderr.write(f"HF_ENDPOINT={hub.url}\n")
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                pass
            finally:
                port_file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
