"""The page at ``/`` in a real browser: signing in, what it shows and keeps fresh, and that nothing on it can become markup."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from skerry_contract import window as w
from skerry_contract import wire

from tests.rig_server import DeviceRig, Operator, ServerRig
from tests.system.browser import Browser, browsing, pin, required
from tests.system.conftest import DEVICES, Rig

MARKUP = "<script>window.taken = 1</script><img src=x onerror='window.taken = 2'>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerRig]:
    """A running server with a group."""
    required()
    rig = ServerRig(tmp_path_factory.mktemp("server")).start()
    try:
        rig.good("PUT", "/api/v1/groups/press", {"settings": {}})
        yield rig
    finally:
        rig.close()


@pytest.fixture(scope="module")
def shared(server: ServerRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the module."""
    with browsing(tmp_path_factory.mktemp("browser"), pin(server.data / "ca" / "server.pem")) as found:
        yield found


@pytest.fixture
def browser(shared: Browser) -> Iterator[Browser]:
    """The browser, signed out and of usual size, and that has nothing to complain of before or after."""
    shared.driver.get("about:blank")
    shared.resize(1280)
    shared.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    shared.complaints()
    yield shared
    assert [text for text in shared.complaints() if not text.startswith("network:")] == []


@pytest.fixture
def viewer(server: ServerRig) -> str:
    """A new token that may only read."""
    return viewer_token(server)


def viewer_token(server: ServerRig) -> str:
    wish = {"name": f"viewer-{secrets.token_hex(4)}", "role": "viewer"}
    return str(server.good("POST", "/api/v1/tokens", wish)["token"])


def typed(browser: Browser, *keys: str) -> None:
    """Keys go to whatever has the focus."""
    ActionChains(browser.driver).send_keys(*keys).perform()


def focus(browser: Browser) -> str:
    """What has the focus, in words."""
    element = browser.driver.switch_to.active_element
    return element.get_attribute("id") or element.text


def test_a_browser_takes_the_server_from_its_own_key_alone(server: ServerRig, tmp_path: Path) -> None:
    """The pin that all other tests go through refuses a server that holds another key."""
    other = base64.b64encode(bytes(32)).decode()
    with browsing(tmp_path, other) as browser:
        browser.driver.get(server.url)
        assert "NET::ERR_CERT_AUTHORITY_INVALID" in browser.text("body")
        assert not browser.present("#token")


def test_a_wrong_token_is_told_so_and_the_right_one_opens_the_page(
    server: ServerRig, browser: Browser, viewer: str
) -> None:
    browser.driver.get(server.url)
    assert browser.path() == "/console/sign-in"
    browser.find("#token").send_keys("skt_not-one-of-ours")
    browser.find(".sign-in button").click()
    said = browser.wait("the refusal", lambda: browser.text("[role=alert]"))
    assert "unknown, expired or revoked" in said
    assert browser.find("#token").get_attribute("value") == ""
    browser.find("#token").send_keys(f"  {viewer} ")
    browser.find(".sign-in button").click()
    browser.wait("the page", lambda: "devices online" in browser.section("fleet"))
    assert browser.path() == "/"
    assert "(viewer)" in browser.text("header")
    browser.find("header button").click()
    browser.wait("the sign-in page", lambda: browser.path() == "/console/sign-in")
    browser.driver.back()
    browser.wait("no page from the past", lambda: browser.path() == "/console/sign-in")
    assert browser.hosts_asked() == {server.url.removeprefix("https://")}


def test_a_keyboard_alone_signs_in_and_out(server: ServerRig, browser: Browser, viewer: str) -> None:
    browser.driver.get(server.url)
    assert focus(browser) == "token"
    typed(browser, "nonsense", Keys.ENTER)
    browser.wait("the refusal", lambda: browser.text("[role=alert]"))
    assert focus(browser) == "token"
    typed(browser, viewer, Keys.TAB)
    assert focus(browser) == "Sign in"
    typed(browser, Keys.SPACE)
    browser.wait("the page", lambda: browser.section("fleet"))
    typed(browser, Keys.TAB)
    assert focus(browser) == "Sign out"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.driver.execute_script(outline) == "solid"
    typed(browser, Keys.ENTER)
    browser.wait("the sign-in page", lambda: browser.path() == "/console/sign-in")


def test_what_devices_and_people_say_is_text_and_fits_a_narrow_window(
    server: ServerRig, browser: Browser, viewer: str, tmp_path: Path
) -> None:
    device = DeviceRig(server, "press-9", tmp_path)
    device.enrol()
    device.connect()
    try:
        browser.sign_in(server.url, viewer)
        browser.driver.execute_script("window.stayed = 1")
        # From here on by the script that keeps the page fresh.
        detail = MARKUP + "x" * 300
        event = wire.Event(
            at=w.Instant("b" * 32, 1, 1, True),
            name="update_<b>refused</b>",
            code="hash_mismatch",
            data={"model": "gas", "detail": detail},
        )
        device.send(("event", wire.encode(event)))
        device.report({"gas": {"digest": "ab" * 32, "version": f"1.0.0{MARKUP}", "state": "confirmed"}})
        operator = Operator(server, tmp_path / "operator")
        operator.install_trust()
        digest = operator.publish("gas", "1.0.0")
        wish = {"id": "quoted", "group": "press", "model": "gas", "candidate": digest, "stages": [{"share": 1.0}]}
        server.good("POST", "/api/v1/rollouts", wish)
        server.good("POST", "/api/v1/rollouts/quoted/pause", {"reason": f"{MARKUP} & wait"})
        browser.wait("the refusal", lambda: detail in browser.section("refusals"))
        browser.wait("the version", lambda: f"1.0.0{MARKUP}" in browser.section("fleet"))
        browser.wait("the reason", lambda: f"{MARKUP} & wait" in browser.section("decisions"))
        assert "update <b>refused</b>" in browser.section("refusals")
        for width in (320, 400):
            browser.resize(width)
            assert browser.overflow() == 0, width
        wide = "return [...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth).length"
        assert browser.driver.execute_script(wide) == 0, "nor does a section scroll sideways at 400"
        assert browser.driver.execute_script("return [window.taken, window.stayed]") == [None, 1]
        browser.driver.refresh()
        assert detail in browser.section("refusals")
        assert browser.driver.execute_script("return window.taken") is None
        assert browser.hosts_asked() == {server.url.removeprefix("https://")}
    finally:
        device.disconnect()


def test_a_page_whose_server_is_gone_says_so_and_goes_on_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    own = ServerRig(tmp_path / "server").start()
    try:
        with browsing(tmp_path / "browser", pin(own.data / "ca" / "server.pem")) as page:
            page.sign_in(own.url, viewer_token(own))
            page.driver.execute_script("window.stayed = 1")
            assert page.text("#stale") == ""
            assert own.stop() == 0
            page.wait(
                "the page to say that it is old", lambda: "No answer from the server since" in page.text("#stale")
            )
            assert "devices online" in page.section("fleet")
            own.start()
            own.good("PUT", "/api/v1/groups/later", {"settings": {}})
            page.wait("the page to be fresh again", lambda: page.text("#stale") == "")
            device = DeviceRig(own, "newcomer", tmp_path, group="later")
            device.enrol()
            page.wait("what is new since", lambda: "newcomer" in page.section("fleet"))
            assert page.driver.execute_script("return window.stayed") == 1
            complaints = page.complaints()
            assert all(text.startswith("network:") and "ERR_CONNECTION" in text for text in complaints), complaints
    finally:
        own.close()


def test_a_session_that_ends_while_the_page_is_open_leads_to_the_sign_in_page(
    server: ServerRig, browser: Browser
) -> None:
    wish = {"name": f"brief-{secrets.token_hex(4)}", "role": "viewer"}
    token = server.good("POST", "/api/v1/tokens", wish)["token"]
    browser.sign_in(server.url, token)
    assert server.ask("DELETE", f"/api/v1/tokens/{wish['name']}").status == 204
    browser.wait("the sign-in page", lambda: browser.path() == "/console/sign-in")


def cells(browser: Browser, rollout: str) -> dict[str, tuple[str, str]]:
    """The table of a rollout's arms: row -> (control, candidate)."""
    script = """
        for (const article of document.querySelectorAll('.rollout')) {
            if (!article.querySelector('h3').innerText.startsWith(arguments[0] + ' ')) continue;
            return [...article.querySelectorAll('.arms tr')].map(tr => [...tr.children].map(cell => cell.innerText));
        }
        return [];
    """
    found: list[list[str]] = browser.driver.execute_script(script, rollout)
    return {name: (control, candidate) for name, control, candidate in found}


def number(text: str) -> int:
    digits = "".join(one for one in text if one.isdigit())
    return int(digits or "0")


@pytest.mark.slow
def test_a_real_fleet_its_rollout_drift_and_decisions_move_on_an_open_page(tmp_path: Path) -> None:
    required()
    rig = Rig(tmp_path / "fleet")
    fleet = rig.fleet
    try:
        rig.start()
        viewer: dict[str, Any] = fleet.api.post("/api/v1/tokens", {"name": "wall", "role": "viewer"})
        with browsing(tmp_path / "browser", pin(fleet.server.data / "ca" / "server.pem")) as page:
            page.sign_in(fleet.server.url, str(viewer["token"]))
            page.driver.execute_script("window.stayed = 1")
            page.wait("all devices", lambda: all(device in page.section("fleet") for device in DEVICES))
            page.wait("all online", lambda: "3 of 3 devices online" in page.section("fleet"))
            assert "None" in page.section("rollouts")
            assert page.section("fleet").count("no model") == 3

            made = rig.publish("1.0.0", (1,))
            rig.start_rollout("first", made, [{"share": 1.0, "min_inferences": 0, "max_seconds": 120}])
            for device in DEVICES:
                fleet.start_application(device)
            page.wait("the first model on all", lambda: page.section("fleet").count("gas 1.0.0") == 3, 90)
            page.wait(
                "its end", lambda: "PASS" in page.section("decisions") and "finish" in page.section("decisions"), 60
            )

            made = rig.publish("2.0.0", (1, 2, 3))
            stages = [
                {"devices": 1, "min_devices": 1, "min_inferences": 100000, "max_seconds": 600},
                {"share": 1.0, "min_inferences": 0, "max_seconds": 600},
            ]
            judge = {"guardrails": {"labelled_errors": {"alpha": 0.04, "margin": 1.5, "min_n": 100000}}, "look_s": 1.0}
            rig.start_rollout(
                "second", made, stages, judge=judge | {"guard_s": 1.0, "min_devices": 1, "end_labels": 100000}
            )
            page.wait("the arms", lambda: cells(page, "second").get("Arm") == ("control", "candidate"))
            assert cells(page, "second")["Devices"] == ("2", "1")
            page.wait("both arms to count", lambda: all(map(number, cells(page, "second")["Inferences"])), 90)
            before = cells(page, "second")["Inferences"]
            page.wait(
                "both to count on",
                lambda: all(
                    number(new) > number(old) + 20
                    for old, new in zip(before, cells(page, "second")["Inferences"], strict=True)
                ),
                60,
            )
            assert "gas 1.0.0 → 2.0.0 in field" in page.section("rollouts")
            page.wait("what the judge says", lambda: "labelled_errors: " in page.section("rollouts"))
            assert "100000 inferences" in page.section("rollouts"), "why it waits"
            assert "started by token:admin" in page.section("decisions")
            # The applications read batch 2, the reference of 1.0.0 is batch 1.
            page.wait("drift", lambda: "DRIFT" in page.section("drift"), 90)
            assert "distribution: PSI" in page.section("drift")

            fleet.api.post("/api/v1/rollouts/second/pause", {"reason": "lunch"})
            page.wait("a person's decision with its reason", lambda: "lunch" in page.section("decisions"))
            page.wait("its state", lambda: "paused" in page.section("rollouts"))
            for width in (400, 1280):
                page.resize(width)
                assert page.overflow() == 0, width
            assert page.driver.execute_script("return window.stayed") == 1, "the page was never loaded again"
            addresses = page.addresses_asked()
            assert page.hosts_asked() == {fleet.server.url.removeprefix("https://")}
            assert sum(address.endswith("/console/live") for address in addresses) > 10
            assert page.complaints() == []
    finally:
        rig.processes.stop()
