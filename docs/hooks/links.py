"""Links that lead out of docs/, for a site that holds nothing but docs/ and what pages.py adds.

On GitHub `[trainer.py](../advgrpo/trainer.py)` opens the file. Here it opens the module's page of the API reference; a
file without a page becomes plain text, because the address of the repository is not known. A target that does not
exist is a warning, which --strict makes an error. Citations of docs/method.md in docstrings become links as well.
"""

import logging
import posixpath
import re
from pathlib import Path

log = logging.getLogger("mkdocs.hooks.links")
ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
LEFT = re.compile(r'(?:href|src)="([^":]+\.(?:md|py|json|sh|yaml))["#]')
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
CITATION = re.compile(r"docs/method\.md,? (?:section )?(?P<section>\d+)(?:\.\d+)?")


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    documents = config.extra["documents"]
    origin = documents.get(uri, f"docs/{uri}")

    def mend(link):
        target = link["target"]
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        there = page_of(path, documents, files)
        if there is not None:
            relative = posixpath.relpath(there, posixpath.dirname(uri) or ".")
            return f"{link['text']}({relative}{link['anchor'] or ''})"
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", origin, path)
        return link["text"].strip("[]")

    parts = FENCE.split(markdown)
    # "[a, b] [18](#x)" is text and a link everywhere but in Python-Markdown, where it names a reference "18"
    mended = (LINK.sub(mend, part).replace("] [", "]&#32;[") for part in parts)
    return "".join(part if part.startswith("```") else new for part, new in zip(parts, mended))


def page_of(path: str, documents: dict[str, str], files) -> str | None:
    """The page or file of the site that shows `path` of the repository."""
    shown = {document: page for page, document in documents.items()}
    module = path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
    candidates = [shown.get(path, ""), path.removeprefix("docs/") if path.startswith("docs/") else ""]
    if path.endswith(".py"):
        candidates += [f"reference/{module}.md", f"reference/{module}/index.md"]
    return next((uri for uri in candidates if uri and files.get_file_from_path(uri) is not None), None)


def on_page_content(html, page, config, files):
    on_site = {file.dest_uri for file in files}
    for target in LEFT.findall(html):  # mkdocs does not look at links that leave docs/
        if posixpath.normpath(posixpath.join(page.url, target)) not in on_site:
            log.warning("%s has a link to %s, which is not on the site", page.file.src_uri, target)
    if not page.file.src_uri.startswith("reference/"):
        return html
    method = files.get_file_from_path("method.md")
    headings = {
        number: re.sub(r"[^\w\s-]", "", title.lower()).strip()
        for number, title in re.findall(r"^## (\d+)\. (.*)$", Path(method.abs_src_path).read_text(), re.M)
    }
    there = method.url_relative_to(page.file)

    def link(citation):
        number = citation["section"]
        anchor = re.sub(r"[\s-]+", "-", f"{number} {headings[number]}")
        return f'<a href="{there}#{anchor}">{citation[0]}</a>'

    # not in the sources that are shown below a docstring: a link inside <pre> would be marked up as code
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>)", html, flags=re.S)
    return "".join(part if part.startswith(("<pre", "<code")) else CITATION.sub(link, part) for part in parts)
