"""The OpenAPI document as a page to read. FLOOR 5.

Rendered on the server, once: no script, nothing from elsewhere, and the style is named to the browser by its hash,
so that the CSP stays as strict as everywhere. Whatever text the document holds is escaped.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from service.web.edge import CONTENT_SECURITY_POLICY

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font: 600 1rem ui-monospace, monospace; margin: 2.5rem 0 .25rem; padding-top: .75rem; border-top: 1px solid #8886 }
h2 b { display: inline-block; min-width: 4.5rem }
code, pre { font: .875em ui-monospace, monospace }
pre { overflow: auto; padding: .75rem; background: #8881; border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8883 }
summary { cursor: pointer; padding: .25rem 0 }
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_POLICY = CONTENT_SECURITY_POLICY.replace("style-src 'self'", f"style-src 'sha256-{_HASH}'")


def render_docs(openapi: dict[str, Any]) -> str:
    """The whole page."""
    title, version, about = (openapi["info"][name] for name in ("title", "version", "description"))
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)} API</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)} {escape(version)}</h1><p>{_prose(about)}</p>",
            '<p>For programs: <a href="/openapi.json">openapi.json</a>; the events: ',
            '<a href="/asyncapi.json">asyncapi.json</a>.</p>',
            *_operations(openapi["paths"]),
            "<h1>Objects</h1>",
            *_schemas(openapi["components"]["schemas"]),
            "</html>",
        ]
    )


def _operations(paths: dict[str, Any]) -> Iterator[str]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield f"<h2><b>{method.upper()}</b> {escape(path)}</h2>"
            yield f"<p><strong>{escape(operation['summary'])}.</strong> {_prose(operation.get('description', ''))}</p>"
            parameters = [
                (p["name"], p["in"], _told(p["schema"], p.get("description", "")))
                for p in operation.get("parameters", ())
            ]
            if parameters:
                yield _folded(f"Parameters ({len(parameters)})", _table(parameters), shown=len(parameters) < 10)
            kinds = operation.get("requestBody", {}).get("content", {})
            if kinds:
                yield f"<p>Body: {', '.join(f'<code>{escape(kind)}</code>' for kind in kinds)}</p>"
            answers = [(status, _prose(answer["description"])) for status, answer in operation["responses"].items()]
            yield _table(sorted(answers))


def _schemas(schemas: dict[str, Any]) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        rows = [(member, _told(told, "")) for member, told in schema.get("properties", {}).items()]
        example = "".join(
            f"<pre>{escape(json.dumps(value, indent=2))}</pre>"
            for value in schema.get("examples", ())
            if isinstance(value, dict)
        )
        about = f"<p>{_prose(schema.get('description', ''))}</p>"
        yield _folded(name, about + (_table(rows) if rows else f"<p>{_told(schema, '')}</p>") + example)


def _told(schema: dict[str, Any], description: str) -> str:
    """A schema in a few words."""
    words = _type(schema)
    limits = ", ".join(
        f"{name} {schema[name]}"
        for name in ("minimum", "maximum", "maxLength", "maxItems", "default")
        if name in schema
    )
    text = description or schema.get("description", "")
    return " · ".join(part for part in (escape(words), escape(limits), _prose(text)) if part)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(member) for member in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("format") or schema.get("type", "anything"))


def _table(rows: list[Any]) -> str:
    cells = (
        "".join(f"<{tag}>{cell}</{tag}>" for tag, cell in zip(("th", "td", "td"), row, strict=False)) for row in rows
    )
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _folded(title: str, content: str, *, shown: bool = False) -> str:
    return f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>{content}</details>"


def _prose(text: str) -> str:
    """Text with `code`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
