"""The badge of an endpoint: an SVG of 20 px height with what its latest report says, under which policy, and until when.

It brings its own background, so that it can be read on any, and says in words and by a mark what it says in colour.
"""

from xml.etree import ElementTree

from weighbridge.publish.feed import on_one_line
from weighbridge.publish.site import EndpointPage
from weighbridge.report.html import MARKS, WORDS

HEIGHT = 20
_NAME = "weighbridge"
_PAD = 7
_MARK = 20  # the square that the mark stands in
_MOST_POLICY = 24  # characters of a policy's name
_MOST_TITLE = 1000
_SVG = "http://www.w3.org/2000/svg"
_FONT = "Verdana, 'DejaVu Sans', Geneva, sans-serif"
_INK, _PAPER, _WHITE, _EDGE, _GREY = "#1d2733", "#f4f6f8", "#ffffff", "#8b95a0", "#566270"
_COLOURS = {
    "consistent": "#1c5e3b", "differs": "#8c2416", "differs_replicated": "#8c2416", "inconclusive": "#6b5200",
}  # fmt: skip
# Advance widths of Verdana at 11 px, in tenths of a pixel; any other character counts as a wide one.
_WIDTHS = {
    **dict.fromkeys("ijl", 31), **dict.fromkeys("fI·.,: ", 40), **dict.fromkeys("rt()-/", 48), **dict.fromkeys("csJz", 58),
    **dict.fromkeys("abdeghknopquvxy0123456789_", 70), **dict.fromkeys("ABCDEFGHKLNOPQRSTUVXYZ–?≠", 84), **dict.fromkeys("wmMW", 110),
}  # fmt: skip
_WIDEST = 120


def badge(page: EndpointPage) -> bytes:
    """The badge of one endpoint. Once its report has expired, it says so and nothing else about it."""
    verdict = page.latest.verdict
    mark, colour = ("–", _GREY) if page.expired else (MARKS[verdict], _COLOURS[verdict])
    words = _words(page)
    left, right = _width(_NAME) + 2 * _PAD, _width(words) + 2 * _PAD
    width = left + _MARK + right
    root = ElementTree.Element("svg", xmlns=_SVG, width=str(width), height=str(HEIGHT), role="img")
    root.set("viewBox", f"0 0 {width} {HEIGHT}")
    sentence = "" if page.expired else f". {on_one_line(page.latest.sentence)}"
    _add(root, "title", f"{on_one_line(page.name)}: Weighbridge: {mark} {words}{sentence}")
    _rectangle(root, 0, left, _INK)
    _rectangle(root, left, _MARK, colour)
    _rectangle(root, left + _MARK, right, _PAPER)
    _add(root, "rect", x="0.5", y="0.5", width=str(width - 1), height=str(HEIGHT - 1), fill="none", stroke=_EDGE)
    texts = _add(root, "g")
    for name, value in {"font-family": _FONT, "font-size": "11", "text-anchor": "middle"}.items():
        texts.set(name, value)
    _text(texts, _NAME, left / 2, _WHITE, fitted=True)
    _text(texts, mark, left + _MARK / 2, _WHITE, fitted=False)
    _text(texts, words, left + _MARK + right / 2, _GREY if page.expired else _INK, fitted=True)
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _words(page: EndpointPage) -> str:
    if page.expired:
        parts = ["expired", f"was valid until {page.valid_until}"]
    else:
        until = f"{page.latest.night}, until {page.valid_until}"
        parts = [WORDS[page.latest.verdict].lower(), _policy(page.latest.policy), until]
    return " · ".join([*parts, *(["disputed"] if page.dispute == "open" else [])])


def _policy(name: str) -> str:
    name = on_one_line(name)
    return name if len(name) <= _MOST_POLICY else f"{name[: _MOST_POLICY - 1]}…"


def _width(text: str) -> int:
    """An upper estimate, in whole pixels; the text is fitted to it, whatever font there is."""
    return -(-sum(_WIDTHS.get(character, _WIDEST) for character in text) // 10)


def _rectangle(parent: ElementTree.Element, x: int, width: int, fill: str) -> None:
    _add(parent, "rect", x=str(x), width=str(width), height=str(HEIGHT), fill=fill)


def _text(parent: ElementTree.Element, text: str, x: float, fill: str, *, fitted: bool) -> None:
    element = _add(parent, "text", text, x=f"{x:g}", y="14", fill=fill)
    if fitted:
        element.set("textLength", str(_width(text)))
        element.set("lengthAdjust", "spacingAndGlyphs")


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = None if text is None else text[:_MOST_TITLE]
    return element
