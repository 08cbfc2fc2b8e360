"""What goes into a path is one name, whatever somebody types; and whom the tool gives its token to."""

from __future__ import annotations

import datetime as dt
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from skerry_cli.client import Api, quote
from skerry_cli.errors import RefusedForSafety, Usage
from skerry_cli.profile import Profile
from skerry_server import ca


@pytest.mark.parametrize("part", ["", ".", "..", "../../x", "a/b", "/"])
def test_what_would_leave_its_segment_of_a_path_is_refused_by_name(part: str) -> None:
    with pytest.raises(Usage, match="wanted a name or an id, got"):
        quote(part)


def test_the_rest_is_one_segment() -> None:
    assert quote("r-1") == "r-1"
    assert quote("what? 100%") == "what%3F%20100%25"


@dataclass
class Between:
    """Whoever sits between operator and server: TLS with a chain of their own, and any text as the fleet's CA."""

    mine: ca.FleetCA
    true: ca.FleetCA
    url: str = ""
    shown: str = ""
    tokens: list[str] = field(default_factory=list)

    def api(self, **trust: object) -> Api:
        return Api(Profile(server=self.url, token="secret", **trust))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["padded", "not padded"])
def between(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Between]:
    now = dt.datetime.now(dt.UTC)
    while True:
        true = ca.open_ca(tmp_path_factory.mktemp("true"), now)
        # Where base64 ends in padding, a lenient decoder ends there, too.
        if ("=" in true.pem) == (request.param == "padded"):
            break
    mine = ca.open_ca(tmp_path_factory.mktemp("mine"), now)
    mine.ensure_own([], now)
    found = Between(mine, true)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "Authorization" in self.headers:
                found.tokens.append(self.headers["Authorization"])
            body = found.shown.encode() if self.path == "/device/v1/ca" else b"{}"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(mine.files.server_certificate, mine.files.server_key)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found.url = f"https://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def texts(true: str, mine: str) -> dict[str, str]:
    true, mine = true.strip(), mine.strip()
    return {
        "behind it": f"{true}\n{mine}\n",
        "before it": f"{mine}\n{true}\n",
        "on its line": f"{true}{mine}",
        "with words between": f"{true}\n# the fleet's\n{mine}\n",
        "as a trusted one": f"{true}\n{mine.replace('CERTIFICATE', 'TRUSTED CERTIFICATE')}\n",
    }


@pytest.mark.parametrize("where", texts("", ""))
def test_a_second_ca_beside_the_pinned_one_is_trusted_by_nobody(between: Between, where: str) -> None:
    between.tokens.clear()
    between.shown = texts(between.true.pem, between.mine.pem)[where]
    with pytest.raises(RefusedForSafety):
        between.api(ca_sha256=between.true.sha256).get("/api/v1/info")
    assert between.tokens == []


@pytest.mark.parametrize("where", texts("", ""))
def test_a_ca_file_with_more_than_one_certificate_is_refused_by_name(
    between: Between, where: str, tmp_path: Path
) -> None:
    path = tmp_path / "ca.pem"
    path.write_text(texts(between.true.pem, between.mine.pem)[where])
    with pytest.raises(Usage, match=r"ca\.pem: wanted one certificate"):
        between.api(ca=path)


def test_the_pinned_ca_alone_is_what_the_tool_trusts(between: Between, tmp_path: Path) -> None:
    between.tokens.clear()
    between.shown = between.true.pem
    with pytest.raises(RefusedForSafety, match="not of the pinned CA"):
        between.api(ca_sha256=between.true.sha256).get("/api/v1/info")
    assert between.tokens == []
    between.shown = between.mine.pem
    api = between.api(ca_sha256=between.mine.sha256)
    assert (api.ca_sha256, api.get("/api/v1/info")) == (between.mine.sha256, {})
    path = tmp_path / "ca.pem"
    path.write_text(f"\n{between.mine.pem}\n")
    assert between.api(ca=path).get("/api/v1/info") == {}
