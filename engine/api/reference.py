"""Owns the page that shows the OpenAPI document to people: plain markup, without any script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>TQE: the REST API</title>
<link rel="icon" href="assets/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="assets/page.css">
</head>
<body>
<header class="top">
  <h1><img src="assets/icon.svg" alt="" width="26" height="26">{title} {version}</h1>
</header>
<main>{sections}</main>
<footer><a href="./">Dashboard</a><a href="openapi.json">OpenAPI document</a></footer>
</body>
</html>
"""


def page(document: Mapping[str, Any]) -> bytes:
    """The page of an OpenAPI document: operations with parameters, body and answers; then the types."""
    operations = [
        _operation(method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    types = [_type(name, schema) for name, schema in document["components"]["schemas"].items()]
    info = document["info"]
    text = _PAGE.format(
        title=escape(info["title"]), version=escape(info["version"]), sections="\n".join(operations + types)
    )
    return text.encode()


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        (f"{one['name']} (in the {one['in']})", "text", one.get("description", ""))
        for one in operation["parameters"]
    ]
    body = operation.get("requestBody")
    if body is not None:
        rows += [("body", _content(body["content"]), "")]
    # One line for all that say the same: every problem is a document of one type.
    answers: dict[tuple[str, str], list[str]] = {}
    for status, one in operation["responses"].items():
        answers.setdefault((_content(one["content"]), one["description"]), []).append(status)
    rows += [(", ".join(sorted(statuses)), *told) for told, statuses in answers.items()]
    more = operation.get("description", "").replace("`", "")
    about = f"<p>{escape(operation['summary'])}. {escape(more)}</p>"
    return _card(f"{method} {path}", about, rows)


def _type(name: str, schema: Mapping[str, Any]) -> str:
    needed = set(schema.get("required", ()))
    rows = [
        (field if field in needed else f"{field} (optional)", _kind(one), one.get("description", ""))
        for field, one in schema.get("properties", {}).items()
    ]
    return _card(name, f"<p>{escape(schema.get('description', ''))}</p>", rows, anchor=name)


def _card(title: str, about: str, rows: list[tuple[str, str, str]], anchor: str = "") -> str:
    mark = f' id="{escape(anchor)}"' if anchor else ""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{kind}</td><td class="dim">{escape(text)}</td></tr>'
        for name, kind, text in rows
    )
    return (
        f'<section class="card full"{mark}><div class="head"><h2>{escape(title)}</h2></div>{about}'
        f'<div class="scroll"><table><tbody>{lines}</tbody></table></div></section>'
    )


def _content(content: Mapping[str, Any]) -> str:
    return ", ".join(f"{_kind(one['schema'])} as {escape(media)}" for media, one in content.items())


def _kind(schema: Mapping[str, Any]) -> str:
    """What a value is, in words, as markup."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "enum" in schema:
        return escape(" or ".join(map(str, schema["enum"])))
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    kind = str(schema.get("type", "any"))
    return f"array of {_kind(schema['items'])}" if "items" in schema else escape(kind)
