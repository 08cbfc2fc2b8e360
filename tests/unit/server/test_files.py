"""The repository's files over HTTP, where one is replaced while it is asked for."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from skerry_server.api.files import RepositoryFiles


def test_a_timestamp_that_is_replaced_while_it_is_asked_for_arrives_whole(tmp_path: Path) -> None:
    folder = tmp_path / "metadata"
    folder.mkdir()
    path = folder / "timestamp.json"
    path.write_bytes(b"version 9")
    files = RepositoryFiles(directory=tmp_path)
    scope: dict[str, Any] = {
        "type": "http", "method": "GET", "path": "/metadata/timestamp.json", "root_path": "", "headers": [],
    }  # fmt: skip
    seen = os.stat(path)
    (folder / ".new").write_bytes(b"version 10, which is longer")
    (folder / ".new").replace(path)
    response = files.file_response(path, seen, scope)
    told: dict[str, str] = {}
    body = bytearray()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            told.update({name.decode(): value.decode() for name, value in message["headers"]})
        else:
            body.extend(message.get("body", b""))

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(response(scope, receive, send))
    assert bytes(body) == b"version 10, which is longer"
    assert int(told["content-length"]) == len(body)
    assert told["cache-control"] == "no-cache"
    again = {**scope, "headers": [(b"if-none-match", told["etag"].encode())]}
    assert files.file_response(path, os.stat(path), again).status_code == 304
