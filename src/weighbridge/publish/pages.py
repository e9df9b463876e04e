"""The pages of a site: HTML for people, and for each page a twin in Markdown with the same content.

Whatever comes from outside is hostile. In HTML every variable is escaped, in Markdown every variable goes through `markdown_text`; only
what this module and `charts` made of numbers, dates and escaped text is let through as it is.
"""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from markupsafe import Markup, escape

from weighbridge.judge.checks import prose
from weighbridge.paths import data_path
from weighbridge.publish.charts import Guide, Point, distance_chart, glyph, line_chart, number, strip, trusted
from weighbridge.publish.entries import ReportEntry, StatementEntry
from weighbridge.publish.site import EndpointPage, MethodPage, ModelPage, Site
from weighbridge.records import AXES, Axis, Effect, Finding, Policy, VerdictWord
from weighbridge.report.html import MARKS

WORDS: dict[VerdictWord, str] = {
    "consistent": "Consistent", "inconclusive": "Not verified", "differs": "Differs, one night",
    "differs_replicated": "Differs, replicated",
}  # fmt: skip
ORDER: tuple[VerdictWord, ...] = ("consistent", "inconclusive", "differs", "differs_replicated")
STANDING_WORDS: dict[VerdictWord, str] = {
    "consistent": "consistent", "inconclusive": "not verified", "differs": "differing", "differs_replicated": "differing (replicated)",
}  # fmt: skip
DISPUTE_WORDS = {
    "open": "Dispute open", "answered": "Disputed, with a reply", "re-run": "Disputed, audited again", "resolved": "Dispute resolved",
}  # fmt: skip
STATEMENT_WORDS = {
    "dispute_opened": "Dispute opened", "reply": "Reply", "re_run": "Audited again", "resolved": "Dispute resolved", "correction": "Correction",
}  # fmt: skip
LATEST_STATEMENTS = 8
STATEMENT_CHARACTERS = 280  # of a statement on the front page
_AXIS_ASKS = {
    "route": "Who answered", "prompt": "Is the prompt ours", "sampling": "Is the sampling ours",
    "weights": "Are the weights the weights", "share": "For all requests, or for some", "service": "Does it serve well",
}  # fmt: skip
# Which recorded departures a distance is seen against: of each kind the one with the plainest name.
_GUIDE_KINDS = (("int8", "q8", "w8a8-int8"), ("fp8", "w8a8-fp8"), ("q4", "int4", "nf4", "mxfp4", "nvfp4"))
# What the descriptions in `Policy` leave to their names.
_MEANINGS = {
    "direction_floor_cosine": "no endpoint is held to a smaller cosine with a recorded departure than this",
    "direction_margin_cosine": "what is added to the largest mean cosine of an honest stack before a direction counts",
    "family_cosine": "a class of departures is named where the lower end of the cosine's interval is at least this",
}
_SOURCE = "the policy"
_MARKDOWN = re.compile(r"[\\`*_{}\[\]#|~!$@^]|^[-+=:]|\.(?=[^\W\d])|:(?=//)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s|$)")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_PLAIN_CODE = re.compile(r"[A-Za-z0-9_.:/-]+")
_MAIL = re.compile(r"[A-Za-z0-9._-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")


def pages(site: Site) -> dict[str, bytes]:
    """Every page of a site and its style sheet.

    Parameters
    ----------
    site : Site
        What is shown; nothing else is read, neither a clock nor the network.

    Returns
    -------
    dict of str to bytes
        By the path from the site's root, such as ``endpoints/NAME/index.html``; each page with its ``index.md``.
    """
    made = {"style.css": (data_path("publish/templates") / "style.css").read_bytes()}
    book = _Book(site)
    _add(made, book, "", "index", _index(book))
    for page in site.endpoints:
        _add(made, book, f"endpoints/{page.slug}/", "endpoint", _endpoint(book, page))
    for model in site.models:
        _add(made, book, f"models/{model.slug}/", "model", _model(model))
    for method in site.methods:
        _add(made, book, f"methods/{method.slug}/", "method", _method(method))
    _add(made, book, "reading/", "reading", {"sections": _reading()})
    return made


def markdown_text(text: str) -> str:
    """Text from outside as it may stand in a line of Markdown: no mark-up of its own comes through.

    Parameters
    ----------
    text : str
        Line breaks and control characters become spaces, other non-printable ones U+FFFD.
    """
    line = " ".join(printable(text).split())
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", line)).translate(_ENTITIES)


def printable(text: str) -> str:
    """Text without control characters and without those that turn or hide others; line feeds stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c.isspace() or c < " " or c == "\x7f" else "\ufffd" for c in text
    )


def https_only(link: str | None) -> str | None:
    """A link that may be followed, with everything quoted that could end it; None for any other scheme than https."""
    if link is None or not link.isprintable():
        return None
    try:
        parts = urlsplit(link)
    except ValueError:
        return None
    return quote(link, safe=":/?#&=%+,;@!~$*[]") if parts.scheme == "https" and parts.hostname else None


# -- rendering -------------------------------------------------------------------------------------------------


class _Book:
    """A site, and what its pages look up in it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.reports = {entry.index: entry for entry in site.log.reports()}
        self.replaced_by = {r.supersedes: r for r in self.reports.values() if r.supersedes is not None}
        self.model_slugs = {model.name: model.slug for model in site.models}
        self.method_slugs = {
            (m.entry.weighbridge_version, m.entry.policy.id, m.entry.policy.version): m.slug for m in site.methods
        }
        self.policies = {(m.entry.policy.id, m.entry.policy.version): m.entry.policy for m in site.methods}

    def requires(self, report: ReportEntry) -> list[Axis]:
        """The axes that the policy of a report requires."""
        policy = self.policies.get((report.policy, report.policy_version))
        return [] if policy is None else policy.requires

    def method(self, report: ReportEntry) -> str | None:
        """The folder of the method by which a report was judged."""
        return self.method_slugs.get((report.weighbridge_version, report.policy, report.policy_version))


def _add(made: dict[str, bytes], book: _Book, folder: str, template: str, content: dict[str, Any]) -> None:
    settings = book.site.settings
    contact, root = settings.contact, "../" * folder.count("/")
    updated = book.site.updated
    common = {
        "updated": updated.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if updated is not None else None,
        "root": root, "root_md": trusted(root), "site": book.site, "settings": settings, "marks": MARKS, "words": WORDS, "prose": prose(),
        "home": template == "index", "legend": [(glyph(v), WORDS[v]) for v in ORDER],
        "mail": contact if contact is not None and _MAIL.fullmatch(contact) else None, "contact_link": https_only(contact),
    }  # fmt: skip
    for suffix, environment in (("html", _html()), ("md", _markdown())):
        page = environment.get_template(f"{template}.{suffix}").render(common | content)
        made[f"{folder}index.{suffix}"] = page.encode()


def _safe_html(value: Any) -> Any:
    return value if isinstance(value, Markup | int | float | jinja2.Undefined) else printable(str(value))


def _safe_markdown(value: Any) -> Any:
    return value if isinstance(value, Markup | int | float | jinja2.Undefined) else markdown_text(str(value))


@lru_cache(maxsize=1)
def _html() -> jinja2.Environment:
    return _environment(autoescape=True, finalize=_safe_html)


@lru_cache(maxsize=1)
def _markdown() -> jinja2.Environment:
    return _environment(autoescape=False, finalize=_safe_markdown)


def _environment(**how: Any) -> jinja2.Environment:
    environment = jinja2.Environment(  # noqa: S701 -- Markdown escapes by `markdown_text` instead
        loader=jinja2.FileSystemLoader(data_path("publish/templates")), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, auto_reload=False, keep_trailing_newline=True, **how,
    )  # fmt: skip
    environment.filters |= {
        "number": _number,
        "word": _word,
        "counted": _counted,
        "code": _code,
        "path": _path,
        "line": trusted,
        "md_link": _md_link,
    }
    return environment


def _number(value: float | None) -> Markup:
    return trusted(_plain(value))


def _plain(value: float | None) -> str:
    return "–" if value is None else number(value)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _word(value: str | None) -> str:
    return "–" if value is None else value.replace("_", " ")


def _code(value: str) -> str:
    """A digest or a name as a code span of Markdown, where nothing in it could end the span."""
    return trusted(f"`{value}`") if _PLAIN_CODE.fullmatch(value) else markdown_text(value)


def _path(value: str) -> Markup:
    """A path inside the site as a link of Markdown may hold it."""
    return trusted(quote(value))


def _md_link(link: str) -> Markup:
    """A link that `https_only` has let through."""
    return trusted(f"[{markdown_text(link)}](<{link}>)")


# -- the front page --------------------------------------------------------------------------------------------


def _index(book: _Book) -> dict[str, Any]:
    site = book.site
    groups: dict[tuple[str, int, str], list[EndpointPage]] = {}
    for page in site.endpoints:
        groups.setdefault((page.latest.policy, page.latest.policy_version, page.model), []).append(page)
    told = [(page, s) for page in site.endpoints for s in page.statements]
    told.sort(key=lambda pair: -pair[1].index)
    return {
        "groups": [_group(book, *key, own) for key, own in sorted(groups.items())],
        "tally": [
            (glyph(v), MARKS[v], WORDS[v], sum(p.latest.verdict == v for p in site.endpoints)) for v in ORDER
        ],
        "statements": [
            {"page": page, **_statement(book, s, STATEMENT_CHARACTERS)} for page, s in told[:LATEST_STATEMENTS]
        ],
        "methods": [(m, m.slug) for m in site.methods],
        "reports": len(book.reports),
        "rule": "Consistent ones first, then those not verified, then those that differ; within a verdict by name. No number orders them, and there is no score.",
    }  # fmt: skip


def _group(book: _Book, policy_id: str, version: int, model: str, own: list[EndpointPage]) -> dict[str, Any]:
    policy = book.policies.get((policy_id, version))
    return {
        "policy": policy_id, "version": version, "title": policy.title if policy is not None else None, "model": model,
        "model_slug": book.model_slugs.get(model), "method_slug": book.method(own[0].latest), "rows": _rows(own),
    }  # fmt: skip


def _rows(own: Sequence[EndpointPage]) -> list[dict[str, Any]]:
    """The endpoints of one table in the order that the page states, their distances on one scale."""
    ordered = sorted(own, key=lambda p: (ORDER.index(p.latest.verdict), p.name.casefold(), p.slug))
    seen = [
        x for p in own for x in (p.latest.noise_nats, p.latest.noise_low_nats, p.latest.noise_high_nats, _limit(p)) if x
    ]
    return [_row(page, min(seen), max(seen)) if seen else _row(page, 1.0, 1.0) for page in ordered]


def _row(page: EndpointPage, least: float, most: float) -> dict[str, Any]:
    report = page.latest
    return {
        "page": page, "report": report, "mark": MARKS[report.verdict], "words": WORDS[report.verdict], "cause": _cause(report),
        "strip": strip(_point(report), _limit(page), least, most) if report.noise_nats else None,
        "interval": _interval(report), "level": report.level, "nights": _standing(page),
        "dispute": _dispute(page),
        "corrected": any(s.what == "correction" for s in page.statements),
    }  # fmt: skip


def _standing(page: EndpointPage) -> str:
    counts = page.standing
    each = ", ".join(f"{counts[word]} {STANDING_WORDS[word]}" for word in ORDER if counts.get(word))
    return f"{_counted(len(page.nights), 'night')}: {each}"


def _dispute(page: EndpointPage) -> str | None:
    if page.dispute == "answered" and all(s.what != "dispute_opened" for s in page.statements):
        return "With a reply"
    return DISPUTE_WORDS[page.dispute] if page.dispute is not None else None


def _cause(report: ReportEntry) -> str | None:
    if report.cause is None:
        return None
    words = _word(report.cause)
    return f"{words} ({report.exact_variant})" if report.exact_variant is not None else words


# -- statements ------------------------------------------------------------------------------------------------


def _statement(book: _Book, statement: StatementEntry, most: int | None = None) -> dict[str, Any]:
    text = statement.text
    if text is not None and most is not None and len(text) > most:
        text = text[: most - 1] + "…"
    about, again = (
        book.reports.get(index) if index is not None else None for index in (statement.about, statement.report)
    )
    return {
        "title": STATEMENT_WORDS[statement.what], "by": statement.by, "at": statement.at.date(), "text": text,
        "link": https_only(statement.link), "about": about, "again": again,
    }  # fmt: skip


# -- an endpoint -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    """One finding, in words."""

    finding: Finding
    title: str
    mark: str
    effects: list[str]
    measures: str | None
    does_not_prove: str | None
    fix: str | None

    @classmethod
    def of(cls, finding: Finding) -> "_Check":
        text = prose().get(finding.check)
        effects = [_effect(e) for e in finding.effects]
        if finding.log10_e_value is not None:
            effects.append(f"evidence against honest: e = 10^{finding.log10_e_value:.1f}")
        return cls(
            finding, text.title if text else finding.check, MARKS[finding.outcome], effects,
            text.measures if text else None, text.does_not_prove if text else None,
            text.fix if text and finding.outcome == "inconsistent" else None,
        )  # fmt: skip


def _endpoint(book: _Book, page: EndpointPage) -> dict[str, Any]:
    report, verdict = page.latest, page.evidence.verdict
    checks = [_Check.of(finding) for finding in page.evidence.findings.findings]
    limit, guides = _limit(page), _guides(page)
    root = "../../"
    chart = distance_chart(
        [_point(r) for r in page.nights], limit, guides, [date.fromisoformat(c.began) for c in page.changes]
    )
    return {
        "page": page, "report": report, "verdict": verdict, "mark": MARKS[report.verdict], "word": WORDS[report.verdict],
        "cause": _cause(report), "checks": checks, "open_checks": [c for c in checks if c.finding.outcome not in ("consistent", "inconsistent")],
        "axes": [(axis, _AXIS_ASKS[axis], report.axes.get(axis)) for axis in AXES], "requires": book.requires(report),
        "chart": chart, "limit": limit, "guides": guides, "undrawn": sum(not r.noise_nats for r in page.nights),
        "night_rows": _night_rows(page.nights, root), "night_lines": _night_lines(page.nights, root),
        "speed_charts": _speed_charts(page.nights), "speed_rows": _speed_rows(page.nights), "speed_lines": _speed_lines(page.nights),
        "statements": [_statement(book, s) for s in page.statements],
        "dispute": _dispute(page),
        "superseded": [(r, book.replaced_by.get(r.index)) for r in page.superseded], "recent": page.nights[-6:-1][::-1],
        "standing": _standing(page), "model_slug": book.model_slugs.get(page.model), "method_slug": book.method(report),
        "badge": _badge(book.site.settings.base_url, page.slug),
    }  # fmt: skip


def _weights(page: EndpointPage) -> dict[str, Any]:
    return next((f.details for f in page.evidence.findings.findings if f.check == "weights"), {})


def _limit(page: EndpointPage) -> float | None:
    """What an honest stack is allowed, as the latest report states it."""
    limit = _weights(page).get("null_scale_nats")
    return float(limit) if isinstance(limit, int | float) and limit > 0 else None


def _guides(page: EndpointPage) -> list[Guide]:
    ladder = _weights(page).get("ladder", [])
    recorded = [
        (str(row["stack"]), float(row["noise_nats"])) for row in ladder if row["departure"] == "precision" and row["noise_nats"] > 0
    ]  # fmt: skip
    guides = []
    for kinds in _GUIDE_KINDS:
        named = sorted((len(name), name, nats) for name, nats in recorded if name.startswith(kinds))
        guides += [Guide(name, nats) for _, name, nats in named[:1]]
    return guides


def _point(report: ReportEntry) -> Point:
    return Point(report.night, report.verdict, report.noise_nats, report.noise_low_nats, report.noise_high_nats)


def _effect(effect: Effect) -> str:
    unit = "" if effect.unit == "1" else f" {effect.unit}"
    interval = ""
    if effect.low is not None and effect.high is not None:
        share = f", {100 * effect.confidence:.0f} %" if effect.confidence else ""
        interval = f" ({number(effect.low)} to {number(effect.high)}{share})"
    return f"{effect.name}: {number(effect.value)}{unit}{interval}"


def _badge(base_url: str | None, slug: str) -> Markup:
    base = base_url.rstrip("/") if base_url is not None and _PLAIN_CODE.fullmatch(base_url) else "https://ADDRESS"
    return trusted(f"[![Weighbridge: {slug}]({base}/endpoints/{slug}/badge.svg)]({base}/endpoints/{slug}/)")


# Hundreds of rows a page: they are put together here, of numbers, dates, checked names and escaped text.


def _night_rows(nights: Sequence[ReportEntry], root: str) -> Markup:
    said = {(r.verdict, r.cause, r.exact_variant): escape(_said(r)) for r in nights}
    return trusted(
        "\n".join(
            f'<tr><th scope="row"><a href="{root}{(folder := r.folder)}/report.html">{r.night}</a></th>'
            f"<td>{said[r.verdict, r.cause, r.exact_variant]}</td>"
            f'<td class="number">{_plain(r.noise_nats)}</td><td class="number">{_interval(r)}</td><td class="number">{r.answers_used}</td>'
            f'<td><a href="{root}{folder}/evidence.zip" aria-label="evidence.zip of {r.night}">evidence.zip</a></td></tr>'
            for r in reversed(nights)
        )
    )


def _night_lines(nights: Sequence[ReportEntry], root: str) -> Markup:
    said = {(r.verdict, r.cause, r.exact_variant): markdown_text(_said(r)) for r in nights}
    return trusted(
        "\n".join(
            f"| [{r.night}]({root}{(folder := r.folder)}/report.html) | {said[r.verdict, r.cause, r.exact_variant]} "
            f"| {_plain(r.noise_nats)} | {_interval(r)} | {r.answers_used} | [evidence.zip]({root}{folder}/evidence.zip) |"
            for r in reversed(nights)
        )
    )


def _said(report: ReportEntry) -> str:
    cause = _cause(report)
    return f"{MARKS[report.verdict]} {WORDS[report.verdict]}" + (f": {printable(cause)}" if cause is not None else "")


def _interval(report: ReportEntry) -> str:
    if report.noise_low_nats is None or report.noise_high_nats is None:
        return "–"
    return f"{number(report.noise_low_nats)} to {number(report.noise_high_nats)}"


def _speed_rows(nights: Sequence[ReportEntry]) -> Markup:
    return trusted(
        "\n".join(
            f'<tr><th scope="row">{r.night}</th><td class="number">{_plain(r.latency_s)}</td><td class="number">{_plain(r.first_token_s)}</td>'
            f'<td class="number">{_plain(r.tokens_per_s)}</td><td class="number">{r.errors} of {r.requests_sent}</td></tr>'
            for r in reversed(nights)
        )
    )


def _speed_lines(nights: Sequence[ReportEntry]) -> Markup:
    return trusted(
        "\n".join(
            f"| {r.night} | {_plain(r.latency_s)} | {_plain(r.first_token_s)} | {_plain(r.tokens_per_s)} | {r.errors} of {r.requests_sent} |"
            for r in reversed(nights)
        )
    )


def _speed_charts(nights: Sequence[ReportEntry]) -> list[Markup]:
    shown = (
        line_chart([(r.night, r.latency_s) for r in nights], "latency", "seconds an answer"),
        line_chart([(r.night, r.first_token_s) for r in nights], "first-token", "seconds to the first token"),
        line_chart([(r.night, r.tokens_per_s) for r in nights], "tokens", "tokens per second"),
    )
    return [chart for chart in shown if chart is not None]


# -- models, methods, reading ----------------------------------------------------------------------------------


def _model(model: ModelPage) -> dict[str, Any]:
    return {"model": model, "rows": _rows(model.endpoints)}


def _method(method: MethodPage) -> dict[str, Any]:
    policy = method.entry.policy
    return {"method": method, "policy": policy, "thresholds": _thresholds(policy)}


def _thresholds(policy: Policy) -> list[tuple[str, str, str, str]]:
    """Every number of a policy: its name, value, meaning and source."""
    rows = []
    for name, field in Policy.model_fields.items():
        value = getattr(policy, name)
        if name == "version" or not isinstance(value, int | float):
            continue
        source = policy.null_scale_floor_source if name == "null_scale_floor_nats" else _SOURCE
        rows.append((_word(name), number(value), field.description or _MEANINGS[name], source))
    return rows


@lru_cache(maxsize=1)
def _reading() -> list[dict[str, Any]]:
    table = tomllib.loads((data_path("publish/templates") / "reading.toml").read_text("utf-8"))
    return [{"code": None, **section} for section in table["section"]]
