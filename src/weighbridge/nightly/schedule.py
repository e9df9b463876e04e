"""What is due tonight, and what each endpoint may take of the month's budgets."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Literal

from weighbridge.canonical import sha256_hex, write_atomically
from weighbridge.errors import ConfigurationError, WeighbridgeError
from weighbridge.fleet import Fleet, FleetEndpoint, night_of
from weighbridge.history.index import Run
from weighbridge.judge.policy import load_policy
from weighbridge.plan import make_plan, worst_case_usd
from weighbridge.records import Plan
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

    Every endpoint of the fleet takes its worst case off the budgets, those of other shards included, so that all shards come to the
    same. Those that were not audited for the longest time come first.

    Parameters
    ----------
    fleet : Fleet
    root : pathlib.Path
        The folder of the fleet's nights.
    runs : list of dict
        Its history so far, oldest first.
    now : datetime
    shard : Shard
    """
    night = night_of(now)
    folder = root / night.isoformat()
    ahead = max((run["night"] for run in runs), default="")
    if ahead > night.isoformat():
        why = f"the clock says {night}, but the night of {ahead} is recorded already; set the clock right"
        return [Task(e, folder / e.slug, "waits", why) for e in fleet.endpoint if shard.holds(e)]
    earlier = [run for run in runs if run["night"] < night.isoformat()]
    last = {run["endpoint"]: run["created_at"] for run in earlier}
    key = _draw_key(root)
    ledger = _Ledger.of(fleet, earlier, now)
    bundles: dict[str, Bundle] = {}
    tasks = {}
    for endpoint in sorted(fleet.endpoint, key=lambda e: (str(last.get(e.name, "")), e.slug)):
        tasks[endpoint.slug] = _task(fleet, endpoint, folder / endpoint.slug, night, now, key, ledger, bundles)
    return [tasks[e.slug] for e in fleet.endpoint if shard.holds(e)]


def collected(fleet: Fleet, root: Path, night: str) -> list[Task]:
    """What was collected of every endpoint of a fleet on one night."""
    tasks = []
    for endpoint in fleet.endpoint:
        folder = root / night / endpoint.slug
        if not (folder / "plan.json").exists():
            tasks.append(Task(endpoint, folder, "waits", "it was not audited this night"))
            continue
        try:
            tasks.append(Task(endpoint, folder, "done", plan=RunFolder(folder).plan()))
        except WeighbridgeError as error:
            tasks.append(Task(endpoint, folder, "failed", str(error)))
    return tasks


def _task(
    fleet: Fleet, endpoint: FleetEndpoint, folder: Path, night: date, now: datetime, key: bytes, ledger: "_Ledger",
    bundles: dict[str, Bundle],
) -> Task:  # fmt: skip
    try:
        if (folder / "plan.json").exists():
            return _begun(endpoint, folder, ledger)
        plan = _planned(fleet, endpoint, night, now, key, bundles)
    except WeighbridgeError as error:
        return Task(endpoint, folder, "failed", str(error))
    refusal = ledger.refuses(endpoint, plan)
    if refusal is not None:
        return Task(endpoint, folder, "waits", refusal)
    ledger.reserve(endpoint, plan)
    if not endpoint.is_open(now):
        hours = f"{endpoint.hours[0]:02d} to {endpoint.hours[1]:02d} UTC" if endpoint.hours is not None else ""
        return Task(endpoint, folder, "waits", f"it is asked from {hours}")
    return Task(endpoint, folder, "begin", plan=plan)


def _begun(endpoint: FleetEndpoint, folder: Path, ledger: "_Ledger") -> Task:
    run = RunFolder(folder)
    plan = run.plan()
    ledger.reserve(endpoint, plan)
    if not run.is_own(plan):
        why = f"{folder} was not started by you, or its plan was changed; remove it to audit anew"
        return Task(endpoint, folder, "failed", why)
    stopped = run.exchanges()[1]
    through = stopped is not None and stopped.because not in TRIED_AGAIN
    return Task(endpoint, folder, "done" if through else "resume", plan=plan)


def _planned(
    fleet: Fleet, endpoint: FleetEndpoint, night: date, now: datetime, key: bytes, bundles: dict[str, Bundle]
) -> Plan:
    """The plan of a night, whose limit is its own worst case: what it reserves is what it can spend at most."""
    bundle = None
    if endpoint.reference is not None:
        bundle = bundles.get(endpoint.reference) or bundles.setdefault(
            endpoint.reference, load_bundle(endpoint.reference)
        )
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


class _Ledger:
    """What is left of the month's budgets: of each endpoint's, and of the fleet's."""

    def __init__(self, fleet: Fleet, spent: dict[str, tuple[float, int]]) -> None:
        self._fleet = fleet
        self._spent = spent

    @classmethod
    def of(cls, fleet: Fleet, earlier: list[Run], now: datetime) -> "_Ledger":
        month = now.astimezone(UTC).strftime("%Y-%m")
        spent: dict[str, tuple[float, int]] = {}
        for run in earlier:
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

    def reserve(self, endpoint: FleetEndpoint, plan: Plan) -> None:
        """Take a night's worst case off."""
        usd, requests = self._spent.get(endpoint.name, (0.0, 0))
        limits = plan.endpoint.limits
        self._spent[endpoint.name] = (usd + (limits.max_cost_usd or 0.0), requests + limits.max_requests)


def _draw_key(root: Path) -> bytes:
    """The key from which all draws of a fleet come; copied with the folder, so that all shards draw the same."""
    path = root / DRAW_KEY
    if not path.exists():
        write_atomically(path, secrets.token_hex(32).encode())
        path.chmod(0o600)
    return path.read_bytes()
