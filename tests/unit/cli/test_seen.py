"""What the operator's tool has seen of a fleet outlives the fleet's CA, which is replaced when the server was stolen."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from skerry_cli import keys, restoring
from skerry_cli.commands.publish import seen_dir
from skerry_cli.commands.session import Session
from skerry_cli.errors import Usage
from skerry_cli.profile import Options
from skerry_server import ca

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)


def ceremony(folder: Path) -> keys.Ceremony:
    online = CryptoSigner.generate_ed25519().public_key
    return keys.hold_ceremony(folder, online_keys={online.keyid: online}, password=None, now=NOW)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> list[ca.FleetCA]:
    return [ca.open_ca(tmp_path_factory.mktemp("ca"), NOW) for _ in range(2)]


def session(made: keys.Ceremony, authority: ca.FleetCA) -> Session:
    options = Options(server="https://127.0.0.1:1", ca=str(authority.files.ca), keys=made.directory)
    return Session(options, {"SKERRY_TOKEN": "secret", "SKERRY_CONFIG": str(made.directory / "none.toml")})


def remember(place: Path, made: keys.Ceremony, version: int) -> None:
    """As the tool leaves it after it verified the ceremony's documents, and a catalog of this version."""
    history = place / "catalog" / "root_history"
    history.mkdir(parents=True)
    (history / "1.root.json").write_bytes(made.root)
    (place / "catalog" / "root.json").symlink_to("root_history/1.root.json")
    (place / "catalog" / "targets.json").write_bytes(made.targets)
    (place / "catalog" / "catalog.json").write_bytes(made.catalog)
    (place / "catalog" / "floors.json").write_bytes(made.floors)
    (place / "catalog" / "seen.json").write_text(json.dumps({"catalog": version}))


def seen(place: Path) -> int:
    return int(json.loads((place / "catalog" / "seen.json").read_bytes())["catalog"])


class Emptied:
    """A server that a backup took back to nothing."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def get(self, path: str) -> dict[str, Any]:
        return {}

    def post(self, path: str, body: Any) -> None:
        self.given.append(body)


def test_another_ca_over_the_same_root_finds_what_was_seen(tmp_path: Path, authorities: list[ca.FleetCA]) -> None:
    made = ceremony(tmp_path / "keys")
    remember(seen_dir(session(made, authorities[0])), made, 7)
    after = session(made, authorities[1])
    assert after.api.ca_sha256 != session(made, authorities[0]).api.ca_sha256
    assert seen(seen_dir(after)) == 7
    server = Emptied()
    restored = restoring.restore(server, seen_dir(after))  # type: ignore[arg-type]
    assert restored.roles == {"root": (0, 1), "targets": (0, 1), "catalog": (0, 1)}
    (given,) = server.given
    assert (given["root"], given["catalog"], given["restoring"]) == (made.root.decode(), made.catalog.decode(), True)


def test_what_lay_under_a_ca_is_found_under_the_root_and_the_newest_of_it(
    tmp_path: Path, authorities: list[ca.FleetCA]
) -> None:
    made, other = ceremony(tmp_path / "keys"), ceremony(tmp_path / "other")
    run = session(made, authorities[1])
    old = made.directory / ".seen"
    remember(old / ("a" * 16), made, 5)
    remember(old / ("b" * 16), made, 7)
    remember(old / ("c" * 16), other, 99)
    (old / ("d" * 16)).mkdir()
    assert seen(seen_dir(run)) == 7
    assert seen(seen_dir(run)) == 7, "and it stays so"
    assert restoring.restore(Emptied(), seen_dir(run)).roles["root"] == (0, 1)  # type: ignore[arg-type]
    assert sorted(one.name[0] for one in old.iterdir()) == ["a", "c", "d", "r"]


def test_what_was_seen_of_another_fleet_is_not_taken(tmp_path: Path, authorities: list[ca.FleetCA]) -> None:
    made, other = ceremony(tmp_path / "keys"), ceremony(tmp_path / "other")
    run = session(made, authorities[0])
    remember(made.directory / ".seen" / run.api.ca_sha256[:16], other, 99)
    with pytest.raises(Usage, match="never seen the catalog"):
        restoring.restore(Emptied(), seen_dir(run))  # type: ignore[arg-type]
