"""Documents, feed and badges of a site: valid, current, the same twice, and unmoved by hostile names."""

import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from weighbridge.attest import TrustedKey
from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.history.changes import Change
from weighbridge.judge.policy import load_policy
from weighbridge.publish.badge import HEIGHT, badge
from weighbridge.publish.documents import CARRIED, SCHEMAS, documents, schemas
from weighbridge.publish.entries import (
    FIRST,
    CommitmentsEntry,
    DisclosedEntry,
    HeldEntry,
    MethodEntry,
    ReferenceEntry,
    ReportEntry,
    StatementEntry,
)
from weighbridge.publish.feed import ATOM, MOST, feed
from weighbridge.publish.log import Appending, Log
from weighbridge.publish.site import EndpointPage, Latest, MethodPage, ModelPage, Settings, Site
from weighbridge.records import (
    AXES,
    Capability,
    Cause,
    Effect,
    Finding,
    Findings,
    Verdict,
    VerdictWord,
)

FIRST_NIGHT = date(2026, 11, 1)
TODAY = date(2026, 11, 23)
BIDI_AND_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HOSTILE = [
    "<script>alert(1)</script>", "]]></title><script/>", "a & b &amp; c", "\"quoted\" 'names' onload=\"x()\"",
    "nul \x00 and \x1b[31m escape \x9b and \x7f", "right to left \u202egvs.tpircs\u2066", "W" * 120, "{by} %s {0}",
]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
A = f"{{{ATOM}}}"


# -- a site --------------------------------------------------------------------------------------------------------


def new_log() -> Appending:
    return Appending(Log((), FIRST, sha256_hex(b""), 0))


def at(night: int) -> datetime:
    return datetime(2026, 11, 1, 3, 30, 5, 250_000, tzinfo=UTC) + timedelta(days=night)


def report(
    log: Appending, slug: str, night: int, word: VerdictWord = "consistent", cause: Cause | None = None, **more: Any
) -> ReportEntry:  # fmt: skip
    digest = sha256_hex(f"{slug} {night} {word}".encode())
    facts: dict[str, Any] = {
        "endpoint": f"Endpoint {slug}", "slug": slug, "base_url": "https://api.example.com/v1", "model": "a-model",
        "claimed_precision": None, "night": FIRST_NIGHT + timedelta(days=night), "created_at": at(night), "run_id": digest[:16],
        "weighbridge_version": "0.1.0", "policy": "strict", "policy_version": 1, "level": "L3", "reference": None, "pool": None,
        "commitment": digest, "verdict": word, "cause": cause, "exact_variant": None, "alone": word, "judged_together": 2,
        "sentence": f"What the evidence says of {slug}.", "axes": dict.fromkeys(AXES, "consistent"), "log10_e_value": -0.0,
        "noise_nats": 0.0131655, "noise_low_nats": 1.5e-5, "noise_high_nats": 2.0, "answers_used": 20, "requests_sent": 55,
        "errors": 0, "prompt_tokens": 900, "completion_tokens": 40, "cost_usd": 3.4e-8, "latency_s": 1234567.0,
        "first_token_s": None, "tokens_per_s": 53.8988123, "stopped_because": "answered", "evidence_sha256": digest,
    }  # fmt: skip
    entry = log.add(ReportEntry, at(night), **(facts | more))
    assert isinstance(entry, ReportEntry)
    return entry


def evidence_of(entry: ReportEntry) -> Latest:
    finding = Finding(
        check="weights", axis="weights", outcome="consistent", summary=entry.sentence, log10_e_value=1.0, answers_used=20,
        effects=[Effect(name="noise", value=0.01, low=0.005, high=0.02, unit="nats", confidence=0.95)],
        not_excluded=["kv-q8_0"], details={"large": [1.5] * 100},
    )  # fmt: skip
    verdict = Verdict(
        weighbridge_version="0.1.0", verdict=entry.alone, cause=entry.cause, exact_variant=None, family=None, policy="strict",
        axes=entry.axes, not_excluded=["kv-q8_0"], excluded=[], sentence=entry.sentence, error_rate="at most 1 in 1000",
        effective_noise_nats=None, answers_used=20, requests_sent=55, prompt_tokens=900, completion_tokens=40, cost_usd=None,
        stopped_because="answered", endpoint_refused=False, observations_sha256="0" * 64,
    )  # fmt: skip
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True
    )
    findings = Findings(weighbridge_version="0.1.0", capability=capability, findings=[finding])
    return Latest(findings, verdict, committed_before=True)


def page_of(slug: str, log: Appending) -> EndpointPage:
    reports = [e for e in log.entries if isinstance(e, ReportEntry) and e.slug == slug]
    replaced = {e.supersedes for e in reports}
    nights = tuple(e for e in reports if e.index not in replaced)
    own = {e.index for e in reports}
    change = Change(slug, "own past", "2026-11-03", "2026-11-02", 3.3, 1460.0, None)
    return EndpointPage(
        slug=slug, name=nights[-1].endpoint, model=nights[-1].model, latest=nights[-1], evidence=evidence_of(nights[-1]),
        nights=nights, superseded=tuple(e for e in reports if e.index in replaced),
        statements=tuple(e for e in log.entries if isinstance(e, StatementEntry) and e.about in own), changes=(change,),
        valid_until=nights[-1].night + timedelta(days=30), expired=False,
    )  # fmt: skip


def site_of(log: Appending, *, title: str = "Who serves it well", base_url: str | None = None) -> Site:
    lines = b"".join(canonical_bytes(e.model_dump(mode="json")) + b"\n" for e in log.entries)
    head = sha256_hex(lines.splitlines()[-1]) if log.entries else FIRST
    slugs = sorted({e.slug for e in log.entries if isinstance(e, ReportEntry)})
    pages = tuple(page_of(slug, log) for slug in slugs)
    return Site(
        settings=Settings(title, base_url, "mail@example.org", TrustedKey(b"k" * 32, "a key"), TODAY),
        log=Log(tuple(log.entries), head, sha256_hex(lines), len(lines)),
        updated=log.entries[-1].at if log.entries else None,
        endpoints=pages,
        models=(ModelPage("a-model", "a-model", pages, ()),) if pages else (),
        methods=tuple(MethodPage("a-method", e, len(slugs)) for e in log.entries if isinstance(e, MethodEntry)),
        disclosed=(),
        run_length_nights=1460.0,
    )


def a_log() -> Appending:
    """Two endpoints: one stays as it was, one changes, is judged again and disputed."""
    log = new_log()
    log.add(MethodEntry, at(0), weighbridge_version="0.1.0", policy=load_policy("strict"))
    log.add(ReferenceEntry, at(0), id="a-bundle", digest="1" * 64, model="a-model")
    log.add(CommitmentsEntry, at(0), night=FIRST_NIGHT, commitments=["2" * 64])
    for night in range(3):
        report(log, "steady", night)
    report(log, "changing", 0)
    wrong = report(log, "changing", 1, "differs", "precision")
    report(log, "changing", 2, "differs", "precision")
    again = report(log, "changing", 1, "inconclusive", supersedes=wrong.index)
    log.add(StatementEntry, at(4), about=wrong.index, what="dispute_opened", by="A host", text="Not so.\r\nTwice.")
    log.add(StatementEntry, at(5), about=again.index, what="correction", by="us", link="https://example.org/a?b=c&d=e")
    log.add(HeldEntry, at(6), evidence_sha256="3" * 64, until=None)
    log.add(DisclosedEntry, at(6), sha256="4" * 64)
    return log


def hostile_log(words: str) -> Appending:
    log = new_log()
    facts: dict[str, Any] = {
        "endpoint": words,
        "model": words,
        "sentence": words,
        "policy": words,
        "stopped_because": words,
    }
    entry = report(log, "hostile", 0, **facts)
    log.add(StatementEntry, at(1), about=entry.index, what="reply", by=words, text=words)
    return log


# -- documents -----------------------------------------------------------------------------------------------------


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        json.loads((SCHEMAS / name).read_bytes()), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


def checked(site: Site) -> dict[str, Any]:
    """Every document, once it is valid, canonical and ends with a line feed."""
    made = {name: data for name, data in documents(site).items() if not name.startswith("schemas/")}
    values = {}
    for name, data in made.items():
        value = json.loads(data)
        kind = "endpoint" if name.startswith("endpoints/") else Path(name).stem
        validator(f"site-{kind}-1.json").validate(value)
        assert value["schema"] == f"weighbridge/site-{kind}/1"
        assert canonical_bytes(value) + b"\n" == data
        values[name] = value
    return values


@pytest.mark.parametrize("name", sorted(schemas()))
def test_the_published_schemas_are_the_models(name: str) -> None:
    text = schemas()[name]
    jsonschema.Draft202012Validator.check_schema(json.loads(text))
    assert (SCHEMAS / name).read_text("utf-8") == text, (
        f"{name} has changed: regenerate it with `python -m weighbridge.publish.documents`, "
        "and give it a new number where an old reader would not understand the new document"
    )


def test_the_site_carries_its_schemas() -> None:
    made = documents(site_of(new_log()))
    assert set(schemas()) | {"report-1.json"} == set(CARRIED)
    assert {n: made[n] for n in made if "schemas/" in n} == {
        f"schemas/{n}": (SCHEMAS / n).read_bytes() for n in CARRIED
    }


def test_every_entry_of_a_log_is_valid() -> None:
    for entry in a_log().entries:
        validator("log-entry-1.json").validate(entry.model_dump(mode="json", by_alias=True))


def test_every_document_is_valid() -> None:
    site = site_of(a_log())
    values = checked(site)
    index, latest = values["index.json"], values["latest.json"]
    assert [e["slug"] for e in index["endpoints"]] == ["changing", "steady"]
    assert index["log"] == {"entries": len(site.log.entries), "head": site.log.head, "sha256": site.log.sha256}
    assert index["signer"]["comment"] == "a key"
    assert index["endpoints"][0]["dispute"] == "open"
    assert index["endpoints"][0]["urls"]["json"] == "endpoints/changing/index.json"
    assert latest["endpoints"][1]["report"] == site.endpoints[1].latest.model_dump(mode="json")
    assert latest["endpoints"][1]["not_excluded"] == ["kv-q8_0"]
    assert latest["endpoints"][1]["committed_before"] is True
    assert [s["what"] for s in latest["endpoints"][0]["statements"]] == ["dispute_opened", "correction"]


def test_nights_are_what_the_log_says_of_them() -> None:
    site = site_of(a_log())
    value = checked(site)["endpoints/changing/index.json"]
    assert [n["verdict"] for n in value["superseded"]] == ["differs"]
    assert len(value["nights"]) == 3
    for night, entry in zip(value["nights"], site.endpoints[0].nights, strict=True):
        whole = entry.model_dump(mode="json") | {"report": f"{entry.folder}/report.html"}
        assert night == {name: whole[name] for name in night}
    assert value["changes"][0]["began"] == "2026-11-02"
    assert "details" not in value["findings"][0]


@pytest.mark.parametrize(
    "number", [0.0, -0.0, 1.0, -1.5, 1e-4, 1e-5, 123e-9, -3e-7, 999999.4, 999999.6, 1e6, 1.5e15, 1e21, 0.1 + 0.2, -250.0]
)  # fmt: skip
def test_numbers_of_a_night_are_canonical(number: float) -> None:
    log = new_log()
    report(log, "one", 0, log10_e_value=number, cost_usd=abs(number))
    night = checked(site_of(log))["endpoints/one/index.json"]["nights"][0]
    assert night["log10_e_value"] == float(f"{number:.6g}")
    assert night["cost_usd"] == float(f"{abs(number):.6g}")


@pytest.mark.parametrize("words", HOSTILE)
def test_documents_hold_hostile_names_as_they_are(words: str) -> None:
    values = checked(site_of(hostile_log(words), title=words))
    assert values["index.json"]["title"] == words
    assert values["endpoints/hostile/index.json"]["name"] == words


def test_a_site_without_endpoints_has_valid_documents() -> None:
    values = checked(replace(site_of(new_log()), settings=Settings("Empty", None, None, None, TODAY)))
    assert values["index.json"]["endpoints"] == values["latest.json"]["endpoints"] == []
    assert values["index.json"]["signer"] is None


def test_two_calls_give_the_same_bytes() -> None:
    first, second = site_of(a_log()), site_of(a_log())
    assert documents(first) == documents(second)
    assert feed(first) == feed(second)
    assert [badge(page) for page in first.endpoints] == [badge(page) for page in second.endpoints]


# -- feed ----------------------------------------------------------------------------------------------------------


def entries_of(site: Site) -> list[ElementTree.Element]:
    return ElementTree.fromstring(feed(site)).findall(f"{A}entry")


def texts(elements: list[ElementTree.Element], tag: str) -> list[str]:
    return [element.findtext(f"{A}{tag}") or "" for element in elements]


def test_the_feed_has_what_atom_requires() -> None:
    root = ElementTree.fromstring(feed(site_of(a_log(), base_url="https://weigh.example.org/")))
    assert root.tag == f"{A}feed"
    for element in (root, *root.findall(f"{A}entry")):
        for tag in ("id", "title", "updated"):
            assert len(element.findall(f"{A}{tag}")) == 1
            assert element.findtext(f"{A}{tag}")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", element.findtext(f"{A}updated") or "")
    assert root.findtext(f"{A}author/{A}name") == "Who serves it well"
    assert root.findtext(f"{A}author/{A}email") == "mail@example.org"
    [itself] = root.findall(f"{A}link[@rel='self']")
    assert itself.get("href") == "https://weigh.example.org/feed.atom"
    links = root.findall(f"{A}entry/{A}link[@rel='alternate']")
    assert len(links) == len(root.findall(f"{A}entry"))
    assert all((link.get("href") or "").startswith("https://weigh.example.org/") for link in links)


def test_links_are_relative_where_the_site_has_no_address() -> None:
    root = ElementTree.fromstring(feed(site_of(a_log())))
    assert root.find(f"{A}link[@rel='self']") is None
    assert {(link.get("href") or "").split("/")[0] for link in root.iter(f"{A}link")} == {
        "index.html", "endpoints", "reports",
    }  # fmt: skip


def test_the_feed_holds_what_is_new_and_nothing_else() -> None:
    assert texts(entries_of(site_of(a_log())), "title") == [
        "Correction about Endpoint changing, 2026-11-02: us",
        "A host opened a dispute about Endpoint changing, 2026-11-02",
        "Endpoint changing, 2026-11-02: not verified (judged again, before: differs, cause: precision)",
        "Endpoint changing, 2026-11-03: differs, cause: precision (on 2026-11-02: not verified)",
        "Endpoint changing, 2026-11-01: consistent (first report)",
        "Endpoint steady, 2026-11-01: consistent (first report)",
    ]
    assert texts(entries_of(site_of(a_log())), "summary")[:2] == ["https://example.org/a?b=c&d=e", "Not so.\nTwice."]


def test_ids_are_unique_and_stay_when_the_log_grows_and_the_site_moves() -> None:
    log = a_log()
    before = texts(entries_of(site_of(log)), "id")
    whole = ElementTree.fromstring(feed(site_of(log))).findtext(f"{A}id")
    report(log, "steady", 5, "differs", "template")
    log.add(StatementEntry, at(6), about=3, what="correction", by="us")
    moved = site_of(log, base_url="https://elsewhere.example.org", title="Another title")
    after = texts(entries_of(moved), "id")
    assert after[2:] == before
    assert len(set(after)) == len(after)
    assert ElementTree.fromstring(feed(moved)).findtext(f"{A}id") == whole


def test_a_log_of_one_line_has_the_name_that_it_keeps() -> None:
    log = new_log()
    report(log, "one", 0)
    before = texts(entries_of(site_of(log)), "id")
    report(log, "one", 1)
    assert texts(entries_of(site_of(log)), "id") == before


def test_the_feed_ends_at_the_latest_hundred() -> None:
    log = new_log()
    for number in range(MOST + 5):
        report(log, f"e{number}", 0)
    ids = texts(entries_of(site_of(log)), "id")
    assert len(ids) == MOST
    assert ids[0].endswith(f":{MOST + 4}")


def test_the_feed_of_an_empty_site_is_valid() -> None:
    root = ElementTree.fromstring(feed(site_of(new_log())))
    assert root.findtext(f"{A}updated") == "2026-11-23T00:00:00Z"
    assert root.findall(f"{A}entry") == []


@pytest.mark.parametrize("words", HOSTILE)
def test_nothing_breaks_out_of_the_feed(words: str) -> None:
    text = feed(site_of(hostile_log(words), title=words)).decode("utf-8")
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(A) for element in root.iter()} == {
        "feed", "title", "id", "updated", "link", "author", "name", "email", "entry", "summary",
    }  # fmt: skip
    assert "<script" not in text.lower()
    assert not BIDI_AND_CONTROLS.search(text)
    assert {e.get("type") for e in root.iter() if e.tag in (f"{A}title", f"{A}summary")} == {"text"}
    if words.isprintable() and words.isascii():
        assert root.findtext(f"{A}title") == words


# -- badge ---------------------------------------------------------------------------------------------------------


def drawn(page: EndpointPage) -> ElementTree.Element:
    return ElementTree.fromstring(badge(page))


def shown(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def disputed(page: EndpointPage) -> EndpointPage:
    statement = StatementEntry(
        index=9, previous="0" * 64, at=at(1), about=page.latest.index, what="dispute_opened", by="b"
    )
    return replace(page, statements=(statement,))


@pytest.fixture
def steady() -> EndpointPage:
    return page_of("steady", a_log())


@pytest.mark.parametrize(
    ("word", "mark", "words"),
    [
        ("consistent", "✓", "consistent"),
        ("differs", "≠", "differs"),
        ("differs_replicated", "≠", "differs, replicated"),
        ("inconclusive", "?", "not verified"),
    ],
)
def test_a_badge_says_it_by_mark_and_words(steady: EndpointPage, word: VerdictWord, mark: str, words: str) -> None:
    page = replace(steady, latest=steady.latest.model_copy(update={"verdict": word}))
    root = drawn(page)
    assert shown(root) == ["weighbridge", mark, f"{words} · strict · 2026-11-03, until 2026-12-03"]
    assert root.get("role") == "img"
    assert (root.findtext(f"{SVG}title") or "").startswith(f"Endpoint steady: Weighbridge: {mark} {words} · strict")


def test_an_expired_badge_says_so_and_nothing_else(steady: EndpointPage) -> None:
    root = drawn(replace(steady, expired=True))
    assert shown(root) == ["weighbridge", "–", "expired · was valid until 2026-12-03"]
    assert "onsistent" not in ElementTree.tostring(root, encoding="unicode")
    colours = {element.get("fill") for element in root.iter(f"{SVG}rect")}
    assert colours == {"#1d2733", "#566270", "#f4f6f8", "none"}


def test_an_open_dispute_is_shown_and_a_resolved_one_is_not(steady: EndpointPage) -> None:
    page = disputed(steady)
    assert shown(drawn(page))[2].endswith("until 2026-12-03 · disputed")
    assert shown(drawn(replace(page, expired=True)))[2].endswith(" · disputed")
    resolved = page.statements[0].model_copy(update={"what": "resolved"})
    assert "disputed" not in shown(drawn(replace(page, statements=(*page.statements, resolved))))[2]


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("expired", [True, False])
def test_nothing_breaks_out_of_a_badge(words: str, expired: bool) -> None:
    page = disputed(replace(page_of("hostile", hostile_log(words)), expired=expired))
    text = badge(page).decode("utf-8")
    root = ElementTree.fromstring(text)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {"svg", "title", "rect", "g", "text"}
    assert "<script" not in text.lower()
    assert not BIDI_AND_CONTROLS.search(text)
    assert not {name for element in root.iter() for name in element.attrib} & {"href", "style", "class", "onload"}
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    width = float(root.attrib["width"])
    assert width < 700
    assert root.attrib["viewBox"] == f"0 0 {root.attrib['width']} {HEIGHT}"
    for element in root.iter(f"{SVG}text"):
        middle, half = float(element.attrib["x"]), float(element.get("textLength", "12")) / 2
        assert 0 < middle - half < middle + half < width
    for element in root.iter(f"{SVG}rect"):
        assert float(element.get("x", "0")) + float(element.attrib["width"]) <= width
