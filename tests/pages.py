"""HTML pages as a person sees them: headless Chromium, and what must hold for every page."""

import json
import os
import shutil
import time

import pytest


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that logs requests and console messages; absent is a failure where CI is set."""
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs and "CI" not in os.environ:
        pytest.skip("no chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in (*flags.split(), "disable-sync", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def open_html(browser, tmp_path):
    """Writes and opens a page; afterwards no message may stand in the console, no request have left the file."""

    def open_page(text: str, fragment: str = ""):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        browser.get(path.as_uri() + fragment)
        wait_until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == "true")
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [request["params"] for request in requests if request["method"] == "Network.requestWillBeSent"]
    ours = [params for params in sent if params["documentURL"].startswith("file:")]  # not of Chromium's start page
    urls = [params["request"]["url"] for params in ours]
    assert any(url.startswith("file:") for url in urls)  # the log does hold requests
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.05)


def find(page, selector: str):
    return page.find_element("css selector", selector)


def texts(page, selector: str) -> list[str]:
    """What is visible of each element, white space folded."""
    return [" ".join(element.text.split()) for element in page.find_elements("css selector", selector)]


def shown(page, selector: str) -> str:
    (text,) = texts(page, selector)
    return text
