"""What is new since the site was last made: judged runs are sealed and entered in the log, each once."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weighbridge.audit import bundle_of
from weighbridge.canonical import canonical_bytes, sha256_hex, write_atomically
from weighbridge.errors import ConfigurationError, RunFolderError, WeighbridgeError
from weighbridge.fleet import slug_of
from weighbridge.history.index import Run, current_row
from weighbridge.history.row import Row
from weighbridge.nightly.collection import NIGHT, Night
from weighbridge.nightly.judgement import FLEET_NIGHT, FleetNight, FleetRow
from weighbridge.nightly.schedule import bundle_at
from weighbridge.plan import pool_of
from weighbridge.probes import Level
from weighbridge.publish.entries import (
    FIRST,
    CommitmentsEntry,
    DisclosedEntry,
    HeldEntry,
    MethodEntry,
    ReferenceEntry,
    ReportEntry,
)
from weighbridge.publish.evidence import seal
from weighbridge.publish.log import Appending
from weighbridge.records import Plan, Policy, Verdict, read_json
from weighbridge.reference.bundle import Bundle
from weighbridge.reference.contexts import LEVELS as CONTEXT_LEVELS
from weighbridge.store import RunFolder

EVIDENCE = "evidence.zip"
REPORT = "report.html"
AT_ONCE = 32  # runs whose evidence is in memory together
# What a run was judged to be, in the index and in a report's entry: another one means that it was judged again.
_JUDGED = ("weighbridge_version", "log10_e_value", "noise_nats", "answers_used")
# The columns of the history that are needed to know what is new.
NEEDED = ("folder", "endpoint", "run_id", "verdict", *_JUDGED)


@dataclass(frozen=True)
class Terms:
    """On which terms runs are made public.

    ``notice_days`` is how long a host has before anything that differs is shown.
    """

    now: datetime
    notice_days: int
    key_file: Path | None = None


@dataclass(frozen=True)
class Held:
    """A report that is not shown yet, until when (None: until its pool is disclosed), and where its evidence is for the host."""

    endpoint: str
    until: date | None
    evidence: Path


@dataclass
class Entered:
    """What an update has done, for the person who runs it."""

    reports: list[ReportEntry] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def enter_runs(
    runs: list[Run], root: Path, site: Path, log: Appending, terms: Terms, say: Callable[[str], None]
) -> Entered:
    """Seal every run that is not in the log as it now is, and enter it.

    Parameters
    ----------
    runs : list of dict
        The history's rows, oldest first, with the columns `NEEDED`.
    root : pathlib.Path
        Under which their folders lie.
    site : pathlib.Path
        Where evidence and pages go; evidence is there before its entry is.
    log : Appending
    terms : Terms
    say : callable

    Raises
    ------
    ConfigurationError
        If two endpoints would share a page.
    """
    state = _State.of(log)
    done = Entered()
    fresh = [run for run in runs if not state.knows(run)]
    for run in fresh:
        _own_page(run["endpoint"], state)
    _commitments({(root / run["folder"]).parent for run in fresh}, log, terms)
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        for start in range(0, len(fresh), AT_ONCE):
            some = fresh[start : start + AT_ONCE]
            for run, sealed in zip(
                some, pool.map(lambda r: _sealed(root / r["folder"], terms.key_file), some), strict=True
            ):
                try:
                    if isinstance(sealed, Exception):
                        raise sealed
                    _enter(sealed, site, log, state, terms, done)
                except (WeighbridgeError, OSError) as error:
                    done.left_out.append((run["endpoint"], str(error)))
                except (ValueError, RecursionError) as error:
                    why = f"{root / run['folder']} holds what no report can say ({type(error).__name__})"
                    done.left_out.append((run["endpoint"], why))
            say(f"{start + len(some)} of {len(fresh)} new runs sealed")
        # Evidence is on the disk before the log says so; many files at once are not much slower than one.
        list(pool.map(_synced, [site / entry.folder / EVIDENCE for entry in done.reports]))
    return done


def _write(path: Path, data: bytes) -> None:
    """Write a file that no entry names yet: what a crash leaves of it is written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _synced(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Sealed:
    """One run and its evidence."""

    folder: Path
    plan: Plan
    verdict: Verdict
    row: Row
    bundle: Bundle | None
    data: bytes


def _sealed(folder: Path, key_file: Path | None) -> _Sealed | Exception:
    try:
        plan = RunFolder(folder).plan()
        verdict = read_json(Verdict, folder / "verdict.json")
        bundle = bundle_of(plan, load=bundle_at)
        data = seal(folder, _manifest(bundle) if bundle is not None else None, key_file)
        return _Sealed(folder, plan, verdict, current_row(folder), bundle, data)
    except (WeighbridgeError, OSError, ValueError, RecursionError) as error:
        return error


@lru_cache(maxsize=8)
def _manifest(bundle: Bundle) -> bytes:
    return canonical_bytes(bundle.manifest.model_dump(mode="json", by_alias=True))


@dataclass
class _State:
    """What the log already holds."""

    reports: dict[str, ReportEntry]
    held: dict[str, date | None]
    methods: set[bytes]
    references: set[str]
    disclosed: set[str]
    names: dict[str, str]
    nights: dict[Path, dict[str, FleetRow]] = field(default_factory=dict)

    @classmethod
    def of(cls, log: Appending) -> "_State":
        state = cls({}, {}, set(), set(), set(), {})
        for entry in log.entries:
            match entry:
                case ReportEntry():
                    state.reports[entry.run_id] = entry
                    state.names[entry.slug] = entry.endpoint
                case HeldEntry():
                    state.held[entry.evidence_sha256] = entry.until
                case MethodEntry():
                    state.methods.add(_method(entry.weighbridge_version, entry.policy))
                case ReferenceEntry():
                    state.references.add(entry.digest)
                case DisclosedEntry():
                    state.disclosed.add(entry.sha256)
                case _:
                    pass
        return state

    def knows(self, run: Run) -> bool:
        entry = self.reports.get(run["run_id"])
        return (
            entry is not None
            and entry.alone == run["verdict"]
            and all(getattr(entry, name) == run[name] for name in _JUDGED)
        )


def _enter(sealed: _Sealed, site: Path, log: Appending, state: _State, terms: Terms, done: Entered) -> None:
    folder, plan, verdict, row, data = sealed.folder, sealed.plan, sealed.verdict, sealed.row, sealed.data
    digest = sha256_hex(data)
    before = state.reports.get(plan.run_id)
    if before is not None and before.evidence_sha256 == digest:
        return
    together = _judged_together(folder, state)
    named = together.get(plan.endpoint.name) if together is not None else None
    if together is not None and (named is None or named.verdict is None):
        raise RunFolderError(
            f"the night of {folder} was not judged yet", "Let `weighbridge nightly` end, then publish again"
        )
    word = verdict.verdict if named is None or named.verdict is None else named.verdict
    # What an audit says by itself stands in its evidence, whatever a fleet's night lets be said of it.
    differs = word.startswith("differs") or verdict.verdict.startswith("differs")
    until = _held_until(_is_sealed(plan, sealed.bundle, state), differs, digest, state, terms)
    if until is not _SHOWN:
        if state.held.get(digest, _SHOWN) != until:
            log.add(HeldEntry, terms.now, evidence_sha256=digest, until=until)
            state.held[digest] = until
        write_atomically(folder / EVIDENCE, data)
        done.held.append(Held(plan.endpoint.name, until, folder / EVIDENCE))
        return
    _method_and_reference(sealed, site, log, state, terms.now)
    said: dict[str, Any] = {
        "endpoint": plan.endpoint.name, "slug": slug_of(plan.endpoint.name), "base_url": plan.endpoint.base_url, "model": plan.endpoint.model,
        "claimed_precision": plan.endpoint.claimed_precision, "night": row.night, "created_at": row.created_at, "run_id": plan.run_id,
        "weighbridge_version": verdict.weighbridge_version, "policy": plan.policy.id, "policy_version": plan.policy.version, "level": verdict.level or plan.level,
        "reference": row.reference, "pool": row.pool, "commitment": row.commitment,
        "verdict": word, "cause": verdict.cause if named is None else named.cause, "exact_variant": verdict.exact_variant if word.startswith("differs") else None,
        "alone": verdict.verdict, "judged_together": None if named is None else named.judged_together,
        "sentence": verdict.sentence if named is None or word == "consistent" else f"{named.sentence} {verdict.sentence}" if word.startswith("differs") else named.sentence or "",
        "axes": verdict.axes, "log10_e_value": row.log10_e_value, "noise_nats": row.noise_nats, "noise_low_nats": row.noise_low_nats,
        "noise_high_nats": row.noise_high_nats, "answers_used": row.answers_used, "requests_sent": row.requests_sent, "errors": row.errors,
        "prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens, "cost_usd": row.cost_usd, "latency_s": row.latency_s,
        "first_token_s": row.first_token_s, "tokens_per_s": row.tokens_per_s, "stopped_because": row.stopped_because,
        "evidence_sha256": digest, "supersedes": before.index if before is not None else None,
    }  # fmt: skip
    # Evidence is there before its entry is, whatever befalls either.
    place = site / ReportEntry(index=0, previous=FIRST, at=terms.now, **said).folder
    _write(place / EVIDENCE, data)
    # The page is one of the evidence's files, and can be taken from there again.
    _write(place / REPORT, (folder / REPORT).read_bytes())
    entry = log.add(ReportEntry, terms.now, **said)
    state.reports[plan.run_id] = entry
    done.reports.append(entry)


_SHOWN = date.min


def _is_sealed(plan: Plan, bundle: Bundle | None, state: _State) -> bool:
    """Whether a run shows probes that nobody but the auditor is to know: those of the weights, or those of the prompt."""
    if bundle is None:
        return False
    by_text: tuple[Level, ...] = (
        *(CONTEXT_LEVELS if plan.text_requests else ()),
        *(("whole",) if plan.whole_requests else ()),
    )
    levels: tuple[Level, ...] = (plan.level, "prompt", *by_text)
    pools = [pool_of(bundle, level) for level in levels if bundle.pool_at(level) is not None]
    return any(
        pool.description.visibility == "sealed" and pool.identity.sha256 not in state.disclosed for pool in pools
    )


def _held_until(sealed: bool, differs: bool, digest: str, state: _State, terms: Terms) -> date | None:
    """Until when a report is not shown; `_SHOWN` where it may be."""
    if sealed:
        return None
    if not differs or terms.notice_days == 0:
        return _SHOWN
    until = state.held.get(digest) or terms.now.date() + timedelta(days=terms.notice_days)
    return _SHOWN if until <= terms.now.date() else until


def _own_page(name: str, state: _State) -> None:
    """See to it that no two endpoints share a page."""
    other = state.names.setdefault(slug_of(name), name)
    if other != name:
        raise ConfigurationError(
            f"the endpoints {other!r} and {name!r} would share a page", "Publish them on two sites, or name them apart"
        )


def _judged_together(folder: Path, state: _State) -> dict[str, FleetRow] | None:
    """What was said of each endpoint of a fleet on the night that a run belongs to; None of a run of no night."""
    night = folder.parent
    if not (night / NIGHT).exists():
        return None
    if night not in state.nights:
        path = night / FLEET_NIGHT
        rows = read_json(FleetNight, path).endpoints if path.exists() else []
        state.nights[night] = {row.endpoint: row for row in rows}
    return state.nights[night]


def _method(version: str, policy: Policy) -> bytes:
    return canonical_bytes([version, policy.model_dump(mode="json", by_alias=True)])


def _method_and_reference(sealed: _Sealed, site: Path, log: Appending, state: _State, now: datetime) -> None:
    version, policy, bundle = sealed.verdict.weighbridge_version, sealed.plan.policy, sealed.bundle
    method = _method(version, policy)
    if method not in state.methods:
        log.add(MethodEntry, now, weighbridge_version=version, policy=policy)
        state.methods.add(method)
    if bundle is not None and bundle.identity.digest not in state.references:
        identity = bundle.identity
        write_atomically(site / "references" / f"{identity.digest}.json", _manifest(bundle))
        log.add(ReferenceEntry, now, id=identity.id, digest=identity.digest, model=bundle.manifest.model)
        state.references.add(identity.digest)


def _commitments(nights: set[Path], log: Appending, terms: Terms) -> None:
    for path in sorted(night / NIGHT for night in nights):
        if not path.exists():
            continue
        try:
            commit_night(log, read_json(Night, path), terms.now)
        except ValidationError:
            raise ConfigurationError(f"{path} holds a commitment that is none", "Restore it") from None
        except ValueError:
            raise ConfigurationError(f"{path} names no night", "Restore it") from None


def commit_night(log: Appending, night: Night, now: datetime) -> None:
    """Enter the draws of a night that are not in the log yet, in an order that says nothing of whose they are."""
    known = {c for entry in log.entries if isinstance(entry, CommitmentsEntry) for c in entry.commitments}
    new = sorted({one.commitment for one in night.committed} - known)
    if new:
        log.add(CommitmentsEntry, now, night=date.fromisoformat(night.night), commitments=new)
