"""feed.atom: what happened on a site, latest first, as Atom 1.0 (RFC 4287).

Ids are made from the log alone, so that they stay what they are when the log grows, the site moves, or its title changes.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time
from xml.etree import ElementTree

from weighbridge.publish.entries import FIRST, ReportEntry, StatementEntry, StatementKind
from weighbridge.publish.log import Log
from weighbridge.publish.site import Site
from weighbridge.report.html import WORDS
from weighbridge.report.junit import clean

PATH = "feed.atom"
ATOM = "http://www.w3.org/2005/Atom"
MOST = 100  # happenings; a reader that was away for longer has the log
_EMAIL = re.compile(r"[^@\s:/]+@[^@\s:/]+")
# Controls, and characters that change the direction or the place of those around them.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_SAID: dict[StatementKind, str] = {
    "dispute_opened": "{by} opened a dispute about {name}, {night}",
    "reply": "{by} replied about {name}, {night}",
    "re_run": "{name}, {night}, was run again: {by}",
    "resolved": "The dispute about {name}, {night}, is resolved: {by}",
    "correction": "Correction about {name}, {night}: {by}",
}


@dataclass(frozen=True)
class _Happening:
    index: int  # of the entry in the log that made it known
    at: datetime
    title: str
    summary: str
    path: str


def plain(text: str) -> str:
    """Text without what XML cannot hold and without what would change how its surroundings are read; line feeds stay."""
    return _UNSHOWN.sub("\ufffd", clean(text.replace("\r\n", "\n").replace("\r", "\n")))


def on_one_line(text: str) -> str:
    """The same on one line."""
    return " ".join(plain(text).split())


def feed(site: Site) -> bytes:
    """The latest happenings: first reports, verdicts other than the night before's, what was judged again, and statements."""
    happenings = sorted([*_reports(site.log), *_statements(site.log)], key=lambda h: h.index, reverse=True)[:MOST]
    base = site.settings.base_url
    name = _log_name(site.log)
    updated = max((h.at for h in happenings), default=datetime.combine(site.settings.today, time(), UTC))
    root = ElementTree.Element("feed", xmlns=ATOM)
    _add(root, "title", on_one_line(site.settings.title), type="text")
    _add(root, "id", name)
    _add(root, "updated", _rfc3339(updated))
    if base is not None:
        _add(root, "link", rel="self", type="application/atom+xml", href=_address(base, PATH))
    _add(root, "link", rel="alternate", type="text/html", href=_address(base, "index.html"))
    author = _add(root, "author")
    _add(author, "name", on_one_line(site.settings.title))
    if site.settings.contact is not None and _EMAIL.fullmatch(site.settings.contact):
        _add(author, "email", plain(site.settings.contact))
    for happening in happenings:
        entry = _add(root, "entry")
        _add(entry, "title", on_one_line(happening.title), type="text")
        _add(entry, "id", f"{name}:{happening.index}")
        _add(entry, "updated", _rfc3339(happening.at))
        _add(entry, "link", rel="alternate", type="text/html", href=_address(base, happening.path))
        _add(entry, "summary", plain(happening.summary), type="text")
    ElementTree.indent(root, " ")
    data: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _address(base: str | None, path: str) -> str:
    return path if base is None else f"{base.rstrip('/')}/{path}"


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _log_name(log: Log) -> str:
    """What the log is called for ever: the hash of its first line, which the second one names."""
    first = log.entries[1].previous if len(log.entries) > 1 else log.head if log.entries else FIRST
    return f"urn:weighbridge:log:{first}"


def _reports(log: Log) -> Iterator[_Happening]:
    """Standing reports that say something new."""
    replaced = {report.supersedes for report in log.reports()}
    by_index = {report.index: report for report in log.reports()}
    before: dict[str, ReportEntry] = {}
    for report in sorted(log.reports(), key=lambda r: (r.created_at, r.index)):
        if report.index in replaced:
            continue
        earlier = before.get(report.slug)
        before[report.slug] = report
        corrected = by_index.get(report.supersedes) if report.supersedes is not None else None
        if corrected is not None and _said(corrected) != _said(report):
            note = f"judged again, before: {_said(corrected)}"
        elif earlier is None:
            note = "first report"
        elif _said(earlier) != _said(report):
            note = f"on {earlier.night}: {_said(earlier)}"
        else:
            continue
        title = f"{report.endpoint}, {report.night}: {_said(report)} ({note})"
        yield _Happening(report.index, report.at, title, report.sentence, f"{report.folder}/report.html")


def _said(report: ReportEntry) -> str:
    cause = "" if report.cause is None else f", cause: {report.cause.replace('_', ' ')}"
    return WORDS[report.verdict].lower() + cause


def _statements(log: Log) -> Iterator[_Happening]:
    by_index = {report.index: report for report in log.reports()}
    for entry in log.entries:
        if not isinstance(entry, StatementEntry):
            continue
        about = by_index[entry.about]
        title = _SAID[entry.what].format(by=entry.by, name=about.endpoint, night=about.night)
        summary = "\n".join(part for part in (entry.text, entry.link) if part is not None)
        yield _Happening(entry.index, entry.at, title, summary or title, f"endpoints/{about.slug}/index.html")
