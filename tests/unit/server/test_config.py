"""The configuration: file, environment and command line, and all faults at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from skerry_server import config
from skerry_server.errors import BadSettings


def test_everything_has_a_default(tmp_path: Path) -> None:
    settings = config.load(tmp_path, {})
    assert settings.server.host == "127.0.0.1"
    assert settings.database_url == f"sqlite:///{tmp_path / 'server.db'}"


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[server]\nport = 1\npublic_host = "a.example"\n[rollout]\ntick_s = 3\n')
    environment = {"SKERRY_SERVER_SERVER_PORT": "2", "SKERRY_SERVER_ROLLOUT_TICK_S": "0.5", "PATH": "/bin"}
    settings = config.load(tmp_path, environment, {("server", "port"): 3, ("server", "host"): None})
    assert (settings.server.port, settings.server.public_host, settings.rollout.tick_s) == (3, "a.example", 0.5)


def test_a_list_in_the_environment_is_split_at_commas(tmp_path: Path) -> None:
    settings = config.load(tmp_path, {"SKERRY_SERVER_SERVER_PUBLIC_NAMES": "a.example,10.0.0.7"})
    assert settings.server.public_names == ("a.example", "10.0.0.7")


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(
        '[server]\nport = 99999\ncolour = "red"\nhost = "not an address"\n[limits]\nbody_mb = "8"\n[nonsense]\na = 1\n'
    )
    environment = {"SKERRY_SERVER_ROLLOUT_TICK_S": "fast", "SKERRY_SERVER_MQTT_COLOUR": "x", "SKERRY_SERVER_X_Y": "1"}
    with pytest.raises(BadSettings) as refused:
        config.load(tmp_path, environment)
    faults = " ".join(refused.value.faults)
    for named in (
        "server.port",
        "server.colour",
        "server.host",
        "limits.body_mb",
        "[nonsense]",
        "TICK_S",
        "COLOUR",
        "X_Y",
    ):
        assert named in faults, named
    assert len(refused.value.faults) == 8


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "exa_mple", "a" * 64 + ".example"])
def test_a_name_that_no_certificate_can_carry_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadSettings, match="host name"):
        config.load(tmp_path, {"SKERRY_SERVER_SERVER_PUBLIC_HOST": name})


def test_an_external_broker_is_an_address_for_the_server_and_one_for_devices(tmp_path: Path) -> None:
    told = {
        "SKERRY_SERVER_BROKER_KIND": "external",
        "SKERRY_SERVER_BROKER_URL": "mqtts://10.0.0.7:8884",
    }
    broker = config.load(tmp_path, told).broker
    assert broker.own == broker.public == ("10.0.0.7", 8884)
    told["SKERRY_SERVER_BROKER_PUBLIC_URL"] = "mqtts://broker.example:8883/"
    assert config.load(tmp_path, told).broker.public == ("broker.example", 8883)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mqtt://b:1883",
        "mqtts://b",
        "mqtts://:8883",
        "mqtts://u:p@b:8883",
        "mqtts://b:8883/x",
        "mqtts://b:99999",
        "b:8883",
    ],
)
def test_an_external_broker_without_a_usable_address_is_refused(tmp_path: Path, url: str) -> None:
    told = {"SKERRY_SERVER_BROKER_KIND": "external", "SKERRY_SERVER_BROKER_URL": url}
    with pytest.raises(BadSettings, match=r"broker\.url"):
        config.load(tmp_path, told)


def test_settings_of_two_brokers_at_once_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[broker]\nurl = "mqtts://b:1"\nca_file = "ca.pem"\n')
    with pytest.raises(BadSettings) as refused:
        config.load(tmp_path, {})
    assert [fault.partition(":")[0] for fault in refused.value.faults] == ["broker.url", "broker.ca_file"]
    text = '[broker]\nkind = "external"\nurl = "mqtts://b:1"\ncertificate_file = "none.pem"\n[mqtt]\nport = 8883\n'
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(BadSettings) as refused:
        config.load(tmp_path, {})
    assert [fault.partition(":")[0] for fault in refused.value.faults] == [
        "broker.certificate_file",
        "broker",
        "mqtt.port",
    ]


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_bytes(b"\xff= [")
    with pytest.raises(BadSettings, match="TOML"):
        config.load(tmp_path, {})


def test_what_must_be_encrypted_is_named_as_models_are_or_is_all(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('[policy]\nencrypted_models = ["gas", "*"]\n')
    assert config.load(tmp_path, {}).policy.encrypted_models == ("gas", "*")
    # A name that no model can have would protect nothing, in silence.
    (tmp_path / "server.toml").write_text('[policy]\nencrypted_models = ["Gas /"]\n')
    with pytest.raises(BadSettings) as refused:
        config.load(tmp_path, {})
    assert len(refused.value.faults) == 1
    assert "policy.encrypted_models: wanted names of models" in refused.value.faults[0]
