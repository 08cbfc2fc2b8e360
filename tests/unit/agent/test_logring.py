"""The log ring: bounded, redacted, and there again after a restart."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from skerry_agent import logring
from skerry_agent.logs import kv


def logger(ring: logring.LogRing) -> logging.Logger:
    found = logging.getLogger(f"skerry_agent.test-{id(ring)}")
    found.propagate = False
    found.setLevel(logging.DEBUG)
    found.handlers[:] = [ring]
    return found


def lines(ring: logring.LogRing, most: int = 1 << 20) -> list[dict[str, object]]:
    return [json.loads(line) for line in ring.tail(most).splitlines()]


@pytest.mark.parametrize(
    "secret",
    [
        "ske_Zm9vYmFyYmF6cXV4",
        "Bearer abcdefgh.12345678",
        "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJkLTEifQ.c2lnbmF0dXJl",
        "token=hunter22222",
        "password: hunter22222",
        "https://user:hunter22222@host/x",
        "-----BEGIN PRIVATE KEY-----\nMIGHAgEA\n-----END PRIVATE KEY-----",
        "-----BEGIN EC PRIVATE KEY-----\nMIGHAgEA",
    ],
)
def test_what_looks_like_a_secret_is_kept_nowhere(tmp_path: Path, secret: str) -> None:
    ring = logring.LogRing(tmp_path / "log.jsonl")
    log = logger(ring)
    log.error("before %s after", secret, extra=kv(detail=f"x {secret}", token="hunter22222", harmless="kept"))
    try:
        raise ValueError(f"refused: {secret}")
    except ValueError:
        log.exception("failed")
    kept = ring.tail(1 << 20) + (tmp_path / "log.jsonl").read_text()
    for part in ("Zm9vYmFyYmF6cXV4", "12345678", "eyJzdWIiOiJkLTEifQ", "hunter22222", "MIGHAgEA"):
        assert part not in kept
    assert "kept" in kept
    assert logring.HIDDEN in kept


def test_memory_and_files_are_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    ring = logring.LogRing(tmp_path / "log.jsonl")
    log = logger(ring)
    for n in range(9000):
        log.warning("line", extra=kv(n=n, filler="x" * 100))
    log.warning("y" * 1_000_000)
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= logring.FILE_BYTES
    text = ring.tail(1 << 20)
    assert len(text) <= logring.MEMORY_BYTES + 2 * logring.FILE_BYTES
    found = lines(ring)
    assert found[-1]["cut"] is True
    numbers = [int(one["fields"]["n"]) for one in found[:-1]]  # type: ignore[index]
    assert numbers == list(range(numbers[0], 9000)), "no gap and nothing twice"
    assert len(ring.tail(1000)) <= 1000


def test_lines_of_an_earlier_life_come_first_and_a_full_disk_costs_only_the_file(tmp_path: Path) -> None:
    first = logring.LogRing(tmp_path / "log.jsonl")
    logger(first).info("one")
    logger(first).info("two")
    first.flush()
    second = logring.LogRing(tmp_path / "log.jsonl")
    logger(second).warning("three")
    assert [one["message"] for one in lines(second)] == ["one", "two", "three"]
    nowhere = logring.LogRing(tmp_path / "no" / "such" / "folder")
    logger(nowhere).error("kept in memory")
    assert [one["message"] for one in lines(nowhere)] == ["kept in memory"]
