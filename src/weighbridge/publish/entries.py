"""What stands in the log of a site: one entry for each thing that was said in public, each bound to the one before it."""

from datetime import date, datetime
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, TypeAdapter

from weighbridge.canonical import sha256_hex
from weighbridge.records import Axis, Cause, EvidenceLevel, Finite, Outcome, Policy, Record, VerdictWord

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FIRST = sha256_hex(b"weighbridge log")  # what the first entry names as the one before it
# In the order in which a dispute goes; a correction may come at any time.
StatementKind = Literal["dispute_opened", "reply", "re_run", "resolved", "correction"]


def _https(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme != "https" or not parts.hostname or parts.username is not None or not value.isprintable():
        raise ValueError("must be a plain https address")
    return value


Link = Annotated[str, Field(max_length=1000), AfterValidator(_https)]


class LogEntry(Record):
    """What every line of a log has."""

    index: int = Field(ge=0)
    previous: Sha256 = Field(description="the SHA-256 of the line before, without its line feed")
    at: datetime = Field(description="when it was entered, by the auditor's clock")


class MethodEntry(LogEntry):
    """The version and thresholds by which reports are judged from here on."""

    kind: Literal["method"] = "method"
    weighbridge_version: str
    policy: Policy


class ReferenceEntry(LogEntry):
    """A reference bundle, whose manifest is published beside the log."""

    kind: Literal["reference"] = "reference"
    id: str
    digest: Sha256
    model: str


class CommitmentsEntry(LogEntry):
    """The draws of one night, without saying whose they are."""

    kind: Literal["commitments"] = "commitments"
    night: date
    commitments: list[Sha256] = Field(max_length=20_000)


class HeldEntry(LogEntry):
    """Evidence that exists and is not shown yet: while a host has its notice, or until a sealed pool is given up."""

    kind: Literal["held"] = "held"
    evidence_sha256: Sha256
    until: date | None = Field(description="None: until the pool is disclosed")


class ReportEntry(LogEntry):
    """One audit, as it was said in public. Numbers about speed are shown and never judged."""

    kind: Literal["report"] = "report"
    endpoint: str = Field(max_length=120)
    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,99}$")
    base_url: str
    model: str
    claimed_precision: str | None
    night: date
    created_at: datetime
    run_id: str
    weighbridge_version: str
    policy: str
    policy_version: int
    level: EvidenceLevel
    reference: Sha256 | None
    pool: Sha256 | None
    commitment: Sha256
    verdict: VerdictWord
    cause: Cause | None
    exact_variant: str | None
    alone: VerdictWord = Field(description="what the audit says by itself")
    judged_together: int | None = Field(description="K, where a fleet's night was judged together")
    sentence: str
    axes: dict[Axis, Outcome]
    log10_e_value: Finite | None
    noise_nats: Finite | None
    noise_low_nats: Finite | None
    noise_high_nats: Finite | None
    answers_used: int
    requests_sent: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Finite | None
    latency_s: Finite | None
    first_token_s: Finite | None
    tokens_per_s: Finite | None
    stopped_because: str
    evidence_sha256: Sha256
    supersedes: int | None = Field(default=None, description="the report whose place it takes; that one stays")

    @property
    def folder(self) -> str:
        """Where its page and evidence are, from the site's root."""
        return f"reports/{self.slug}/{self.night}-{self.evidence_sha256[:12]}"


class StatementEntry(LogEntry):
    """What somebody has to say about a report: a host's reply, the course of a dispute, a correction of ours."""

    kind: Literal["statement"] = "statement"
    about: int = Field(ge=0, description="the report's index")
    what: StatementKind
    by: str = Field(min_length=1, max_length=120)
    text: str | None = Field(default=None, max_length=10_000)
    link: Link | None = None
    report: int | None = Field(default=None, description="the report of a re-run")


class DisclosedEntry(LogEntry):
    """A sealed pool that is given up: its probes may be shown, and no later draw from it counts as sealed."""

    kind: Literal["disclosed"] = "disclosed"
    sha256: Sha256


Entry: TypeAlias = (
    MethodEntry
    | ReferenceEntry
    | CommitmentsEntry
    | HeldEntry
    | ReportEntry
    | StatementEntry
    | DisclosedEntry
)  # fmt: skip
ENTRY: TypeAdapter[Entry] = TypeAdapter(Annotated[Entry, Field(discriminator="kind")])
