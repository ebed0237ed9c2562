"""An engine's figures over HTTP; what serves them is loaded only where they are wanted."""

from typing import TYPE_CHECKING

from cairn.config.schema import Observe
from cairn.observe.layers import LayerTimes
from cairn.observe.metrics import Metrics

if TYPE_CHECKING:
    from cairn.observe.http import FiguresServer


def show_figures(config: Observe, metrics: Metrics, times: LayerTimes) -> "FiguresServer":
    """Serves `/metrics` and `/api/v1/layerwise/stats`. Raises ConfigError or InputError, see `FiguresServer`."""
    from cairn.observe.http import FiguresServer, json_page
    from cairn.observe.prometheus import CONTENT_TYPE, exposition

    pages = {
        "/metrics": lambda: (CONTENT_TYPE, exposition(metrics)),
        "/api/v1/layerwise/stats": json_page(times.stats),
    }
    return FiguresServer(config, pages)
