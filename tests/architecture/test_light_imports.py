"""What stays small is measured in a fresh interpreter: which libraries an import brings with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "numpy", "scipy", "tuf", "securesystemslib", "cryptography", "onnx", "onnxruntime", "ai_edge_litert", "tflite_runtime",
    "fastapi", "uvicorn", "pydantic", "sqlalchemy", "sklearn", "skl2onnx", "requests", "urllib3", "rich", "typer",
}  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    """First parts of all modules that the statement loads in an interpreter of its own."""
    program = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_heavy_ones_would_be_noticed() -> None:
    assert {"numpy", "tuf"} <= loaded_by("import numpy, tuf")


@pytest.mark.parametrize(
    "statement",
    [
        "import skerry_contract.manifest, skerry_contract.group, skerry_contract.wire, skerry_contract.window",
        "import skerry_agent",
        "import skerry_agent.cli",
        "import skerry_agent.supervisor",
        "import skerry_agent.channel, skerry_agent.workerwire",
        "import skerry_runtime",
    ],
)
def test_a_small_process_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) & HEAVY == set()


def test_a_download_loads_no_update_security() -> None:
    # The courier lives for seconds, but downloads for minutes: what verifies has done its work by then.
    assert (
        loaded_by("import skerry_agent.courier.download") & {"numpy", "tuf", "securesystemslib", "onnxruntime"} == set()
    )


def test_a_worker_loads_no_update_security_and_no_server() -> None:
    found = loaded_by("import skerry_agent.worker.process")
    assert found & {"tuf", "securesystemslib", "cryptography", "fastapi", "sqlalchemy", "paho"} == set()
    assert "numpy" in found


def test_a_worker_loads_no_openssl_and_what_needs_it_later_still_can() -> None:
    program = """
import sys
from skerry_agent.worker import lean
lean.import_event_loops(uvloop=True)
import skerry_agent.worker.main, asyncio, hashlib
needless = {"ssl", "_ssl", "_hashlib", "email", "csv", "zipfile", "importlib.metadata", "tempfile"}
assert not needless & set(sys.modules), needless & set(sys.modules)
import uvloop

async def served():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await reader.read() == b""
    writer.close()
    server.close()

for factory in (uvloop.new_event_loop, asyncio.new_event_loop):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(served())
assert hashlib.sha256(b"abc").hexdigest().startswith("ba7816bf8f01cfea")
import ssl
assert ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED
import _hashlib
assert _hashlib.openssl_sha256(b"abc").digest() == hashlib.sha256(b"abc").digest()
"""
    assert "uvloop" in loaded_by(program)


def test_a_worker_without_uvloop_does_not_load_it() -> None:
    program = (
        "from skerry_agent.worker import lean\nlean.import_event_loops(uvloop=False)\nimport skerry_agent.worker.main"
    )
    assert "uvloop" not in loaded_by(program)


def test_a_new_server_is_made_without_the_application_and_without_what_counts(tmp_path: Path) -> None:
    program = f"from skerry_server.cli import main\nassert main(['init', '--data', {str(tmp_path / 'data')!r}]) == 0"
    needed = {"sqlalchemy", "cryptography", "tuf", "securesystemslib"}
    found = loaded_by(program)
    assert found >= needed, "it did its work"
    assert found & (HEAVY | {"starlette", "jinja2", "paho", "prometheus_client"}) == needed
    assert (tmp_path / "data" / "admin.token").exists()


def test_the_operators_tool_starts_without_training_libraries() -> None:
    assert loaded_by("import skerry_cli.app") & {"sklearn", "skl2onnx", "onnx", "onnxruntime", "scipy"} == set()
