"""The browser that tests of pages drive does what its methods say."""

import pytest

from tests.browser import Browser, needs_browser

pytestmark = needs_browser
PAGE = """<!doctype html><title>fresh</title><meta name=viewport content="width=device-width"><input id=name>
<button onclick="document.title = 'clicked'">go</button>
<script>
let keys = ''
addEventListener('keydown', event => { keys += `${event.key} ` })
localStorage.visits = Number(localStorage.visits || 0) + 1
function save() {
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob(['saved']))
  link.download = 'note.txt'
  link.click()
}
</script>"""


def test_a_page_is_typed_at_clicked_reloaded_and_seen(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)
    with Browser() as browser:
        page = browser.open(tmp_path / "page.html", width=390, height=700, color_scheme="dark")
        assert page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [390, True]
        for key in ("ArrowLeft", "3"):
            page.press(key)
        assert page.evaluate("keys") == "ArrowLeft 3 "
        page.evaluate("document.querySelector('input').focus()")
        page.press("a")
        page.type("né")
        assert page.evaluate("document.querySelector('input').value") == "ané"
        page.click("button")
        assert page.evaluate("document.title") == "clicked"
        page.reload()
        assert page.evaluate("[document.title, localStorage.visits]") == ["fresh", "2"]
        page.evaluate("save()")
        assert browser.downloaded("note.txt").read_text() == "saved"
        page.screenshot(tmp_path / "page.png", whole=True)
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        assert set(page.requests) == {page.address}
        assert not page.errors


def test_what_goes_wrong_in_a_page_is_known(tmp_path):
    (tmp_path / "page.html").write_text("<script>missing()</script><img src=none.png>")
    with Browser() as browser:
        page = browser.open(tmp_path / "page.html")
        assert any("missing is not defined" in error for error in page.errors)
        assert any(address.endswith("none.png") for address in page.requests)
        with pytest.raises(AssertionError, match="nothing is not defined"):
            page.evaluate("nothing")
