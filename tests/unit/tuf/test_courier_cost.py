"""Couriers start on every device many times a day: what they import is a property of the design."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
sys.argv = ["courier", sys.argv[1]]
from skerry_agent.courier import __main__ as courier
courier.main()
heavy = {"tuf", "securesystemslib", "cryptography", "urllib3", "numpy", "requests", "asyncio", "skerry_runtime"}
print(json.dumps(sorted(heavy & {name.partition(".")[0] for name in sys.modules})))
"""


def loaded(verb, tmp_path):
    request = {
        "state_dir": str(tmp_path),
        "now_s": 0,
        "server_url": "https://127.0.0.1:1",
        "repository_url": "https://127.0.0.1:1/repository",
        "digest": "0" * 64,
        "manifest": "{}",
        "files": [],
        "group": "g",
        "token": "x",
        "model": "m",
        "version": "1.0.0",
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, verb], input=json.dumps(request).encode(), capture_output=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr.decode()
    answer, modules = (json.loads(line) for line in ended.stdout.splitlines()[-2:])
    assert "error" in answer
    return answer["error"], set(modules)


def test_fetch_loads_neither_tuf_nor_cryptography(tmp_path):
    _, modules = loaded("fetch", tmp_path)
    assert modules == set()


@pytest.mark.parametrize("verb", ["sync", "manifest", "enrol", "renew"])
def test_no_verb_loads_what_belongs_to_workers_or_servers(tmp_path, verb):
    error, modules = loaded(verb, tmp_path)
    assert modules <= {"tuf", "securesystemslib", "cryptography", "urllib3"}
    assert error["code"] in ("not_enrolled", "bad_token")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"state_dir": 1}', b'{"state_dir": "/x"}', b"\xff"])
def test_a_request_that_cannot_be_read_is_named_and_no_crash(data):
    command = [sys.executable, "-m", "skerry_agent.courier", "sync"]
    ended = subprocess.run(command, input=data, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()
    error = json.loads(ended.stdout)["error"]
    assert (error["kind"], error["code"]) == ("rejected", "bad_request")


def test_an_unknown_verb_is_named():
    command = [sys.executable, "-m", "skerry_agent.courier", "steal"]
    ended = subprocess.run(command, input=b"{}", capture_output=True, timeout=60)
    assert json.loads(ended.stdout)["error"]["code"] == "bad_request"
