"""One file with everything in it: a template of page/, its style and script, data and pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

from PIL import Image

from advgrpo.errors import UserError

PAGE, REPORT_PAGE = "index.html", "report.html"
_MOST_BYTES = 2**28  # of pictures in a page: browsers take seconds to open it, phones fail
_FORMATS = {"png": ("PNG", {"optimize": True}), "webp": ("WEBP", {"quality": 95, "method": 6})}


def render(template: str, title: str, data: Mapping[str, Any]) -> str:
    """page/TEMPLATE with its style sheets and scripts written into it, and `data` as JSON where it says so."""
    folder = files("advgrpo.compare") / "page"
    text = (folder / template).read_text(encoding="utf-8")
    for name in sorted(each.name for each in folder.iterdir()):
        content = (folder / name).read_text(encoding="utf-8")
        text = text.replace(f'<link rel="stylesheet" href="{name}">', f"<style>\n{content}</style>")
        text = text.replace(f'<script src="{name}"></script>', f"<script>\n{content}</script>")
    data_text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no </script> in a prompt ends it
    return text.replace("{{title}}", html.escape(title)).replace("{{data}}", data_text)


def data_address(picture: Image.Image, encoding: Literal["png", "webp"]) -> str:
    """A data: URL of the picture's pixels alone: what a file says beside them may tell which side it is."""
    kind, options = _FORMATS[encoding]
    bare, buffer = Image.new("RGB", picture.size), io.BytesIO()
    bare.paste(picture)
    bare.save(buffer, kind, **options)
    return f"data:image/{encoding};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_size(addresses: Mapping[str, str], encoding: str) -> None:
    """UserError where pictures are too much for a page."""
    total = sum(map(len, addresses.values()))
    if total > _MOST_BYTES:
        smaller = "" if encoding == "webp" else "--encoding webp, "
        raise UserError(
            f"--prompts: {len(addresses)} pictures take {total / 1e6:.0f} MB, more than a browser opens gladly "
            f"({_MOST_BYTES / 1e6:.0f} MB); {smaller}a smaller --resolution or fewer prompts (the pictures are kept)"
        )
