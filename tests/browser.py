"""A headless Chromium for tests of pages, where one is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium(width: int = 1240, height: int = 900, dark: bool = False) -> Iterator[Any]:
    """A Selenium driver; the test is skipped where Selenium, Chromium or its driver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    size = f"--window-size={width},{height}"
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", size, scheme):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield found
    finally:
        found.quit()


def requested_urls(driver: Any) -> list[str]:
    """What the pages since the last call asked for, themselves included."""
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    requests = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [message["params"]["request"]["url"] for message in requests]


def complaints(driver: Any) -> list[str]:
    """What the browser's console says of errors."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
