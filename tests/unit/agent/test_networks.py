"""Which network a device is on, whether bundles may be downloaded over it, and what becomes of a download when it changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from skerry_agent import config
from skerry_agent.clock import Clock
from skerry_agent.core import networks
from skerry_agent.errors import Transient
from skerry_agent.network import Networks, Overtaken
from skerry_contract import opening

HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
WIFI = networks.Network(interface="wlan0", kind="wifi")
CELLULAR = networks.Network(interface="wwan0", kind="cellular", metered=True)


def route(
    interface: str, *, metric: int = 0, destination: str = "00000000", flags: str = "0003", mask: str = "00000000"
) -> str:
    return f"{interface}\t{destination}\t0101A8C0\t{flags}\t0\t0\t{metric}\t{mask}\t0\t0\t0\n"


@pytest.mark.parametrize(
    ("wanted", "network", "allowed"),
    [
        ((), CELLULAR, True),
        (("wifi",), WIFI, True),
        (("ethernet", "wifi"), CELLULAR, False),
        (("cellular",), CELLULAR, True),
        (("unmetered",), WIFI, True),
        (("unmetered",), CELLULAR, False),
        (("unmetered",), networks.Network(interface="eth0", kind="ethernet", metered=True), False),
        (("unmetered",), networks.Network(), False),
        (("of a later release",), WIFI, False),
    ],
)
def test_the_groups_networks_decide(wanted: tuple[str, ...], network: networks.Network, allowed: bool) -> None:
    said = networks.hindrance(wanted, network)
    assert (said == "") == allowed
    if said:
        assert wanted[0] in said


def test_the_default_route_of_the_least_metric_that_is_up_counts() -> None:
    lines = [
        route("eth0", metric=600), route("wlan0", metric=100), route("tun0", metric=1, destination="0000A8C0"),
        route("down0", flags="0002"), route("half0", mask="00000080"), "torn line\n",
    ]  # fmt: skip
    assert networks.default_interface(HEAD + "".join(lines)) == "wlan0"
    assert networks.default_interface(HEAD + route("eth0", destination="0000A8C0", mask="00FFFFFF")) == ""
    assert networks.default_interface("") == ""
    zero, via = "0" * 32, "fe80" + "0" * 28
    v6 = f"{zero} 00 {zero} 00 {via} 00000400 00000001 00000000 00000003 wlan0\n{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n"
    assert networks.default_interface_v6(v6) == "wlan0"


def made(
    folder: Path,
    interface: str,
    *,
    rows: str | None = None,
    wanted: tuple[str, ...] = (),
    windows: list[opening.Window] | None = None,
    clock: str = "wall",
    **keys: str,
) -> Networks:
    """On a device with one interface; the kernel's files are a folder."""
    (folder / "net").mkdir(exist_ok=True)
    (folder / "net" / "route").write_text(HEAD + (route(interface) if rows is None else rows))
    tree: dict[str, Any] = {"state_dir": str(folder), "network": keys, "updates": {"clock": clock}}
    return Networks(
        config.build(tree, {}),
        Clock(),
        wanted=lambda: wanted,
        carried=lambda _digest: False,
        windows=lambda: tuple(windows or ()),
        proc=folder / "net",
        sys=folder / "sys",
    )


@pytest.mark.parametrize(
    ("interface", "files", "kind", "metered"),
    [
        ("eth0", {}, "ethernet", False),
        ("wlan0", {"wireless/x": ""}, "wifi", False),
        ("wlp3s0", {"phy80211/x": ""}, "wifi", False),
        ("enx0a", {"uevent": "DEVTYPE=wwan\nINTERFACE=enx0a\n"}, "cellular", True),
        ("ppp0", {}, "cellular", True),
    ],
)
def test_the_kind_of_an_interface_is_what_the_kernel_shows(
    tmp_path: Path, interface: str, files: dict[str, str], kind: str, metered: bool
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys" / interface / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert made(tmp_path, interface).now() == networks.Network(interface=interface, kind=kind, metered=metered)


def test_the_configuration_goes_before_what_the_kernel_shows(tmp_path: Path) -> None:
    found = made(tmp_path, "eth0", type="cellular").now()
    assert (found.kind, found.metered) == ("cellular", True)
    assert made(tmp_path, "eth0", type="cellular", metered="no").now().metered is False
    assert made(tmp_path, "eth0", metered="yes", wanted=("unmetered",)).hindrance()
    # Without any route: only what the configuration says is known.
    assert "no default route" in made(tmp_path, "eth0", rows="", wanted=("wifi",)).hindrance()
    assert made(tmp_path, "eth0", rows="", wanted=("wifi",), type="wifi").hindrance() == ""


def test_a_download_ends_when_the_network_changes_to_one_that_may_not_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skerry_agent.network._LOOK_S", 0.01)
    (tmp_path / "sys" / "wlan0" / "wireless").mkdir(parents=True)
    found = made(tmp_path, "wlan0", wanted=("wifi",))
    ended = []

    async def download(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        finally:
            ended.append(seconds)
        return "all of it"

    async def life() -> None:
        assert await found.while_allowed(download(0.05)) == "all of it"
        asyncio.get_running_loop().call_later(0.05, (tmp_path / "net" / "route").write_text, HEAD + route("ppp0"))
        with pytest.raises(Transient, match="network_not_allowed") as refused:
            await found.while_allowed(download(60.0))
        assert "ppp0 is cellular" in refused.value.detail
        # Not even begun.
        with pytest.raises(Transient):
            await found.while_allowed(download(61.0))

    asyncio.run(life())
    assert ended == [0.05, 60.0]
    assert not found.opened()
    (tmp_path / "net" / "route").write_text(HEAD + route("wlan0"))
    found._looked_s = 0.0
    assert found.opened()
    assert not found.opened(), "it is said once"


def test_only_the_bundle_that_a_person_carried_here_comes_over_any_network(tmp_path: Path) -> None:
    found = made(tmp_path, "ppp0", wanted=("wifi",))
    found._carried = lambda digest: digest == "a" * 64

    async def life() -> None:
        await found.while_allowed(asyncio.sleep(0), digest="a" * 64)
        with pytest.raises(Transient, match="network_not_allowed"):
            await found.while_allowed(asyncio.sleep(0), digest="b" * 64)

    asyncio.run(life())
    assert found.hindrance()


ALWAYS, NEVER = opening.Window(start="00:00", end="24:00"), opening.Window(start="00:00", end="00:01", days=("mon",))


def test_a_download_ends_when_its_hours_are_over_and_may_go_on_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skerry_agent.network._LOOK_S", 0.01)
    monkeypatch.setattr("skerry_agent.localtime.now", lambda *_: (3, 12 * 60))
    windows = [ALWAYS]
    found = made(tmp_path, "eth0", windows=windows)

    async def life() -> None:
        assert found.hindrance() == ""
        asyncio.get_running_loop().call_later(0.05, windows.__setitem__, 0, NEVER)
        with pytest.raises(Transient, match="fetch_window_closed") as refused:
            await found.while_allowed(asyncio.sleep(60.0))
        assert "mon 00:00-00:01" in refused.value.detail

    asyncio.run(life())
    assert not found.opened()
    windows[0] = ALWAYS
    found._looked_s = 0.0
    assert found.opened()


def test_who_does_not_know_the_time_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(tmp_path, "eth0", windows=[ALWAYS], clock="synced")
    monkeypatch.setattr(found._clock, "synced", lambda: False)
    assert "does not know the time" in found.hindrance()
    monkeypatch.setattr(found._clock, "synced", lambda: True)
    assert found.hindrance() == ""


def test_a_download_whose_rules_changed_is_ended_to_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skerry_agent.network._LOOK_S", 0.01)
    with pytest.raises(Overtaken):
        asyncio.run(made(tmp_path, "eth0").while_allowed(asyncio.sleep(60.0), overtaken=lambda: True))
