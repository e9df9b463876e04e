"""Reports: whatever an endpoint says, the page is inert, whole and readable, and equal runs give equal bytes."""

import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from rich.console import Console

from weighbridge.audit import exit_code
from weighbridge.canonical import canonical_bytes
from weighbridge.judge.checks import prose
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import CHECKS
from weighbridge.records import (
    AXES,
    Axis,
    BundleIdentity,
    Capability,
    Draw,
    Effect,
    Estimate,
    Finding,
    Findings,
    Outcome,
    PoolIdentity,
    Price,
    Verdict,
    VerdictWord,
)
from weighbridge.report.checks_page import PAGE, checks_page
from weighbridge.report.document import (
    SCHEMA_FILE,
    AuditedEndpoint,
    Report,
    report_json,
    report_schema,
    write_report_json,
)
from weighbridge.report.html import WORDS, write_html
from weighbridge.report.junit import write_junit
from weighbridge.report.terminal import print_summary

OUTCOMES: tuple[Outcome, ...] = (
    "consistent", "inconsistent", "inconclusive", "not_supported", "not_applicable", "error",
)  # fmt: skip
VERDICTS: tuple[VerdictWord, ...] = ("consistent", "inconclusive", "differs", "differs_replicated")
HOSTILE = [
    pytest.param("plain words", id="plain"),
    pytest.param("<script>alert(1)</script>", id="script"),
    pytest.param("</title></style></p><img src=https://evil.example/x onerror=alert(1)>", id="image"),
    pytest.param("\"'><svg onload=alert(1)><a href=javascript:alert(1)>", id="attribute"),
    pytest.param("a & b &lt;script&gt; &#60;script", id="entities"),
    pytest.param("{{ 7 * 7 }} {% raw %}", id="template"),
    pytest.param("\x1b[31mred\x1b]0;title\x07\x9b2J", id="escapes"),
    pytest.param("nul \x00 and \x0b and \x85", id="controls"),
    pytest.param("W" * 5000, id="long-word"),
    pytest.param("]]> <!-- --> ！ 中文 \U0001f600 \u202e", id="foreign"),
    pytest.param("[bold red]markup[/] $\\frac{1}{2}$", id="markup"),
]
VOID = {"meta", "br", "link", "img", "input", "hr"}


# -- a small factory -------------------------------------------------------------------------------------------


def pictured_details() -> dict[str, Any]:
    """What a finding on the weights holds for the pictures."""
    ladder = [
        {
            "stack": name, "honest": departure is None, "departure": departure, "bits_held": bits,
            "noise_nats": noise, "p05_nats": noise / 2, "p95_nats": noise * 2,
        }
        for name, departure, bits, noise in (
            ("bf16", None, 16.0, 0.02), ("q8_0", "precision", 8.5, 0.1), ("kv8", "kv_cache", None, 0.3),
        )
    ]  # fmt: skip
    return {
        "endpoint_noise_nats": {"value": 0.11, "low": 0.09, "high": 0.13},
        "null_scale_nats": 0.075,
        "ladder": ladder,
        "directions": [
            {"variant": "q8_0", "cosine": 0.9, "low": 0.85, "high": 0.95, "honest_at_most": 0.2},
            {"variant": "kv8", "cosine": 0.1, "low": 0.0, "high": 0.2, "honest_at_most": 0.25},
        ],
        "course": [
            {"log10_e_size": 0.3 * n, "log10_e_direction": -9.0, "log10_e": 0.25 * n, "noise_nats": 0.1 + 0.01 * n}
            for n in range(12)
        ],
        "same_first_token_share": 0.9,
        "top_logprobs_used": 20,
        "honest_families": ["llama.cpp/float16", "transformers/float32"],
        "logprobs_mean": {
            "temperature": "before_temperature", "slope_on_reference": 1.01, "grid_nats": 0.125, "truncated_to": 20,
            "honest_stacks_on_that_grid": ["bf16"],
        },
        "causes": [
            {
                "cause": cause, "key": key, "label": label, "recorded": [], "log10_e_value": log10_e, "log10_bayes_factor": log10_bf,
                "nearest": nearest,
            }
            for cause, key, label, log10_e, log10_bf, nearest in (
                ("precision", "int8", "8-bit integer weights", 3.2, 12.5, "q8_0"),
                ("sampling", "sampling", "a temperature", -0.4, None, None),
                ("none_of_these", "none_of_these", "none of these", -3.0, 2.0, None),
            )
        ],
    }  # fmt: skip


# The check that speaks for an axis is called like it, but for one.
CHECK_OF: dict[Axis, str] = {"service": "counting"}


def asked() -> list[str]:
    """What a report calls the questions of `report_of`."""
    return [prose()[CHECK_OF.get(axis, axis)].title for axis in AXES]


def finding(axis: Axis, outcome: Outcome, words: str, *, pictures: bool) -> Finding:
    weights = axis == "weights"
    return Finding(
        check=CHECK_OF.get(axis, axis),
        axis=axis,
        outcome=outcome,
        cause="precision" if outcome == "inconsistent" and weights else None,
        summary=f"{axis}: {words}",
        effects=[Effect(name="effective noise", value=0.11, low=0.09, high=0.13, unit="nats", confidence=0.95)],
        log10_e_value=3.2 if weights else None,
        answers_used=12,
        details=pictured_details() if weights and pictures else {},
        to_resolve=words if outcome == "inconclusive" else None,
    )


def verdict_of(word: VerdictWord = "differs", **more: Any) -> Verdict:
    facts: dict[str, Any] = {
        "weighbridge_version": "0.1.0", "verdict": word, "cause": "precision" if word.startswith("differs") else None,
        "exact_variant": None, "family": None, "policy": "strict", "axes": dict.fromkeys(AXES, "inconclusive"),
        "not_excluded": ["kv8", "q8_0"], "excluded": [], "sentence": "A sentence.", "error_rate": "A rate.",
        "effective_noise_nats": None, "answers_used": 12, "requests_sent": 14, "prompt_tokens": 900,
        "completion_tokens": 14, "cost_usd": 0.000123, "stopped_because": "decided", "endpoint_refused": False,
        "observations_sha256": "0" * 64,
    }  # fmt: skip
    return Verdict.model_validate(facts | more)


def report_of(
    words: str = "plain words",
    *,
    word: VerdictWord = "differs",
    outcomes: dict[Axis, Outcome] | None = None,
    pictures: bool = True,
    requires: list[Axis] | None = None,
    **verdict: Any,
) -> Report:
    axes: dict[Axis, Outcome] = dict.fromkeys(AXES, "inconclusive")
    axes |= outcomes or {"weights": "inconsistent", "prompt": "consistent"}
    policy = load_policy("strict")
    if requires is not None:
        policy = policy.model_copy(update={"requires": requires})
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True,
        model_named=words, fingerprint=words, quirks=["sentinel"],
    )  # fmt: skip
    return Report(
        weighbridge_version="0.1.0",
        run_id="0123456789abcdef",
        created_at="2026-01-01T00:00:00+00:00",
        endpoint=AuditedEndpoint(
            name=words, base_url="https://api.example.com/v1", model=words, dialect="openai-chat",
            claimed_precision=words, price=Price(prompt_usd_per_million_tokens=1, completion_usd_per_million_tokens=2),
        ),
        policy=policy,
        reference=BundleIdentity(id="a-bundle", digest="1" * 64),
        pool=PoolIdentity(id="a-pool", version=1, sha256="2" * 64),
        draw=Draw(seed="a seed", commitment="3" * 64),
        estimate=Estimate(requests=100, prompt_tokens=5000, completion_tokens=100, cost_usd=0.01, price_source="a price"),
        verdict=verdict_of(word, **({"sentence": f"Verdict: {words}", "axes": axes} | verdict)),
        findings=Findings(
            weighbridge_version="0.1.0",
            capability=capability,
            findings=[finding(axis, axes[axis], words, pictures=pictures) for axis in AXES],
        ),
        sha256={"plan.json": "4" * 64},
    )  # fmt: skip


# -- report.html -----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, and whether their tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(folder: Path, report: Report) -> tuple[str, Page]:
    write_html(folder, report)
    text = (folder / "report.html").read_bytes().decode("utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of an audit with pictures."""
    return page_of(tmp_path_factory.mktemp("plain"), report_of())


@pytest.fixture(scope="module", params=HOSTILE)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The same page where everything that an endpoint says is hostile."""
    return page_of(tmp_path_factory.mktemp("hostile"), report_of(request.param))


def tags(page: Page) -> list[str]:
    return [tag for tag, _ in page.elements]


def test_nothing_in_the_page_can_run(hostile: tuple[str, Page]) -> None:
    text, page = hostile
    assert "<script" not in text.lower()
    assert not set(tags(page)) & {"script", "iframe", "object", "embed", "img", "link", "base", "form", "a"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not [value for value in attributes.values() if "javascript:" in value.lower()]


def test_nothing_in_the_page_is_fetched(hostile: tuple[str, Page]) -> None:
    text, page = hostile
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith("#")
        assert not re.search(r"url\((?!#)", attributes.get("style", ""))
    assert "@import" not in text
    policy = next(m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_the_tags_of_the_page_balance(hostile: tuple[str, Page]) -> None:
    _, page = hostile
    assert page.unbalanced == []
    assert page.open == []


def test_hostile_words_do_not_change_the_structure_of_the_page(
    hostile: tuple[str, Page], plain: tuple[str, Page]
) -> None:
    assert tags(hostile[1]) == tags(plain[1])


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("word", VERDICTS)
def test_a_page_without_pictures_is_as_safe(tmp_path: Path, word: VerdictWord, words: str) -> None:
    text, page = page_of(tmp_path, report_of(words, word=word, pictures=False))
    assert "<script" not in text.lower()
    assert page.unbalanced == page.open == []
    assert tags(page) == tags(page_of(tmp_path, report_of(word=word, pictures=False))[1])


def test_words_of_an_endpoint_are_shown_as_they_are(tmp_path: Path) -> None:
    words = "<script>alert(1)</script> & {{ 7 * 7 }}"
    shown = "".join(page_of(tmp_path, report_of(words, pictures=False))[1].text)
    assert shown.count(words) >= 4  # title, heading, model, verdict, findings


def test_the_page_has_language_and_viewport_and_one_heading(plain: tuple[str, Page]) -> None:
    text, page = plain
    assert text.lower().startswith("<!doctype html>")
    assert page.named("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert {"charset": "utf-8"} in page.named("meta")
    assert len(page.named("h1")) == 1


def test_every_picture_is_labelled(plain: tuple[str, Page]) -> None:
    _, page = plain
    labels = [svg.get("aria-label", "") for svg in page.named("svg")]
    assert len(labels) == 3
    assert all(labels)
    assert len(set(labels)) == 3
    assert all(svg.get("role") == "img" for svg in page.named("svg"))


def test_every_figure_is_followed_by_a_table(plain: tuple[str, Page]) -> None:
    _, page = plain
    order = [tag for tag, _ in page.elements if tag in ("figure", "table")]
    causes = ["table"]
    assert order == ["table", "figure", "table", "figure", "table", *causes, "figure", "table"]


def test_every_table_has_a_caption_and_column_headings(plain: tuple[str, Page]) -> None:
    _, page = plain
    assert len(page.named("caption")) == len(page.named("table")) == 5
    assert all(heading.get("scope") == "col" for heading in page.named("th"))


def test_ids_are_unique_and_every_reference_has_its_target(plain: tuple[str, Page]) -> None:
    text, page = plain
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    targets = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert targets
    assert set(targets) <= set(ids)


def test_the_page_without_pictures_has_none(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, report_of(pictures=False))
    assert page.named("figure") == []
    assert page.named("svg") == []


@pytest.mark.parametrize("word", VERDICTS)
def test_the_page_says_the_verdict_and_every_question(tmp_path: Path, word: VerdictWord) -> None:
    shown = "".join(page_of(tmp_path, report_of(word=word, pictures=False))[1].text)
    assert WORDS[word] in shown
    assert all(question in shown for question in asked())


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_is_shown(tmp_path: Path, outcome: Outcome) -> None:
    shown = "".join(page_of(tmp_path, report_of(outcomes=dict.fromkeys(AXES, outcome), pictures=False))[1].text)
    assert shown.count(outcome.replace("_", " ")) >= len(AXES)


@pytest.mark.parametrize("threshold", [1000.0, 20.0])
def test_two_builds_are_the_same_bytes(tmp_path: Path, threshold: float) -> None:
    def build(folder: Path) -> dict[str, bytes]:
        report = report_of("W & é")
        report = report.model_copy(update={"policy": report.policy.model_copy(update={"differs_e_value": threshold})})
        for write in (write_report_json, write_junit, write_html):
            write(folder, report)
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    first, second = build(tmp_path / "first"), build(tmp_path / "second")
    assert sorted(first) == ["junit.xml", "report.html", "report.json"]
    assert first == second


# -- junit.xml -------------------------------------------------------------------------------------------------


def suite_of(folder: Path, report: Report) -> ElementTree.Element:
    write_junit(folder, report)
    return ElementTree.fromstring((folder / "junit.xml").read_bytes())


def counts(suite: ElementTree.Element) -> dict[str, int]:
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


MIXED: dict[Axis, Outcome] = {
    "route": "inconclusive", "prompt": "consistent", "sampling": "not_applicable", "weights": "inconsistent",
    "share": "inconsistent", "service": "error",
}  # fmt: skip


@pytest.mark.parametrize(
    ("outcomes", "requires", "expected"),
    [
        (dict.fromkeys(AXES, "consistent"), list(AXES), (0, 0, 0)),
        (dict.fromkeys(AXES, "inconsistent"), list(AXES), (6, 0, 0)),
        (dict.fromkeys(AXES, "inconsistent"), ["weights"], (1, 0, 5)),
        (dict.fromkeys(AXES, "error"), list(AXES), (0, 6, 0)),
        (dict.fromkeys(AXES, "inconclusive"), list(AXES), (0, 0, 6)),
        (dict.fromkeys(AXES, "not_supported"), list(AXES), (0, 0, 6)),
        (dict.fromkeys(AXES, "not_applicable"), list(AXES), (0, 0, 6)),
        (MIXED, ["route", "prompt", "weights"], (1, 1, 3)),
        (MIXED, ["weights", "share"], (2, 1, 2)),
        (MIXED, [], (0, 1, 4)),
    ],
)
def test_a_build_server_counts_what_the_axes_say(
    tmp_path: Path, outcomes: dict[Axis, Outcome], requires: list[Axis], expected: tuple[int, int, int]
) -> None:
    suite = suite_of(tmp_path, report_of(outcomes=outcomes, requires=requires))
    failures, errors, skipped = expected
    assert counts(suite) == {"tests": 6, "failures": failures, "errors": errors, "skipped": skipped}
    assert len(suite.findall("testcase")) == 6
    for tag, count in (("failure", failures), ("error", errors), ("skipped", skipped)):
        assert len(suite.findall(f"testcase/{tag}")) == count


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_leave_the_xml_whole(tmp_path: Path, words: str) -> None:
    suite = suite_of(tmp_path, report_of(words))
    assert counts(suite) == {"tests": 6, "failures": 1, "errors": 0, "skipped": 4}
    assert {element.tag for element in suite.iter()} == {
        "testsuite", "properties", "property", "testcase", "failure", "skipped",
    }  # fmt: skip


def test_a_hostile_policy_leaves_the_xml_whole(tmp_path: Path) -> None:
    """A policy may come from a file, and TOML can write any control character as an escape."""
    report = report_of()
    report = report.model_copy(update={"policy": report.policy.model_copy(update={"id": "mine\x00\x1b"})})
    assert counts(suite_of(tmp_path, report))["tests"] == 6


@pytest.mark.parametrize(
    "words", ["！full width", "中文", "\U0001f600", "\ue000 private", "\ufb01 ligature", "é\t\"'<&>"]
)
def test_what_xml_can_hold_is_kept(tmp_path: Path, words: str) -> None:
    suite = suite_of(tmp_path, report_of(words))
    assert suite.attrib["name"] == f"weighbridge {words}"


@pytest.mark.parametrize("character", ["\x00", "\x0b", "\x1b", "\ud800", "\ufffe", "\uffff"])
def test_what_xml_cannot_hold_is_replaced(tmp_path: Path, character: str) -> None:
    report = report_of()
    changed = report.endpoint.model_copy(update={"name": f"a{character}b"})
    suite = suite_of(tmp_path, report.model_copy(update={"endpoint": changed}))
    assert suite.attrib["name"] == "weighbridge a\ufffdb"


def test_the_suite_carries_the_verdict(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, report_of())
    properties = {p.attrib["name"]: p.attrib["value"] for p in suite.findall("properties/property")}
    assert properties == {"verdict": "differs", "cause": "precision", "policy": "strict"}


# -- report.json -----------------------------------------------------------------------------------------------


def test_the_published_schema_is_the_models() -> None:
    assert SCHEMA_FILE.is_file(), "write it with: python -m weighbridge.report.document"
    assert SCHEMA_FILE.read_text("utf-8") == report_schema(), (
        "the schema of report.json has changed: regenerate it with `python -m weighbridge.report.document`, "
        "and give it a new number where an old reader would not understand the new report"
    )


def test_the_published_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(report_schema()))


@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("word", VERDICTS)
def test_a_report_is_valid_under_its_schema(tmp_path: Path, words: str, word: VerdictWord) -> None:
    write_report_json(tmp_path, report_of(words, word=word))
    document = json.loads((tmp_path / "report.json").read_bytes())
    jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_bytes())).validate(document)
    assert document["schema"] == "weighbridge/report/1"
    assert document["endpoint"]["name"] == words


def test_a_report_without_a_reference_is_valid(tmp_path: Path) -> None:
    nothing = {"reference": None, "pool": None}
    document = report_json(report_of(cost_usd=None).model_copy(update=nothing))
    jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_bytes())).validate(document)


@pytest.mark.parametrize("change", [{"verdict": "fine"}, {"schema": "weighbridge/report/2"}, {"added": 1}])
def test_the_schema_refuses_what_is_no_report(change: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_bytes()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(report_json(report_of()) | change)


def test_a_report_is_canonical_and_reads_back(tmp_path: Path) -> None:
    report = report_of()
    write_report_json(tmp_path, report)
    data = (tmp_path / "report.json").read_bytes()
    assert data == canonical_bytes(json.loads(data)) + b"\n"
    assert report_json(Report.model_validate(json.loads(data))) == report_json(report)


# -- the terminal ----------------------------------------------------------------------------------------------


def summary_of(report: Report, width: int = 100) -> str:
    out = io.StringIO()
    print_summary(Console(file=out, width=width, color_system=None, force_terminal=False), report, "reports/a-run")
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("words", HOSTILE)
@pytest.mark.parametrize("word", VERDICTS)
def test_the_summary_says_the_verdict_and_every_question(word: VerdictWord, words: str, width: int) -> None:
    summary = summary_of(report_of(words, word=word), width)
    assert WORDS[word] in summary
    assert all(question in " ".join(summary.split()) for question in asked())
    assert "reports/a-run/report.html" in summary
    assert "14 requests, 900 prompt tokens, 0.000123 USD; stopped: decided" in " ".join(summary.split())


@pytest.mark.parametrize(
    "character", ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x07", "\x08", "\r", "\x00", "\u202e"]
)
def test_no_control_character_reaches_the_terminal(character: str) -> None:
    summary = summary_of(report_of(f"a{character}b"))
    assert [c for c in summary if not c.isprintable() and c != "\n"] == []


def test_words_in_square_brackets_are_no_markup() -> None:
    assert "[bold red]markup[/]" in summary_of(report_of("[bold red]markup[/]"))


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in summary_of(report_of("W" * 500), width).splitlines()) <= width


def test_a_summary_without_a_price_names_no_cost() -> None:
    assert "USD" not in summary_of(report_of(cost_usd=None))


# -- the exit code ---------------------------------------------------------------------------------------------

FAIL_ON = ("differs", "inconclusive", "never")
REASONS = (
    "decided", "probes_used_up", "level_not_supported", "interrupted", "budget_requests", "budget_cost", "refused",
    "unreachable", "rate_limited",
)  # fmt: skip


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("because", REASONS)
@pytest.mark.parametrize("fail_on", FAIL_ON)
def test_consistent_is_always_zero(fail_on: str, because: str, refused: bool) -> None:
    verdict = verdict_of("consistent", stopped_because=because, endpoint_refused=refused)
    assert exit_code(verdict, fail_on) == 0


@pytest.mark.parametrize("because", REASONS)
@pytest.mark.parametrize("word", ["differs", "differs_replicated"])
@pytest.mark.parametrize(("fail_on", "expected"), [("differs", 1), ("inconclusive", 1), ("never", 0)])
def test_differs_is_one_unless_nothing_shall_fail(fail_on: str, expected: int, word: VerdictWord, because: str) -> None:
    assert exit_code(verdict_of(word, stopped_because=because), fail_on) == expected


@pytest.mark.parametrize(("fail_on", "expected"), [("differs", 3), ("inconclusive", 1), ("never", 0)])
@pytest.mark.parametrize("because", ["decided", "probes_used_up", "level_not_supported", "interrupted"])
def test_inconclusive_is_three_or_what_was_asked_for(because: str, fail_on: str, expected: int) -> None:
    assert exit_code(verdict_of("inconclusive", stopped_because=because), fail_on) == expected


@pytest.mark.parametrize("fail_on", FAIL_ON)
@pytest.mark.parametrize("because", ["refused", "unreachable", "rate_limited"])
def test_an_endpoint_that_does_not_answer_is_four(because: str, fail_on: str) -> None:
    assert exit_code(verdict_of("inconclusive", stopped_because=because), fail_on) == 4


@pytest.mark.parametrize("fail_on", FAIL_ON)
@pytest.mark.parametrize("because", REASONS)
def test_an_endpoint_that_refused_everything_is_four(because: str, fail_on: str) -> None:
    verdict = verdict_of("inconclusive", stopped_because=because, endpoint_refused=True)
    assert exit_code(verdict, fail_on) == 4


@pytest.mark.parametrize("fail_on", FAIL_ON)
@pytest.mark.parametrize("because", ["budget_requests", "budget_cost"])
def test_a_used_up_budget_is_five(because: str, fail_on: str) -> None:
    assert exit_code(verdict_of("inconclusive", stopped_because=because), fail_on) == 5


# -- docs/CHECKS.md --------------------------------------------------------------------------------------------


def test_the_page_of_checks_is_made_from_their_prose() -> None:
    assert PAGE.read_text("utf-8") == checks_page()


def test_every_check_that_is_run_has_prose_and_no_other() -> None:
    assert {check.__module__.rsplit(".", 1)[1] for check in CHECKS} == set(prose())
