"""Makes docs/images/dashboard-*.png anew, of `examples/dashboard.yaml` after some minutes: `make pictures`."""

import hashlib
import io
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from selenium import webdriver

from cairn.serve.dashboard import page_files
from tests.serve.dashboard.browser import chromium, prefer, resize
from tests.serve.running import RUN

_ROOT = Path(__file__).parents[3]
IMAGES = _ROOT / "docs" / "images"
_TRAFFIC_S = 240
_COLORS = 256
#: Name, width in pixels, height (0: the whole page), colours.
_PICTURES = (("light", 1280, 0, "light"), ("dark", 1280, 0, "dark"), ("360", 360, 1400, "light"))


def page_digest() -> str:
    """What a picture carries as its text `page`, so that one of another page than today's is found out."""
    return hashlib.blake2s(b"".join(one.body for _, one in sorted(page_files().items()))).hexdigest()


def take(browser: webdriver.Chrome, width: int, height: int, scheme: str) -> Image.Image:
    prefer(browser, scheme)
    resize(browser, width, 900)
    time.sleep(3)
    resize(browser, width, height or int(browser.execute_script("return document.documentElement.scrollHeight")))
    time.sleep(1)
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    return picture.quantize(_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def make(directory: Path, traffic_s: float) -> None:
    """Of a cluster that is started for it, on ports and in a directory of its own."""
    info = PngInfo()
    info.add_text("page", page_digest())
    with tempfile.TemporaryDirectory(prefix="cairn-") as home:
        told = yaml.safe_load((_ROOT / "examples" / "dashboard.yaml").read_text())
        told["config"]["serve"]["http_server_port"] = 0
        told["config"]["storage"]["disk"]["path"] = f"{home}/disk"
        file = Path(home) / "cluster.yaml"
        file.write_text(yaml.safe_dump(told))
        command = [sys.executable, "-c", RUN, "up", str(file), "--dir", f"{home}/state"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as cluster:
            try:
                assert cluster.stdout is not None
                ready = next(line for line in cluster.stdout if line.startswith("ready: "))
                time.sleep(traffic_s)
                with chromium() as browser:
                    browser.get(ready.partition("dashboard: ")[2].partition(";")[0])
                    for name, *how in _PICTURES:
                        take(browser, *how).save(directory / f"dashboard-{name}.png", optimize=True, pnginfo=info)
            finally:
                cluster.send_signal(signal.SIGINT)


if __name__ == "__main__":
    make(IMAGES, float(sys.argv[1]) if len(sys.argv) > 1 else _TRAFFIC_S)
