"""The dashboard from end to end: a real service, real processes behind it, a real browser in front."""

from collections.abc import Iterator

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.serve.dashboard.browser import chromium, complaints, requested
from tests.serve.dashboard.page import Page, fits
from tests.serve.dashboard.processes import Cluster, running
from tests.serve.running import until

#: Three quarters of it are alike.
PROMPTS = [
    f"{'Everybody begins with these words. ' * 60}{number} {'but ends with others. ' * 30}" for number in range(4)
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as browser:
        yield browser


def test_somebody_looks_at_a_cluster(cluster: Cluster, browser: webdriver.Chrome) -> None:
    page = Page(browser, f"http://{cluster.gateway.at}/dashboard/")

    until(lambda: page.text("#instances").count("ready") == 2, "both instances")
    assert "no requests yet" in page.text("#prefixes")
    assert "Simulated engines" in page.js("getComputedStyle(document.querySelector('#notice'), '::before').content")

    cluster.ask(PROMPTS[0])
    until(lambda: page.hit_rate() == 0, "a cold prompt")
    for prompt in 3 * PROMPTS:
        cluster.ask(prompt)
    until(lambda: page.hit_rate() > 60, "hits")
    until(lambda: "DRAM" in page.text("#hits .legend"), "what the engines report of their tiers")
    until(lambda: "absent" in page.text("#misses .legend"), "what they report of their misses")
    assert "Hit" in page.text("#ttft .legend")
    assert "Everybody begins with these words." in page.text("#prefixes")
    assert page.js("document.querySelectorAll('#hits path').length") >= 2

    _walk_by_keyboard(page)
    fits(page)

    assert not complaints(browser)
    assert {url.split("/")[2] for url in requested(browser)} == {cluster.gateway.at}

    cluster.two.kill()
    until(page.shows("[data-name=two]", "gone for"), "the dead engine shown as gone")
    assert "1 gone" in page.text("#tiles")
    assert "two is gone" in page.text("#news")
    cluster.ask(PROMPTS[1])

    cluster.gateway.kill()
    until(page.shows("#connection", "no answer since"), "that the figures are old")
    assert page.js("document.body.dataset.connection") == "stale"


def _walk_by_keyboard(page: Page) -> None:
    page.js("document.activeElement.blur()")
    assert page.press(Keys.TAB) == "Skip to the figures"
    page.press(Keys.ENTER)
    assert page.js("document.activeElement.id") == "main"
    assert page.press(Keys.TAB).startswith("Hit rate by tier: chart")
    page.press(Keys.ARROW_LEFT)
    assert "Tokens/s" in page.text("#hits .readout")
    page.press(Keys.ESCAPE)
    assert page.js("document.querySelector('#hits .readout').hidden")
    page.press(Keys.TAB)
    page.press(Keys.ENTER)
    until(page.shows("#hits table", "Miss"), "the table")

    page.js("document.querySelector('[role=treeitem][tabindex=\"0\"]').focus()")
    first = page.press(Keys.HOME)
    assert "Everybody begins" in first
    assert page.press(Keys.ARROW_DOWN) != first
    assert page.press(Keys.ARROW_LEFT) == first
    page.press(Keys.ARROW_LEFT)
    assert page.js("document.activeElement.ariaExpanded") == "false"
    assert page.js("document.querySelectorAll('[role=treeitem]:not([hidden])').length") == 1
    page.press(Keys.ARROW_RIGHT)
    assert page.js("document.activeElement.ariaExpanded") == "true"

    page.js("document.querySelector('#pause').focus()")
    page.press(Keys.ENTER)
    assert page.text("#connection").startswith("paused at")
    page.press(Keys.ENTER)
    until(page.shows("#connection", "live"), "that it goes on")
