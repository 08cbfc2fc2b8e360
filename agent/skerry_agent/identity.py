"""Who this device is: what enrolment left under ``identity/``, with the addresses that the configuration overrides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from skerry_contract import ids
from skerry_contract.errors import ContractError

from skerry_agent.config import Config
from skerry_agent.errors import Degraded


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What enrolment left under ``identity/``, with the addresses that the configuration overrides."""

    device: ids.DeviceId
    group: ids.GroupName
    server_url: str
    repository_url: str
    mqtt_host: str
    mqtt_port: int
    key: Path
    certificate: Path
    fleet_ca: Path


class _MqttAddress(msgspec.Struct, frozen=True):
    host: str
    port: int


class _Enrolled(msgspec.Struct, frozen=True):
    device_id: str
    group: str
    server_url: str
    mqtt: _MqttAddress
    repository_url: str = ""


def identity(config: Config) -> Identity:
    """Reads who this device is.

    Raises:
        Degraded: ``not_enrolled``, or ``identity_damaged`` when a file is missing or wrong.
    """
    folder = config.identity_dir
    path = folder / "enrolled.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Enrolled)
        device, group = ids.device_id(found.device_id), ids.group_name(found.group)
    except FileNotFoundError:
        raise Degraded(
            "not_enrolled", f"{path} is not there", advice="run: skerry-agent enrol --config FILE --token TOKEN"
        ) from None
    except (OSError, msgspec.DecodeError, ContractError) as error:
        raise Degraded("identity_damaged", f"{path}: {error}", advice="enrol the device again") from None
    files = {name: folder / name for name in ("device.key", "device.pem", "fleet-ca.pem")}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise Degraded("identity_damaged", f"{folder}: no {', '.join(missing)}", advice="enrol the device again")
    server_url = (config.server.url or found.server_url).rstrip("/")
    repository_url = (
        config.repository.url or ("" if config.server.url else found.repository_url) or f"{server_url}/repository"
    )
    return Identity(
        device=device,
        group=group,
        server_url=server_url,
        repository_url=repository_url.rstrip("/"),
        mqtt_host=config.mqtt.host or found.mqtt.host,
        mqtt_port=config.mqtt.port or found.mqtt.port,
        key=files["device.key"],
        certificate=files["device.pem"],
        fleet_ca=files["fleet-ca.pem"],
    )
