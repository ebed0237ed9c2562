"""An engine's figures over HTTP; what serves them is loaded only where they are wanted."""

from typing import TYPE_CHECKING

from cairn.config.schema import Observe
from cairn.observe.layers import LayerTimes
from cairn.observe.metrics import Metrics

if TYPE_CHECKING:
    from cairn.observe.http import PagesServer


def show_figures(config: Observe, metrics: Metrics, times: LayerTimes) -> "PagesServer":
    """Serves `/metrics` and `/api/v1/layerwise/stats`. Raises ConfigError or InputError, see `PagesServer`."""
    from cairn.observe.http import PagesServer, json_page
    from cairn.observe.prometheus import metrics_page

    pages = {"/metrics": metrics_page(metrics), "/api/v1/layerwise/stats": json_page(times.stats)}
    return PagesServer(config, pages)
