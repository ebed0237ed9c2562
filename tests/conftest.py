"""tests/vllm runs where vLLM is installed: `make test-vllm`."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["vllm"]
