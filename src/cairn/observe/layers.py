"""Times of layerwise loads, layer by layer: where a model waits for its KV."""

import threading
from typing import Any

from cairn.observe.metrics import Histogram


class LayerTimes:
    """How long each layer took to be copied, and how long the model waited for it. One an engine. Thread-safe."""

    def __init__(self, layers: int, latency: Histogram) -> None:
        """latency: told of every layer that was copied."""
        self._latency = latency
        self._lock = threading.Lock()
        self._loads = [0] * layers
        self._load_s = [0.0] * layers
        self._waits = [0] * layers
        self._wait_s = [0.0] * layers

    def copied(self, layers: range, seconds: float) -> None:
        """These layers were copied together; each counts an equal part of the time."""
        part = seconds / len(layers)
        self._latency.observe(part, len(layers))
        with self._lock:
            for layer in layers:
                self._loads[layer] += 1
                self._load_s[layer] += part

    def waited(self, layer: int, seconds: float) -> None:
        """The model has waited for a layer, or found it there."""
        with self._lock:
            self._waits[layer] += 1
            self._wait_s[layer] += seconds

    def stats(self) -> dict[str, Any]:
        """For `/api/v1/layerwise/stats`: sums since the start, a row a layer, times in seconds."""
        with self._lock:
            rows = zip(self._loads, self._load_s, self._waits, self._wait_s, strict=True)
            names = ("loads", "load_seconds", "waits", "wait_seconds")
            layers = [{"layer": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows)]
        return {"layers": layers}
