"""A real Chromium without a window, driven as a person would drive it: keys, clicks, what stands on the page.

The server's certificate is from the fleet's own CA, which no browser knows. The browser is given the sha256 of that server's
public key, and takes it from this key alone: any other is refused as before.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT_S = 20.0
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def programs() -> tuple[str, str] | None:
    """Browser and driver, or None when one of them is not installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def required() -> tuple[str, str]:
    """Browser and driver. Without them the test is skipped, and with CI=true that is a failure."""
    found = programs()
    if found is None:
        why = "chromium or chromedriver is not installed (on Debian: apt install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    return found


def pin(certificate: Path) -> str:
    """As Chromium wants it: base64 of the sha256 of the SubjectPublicKeyInfo."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    return base64.b64encode(
        hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
    ).decode()


class Browser:
    """One browser with a profile of its own. ``driver`` is Selenium's."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self._asked: list[str] = []

    def find(self, selector: str) -> WebElement:
        """The first element that a CSS selector names."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def present(self, selector: str) -> bool:
        """Whether there is such an element."""
        return bool(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """What a person reads there; empty when there is no such element."""
        # One step of the page's own clock: the script may replace an element between finding and reading it.
        found = self.driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", selector
        )
        return str(found)

    def section(self, name: str) -> str:
        """What stands in a section of the page."""
        return self.text(f"section[aria-labelledby={name}]")

    def wait(self, what: str, condition: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
        """Polls until the condition is true; its value."""
        waiting = WebDriverWait(self.driver, timeout_s, poll_frequency=0.1)
        return waiting.until(lambda _: condition(), message=f"{what}; the page says:\n{self.text('body')}")

    def sign_in(self, url: str, token: str) -> None:
        """Signs in and waits for the page."""
        self.driver.get(url)
        self.find("#token").send_keys(token)
        self.find(".sign-in button").click()
        self.wait("the page", lambda: self.section("fleet"))

    def path(self) -> str:
        """Path of the address shown."""
        return urllib.parse.urlsplit(self.driver.current_url).path

    def resize(self, width: int, height: int = 900) -> None:
        """The window's inner size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def overflow(self) -> int:
        """By how many pixels the document is wider than the window."""
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.driver.execute_script(script))

    def complaints(self) -> list[str]:
        """What the console has said since it was asked last: errors of scripts, refusals of the policy, failed requests."""
        return [f"{entry['source']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def addresses_asked(self) -> list[str]:
        """Every address that the page has asked for, in order."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._asked.append(message["params"]["request"]["url"])
        return list(self._asked)

    def hosts_asked(self) -> set[str]:
        """``host:port`` of each of them; what the browser shows of its own (``chrome:``, ``about:``) has none."""
        parts = map(urllib.parse.urlsplit, self.addresses_asked())
        return {one.netloc for one in parts if one.scheme not in ("about", "chrome", "chrome-untrusted", "data")}


@contextmanager
def browsing(folder: Path, *pins: str) -> Iterator[Browser]:
    """A browser that trusts the servers with these public keys; ended with its children on leaving."""
    program, driver_program = required()
    options = Options()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={folder}", f"--ignore-certificate-errors-spki-list={','.join(pins)}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(30)
        yield Browser(driver)
    finally:
        driver.quit()
