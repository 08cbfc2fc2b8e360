"""A broker that somebody else runs, and what the server asks of any broker.

Its rights are its own configuration's business (``packaging/mosquitto`` has one), and so is its life: the server connects,
and connects again. Who is enrolled is not told to it: every certificate of the fleet's CA may connect and speak for its own
name, and what a name that is not enrolled says is set aside by ingest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from skerry_server.broker.natsconf import Client


class Broker(Protocol):
    """What the server asks of a broker, whoever runs it."""

    @property
    def port(self) -> int:
        """The port for devices."""

    def start(self) -> None:
        """Makes it run, where that is ours to do."""

    def stop(self) -> None:
        """Ends it, where that is ours to do."""

    def set_clients(self, clients: Iterable[Client]) -> None:
        """Tells it who may connect, where it is ours to tell."""

    def reload(self) -> None:
        """Makes it read its certificates again, where they are ours."""

    def when_back(self, call: Callable[[], None]) -> None:
        """Calls this when it died and runs again, where that is ours to know."""


class ExternalBroker:
    """See the module. ``port``: for devices."""

    def __init__(self, port: int) -> None:
        self.port = port

    def start(self) -> None:
        """It runs, or the session waits for it."""

    def stop(self) -> None:
        """It goes on."""

    def set_clients(self, clients: Iterable[Client]) -> None:
        """It knows certificates, and takes no list."""

    def reload(self) -> None:
        """Whoever runs it renews its certificate."""

    def when_back(self, call: Callable[[], None]) -> None:
        """Nobody tells."""
