"""The OpenAPI of the service: handlers read bodies themselves, so what they take is said here, from the same models."""

from collections.abc import Collection, Iterable
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cairn.serve.refusals import ErrorResponse

_REFUSALS: Final = {
    400: "Not understood.",
    401: "Without the token.",
    403: "Not allowed by the service's settings.",
    404: "No such model or instance.",
    408: "The body came too slowly.",
    413: "Too large.",
    415: "Another content type.",
    503: "Busy, or not ready.",
    504: "Not done in time.",
}
_REF: Final = "#/components/schemas/{model}"


def documented(
    body: type[BaseModel] | str | None,
    answer: type[BaseModel] | None,
    *kinds_taken: str,
    refusals: Collection[int] | None = None,
) -> dict[str, Any]:
    """Arguments of a route: what it takes (an object in one of these kinds, or what a text describes) and answers, and
    may refuse.
    """
    codes = refusals if refusals is not None else list(_REFUSALS) if body else [401, 504]
    kinds: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse if body or code != 503 else answer, "description": _REFUSALS[code]}
        for code in codes
    }
    if answer is None:
        kinds[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    arguments: dict[str, Any] = {"responses": kinds}
    if answer is not None:
        arguments["response_model"] = answer
    if isinstance(body, str):
        schema: dict[str, Any] = {"type": "string", "format": "binary", "description": body}
    elif body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
    else:
        return arguments
    content = {kind: {"schema": schema} for kind in kinds_taken}
    arguments["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return arguments


def describe(app: FastAPI, bodies: Iterable[type[BaseModel]], needs_token: bool, open_paths: Collection[str]) -> None:
    """Completes what FastAPI makes: the bodies' schemas, and the token."""
    made = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            tree = made()
            _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
            components = tree.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            if needs_token:
                components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                for path, methods in tree["paths"].items():
                    for method in methods.values():
                        method["security"] = [] if path in open_paths else [{"bearer": []}]
            app.openapi_schema = tree
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]
