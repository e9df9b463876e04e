"""One run as a row of the history: what was said, on what, at what cost, and how the endpoint served."""

from datetime import date, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field, ValidationError

from weighbridge.canonical import canonical_bytes, rounded, write_atomically
from weighbridge.errors import ConfigurationError, RunFolderError
from weighbridge.fleet import night_of
from weighbridge.plan import worst_case_tokens
from weighbridge.records import (
    AnyRecord,
    Axis,
    Cause,
    Finite,
    Observation,
    Outcome,
    Plan,
    Record,
    Verdict,
    VerdictWord,
    read_json,
)

ROW = "row.json"


class Row(Record):
    """One run. Numbers about speed are shown and never judged."""

    schema_: Literal["weighbridge/row/1"] = Field(default="weighbridge/row/1", alias="schema")
    run_id: str
    endpoint: str
    model: str
    night: date
    created_at: datetime
    weighbridge_version: str
    policy: str
    reference: str | None
    pool: str | None
    commitment: str
    sealed: bool = Field(description="whether the pool is one that nobody but the auditor could foresee")
    probes: list[str] = Field(description="those of the weights that were answered")
    verdict: VerdictWord
    cause: Cause | None
    exact_variant: str | None
    axes: dict[Axis, Outcome]
    log10_e_value: Finite | None
    noise_nats: Finite | None
    noise_low_nats: Finite | None
    noise_high_nats: Finite | None
    stopped_because: str
    answers_used: int
    requests_sent: int
    errors: int = Field(description="requests that were not answered")
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Finite | None
    spent_usd: Finite | None = Field(description="at most: an attempt that was not answered counts as its worst case")
    latency_s: Finite | None = Field(description="median, of one-token answers")
    first_token_s: Finite | None = Field(description="of the stream: until its first byte")
    tokens_per_s: Finite | None = Field(description="of the longest answer")

    model_config = Record.model_config | {"populate_by_name": True}


def make_row(folder: Path, *, sealed: bool = False) -> Row:
    """Read a judged run folder.

    Parameters
    ----------
    folder : pathlib.Path
    sealed : bool
        Whether its pool is sealed, where the plan is too old to know.

    Raises
    ------
    RunFolderError
        If it was not judged, or by a version whose files are others.
    """
    if not (folder / "verdict.json").exists():
        raise RunFolderError(f"{folder} was not judged", f"Judge it: weighbridge replay {folder}")
    plan = _read(Plan, folder / "plan.json")
    verdict = _read(Verdict, folder / "verdict.json")
    observations = _observations(folder / "observations.jsonl")
    try:
        created_at = datetime.fromisoformat(plan.created_at)
        night = night_of(created_at)
    except (ValueError, OverflowError):
        raise RunFolderError(f"{folder / 'plan.json'}: created_at is no time", "Restore the file") from None
    noise = verdict.effective_noise_nats
    answered = {o.request_id for o in observations if o.answered}
    return Row(
        run_id=plan.run_id, endpoint=plan.endpoint.name, model=plan.endpoint.model,
        night=night, created_at=created_at,
        weighbridge_version=verdict.weighbridge_version, policy=plan.policy.id,
        reference=plan.reference.digest if plan.reference is not None else None, pool=plan.pool.sha256 if plan.pool is not None else None,
        commitment=plan.draw.commitment, sealed=sealed or plan.sealed,
        probes=[r.probe.id for r in (*plan.probe_requests, *plan.text_requests, *plan.whole_requests) if r.request_id in answered],
        verdict=verdict.verdict, cause=verdict.cause, exact_variant=verdict.exact_variant, axes=verdict.axes,
        log10_e_value=verdict.log10_e_value, noise_nats=noise.value if noise else None, noise_low_nats=noise.low if noise else None,
        noise_high_nats=noise.high if noise else None, stopped_because=verdict.stopped_because, answers_used=verdict.answers_used,
        requests_sent=verdict.requests_sent, errors=sum(not o.answered for o in observations), prompt_tokens=verdict.prompt_tokens,
        completion_tokens=verdict.completion_tokens, cost_usd=verdict.cost_usd, spent_usd=spent_usd(plan, observations),
        **_speed(plan, observations),
    )  # fmt: skip


def row_bytes(row: Row) -> bytes:
    """The bytes of row.json."""
    return canonical_bytes(rounded(row.model_dump(mode="json", by_alias=True))) + b"\n"


def write_row(folder: Path, row: Row) -> None:
    """Write a run folder's row.json, from which the index is made again."""
    write_atomically(folder / ROW, row_bytes(row))


def read_row(path: Path) -> Row:
    """Read a row.json.

    Raises
    ------
    RunFolderError
        If it is not one.
    """
    try:
        return Row.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise RunFolderError(f"{path} is no row of this version", "Remove it; it is made again from its run") from None


def spent_usd(plan: Plan, observations: list[Observation]) -> float | None:
    """What a run has cost at most; None without a price."""
    price = plan.endpoint.price
    if price is None:
        return None
    worst = {request.request_id: worst_case_tokens(request) for request in plan.requests}
    total = 0.0
    for o in observations:
        known = o.prompt_tokens is not None
        total += (o.attempts - known) * price.cost_usd(*worst.get(o.request_id, (0, 0)))
        total += price.cost_usd(o.prompt_tokens or 0, (o.completion_tokens or 1) if known else 0)
    return total


def _read(kind: type[AnyRecord], file: Path) -> AnyRecord:
    try:
        return read_json(kind, file)
    except ConfigurationError:
        raise RunFolderError(
            f"{file} was not written by this version", f"Judge it again: weighbridge replay {file.parent}"
        ) from None


def _observations(file: Path) -> list[Observation]:
    try:
        with file.open("rb") as lines:
            return [Observation.model_validate_json(line) for line in lines]
    except (OSError, ValidationError):
        raise RunFolderError(
            f"{file} was not written by this version", f"Judge it again: weighbridge replay {file.parent}"
        ) from None


def _speed(plan: Plan, observations: list[Observation]) -> dict[str, Any]:
    """What the endpoint's answers took, as they came."""
    answered = {o.request_id: o for o in observations if o.answered}
    short = [answered[r.request_id].latency_s for r in plan.probe_requests if r.request_id in answered]
    streamed = [o.first_byte_s for o in answered.values() if o.streamed and o.first_byte_s is not None]
    longest = max(answered.values(), key=lambda o: o.completion_tokens or 0, default=None)
    tokens = longest.completion_tokens or 0 if longest is not None else 0
    rate = tokens / longest.latency_s if longest is not None and tokens > 1 and longest.latency_s > 0 else None
    return {
        "latency_s": median(short) if short else None,
        "first_token_s": streamed[0] if streamed else None,
        "tokens_per_s": rate,
    }
