"""The page at ``/``: who may see it, what it shows, and that nothing a device says becomes markup."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig_server import Answer, DeviceRig, Operator, ServerRig

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def sign_in(server: ServerRig, token: str, **headers: str) -> Answer:
    body = urllib.parse.urlencode({"token": token}).encode()
    return server.ask("POST", "/console/sign-in", token="", data=body, headers=FORM | headers)


def cookie_of(answer: Answer) -> str:
    return answer.headers["set-cookie"].split(";")[0]


def look(server: ServerRig, cookie: str, path: str = "/", **headers: str) -> Answer:
    return server.ask("GET", path, token="", headers={"Cookie": cookie, **headers})


def shows(server: ServerRig, cookie: str, word: str) -> str:
    """The page as soon as a word stands on it: all who look within two seconds are shown the same."""
    seen: list[str] = []

    def there() -> bool:
        seen.append(look(server, cookie).data.decode())
        return word in seen[-1]

    server.wait(f"{word} on the page", there)
    return seen[-1]


@pytest.fixture(scope="module")
def cookie(server: ServerRig) -> Iterator[str]:
    token = server.good("POST", "/api/v1/tokens", {"name": "page", "role": "viewer"})["token"]
    return cookie_of(sign_in(server, token))


def test_nothing_is_shown_without_signing_in(server: ServerRig) -> None:
    front = server.ask("GET", "/", token="")
    assert (front.status, front.headers["location"]) == (303, "/console/sign-in")
    assert server.ask("GET", "/console/live", token="").status == 401
    assert look(server, "skerry_session=guess").status == 303
    # An API token in the header opens the API, not the page: a browser never sends it.
    assert server.ask("GET", "/").status == 303
    form = server.ask("GET", "/console/sign-in", token="")
    assert b'type="password"' in form.data


def test_a_wrong_token_is_refused_and_not_repeated(server: ServerRig) -> None:
    for token in ("", "skt_wrong<script>", "x" * 5000):
        found = sign_in(server, token)
        assert found.status == 401
        assert "set-cookie" not in found.headers
        assert b"<script>" not in found.data
        assert b"unknown, expired or revoked" in found.data
    assert server.ask("POST", "/console/sign-in", token="", data=b"\xff&&=%zz", headers=FORM).status == 401


def test_the_cookie_is_kept_from_scripts_and_other_sites(server: ServerRig) -> None:
    found = sign_in(server, server.token)
    assert found.status == 303
    said = found.headers["set-cookie"].lower()
    assert all(word in said for word in ("httponly", "secure", "samesite=strict", "path=/"))
    assert "max-age" not in said
    assert server.token not in said


def test_another_site_cannot_sign_somebody_in(server: ServerRig) -> None:
    found = sign_in(server, server.token, **{"Sec-Fetch-Site": "cross-site"})
    assert (found.status, found.code) == (403, "other_site")


def test_the_page_admits_no_foreign_script_and_is_not_kept(server: ServerRig, cookie: str) -> None:
    page = look(server, cookie)
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-frame-options"] == "DENY"
    assert b"style=" not in page.data
    for asset in (b"/console/assets/console.js", b"/console/assets/console.css"):
        assert asset in page.data
        assert server.ask("GET", asset.decode(), token="").status == 200


def test_what_has_not_changed_is_not_sent_again(server: ServerRig, cookie: str) -> None:
    first = look(server, cookie, "/console/live")
    again = look(server, cookie, "/console/live", **{"If-None-Match": first.headers["etag"]})
    assert (again.status, again.data) == (304, b"")


def test_a_session_ends_with_signing_out_and_with_its_token(server: ServerRig) -> None:
    token = server.good("POST", "/api/v1/tokens", {"name": "brief-page", "role": "viewer"})["token"]
    one, two = cookie_of(sign_in(server, token)), cookie_of(sign_in(server, token))
    assert one != two
    assert server.ask("POST", "/console/sign-out", token="", headers={"Cookie": one}).status == 303
    assert look(server, one).status == 303
    assert look(server, two).status == 200
    assert server.ask("DELETE", "/api/v1/tokens/brief-page").status == 204
    assert look(server, two).status == 303
    assert look(server, two, "/console/live").status == 401


def test_rollout_devices_and_decisions_are_on_the_page_and_escaped(
    server: ServerRig, operator: Operator, cookie: str
) -> None:
    server.good("PUT", "/api/v1/groups/page", {"settings": {}})
    digest = operator.publish("page-model", "1.0.0")
    wanted = {
        "group": "page",
        "model": "page-model",
        "candidate": digest,
        "id": "page-rollout",
        "stages": [{"share": 1.0, "min_devices": 1}],
    }
    server.good("POST", "/api/v1/rollouts", wanted)
    server.good("POST", "/api/v1/rollouts/page-rollout/pause", {"reason": "<img src=x onerror=alert(1)> & wait"})
    page = shows(server, cookie, "; wait")
    assert "page-rollout" in page
    assert "page-model" in page
    assert "candidate" in page
    assert "control" in page
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; wait" in page
    assert "<img" not in page


def test_every_device_online_is_counted(server: ServerRig, cookie: str, tmp_path: Path) -> None:
    devices = [DeviceRig(server, f"counted-{n}", tmp_path) for n in range(3)]
    for device in devices:
        device.enrol()
    try:
        for device in devices[:2]:
            device.connect().report()
        server.wait("two of them online", lambda: b"<b>2</b> of 3 devices online" in look(server, cookie).data)
    finally:
        for device in devices:
            device.disconnect()


def test_a_hold_is_said_once_with_the_rollout_and_pushes_no_decision_off_the_page(
    server: ServerRig, operator: Operator, cookie: str
) -> None:
    server.good("PUT", "/api/v1/groups/waiting", {"settings": {}})
    digest = operator.publish("waiting-model", "1.0.0")
    wish = {"id": "waiting", "group": "waiting", "model": "waiting-model", "candidate": digest}
    server.good("POST", "/api/v1/rollouts", wish | {"stages": [{"share": 1.0, "min_devices": 1}]})

    def held() -> bool:
        items = server.good("GET", "/api/v1/rollouts/waiting/decisions")["items"]
        return any(one["action"] == "hold" for one in items)

    server.wait("a hold", held)
    page = shows(server, cookie, "<h3>waiting ")
    decisions = page[page.index('id="decisions"') :]
    assert "started by token:admin" in decisions
    assert ">hold<" not in decisions
    (shown,) = [part for part in page.split('<article class="rollout">')[1:] if "<h3>waiting " in part]
    assert shown.count("0 of 1 devices confirmed") == 1


def test_the_page_and_what_it_asks_for_are_of_one_reading_however_often_they_are_loaded(
    server: ServerRig, operator: Operator, cookie: str
) -> None:
    server.good("PUT", "/api/v1/groups/alike", {"settings": {}})
    digest = operator.publish("alike-model", "1.0.0")
    wish = {"id": "alike", "group": "alike", "model": "alike-model", "candidate": digest}
    server.good("POST", "/api/v1/rollouts", wish | {"stages": [{"share": 1.0, "min_devices": 1}]})
    tries = 0

    def decisions(path: str) -> str:
        return look(server, cookie, path).data.decode().split('id="decisions"')[1].split('id="refusals"')[0]

    def alike() -> bool:
        nonlocal tries
        tries += 1
        before = decisions("/")
        # A decision that a new reading would show.
        server.good("POST", f"/api/v1/rollouts/alike/{'pause' if tries % 2 else 'resume'}", {"reason": f"try {tries}"})
        return f"try {tries}" not in before and before == decisions("/console/live") == decisions("/")

    server.wait("three looks within two seconds", alike)
    shows(server, cookie, f"try {tries}")
