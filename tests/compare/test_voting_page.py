"""The page in a browser: votes by keyboard and by touch, resumed, by several raters, from a file and from a server.

`python -m tests.compare.test_voting_page FOLDER` takes pictures of every screen of a comparison, at a desk's and a
phone's size.
"""

import json
import sys
from pathlib import Path

import pytest

from advgrpo.compare.__main__ import main
from advgrpo.compare.server import make_server
from advgrpo.compare.votes import VOTES, read_votes, winner
from tests.browser import Browser, Page, needs_browser
from tests.comparisons import always_left, attentive, make, votes_by
from tests.judges import serving

pytestmark = needs_browser
KEYS = {"left": "ArrowLeft", "tie": "ArrowDown", "right": "ArrowRight"}


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture
def made(tmp_path):
    return make(tmp_path)


@pytest.fixture
def page(browser, made):
    """The page as a file, seen for the first time: files share their storage."""
    opened = browser.open(made[0] / "index.html")
    opened.evaluate("localStorage.clear()")
    opened.reload()
    yield opened
    assert not opened.errors
    assert set(opened.requests) <= {opened.address}
    opened.close()


def begin(page: Page, name: str) -> None:
    """Type a name where the focus is, and begin."""
    page.type(name)
    page.press("Enter")
    page.wait("!document.getElementById('voting').hidden")


def answer(page: Page, choices: str | list[str]) -> None:
    """Answer the pair that is shown by keys, and wait for the next one or the end."""
    before = page.evaluate("position")
    for choice in [choices] * 3 if isinstance(choices, str) else choices:
        page.press(KEYS[choice])
    page.wait(f"!pausing && (position !== {before} || !document.getElementById('done').hidden)")


def answer_all(page: Page, comparison, chooses) -> None:
    """The rest of the pairs, as `chooses` of tests/comparisons.py."""
    while page.evaluate("!document.getElementById('voting').hidden"):
        shown = page.evaluate("shown()")
        answer(page, chooses(comparison, comparison.pairs[shown["id"]], shown["left"], shown["right"]))


def download(page: Page, browser: Browser, name: str) -> Path:
    page.click("#download")
    return browser.downloaded(page.evaluate(f"`votes-${{data.id.slice(0, 6)}}-{name}.jsonl`"))


def test_votes_by_keyboard_are_downloaded_and_reported(page, browser, made, capsys):
    folder, comparison = made
    total = len(comparison.pairs)
    begin(page, "Ann Lee")
    assert page.evaluate("document.getElementById('count').textContent") == f"1 of {total}"
    answer_all(page, comparison, attentive)
    assert page.evaluate("document.getElementById('thanks').textContent") == "Thank you, Ann Lee."
    assert page.evaluate("document.getElementById('progress').value") == total
    file = download(page, browser, "Ann-Lee")
    votes, torn = read_votes(file, comparison)
    assert (len(votes), torn) == (total, 0)
    for each in votes:
        pair = comparison.pairs[each.pair]
        wanted = {"sides": 1, "noise": 1, "same": 0.5}[pair.kind]
        assert [winner(each, question, pair.a) for question in comparison.questions] == [wanted] * 3
        assert each.rater == "Ann Lee"
    assert main(["report", str(folder), str(file)]) == 0
    assert "100% [100%, 100%]" in capsys.readouterr().out
    found = json.loads((folder / "report.json").read_text())
    assert [rater["passed"] for rater in found["raters"]] == [4]


def test_a_reload_goes_on_where_one_was(page):
    begin(page, "Ann")
    order = page.evaluate("order")
    for choices in ("left", ["tie", "right", "left"]):
        answer(page, choices)
    page.press("ArrowLeft")  # a pair that is not finished is asked again
    page.reload()
    assert page.evaluate("[rater, position, order, Object.keys(answers).length]") == ["Ann", 2, order, 0]
    kept = page.evaluate("votesOf('Ann').map(vote => [vote.pair, vote.answers])")
    assert kept == [
        [order[0]["id"], {"quality": "left", "aesthetics": "left", "alignment": "left"}],
        [order[1]["id"], {"quality": "tie", "aesthetics": "right", "alignment": "left"}],
    ]


def test_two_raters_have_votes_and_orders_of_their_own(page, browser, made, capsys):
    folder, comparison = made
    begin(page, "Ann")
    ann = page.evaluate("order")
    answer(page, "left")
    page.click("#switch")
    begin(page, "Bo")
    assert page.evaluate("position") == 0
    assert page.evaluate("order") != ann
    answer_all(page, comparison, always_left)
    page.click("#another")
    assert page.evaluate("[...document.querySelectorAll('#raters button')].map(each => each.textContent)") == [
        f"Ann (1 of {len(ann)})",
        f"Bo ({len(ann)} of {len(ann)})",
    ]
    page.click("#raters button")
    assert page.evaluate("[rater, position, order]") == ["Ann", 1, ann]
    answer_all(page, comparison, attentive)
    files = [download(page, browser, "Ann")]
    page.click("#another")
    page.evaluate("document.querySelectorAll('#raters button')[1].click()")
    files.append(download(page, browser, "Bo"))
    assert main(["report", str(folder), *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "left out: Bo passed" in said
    assert "1 of 2 raters are left out" in said


def test_going_back_and_changing_an_answer(page, made):
    begin(page, "Ann")
    answer(page, "left")
    page.press("ArrowUp")  # the pair before, at its last question
    assert page.evaluate("[position, active, document.querySelectorAll(':checked').length]") == [0, 2, 3]
    page.press("3")
    assert page.evaluate("[position, votesOf('Ann').length]") == [0, 2]
    assert page.evaluate("answeredBy('Ann').get(shown().id).answers.alignment") == "right"
    page.press("3")  # the same again is no new vote
    assert page.evaluate("votesOf('Ann').length") == 2
    page.press("Enter")
    assert page.evaluate("[position, active]") == [1, 0]
    page.press("ArrowDown")
    page.press("ArrowUp")
    assert page.evaluate("[position, active]") == [1, 0]
    page.press("ArrowRight")
    assert page.evaluate("answers") == {"quality": "right"}
    assert page.evaluate("document.getElementById('next').disabled")


def test_a_key_too_many_does_not_answer_the_next_pair(page):
    begin(page, "Ann")
    one = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"
    page.evaluate(f"for (let i = 0; i < 5; i++) {one}")  # at once, however busy the machine is
    page.wait("position === 1 && !pausing")
    assert page.evaluate("Object.keys(answers).length") == 0


def test_tab_and_space_alone_are_enough(page):
    """As somebody with a screen reader goes through it: radios by Tab and Space, taken along to the next question."""
    begin(page, "Ann")
    page.evaluate("document.querySelector('input[value=tie]').focus()")
    for name in ("quality", "aesthetics", "alignment"):
        assert page.evaluate("document.activeElement.name") == name
        page.press(" ")
    page.wait("position === 1 && !pausing")
    assert page.evaluate("document.activeElement.name") == "quality"
    assert "Pair 2 of" in page.evaluate("document.getElementById('announce').textContent")
    first = page.evaluate("votesOf('Ann')[0].answers")
    assert first == {"quality": "tie", "aesthetics": "left", "alignment": "left"}


def test_pictures_are_seen_large_and_swapped(page):
    begin(page, "Ann")
    page.wait("document.getElementById('left').naturalWidth > 0")
    page.press("z")
    assert page.evaluate("[document.getElementById('large').open, largeSide]") == [True, "left"]
    page.press("ArrowRight")
    assert page.evaluate("document.getElementById('large-picture').src === document.getElementById('right').src")
    page.press("Escape")
    assert page.evaluate("[document.getElementById('large').open, Object.keys(answers).length]") == [False, 0]
    page.click("#right")
    assert page.evaluate("[document.getElementById('large').open, largeSide]") == [True, "right"]
    page.click("#large-swap")
    assert page.evaluate("largeSide") == "left"
    page.click("#large-close")


def test_what_a_reader_of_the_page_hears_names_no_side(page):
    """Every control has a name, and nothing but the place tells the pictures apart."""
    begin(page, "Ann")
    alts = page.evaluate("[...document.querySelectorAll('figure img')].map(each => each.alt)")
    assert alts == ["Left picture", "Right picture"]
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node for node in tree if node.get("role", {}).get("value") in ("button", "radio", "progressbar", "group")
    ]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in controls]
    assert all(name for role, name in named), named
    assert [name for role, name in named if role == "radio"] == ["Left", "Tie", "Right"] * 3
    assert {"Which has the better quality?", "Which is more beautiful?"} <= {name for _, name in named}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_a_whole_pair_without_scrolling_sideways(browser, made, scheme):
    page = browser.open(made[0] / "index.html", 360, 740, color_scheme=scheme)
    page.evaluate("localStorage.clear()")
    page.reload()
    begin(page, "A name as long as names are allowed to be, and none is longer than eighty letters")
    page.wait("document.getElementById('left').naturalWidth > 0")
    assert page.evaluate("document.scrollingElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('fieldset:last-child').getBoundingClientRect().bottom") <= 740
    tall = (
        "[...document.querySelectorAll('button, .choices label')].filter(e => e.offsetParent).map(e => e.offsetHeight)"
    )
    assert min(page.evaluate(tall)) >= 40
    for each in ("left", "tie", "right"):
        page.click(f"fieldset.now input[value={each}]")
    page.wait("position === 1")
    rgb = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert (sum(page.evaluate(rgb)) < 200) == (scheme == "dark")
    page.close()


def test_order_and_places_are_drawn_for_each_rater(page):
    """Reproducible, different between raters, and as often left as right; whoever is shown a part gets every check."""
    page.evaluate("""names = Array.from({length: 400}, (_, number) => `rater ${number}`)""")
    assert page.evaluate(
        "JSON.stringify(names.map(n => pairsFor(data, n))) === JSON.stringify(names.map(n => pairsFor(data, n)))"
    )
    page.evaluate("left = (name, pair) => pairsFor(data, name).find(each => each.id === pair.id).left")
    turned = page.evaluate("data.pairs.map(p => names.filter(name => left(name, p) === p.pictures[0]).length)")
    same = page.evaluate("data.pairs.map(pair => pair.pictures[0] === pair.pictures[1])")
    assert all(160 < count < 240 for count, is_same in zip(turned, same) if not is_same)
    firsts = page.evaluate("names.map(n => pairsFor(data, n)[0].id)")
    assert len(set(firsts)) == page.evaluate("data.pairs.length")
    part = page.evaluate("names.map(n => pairsFor({...data, pairs_per_rater: 1}, n).map(p => p.id))")
    checks = set(page.evaluate("data.checks"))
    assert all(len(ids) == 1 + len(checks) and checks < set(ids) for ids in part)
    assert len({next(each for each in ids if each not in checks) for ids in part}) == 3


def test_a_browser_that_keeps_nothing_says_so(browser, made):
    page = browser.open(made[0] / "index.html")
    page.evaluate("localStorage.clear()")
    page.call(
        "Page.addScriptToEvaluateOnNewDocument", source="Storage.prototype.setItem = () => { throw Error('full') }"
    )
    page.reload()
    begin(page, "Mia")  # whose file no other test has downloaded
    assert "keeps nothing" in page.evaluate("document.getElementById('warning').textContent")
    answer(page, "tie")
    page.click("#help")
    page.click("#download-now")
    assert (
        len(browser.downloaded(page.evaluate("`votes-${data.id.slice(0, 6)}-Mia.jsonl`")).read_text().splitlines()) == 1
    )


def test_votes_reach_the_server_also_after_it_was_away(browser, made):
    folder, comparison = made
    server = make_server(folder)
    port = server.server_address[1]
    with serving(server) as url:
        page = browser.open(f"{url}/")
        begin(page, "Ann")
        answer(page, "left")
        page.wait("document.getElementById('saved').textContent === 'saved'")
    server.votes.close()
    answer(page, "right")
    page.wait("document.getElementById('saved').textContent === '1 vote waits for the server'")
    again = make_server(folder, port=port)
    with serving(again):
        answer_all(page, comparison, attentive)
        page.wait("document.getElementById('done-text').textContent.includes('answered and saved')")
        sent = page.evaluate("votesOf('Ann').map(vote => vote.id)")
        assert set(page.requests) == {f"{url}/", f"{url}/votes"}
        page.reload()
        assert page.evaluate("[rater, document.getElementById('done').hidden]") == ["Ann", False]
    again.votes.close()
    assert [each.id for each in read_votes(folder / VOTES, comparison)[0]] == sent
    page.close()


def test_a_refused_vote_is_told_and_kept(browser, made):
    folder, comparison = made
    server = make_server(folder)
    with serving(server) as url:
        page = browser.open(f"{url}/")
        begin(page, "Ann")
        page.evaluate("data.id = 'another'")  # the page of a comparison that was made anew meanwhile
        answer(page, "left")
        page.wait("document.getElementById('saved').classList.contains('bad')")
        assert "is another comparison" in page.evaluate("document.getElementById('saved').textContent")
        assert page.evaluate("votesOf('Ann').length") == 1
    server.votes.close()
    assert not read_votes(folder / VOTES, comparison)[0]
    page.close()


def test_the_report_is_seen(browser, tmp_path):
    folder, comparison = make(tmp_path, sides=3)
    lines = [each.line() for name in ("Ann", "Bo") for each in votes_by(comparison, name, attentive)]
    lines += [each.line() for each in votes_by(comparison, "<b>Cy</b>", always_left)]
    (folder / VOTES).write_bytes(b"".join(lines))
    assert main(["report", str(folder)]) == 0
    page = browser.open(folder / "report.html", 390, 800)
    assert not page.errors
    assert page.requests == [page.address]
    assert page.evaluate("document.querySelectorAll('.panel').length") == 4
    text = page.evaluate("document.body.innerText")
    assert "18 votes by 2 raters on 3 prompts" in text
    assert "A wins 100 % [100 %, 100 %] against B: 6 wins, 0 ties, 0 losses" in text
    assert "<b>Cy</b>" in text
    names = "[...document.querySelector('.strengths').children].map(each => each.firstChild.textContent)"
    assert page.evaluate(names) == ["A", "B", "C"]
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390
    page.close()


def take_pictures(folder: Path, out: Path) -> None:
    """desk-*.png and phone-*.png of every screen, the report's too where there is one."""
    with Browser() as browser:
        for name, size, scheme in (("desk", (1280, 800), "light"), ("phone", (390, 844), "dark")):
            page = browser.open(folder / "index.html", *size, color_scheme=scheme)
            page.evaluate("localStorage.clear()")
            page.reload()
            page.screenshot(out / f"{name}-1-welcome.png")
            begin(page, "Ann Example")
            page.wait("document.getElementById('left').naturalWidth > 0")
            page.press("ArrowLeft")
            page.screenshot(out / f"{name}-2-pair.png")
            page.press("z")
            page.screenshot(out / f"{name}-3-large.png")
            page.press("z")
            page.click("#help")
            page.screenshot(out / f"{name}-4-keys.png")
            page.click("#keys-close")
            while page.evaluate("!document.getElementById('voting').hidden"):
                answer(page, "tie")
            page.screenshot(out / f"{name}-5-done.png")
            if (folder / "report.html").exists():
                page.go(folder / "report.html")
                page.screenshot(out / f"{name}-6-report.png", whole=True)


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "."))
