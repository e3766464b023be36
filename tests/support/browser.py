"""Chromium without a window, driven by selenium, which is not allowed to fetch a driver of its own."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator[Any]:
    """The driver. Skips the test where there is none; fails with DIFFDISTILL_BROWSER=required."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "chromedriver" if binary else f"a browser ({', '.join(BROWSERS)})"
        told = f"{missing} is not installed, so the HTML pages are not tested: make browser"
        (pytest.fail if os.environ.get("DIFFDISTILL_BROWSER") == "required" else pytest.skip)(told)
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


def set_width(browser: Any, width: int) -> None:
    """Of the window, in pixels; a narrow one is a phone's."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
