"""Owns the OpenAPI document: the table of routes and the types of the wire, in OpenAPI 3.1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from tqe.api.endpoints import Endpoint
from tqe.api.problems import MEDIA_TYPE
from tqe.api.shapes import ProblemDocument

_REF: Final = "#/components/schemas/{name}"


def document(endpoints: Sequence[Endpoint], *, version: str) -> dict[str, Any]:
    """The whole document."""
    types = [one for endpoint in endpoints for one in (endpoint.takes, endpoint.gives) if one is not None]
    unique = list({id(one): one for one in [*types, ProblemDocument]}.values())
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    schema_of = dict(zip(map(id, unique), schemas, strict=True))
    problem = schema_of[id(ProblemDocument)]
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(
            endpoint, schema_of, problem
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "TQE",
            "version": version,
            "description": "Submit jobs, read what became of them, operate the queue.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, schema_of: dict[int, Any], problem: Any) -> dict[str, Any]:
    taken, given = endpoint.takes, endpoint.gives
    good: dict[str, Any] = {} if given is None else {endpoint.media_type: {"schema": schema_of[id(given)]}}
    answers: dict[str, Any] = {str(endpoint.status): {"description": endpoint.summary, "content": good}}
    for status, text in endpoint.more.items():
        answers[str(status)] = {"description": text, "content": good}
    for status in (*endpoint.fails, *((401, 403, 421, 429, 503) if endpoint.scope else ())):
        answers[str(status)] = {"description": "A problem", "content": {MEDIA_TYPE: {"schema": problem}}}
    found: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method.lower()}{re.sub(r'[^A-Za-z]+', '_', endpoint.path).rstrip('_')}",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", endpoint.path)
        ]
        + [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
            for name, text in endpoint.query.items()
        ],
        "responses": answers,
    }
    if taken is not None:
        content = {endpoint.takes_media_type: {"schema": schema_of[id(taken)]}}
        found["requestBody"] = {"required": endpoint.body_required, "content": content}
    if endpoint.scope:
        found["security"] = [{"bearer": []}]
        found["description"] = f"Needs a token of the scope `{endpoint.scope}`, where the server has tokens."
    return found
