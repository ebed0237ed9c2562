"""What somebody who looks at the page finds, and whether it fits."""

from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains

from tests.serve.dashboard.browser import prefer, resize
from tests.serve.running import until


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


def fits(page: Page) -> None:
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
