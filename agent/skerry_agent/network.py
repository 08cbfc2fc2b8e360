"""Which network this device is on, and downloads that keep to the group's rules about it, and about the hours.

Read from the kernel: the default route's interface in ``/proc/net``, its kind in ``/sys/class/net``. That a network is paid by volume the
kernel does not know: cellular is taken for it, anything else only where the configuration says so (``network.metered``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

from skerry_contract import opening

from skerry_agent import localtime
from skerry_agent.clock import Clock
from skerry_agent.config import Config
from skerry_agent.core import networks
from skerry_agent.errors import Transient

CODES = ("network_not_allowed", "fetch_window_closed")
_LOOK_S = 5.0

_T = TypeVar("_T")


class Overtaken(Exception):
    """The download was ended: it is to begin anew, by rules that changed."""


class Networks:
    """See the module.

    Args:
        wanted: the group's ``networks``; empty for any.
        windows: the group's ``fetch_windows``; empty for any hour.
        carried: whether a bundle comes with a folder that a person carried here: who does that pays for nothing.
        proc, sys: where the kernel tells.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        *,
        wanted: Callable[[], tuple[str, ...]],
        carried: Callable[[str], bool],
        windows: Callable[[], tuple[opening.Window, ...]] = lambda: (),
        proc: Path = Path("/proc/net"),
        sys: Path = Path("/sys/class/net"),
    ) -> None:
        self._config = config
        self._clock = clock
        self._wanted = wanted
        self._carried = carried
        self._windows = windows
        self._proc = proc
        self._sys = sys
        self._hindered = False
        self._looked_s = 0.0

    def configure(self, config: Config) -> None:
        """Goes on with another configuration."""
        self._config = config

    def now(self) -> networks.Network:
        """The network as it is at this moment."""
        own = self._config.network
        interface = networks.default_interface(_read(self._proc / "route"))
        interface = interface or networks.default_interface_v6(_read(self._proc / "ipv6_route"))
        kind = own.type if own.type != "auto" else self._kind(interface)
        metered = own.metered == "yes" or (own.metered == "auto" and kind == "cellular")
        return networks.Network(interface=interface or "the network", kind=kind, metered=metered)

    def _kind(self, interface: str) -> str:
        if not interface:
            return ""
        folder = self._sys / interface
        if (folder / "wireless").exists() or (folder / "phy80211").exists():
            return "wifi"
        if "DEVTYPE=wwan" in _read(folder / "uevent") or interface.startswith(("wwan", "ppp", "rmnet")):
            return "cellular"
        return "ethernet"

    def hindrance(self) -> str:
        """Why nothing may be downloaded now, in words; empty when it may."""
        found = self._refusal()
        return found.detail if found is not None else ""

    def _refusal(self, digest: str = "") -> Transient | None:
        if self._carried(digest):
            return None
        for code, found in zip(CODES, (self._off_network(), self._out_of_hours()), strict=True):
            if found:
                self._hindered = True
                return Transient(code, found)
        return None

    def _off_network(self) -> str:
        return networks.hindrance(self._wanted(), self.now()) if self._wanted() else ""

    def _out_of_hours(self) -> str:
        windows = self._windows()
        here = localtime.now(self._config, self._clock)
        if not windows or (here is not None and opening.is_open(windows, *here)):
            return ""
        unsure = ", and this device does not know the time" if here is None else ""
        return f"its group downloads by local time {opening.words(windows)}{unsure}"

    def opened(self) -> bool:
        """Whether downloads may go on that could not. True once; looks every few seconds only."""
        now_s = self._clock.boot_s()
        if not self._hindered or now_s - self._looked_s < _LOOK_S:
            return False
        self._looked_s = now_s
        self._hindered = bool(self.hindrance())
        return not self._hindered

    async def while_allowed(
        self, download: Coroutine[None, None, _T], *, digest: str = "", overtaken: Callable[[], bool] = lambda: False
    ) -> _T:
        """What the download gives. It ends as soon as the network is another one that may not be used, or the hours are over; what came
        stays.

        Args:
            digest: of the bundle that is downloaded.
            overtaken: whether the rules that it was begun by are others now.

        Raises:
            Transient: one of ``CODES``; what the download raises.
            Overtaken: see there.
        """
        if found := self._refusal(digest):
            download.close()
            raise found
        task = asyncio.get_running_loop().create_task(download)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_LOOK_S)
                if not task.done() and (found := self._refusal(digest)):
                    raise found
                if not task.done() and overtaken():
                    raise Overtaken
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
