"""The agent's .deb in a bare Debian 12: what is in it, and its whole life there, with a real server beside it."""

from __future__ import annotations

import configparser
import http.client
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from skerry_cli.demo import data
from skerry_cli.demo.fleet import GROUP
from skerry_cli.demo.models import MODEL, VARIANTS
from skerry_cli.enrolling import complete_token

from tests.architecture.source import ROOT
from tests.system.conftest import Rig, utc_now
from tests.system.device_root import DeviceRoot, missing

pytestmark = pytest.mark.slow  # asks the package index, and Debian's

DEVICE = "gas-1"
PYTHON = "/usr/lib/skerry-agent/bin/python3"
UNITS = ("skerry-agent.service", "skerry-agent-enrol.service")
WATCHDOG_S = 10.0
MOST_EXPOSED = 1.7
"""Of 10, as systemd-analyze reckons. What is above 0 is the network that it is for."""
PROVE = """
import ctypes, sys
# PR_SET_MDWE, as MemoryDenyWriteExecute=yes of the unit; kernels before 6.3 do not know it.
ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)
from skerry_runtime import proof
from skerry_runtime.bundle import open_bundle
from skerry_runtime.runner import load
path, digest, variant = sys.argv[1:]
found = proof.prove(load(open_bundle(path, digest=digest, variants=[variant]), variant))
print(found.ok, found.passed, found.cases)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    why = missing()
    if why and os.environ.get("CI") == "true":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    if os.environ.get("SKERRY_TEST_DEB"):
        # For work on what comes after the package; CI never sets it.
        return Path(os.environ["SKERRY_TEST_DEB"]).absolute()
    ended = subprocess.run(
        [str(ROOT / "packaging" / "deb" / "build"), str(tmp_path_factory.mktemp("deb"))],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.strip())


@pytest.fixture(scope="module")
def root(package: Path, tmp_path_factory: pytest.TempPathFactory) -> DeviceRoot:
    made = DeviceRoot(tmp_path_factory.mktemp("chroot") / "root")
    (made.folder / "tmp" / package.name).write_bytes(package.read_bytes())
    return made


class Listener:
    """The service manager's end of ``NOTIFY_SOCKET``. ``said``: everything, with when it came (monotonic)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(path))
        # Anybody may knock: the agent is another user.
        path.chmod(0o777)
        self.said: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            lines = self._socket.recv(4096).decode().splitlines()
            self.said += [(time.monotonic(), line) for line in lines]

    def times(self, wanted: str) -> list[float]:
        """When ``wanted`` was said."""
        return [when for when, line in list(self.said) if line == wanted]

    def wait_for(self, wanted: str, timeout_s: float) -> float:
        """Waits until it was said. Returns when it was, first."""
        deadline = time.monotonic() + timeout_s
        while not self.times(wanted):
            assert time.monotonic() < deadline, (wanted, self.said)
            time.sleep(0.05)
        return self.times(wanted)[0]


def unit(root: DeviceRoot, name: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string((root.folder / "lib/systemd/system" / name).read_text())
    return parser["Service"]


def ask(address: dict[str, Any], row: Any) -> dict[str, Any]:
    tensor = {"name": "readings", "shape": [1, len(row)], "datatype": "FP32", "data": [float(v) for v in row]}
    connection = http.client.HTTPConnection(address["host"], address["port"], timeout=10)
    body = json.dumps({"inputs": [tensor]})
    connection.request("POST", f"/v2/models/{MODEL}/infer", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == 200, text
    return dict(json.loads(text))


def test_the_package_is_an_environment_of_pinned_libraries_without_a_trace_of_its_builder(
    package: Path, tmp_path: Path
) -> None:
    subprocess.run(["dpkg-deb", "-x", str(package), str(tmp_path)], check=True, timeout=120)
    home = tmp_path / "usr/lib/skerry-agent"
    assert os.readlink(home / "bin" / "python3") == "/usr/bin/python3.11"
    assert "home = /usr/bin" in (home / "pyvenv.cfg").read_text().splitlines()
    pins = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
        if version
    }
    site = home / "lib/python3.11/site-packages"
    found = {}
    for folder in site.glob("*.dist-info"):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        found[re.sub(r"[-_.]+", "-", name).lower()] = version
        assert not (folder / "direct_url.json").exists()
    ours = {name for name in found if name.startswith("skerry")}
    assert ours == {"skerry-agent", "skerry-contract", "skerry-runtime"}
    assert {name: version for name, version in found.items() if name not in ours and pins.get(name) != version} == {}
    # Where Debian's own interpreter made it, its place is that of the package's, too.
    for place in {str(ROOT), str(package.parent), sys.base_prefix} - {"/usr"}:
        named = subprocess.run(["grep", "-rlF", place + "/", str(home)], capture_output=True, text=True, timeout=120)
        assert (named.returncode, named.stdout) == (1, "")
    sources = {path.relative_to(site) for path in (site / "skerry_agent").rglob("*.py")}
    for source in sources:
        compiled = site / source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        # PEP 552: 1, a hash that is not compared. No start reads the source, and none writes.
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", compiled
    owners = subprocess.run(["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in owners.splitlines()} == {"root/root"}
    assert not [line for line in owners.splitlines() if line[0] in "-d" and (line[5] == "w" or line[8] == "w")]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "fleet")
    try:
        rig.fleet.start_server()
        rig.fleet.hold_ceremony(utc_now())
        yield rig
    finally:
        rig.processes.stop()


def test_installed_enrolled_serving_upgraded_removed_and_purged(
    package: Path, root: DeviceRoot, fleet: Rig, tmp_path: Path
) -> None:
    token_file = root.folder / "etc/credstore/skerry.enrolment-token"
    token_file.parent.mkdir()
    bare = root.files()
    deb = f"/tmp/{package.name}"
    state, config = root.folder / "var/lib/skerry-agent", root.folder / "etc/skerry/agent.toml"
    wants = root.folder / "etc/systemd/system/multi-user.target.wants"

    root.do("dpkg", "-i", deb)
    version = root.do("skerry-agent", "--version")
    assert version == f"skerry-agent {package.name.split('_')[1]}\n"
    told = root.run("skerry-agent", "doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(told.stdout)["findings"]}
    assert told.returncode == 1
    assert {name for name, found in findings.items() if found["verdict"] == "fail"} == {
        "agent", "identity", "root of trust",
    }  # fmt: skip
    assert re.match(r"onnx [\d.]+, tflite [\d.]+; no bundle", findings["runtime"]["detail"])
    assert {path.name for path in wants.glob("skerry*")} == set(UNITS)
    assert (state.stat().st_mode & 0o7777, sorted(state.iterdir())) == (0o700, [])

    # The units are well, and shut in.
    for name in UNITS:
        judged = root.run("systemd-analyze", "verify", "--man=no", f"/lib/systemd/system/{name}")
        assert (judged.returncode, judged.stderr) == (0, ""), name
        shut = root.run("systemd-analyze", "security", "--offline=yes", "--no-pager", f"/lib/systemd/system/{name}")
        exposure = float(re.search(r"exposure level for \S+ ([\d.]+)", shut.stdout)[1])  # type: ignore[index]
        assert exposure <= MOST_EXPOSED, shut.stdout

    # Both runtimes prove a real bundle on the installed environment.
    made = fleet.publish("1.0.0", (1,))
    subprocess.run(["cp", "-r", str(made.bundle.folder), str(root.folder / "tmp/bundle")], check=True)
    for variant in VARIANTS.values():
        said = root.do(PYTHON, "-I", "-c", PROVE, "/tmp/bundle", made.bundle.digest, variant).split()
        assert said[0] == "True"
        assert said[1] == said[2] != "0"

    # Enrolled by root, as a person would: all that comes of it is the agent's.
    wish = {"device_id": DEVICE, "group": GROUP, "expires_s": 600}
    token = complete_token(fleet.fleet.api, fleet.fleet.ceremony.root_sha256, wish)
    assert DEVICE in root.do("skerry-agent", "enrol", "--token", token)
    uid = int(root.do("id", "-u", "skerry-agent"))
    assert uid != 0
    assert {path.stat().st_uid for path in state.rglob("*")} == {uid}

    # As the unit starts it, with this test in the service manager's place.
    service = unit(root, UNITS[0])
    assert (service["Type"], service["User"], service["StateDirectory"]) == ("notify",) + ("skerry-agent",) * 2
    (root.folder / "run/skerry-agent").mkdir()
    os.chown(root.folder / "run/skerry-agent", uid, -1)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(root.folder / "run")
        manager = Listener(Path("manager"))
    agent = root.start(
        ["setpriv", "--reuid=skerry-agent", "--regid=skerry-agent", "--init-groups", "--no-new-privs", "--",
         *shlex.split(service["ExecStart"])],
        {"NOTIFY_SOCKET": "/run/manager", "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)), "SKERRY_AGENT_SERVING_PORT": "0"},
        tmp_path / "agent.log",
    )  # fmt: skip
    try:
        ready = manager.wait_for("READY=1", 60.0)
        fleet.start_rollout("first", made, [{"share": 1.0, "min_inferences": 0, "max_seconds": 120}])
        fleet.fleet.wait("the model", lambda: fleet.fleet.running(fleet.fleet.listed()[DEVICE])[0] == "1.0.0", 90.0)
        address = json.loads((state / "run/serving.json").read_text())
        assert address["socket"] == "/run/skerry-agent/serving.sock"
        row = data.load((1,)).x[0]
        answer = ask(address, row)
        assert (answer["model_version"], len(answer["outputs"][0]["data"])) == ("1.0.0", 6)
        examined = root.run("skerry-agent", "doctor", "--json")
        findings = {finding["check"]: finding for finding in json.loads(examined.stdout)["findings"]}
        assert (examined.returncode, findings["server"]["verdict"], findings["broker"]["verdict"]) == (0, "ok", "ok")
        assert "golden cases passed" in findings["runtime"]["detail"]
        # It never fell silent for so long that it would have been killed, while it fetched, proved and swapped.
        fleet.fleet.wait("two pings", lambda: len(manager.times("WATCHDOG=1")) >= 2, 2 * WATCHDOG_S)
        pings = [ready, *manager.times("WATCHDOG=1"), time.monotonic()]
        assert max(later - sooner for sooner, later in itertools.pairwise(pings)) < WATCHDOG_S
        agent.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1", 10.0)
        assert agent.wait(30) == 0
        assert [line for _, line in manager.said if line != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]
    finally:
        agent.kill()
        agent.wait()

    # The same again, as an upgrade: what the administrator changed stays as it is.
    config.write_text(config.read_text() + '\n[log]\nlevel = "warning"\n')
    edited = config.read_text()
    for name in UNITS:
        (wants / name).unlink()
    kept = {path.relative_to(state) for path in state.rglob("*")}
    root.do("dpkg", "-i", deb)
    assert config.read_text() == edited
    assert {path.relative_to(state) for path in state.rglob("*")} == kept
    assert list(wants.glob("skerry*")) == []

    root.do("dpkg", "-r", "skerry-agent")
    assert config.read_text() == edited
    assert {path.relative_to(state) for path in state.rglob("*")} == kept
    assert not (root.folder / "usr/lib/skerry-agent").exists()

    # Purged while a process of its user lives, as one does in a container that systemd does not stop.
    token_file.write_text("never used")
    alive = root.start(
        ["setpriv", "--reuid=skerry-agent", "--regid=skerry-agent", "--init-groups", "--", "sleep", "600"],
        {}, tmp_path / "alive.log",
    )  # fmt: skip
    try:
        fleet.fleet.wait("the process", lambda: uid in os.stat(f"/proc/{alive.pid}")[4:5], 30.0)
        purged = root.run("dpkg", "-P", "skerry-agent")
        assert purged.returncode == 0, purged
        assert "deluser --system skerry-agent" in purged.stderr
        assert root.run("dpkg", "-s", "skerry-agent").returncode == 1
        assert not token_file.exists()
    finally:
        alive.kill()
        alive.wait()
    root.do("deluser", "--system", "skerry-agent")
    assert root.run("id", "skerry-agent").returncode == 1
    left = (
        root.files() - bare - {f"etc/{name}-" for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")}
    )
    assert left == set()
    assert bare - root.files() == set()
