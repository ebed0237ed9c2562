"""A node over HTTP, dashboard and metrics: a real node, a real client of its, and whoever asks."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from tests.engine.pages import BLOCK, SLOT, make_engine, stored
from tests.node.rig import ProcessNode, address_in
from tests.serve.dashboard.browser import chromium, complaints, requested
from tests.serve.dashboard.page import Page, fits
from tests.serve.running import DEADLINE_S, until

KEY = "CAIRN_OBSERVE__HTTP_TOKEN"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """Its address, and its dashboard's."""
    monkeypatch.setenv(KEY, "secret")
    address = address_in(tmp_path)
    settings = {"storage.cpu.size": 32 * SLOT, "storage.disk.path": tmp_path / "disk", "storage.disk.size": "1MiB"}
    node = ProcessNode(address, **settings, **{"observe.http_port": 0})
    try:
        yield address, node.said.partition("dashboard at ")[2].splitlines()[0]
    finally:
        node.kill()


def test_a_node_shows_its_pools_and_what_they_move(node: tuple[str, str]) -> None:
    address, url = node
    with httpx.Client(timeout=DEADLINE_S) as client, make_engine(32, **{"node.address": address}) as engine:
        assert client.get(url).text.startswith("<!doctype html>")
        assert client.get(url.removesuffix("/"), follow_redirects=True).url == url
        assert client.get(url.replace("/dashboard/", "/health")).json() == {"status": "ok"}
        state = url.replace("/dashboard/", "/api/v1/state")
        assert client.get(state).status_code == 401
        assert client.get(url.replace("/dashboard/", "/elsewhere")).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert client.get(url.replace("/dashboard/", "/elsewhere")).status_code == 404
        assert "cairn_tier_sessions" in client.get(url.replace("/dashboard/", "/metrics")).text
        assert stored(engine, np.arange(10 * BLOCK)) == 10 * BLOCK

        def told() -> bool:
            found = client.get(state).json()
            tiers = {one["tier"]: one for one in found["tiers"]}
            return bool(found["instances"]) and tiers["dram"].get("blocks") == tiers["disk"].get("blocks") == 10

        until(told, "ten blocks in DRAM and on disk")
        found = client.get(state).json()
        assert found["kind"] == "node"
        assert [one["running"] for one in found["instances"]] == [1]
        # A pool that came in between two samples is counted from the second on.
        seq = found["seq"]
        until(lambda: client.get(state).json()["seq"] > seq, "another sample")
        stored(engine, np.arange(100, 100 + 10 * BLOCK))

        def moved() -> bool:
            return any("disk" in one.get("store_bytes", {}) for one in client.get(state).json()["samples"])

        until(moved, "what was written")


def test_somebody_with_the_key_looks_at_a_node(node: tuple[str, str]) -> None:
    address, url = node
    with chromium() as browser, make_engine(32, **{"node.address": address}) as engine:
        page = Page(browser, url)
        until(lambda: page.js("document.activeElement.id") == "token", "that it asks for the key")
        assert "observe.http_token" in page.js("document.activeElement.placeholder")
        fits(page)
        page.press("guess", Keys.ENTER)
        until(page.shows("#refused", "not the right one"), "that the key is wrong")
        complaints(browser)  # the console tells of both refusals
        page.js("document.querySelector('#token').value = ''")
        page.press("secret", Keys.ENTER)
        assert stored(engine, np.arange(10 * BLOCK)) == 10 * BLOCK
        until(page.shows("#tiers", "10 blocks"), "what the node holds")
        assert {"DRAM", "Disk"} <= {*page.text("#tiers").split()}
        assert page.text("#instances").split()[:2] == ["Pools", "1"]
        assert page.js("[...document.querySelectorAll('#tiles b')].map((one) => one.innerText)") == [
            "Loaded",
            "Clients",
        ]
        assert page.text("#kind") == "node"
        fits(page)
        assert not complaints(browser)
        assert {one.split("/")[2] for one in requested(browser)} == {url.split("/")[2]}
        page.js("sessionStorage.clear()")
        open_by_link = Page(browser, f"{url}#token=secret")
        browser.refresh()  # another part behind # alone loads nothing anew
        until(open_by_link.shows("#connection", "live"), "the key out of the address")
        assert "secret" not in browser.current_url
