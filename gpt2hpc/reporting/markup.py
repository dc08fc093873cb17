"""HTML in small pieces. Whatever is not `Html` already is escaped, so no text of a run is ever markup or script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any


class Html(str):
    """Text that is markup."""

    __slots__ = ()


def escaped(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def joined(parts: Sequence[object]) -> Html:
    return Html("\n".join(escaped(part) for part in parts if part))


def tag(name: str, *content: object, of: str = "") -> Html:
    """An element of the class `of`."""
    attribute = f' class="{html.escape(of)}"' if of else ""
    return Html(f"<{name}{attribute}>{''.join(map(escaped, content))}</{name}>")


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, own: Sequence[bool] = ()) -> Html:
    """A heading that begins with `#` is of a column of numbers; the rows that are `own` stand out."""
    classes = ["number" if title.startswith("#") else "" for title in head]
    heads = [tag("th", title.removeprefix("#"), of=of) for title, of in zip(head, classes, strict=True)]
    body = [
        tag("tr", *(tag("td", cell, of=of) for cell, of in zip(row, classes, strict=True)), of="own" if mine else "")
        for row, mine in zip(rows, own or [False] * len(rows), strict=True)
    ]
    whole = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    return tag("div", whole, of="scroll")


def share(value: float) -> Html:
    """A bar that is full at 1."""
    width = 100 * min(1.0, max(0.0, value))
    rects = f'<rect class="rail" width="100" height="8"/><rect class="part" width="{width:.1f}" height="8"/>'
    return Html(f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>')


def details(summary: str, content: object, *, is_open: bool = False) -> Html:
    return Html(f"<details{' open' if is_open else ''}>{tag('summary', summary)}{escaped(content)}</details>")


def json_block(name: str, value: Any) -> Html:
    """Data for a script; no `<` in it, so no text can end the element or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return Html(f'<script type="application/json" id="{name}">{text.replace("<", chr(92) + "u003c")}</script>')


def document(title: str, *, style: str, script: str, body: object) -> str:
    """A whole page of one file. Its policy lets a browser fetch nothing, and run no script but this one."""
    policy = f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            tag("title", title),
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            escaped(body),
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
