"""The page to try a server with: one file, which may load nothing and talk to nobody but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse, PlainTextResponse, Response

from offramp.report.html import colours

_FILE = Path(__file__).with_name("page.html")


def page(model: str) -> Response:
    """The page, with the rules that a browser holds it to; a line of text where it was not installed."""
    if not _FILE.exists():
        return PlainTextResponse(f"offramp serves {model}: POST /v1/chat/completions or /v1/completions\n")
    html, rules = _read()
    return HTMLResponse(html, headers={"Content-Security-Policy": rules, "X-Content-Type-Options": "nosniff"})


@cache
def _read() -> tuple[str, str]:
    """The file in the colours of all pages, and the policy that allows its own scripts and styles by their digests."""
    html = _FILE.read_text(encoding="utf-8").replace("/* colours.css */", colours())
    scripts, styles = (" ".join(_digests(html, tag)) or "'none'" for tag in ("script", "style"))
    return html, (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digests(html: str, tag: str) -> list[str]:
    contents = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL | re.IGNORECASE)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in contents]
