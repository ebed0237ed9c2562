"""What holds for all tests."""

from importlib.util import find_spec

# tests/vllm runs where vLLM is installed: `make test-vllm`. That environment has no hypothesis.
collect_ignore = [] if find_spec("vllm") else ["vllm"]

if find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says more about what else runs than about the code.
    settings.register_profile("cairn", deadline=None)
    settings.load_profile("cairn")
