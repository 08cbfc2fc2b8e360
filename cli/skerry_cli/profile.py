"""Which server, whose token, whose CA: from options, the environment, and a profile file, in this order.

The file is ``~/.config/skerry/config.toml`` (or ``SKERRY_CONFIG``)::

    [profiles.default]
    server = "https://fleet.example:8443"
    token_file = "~/.config/skerry/token"     # or token_env = "NAME"; never the token itself
    ca = "~/.config/skerry/fleet-ca.pem"      # or ca_sha256 = "<hex fingerprint of the CA certificate>"
    keys = "~/skerry-keys"                    # the ceremony's folder, for approve and enrolment tokens
    model_signers = "~/signers"               # public keys; approve takes only bundles that one of them signed
    encrypted_models = "gas, oil"             # push and approve take these only encrypted; "*" for all
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skerry_contract import enrolment, ids
from skerry_contract.errors import ContractError

from skerry_cli import encrypted_models
from skerry_cli.errors import Usage

_KEYS = {"server", "token_file", "token_env", "ca", "ca_sha256", "keys", "model_signers", "encrypted_models"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How to reach one server; what is missing is None.

    Attributes:
        server: ``https://host[:port]``; token: the bearer token, a secret.
        ca: PEM file of the fleet's CA; ca_sha256: fingerprint of its DER, when there is no file.
        keys: folder of the ceremony.
        model_signers: a public key, or a folder of them, of those who sign bundles.
        encrypted_models: names of those that must be encrypted; ``*`` for all.
    """

    server: str | None = None
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    ca_sha256: str | None = None
    keys: Path | None = None
    model_signers: Path | None = None
    encrypted_models: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What stood on the command line."""

    profile: str | None = None
    config: Path | None = None
    server: str | None = None
    token: Path | None = None
    ca: str | None = None
    keys: Path | None = None


def load(options: Options, environment: Mapping[str, str]) -> Profile:
    """Puts a profile together.

    Raises:
        Usage: a file that does not read or parse, an unknown key, a profile that is not there; all faults of the file at once.
    """
    path = options.config or Path(environment.get("SKERRY_CONFIG") or "~/.config/skerry/config.toml").expanduser()
    name = options.profile or environment.get("SKERRY_PROFILE") or "default"
    asked = options.profile is not None or "SKERRY_PROFILE" in environment
    stored = _stored(path, name, required=asked or options.config is not None)
    server = options.server or environment.get("SKERRY_SERVER") or stored.get("server")
    ca = options.ca or environment.get("SKERRY_CA")
    ca_file, ca_sha256 = _authority(ca) if ca else (_path(stored.get("ca")), stored.get("ca_sha256"))
    return Profile(
        server=_origin(server) if server else None,
        token=_token(options, environment, stored),
        ca=ca_file,
        ca_sha256=_fingerprint(ca_sha256) if ca_sha256 else None,
        keys=options.keys or _path(environment.get("SKERRY_KEYS") or stored.get("keys")),
        model_signers=_path(environment.get("SKERRY_MODEL_SIGNERS") or stored.get("model_signers")),
        # One does not take the other's place: a variable that is set by chance must not lift what the file asks for.
        encrypted_models=encrypted_models.read(
            environment.get("SKERRY_ENCRYPTED_MODELS", ""), "SKERRY_ENCRYPTED_MODELS"
        )
        | encrypted_models.read(stored.get("encrypted_models", ""), f"{path}: profiles.{name}.encrypted_models"),
    )


def _stored(path: Path, name: str, *, required: bool) -> dict[str, str]:
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise Usage(f"{path}: no such file; wanted the profile {name!r} there") from None
        return {}
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise Usage(f"{path}: wanted TOML: {error}") from None
    profiles = value.get("profiles", {})
    faults = [f"unknown key {key!r}" for key in sorted(set(value) - {"profiles"})]
    if not isinstance(profiles, dict) or not all(isinstance(part, dict) for part in profiles.values()):
        raise Usage(f"{path}: wanted tables [profiles.<name>]")
    for other, part in profiles.items():
        faults += [f"profiles.{other}: unknown key {key!r}" for key in sorted(set(part) - _KEYS)]
        faults += [f"profiles.{other}.{key}: wanted text" for key, v in sorted(part.items()) if not isinstance(v, str)]
    if faults:
        raise Usage(f"{path}: {'; '.join(faults)}")
    if name not in profiles:
        if required:
            raise Usage(f"{path}: no profile {name!r}; has {', '.join(sorted(profiles)) or 'none'}")
        return {}
    return dict(profiles[name])


def _token(options: Options, environment: Mapping[str, str], stored: Mapping[str, str]) -> str | None:
    if options.token is not None:
        return _read_token(options.token)
    if environment.get("SKERRY_TOKEN"):
        return _checked_token(environment["SKERRY_TOKEN"], "SKERRY_TOKEN")
    if "token_file" in stored:
        return _read_token(Path(stored["token_file"]).expanduser())
    if "token_env" in stored and environment.get(stored["token_env"]):
        return _checked_token(environment[stored["token_env"]], stored["token_env"])
    return None


def _read_token(path: Path) -> str:
    try:
        return _checked_token(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise Usage(f"{path}: {error.strerror or error}; wanted a file with the token") from None
    except UnicodeDecodeError:
        raise Usage(f"{path}: wanted a file with the token, got binary data") from None


def _checked_token(text: str, where: str) -> str:
    token = text.strip()
    if not token or len(token) > 1024 or not all("!" <= c <= "~" for c in token):
        raise Usage(f"{where}: wanted one token of printable characters")
    return token


def _authority(text: str) -> tuple[Path | None, str | None]:
    bare = text.replace(":", "").lower()
    if len(bare) == 64 and all(c in "0123456789abcdef" for c in bare):
        return None, bare
    return Path(text).expanduser(), None


def _fingerprint(text: str) -> str:
    try:
        return ids.sha256_hex(text.replace(":", "").lower(), what="CA fingerprint")
    except ContractError as error:
        raise Usage(str(error)) from None


def _origin(text: str) -> str:
    try:
        return enrolment.origin(text)
    except ContractError as error:
        raise Usage(str(error)) from None


def _path(text: str | None) -> Path | None:
    return Path(os.path.expanduser(text)) if text else None
