"""What one run of the program has: its options, and the server's client made from them when first needed."""

from __future__ import annotations

import datetime as dt
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import typer

from skerry_cli.client import Api
from skerry_cli.errors import Usage
from skerry_cli.profile import Options, Profile, load
from skerry_cli.signers import SecretKind

PASSWORD_VARIABLE = "SKERRY_KEY_PASSWORD"  # noqa: S105 - the name of a variable
PIN_VARIABLE = "SKERRY_PIN"
_MAX_SECRET_BYTES = 4096


class Session:
    """See the module. ``environment`` is read here and nowhere below."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._environment = environment
        self._profile: Profile | None = None
        self._api: Api | None = None
        self._secrets: dict[tuple[SecretKind, str], str] = {}

    @property
    def profile(self) -> Profile:
        """Raises ``Usage`` when options, environment or file cannot be."""
        if self._profile is None:
            self._profile = load(self._options, self._environment)
        return self._profile

    @property
    def api(self) -> Api:
        """Raises ``Usage`` when server, token or CA is missing."""
        if self._api is None:
            self._api = Api(self.profile)
        return self._api

    @property
    def keys(self) -> Path:
        """The ceremony's folder. Raises ``Usage`` when none was named."""
        if self.profile.keys is None:
            raise Usage("wanted the ceremony's folder (--keys DIR or SKERRY_KEYS)")
        return self.profile.keys

    @property
    def environment(self) -> Mapping[str, str]:
        """Of this run; keys may lie in it."""
        return self._environment

    def password(self, *, encrypted: bool = True, confirm: bool = False, whose: str = "") -> bytes | None:
        """The password of a private key; None when it is not encrypted. See ``secret``."""
        return self.secret("password", whose, confirm=confirm).encode() if encrypted else None

    def secret(self, kind: SecretKind, whose: str, *, confirm: bool = False) -> str:
        """A key's password or a token's PIN: from the environment, from the file that the environment names, or asked for.

        Raises:
            Usage: there is none to be had, or a file that others may read.
        """
        variable = PIN_VARIABLE if kind == "pin" else PASSWORD_VARIABLE
        stored = self._environment.get(variable)
        if stored:
            return stored
        file = self._environment.get(f"{variable}_FILE")
        if file:
            return _secret_in(Path(file), f"{variable}_FILE")
        known = self._secrets.get((kind, whose))
        if known is None:
            name = "PIN" if kind == "pin" else "Password"
            try:
                known = str(
                    typer.prompt(
                        f"{name} of {whose or 'the keys'}", hide_input=True, confirmation_prompt=confirm, err=True
                    )
                )
            except typer.Abort:
                raise Usage(
                    f"{name} of {whose or 'the keys'}: nobody answered",
                    advice=f"in a script set {variable}, or {variable}_FILE to a file or /dev/fd/N",
                ) from None
            self._secrets[kind, whose] = known
        return known


def _secret_in(path: Path, variable: str) -> str:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                raise Usage(f"{path}: others may read this secret", advice=f"chmod 600 {path}")
            text = file.read(_MAX_SECRET_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"{variable}: {path}: {error}; wanted a file with the secret") from None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret:
        raise Usage(f"{variable}: {path} is empty; wanted a file with the secret")
    return secret


def session(context: typer.Context) -> Session:
    """The session of this run."""
    found = context.find_object(Session)
    if found is None:  # a command called without the program around it
        found = Session(Options(), os.environ)
    return found


def now() -> dt.datetime:
    """Wall clock, UTC: the one place where commands read it."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
