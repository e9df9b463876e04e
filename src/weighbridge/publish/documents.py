"""What a site says, for machines: canonical JSON with published schemas, which the site carries too."""

import base64
import json
import re
from collections.abc import Iterable
from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from weighbridge import __version__
from weighbridge.attest import TrustedKey
from weighbridge.canonical import SIGNIFICANT_DIGITS, canonical_bytes, rounded
from weighbridge.history.changes import Against, Change
from weighbridge.publish.entries import ENTRY, ReportEntry, Sha256, StatementEntry
from weighbridge.publish.site import DISPUTES, EndpointPage, MethodPage, ModelPage, Site
from weighbridge.records import Axis, Cause, Effect, Finding, Finite, Outcome, Record, VerdictWord
from weighbridge.report.document import SCHEMA_FILE

SCHEMAS = SCHEMA_FILE.parent
CARRIED = ("log-entry-1.json", "report-1.json", "site-endpoint-1.json", "site-index-1.json", "site-latest-1.json")
Dispute = Annotated[str, Field(pattern=f"^({'|'.join(DISPUTES.values())})$", description="how the latest one stands")]

# -- records ---------------------------------------------------------------------------------------------------


class Signer(Record):
    """The public key that the log's head and the evidence are signed with."""

    keyid: str
    comment: str
    base64: str = Field(description="the 32 bytes of an Ed25519 public key")


class LogState(Record):
    """What the log was when the site was made. `head` is the hash of its last line, `sha256` that of all of it."""

    entries: int
    head: Sha256
    sha256: Sha256


class Urls(Record):
    """Where an endpoint's documents are, from the site's root. `report` and `evidence` are those of its latest report."""

    page: str
    markdown: str
    json_: str = Field(alias="json")
    badge: str
    report: str
    evidence: str


class IndexEndpoint(Record):
    """How one endpoint stands."""

    slug: str
    name: str
    model: str
    policy: str
    verdict: VerdictWord
    cause: Cause | None
    exact_variant: str | None
    night: date
    noise_nats: Finite | None
    noise_low_nats: Finite | None
    noise_high_nats: Finite | None
    answers_used: int
    dispute: Dispute | None
    expired: bool
    valid_until: date
    evidence_sha256: Sha256
    urls: Urls


class IndexReference(Record):
    """A reference bundle, and where its manifest is."""

    id: str
    digest: Sha256
    manifest: str


class IndexModel(Record):
    """One model, and the slugs of the endpoints that claim to serve it."""

    slug: str
    name: str
    endpoints: list[str]
    references: list[IndexReference]
    page: str


class IndexMethod(Record):
    """One version of Weighbridge under one policy, and how many reports it made."""

    slug: str
    weighbridge_version: str
    policy: str
    policy_version: int
    since: datetime
    reports: int
    page: str


class SiteIndex(Record):
    """index.json: everything that the site is about, and where it is."""

    schema_: Literal["weighbridge/site-index/1"] = Field(default="weighbridge/site-index/1", alias="schema")
    title: str
    weighbridge_version: str = Field(description="that made the pages; the same one makes them again to the same bytes")
    made_on: date = Field(description="the day as of which reports are old or not")
    updated: datetime | None
    signer: Signer | None
    log: LogState
    endpoints: list[IndexEndpoint]
    models: list[IndexModel]
    methods: list[IndexMethod]

    model_config = Record.model_config | {"populate_by_name": True}


class LatestReport(Record):
    """The latest report of one endpoint, and what has been said about its reports."""

    slug: str
    report: ReportEntry
    committed_before: bool = Field(description="whether the draw's commitment was in the log before the audit began")
    dispute: Dispute | None
    not_excluded: list[str] = Field(description="departures that this evidence could not have seen")
    statements: list[StatementEntry]


class SiteLatest(Record):
    """latest.json: the latest report of every endpoint."""

    schema_: Literal["weighbridge/site-latest/1"] = Field(default="weighbridge/site-latest/1", alias="schema")
    updated: datetime | None
    endpoints: list[LatestReport]

    model_config = Record.model_config | {"populate_by_name": True}


class FindingInShort(Record):
    """What one check concludes, without the details that the evidence holds."""

    check: str
    axis: Axis
    outcome: Outcome
    cause: Cause | None
    summary: str
    effects: list[Effect]
    answers_used: int
    log10_e_value: Finite | None
    not_excluded: list[str]
    to_resolve: str | None


class NightInShort(Record):
    """One report in short. Its whole entry is line `index`, counted from 0, of the log."""

    index: int
    night: date
    verdict: VerdictWord
    cause: Cause | None
    noise_nats: Finite | None
    noise_low_nats: Finite | None
    noise_high_nats: Finite | None
    log10_e_value: Finite | None
    answers_used: int
    requests_sent: int
    errors: int
    cost_usd: Finite | None
    latency_s: Finite | None
    first_token_s: Finite | None
    tokens_per_s: Finite | None
    evidence_sha256: Sha256
    report: str = Field(description="its page, from the site's root")
    supersedes: int | None = Field(description="the index of the report whose place it takes")


class ChangeFound(Record):
    """One change: the night on which it was found, and the likeliest one on which it came."""

    against: Against
    found: date
    began: date
    log10_detector: Finite
    run_length_nights: Finite = Field(description="nights without a change before one is found all the same, at least")
    cause: str | None


class SiteEndpoint(Record):
    """endpoints/SLUG/index.json: one endpoint, its latest report and its nights, oldest first."""

    schema_: Literal["weighbridge/site-endpoint/1"] = Field(default="weighbridge/site-endpoint/1", alias="schema")
    slug: str
    name: str
    model: str
    latest: ReportEntry
    findings: list[FindingInShort]
    nights: list[NightInShort]
    changes: list[ChangeFound]
    statements: list[StatementEntry]
    superseded: list[NightInShort] = Field(description="reports that a later one replaced")

    model_config = Record.model_config | {"populate_by_name": True}


# -- documents -------------------------------------------------------------------------------------------------


def documents(site: Site) -> dict[str, bytes]:
    """Every document for machines, by its path from the site's root."""
    return {
        "index.json": _bytes(_index(site)),
        "latest.json": _bytes(_latest(site)),
        **{_urls(page).json_: _endpoint(page) for page in site.endpoints},
        **{f"schemas/{name}": (SCHEMAS / name).read_bytes() for name in CARRIED},
    }


def _bytes(document: Record) -> bytes:
    return canonical_bytes(_value(document)) + b"\n"


def _value(document: Record) -> Any:
    return rounded(document.model_dump(mode="json", by_alias=True))


def _index(site: Site) -> SiteIndex:
    key = site.settings.signer
    return SiteIndex(
        title=site.settings.title,
        weighbridge_version=__version__,
        made_on=site.settings.today,
        updated=site.updated,
        signer=None if key is None else _signer(key),
        log=LogState(entries=len(site.log.entries), head=site.log.head, sha256=site.log.sha256),
        endpoints=[_index_endpoint(page) for page in site.endpoints],
        models=[_index_model(page) for page in site.models],
        methods=[_index_method(page) for page in site.methods],
    )


def _signer(key: TrustedKey) -> Signer:
    return Signer(keyid=key.keyid, comment=key.comment, base64=base64.b64encode(key.raw).decode())


def _index_endpoint(page: EndpointPage) -> IndexEndpoint:
    latest = page.latest
    return IndexEndpoint(
        slug=page.slug, name=page.name, model=page.model, policy=latest.policy, verdict=latest.verdict, cause=latest.cause,
        exact_variant=latest.exact_variant, night=latest.night, noise_nats=latest.noise_nats,
        noise_low_nats=latest.noise_low_nats, noise_high_nats=latest.noise_high_nats, answers_used=latest.answers_used,
        dispute=page.dispute, expired=page.expired, valid_until=page.valid_until, evidence_sha256=latest.evidence_sha256,
        urls=_urls(page),
    )  # fmt: skip


def _urls(page: EndpointPage) -> Urls:
    own, report = f"endpoints/{page.slug}", page.latest.folder
    return Urls(
        page=f"{own}/index.html", markdown=f"{own}/index.md", json=f"{own}/index.json", badge=f"{own}/badge.svg",
        report=f"{report}/report.html", evidence=f"{report}/evidence.zip",
    )  # fmt: skip


def _index_model(page: ModelPage) -> IndexModel:
    return IndexModel(
        slug=page.slug,
        name=page.name,
        endpoints=[endpoint.slug for endpoint in page.endpoints],
        references=[
            IndexReference(id=entry.id, digest=entry.digest, manifest=f"references/{entry.digest}.json")
            for entry, _ in page.references
        ],
        page=f"models/{page.slug}/index.html",
    )


def _index_method(page: MethodPage) -> IndexMethod:
    return IndexMethod(
        slug=page.slug,
        weighbridge_version=page.entry.weighbridge_version,
        policy=page.entry.policy.id,
        policy_version=page.entry.policy.version,
        since=page.entry.at,
        reports=page.reports,
        page=f"methods/{page.slug}/index.html",
    )


def _latest(site: Site) -> SiteLatest:
    return SiteLatest(
        updated=site.updated,
        endpoints=[
            LatestReport(
                slug=page.slug,
                report=page.latest,
                committed_before=page.evidence.committed_before,
                dispute=page.dispute,
                not_excluded=page.evidence.verdict.not_excluded,
                statements=list(page.statements),
            )
            for page in site.endpoints
        ],
    )


def _endpoint(page: EndpointPage) -> bytes:
    """The nights, of which there are many, are written apart from the rest; the bytes are those of `canonical_bytes`."""
    document = SiteEndpoint(
        slug=page.slug,
        name=page.name,
        model=page.model,
        latest=page.latest,
        findings=[_in_short(finding) for finding in page.evidence.findings.findings],
        nights=[],
        changes=[_change(change) for change in page.changes],
        statements=list(page.statements),
        superseded=[],
    )
    fields = {name: canonical_bytes(value) for name, value in _value(document).items()}
    fields |= {"nights": _nights(page.nights), "superseded": _nights(page.superseded)}
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), fields[name]) for name in sorted(fields)) + b"}\n"


def _in_short(finding: Finding) -> FindingInShort:
    return FindingInShort(**finding.model_dump(include=set(FindingInShort.model_fields)))


def _change(change: Change) -> ChangeFound:
    return ChangeFound(
        against=change.against,
        found=date.fromisoformat(change.found),
        began=date.fromisoformat(change.began),
        log10_detector=change.log10_detector,
        run_length_nights=change.run_length_nights,
        cause=change.cause,
    )


# A `NightInShort` in canonical form. What stands in it is a number, or a word or a path that needs no escape.
_NIGHT = (
    '{"answers_used":%d,"cause":%s,"cost_usd":%s,"errors":%d,"evidence_sha256":"%s","first_token_s":%s,"index":%d,'
    '"latency_s":%s,"log10_e_value":%s,"night":"%s","noise_high_nats":%s,"noise_low_nats":%s,"noise_nats":%s,'
    '"report":"%s/report.html","requests_sent":%d,"supersedes":%s,"tokens_per_s":%s,"verdict":"%s"}'
)


def _nights(reports: Iterable[ReportEntry]) -> bytes:
    return f"[{','.join(_night(report) for report in reports)}]".encode()


def _night(r: ReportEntry) -> str:
    return _NIGHT % (
        r.answers_used, "null" if r.cause is None else f'"{r.cause}"', _number(r.cost_usd), r.errors, r.evidence_sha256,
        _number(r.first_token_s), r.index, _number(r.latency_s), _number(r.log10_e_value), r.night, _number(r.noise_high_nats),
        _number(r.noise_low_nats), _number(r.noise_nats), r.folder, r.requests_sent, "null" if r.supersedes is None else r.supersedes,
        _number(r.tokens_per_s), r.verdict,
    )  # fmt: skip


_PLAIN = re.compile(r"0|-?(?:0\.|[1-9])[0-9.]*")  # as RFC 8785 writes it too; what has an exponent or no value is not


def _number(value: float | None) -> str:
    if value is None:
        return "null"
    text = f"{value:.{SIGNIFICANT_DIGITS}g}"
    return text if _PLAIN.fullmatch(text) else canonical_bytes(rounded(value)).decode()


# -- schemas ---------------------------------------------------------------------------------------------------


def schemas() -> dict[str, str]:
    """The JSON Schemas by file name, as text; `python -m weighbridge.publish.documents` writes them into the package."""
    made = {f"site-{name}-1.json": kind.model_json_schema(by_alias=True, mode="serialization") for name, kind in _KINDS}
    made["log-entry-1.json"] = ENTRY.json_schema(by_alias=True, mode="serialization")
    return {name: _schema(schema) for name, schema in made.items()}


_KINDS: tuple[tuple[str, type[Record]], ...] = (
    ("index", SiteIndex),
    ("latest", SiteLatest),
    ("endpoint", SiteEndpoint),
)


def _schema(schema: dict[str, Any]) -> str:
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file_name, text in schemas().items():
        (SCHEMAS / file_name).write_text(text, "utf-8")
