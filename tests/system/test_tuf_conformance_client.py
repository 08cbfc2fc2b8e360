"""The client that the public TUF suite drives: it does what its command line says. The suite itself is run by hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tuf.api.metadata import TargetFile

from tests.integration.tuf.shelf import Repo

CLIENT = Path(__file__).with_name("tuf_conformance_client")
FILES = {"a.txt": b"first", "d/b.txt": b"second" * 50_000}


@pytest.fixture
def repo() -> Repo:
    made = Repo()
    for path, data in FILES.items():
        made.targets.targets[path] = TargetFile.from_data(path, data, ["sha512"])
        folder, slash, name = path.rpartition("/")
        made.shelf.files[f"targets/{folder}{slash}{made.targets.targets[path].hashes['sha512']}.{name}"] = data
    made.publish("targets", "snapshot", "timestamp")
    return made


@pytest.fixture
def url(repo: Repo) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            repo.shelf.asked.append(path)
            data = repo.shelf.files.get(path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def client(*arguments: object) -> tuple[int, str]:
    ended = subprocess.run([sys.executable, CLIENT, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stderr


def test_it_does_what_the_suite_asks_of_a_client(repo: Repo, url: str, tmp_path: Path) -> None:
    metadata, targets, root = tmp_path / "metadata", tmp_path / "targets", tmp_path / "root.json"
    metadata.mkdir()
    targets.mkdir()
    root.write_bytes(repo.first)
    assert client("--metadata-dir", metadata, "init", root) == (0, "")
    assert repo.shelf.asked == []
    where = ("--metadata-dir", metadata, "--metadata-url", f"{url}/metadata")
    assert client(*where, "refresh") == (0, "")
    assert {path.name for path in metadata.glob("*.json")} == {
        "root.json", "timestamp.json", "snapshot.json", "targets.json",
    }  # fmt: skip
    names = ("--target-name", "a.txt", "--target-name", "d/b.txt")
    download = (*where, "--target-dir", targets, "--target-base-url", f"{url}/targets", "download")
    assert client(*names, *download) == (0, "")
    assert sorted(path.read_bytes() for path in targets.glob("*") if path.is_file()) == sorted(FILES.values())
    # What is here is not fetched again; the first that is refused ends it.
    repo.shelf.asked.clear()
    status, said = client("--target-name", "a.txt", "--target-name", "missing", "--target-name", "d/b.txt", *download)
    assert (status, "missing: no role lists it" in said) == (1, True)
    assert [path for path in repo.shelf.asked if path.startswith("targets/")] == []


def test_it_talks_to_this_machine_only(repo: Repo, tmp_path: Path) -> None:
    root = tmp_path / "root.json"
    root.write_bytes(repo.first)
    client("--metadata-dir", tmp_path / "m", "init", root)
    status, said = client("--metadata-dir", tmp_path / "m", "--metadata-url", "http://192.0.2.1/metadata", "refresh")
    assert (status, "bad_url" in said) == (1, True)
