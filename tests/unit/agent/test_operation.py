"""What the service manager hears, what a reload takes over, and what it costs to ask: decisions, and imports of a fresh interpreter."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from skerry_agent import config, reloading
from skerry_agent.asking import control_socket
from skerry_agent.core.reload import LIVE, NEXT_WORKER, judge_reload
from skerry_agent.core.watchdog import Health, judge_health
from skerry_agent.errors import BadConfig


@pytest.mark.parametrize(
    ("health", "wanted"),
    [
        (Health(store_failed=False, should_answer=True, unanswered_s=0.0), ""),
        (Health(store_failed=False, should_answer=True, unanswered_s=300.0), ""),
        (Health(store_failed=False, should_answer=True, unanswered_s=300.1), "nothing has answered for 300 s, at most 300 s"),
        (Health(store_failed=False, should_answer=False, unanswered_s=1e9), ""),
        (Health(store_failed=True, should_answer=False, unanswered_s=0.0), "the store failed"),
    ],
)  # fmt: skip
def test_the_watchdog_is_told_only_what_is_so(health: Health, wanted: str) -> None:
    assert judge_health(health, 300.0) == wanted


def test_every_key_is_live_or_waits_for_a_worker_or_a_restart() -> None:
    assert set(config.as_toml_keys()) >= LIVE | NEXT_WORKER
    assert not LIVE & NEXT_WORKER
    nothing = judge_reload({"a": 1}, {"a": 1})
    assert (nothing.live, nothing.next_worker, nothing.restart) == ((), (), ())
    assert judge_reload({"apps.clients": 2}, {"apps.clients": 3}).live == ("apps.clients",)
    # A socket is made at the start.
    assert judge_reload({"apps.clients": 0}, {"apps.clients": 3}).restart == ("apps.clients",)


def test_a_reload_takes_over_what_it_can_and_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n')
    running = config.load(file, {})
    file.write_text(
        f'state_dir = "{tmp_path}"\n[mqtt]\nport = 1234\n[timing]\ndrain_s = 3.0\nfold_interval_s = 1.0\n[log]\nlevel = "debug"\n'
    )
    now, changes = reloading.read_again(running, file, {})
    assert changes.live == ("log.level", "timing.drain_s")
    assert changes.next_worker == ("timing.fold_interval_s",)
    assert changes.restart == ("mqtt.port",)
    assert (now.timing.drain_s, now.timing.fold_interval_s, now.log.level, now.mqtt.port) == (3.0, 1.0, "debug", 0)
    # The same file again: what waits for a restart still does.
    again, changes = reloading.read_again(now, file, {})
    assert again == now
    assert (changes.live, changes.next_worker, changes.restart) == ((), (), ("mqtt.port",))
    file.write_text("colour = 1\n")
    with pytest.raises(BadConfig, match="unknown key 'colour'"):
        reloading.read_again(now, file, {})


def test_every_key_of_the_tree_can_be_compared(tmp_path: Path) -> None:
    found = config.Config(state_dir=tmp_path)
    assert sorted(reloading.by_key(found)) == sorted(config.as_toml_keys())
    everything = {key: dataclasses.replace(found) for key in LIVE}
    assert everything


def test_the_control_socket_is_found_without_reading_everything(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('state_dir = "/a"\n[server]\nurl = 5\n')
    assert control_socket(file, {}) == Path("/a/run/control.sock")
    assert control_socket(file, {"SKERRY_AGENT_STATE_DIR": "/b"}) == Path("/b/run/control.sock")
    for text in ("", "state_dir = 3", "= ="):
        file.write_text(text)
        assert control_socket(file, {}) is None
    assert control_socket(tmp_path / "none", {}) is None


def loaded(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_to_ask_for_the_status_loads_little() -> None:
    # 100 ms on a small board: an event loop, msgspec or the whole configuration would each take a third of that.
    asked = "import sys\nsys.argv = ['skerry-agent', 'status']\nfrom skerry_agent.cli import main\nmain(['status', '--config', '/nowhere'])"
    found = loaded("from skerry_agent import asking, cli\ncli._parser()")
    for heavy in (
        "asyncio",
        "msgspec",
        "dataclasses",
        "inspect",
        "logging",
        "subprocess",
        "ssl",
        "sqlite3",
        "numpy",
        "psutil",
        "paho",
    ):
        assert heavy not in found, heavy
    bare = loaded("")
    assert len(found - bare) <= 80, sorted(found - bare)
    assert "msgspec" in loaded(asked), "a file that cannot be read quickly is read properly"


def cpu_s(*arguments: str) -> float:
    """CPU time of a whole process, the least of five: what else the machine does is left out."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_to_ask_takes_no_more_than_a_few_bare_interpreters(tmp_path: Path) -> None:
    # The import of asyncio and msgspec alone made it ten times a bare one.
    file = tmp_path / "agent.toml"
    file.write_text(f'state_dir = "{tmp_path}"\n')
    quick = "from skerry_agent import asking, cli; cli._parser(); asking.control_socket(__import__('pathlib').Path({!r}), {{}})"
    assert cpu_s("-c", quick.format(str(file))) < 6 * cpu_s("-c", "pass") + 0.05
