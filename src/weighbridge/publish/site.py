"""What a site says: read from its log and the evidence beside it, and from nothing else. Pages show it and compute nothing."""

import json
import zipfile
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from weighbridge.attest import TrustedKey
from weighbridge.errors import EvidenceError
from weighbridge.fleet import slug_of
from weighbridge.history.changes import Change, changes_of, run_length
from weighbridge.history.index import Run
from weighbridge.publish.entries import (
    CommitmentsEntry,
    DisclosedEntry,
    Link,
    MethodEntry,
    ReferenceEntry,
    ReportEntry,
    StatementEntry,
)
from weighbridge.publish.log import Log
from weighbridge.records import Findings, Record, Verdict, read_toml
from weighbridge.reference.bundle import Manifest

SITE_FILE = "site.toml"
VALID_DAYS = 30  # after which a badge says that it has expired, and a page that its report is old
NIGHTS_SHOWN = 365
DISPUTES = {"dispute_opened": "open", "reply": "answered", "re_run": "re-run", "resolved": "resolved"}


class SiteFile(Record):
    """site.toml: what the operator of a site says of it."""

    schema_: Literal["weighbridge/site/1"] = Field(default="weighbridge/site/1", alias="schema")
    title: str = Field(default="Who serves it well", min_length=1, max_length=200)
    base_url: Link | None = Field(default=None, description="where the site will be, for the feed's links")
    contact: str | None = Field(default=None, max_length=200, description="whom a host writes to")

    model_config = Record.model_config | {"populate_by_name": True}


def read_site_file(root: Path) -> SiteFile:
    """What site.toml says; the defaults where there is none.

    Raises
    ------
    ConfigurationError
        Naming the field that is wrong.
    """
    path = root / SITE_FILE
    return read_toml(SiteFile, path) if path.exists() else SiteFile()


@dataclass(frozen=True)
class Settings:
    """What the operator of a site decides: its title, where it will be, whom to write to, and the signer's public key."""

    title: str
    base_url: str | None
    contact: str | None
    signer: TrustedKey | None
    today: date


@dataclass(frozen=True)
class Latest:
    """What the latest report of an endpoint rests on."""

    findings: Findings
    verdict: Verdict
    committed_before: bool  # whether the draw's commitment is in the log, entered before the audit began


@dataclass(frozen=True)
class EndpointPage:
    """One endpoint. ``nights`` holds its standing reports, oldest first; ``superseded`` those that a later one replaced."""

    slug: str
    name: str
    model: str
    latest: ReportEntry
    evidence: Latest
    nights: tuple[ReportEntry, ...]
    superseded: tuple[ReportEntry, ...]
    statements: tuple[StatementEntry, ...]
    changes: tuple[Change, ...]
    valid_until: date
    expired: bool

    @property
    def dispute(self) -> str | None:
        """How the latest dispute stands: open, answered, re-run or resolved; None where there is none. A reply alone opens none."""
        state = None
        for said in self.statements:
            if said.what in DISPUTES and (state is not None or said.what == "dispute_opened"):
                state = DISPUTES[said.what]
        return state

    @property
    def standing(self) -> dict[str, int]:
        """How many of its nights were said to be what."""
        return dict(Counter(report.verdict for report in self.nights))


@dataclass(frozen=True)
class ModelPage:
    """One model, as endpoints are asked for it, and the reference it is held against; None where there is none."""

    slug: str
    name: str
    endpoints: tuple[EndpointPage, ...]
    references: tuple[tuple[ReferenceEntry, Manifest], ...]


@dataclass(frozen=True)
class MethodPage:
    """One version of Weighbridge under one policy, from when on it judged, and how many reports it made."""

    slug: str
    entry: MethodEntry
    reports: int


@dataclass(frozen=True)
class Site:
    """Everything that the pages show."""

    settings: Settings
    log: Log
    updated: datetime | None
    endpoints: tuple[EndpointPage, ...]
    models: tuple[ModelPage, ...]
    methods: tuple[MethodPage, ...]
    disclosed: tuple[DisclosedEntry, ...]
    run_length_nights: float


def load_site(root: Path, log: Log, settings: Settings) -> Site:
    """Put together what a site says.

    Parameters
    ----------
    root : pathlib.Path
        Where evidence and references are.
    log : Log
    settings : Settings

    Raises
    ------
    EvidenceError
        If the evidence of an endpoint's latest report is missing or cannot be read.
    """
    replaced = {report.supersedes for report in log.reports() if report.supersedes is not None}
    by_slug: dict[str, list[ReportEntry]] = {}
    for report in log.reports():
        by_slug.setdefault(report.slug, []).append(report)
    about: dict[int, list[StatementEntry]] = {}
    for statement in log.statements():
        about.setdefault(statement.about, []).append(statement)
    committed = {
        c: entry.at for entry in reversed(log.entries) if isinstance(entry, CommitmentsEntry) for c in entry.commitments
    }
    length = run_length(len(by_slug))
    pages = []
    for slug, reports in sorted(by_slug.items()):
        standing = sorted((r for r in reports if r.index not in replaced), key=lambda r: (r.created_at, r.index))
        latest = standing[-1]
        until = latest.night + timedelta(days=VALID_DAYS)
        told = [s for r in reports for s in about.get(r.index, [])]
        at = committed.get(latest.commitment)
        pages.append(
            EndpointPage(
                slug=slug, name=latest.endpoint, model=latest.model, latest=latest,
                evidence=_latest(root, latest, at),
                nights=tuple(standing[-NIGHTS_SHOWN:]), superseded=tuple(r for r in reports if r.index in replaced),
                statements=tuple(sorted(told, key=lambda s: s.index)),
                changes=tuple(changes_of([_run(r) for r in standing[-NIGHTS_SHOWN:]], length)),
                valid_until=until, expired=until < settings.today,
            )
        )  # fmt: skip
    return Site(
        settings=settings, log=log, updated=log.entries[-1].at if log.entries else None, endpoints=tuple(pages),
        models=_models(root, log, pages), methods=_methods(log),
        disclosed=tuple(e for e in log.entries if isinstance(e, DisclosedEntry)), run_length_nights=length,
    )  # fmt: skip


def _latest(root: Path, report: ReportEntry, committed_at: datetime | None) -> Latest:
    path = root / report.folder / "evidence.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            findings, verdict = (archive.read(f"{name}.json") for name in ("findings", "verdict"))
            with archive.open("exchanges.jsonl") as lines:
                first = json.loads(lines.readline() or b"{}")
        began = datetime.fromisoformat(first["sent_at"]) if "sent_at" in first else None
        return Latest(
            findings=Findings.model_validate_json(findings), verdict=Verdict.model_validate_json(verdict),
            committed_before=committed_at is not None and began is not None and committed_at <= began,
        )  # fmt: skip
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        raise EvidenceError(
            f"{path} is missing or cannot be read", "Restore it from a copy: the log names its digest"
        ) from None


def _run(report: ReportEntry) -> Run:
    """A report as the history knows a run. Its probes are public by now, so that none of its nights counts as sealed."""
    return {
        "endpoint": report.endpoint, "night": report.night.isoformat(), "cause": report.cause, "log10_e_value": report.log10_e_value,
        "noise_nats": report.noise_nats, "sealed": 0, "pool": report.pool, "probes": "[]",
    }  # fmt: skip


def _models(root: Path, log: Log, pages: list[EndpointPage]) -> tuple[ModelPage, ...]:
    known = {e.digest: e for e in log.entries if isinstance(e, ReferenceEntry)}
    manifests = {digest: _manifest(root, digest) for digest in known}
    by_model: dict[str, list[EndpointPage]] = {}
    for page in pages:
        by_model.setdefault(page.model, []).append(page)
    models: list[ModelPage] = []
    taken: Counter[str] = Counter()
    for name, own in sorted(by_model.items()):
        slug = slug_of(name)
        taken[slug] += 1
        digests = sorted({page.latest.reference for page in own if page.latest.reference in known} - {None}, key=str)
        models.append(
            ModelPage(
                slug=slug if taken[slug] == 1 else f"{slug}-{taken[slug]}", name=name, endpoints=tuple(own),
                references=tuple((known[d], manifests[d]) for d in digests if d is not None),
            )
        )  # fmt: skip
    return tuple(models)


def _manifest(root: Path, digest: str) -> Manifest:
    path = root / "references" / f"{digest}.json"
    try:
        return Manifest.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        raise EvidenceError(f"{path} is missing or cannot be read", "Restore it from a copy") from None


def _methods(log: Log) -> tuple[MethodPage, ...]:
    entries = [e for e in log.entries if isinstance(e, MethodEntry)]
    count = Counter((r.weighbridge_version, r.policy, r.policy_version) for r in log.reports())
    pages, taken = [], Counter[str]()
    for entry in entries:
        policy = entry.policy
        slug = slug_of(f"{entry.weighbridge_version} {policy.id} {policy.version}")
        taken[slug] += 1
        slug = slug if taken[slug] == 1 else f"{slug}-{taken[slug]}"
        pages.append(MethodPage(slug, entry, count[entry.weighbridge_version, policy.id, policy.version]))
    return tuple(pages)
