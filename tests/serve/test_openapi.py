"""Whatever fits the OpenAPI is answered as it says, and what does not is refused; made up by schemathesis."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.serve.conftest import Fleet

OPERATIONS = ["POST /score", "POST /score_chat_completions", "POST /routed", "POST /score/tokens"]
OPERATIONS += ["POST /routed/tokens", "GET /instances", "GET /health", "GET /health/ready", "GET /metrics"]


def whole(value: Any) -> Any:
    """JSON Schema calls 5.0 an integer; the service does not, and nobody writes it."""
    if isinstance(value, dict):
        return {name: whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_as_described(fleet: Fleet, operation: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"http://{fleet.service.http}/openapi.json")
    method, path = operation.split()
    described = schema[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing to get wrong")
    kinds: set[int] = set()

    @given(described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=60 if method == "POST" else 2,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = whole(case.body)
        answer = case.call(timeout=30)
        if answer.text == "Invalid HTTP request received.":
            return  # the server's own answer to a request line of 64 KiB
        kinds.add(answer.status_code)
        # No schema says that a template may refuse any chat, that bytes come in fours, that a query is text.
        checks = [positive_data_acceptance] if "chat" in path else []
        checks += [positive_data_acceptance, negative_data_rejection] if "tokens" in path else []
        case.validate_response(answer, excluded_checks=checks)

    ask()
    if mode is GenerationMode.POSITIVE:
        assert kinds & {200, 404}
    else:
        assert 200 < max(kinds) < 500
