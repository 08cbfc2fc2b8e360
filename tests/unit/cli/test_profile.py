"""Which server, token and CA: options beat the environment, the environment beats the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from skerry_cli.client import Api
from skerry_cli.errors import Usage
from skerry_cli.profile import Options, Profile, load

FILE = """
[profiles.default]
server = "https://fleet.example:8443"
token_env = "MY_TOKEN"
ca_sha256 = "{digest}"
keys = "/offline/keys"

[profiles.other]
server = "https://other.example"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE.format(digest="AB:" * 31 + "AB"))
    return path


def test_the_file_fills_what_nobody_says(config: Path) -> None:
    found = load(Options(config=config), {"MY_TOKEN": " secret \n"})
    assert found == Profile(
        server="https://fleet.example:8443", token="secret", ca_sha256="ab" * 32, keys=Path("/offline/keys")
    )


def test_options_beat_the_environment_and_the_environment_beats_the_file(config: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file")
    environment = {"SKERRY_SERVER": "https://env.example", "SKERRY_TOKEN": "from-env", "MY_TOKEN": "from-profile"}
    assert load(Options(config=config), environment).token == "from-env"
    assert load(Options(config=config), environment).server == "https://env.example"
    found = load(Options(config=config, server="https://option.example", token=tmp_path / "token"), environment)
    assert (found.server, found.token) == ("https://option.example", "from-file")


def test_all_faults_of_the_file_come_together(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('colour = 1\n[profiles.default]\nserver = 5\ntokn_file = "x"\n')
    with pytest.raises(Usage) as error:
        load(Options(config=path), {})
    for part in ("'colour'", "profiles.default.server: wanted text", "'tokn_file'"):
        assert part in error.value.message


@pytest.mark.parametrize("server", ["http://plain.example", "fleet.example", "https://a@b", "https://x/path", ""])
def test_a_server_without_tls_or_with_more_than_an_origin_is_refused(server: str) -> None:
    with pytest.raises(Usage):
        Api(load(Options(server=server, ca="ab" * 32), {"SKERRY_TOKEN": "x", "SKERRY_CONFIG": "/nonexistent"}))


def test_what_must_be_encrypted_is_what_file_and_environment_ask_for_together(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[profiles.default]\nencrypted_models = "gas, oil"\n')
    assert load(Options(config=path), {}).encrypted_models == {"gas", "oil"}
    # A variable of a script lifts nothing.
    assert load(Options(config=path), {"SKERRY_ENCRYPTED_MODELS": ""}).encrypted_models == {"gas", "oil"}
    assert load(Options(config=path), {"SKERRY_ENCRYPTED_MODELS": "*"}).encrypted_models == {"gas", "oil", "*"}
    with pytest.raises(Usage, match="SKERRY_ENCRYPTED_MODELS: wanted names of models"):
        load(Options(config=path), {"SKERRY_ENCRYPTED_MODELS": "no/model"})


def test_the_token_never_shows(config: Path) -> None:
    assert "secret" not in repr(load(Options(config=config), {"MY_TOKEN": "secret"}))


@pytest.mark.parametrize("token", ["", "two words", "x" * 2000, "naïve"])
def test_a_token_that_cannot_be_one_is_refused_without_showing_it(tmp_path: Path, token: str) -> None:
    path = tmp_path / "token"
    path.write_text(token, encoding="utf-8")
    with pytest.raises(Usage) as error:
        load(Options(token=path), {"SKERRY_CONFIG": "/nonexistent"})
    assert str(path) in error.value.message
    assert not token or token not in error.value.message


def test_a_profile_that_is_not_there_is_named(config: Path) -> None:
    with pytest.raises(Usage, match="no profile 'third'; has default, other"):
        load(Options(config=config, profile="third"), {})
