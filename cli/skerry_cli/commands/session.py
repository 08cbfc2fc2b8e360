"""What one run of the program has: its options, and the server's client made from them when first needed."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from pathlib import Path

import typer

from skerry_cli.client import Api
from skerry_cli.errors import Usage
from skerry_cli.profile import Options, Profile, load

PASSWORD_VARIABLE = "SKERRY_KEY_PASSWORD"  # noqa: S105 - the name of a variable


class Session:
    """See the module. ``environment`` is read here and nowhere below."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._environment = environment
        self._profile: Profile | None = None
        self._api: Api | None = None

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

    def password(self, *, encrypted: bool = True, confirm: bool = False) -> bytes | None:
        """The password of the private keys: from the environment, else asked on the terminal; None when not encrypted."""
        if not encrypted:
            return None
        stored = self._environment.get(PASSWORD_VARIABLE)
        if stored:
            return stored.encode()
        asked = typer.prompt("Password of the keys", hide_input=True, confirmation_prompt=confirm, err=True)
        return str(asked).encode()


def session(context: typer.Context) -> Session:
    """The session of this run."""
    found = context.find_object(Session)
    if found is None:  # a command called without the program around it
        found = Session(Options(), os.environ)
    return found


def now() -> dt.datetime:
    """Wall clock, UTC: the one place where commands read it."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)
