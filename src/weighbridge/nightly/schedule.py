"""What is due tonight, and what each endpoint may take of the month's budgets."""

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal

from weighbridge.canonical import sha256_hex, write_atomically
from weighbridge.collect import asked_to_wait_s
from weighbridge.errors import ConfigurationError, WeighbridgeError
from weighbridge.fleet import Fleet, FleetEndpoint, night_of
from weighbridge.history.index import Run
from weighbridge.judge.policy import load_policy
from weighbridge.plan import make_plan, worst_case_usd
from weighbridge.records import Endpoint, Plan
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.store import RunFolder

DRAW_KEY = "draws.key"
# Why a run may have stopped that is gone on with the same night.
TRIED_AGAIN = frozenset({"unreachable", "rate_limited", "interrupted"})
State = Literal["begin", "resume", "done", "waits", "failed"]


@dataclass(frozen=True)
class Task:
    """One endpoint tonight. ``why`` says what it waits for, or what failed; ``plan`` is there where something is to be sent."""

    endpoint: FleetEndpoint
    folder: Path
    state: State
    why: str | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Shard:
    """One part of a fleet that is audited by itself: number `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read ``2/4``.

        Raises
        ------
        ConfigurationError
            If it is not such a pair.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 10_000):
            raise ConfigurationError(f"--shard {text!r} is no part of a whole", "Write it as 2/4: the second of four")
        return cls(int(index), int(count))

    def holds(self, endpoint: FleetEndpoint) -> bool:
        """Whether an endpoint is this part's: by its name, so that others do not move when one is added."""
        return int(sha256_hex(endpoint.slug.encode())[:12], 16) % self.count == self.index - 1


def schedule(fleet: Fleet, root: Path, runs: list[Run], now: datetime, shard: Shard) -> list[Task]:
    """What is to be done for every endpoint of a shard tonight.

    Every endpoint takes its worst case off the budgets; those that were not audited for the longest time come first. A shard knows
    nothing of what others spend, so it has its share of the fleet's budgets: that of its endpoints.

    Parameters
    ----------
    fleet : Fleet
    root : pathlib.Path
        The folder of the fleet's nights.
    runs : list of dict
        Its history so far, oldest first.
    now : datetime
    shard : Shard

    Raises
    ------
    ConfigurationError
        If a later night is recorded already: by one of the two clocks nothing can be said of what is due.
    """
    night = night_of(now)
    folder = root / night.isoformat()
    ahead = max((run["night"] for run in runs), default="")
    if ahead > night.isoformat():
        raise ConfigurationError(
            f"the clock says that this is the night of {night}, but that of {ahead} is recorded already in {root}",
            f"Set the clock right; if it was wrong then, move the folder {ahead} elsewhere",
        )
    earlier = [run for run in runs if run["night"] < night.isoformat()]
    last = {run["endpoint"]: run["created_at"] for run in earlier}
    own = [e for e in fleet.endpoint if shard.holds(e)]
    begun = {e.slug for e in own if (folder / e.slug / "plan.json").exists()}
    going_on = {f"{night}/{slug}" for slug in begun}
    key = _draw_key(root)
    budgets = _budgets(fleet, len(own) / len(fleet.endpoint))
    ledger = _Ledger.of(budgets, [run for run in runs if run["folder"] not in going_on], now)
    for plan, requests in _cut_off(root, now, {run["folder"] for run in runs} | going_on):
        ledger.take(plan.endpoint, requests)
    tasks = {}
    # What was begun may be gone on with, so it has its part of the budgets before anything else.
    for endpoint in sorted(own, key=lambda e: (e.slug not in begun, str(last.get(e.name, "")), e.slug)):
        tasks[endpoint.slug] = _task(fleet, endpoint, folder / endpoint.slug, night, now, key, ledger)
    return [tasks[e.slug] for e in own]


def collected(fleet: Fleet, root: Path, night: str, said: dict[str, tuple[State, str | None]]) -> list[Task]:
    """What was collected of every endpoint of a fleet on one night; ``said`` holds, by endpoint, what its shard said of it."""
    tasks = []
    for endpoint in fleet.endpoint:
        folder = root / night / endpoint.slug
        state, why = said.get(endpoint.name, ("done", None))
        if state != "done":
            tasks.append(Task(endpoint, folder, state, why))
            continue
        if not (folder / "plan.json").exists():
            tasks.append(Task(endpoint, folder, "waits", "it was not audited this night"))
            continue
        try:
            tasks.append(Task(endpoint, folder, "done", why, RunFolder(folder).plan()))
        except (WeighbridgeError, OSError) as error:
            tasks.append(Task(endpoint, folder, "failed", said_of(error, folder)))
    return tasks


def said_of(error: Exception, folder: Path) -> str:
    """What befell one endpoint, in one line: a fault of ours as well, so that the others go on."""
    if isinstance(error, WeighbridgeError):
        return str(error)
    if isinstance(error, OSError):
        return f"{folder}: {error.strerror or error}"
    return (
        f"{folder}: a fault of Weighbridge's own ({type(error).__name__}). Please report it; what was collected is kept"
    )


def _task(
    fleet: Fleet, endpoint: FleetEndpoint, folder: Path, night: date, now: datetime, key: bytes, ledger: "_Ledger",
) -> Task:  # fmt: skip
    try:
        if (folder / "plan.json").exists():
            task = _begun(endpoint, folder, ledger, now)
        else:
            plan = _planned(fleet, endpoint, night, now, key)
            refusal = ledger.refuses(endpoint, plan)
            if refusal is not None:
                return Task(endpoint, folder, "waits", refusal)
            ledger.take(plan.endpoint, plan.endpoint.limits.max_requests)
            task = Task(endpoint, folder, "begin", plan=plan)
    except (WeighbridgeError, OSError) as error:
        return Task(endpoint, folder, "failed", said_of(error, folder))
    if task.state in ("begin", "resume") and not endpoint.is_open(now):
        hours = f"{endpoint.hours[0]:02d} to {endpoint.hours[1]:02d} UTC" if endpoint.hours is not None else ""
        return Task(endpoint, folder, "waits", f"it is asked from {hours}")
    return task


def _begun(endpoint: FleetEndpoint, folder: Path, ledger: "_Ledger", now: datetime) -> Task:
    run = RunFolder(folder)
    plan = run.plan()
    ledger.take(plan.endpoint, plan.endpoint.limits.max_requests)
    if not run.is_own():
        why = f"{folder} was not started by you, or its plan was changed; remove it to audit anew"
        return Task(endpoint, folder, "failed", why)
    exchanges, stopped = run.exchanges()
    if stopped is not None and stopped.because == "rate_limited" and exchanges:
        last = exchanges[-1]
        came_back = datetime.fromisoformat(last.sent.sent_at) + timedelta(seconds=last.received.latency_s)
        # A day at most: nobody is waited for until next year.
        wait_s = min(asked_to_wait_s(last.received, came_back) or 0.0, 86_400.0)
        if now < came_back + timedelta(seconds=wait_s):
            until = (came_back + timedelta(seconds=wait_s)).astimezone(UTC)
            return Task(endpoint, folder, "waits", f"it asked not to be asked before {until:%H:%M} UTC", plan)
    through = stopped is not None and stopped.because not in TRIED_AGAIN
    return Task(endpoint, folder, "done" if through else "resume", plan=plan)


@lru_cache(maxsize=8)
def bundle_at(reference: str) -> Bundle:
    """A bundle by its folder or name, loaded once for all endpoints of a fleet."""
    return load_bundle(reference)


def _planned(fleet: Fleet, endpoint: FleetEndpoint, night: date, now: datetime, key: bytes) -> Plan:
    """The plan of a night, whose limit is its own worst case: what it reserves is what it can spend at most."""
    bundle = None
    if endpoint.reference is not None:
        bundle = bundle_at(endpoint.reference)
    seed = hmac.new(key, f"{night} {endpoint.slug}".encode(), hashlib.sha256).hexdigest()[:32]
    plan = make_plan(
        endpoint.as_endpoint(endpoint.limits.max_cost_usd), load_policy(endpoint.policy), bundle, level=endpoint.level,
        fleet_size=len(fleet.endpoint), seed=seed, run_id=sha256_hex(f"run {seed}".encode())[:16],
        created_at=now.astimezone(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    most = [usd for usd in (worst_case_usd(plan), endpoint.limits.max_cost_usd) if usd is not None]
    # Of an endpoint that is free of charge nothing is too much.
    limit = min(most) if most and min(most) > 0 else None
    return plan.model_copy(update={"endpoint": endpoint.as_endpoint(limit)})


def _cut_off(root: Path, now: datetime, known: set[str]) -> Iterator[tuple[Plan, int]]:
    """The month's runs that were cut off and never judged, and how many requests they sent: no history says what they cost."""
    month = now.astimezone(UTC).strftime("%Y-%m")
    since = now.astimezone(UTC).date().replace(day=1) - timedelta(days=1)
    for night in sorted(file.parent for file in root.glob("*/night.json")):
        if night.name < since.isoformat():
            continue
        for folder in sorted(night.iterdir()):
            if f"{night.name}/{folder.name}" in known or not (folder / "plan.json").exists():
                continue
            try:
                plan = RunFolder(folder).plan()
                sent = len(RunFolder(folder).exchanges()[0])
            except (WeighbridgeError, OSError):
                continue
            if sent and plan.created_at.startswith(month):
                yield plan, sent


def _budgets(fleet: Fleet, share: float) -> Fleet:
    """A fleet whose own budgets are a share of what they are."""
    usd, requests = fleet.max_cost_usd_per_month, fleet.max_requests_per_month
    return fleet.model_copy(
        update={
            "max_cost_usd_per_month": None if usd is None else usd * share,
            "max_requests_per_month": None if requests is None else int(requests * share),
        }
    )


class _Ledger:
    """What is left of the month's budgets: of each endpoint's, and of the fleet's."""

    def __init__(self, fleet: Fleet, spent: dict[str, tuple[float, int]]) -> None:
        self._fleet = fleet
        self._spent = spent

    @classmethod
    def of(cls, fleet: Fleet, runs: list[Run], now: datetime) -> "_Ledger":
        month = now.astimezone(UTC).strftime("%Y-%m")
        spent: dict[str, tuple[float, int]] = {}
        for run in runs:
            if run["created_at"].startswith(month):
                usd, requests = spent.get(run["endpoint"], (0.0, 0))
                spent[run["endpoint"]] = (usd + (run["spent_usd"] or 0.0), requests + run["requests_sent"])
        return cls(fleet, spent)

    def refuses(self, endpoint: FleetEndpoint, plan: Plan) -> str | None:
        """Why a night cannot be paid for, or None."""
        usd, requests = self._spent.get(endpoint.name, (0.0, 0))
        all_usd = sum(each for each, _ in self._spent.values())
        all_requests = sum(each for _, each in self._spent.values())
        worst_usd, worst_requests = plan.endpoint.limits.max_cost_usd, plan.endpoint.limits.max_requests
        fleet = self._fleet
        in_money = (
            ("its", endpoint.max_cost_usd_per_month, usd),
            ("the fleet's", fleet.max_cost_usd_per_month, all_usd),
        )
        for whose, most, used in in_money:
            if most is None:
                continue
            if endpoint.price is None:
                return f"it has no [price], so {whose} budget in money cannot be kept; state the price, or budget in requests"
            if worst_usd is not None and used + worst_usd > most:
                return f"{whose} budget has {max(0.0, most - used):.4f} of {most:g} USD left this month; a night takes up to {worst_usd:.4f}"
        in_requests = (
            ("its", endpoint.max_requests_per_month, requests), ("the fleet's", fleet.max_requests_per_month, all_requests),
        )  # fmt: skip
        for whose, limit, sent in in_requests:
            if limit is not None and sent + worst_requests > limit:
                return f"{whose} budget has {max(0, limit - sent)} of {limit} requests left this month; a night takes up to {worst_requests}"
        return None

    def take(self, planned: Endpoint, requests: int) -> None:
        """Take a run's worst case in money off, and so many requests."""
        usd, sent = self._spent.get(planned.name, (0.0, 0))
        self._spent[planned.name] = (usd + (planned.limits.max_cost_usd or 0.0), sent + requests)


def _draw_key(root: Path) -> bytes:
    """The key from which all draws of a fleet come; copied with the folder, so that all shards draw the same."""
    path = root / DRAW_KEY
    if not path.exists():
        write_atomically(path, secrets.token_hex(32).encode())
        path.chmod(0o600)
    return path.read_bytes()
