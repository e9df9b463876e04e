"""The checks of `benchmarks/browser.py` find what is planted in a page, and nothing in a clean one."""

from collections.abc import Callable
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import browser
    from browser import BrowserError, Seen, find_chromium, look, malformed

CHROMIUM = find_chromium()
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, a package of the system that pip cannot install"
)

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #595959; }
@media (prefers-color-scheme: dark) { :root { --paper: #111; --ink: #eee; --soft: #aaa; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.4 sans-serif; margin: 1rem; }
.scroll { overflow-x: auto; }
.away { position: absolute; left: -999em; color: #ccc; }
.soft { color: var(--soft); }
.wide { width: 700px; }
.group { background: #000; color: #fff; opacity: 0.99; }
.badge { fill: #222; }
.badge-text { fill: #fff; }
.halo { fill: #222; stroke: #fff; stroke-width: 3px; paint-order: stroke; }
"""
CLEAN = """
<a class="away" href="#top">Skip</a>
<h1 id="top">A page</h1>
<p class="soft">Some words, and <a href="#top">a link</a>.</p>
<p class="group">On a ground of its own.</p>
<section aria-labelledby="numbers"><h2 id="numbers">Numbers</h2>
<figure><svg viewBox="0 0 200 40" width="200" role="img" aria-label="Three numbers">
<rect class="badge" width="80" height="40"/><text class="badge-text" x="10" y="25">one</text>
<text class="halo" x="110" y="25">two</text></svg><figcaption>Three numbers</figcaption></figure>
<details><summary>As a table</summary><div class="scroll"><table class="wide"><caption>Numbers</caption>
<tbody><tr><th scope="row">one</th><td>1</td></tr></tbody></table></div></details></section>
"""


def document(main: str = "<h1>A page</h1>", style: str = "", head: str = "") -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{head}<title>A page</title>'
        f'<link rel="icon" href="data:,"><style>{" ".join(STYLE.split())} {style}</style></head>\n<body>{main}</body></html>\n'
    )


# -- the text --------------------------------------------------------------------------------------------------


def test_a_clean_text_has_no_faults() -> None:
    assert malformed(document(CLEAN)) == []


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        ("<div><b>text</div>", "</div> closes it before <b> of line 3 is closed"),
        ("<b><i>text</b></i>", "</i> closes nothing"),
        ("<p>text", "</body> closes it before <p> of line 3 is closed"),
        ("text</div>", "</div> closes nothing"),
        ("a<br></br>", "</br>, which has no end"),
        ("<div/></div>", "<div/> closes nothing in HTML"),
        ("<sectoin></sectoin>", "<sectoin> is no element of HTML"),
        ('<p class="a" class="b">x</p>', "<p> has class more than once"),
        ('<p class="a"" title="b">x</p>', "<p> has a broken attribute"),
        ("<p>x<div>y</div></p>", "<p> may not hold <div>"),
        ("<p>x<span><ul><li>y</li></ul></span></p>", "<span> may not hold <ul>"),
        ("<h2><p>x</p></h2>", "<h2> may not hold <p>"),
        ("<details><summary><div>x</div></summary></details>", "<summary> may not hold <div>"),
        ("<details><p>x</p><summary>y</summary></details>", "<summary> is not the first in <details>"),
        ("<table><div>x</div></table>", "<table> may not hold <div>"),
        ("<table><td>x</td></table>", "<table> may not hold <td>"),
        (
            "<table><tbody><tr><td>x</td></tr></tbody><caption>y</caption></table>",
            "<caption> is not the first in <table>",
        ),
        ("<table><tbody><tr>x<td>y</td></tr></tbody></table>", "text 'x' directly in <tr>"),
        ("<table><thead><th>x</th></thead></table>", "<thead> may not hold <th>"),
        ("<ul><p>x</p></ul>", "<ul> may not hold <p>"),
        ("<li>x</li>", "<li> may not stand in <body>"),
        ("<dl><p>x</p></dl>", "<dl> may not hold <p>"),
        ("<figcaption>x</figcaption>", "<figcaption> may not stand in <body>"),
        ("<title>x</title>", "<title> may not stand in <body>"),
        ('<a href="/">x<a href="/">y</a></a>', "<a> may not hold <a>"),
        ("<button><a href='/'>x</a></button>", "<button> may not hold <a>"),
        ('<p id="a">x</p>\n<p id="a">y</p>', "id 'a' again, first in line 3"),
        ('<p id="a b">x</p>', "an id that is empty or holds spaces: 'a b'"),
        ('<p id="">x</p>', "an id that is empty or holds spaces: ''"),
        ('<a href="#gone">x</a>', "href points to #gone, which is not there"),
        ('<label for="gone">x</label>', "for points to #gone"),
        ('<section aria-labelledby="gone">x</section>', "aria-labelledby points to #gone"),
        ('<p aria-describedby="gone">x</p>', "aria-describedby points to #gone"),
        ('<svg><rect fill="url(#gone)"/></svg>', "fill points to #gone"),
        ("<svg><g></svg>", "</svg> closes it before <g> of line 3 is closed"),
        ("<svg><div>x</div></svg>", "<div> breaks out of <svg>"),
        ("<p>1 < 2</p>", "a bare <"),
        ("<p>AT&T</p>", "&T; is no entity"),
        ("<p>x</p><?php ?>", "a processing instruction"),
        ("<!doctype html>", "is not the one doctype at the start"),
    ],
)
def test_what_is_wrong_with_a_text_is_named(main: str, fault: str) -> None:
    found = malformed(document(main))
    assert any(fault in line for line in found), found


def test_a_whole_document_is_asked_for() -> None:
    assert malformed("<p>x</p>") == [
        "line 1: no doctype at the start",
        "line 1: <p> outside <html>",
        "line 1: 0 titles, not one",
    ]
    assert "line 4: <section> is never closed" in malformed(document("\n<section>").partition("</body>")[0])


# -- the browser -----------------------------------------------------------------------------------------------

BOTH = {"light", "dark"}
DARK = "@media (prefers-color-scheme: dark) "
CHART = '<svg viewBox="0 0 9 9" width="90" role="img" aria-label="A chart"><path d="M0 0H9"/></svg>'
TABLE = "<table><caption>Numbers</caption><tbody><tr><td>1</td></tr></tbody></table>"
PLANTED = {
    "clean": document(CLEAN),
    "console": document("<h1>x</h1><script>console.error('planted', 7)</script>"),
    "exception": document("<h1>x</h1><script>throw new Error('planted')</script>"),
    "policy": document(
        '<h1>x</h1><p style="color: red">y</p>',
        head="<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'sha256-x'\">",
    ),
    "missing": document('<h1>x</h1><img alt="" src="gone.png">'),
    "elsewhere": document('<h1>x</h1><img alt="" src="http://example.org/a.png">'),
    "overflow": document('<h1>x</h1><div class="scroll"><div class="wide">y</div></div><div class="wide" id="far">z</div>'),
    "word": document(f'<h1>x</h1><p id="long">{"y" * 60}</p>'),
    "folded": document('<h1>x</h1><details><summary>y</summary><div class="wide">z</div></details>'),
    "light": document('<h1>x</h1><p id="a">y</p>', f"#a {{ color: #aaa; }} {DARK}{{ #a {{ color: #eee; }} }}"),
    "dark": document('<h1>x</h1><p id="a">y</p>', f"{DARK}{{ #a {{ color: #444; }} }}"),
    "alpha": document('<h1>x</h1><div id="a"><p>y</p></div>', "#a { opacity: 0.3; }"),
    "ground": document(
        '<h1>x</h1><p id="a">y</p><p id="b">z</p>',
        "#a { background: rgb(0 0 0 / 50%); color: #777; } #b { background: linear-gradient(#fff, #777); color: #777; }",
    ),
    "large": document('<h1>x</h1><p id="a">y</p><p id="b">z</p>', "p { background: #fff; color: #888; } #a { font-size: 24px; }"),
    "pseudo": document('<h1>x</h1><p id="a">y</p>', "#a::before { content: 'z'; background: #fff; color: #ddd; }"),
    "folded-text": document("<h1>x</h1><details><summary>y</summary><p id='a'>z</p></details>", "#a { color: #777; }"),
    "svg": document(
        '<h1>x</h1><svg viewBox="0 0 99 20" width="99"><rect fill="#000" width="40" height="20"/>'
        '<text id="a" x="5" y="15" fill="#222">y</text><text id="b" x="50" y="15" fill="#777">z</text></svg>',
        "svg { background: #fff; }",
    ),
    "table": document(
        f"<h1>x</h1><section id='a'><h2>y</h2><figure>{CHART}</figure></section><section><h2>z</h2>{TABLE}</section>"
        f"<h2>y</h2><figure id='b'>{CHART}</figure><h2>z</h2>{TABLE}"
        f"<h2>y</h2><figure id='c'>{CHART}</figure><details><summary>z</summary>{TABLE}</details>"
    ),
    "outline": document(
        '<h2 id="a">x</h2><h1 id="b">y</h1><h3 id="c">z</h3><p id="d">1</p><p id="d">2</p><img src="data:,"><a href="/"> </a>'
    ).replace(' lang="en"', ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Seen]]:
    """Every planted page, in both themes, at one width; looked at once."""
    assert CHROMIUM is not None
    root = tmp_path_factory.mktemp("site")
    for name, text in PLANTED.items():
        (root / f"{name}.html").write_text(text, encoding="utf-8")
    seen = look(CHROMIUM, root, [f"{name}.html" for name in PLANTED], widths=(360,))
    return {name: [s for s in seen if s.page == f"{name}.html"] for name in PLANTED}


@pytest.fixture
def seen(views: dict[str, list[Seen]]) -> Callable[[str], Seen]:
    return lambda name: views[name][0]


@in_browser
def test_a_clean_page_has_no_faults_in_either_theme(views: dict[str, list[Seen]]) -> None:
    assert {s.theme for s in views["clean"]} == BOTH
    assert [s.faults() for s in views["clean"]] == [[], []]


@in_browser
@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("console", "console.error: planted 7"),
        ("exception", "exception: Error: planted"),
        ("policy", "Content Security Policy"),
        ("missing", "gone.png: net::ERR_FILE_NOT_FOUND"),
        ("elsewhere", "load from elsewhere: http://example.org/a.png"),
    ],
)
def test_complaints_are_heard(seen: Callable[[str], Seen], page: str, said: str) -> None:
    assert any(said in line for line in seen(page).console), seen(page)
    assert all(line.startswith("console: ") for line in seen(page).faults())


@in_browser
@pytest.mark.parametrize(
    ("page", "selector"), [("overflow", "div#far.wide (+"), ("word", "p#long (+"), ("folded", "div.wide (+")]
)
def test_overflow_is_measured_and_its_cause_named(seen: Callable[[str], Seen], page: str, selector: str) -> None:
    assert seen(page).overflow_px > 50
    assert [selector in w for w in seen(page).widest] == [True]


@in_browser
@pytest.mark.parametrize(
    ("page", "low"),
    [
        ("light", {"light": {"p#a": 2.32}, "dark": {}}),
        ("dark", {"light": {}, "dark": {"p#a": 1.93}}),
        ("large", {"light": {"p#b": 3.54}, "dark": {"p#b": 3.54}}),
        ("pseudo", {"light": {"p#a::before": 1.35}, "dark": {"p#a::before": 1.35}}),
        ("folded-text", {"light": {"p#a": 4.47}, "dark": {"p#a": 4.21}}),
        ("svg", {"light": {"text#a": 1.31, "text#b": 4.47}, "dark": {"text#a": 1.31, "text#b": 4.47}}),
    ],
)
def test_contrast_below_what_is_needed_is_found(
    views: dict[str, list[Seen]], page: str, low: dict[str, dict[str, float]]
) -> None:
    assert {s.theme: {c.selector: c.ratio for c in s.contrast} for s in views[page]} == low


@in_browser
def test_contrast_counts_opacity_and_what_shines_through(views: dict[str, list[Seen]]) -> None:
    assert [[c.selector for c in s.contrast] for s in views["alpha"]] == [["div#a > p"], ["div#a > p"]]
    light = views["ground"][0]
    assert [(c.selector, c.ratio, c.text) for c in light.contrast] == [("p#a", 1.12, "y"), ("p#b", 1.0, "z")]


@in_browser
def test_a_chart_needs_a_table_after_it_in_its_own_section(seen: Callable[[str], Seen]) -> None:
    assert seen("table").charts_without_table == ("section#a > figure > svg", "figure#b > svg")


@in_browser
def test_the_outline_is_read(seen: Callable[[str], Seen]) -> None:
    page = seen("outline")
    assert (page.h1, page.lang, page.duplicate_ids, page.unnamed_images) == (1, "", ("d",), ("img",))
    assert page.skipped_headings == ('h2#a "x"', 'h3#c "z"')
    assert len(page.empty_links) == 1
    assert len(page.faults()) == 6


@in_browser
def test_pictures_show_the_whole_page(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "a.html").write_text(document('<h1>x</h1><p id="a">y</p>', "#a { height: 2000px; }"), encoding="utf-8")
    look(CHROMIUM, tmp_path, ["a.html"], widths=(500,), themes=("dark",), screenshots=tmp_path / "pictures")
    picture = (tmp_path / "pictures" / "a.html-dark-500.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20]) == 500
    assert int.from_bytes(picture[20:24]) > 2000


def test_a_page_that_is_not_there_starts_no_browser(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        look("/no/browser", tmp_path, ["gone.html"])


def test_a_browser_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(document(), encoding="utf-8")
    fake = _program(tmp_path / "fake", "echo cannot open display >&2")
    with pytest.raises(BrowserError, match="has ended; it said: cannot open display"):
        look(str(fake), tmp_path, ["a.html"])


def test_a_browser_that_never_answers_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "SECONDS_TO_START", 1.0)
    monkeypatch.setattr(browser, "SECONDS_TO_END", 0.1)
    (tmp_path / "a.html").write_text(document(), encoding="utf-8")
    fake = _program(tmp_path / "fake", f"sleep 60 & echo $! > {tmp_path / 'child'}; wait")
    opened = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(BrowserError, match="did not answer in time"):
        look(str(fake), tmp_path, ["a.html"])
    assert len(list(Path("/dev/fd").iterdir())) == opened
    assert not _runs(int((tmp_path / "child").read_text()))


def _program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
