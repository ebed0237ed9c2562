"""The dashboard from end to end: a real service, real processes behind it, a real browser in front."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.serve.dashboard.browser import chromium, complaints, prefer, requested, resize
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


class Page:
    """What somebody who looks at it finds."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def js(self, code: str) -> Any:
        return self.browser.execute_script(f"return {code}")  # type: ignore[no-untyped-call]

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector('{selector}')?.innerText ?? ''"))

    def shows(self, selector: str, what: str) -> Callable[[], bool]:
        return lambda: what in self.text(selector)

    def hit_rate(self) -> int:
        figure = self.text("#tiles strong").removesuffix("%")
        return int(figure) if figure.isdigit() else -1

    def press(self, *keys: str) -> str:
        """The label of what has the focus then."""
        ActionChains(self.browser).send_keys(*keys).perform()
        return str(self.js("document.activeElement.ariaLabel ?? document.activeElement.innerText"))


def test_somebody_looks_at_a_cluster(cluster: Cluster, browser: webdriver.Chrome) -> None:
    page = Page(browser, f"http://{cluster.gateway.at}/dashboard/")

    until(page.shows("#instances", "two"), "both instances")
    assert page.text("#instances").count("ready") == 2
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
    _fits(page)

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


def _fits(page: Page) -> None:
    """On a telephone, in the light and in the dark; nothing that overflows sideways, nothing too pale to be read."""
    for scheme in ("dark", "light"):
        prefer(page.browser, scheme)
        for width in (360, 768, 1280):
            resize(page.browser, width, 900)
            until(lambda: page.js("innerWidth") == width, "the width")  # noqa: B023 - called here
            assert page.js("document.documentElement.scrollWidth") <= width
            assert page.js(_OUTSIDE) == []
        assert (sum(page.js(_RGB)) < 200) == (scheme == "dark")
        assert page.js(_PALE) == []


_RGB = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
#: What has text and stands beyond the window's edge.
_OUTSIDE = """[...document.querySelectorAll('main *, header *')].filter((one) => one.children.length === 0 &&
    one.textContent.trim() && !one.closest('.scroll, .unseen, thead, [hidden]') && one.getBoundingClientRect().width &&
    one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML)"""
#: Text whose contrast to what is behind it is less than 4.5 (WCAG 2, AA).
_PALE = """(() => {
  const SHARES = [0.2126, 0.7152, 0.0722];
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (text) => rgb(text).slice(0, 3).reduce((sum, c, i) => sum + linear(c / 255) * SHARES[i], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((rgb(color)[3] ?? 1) > 0) return color;
    }
  };
  const says = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const contrast = (one) => {
    const text = getComputedStyle(one)[one.namespaceURI.endsWith('svg') ? 'fill' : 'color'];
    const [dark, bright] = [light(text), light(behind(one))].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  return [...document.querySelectorAll('main *, header *, footer *, #notice')]
    .filter((one) => one.getClientRects().length && says(one) && contrast(one) < 4.5).map((one) => one.outerHTML);
})()"""
