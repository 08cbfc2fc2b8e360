"""The file of the local endpoint's clients."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from skerry_agent import cli
from skerry_agent import clients as c
from skerry_agent.commands import conversation
from skerry_agent.errors import Degraded, Rejected


def test_a_token_is_given_once_and_the_file_has_only_its_hash(tmp_path: Path) -> None:
    path = tmp_path / c.FILE
    assert c.read(path) == ()
    token = c.add(path, c.Client(name="camera", models=("gas",), label=False, rate=2.5, burst=4), token=True)
    other = c.add(path, c.Client(name="logger"), token=True)
    assert len(token) == len(other) == 43
    assert token != other
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    camera, logger = c.read(path)
    assert camera.token_sha256 == c.hashed(token.encode()).hex()
    assert (camera.models, camera.label, camera.rate, camera.burst) == (("gas",), False, 2.5, 4)
    assert (logger.name, logger.models, logger.label, logger.rate) == ("logger", (), True, None)
    c.remove(path, "camera")
    assert [client.name for client in c.read(path)] == ["logger"]


def test_a_client_may_be_known_by_its_user_and_has_no_token_then(tmp_path: Path) -> None:
    path = tmp_path / c.FILE
    assert c.add(path, c.Client(name="camera", uid=1000), token=False) == ""
    assert c.read(path)[0].uid == 1000


@pytest.mark.parametrize(
    ("client", "token", "words"),
    [
        (c.Client(name="Camera"), True, "name: wanted a-z"),
        (c.Client(name=""), True, "name"),
        (c.Client(name="a", uid=1), True, "a token, a uid or a gid, one of them"),
        (c.Client(name="a"), False, "a token, a uid or a gid, one of them"),
        (c.Client(name="a", uid=-1), False, "uid or gid from 0"),
        (c.Client(name="a", rate=-1.0), True, "rate: wanted 0 to"),
        (c.Client(name="a", burst=0), True, "burst: wanted 1 to"),
    ],
)
def test_a_client_that_cannot_be_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, client: c.Client, token: bool, words: str
) -> None:
    path = tmp_path / c.FILE
    with pytest.raises(Rejected, match=words):
        c.add(path, client, token=token)
    assert not path.exists()


def test_a_name_is_given_once_and_an_unknown_one_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / c.FILE
    c.add(path, c.Client(name="a"), token=True)
    before = path.read_bytes()
    with pytest.raises(Rejected, match="client_exists"):
        c.add(path, c.Client(name="a"), token=True)
    with pytest.raises(Rejected, match="client_unknown"):
        c.remove(path, "b")
    assert path.read_bytes() == before


def test_a_client_that_cannot_be_is_wrong_use_and_no_refusal_for_safety(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')

    def token(*arguments: str) -> tuple[int, str]:
        code = cli.main(["token", *arguments, "--config", str(config)])
        return code, capsys.readouterr().err

    code, said = token("add", "Not A Name")
    assert code == conversation.USAGE
    assert "client_invalid: name: wanted a-z, 0-9 and dashes inside, at most 64, got 'Not A Name'" in said
    assert token("add", "press")[0] == conversation.OK
    again = "wanted a new one, got 'press', which is there\n  skerry-agent token remove press, then add it again\n"
    assert token("add", "press") == (conversation.USAGE, f"skerry-agent: client_exists: name: {again}")
    code, said = token("remove", "lathe")
    assert (code, "client_unknown: name: wanted a client that is there, got 'lathe'" in said) == (
        conversation.USAGE,
        True,
    )
    assert "known are: press" in said


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b'{"clients":1}', b'{"clients":[{"name":"a"}]}', b'{"clients":[{"name":"a","token":"x"}]}',
        b'{"clients":[{"name":"a","token_sha256":"12"}]}', b"\xff", b'{"clients":[],"more":1}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_and_never_taken_for_an_empty_one(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / c.FILE
    path.write_bytes(data)
    with pytest.raises(Degraded, match="clients_damaged"):
        c.read(path)
    with pytest.raises(Degraded, match="clients_damaged"):
        c.add(path, c.Client(name="b"), token=True)
    assert path.read_bytes() == data


def test_clients_added_by_several_at_a_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / c.FILE
    said = f"""
import sys
from pathlib import Path
from skerry_agent import clients as c
for i in range(20):
    c.add(Path({str(path)!r}), c.Client(name=f"{{sys.argv[1]}}-{{i}}"), token=True)
"""
    adding = [subprocess.Popen([sys.executable, "-c", said, f"client-{n}"]) for n in range(4)]
    assert [one.wait(60) for one in adding] == [0] * 4
    assert len(c.read(path)) == 80
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([c.FILE, c.LAST])


def test_the_last_good_clients_are_those_last_written_or_read(tmp_path: Path) -> None:
    path = tmp_path / c.FILE
    c.add(path, c.Client(name="camera"), token=True)
    c.add(path, c.Client(name="logger"), token=True)
    c.remove(path, "camera")
    path.write_bytes(b"{")
    assert [client.name for client in c.last_good(path)] == ["logger"]
    c.keep(path, ())
    assert c.last_good(path) == ()
