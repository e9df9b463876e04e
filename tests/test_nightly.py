"""Nights of a fleet: what is due and nothing else, within its budgets, whatever befalls one endpoint or the machine."""

import asyncio
import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import filelock
import pytest

from conftest import Ended, Weighbridge
from fault_server import MODEL, Call, FaultServer, first, refuses, says, well_formed
from weighbridge.audit import Auditor
from weighbridge.canonical import write_atomically
from weighbridge.cli.common import judge_and_report
from weighbridge.errors import ConfigurationError
from weighbridge.fleet import Fleet, FleetEndpoint, night_of
from weighbridge.history.index import Run
from weighbridge.nightly.collection import commit
from weighbridge.nightly.judgement import FleetNight, FleetRow, write_night
from weighbridge.nightly.schedule import DRAW_KEY, Shard, Task, schedule
from weighbridge.nightly.webhook import address_of, message, tell
from weighbridge.records import Received, Sent, VerdictWord
from weighbridge.store import ExchangeLog, RunFolder, Stopped

CONSISTENT, DIFFERS, CONFIGURATION, INCONCLUSIVE = range(4)
EVENING = datetime(2026, 11, 22, 22, tzinfo=UTC)
NIGHT = "2026-11-22"
DAY = timedelta(days=1)
ASKED = 2  # requests of an endpoint without a reference: what it exposes, and nothing else
MOST = 8  # max_requests of every endpoint here
PRICE = {"prompt_usd_per_million_tokens": 100, "completion_usd_per_million_tokens": 100}
NOWHERE = "http://127.0.0.1:9/v1"
SECRET_PATH = "T00000000-xoxb-never-shown"
KEY = "sk-fleet-0123456789abcdef"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.moment = EVENING

    def now(self, _: object = None) -> datetime:
        return self.moment


@pytest.fixture(autouse=True)
def quick(weights_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is detected here, so that nothing is asked but what an endpoint exposes; nobody waits between attempts."""
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr("weighbridge.cli.nightly.datetime", one)
    return one


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "nights"


@pytest.fixture
def night(weighbridge_cli: Weighbridge, clock: Clock, root: Path) -> Callable[..., Ended]:
    """`weighbridge nightly` of a fleet file, by a clock that stands still."""
    return lambda file, *options, out=root: weighbridge_cli("nightly", file, "--out", out, *options)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def table(name: str, base_url: str = NOWHERE, **more: object) -> dict[str, object]:
    return {"name": name, "base_url": base_url, "model": MODEL, "limits": {"max_requests": MOST}} | more


def write_fleet(folder: Path, *endpoints: dict[str, object], **more: object) -> Path:
    lines = [f"{key} = {toml(value)}" for key, value in ({"name": "fleet", "jitter_s": 0} | more).items()]
    for endpoint in endpoints:
        lines += ["[[endpoint]]", *(f"{key} = {toml(value)}" for key, value in endpoint.items())]
    file = folder / "FLEET.toml"
    file.write_text("\n".join(lines), "utf-8")
    return file


def fleet_of(*endpoints: dict[str, object], **more: object) -> Fleet:
    return Fleet.model_validate({"name": "fleet", "endpoint": list(endpoints)} | more)


def past(endpoint: str, moment: datetime, requests: int = MOST, usd: float | None = None) -> Run:
    """What the schedule reads of a run of the history."""
    night = night_of(moment).isoformat()
    return {
        "folder": f"{night}/{endpoint}", "endpoint": endpoint, "night": night, "created_at": moment.isoformat(),
        "requests_sent": requests, "spent_usd": usd,
    }  # fmt: skip


def due(fleet: Fleet, root: Path, *runs: Run, now: datetime = EVENING, shard: str = "1/1") -> dict[str, Task]:
    root.mkdir(parents=True, exist_ok=True)
    tasks = schedule(fleet, root, sorted(runs, key=lambda run: run["created_at"]), now, Shard.parse(shard))
    return {task.endpoint.name: task for task in tasks}


def states(tasks: dict[str, Task]) -> dict[str, str]:
    return {name: task.state for name, task in tasks.items()}


def why(task: Task) -> str:
    assert task.why is not None
    return task.why


def said_of(root: Path, name: str, night: str = NIGHT) -> dict[str, Any]:
    """The row of an endpoint in fleet.json."""
    rows = json.loads((root / night / "fleet.json").read_bytes())["endpoints"]
    row: dict[str, Any] = next(row for row in rows if row["endpoint"] == name)
    return row


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


def cut_off(run: Path, lines: int = 3) -> None:
    """As a crash leaves a run: a torn line at the end, and nothing judged."""
    whole = (run / "exchanges.jsonl").read_bytes().splitlines(keepends=True)
    (run / "exchanges.jsonl").write_bytes(b"".join(whole[:lines]) + whole[lines][:20])
    for path in run.iterdir():
        if path.name not in ("plan.json", "owner", "exchanges.jsonl"):
            path.unlink()


def forget_index(root: Path) -> None:
    for path in root.glob("history.sqlite*"):
        path.unlink()


def say_instead(run: Path, verdict: VerdictWord, cause: str | None = None) -> None:
    """Put another verdict into the history: for what is done about verdicts, never for how they are reached."""
    row = json.loads((run / "row.json").read_bytes())
    (run / "row.json").write_text(json.dumps(row | {"verdict": verdict, "cause": cause}), "utf-8")
    forget_index(run.parent.parent)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(well_formed) as one:
        yield one


@pytest.fixture
def dead_url() -> str:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"


# -- the fleet file --------------------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "unknown field": ([table("a")], {"budget": 3}, "unknown field budget"),
    "unknown field of an endpoint": ([table("a", max_usd=3)], {}, "unknown field endpoint.0.max_usd"),
    "clashing names": ([table("My host"), table("my-host")], {}, "'My host' and 'my-host' would share a folder"),
    "no endpoint": ([], {"endpoint": []}, "field endpoint"),
    "an hour that is none": ([table("a", hours=[22, 24])], {}, "field endpoint.0.hours.1"),
    "one hour": ([table("a", hours=[22])], {}, "field endpoint.0.hours"),
    "webhook by another name": ([table("a")], {"webhook_url_env": "OPENAI_API_KEY"}, "field webhook_url_env"),
    "webhook's address itself": ([table("a")], {"webhook_url_env": "https://x.example"}, "field webhook_url_env"),
    "budget of nothing": ([table("a", max_requests_per_month=0)], {}, "field endpoint.0.max_requests_per_month"),
    "budget without measure": ([table("a")], {"max_cost_usd_per_month": -1}, "field max_cost_usd_per_month"),
    "limit without price": ([table("a", limits={"max_cost_usd": 1})], {}, "limits.max_cost_usd needs [price]"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_fleet_file_is_one_line_that_names_file_and_field(
    bad: str, night: Callable[..., Ended], tmp_path: Path, root: Path
) -> None:
    endpoints, more, named = BAD_FILES[bad]
    file = write_fleet(tmp_path, *endpoints, **more)
    ended = night(file)
    assert ended.code == CONFIGURATION
    assert named in ended.err
    assert str(file) in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not root.exists()


@pytest.mark.parametrize(
    ("hours", "open_at"),
    [((9, 17), range(9, 17)), ((22, 3), [22, 23, 0, 1, 2]), ((0, 0), range(24)), (None, range(24))],
    ids=str,
)
def test_hours_may_run_past_midnight(hours: tuple[int, int] | None, open_at: list[int] | range) -> None:
    endpoint = FleetEndpoint.model_validate(table("a", hours=hours))
    assert [h for h in range(24) if endpoint.is_open(EVENING.replace(hour=h))] == sorted(open_at)


def test_a_night_is_from_noon_to_noon() -> None:
    noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
    moments = (noon - timedelta(seconds=1), noon, noon + DAY - timedelta(seconds=1), noon + DAY)
    assert [str(night_of(m)) for m in moments] == ["2026-11-21", NIGHT, NIGHT, "2026-11-23"]


# -- shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_endpoint_is_in_exactly_one_shard(count: int) -> None:
    endpoints = [FleetEndpoint.model_validate(table(f"host {n}")) for n in range(100)]
    shards = [Shard.parse(f"{n}/{count}") for n in range(1, count + 1)]
    held = [[endpoint.name for endpoint in endpoints if shard.holds(endpoint)] for shard in shards]
    assert sorted(name for each in held for name in each) == sorted(endpoint.name for endpoint in endpoints)
    assert all(held), "of a hundred endpoints each of a few shards has some"


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/99999", "½/2", "1.0/2"])
def test_a_shard_that_is_none_is_refused(text: str, night: Callable[..., Ended], tmp_path: Path) -> None:
    ended = night(write_fleet(tmp_path, table("a")), "--shard", text)
    assert ended.code == CONFIGURATION
    assert "is no part of a whole. Write it as 2/4" in ended.err


# -- the schedule ----------------------------------------------------------------------------------------------


def test_everything_is_due_on_the_first_night(root: Path) -> None:
    tasks = due(fleet_of(table("a"), table("b")), root)
    assert states(tasks) == {"a": "begin", "b": "begin"}
    assert [task.folder for task in tasks.values()] == [root / NIGHT / "a", root / NIGHT / "b"]


@pytest.mark.parametrize(("budget", "state"), [(3 * MOST, "begin"), (3 * MOST - 1, "waits")])
def test_a_night_that_the_requests_of_a_month_do_not_allow_is_left_out(budget: int, state: str, root: Path) -> None:
    runs = [past("a", EVENING - n * DAY) for n in (1, 2)]
    task = due(fleet_of(table("a", max_requests_per_month=budget)), root, *runs)["a"]
    assert task.state == state
    if state == "waits":
        assert "its budget has 7 of 23 requests left this month; a night takes up to 8" in why(task)


@pytest.mark.parametrize(("spent", "state"), [(0.039, "begin"), (0.0405, "waits")])
def test_a_night_that_the_money_of_a_month_does_not_allow_is_left_out(spent: float, state: str, root: Path) -> None:
    limits = {"max_requests": MOST, "max_cost_usd": 0.01}
    fleet = fleet_of(table("a", price=PRICE, limits=limits, max_cost_usd_per_month=0.05))
    task = due(fleet, root, past("a", EVENING - DAY, usd=spent))["a"]
    assert task.state == state
    if state == "waits":
        assert "its budget has 0.0095 of 0.05 USD left this month; a night takes up to 0.0100" in why(task)


def test_a_night_reserves_no_more_than_its_own_worst_case(root: Path) -> None:
    task = due(fleet_of(table("a", price=PRICE, max_cost_usd_per_month=1000)), root)["a"]
    assert task.plan is not None
    most = task.plan.endpoint.limits.max_cost_usd
    assert most is not None
    assert 0 < most < 1, "four requests of some hundred tokens, and not the month's budget"


def test_what_is_free_of_charge_needs_no_budget(root: Path) -> None:
    free = dict.fromkeys(PRICE, 0)
    assert due(fleet_of(table("a", price=free, max_cost_usd_per_month=0.01)), root)["a"].state == "begin"


@pytest.mark.parametrize("whose", ["its", "the fleet's"])
def test_a_budget_in_money_needs_a_price(whose: str, root: Path) -> None:
    limit: dict[str, object] = {"max_cost_usd_per_month": 5}
    fleet = fleet_of(table("a") | limit) if whose == "its" else fleet_of(table("a"), **limit)
    task = due(fleet, root)["a"]
    assert task.state == "waits"
    assert f"it has no [price], so {whose} budget in money cannot be kept" in why(task)


def test_what_was_spent_last_month_does_not_count(root: Path) -> None:
    fleet = fleet_of(table("a", max_requests_per_month=MOST))
    now = datetime(2026, 12, 1, 1, tzinfo=UTC)
    assert due(fleet, root, past("a", now - timedelta(hours=2) - DAY), now=now)["a"].state == "begin"
    assert due(fleet, root, past("a", now - timedelta(minutes=30) - DAY), now=now + DAY)["a"].state == "begin"
    assert due(fleet, root, past("a", now), now=now + DAY)["a"].state == "waits"


def test_the_fleets_budget_goes_first_to_those_that_waited_longest(root: Path) -> None:
    runs = [past("a", EVENING - DAY), past("b", EVENING - 3 * DAY), past("c", EVENING - 2 * DAY)]
    fleet = fleet_of(table("a"), table("b"), table("c"), table("d"), max_requests_per_month=5 * MOST)
    tasks = due(fleet, root, *runs)
    assert states(tasks) == {"a": "waits", "b": "begin", "c": "waits", "d": "begin"}
    assert "the fleet's budget has 0 of 40 requests left" in why(tasks["a"])


def test_the_fleets_money_is_one_sum_over_all_endpoints(root: Path) -> None:
    limits = {"max_requests": MOST, "max_cost_usd": 0.01}
    endpoints = [table(name, price=PRICE, limits=limits) for name in "abcd"]
    runs = [past(name, EVENING - DAY, usd=0.004) for name in "ab"]
    tasks = due(fleet_of(*endpoints, max_cost_usd_per_month=0.029), root, *runs)
    assert states(tasks) == {"a": "waits", "b": "waits", "c": "begin", "d": "begin"}


def test_what_an_endpoint_has_cost_counts_after_it_has_left_the_fleet(root: Path) -> None:
    """Tonight's cost too: the file may have been changed between two calls of one night."""
    fleet = fleet_of(table("a"), max_requests_per_month=2 * MOST)
    for moment in (EVENING - DAY, EVENING):
        assert due(fleet, root, past("gone", moment, requests=MOST + 1))["a"].state == "waits"


def test_what_was_begun_has_its_part_of_the_budget_before_anything_else(root: Path, own_home: Path) -> None:
    """An endpoint that was mended since may stand first; what is under way can still cost what it was planned with."""
    begin = list(due(fleet_of(table("b")), root).values())
    commit(root, NIGHT, "fleet", EVENING, begin)
    tasks = due(fleet_of(table("a"), table("b"), max_requests_per_month=2 * MOST - 1), root)
    assert states(tasks) == {"a": "waits", "b": "resume"}


@pytest.mark.parametrize(
    ("asked", "until"), [("3600", "23:00"), ("Sun, 22 Nov 2026 22:30:00 GMT", "22:30"), ("nonsense", None)]
)
def test_an_endpoint_that_asked_for_a_longer_wait_is_left_alone_until_then(
    asked: str, until: str | None, root: Path, own_home: Path
) -> None:
    fleet = fleet_of(table("a"))
    task = due(fleet, root)["a"]
    commit(root, NIGHT, "fleet", EVENING, [task])
    with RunFolder(task.folder).log() as log:
        log.append(Sent(request_id="capability-top-20", attempt=1, sent_at=EVENING.isoformat()))
        headers = {"retry-after": asked}
        log.append(Received(request_id="capability-top-20", attempt=1, status=429, headers=headers, latency_s=0.0))
        log.append(Stopped(because="rate_limited"))
    soon = due(fleet, root, now=EVENING + timedelta(minutes=5))["a"]
    assert (soon.state, soon.why) == (
        ("waits", f"it asked not to be asked before {until} UTC") if until else ("resume", None)
    )
    assert due(fleet, root, now=EVENING + timedelta(minutes=61))["a"].state == "resume"


def test_shards_together_never_spend_more_than_the_fleet_may(root: Path) -> None:
    """Each has the share of its endpoints, since it knows nothing of what the others spend."""
    names = "abcdefgh"
    fleet = fleet_of(*(table(name) for name in names), max_requests_per_month=5 * MOST)
    spent: list[Run] = []
    for n in (1, 2, 3):
        own: list[Run] = []
        for night in range(4):
            moment = EVENING + night * DAY
            begun = [
                name
                for name, task in due(fleet, root / str(n), *own, now=moment, shard=f"{n}/3").items()
                if task.state == "begin"
            ]
            own += [past(name, moment) for name in begun]
        spent += own
    assert 3 * MOST <= sum(run["requests_sent"] for run in spent) <= 5 * MOST


def test_an_endpoint_is_asked_in_its_hours_only(root: Path) -> None:
    task = due(fleet_of(table("a", hours=[23, 5])), root)["a"]
    assert task.state == "waits"
    assert why(task) == "it is asked from 23 to 05 UTC"
    assert due(fleet_of(table("a", hours=[22, 5])), root)["a"].state == "begin"


def test_what_was_begun_goes_on_in_its_hours_only(root: Path, own_home: Path) -> None:
    fleet = fleet_of(table("a", hours=[22, 23]))
    commit(root, NIGHT, "fleet", EVENING, list(due(fleet, root).values()))
    assert due(fleet, root)["a"].state == "resume"
    assert due(fleet, root, now=EVENING + timedelta(hours=1))["a"].state == "waits"


def test_a_clock_that_was_set_back_is_said(root: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"night of 2026-11-21, but that of 2026-11-22 is recorded.*clock"):
        due(fleet_of(table("a")), root, past("a", EVENING), now=EVENING - DAY)


def test_a_plan_that_was_changed_is_not_gone_on_with(root: Path, own_home: Path) -> None:
    commit(root, NIGHT, "fleet", EVENING, list(due(fleet_of(table("a"), table("b")), root).values()))
    plan = root / NIGHT / "a" / "plan.json"
    plan.write_text(plan.read_text("utf-8").replace("127.0.0.1:9", "127.0.0.1:8"), "utf-8")
    tasks = due(fleet_of(table("a"), table("b")), root)
    assert states(tasks) == {"a": "failed", "b": "resume"}
    assert "its plan was changed; remove it to audit anew" in why(tasks["a"])


def test_what_cannot_be_planned_keeps_nobody_else_waiting(root: Path, own_home: Path) -> None:
    endpoints = (table("a", reference="no-such-bundle"), table("b", policy="no-such-policy"), table("c"), table("d"))
    commit(root, NIGHT, "fleet", EVENING, list(due(fleet_of(table("d")), root).values()))
    (root / NIGHT / "d" / "exchanges.jsonl").mkdir()
    tasks = due(fleet_of(*endpoints), root)
    assert states(tasks) == {"a": "failed", "b": "failed", "c": "begin", "d": "failed"}
    assert "no-such-bundle" in why(tasks["a"])
    assert "no-such-policy" in why(tasks["b"])
    assert "directory" in why(tasks["d"])


# -- draws -----------------------------------------------------------------------------------------------------


def draws(root: Path, fleet: Fleet, now: datetime = EVENING) -> dict[str, tuple[str, str, list[str]]]:
    plans = {name: task.plan for name, task in due(fleet, root, now=now).items()}
    return {
        name: (plan.draw.commitment, plan.run_id, [request.probe.id for request in plan.probe_requests])
        for name, plan in plans.items()
        if plan is not None
    }


def test_draws_differ_from_night_to_night_and_from_endpoint_to_endpoint(
    root: Path, tmp_path: Path, reference: str, faster: None
) -> None:
    fleet = fleet_of(table("a", reference=reference), table("b", reference=reference))
    tonight, next_night = draws(root, fleet), draws(root, fleet, EVENING + DAY)
    other_key = draws(tmp_path / "other", fleet)
    drawn = [*tonight.values(), *next_night.values(), *other_key.values()]
    for commitments_run_ids_probes in zip(*drawn, strict=True):
        assert len({str(each) for each in commitments_run_ids_probes}) == len(drawn)
    assert len({tuple(sorted(probes)) for _, _, probes in drawn}) == 1, "one pool, in another order each time"
    assert draws(root, fleet) == tonight
    (tmp_path / "copy").mkdir()
    shutil.copy(root / DRAW_KEY, tmp_path / "copy" / DRAW_KEY)
    assert draws(tmp_path / "copy", fleet) == tonight, "whoever holds the key draws the same"


def test_nobody_else_can_read_the_key_of_the_draws(root: Path) -> None:
    due(fleet_of(table("a")), root)
    assert (root / DRAW_KEY).stat().st_mode & 0o077 == 0


def test_commitments_are_written_down_before_the_first_request(
    night: Callable[..., Ended], tmp_path: Path, root: Path
) -> None:
    seen: list[dict[str, str]] = []

    def look(call: Call) -> None:
        document = json.loads((root / NIGHT / "night.json").read_bytes())
        seen.append({one["endpoint"]: one["commitment"] for one in document["committed"]})
        well_formed(call)

    with FaultServer(look) as server:
        night(write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url)))
    plans = {name: RunFolder(root / NIGHT / name).plan() for name in "ab"}
    assert len(seen) == 2 * ASKED
    assert all(each == {name: plan.draw.commitment for name, plan in plans.items()} for each in seen)


# -- a night ---------------------------------------------------------------------------------------------------


def test_a_second_call_of_one_night_sends_nothing(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    ended = night(file)
    assert ended.code == INCONCLUSIVE, "without a reference nothing is said of the weights"
    assert len(server.requests) == 2 * ASKED
    before = {path: path.read_bytes() for path in root.glob("*/**/*.json*")}
    again = night(file)
    assert len(server.requests) == 2 * ASKED
    assert again.out == ended.out
    assert {path: path.read_bytes() for path in root.glob("*/**/*.json*")} == before


def test_the_next_night_begins_anew(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))
    night(file)
    clock.moment += DAY
    night(file)
    assert len(server.requests) == 2 * ASKED
    assert said_of(root, "a", "2026-11-23")["before"] == "inconclusive"


def test_an_interrupted_night_goes_on_and_asks_nothing_twice(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    night(file)
    run = root / NIGHT / "a"
    under_way = events(run, "sent")[-1]["body"]
    cut_off(run)
    kept = b"".join((run / "exchanges.jsonl").read_bytes().splitlines(keepends=True)[:-1])
    committed = (root / NIGHT / "night.json").read_bytes()
    server.requests.clear()
    ended = night(file)
    assert "1 endpoints are due" in ended.said
    assert [request.document for request in server.requests] == [under_way]
    assert (run / "exchanges.jsonl").read_bytes().startswith(kept)
    assert (root / NIGHT / "night.json").read_bytes() == committed
    assert said_of(root, "a")["state"] == "done"


def test_a_record_of_the_night_that_cannot_be_read_is_made_again_from_its_runs(root: Path) -> None:
    fleet = fleet_of(table("a"), table("b"))
    commit(root, NIGHT, "fleet", EVENING, list(due(fleet, root).values()))
    path = root / NIGHT / "night.json"
    known = json.loads(path.read_bytes())["committed"]
    path.write_bytes(b'{"committed": [')
    assert commit(root, NIGHT, "fleet", EVENING, list(due(fleet, root).values())) == {}
    assert json.loads(path.read_bytes())["committed"] == known
    assert path.with_suffix(".broken").read_bytes() == b'{"committed": ['


def test_a_line_that_was_torn_is_no_reason_to_fail(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))
    night(file)
    cut_off(root / NIGHT / "a")
    night(file)
    assert len(events(root / NIGHT / "a", "sent")) == ASKED + 1
    assert said_of(root, "a")["verdict"] == "inconclusive"


def test_what_a_night_that_was_never_gone_on_with_has_cost_still_counts(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), max_requests_per_month=MOST + ASKED - 1)
    night(file)
    cut_off(root / NIGHT / "a")
    forget_index(root)
    server.requests.clear()
    clock.moment += DAY
    ended = night(file)
    assert server.requests == []
    assert "the fleet's budget has 7 of 9 requests left this month" in ended.said


def test_a_run_that_was_begun_and_never_asked_costs_nothing(root: Path, own_home: Path) -> None:
    fleet = fleet_of(table("a", max_requests_per_month=MOST))
    commit(root, NIGHT, "fleet", EVENING, list(due(fleet, root).values()))
    assert due(fleet, root, now=EVENING + DAY)["a"].state == "begin"


def test_two_nights_at_once_are_one_too_many(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    root.mkdir()
    with filelock.FileLock(root / "nightly.lock"):
        ended = night(write_fleet(tmp_path, table("a", server.base_url)))
    assert ended.code == CONFIGURATION
    assert ended.err.startswith(f"error: another nightly run is at work in {root}.")
    assert server.requests == []


def test_one_that_lacks_its_key_and_one_that_is_dead_spoil_nothing(
    night: Callable[..., Ended], server: FaultServer, dead_url: str, tmp_path: Path, root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    keyed = table("keyed", server.base_url, api_key_env="NIGHTLY_TEST_API_KEY")
    file = write_fleet(tmp_path, keyed, table("dead", dead_url), table("well", server.base_url))
    ended = night(file)
    assert ended.code == INCONCLUSIVE
    assert "the environment variable NIGHTLY_TEST_API_KEY is not set" in ended.said
    assert said_of(root, "keyed")["state"] == "failed"
    assert said_of(root, "dead")["verdict"] == said_of(root, "well")["verdict"] == "inconclusive"
    assert len(server.requests) == ASKED
    monkeypatch.setenv("NIGHTLY_TEST_API_KEY", KEY)
    night(file)
    assert [request.bearer for request in server.requests] == [""] * ASKED + [KEY] * ASKED
    assert said_of(root, "keyed")["state"] == "done"
    assert not any(KEY.encode() in path.read_bytes() for path in root.rglob("*") if path.is_file())


def test_a_fault_of_our_own_with_one_endpoint_spoils_no_other(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a collected", "b judged", "c well")
    whole = Auditor.run

    async def collect(self: Auditor) -> str:
        if self._endpoint.name == names[0]:
            raise KeyError("an answer that nobody foresaw")
        return await whole(self)

    def judged(folder: RunFolder, bundle: None) -> object:
        if folder.path.name == "b-judged":
            raise ZeroDivisionError
        return judge_and_report(folder, bundle)

    monkeypatch.setattr(Auditor, "run", collect)
    monkeypatch.setattr("weighbridge.cli.nightly.judge_and_report", judged)
    ended = night(write_fleet(tmp_path, *(table(name, server.base_url) for name in names)))
    assert ended.code == INCONCLUSIVE
    assert [said_of(root, name)["state"] for name in names] == ["failed", "failed", "done"]
    assert "a fault of Weighbridge's own (KeyError)" in said_of(root, names[0])["why"]
    assert "a fault of Weighbridge's own (ZeroDivisionError)" in said_of(root, names[1])["why"]
    assert len(server.requests) == 2 * ASKED


def test_a_folder_that_cannot_be_made_spoils_no_other(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    (root / NIGHT).mkdir(parents=True)
    (root / NIGHT / "a").write_text("in the way", "utf-8")
    night(write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url)))
    assert [said_of(root, name)["state"] for name in "ab"] == ["failed", "done"]
    assert "cannot be made" in said_of(root, "a")["why"]


def test_no_more_endpoints_are_asked_at_once_than_the_fleet_says(night: Callable[..., Ended], tmp_path: Path) -> None:
    lock = threading.Lock()
    now, most = 0, 0

    def slow(call: Call) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        call.wait(0.03)
        with lock:
            now -= 1
        well_formed(call)

    with FaultServer(slow) as server:
        night(write_fleet(tmp_path, *(table(f"host {n}", server.base_url) for n in range(5)), concurrency=2))
        assert len(server.requests) == 5 * ASKED
    assert most == 2


def test_endpoints_begin_at_different_moments(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("weighbridge.nightly.collection.asyncio.sleep", note)
    night(write_fleet(tmp_path, *(table(f"host {n}", server.base_url) for n in range(4)), jitter_s=600))
    waits = [wait for wait in waits if wait]
    assert len(set(waits)) == len(waits) == 4
    assert all(0 < wait < 600 for wait in waits)


def test_an_interrupt_is_one_line_and_the_night_goes_on_later(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("weighbridge.cli.nightly.collect_all", interrupt)
        ended = night(file)
    assert ended.code == 130
    assert "interrupted; the same command goes on where it stopped" in ended.err
    assert night(file).code == INCONCLUSIVE
    assert len(server.requests) == ASKED


def test_a_dry_run_sends_nothing_and_makes_no_night(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    limits = {"max_requests": MOST, "max_cost_usd": 0.01}
    file = write_fleet(
        tmp_path, table("a", server.base_url, price=PRICE, limits=limits), table("b", hours=[3, 4]), table("c [x]")
    )
    ended = night(file, "--dry-run")
    assert ended.code == 0
    assert "0.0100" in ended.out
    assert "waits: it is asked from 03 to 04 UTC" in ended.said
    assert "c [x]" in ended.out
    document = json.loads(night(file, "--dry-run", "--json").out)
    assert [row["state"] for row in document["endpoints"]] == ["begin", "waits", "begin"]
    assert document["endpoints"][0]["max_cost_usd"] == 0.01
    assert [row["max_requests"] for row in document["endpoints"]] == [MOST, None, MOST]
    assert server.requests == []
    assert list(root.glob("*/")) == []


def test_json_is_one_document_and_the_same_as_the_file(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path
) -> None:
    ended = night(write_fleet(tmp_path, table("a", server.base_url), table("b", hours=[3, 4])), "--json")
    document = json.loads(ended.out)
    assert document.pop("folder") == str(root)
    assert document == json.loads((root / NIGHT / "fleet.json").read_bytes())
    assert [row["state"] for row in document["endpoints"]] == ["done", "waits"]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        (("consistent", "consistent"), CONSISTENT),
        (("consistent", "inconclusive"), INCONCLUSIVE),
        (("differs", "inconclusive"), DIFFERS),
    ],
    ids=str,
)
def test_the_exit_code_is_that_of_the_worst(
    verdicts: tuple[VerdictWord, VerdictWord], code: int, night: Callable[..., Ended], server: FaultServer,
    tmp_path: Path, root: Path,
) -> None:  # fmt: skip
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    night(file)
    for name, verdict in zip("ab", verdicts, strict=True):
        say_instead(root / NIGHT / name, verdict, "route" if verdict == "differs" else None)
    assert night(file).code == code
    assert len(server.requests) == 2 * ASKED


def test_a_test_case_for_every_endpoint(tmp_path: Path) -> None:
    rows = [
        FleetRow(endpoint="good", folder="good", state="done", why=None, verdict="consistent"),
        FleetRow(endpoint="bad", folder="bad", state="done", why=None, verdict="differs", cause="precision"),
        FleetRow(endpoint="worse", folder="worse", state="done", why=None, verdict="differs_replicated", cause="template"),
        FleetRow(endpoint="open", folder="open", state="done", why=None, verdict="inconclusive", sentence="Not so."),
        FleetRow(endpoint="late\x1b<&>", folder="late", state="waits", why="it is asked from 03 to 04 UTC"),
        FleetRow(endpoint="broken", folder="broken", state="failed", why="no key"),
    ]  # fmt: skip
    write_night(tmp_path, FleetNight(fleet="f <&> \x00", night=NIGHT, false_discovery_rate=0.01, endpoints=rows))
    suite = ElementTree.fromstring((tmp_path / "junit.xml").read_bytes())
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "6", "failures": "2", "errors": "1", "skipped": "2"}
    inside = [[child.tag for child in case] for case in suite.iter("testcase")]
    assert inside == [[], ["failure"], ["failure"], ["skipped"], ["skipped"], ["error"]]
    assert [case.get("name") for case in suite.iter("testcase")][4] == "late\ufffd<&>"
    assert suite[5][0].get("message") == "no key"


# -- what goes wrong with the machine --------------------------------------------------------------------------


def test_no_space_left_under_one_endpoint_is_said_and_the_others_go_on(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_fleet(tmp_path, *(table(name, server.base_url) for name in "abc"))
    append = ExchangeLog.append

    def full(self: ExchangeLog, record: Any) -> None:
        if self._path.parent.name == "b":
            no_space()
        append(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(ExchangeLog, "append", full)
        ended = night(file)
    assert ended.code == INCONCLUSIVE
    assert f"{root / NIGHT / 'b'}: No space left on device" in ended.out
    assert [said_of(root, name)["state"] for name in "abc"] == ["done", "failed", "done"]
    assert len(server.requests) == 2 * ASKED
    night(file)
    assert len(server.requests) == 3 * ASKED, "when there is space again, only what is missing is asked"


@pytest.mark.parametrize("since", ["the beginning", "the judgement"])
def test_no_space_left_is_one_line_and_nothing_is_lost(
    since: str, night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    with monkeypatch.context() as patched:
        if since == "the beginning":
            patched.setattr(os, "fsync", no_space)
        else:
            for module in ("weighbridge.store", "weighbridge.nightly.judgement"):
                patched.setattr(f"{module}.write_atomically", full_after_plans)
        ended = night(file)
    assert ended.code == CONFIGURATION
    assert f"{root} cannot be written (No space left on device)" in ended.err
    assert "Traceback" not in ended.err
    sent = len(server.requests)
    assert sent == (0 if since == "the beginning" else 2 * ASKED)
    assert night(file).code == INCONCLUSIVE
    assert len(server.requests) == 2 * ASKED
    assert [said_of(root, name)["state"] for name in "ab"] == ["done", "done"]


def full_after_plans(path: Path, data: bytes) -> None:
    if path.name not in ("plan.json", "owner", "night.json"):
        no_space()
    write_atomically(path, data)


def test_no_space_left_under_all_logs_is_said_of_each(
    night: Callable[..., Ended], server: FaultServer, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    with monkeypatch.context() as patched:
        patched.setattr(ExchangeLog, "append", no_space)
        ended = night(file)
    assert ended.code == INCONCLUSIVE
    assert ended.out.count("No space left on device") == 2
    assert server.requests == [], "what cannot be written down is not sent"
    suite = ElementTree.fromstring((root / NIGHT / "junit.xml").read_bytes())
    assert suite.get("errors") == "2"


def test_a_corrupt_index_is_made_again_and_the_night_goes_on(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))
    night(file)
    forget_index(root)
    (root / "history.sqlite").write_bytes(b"no index at all " * 1000)
    clock.moment += DAY
    ended = night(file)
    assert "cannot be read; it was put aside as history.broken" in ended.said
    assert said_of(root, "a", "2026-11-23")["before"] == "inconclusive", "what was known is known again"


def test_run_folders_of_another_version_are_named_and_left_alone(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    night(file)
    plan = root / NIGHT / "a" / "plan.json"
    plan.write_text(plan.read_text("utf-8").replace("weighbridge/plan/1", "weighbridge/plan/9"), "utf-8")
    (root / NIGHT / "a" / "row.json").unlink()
    forget_index(root)
    server.requests.clear()
    tonight = night(file)
    assert server.requests == []
    assert "Judge the run with the version of Weighbridge that made it" in tonight.said
    assert [said_of(root, name)["state"] for name in "ab"] == ["failed", "done"]
    clock.moment += DAY
    ended = night(file)
    assert f"left out: {plan} was not written by this version" in ended.said
    assert len(server.requests) == 2 * ASKED, "the next night is its own"
    assert [said_of(root, name, "2026-11-23")["state"] for name in "ab"] == ["done", "done"]


def test_an_endpoint_that_left_the_fleet_keeps_what_was_collected(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    night(write_fleet(tmp_path, table("a", server.base_url), table("gone", server.base_url)))
    night(write_fleet(tmp_path, table("a", server.base_url)))
    assert len(server.requests) == 2 * ASKED
    assert (root / NIGHT / "gone" / "verdict.json").exists()
    committed = json.loads((root / NIGHT / "night.json").read_bytes())["committed"]
    assert [one["endpoint"] for one in committed] == ["a", "gone"]
    clock.moment += DAY
    night(write_fleet(tmp_path, table("a", server.base_url)))
    rows = json.loads((root / "2026-11-23" / "fleet.json").read_bytes())["endpoints"]
    assert [row["endpoint"] for row in rows] == ["a"]


def test_a_clock_that_jumped_changes_no_night_that_is_recorded(
    night: Callable[..., Ended], server: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url), table("b", server.base_url))
    night(file)
    clock.moment += DAY
    night(file)
    recorded = (root / NIGHT / "fleet.json").read_bytes()
    clock.moment = EVENING
    ended = night(write_fleet(tmp_path, table("a", server.base_url)))
    assert ended.code == CONFIGURATION
    assert "Set the clock right; if it was wrong then, move the folder 2026-11-23 elsewhere" in ended.err
    assert (root / NIGHT / "fleet.json").read_bytes() == recorded
    shutil.move(root / "2026-11-23", tmp_path / "elsewhere")
    assert night(file).code == INCONCLUSIVE
    assert len(server.requests) == 4 * ASKED


# -- shards and merge ------------------------------------------------------------------------------------------


@pytest.fixture
def shards(night: Callable[..., Ended], tmp_path: Path, root: Path) -> Callable[..., list[Path]]:
    """The shards of a fleet, collected apart with one key."""

    def collect(file: Path, count: int) -> list[Path]:
        folders = [tmp_path / f"shard-{n}" for n in range(1, count + 1)]
        for n, folder in enumerate(folders, start=1):
            if (root / DRAW_KEY).exists():
                folder.mkdir()
                shutil.copy(root / DRAW_KEY, folder)
            night(file, "--shard", f"{n}/{count}", out=folder)
        return folders

    return collect


def test_merged_shards_are_what_one_run_would_have_been(
    night: Callable[..., Ended], shards: Callable[..., list[Path]], server: FaultServer, dead_url: str,
    weighbridge_cli: Weighbridge, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With more shards than endpoints of which anything is due, one without its key and one that waits for its hours."""
    # How long an answer took is observed, and the observations' digest stands in the verdict.
    monkeypatch.setattr("weighbridge.transport.time", SimpleNamespace(perf_counter=lambda: 0.0))
    endpoints = [table(f"host {n}", server.base_url) for n in range(3)]
    endpoints += [
        table("dead", dead_url),
        table("closed", hours=[3, 4]),
        table("keyless", api_key_env="NO_SUCH_API_KEY"),
    ]
    file = write_fleet(tmp_path, *endpoints)
    whole = night(file)
    folders = shards(file, 7)
    assert len(server.requests) == 2 * 3 * ASKED
    out = tmp_path / "merged"
    merged = weighbridge_cli("merge", file, *folders, "--out", out)
    assert merged.code == whole.code == INCONCLUSIVE
    assert merged.out.replace(str(out), "") == whole.out.replace(str(root), "")

    def files(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}

    assert files(out / NIGHT) == files(root / NIGHT)
    for name in ("night.json", "fleet.json", "junit.xml", *(f"host-{n}/verdict.json" for n in range(3)), "dead/verdict.json", "host-0/plan.json"):  # fmt: skip
        assert (out / NIGHT / name).read_bytes() == (root / NIGHT / name).read_bytes(), name
    again = weighbridge_cli("merge", file, *folders, "--out", out)
    assert again.out == merged.out, "merged twice is merged once"


def test_shards_that_come_one_by_one_are_merged_as_they_come(
    night: Callable[..., Ended], shards: Callable[..., list[Path]], server: FaultServer, weighbridge_cli: Weighbridge,
    tmp_path: Path, root: Path,
) -> None:  # fmt: skip
    file = write_fleet(
        tmp_path, *(table(f"host {n}", server.base_url) for n in range(4)), table("closed", hours=[3, 4])
    )
    night(file)
    out = tmp_path / "merged"
    for folder in shards(file, 2):
        weighbridge_cli("merge", file, folder, "--out", out)
    assert (out / NIGHT / "fleet.json").read_bytes() == (root / NIGHT / "fleet.json").read_bytes()


def test_two_different_runs_of_one_endpoint_are_not_merged(
    night: Callable[..., Ended], server: FaultServer, weighbridge_cli: Weighbridge, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))
    night(file)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(root / DRAW_KEY, other)
    server.answer = refuses(401, "no")
    night(file, out=other)
    out = tmp_path / "merged"
    ended = weighbridge_cli("merge", file, root, other, "--out", out)
    assert ended.code == CONFIGURATION
    assert "are two runs of one endpoint on one night. Keep one of them" in ended.err
    assert (out / NIGHT / "a" / "exchanges.jsonl").read_bytes() == (root / NIGHT / "a" / "exchanges.jsonl").read_bytes()
    assert (other / NIGHT / "a" / "verdict.json").exists()


def test_shards_of_different_keys_or_fleets_and_folders_that_are_none_are_refused(
    night: Callable[..., Ended], server: FaultServer, weighbridge_cli: Weighbridge, tmp_path: Path, root: Path
) -> None:
    file = write_fleet(tmp_path, table("a", server.base_url))
    other = tmp_path / "other"
    night(file)
    night(file, out=other)
    ended = weighbridge_cli("merge", file, root, other, "--out", tmp_path / "merged")
    assert ended.code == CONFIGURATION
    assert "did not draw from one key. Copy draws.key to every machine" in ended.err
    ended = weighbridge_cli("merge", file, root, tmp_path / "nothing", "--out", tmp_path / "merged")
    assert ended.code == CONFIGURATION
    assert "nothing holds no nights" in ended.err
    shutil.rmtree(other)
    other.mkdir()
    shutil.copy(root / DRAW_KEY, other)
    elsewhere = write_fleet(tmp_path, table("b", server.base_url), name="another fleet")
    night(elsewhere, out=other)
    ended = weighbridge_cli("merge", file, root, other, "--out", tmp_path / "merged")
    assert ended.code == CONFIGURATION
    assert "Merge shards of one fleet" in ended.err


# -- the webhook -----------------------------------------------------------------------------------------------

HOOK = "NIGHTLY_TEST_WEBHOOK_URL"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with FaultServer(says({})) as one:
        monkeypatch.setenv(HOOK, f"{one.origin}/services/{SECRET_PATH}")
        yield one


def texts(hook: FaultServer) -> list[str]:
    assert all(request.path == f"/services/{SECRET_PATH}" for request in hook.requests)
    assert all(list(request.document) == ["text"] for request in hook.requests)
    return [str(request.document["text"]) for request in hook.requests]


def test_a_changed_verdict_is_told_once(
    night: Callable[..., Ended], server: FaultServer, hook: FaultServer, clock: Clock, tmp_path: Path, root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NIGHTLY_TEST_API_KEY", KEY)
    endpoints = [table(name, server.base_url, api_key_env="NIGHTLY_TEST_API_KEY") for name in ("a", "b")]
    file = write_fleet(tmp_path, *endpoints, webhook_url_env=HOOK)
    ended = [night(file)]
    assert hook.requests == [], "a first night changes nothing"
    say_instead(root / NIGHT / "a", "consistent")
    clock.moment += DAY
    ended += [night(file), night(file)]
    clock.moment += DAY
    ended.append(night(file))
    (text,) = texts(hook)
    assert "Weighbridge, fleet, night of 2026-11-23: 1 verdict changed" in text
    assert "a: consistent → inconclusive. Not verified." in text
    printed = "".join(each.out + each.err for each in ended)
    kept = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    for secret in (KEY, SECRET_PATH, hook.origin):
        assert secret not in printed
        assert secret.encode() not in kept
    assert KEY not in text
    assert all(request.bearer == "" for request in hook.requests)


def test_what_could_not_be_told_is_told_later(
    night: Callable[..., Ended], server: FaultServer, hook: FaultServer, clock: Clock, tmp_path: Path, root: Path
) -> None:
    """Also where nobody calls again the same night, as a nightly timer does not."""
    file = write_fleet(tmp_path, table("a", server.base_url), webhook_url_env=HOOK)
    night(file)
    say_instead(root / NIGHT / "a", "consistent")
    hook.answer = refuses(503, "not now")
    for _ in range(2):
        clock.moment += DAY
        ended = night(file)
        assert ended.code == INCONCLUSIVE, "the night is what it is"
        assert "the webhook answered 503; it will be told the next time" in ended.said
        assert SECRET_PATH not in ended.said
    hook.answer = says({})
    night(file)
    night(file)
    assert len(hook.requests) == 3
    assert "a: consistent → inconclusive" in texts(hook)[-1]


def night_with(verdict: VerdictWord, before: VerdictWord | None, name: str = "a") -> FleetNight:
    row = FleetRow(endpoint=name, folder="a", state="done", why=None, verdict=verdict, before=before, sentence="So.")
    return FleetNight(fleet="fleet", night=NIGHT, false_discovery_rate=0.01, endpoints=[row])


def test_what_changes_back_the_same_night_is_told_too(hook: FaultServer, root: Path) -> None:
    """An endpoint that was away in the evening and came back: whoever was told the one is told the other."""
    url = address_of(HOOK)
    assert url is not None
    for verdict in ("inconclusive", "inconclusive", "consistent", "consistent"):
        assert tell(url, root, night_with(verdict, "consistent")) is None
    assert [text.splitlines()[1] for text in texts(hook)] == [
        "• a: consistent → inconclusive. So.",
        "• a: inconclusive → consistent. So.",
    ]


def test_a_file_of_what_was_told_that_cannot_be_read_is_said(hook: FaultServer, root: Path) -> None:
    url = address_of(HOOK)
    assert url is not None
    root.mkdir()
    (root / "told.json").write_text("{", "utf-8")
    assert tell(url, root, night_with("differs", "consistent")) == (
        f"nothing was told to the webhook: {root / 'told.json'} is not JSON"
    )
    assert hook.requests == []


def test_names_are_no_markup_in_a_message() -> None:
    name = "<!channel> & <https://x.example|y>"
    text = message(one := night_with("differs", "consistent", name), one.endpoints)["text"]
    assert "&lt;!channel&gt; &amp; &lt;https://x.example|y&gt;: consistent → differs" in text
    assert "<" not in text


def test_a_message_about_many_stays_short() -> None:
    one = night_with("differs", "consistent")
    rows = [one.endpoints[0].model_copy(update={"endpoint": f"host {n}"}) for n in range(500)]
    lines = message(one, rows)["text"].splitlines()
    assert len(lines) == 22
    assert lines[0].endswith("500 verdicts changed")
    assert lines[-1] == "… and 480 more"


@pytest.mark.parametrize(
    "value",
    [
        "", "http://hooks.example/x", "ftp://hooks.example/x", "hooks.example/x", "https://", "https://[x", "https://u:p@hooks.example/x",
        "https://hooks.example/x\ty", "https://hooks.example:99999/x", "https://hooks.example:port/x", "https://hooks..example/x", f"https://{'a' * 64}.example/x",
    ],
)  # fmt: skip
def test_a_webhook_that_cannot_be_used_is_refused_before_anything_is_asked(
    value: str, night: Callable[..., Ended], server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOOK, value)
    ended = night(write_fleet(tmp_path, table("a", server.base_url), webhook_url_env=HOOK))
    assert ended.code == CONFIGURATION
    assert HOOK in ended.err
    assert not value or value not in ended.out + ended.err
    assert server.requests == []


def test_a_webhook_that_is_dead_or_sends_elsewhere_is_no_reason_to_fail(
    hook: FaultServer, dead_url: str, root: Path
) -> None:
    night = night_with("differs", "consistent")
    assert tell(f"{dead_url}/{SECRET_PATH}", root, night) == "the webhook did not answer"
    with FaultServer(says({})) as elsewhere:
        hook.answer = first(1, lambda call: call.send(307, b"", {"location": elsewhere.base_url}), says({}))
        assert tell(f"{hook.origin}/services/{SECRET_PATH}", root, night) == "the webhook answered 307"
        assert elsewhere.requests == []
    assert tell(f"{hook.origin}/services/{SECRET_PATH}", root, night) is None
    assert len(hook.requests) == 2
