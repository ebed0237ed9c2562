"""`CacheEngine`: what an inference process talks to."""

from cairn.engine.cache_engine import CacheEngine
from cairn.engine.layers import LayerLoad, LayerStore
from cairn.engine.stage import Stage
from cairn.engine.task import TaskResult, TaskStatus

__all__ = ["CacheEngine", "LayerLoad", "LayerStore", "Stage", "TaskResult", "TaskStatus"]
