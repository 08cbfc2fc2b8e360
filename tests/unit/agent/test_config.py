"""The configuration: every fault at once, nothing unknown, the environment last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from skerry_agent import config as c
from skerry_agent.core import bounds
from skerry_agent.errors import BadConfig, Degraded
from skerry_agent.identity import identity
from skerry_agent.reloading import by_key
from skerry_contract import wire


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_one_key_is_enough(tmp_path: Path) -> None:
    found = c.load(write(tmp_path, 'state_dir = "/var/lib/skerry"'), {})
    assert found.state_dir == Path("/var/lib/skerry")
    assert found.serving.host == "127.0.0.1"


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    text = """
        state_dir = "relative"
        colour = "red"
        [serving]
        host = "0.0.0.0"
        port = 70000
        [limits]
        outbox_mb = "much"
        upload_kib = 0
        outbox_gb = 1
        [server]
        url = "http://plain"
        [log]
        level = "loud"
    """
    with pytest.raises(BadConfig) as caught:
        c.load(write(tmp_path, text), {"SKERRY_AGENT_TIMING_ACK_S": "soon"})
    told = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 10
    for word in (
        "state_dir", "'colour'", "serving.host", "serving.port", "limits.outbox_mb", "limits.upload_kib", "limits.outbox_gb",
        "server.url", "log.level", "SKERRY_AGENT_TIMING_ACK_S",
    ):  # fmt: skip
        assert word in told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('["tflite", "torch"]', "wanted some of onnx, tflite, got 'torch'"),
        ('["onnx", "onnx"]', "wanted each runtime once"),
        ('"tflite"', "wanted a list, each of it text, got 'tflite'"),
    ],
)
def test_runtimes_that_cannot_be_are_told_with_every_other_fault(tmp_path: Path, value: str, told: str) -> None:
    text = f'state_dir = "/x"\n[device]\nruntimes = {value}\n[log]\nlevel = "loud"\n'
    with pytest.raises(BadConfig) as caught:
        c.load(write(tmp_path, text), {})
    first, second = caught.value.faults
    assert "device.runtimes" in first and told in first
    assert "log.level" in second


@pytest.mark.parametrize(
    ("port", "rest", "told"),
    [
        ('"none"', "", "wants a serving.socket"),
        ('"any"', "", "wanted a port from 0 to 65535, or \"none\", got 'any'"),
        ("1.5", "", 'wanted a port from 0 to 65535, or "none", got 1.5'),
        ("-1", "", "wanted a port from 0 to 65535, got -1"),
        ('"none"', 'socket = "/run/a.sock"', ""),
    ],
)
def test_a_device_without_a_port_needs_a_socket(tmp_path: Path, port: str, rest: str, told: str) -> None:
    path = write(tmp_path, f'state_dir = "/x"\n[serving]\nport = {port}\n{rest}\n')
    if not told:
        assert c.load(path, {}).serving.port == "none"
        assert c.load(path, {"SKERRY_AGENT_SERVING_PORT": "8500"}).serving.port == 8500
        return
    with pytest.raises(BadConfig) as caught:
        c.load(path, {})
    assert len(caught.value.faults) == 1
    assert told in caught.value.faults[0]


def install(site: Path, distribution: str, *modules: str, version: str = "1.2.3") -> None:
    """A distribution as a package installer leaves it, with empty modules."""
    about = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (about / "top_level.txt").write_text("\n".join(modules))
    for module in modules:
        (site / module).mkdir()
        (site / module / "__init__.py").write_text("raise SystemExit('was imported')")


def seen_with(site: Path, config: Path) -> tuple[str, dict[str, str]]:
    """The stratum and the runtimes of an agent for which nothing but ``site`` is installed."""
    program = (
        "import importlib.metadata, json, sys\n"
        "from pathlib import Path\n"
        "from skerry_agent import config, facts\n"
        "from skerry_runtime import engines\n"
        "sys.path[:] = [sys.argv[1]]\n"
        "found = config.load(Path(sys.argv[2]), {})\n"
        "runtimes = facts.runtimes(found)\n"
        "heavy = sorted({'numpy', 'onnxruntime', 'ai_edge_litert', 'tflite_runtime', 'cryptography'} & set(sys.modules))\n"
        "print(json.dumps([facts.stratum(found, runtimes), runtimes, heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(site), str(config)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    stratum, runtimes, heavy = json.loads(done.stdout)
    assert heavy == []
    return stratum, runtimes


@pytest.mark.parametrize(
    ("runtimes", "installed", "name"),
    [
        ("[]", ("onnx", "tflite"), "onnx+tflite"),
        ('["tflite"]', ("onnx", "tflite"), "tflite"),
        ('["tflite", "onnx"]', ("onnx", "tflite"), "tflite>onnx"),
        ('["onnx", "tflite"]', ("onnx", "tflite"), "onnx>tflite"),
        ('["tflite", "onnx"]', ("onnx",), "onnx"),
        ('["tflite"]', ("onnx",), "none"),
    ],
)
def test_devices_that_take_different_variants_are_of_different_strata(
    tmp_path: Path, runtimes: str, installed: tuple[str, ...], name: str
) -> None:
    site = tmp_path / "site"
    for runtime in installed:
        install(
            site, *{"onnx": ("onnxruntime", "onnxruntime"), "tflite": ("ai-edge-litert", "ai_edge_litert")}[runtime]
        )
    text = f'state_dir = "/x"\n[device]\nstratum_class = "box"\nruntimes = {runtimes}\n'
    stratum, found = seen_with(site, write(tmp_path, text))
    assert stratum == f"box.{name}"
    assert set(found.values()) <= {"1.2.3"}


def test_a_vendors_build_counts_as_the_runtime_whose_module_it_brings(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(site, "onnxruntime-gpu", "onnxruntime", version="1.22.1")
    # A module that nobody says he installed: by hand, or with an image.
    (site / "tflite_runtime").mkdir()
    (site / "tflite_runtime" / "__init__.py").write_text("")
    assert seen_with(site, write(tmp_path, 'state_dir = "/x"'))[1] == {"onnx": "1.22.1", "tflite": "0"}


def test_what_an_uninstalled_runtime_leaves_behind_is_no_runtime(tmp_path: Path) -> None:
    site = tmp_path / "site"
    # Metadata without the module, and a folder without code.
    install(site, "onnxruntime")
    (site / "ai_edge_litert" / "cache").mkdir(parents=True)
    assert seen_with(site, write(tmp_path, 'state_dir = "/x"'))[1] == {}


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environment = {
        "SKERRY_AGENT_STATE_DIR": "/other", "SKERRY_AGENT_SERVING_PORT": "8500", "SKERRY_AGENT_DEVICE_TAGS": "a,b",
        "SKERRY_AGENT_LOG_JSON": "true",
    }  # fmt: skip
    found = c.load(write(tmp_path, 'state_dir = "/x"\n[serving]\nport = 1\n'), environment)
    assert (found.state_dir, found.serving.port, found.device.tags, found.log.json) == (
        Path("/other"),
        8500,
        ("a", "b"),
        True,
    )


@pytest.mark.parametrize("text", ["state_dir = ", "[serving]\nport = 1", "\xff", 'state_dir = "/x"\nserving = 3'])
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadConfig) as caught:
        c.load(path, {})
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        c.load(tmp_path / "none.toml", {})


def enrolled(tmp_path: Path, **changes: object) -> c.Config:
    folder = tmp_path / "identity"
    folder.mkdir()
    for name in ("device.key", "device.pem", "fleet-ca.pem"):
        (folder / name).write_text("x")
    found = {
        "device_id": "d-1", "group": "g", "server_url": "https://s:1", "repository_url": "https://cdn/r",
        "mqtt": {"host": "b", "port": 8883}, **changes,
    }  # fmt: skip
    (folder / "enrolled.json").write_text(json.dumps(found))
    return c.build({"state_dir": str(tmp_path)}, {})


def test_what_enrolment_learnt_fills_the_addresses(tmp_path: Path) -> None:
    found = identity(enrolled(tmp_path))
    assert (found.device, found.server_url, found.repository_url, found.mqtt_port) == (
        "d-1",
        "https://s:1",
        "https://cdn/r",
        8883,
    )


def test_the_file_beats_what_enrolment_learnt(tmp_path: Path) -> None:
    enrolled(tmp_path)
    tree = {"state_dir": str(tmp_path), "server": {"url": "https://other:2/"}, "mqtt": {"port": 99}}
    found = identity(c.build(tree, {}))
    assert (found.server_url, found.repository_url, found.mqtt_port) == (
        "https://other:2",
        "https://other:2/repository",
        99,
    )


def test_a_device_without_identity_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(Degraded) as caught:
        identity(c.build({"state_dir": str(tmp_path)}, {}))
    assert caught.value.code == "not_enrolled"
    assert "enrol" in caught.value.advice


@pytest.mark.parametrize("changes", [{"device_id": "Not A Name"}, {"mqtt": None}, {"group": 3}])
def test_a_damaged_identity_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    config = enrolled(tmp_path, **changes)
    with pytest.raises(Degraded) as caught:
        identity(config)
    assert caught.value.code == "identity_damaged"


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    config = enrolled(tmp_path)
    (tmp_path / "identity" / "device.pem").unlink()
    with pytest.raises(Degraded, match=r"device\.pem"):
        identity(config)


def test_what_models_run_on_is_read_as_engines_take_it(tmp_path: Path) -> None:
    from skerry_runtime.acceleration import CPU, Acceleration, Delegate

    text = """
        state_dir = "/var/lib/skerry"
        [runtime]
        threads = 2
        onnx_providers = ["A", "B"]
        onnx_provider_options = { A = { device_id = "0" } }
        tflite_delegates = [{ library = "libedgetpu.so.1", options = { device = "usb" } }, { library = "other.so" }]
        tflite_xnnpack = false
    """
    found = c.load(write(tmp_path, text), {"SKERRY_AGENT_RUNTIME_ONNX_PROVIDERS": "A,C"})
    assert msgspec.convert(found.runtime.acceleration, Acceleration) == Acceleration(
        threads=2,
        providers=("A", "C"),
        provider_options={"A": {"device_id": "0"}},
        delegates=(Delegate(library="libedgetpu.so.1", options={"device": "usb"}), Delegate(library="other.so")),
        xnnpack=False,
    )
    plain = c.load(write(tmp_path, 'state_dir = "/var/lib/skerry"'), {})
    assert msgspec.convert(plain.runtime.acceleration, Acceleration) == CPU


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("threads = 0", "runtime.threads: wanted more than 0"),
        ("threads = 1000", "runtime.threads: wanted at most 256"),
        ('onnx_providers = ["A", "A"]', "runtime.onnx_providers: wanted each provider once"),
        ("onnx_provider_options = { A = { x = 1 } }", "runtime.onnx_provider_options"),
        ('onnx_provider_options = { A = { x = "1" } }', "A is not one of runtime.onnx_providers"),
        ('tflite_delegates = [{ path = "a.so" }]', "runtime.tflite_delegates"),
    ],
)
def test_wishes_that_make_no_sense_are_faults(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(BadConfig) as caught:
        c.load(write(tmp_path, f'state_dir = "/x"\n[runtime]\n{line}\n'), {})
    (fault,) = caught.value.faults
    assert told in fault


@pytest.mark.parametrize(
    ("section", "key", "most"),
    [("labels", "predictions", c.MOST_PREDICTIONS), ("limits", "upload_kib", c.MOST_UPLOAD_KIB)],
)
def test_what_no_disk_and_no_server_takes_is_a_fault(tmp_path: Path, section: str, key: str, most: int) -> None:
    def read(value: int) -> c.Config:
        return c.load(write(tmp_path, f'state_dir = "/x"\n[{section}]\n{key} = {value}\n'), {})

    assert getattr(getattr(read(most), section), key) == most
    with pytest.raises(BadConfig) as caught:
        read(most + 1)
    (fault,) = caught.value.faults
    assert f"{section}.{key}: wanted at most {most}" in fault
    assert fault.endswith(f"got {most + 1}")


def test_the_largest_batch_is_half_of_what_a_server_unpacks() -> None:
    assert c.MOST_UPLOAD_KIB * 1024 * 2 == wire.MAX_INFLATED_BYTES


def test_a_wrong_choice_names_file_key_choices_and_what_was_given(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'state_dir = "/x"\n[telemetry]\npersonal = "keep"\n[[runtime.tflite_delegates]]\nlibrary = 7\n'
    )
    with pytest.raises(BadConfig) as caught:
        c.load(path, {"SKERRY_AGENT_TELEMETRY_ENCRYPT": "perhaps"})
    assert caught.value.faults == (
        f"{path}: runtime.tflite_delegates[0].library: wanted text, got 7",
        f"{path}: telemetry.personal: wanted one of drop, hash, got 'keep'",
        "SKERRY_AGENT_TELEMETRY_ENCRYPT: wanted true or false, got 'perhaps'",
    )


@pytest.mark.parametrize(
    ("section", "line", "told"),
    [
        ("limits", "outbox_mb = inf", "wanted a number that has an end, got inf"),
        ("timing", "silent_s = nan", "wanted a number that has an end, got nan"),
        ("timing", "sync_s = nan", "wanted a number that has an end, got nan"),
        ("timing", "health_interval_s = inf", "wanted a number that has an end, got inf"),
        ("timing", "health_interval_s = 1e-9", "wanted at least 0.01, got 1e-09"),
        ("timing", "inference_s = -5", "wanted more than 0, got -5.0"),
        ("timing", "silent_s = 0", "wanted more than 0, got 0.0"),
        ("timing", "courier_s = 1e300", "wanted at most 3.16224e+07, got 1e+300"),
        ("labels", "predictions = 1000000000000", "wanted at most 16777216: each takes 18 bytes of disk, per window key, got 1000000000000"),
        ("limits", "disk_reserve_mb = 1e30", "wanted at most 1e+09, got 1e+30"),
        ("access", "rate = 1e-300", "wanted at least 0.0001, got 1e-300"),
        ("mqtt", "keepalive_s = 70000", "wanted at most 65535, got 70000"),
        ("pool", 'on_demand = ["gas", "No Such"]', "wanted names of models, got 'No Such'"),
    ],
)  # fmt: skip
def test_numbers_that_nothing_can_follow_are_faults(tmp_path: Path, section: str, line: str, told: str) -> None:
    with pytest.raises(BadConfig) as caught:
        c.load(write(tmp_path, f'state_dir = "/x"\n[{section}]\n{line}\n'), {})
    (fault,) = caught.value.faults
    assert fault.endswith(f"{section}.{line.split(maxsplit=1)[0]}: {told}")


def test_every_number_of_the_configuration_has_bounds(tmp_path: Path) -> None:
    for key, value in by_key(c.Config(state_dir=tmp_path)).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert bounds.fault(key, value) is None, "its default"
            assert bounds.fault(key, float("inf")), key
            if not key.endswith((".port", ".trace_share", ".threads")):
                assert bounds.fault(key, 10**300), key
