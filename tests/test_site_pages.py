"""The public pages: whatever anybody wrote, they are inert, whole, readable, and equal sites give equal bytes."""

import dataclasses
import itertools
import posixpath
import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from weighbridge.attest import TrustedKey
from weighbridge.fleet import slug_of
from weighbridge.history.changes import Change
from weighbridge.judge.policy import load_policy
from weighbridge.publish.charts import Guide, Point, distance_chart, line_chart, number
from weighbridge.publish.entries import (
    DisclosedEntry,
    MethodEntry,
    ReferenceEntry,
    ReportEntry,
    StatementEntry,
    StatementKind,
)
from weighbridge.publish.log import Log
from weighbridge.publish.pages import https_only, markdown_text, pages
from weighbridge.publish.site import EndpointPage, Latest, MethodPage, ModelPage, Settings, Site
from weighbridge.records import (
    Capability,
    Cause,
    Effect,
    Finding,
    Findings,
    Verdict,
    VerdictWord,
)
from weighbridge.reference.bundle import Manifest, PoolRecord, Precision, StackRecord, WeightsSource
from weighbridge.reference.licence import LicenceRecord, RecordedAsk

TODAY = date(2026, 11, 23)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SHA = "ab" * 32
HOSTILE = "\"'><script>alert(1)</script><svg onload=a onerror=b>|`\n# HEAD\n[x](javascript:a)![i](https://e.x)\n```\u202e\x00{{ 7*7 }}"
VOID = {"meta", "link", "br", "img"}
TAGS = VOID | {
    "html", "head", "title", "body", "a", "header", "div", "nav", "ul", "li", "main", "h1", "h2", "h3", "p", "section", "table", "caption",
    "thead", "tbody", "tr", "th", "td", "span", "strong", "em", "details", "summary", "figure", "figcaption", "blockquote", "article", "dl",
    "dt", "dd", "pre", "code", "footer", "svg", "path", "text", "desc",
}  # fmt: skip
KNOWN = re.compile(
    r"feed\.atom|index\.json|latest\.json|log\.jsonl|log\.head\.json|signer\.pub|endpoints/[a-z0-9-]+/(badge\.svg|index\.json)"
    r"|references/[0-9a-f]{64}\.json|reports/[a-z0-9-]+/[0-9-]+[0-9a-f]{12}/(report\.html|evidence\.zip)|schemas/[a-z0-9.-]+\.json"
)


# -- sites that are made of records ----------------------------------------------------------------------------


def report(index: int, text: str = "plain", **changed: Any) -> ReportEntry:
    return ReportEntry.model_validate(
        {
            "index": index, "previous": SHA, "at": NOW, "endpoint": text[:120], "slug": "host-a", "base_url": text, "model": text,
            "claimed_precision": text, "night": date(2026, 11, 22), "created_at": NOW, "run_id": text, "weighbridge_version": "0.1.0",
            "policy": "strict", "policy_version": 4, "level": "L3", "reference": SHA, "pool": SHA, "commitment": SHA, "verdict": "differs", "cause": "precision",
            "exact_variant": text, "alone": "differs", "judged_together": 20, "sentence": text, "axes": {"weights": "inconsistent", "route": "error"},
            "log10_e_value": 4.2, "noise_nats": 0.1, "noise_low_nats": 0.08, "noise_high_nats": 0.12, "answers_used": 20, "requests_sent": 55,
            "errors": 1, "prompt_tokens": 3000, "completion_tokens": 300, "cost_usd": 0.0012, "latency_s": 0.3, "first_token_s": 0.5,
            "tokens_per_s": 60.0, "stopped_because": text, "evidence_sha256": f"{index:064x}", **changed,
        }
    )  # fmt: skip


def latest(text: str = "plain", *, measured: bool = True) -> Latest:
    ladder = [
        {"stack": name, "honest": False, "departure": "precision", "noise_nats": nats, "p05_nats": nats, "p95_nats": nats, "bits_held": 8}
        for name, nats in ((f"int8-{text}", 0.1), ("fp8-e4m3", 0.17), ("q4_0", 0.7), ("int4-g64", 1.0))
    ]  # fmt: skip
    details = {"ladder": ladder, "null_scale_nats": 0.06} if measured else {}
    weights = Finding(
        check="weights", axis="weights", outcome="inconsistent", cause="precision", summary=text, log10_e_value=4.2, answers_used=20,
        effects=[Effect(name=text, value=0.1, low=0.08, high=0.12, unit=text, confidence=0.95)], details=details,
    )  # fmt: skip
    share = Finding(check="share", axis="share", outcome="inconclusive", summary=text, to_resolve=text)
    verdict = Verdict(
        weighbridge_version="0.1.0", verdict="differs", cause="precision", exact_variant=text, family=text, policy="strict", axes={},
        not_excluded=[text], excluded=[text, "nf4-g64"], sentence=text, error_rate=text, effective_noise_nats=None, answers_used=20, requests_sent=55,
        prompt_tokens=1, completion_tokens=1, cost_usd=None, stopped_because=text, endpoint_refused=False, observations_sha256=SHA,
    )  # fmt: skip
    capability = Capability(reachable=True, top_logprobs=20, temperature_regime="unknown", usage_reported=True)
    return Latest(
        Findings(weighbridge_version="0.1.0", capability=capability, findings=[weights, share]), verdict, False
    )


def manifest(text: str = "plain") -> Manifest:
    recorded: list[tuple[str, Cause | None, float | None]] = [
        ("hf-float32", None, 0.0), ("int8", "precision", 0.1), ("int4", "precision", None),
    ]  # fmt: skip
    stacks = [
        StackRecord(
            id=name, description=text, departure=departure, departure_class=text if departure else None, family=text, bits_held=8.0,
            precision=Precision(weights=text, activations=text, kv_cache=text, logits=text), pools=[], engine={}, noise_nats=noise, indistinguishable=True,
        )
        for name, departure, noise in recorded
    ]  # fmt: skip
    return Manifest(
        id="bundle-a", version=1, model=text, model_names=[text], keeper=text, built_with=text, hypotheses=[], vocabulary_sha256=SHA, template_sha256=SHA,
        weights=WeightsSource(source=text, repo=text, revision=text, precision=text, files={}), probe_ids=[], top_k=128, shard=1,
        licence=LicenceRecord(identifier=text[:100], source=text, text_sha256=SHA, lines=3, asks=[RecordedAsk(kind="notice", quote=text * 2, place=text[:200])]),
        pools=[PoolRecord(id="pool", version=1, sha256=SHA, level="L3", probes=[])], reference_stack=text, stacks=stacks, arrays_sha256=SHA,
    )  # fmt: skip


def endpoint_page(nights: list[ReportEntry], evidence: Latest, **changed: Any) -> EndpointPage:
    last = nights[-1]
    fields: dict[str, Any] = {
        "slug": last.slug, "name": last.endpoint, "model": last.model, "latest": last, "evidence": evidence, "nights": tuple(nights),
        "superseded": (), "statements": (), "changes": (), "valid_until": last.night + timedelta(days=30), "expired": False,
    }  # fmt: skip
    return EndpointPage(**(fields | changed))


def site_of(endpoints: list[EndpointPage], text: str = "plain", *, reference: bool = True) -> Site:
    reports = sorted((r for e in endpoints for r in (*e.nights, *e.superseded)), key=lambda r: r.index)
    policy = load_policy("strict").model_copy(update={"title": text, "null_scale_floor_source": text})
    other = policy.model_copy(update={"id": f"../../{text}"})
    methods = [
        MethodEntry(index=0, previous=SHA, at=NOW, weighbridge_version="0.1.0", policy=p) for p in (policy, other)
    ]
    by_model: dict[str, list[EndpointPage]] = {}
    for page in endpoints:
        by_model.setdefault(page.model, []).append(page)
    entry = ReferenceEntry(index=1, previous=SHA, at=NOW, id=text, digest=SHA, model=text)
    references = ((entry, manifest(text)),) if reference else ()
    return Site(
        settings=Settings(text, "https://weigh.example.org", text, TrustedKey(b"k" * 32, text), TODAY), log=Log(tuple(reports), SHA, SHA, 1),
        updated=NOW, endpoints=tuple(endpoints),
        models=tuple(ModelPage(f"model-{i}", name, tuple(own), references) for i, (name, own) in enumerate(sorted(by_model.items()))),
        methods=(MethodPage("0.1.0-strict-4", methods[0], len(reports)), MethodPage(slug_of(f"0.1.0-../../{text}-4"), methods[1], 0)),
        disclosed=(DisclosedEntry(index=2, previous=SHA, at=NOW, sha256=SHA),), run_length_nights=730.0,
    )  # fmt: skip


def full_site(text: str) -> Site:
    """Two endpoints, one with nights of every verdict, a change, a superseded report and every kind of statement."""
    verdicts: list[VerdictWord] = ["consistent", "inconclusive", "differs", "differs_replicated"]
    nights = [
        report(
            i, text, night=date(2026, 11, 1) + timedelta(days=i), verdict=verdicts[i % 4],
            noise_nats=None if i == 5 else 0.01 * (i + 1), noise_low_nats=None if i == 6 else 0.008 * (i + 1),
        )
        for i in range(12)
    ]  # fmt: skip
    old = report(12, text)
    new = report(13, text, supersedes=12, verdict="differs")
    told: list[StatementKind] = ["dispute_opened", "reply", "re_run", "correction"]
    statements = tuple(
        StatementEntry(index=20 + i, previous=SHA, at=NOW, about=13, what=what, by=text[:120], text=text, link="https://example.org/a(b)'|`c", report=3)
        for i, what in enumerate(told)
    )  # fmt: skip
    change = Change(text, "own past", "2026-11-08", "2026-11-06", 3.0, 730.0, "precision")
    one = endpoint_page(
        [*nights, new], latest(text), superseded=(old,), statements=statements, changes=(change,), expired=True
    )
    bare = report(
        14, text, slug="host-b", verdict="inconclusive", cause=None, exact_variant=None, reference=None, noise_nats=None, noise_low_nats=None,
        noise_high_nats=None, cost_usd=None, latency_s=None, first_token_s=None, tokens_per_s=None, claimed_precision=None, judged_together=None,
    )  # fmt: skip
    return site_of([one, endpoint_page([bare], latest(text, measured=False))], text)


@pytest.fixture(scope="module")
def hostile() -> dict[str, bytes]:
    return pages(full_site(HOSTILE))


@pytest.fixture(scope="module")
def plain() -> dict[str, bytes]:
    return pages(full_site("Plain Hosting"))


# -- what a page is made of ------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags with their attributes, in order; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), attrs
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def html(made: dict[str, bytes]) -> dict[str, _Page]:
    return {path: _Page(data.decode()) for path, data in made.items() if path.endswith(".html")}


def tokens(text: str) -> list[Token]:
    """Every token of a Markdown text, inline ones included."""
    out = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        out += [token, *(token.children or [])]
    return out


def resolves(made: dict[str, bytes], path: str, link: str) -> bool:
    target, _, fragment = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(target))) if target else path
    if fragment and f'id="{fragment}"'.encode() not in made[target]:
        return False
    return target in made or KNOWN.fullmatch(target) is not None


# -- tests -----------------------------------------------------------------------------------------------------


def test_no_text_from_outside_becomes_mark_up(hostile: dict[str, bytes]) -> None:
    for path, page in html(hostile).items():
        assert {tag for tag, _ in page.tags} <= TAGS, path
        for tag, attributes in page.tags:
            assert not [
                name for name in attributes if name.startswith("on") or name in ("style", "srcset", "formaction")
            ]
            for name in ("href", "src"):
                link = attributes.get(name) or ""
                assert not re.match(r"(?i)\s*(javascript|data|vbscript):", link), (path, tag, link)
        text = hostile[path].decode()
        for bad in ("<script", "<svg onload", "\u202e", "\x00"):
            assert bad not in text, (path, bad)
    assert b"{{ 7*7 }}" in hostile["index.html"]


def test_no_text_from_outside_becomes_markdown(hostile: dict[str, bytes], plain: dict[str, bytes]) -> None:
    for path in hostile:
        if not path.endswith(".md"):
            continue
        found = tokens(hostile[path].decode())
        assert not {t.type for t in found} & {"html_block", "html_inline", "image", "s_open", "code_block"}, path
        twin = next((p for p in plain if p == path), None)
        if twin is not None:
            count, expected = (Counter(t.type for t in each) for each in (found, tokens(plain[twin].decode())))
            for kind in (
                "heading_open",
                "link_open",
                "table_open",
                "tr_open",
                "td_open",
                "fence",
                "list_item_open",
                "blockquote_open",
                "hr",
                "em_open",
            ):
                assert count[kind] == expected[kind], (path, kind)
        for token in found:
            href = str(token.attrs.get("href", "https://"))
            assert href.startswith("https://") or resolves(hostile, path, href), (path, href)


def test_every_link_leads_somewhere(plain: dict[str, bytes], hostile: dict[str, bytes]) -> None:
    for made in (plain, hostile):
        for path, page in html(made).items():
            for tag, attributes in page.tags:
                link = attributes.get("href") or attributes.get("src")
                if link is None:
                    continue
                if link.startswith("https://"):
                    assert tag == "a"
                    assert attributes["rel"] == "nofollow noopener noreferrer"
                else:
                    assert resolves(made, path, link), (path, link)


def test_pages_are_well_made_for_everybody(plain: dict[str, bytes]) -> None:
    for path, page in html(plain).items():
        headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert headings.count(1) == 1, path
        assert all(b - a <= 1 for a, b in itertools.pairwise(headings)), (path, headings)
        identifiers = [a["id"] for _, a in page.tags if "id" in a]
        assert len(identifiers) == len(set(identifiers)), path
        assert len(page.named("table")) == len(page.named("caption")), path
        assert all("scope" in a for a in page.named("th")), path
        assert page.named("html") == [{"lang": "en"}]
        assert [a for a in page.named("meta") if a.get("name") == "description" and a["content"]]
        assert [a for a in page.named("meta") if (a.get("content") or "").startswith("default-src 'none'")]
        assert all(a.get("alt") for a in page.named("img"))
        assert page.tags[[t for t, _ in page.tags].index("body") + 1][1]["href"] == "#content"
        for attributes in page.named("svg"):
            if attributes.get("aria-hidden") != "true":
                assert attributes["role"] == "img"
                assert set((attributes["aria-labelledby"] or "").split()) <= set(identifiers)
        for attributes in page.named("div"):
            if (attributes.get("class") or "").startswith("scroll"):
                assert attributes["role"] == "region"
                assert attributes["tabindex"] == "0"
                assert attributes["aria-label"]


def test_every_page_has_its_twin_and_nothing_is_fetched(plain: dict[str, bytes]) -> None:
    stems = Counter(path.rsplit(".", 1)[0] for path in plain if path != "style.css")
    assert set(stems.values()) == {2}
    assert {
        "index",
        "endpoints/host-a/index",
        "models/model-0/index",
        "methods/0.1.0-strict-4/index",
        "reading/index",
    } <= set(stems)
    assert b"url(" not in plain["style.css"]
    assert b"@import" not in plain["style.css"]
    assert all(not path.startswith("/") and ".." not in path.split("/") for path in plain)


def test_every_picture_has_its_table(plain: dict[str, bytes]) -> None:
    page = plain["endpoints/host-a/index.html"].decode()
    assert page.count('class="chart"') == 4
    for night in (date(2026, 11, 1) + timedelta(days=i) for i in range(12)):
        assert len(re.findall(rf'<th scope="row">(?:<a [^>]*>)?{night}', page)) == 2
    bare = plain["endpoints/host-b/index.html"].decode()
    assert 'class="chart"' not in bare
    assert "no distance was measured" in bare
    assert "none: the weights could not be looked at" in bare


def test_what_is_old_disputed_superseded_or_not_committed_is_said_in_words(plain: dict[str, bytes]) -> None:
    front = plain["index.html"].decode()
    assert "Old: valid until" in front
    assert "Disputed, audited again" in front
    assert "Corrected" in front
    for suffix in ("html", "md"):
        page = plain[f"endpoints/host-a/index.{suffix}"].decode()
        for words in (
            "This report is old", "Disputed, audited again", "Differs, one night", "Superseded", "replaced 2026-11-23", "was not in the log before the audit began",
            "2026-11-06", "shown, not judged", "What would change it", "fp8-e4m3", "nf4-g64", "Correction", "n = 20",
        ):  # fmt: skip
            assert words in page, (suffix, words)
        assert "This report is old" not in plain[f"endpoints/host-b/index.{suffix}"].decode()


def test_verdicts_are_ordered_by_word_and_name() -> None:
    made = [
        endpoint_page([report(i, slug=slug, endpoint=name, model="m", verdict=verdict, cause=None, exact_variant=None)], latest())
        for i, (slug, name, verdict) in enumerate(
            [("d", "Aa", "differs"), ("c", "Zz", "consistent"), ("b", "bb", "consistent"), ("a", "Cc", "inconclusive")]
        )
    ]  # fmt: skip
    front = pages(site_of(made))["index.html"].decode()
    assert re.findall(r'rowheader"><a href="endpoints/([a-d])/', front) == ["b", "c", "a", "d"]


def test_a_model_without_a_reference_says_what_that_means() -> None:
    site = site_of([endpoint_page([report(0)], latest(measured=False))], reference=False)
    made = pages(site)
    for suffix in ("html", "md"):
        assert "Nobody has published a reference bundle" in made[f"models/model-0/index.{suffix}"].decode()


def test_a_site_without_reports_renders() -> None:
    empty = Site(Settings("t", None, None, None, TODAY), Log((), SHA, SHA, 0), None, (), (), (), (), 730.0)
    made = pages(empty)
    assert b"No report has been published yet" in made["index.html"]
    assert set(made) == {"style.css", "index.html", "index.md", "reading/index.html", "reading/index.md"}


def test_equal_sites_give_equal_bytes(plain: dict[str, bytes]) -> None:
    assert pages(full_site("Plain Hosting")) == plain


def test_every_threshold_stands_with_its_meaning(plain: dict[str, bytes]) -> None:
    page = plain["methods/0.1.0-strict-4/index.html"].decode()
    for words in ("null scale floor nats", "0.0585", "few stacks sd", "What it does not prove", "Required axes"):
        assert words in page


@given(st.text(max_size=60))
@settings(max_examples=120, deadline=None)
def test_markdown_text_reads_as_it_was_written(text: str) -> None:
    expected = " ".join(
        "".join(
            c if c.isprintable() else " " if c.isspace() or c < " " or c == "\x7f" else "\ufffd" for c in text
        ).split()
    )
    for before in ("", "- ", "# ", "so it was: "):
        inline = [t for t in tokens(before + markdown_text(text)) if t.type == "inline"]
        assert (
            "".join(t.content for part in inline for t in part.children or [])
            == f"{before.lstrip('-# ')}{expected}".strip()
        )
        assert {t.type for part in inline for t in part.children or []} <= {"text", "text_special"}


@pytest.mark.parametrize(
    "text",
    [
        "1. one",
        "23) x",
        "- x",
        "+ x",
        "===",
        "---",
        "    code",
        "> quote",
        ": term",
        "| a |",
        "www.e.org https://e.org a@e.org",
        "***",
        "&lt;b&gt;",
    ],
)
def test_no_line_of_text_begins_a_block(text: str) -> None:
    found = [t for t in tokens(f"before\n{markdown_text(text)}") if t.nesting >= 0]
    assert [t.type for t in found if t.type not in ("text", "text_special", "softbreak")] == [
        "paragraph_open",
        "inline",
    ]


def test_only_https_is_linked() -> None:
    assert https_only("https://e.org/a b\"'<>)(`") == "https://e.org/a%20b%22%27%3C%3E%29%28%60"
    for link in (
        None,
        "javascript:alert(1)",
        "http://e.org",
        "https://",
        "//e.org",
        "https://e.org/\n",
        "https://[",
        "data:x",
    ):
        assert https_only(link) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0131655, "0.0132"), (1.054, "1.05"), (1000.0, "1000"), (146000.0, "146000"), (0.75, "0.75"), (1e-5, "0.00001"), (20.0, "20"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_are_written_plainly(value: float, text: str) -> None:
    assert number(value) == text


def test_charts_are_xml_with_few_nodes() -> None:
    verdicts: list[VerdictWord] = ["consistent", "inconclusive", "differs", "differs_replicated"]
    points = [
        Point(date(2025, 11, 24) + timedelta(days=i), verdicts[i % 4], 0.01 + i / 1e4, 0.009, 0.2) for i in range(365)
    ]
    chart = distance_chart(points, 0.06, [Guide('<b onload="x">', 0.1), Guide("touches", 0.1001)], [date(2026, 5, 5)])
    assert chart is not None
    root = ElementTree.fromstring(chart)
    assert len(list(root.iter())) < 40
    assert [e.get("class") for e in root.iter("path") if (e.get("class") or "").startswith("marker")] == [
        f"marker {v}" for v in sorted(verdicts)
    ]
    assert chart.count("touches") == 0 or chart.count("&lt;b onload") == 0
    assert distance_chart([dataclasses.replace(points[0], value=None)], 0.06, [], []) is None
    assert line_chart([(TODAY, 1.0)], "a", "a") is None
    line = line_chart([(TODAY, 1.0), (TODAY + timedelta(days=1), None), (TODAY + timedelta(days=2), 0.0)], "a", "<i>")
    assert line is not None
    ElementTree.fromstring(line)
