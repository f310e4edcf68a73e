"""A page as a headless Chromium sees it, for tests and for the pictures of the documentation.

``python tests/browser.py RUN_DIR/report/index.html docs/images/report`` makes docs/images/report_desktop.png and _phone.png.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SIZES = {"desktop": (1200, 1600), "phone": (390, 1600)}
"""Widths and heights of the pictures, in CSS pixels."""

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def missing() -> str | None:
    """What a browser lacks here, for the reason of a skipped test."""
    if find_spec("selenium") is None:
        return "selenium not found; pip install 'lifealign[dev]'"
    wanted = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(wanted)} not found; apt-get install chromium chromium-driver" if wanted else None


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium of its own, that keeps its console and what it asked the network for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            driver.get("about:blank")
            troubles(driver)  # some builds open a page of their own first, which without a network fails
            yield driver
        finally:
            driver.quit()


def show(driver: Any, page: Path, size: str) -> None:
    """Open a file at one of the sizes."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(page.resolve().as_uri())


def troubles(driver: Any) -> list[str]:
    """What the console said since the last call, and each request that failed."""
    said = [entry["message"] for entry in driver.get_log("browser")]
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    failed = [json.dumps(event["params"]) for event in events if event["method"] == "Network.loadingFailed"]
    return said + failed


def overflow(driver: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


def main(page: Path, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        for size in SIZES:
            show(driver, page, size)
            taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
            stem.with_name(f"{stem.name}_{size}.png").write_bytes(base64.b64decode(taken["data"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
