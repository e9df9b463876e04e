"""The history of runs: rows, an index that can be made again, changes over time, a fleet's night, and another monitor's record."""

import io
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Ended, Weighbridge
from weighbridge.canonical import rounded
from weighbridge.errors import ConfigurationError, RunFolderError
from weighbridge.history.changes import BASELINE_NIGHTS, changes_of, first_alarm, own_past_log_e, run_length
from weighbridge.history.fleetwide import FleetVerdict, judge_night
from weighbridge.history.index import INDEX, MIGRATIONS, Run, endpoints, opened, refresh, runs
from weighbridge.history.one_token import read_one_token_history
from weighbridge.history.pools import pools_that_disagree
from weighbridge.history.row import ROW, make_row, read_row, spent_usd, write_row
from weighbridge.judge.policy import load_policy
from weighbridge.plan import make_plan, worst_case_tokens
from weighbridge.records import AXES, Effect, Endpoint, Observation, Price, Verdict, VerdictWord
from weighbridge.report.course import course_of_nights
from weighbridge.stats.changes import shiryaev_roberts
from weighbridge.store import RunFolder, plan_bytes

BEGIN = date(2026, 1, 1)
LEVEL = run_length(1)
SVG = "{http://www.w3.org/2000/svg}"

Say = Callable[[str], None]


@pytest.fixture(autouse=True)
def no_disk(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "nights"
    folder.mkdir()
    return folder


def a_verdict(**known: Any) -> Verdict:
    usual: dict[str, Any] = {
        "weighbridge_version": "0.1.0", "verdict": "consistent", "cause": None, "exact_variant": None, "family": None, "policy": "strict",
        "axes": dict.fromkeys(AXES, "consistent"), "not_excluded": [], "excluded": [], "sentence": "As it is.", "error_rate": "None.",
        "log10_e_value": -0.5, "effective_noise_nats": Effect(name="effective noise", value=0.03, low=0.02, high=0.05, unit="nats"),
        "answers_used": 12, "requests_sent": 14, "prompt_tokens": 900, "completion_tokens": 40, "cost_usd": 0.001,
        "stopped_because": "decided", "endpoint_refused": False, "observations_sha256": "0" * 64,
    }  # fmt: skip
    return Verdict.model_validate(usual | known)


def a_run(
    folder: Path, *, name: str = "Shop", night: int = 0, price: Price | None = None, verdict: Verdict | None = None,
    observations: list[Observation] | None = None, judged: bool = True,
) -> Path:  # fmt: skip
    """A run folder of an endpoint without reference, as an audit writes it."""
    endpoint = Endpoint(name=name, base_url="https://a.example/v1", model="m", price=price)
    moment = datetime.fromisoformat(f"{BEGIN + timedelta(night)}T23:00:00+00:00")
    plan = make_plan(endpoint, load_policy("strict"), None, created_at=moment.isoformat())
    run = RunFolder.create(folder, plan)
    run.write_observations(observations or [])
    if judged:
        # What an audit finds besides is of no concern here.
        document = json.dumps(rounded((verdict or a_verdict()).model_dump(mode="json", by_alias=True)))
        (folder / "verdict.json").write_text(document)
    return folder


def an_observation(request_id: str, **known: Any) -> Observation:
    usual = {"request_id": request_id, "probe_id": request_id, "answered": True, "attempts": 1, "latency_s": 0.5}
    return Observation.model_validate(usual | known)


def entered(root: Path, *, tell: Say | None = None) -> list[Run]:
    """Bring the index up to date and read all of it."""

    def fail(text: str) -> None:
        raise AssertionError(text)

    say = tell or fail
    with opened(root, say) as connection:
        refresh(connection, root, say)
        return runs(connection)


def quiet(_: str) -> None:
    """What is said is of no concern here."""


def edit(file: Path, **changed: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changed))


def a_night(night: int, **known: Any) -> Run:
    """A run as the index gives it."""
    usual = {
        "endpoint": "Shop", "night": (BEGIN + timedelta(night)).isoformat(), "verdict": "consistent", "cause": None, "log10_e_value": None,
        "noise_nats": None, "sealed": 0, "pool": "p", "probes": f'["probe-{night}"]', "commitment": f"draw {night}",
        "noise_low_nats": None, "noise_high_nats": None,
    }  # fmt: skip
    return usual | known


def day(night: int) -> str:
    return (BEGIN + timedelta(night)).isoformat()


# -- rows ------------------------------------------------------------------------------------------------------


def test_a_row_says_what_its_run_said(tmp_path: Path) -> None:
    verdict = a_verdict(verdict="differs", cause="precision", exact_variant="q4_0", log10_e_value=7.25)
    row = make_row(a_run(tmp_path / "run", name="Shop", night=3, verdict=verdict))
    assert (row.endpoint, row.model, row.night, row.policy) == ("Shop", "m", BEGIN + timedelta(3), "strict")
    assert (row.verdict, row.cause, row.exact_variant, row.log10_e_value) == ("differs", "precision", "q4_0", 7.25)
    assert (row.noise_nats, row.noise_low_nats, row.noise_high_nats) == (0.03, 0.02, 0.05)
    assert (row.answers_used, row.requests_sent, row.cost_usd, row.spent_usd) == (12, 14, 0.001, None)
    assert (row.reference, row.pool, row.sealed, row.probes) == (None, None, False, [])


def test_speed_and_errors_are_those_of_the_answers(tmp_path: Path) -> None:
    """No probe of the weights was asked, so that the latency of one is not known."""
    asked = [
        an_observation("capability-top-20", completion_tokens=1, latency_s=0.4),
        an_observation("sampling-long", completion_tokens=50, latency_s=2.0, streamed=True, first_byte_s=0.25),
        an_observation("capability-plain", answered=False, fault="timeout", latency_s=60.0),
    ]
    row = make_row(a_run(tmp_path / "run", observations=asked))
    assert (row.latency_s, row.first_token_s, row.tokens_per_s, row.errors) == (None, 0.25, 25.0, 1)


def test_the_rate_of_a_single_token_is_none(tmp_path: Path) -> None:
    row = make_row(a_run(tmp_path / "run", observations=[an_observation("capability-plain", completion_tokens=1)]))
    assert row.tokens_per_s is None
    assert make_row(a_run(tmp_path / "silent")).tokens_per_s is None


def test_what_was_spent_counts_attempts_without_an_answer_at_their_worst_case(tmp_path: Path) -> None:
    price = Price(prompt_usd_per_million_tokens=10.0, completion_usd_per_million_tokens=30.0)
    endpoint = Endpoint(name="Shop", base_url="https://a.example/v1", model="m", price=price)
    plan = make_plan(endpoint, load_policy("strict"), None)
    first, second = plan.capability_requests[:2]
    worst = [price.cost_usd(*worst_case_tokens(request)) for request in (first, second)]
    answered = an_observation(first.request_id, prompt_tokens=50, completion_tokens=2, attempts=3)
    dead = an_observation(second.request_id, answered=False, attempts=2)
    listing = an_observation("route-listing", attempts=4)
    assert worst[0] > 0
    assert spent_usd(plan, [answered]) == pytest.approx((50 * 10 + 2 * 30) / 1e6 + 2 * worst[0])
    assert spent_usd(plan, [dead]) == pytest.approx(2 * worst[1])
    assert spent_usd(plan, [listing]) == 0
    run = a_run(tmp_path / "run", price=price, observations=[answered, dead])
    assert make_row(run).spent_usd == pytest.approx((50 * 10 + 2 * 30) / 1e6 + 2 * worst[0] + 2 * worst[1])


def test_a_row_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    row = make_row(a_run(tmp_path / "run", verdict=a_verdict(log10_e_value=1.25)), sealed=True)
    write_row(tmp_path / "run", row)
    assert read_row(tmp_path / "run" / ROW) == row
    assert json.loads((tmp_path / "run" / ROW).read_bytes())["schema"] == "weighbridge/row/1"


def test_a_night_is_called_by_the_day_on_which_it_begins(root: Path) -> None:
    run = a_run(root / "run")
    edit(run / "plan.json", created_at="2026-03-02T03:00:00+00:00")
    assert make_row(run).night == date(2026, 3, 1)


def test_a_run_that_was_not_judged_has_no_row(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="was not judged"):
        make_row(a_run(tmp_path / "run", judged=False))


# -- the index -------------------------------------------------------------------------------------------------


def test_a_run_without_a_row_of_its_own_is_entered_from_its_verdict(root: Path) -> None:
    a_run(root / "2026-01-01" / "shop", verdict=a_verdict(verdict="differs", cause="route"))
    (run,) = entered(root)
    assert (run["folder"], run["verdict"], run["cause"]) == ("2026-01-01/shop", "differs", "route")
    assert not (root / "2026-01-01" / "shop" / ROW).exists()


def test_a_row_tells_what_no_other_file_does(root: Path) -> None:
    folder = a_run(root / "shop")
    write_row(folder, make_row(folder, sealed=True))
    assert [run["sealed"] for run in entered(root)] == [1]


def test_a_run_is_left_out_quietly_until_it_is_judged(root: Path) -> None:
    a_run(root / "shop", judged=False)
    assert entered(root) == []
    (root / "shop" / "verdict.json").write_text(a_verdict().model_dump_json(by_alias=True))
    assert [run["folder"] for run in entered(root)] == ["shop"]


def test_runs_come_oldest_first_and_by_endpoint_and_night(root: Path) -> None:
    for night, name in ((4, "a"), (1, "b"), (2, "a"), (1, "a")):
        a_run(root / day(night) / name, name=name, night=night)
    assert [(run["night"], run["endpoint"]) for run in entered(root)] == [
        (day(1), "a"), (day(1), "b"), (day(2), "a"), (day(4), "a"),
    ]  # fmt: skip
    with opened(root, quiet) as connection:
        assert [run["night"] for run in runs(connection, endpoint="a")] == [day(1), day(2), day(4)]
        assert [run["endpoint"] for run in runs(connection, night=day(1))] == ["a", "b"]
        assert [run["night"] for run in runs(connection, endpoint="a", before=day(4))] == [day(1), day(2)]
        assert [run["night"] for run in runs(connection, last=2)] == [day(2), day(4)]
        assert runs(connection, endpoint="b", columns=("night", "verdict")) == [
            {"night": day(1), "verdict": "consistent"}
        ]
        assert endpoints(connection) == ["a", "b"]


@pytest.mark.parametrize("file", ["verdict.json", ROW, "plan.json"])
def test_a_run_of_another_version_is_named_and_the_others_are_entered(root: Path, file: str) -> None:
    for name in ("old", "shop"):
        write_row(a_run(root / name), make_row(root / name))
    if file != ROW:
        (root / "old" / ROW).unlink()
    edit(root / "old" / file, colour="red")
    told: list[str] = []
    assert [run["folder"] for run in entered(root, tell=told.append)] == ["shop"]
    assert len(told) == 1
    assert f"old/{file}" in told[0]
    assert "this version" in told[0]
    assert "\n" not in told[0]


DAMAGES: dict[str, tuple[str, str]] = {
    "a row that is no JSON": (ROW, "{"),
    "a row of nothing": (ROW, ""),
    "a row that is a list": (ROW, "[]"),
    "a verdict that is no JSON": ("verdict.json", "{"),
    "a verdict that is nested": ("verdict.json", "[" * 100_000),
    "a plan that is a number": ("plan.json", "1"),
    "observations that are none": ("observations.jsonl", "{}\n"),
    "observations that are binary": ("observations.jsonl", "\x00\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_and_left_out(root: Path, damage: str) -> None:
    file, text = DAMAGES[damage]
    (a_run(root / "bad") / file).write_text(text)
    a_run(root / "good")
    told: list[str] = []
    assert [run["folder"] for run in entered(root, tell=told.append)] == ["good"]
    assert len(told) == 1
    assert f"bad/{file}" in told[0]


@pytest.mark.parametrize("moment", ["yesterday", "0001-01-01T00:00:00+00:00"])
def test_a_plan_of_no_time_is_named_and_left_out(root: Path, moment: str) -> None:
    edit(a_run(root / "bad") / "plan.json", created_at=moment)
    told: list[str] = []
    assert entered(root, tell=told.append) == []
    assert "created_at is no time" in told[0]


def test_a_number_that_the_index_cannot_hold_is_named_and_left_out(root: Path) -> None:
    a_run(root / "bad")
    edit(root / "bad" / "verdict.json", requests_sent=10**30)
    a_run(root / "good")
    told: list[str] = []
    assert [run["folder"] for run in entered(root, tell=told.append)] == ["good"]
    assert "bad" in told[0]


def test_a_run_that_is_gone_leaves_the_index(root: Path) -> None:
    for name in ("gone", "kept"):
        a_run(root / name)
    assert len(entered(root)) == 2
    shutil.rmtree(root / "gone")
    assert [run["folder"] for run in entered(root)] == ["kept"]


def test_a_run_that_is_judged_again_is_entered_anew(root: Path) -> None:
    """A run that stopped is gone on with, and a library that has grown judges it otherwise."""
    folder = a_run(root / "shop", verdict=a_verdict(verdict="inconclusive", stopped_because="rate_limited"))
    assert [run["verdict"] for run in entered(root)] == ["inconclusive"]
    a_verdict_later(folder)
    assert [run["verdict"] for run in entered(root)] == ["consistent"]


def test_a_row_that_is_older_than_its_verdict_is_made_again(root: Path) -> None:
    folder = a_run(root / "shop", verdict=a_verdict(verdict="inconclusive"))
    write_row(folder, make_row(folder, sealed=True))
    assert [run["verdict"] for run in entered(root)] == ["inconclusive"]
    a_verdict_later(folder)
    assert [(run["verdict"], run["sealed"]) for run in entered(root)] == [("consistent", 1)]


def a_verdict_later(folder: Path) -> None:
    file = folder / "verdict.json"
    file.write_text(a_verdict().model_dump_json(by_alias=True))
    later = file.stat().st_mtime + 60
    os.utime(file, (later, later))


def test_a_run_that_is_the_folder_itself_stays_in_the_index(root: Path) -> None:
    a_run(root)
    for _ in range(3):
        assert [run["folder"] for run in entered(root)] == ["."]


def test_controls_are_part_of_their_run(root: Path) -> None:
    a_run(root / "shop", name="Shop")
    a_run(root / "shop" / "controls" / "honest", name="Honest")
    for _ in range(2):
        assert [run["endpoint"] for run in entered(root)] == ["Shop"]


def test_an_endpoint_may_be_called_controls(root: Path) -> None:
    a_run(root / day(0) / "controls", name="Controls")
    assert [run["endpoint"] for run in entered(root)] == ["Controls"]


def test_copies_under_way_and_links_are_not_entered(root: Path, tmp_path: Path) -> None:
    a_run(root / ".shop.part")
    (root / "link").symlink_to(a_run(tmp_path / "elsewhere"))
    assert entered(root) == []


def test_migrations_are_applied_once_and_the_log_is_written_ahead(root: Path) -> None:
    a_run(root / "shop")
    for _ in range(2):
        with opened(root, quiet) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            refresh(connection, root, quiet)
    assert len(entered(root)) == 1


def test_an_index_of_an_earlier_version_is_brought_up_to_date(root: Path) -> None:
    """Its rows are looked at once more: what was added to the table is filled in."""
    a_run(root / "shop")
    rows = entered(root)
    (root / INDEX).unlink()
    with sqlite3.connect(root / INDEX) as connection:
        connection.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        values = {name: value for name, value in rows[0].items() if name != "judged_ns"} | {"verdict": "differs"}
        places = ", ".join(f":{name}" for name in values)
        connection.execute(f"INSERT INTO runs ({', '.join(values)}) VALUES ({places})", values)
    connection.close()
    assert entered(root) == rows


def test_an_index_of_a_later_version_is_refused_in_one_line(root: Path, weighbridge_cli: Weighbridge) -> None:
    a_run(root / "shop")
    entered(root)
    connection = sqlite3.connect(root / INDEX)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = (root / INDEX).read_bytes()
    ended = weighbridge_cli("history", "--runs", root)
    assert_one_line(ended, INDEX, "later version")
    assert (root / INDEX).read_bytes() == before


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\x00 and then nothing" * 400])
def test_a_corrupt_index_is_put_aside_and_made_again(root: Path, damage: bytes) -> None:
    a_run(root / "shop")
    rows = entered(root)
    (root / INDEX).write_bytes(damage)
    told: list[str] = []
    assert entered(root, tell=told.append) == rows
    assert "is made again" in told[0]
    assert (root / "history.broken").read_bytes() == damage


def test_damage_that_shows_only_later_is_one_line_and_mended_by_the_next_command(
    root: Path, weighbridge_cli: Weighbridge
) -> None:
    """The leaves of the table are gone (their pages begin with 13), those of its indexes, which are looked at first, are whole."""
    for night in range(40):
        a_run(root / day(night), night=night)
    rows = entered(root)
    data = (root / INDEX).read_bytes()
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    damaged = b"".join(b"\xff" * 4096 if n and page[0] == 13 else page for n, page in enumerate(pages))
    (root / INDEX).write_bytes(damaged)
    assert_one_line(weighbridge_cli("history", "--runs", root, "--json"), INDEX, "is damaged", "history.broken")
    assert (root / "history.broken").read_bytes() == damaged
    assert weighbridge_cli("history", "--runs", root, "--json").code == 0
    assert entered(root) == rows


def test_an_index_that_is_a_folder_is_one_line(root: Path, weighbridge_cli: Weighbridge) -> None:
    (root / INDEX).mkdir()
    assert_one_line(weighbridge_cli("history", "--runs", root), INDEX)


def test_an_index_that_is_made_again_holds_the_same(root: Path, weighbridge_cli: Weighbridge) -> None:
    for night in range(3):
        folder = a_run(root / day(night) / "shop", night=night)
        write_row(folder, make_row(folder, sealed=True))
    rows = entered(root)
    connection = sqlite3.connect(root / INDEX)
    with connection:
        connection.execute("UPDATE runs SET verdict = 'differs'")
    connection.close()
    assert [run["verdict"] for run in entered(root)] == ["differs"] * 3
    assert weighbridge_cli("history", "--runs", root, "--rebuild").code == 0
    assert entered(root) == rows


def test_several_who_open_a_new_history_at_once_all_see_it(root: Path) -> None:
    for night in range(5):
        a_run(root / day(night), night=night)
    seen: list[int] = []
    failed: list[Exception] = []

    def look() -> None:
        try:
            seen.append(len(entered(root)))
        except Exception as error:  # noqa: BLE001 - a thread's fault is told below
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert seen == [5] * 6


# -- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def changed(root: Path) -> Path:
    """Two endpoints over eight nights, one of which is swapped on the fifth."""
    for night in range(8):
        a_run(root / day(night) / "shop", name="Shop", night=night)
        differs = night >= 4
        verdict = a_verdict(
            verdict="differs" if differs else "consistent", cause="precision" if differs else None,
            log10_e_value=8.0 if differs else -1.0, effective_noise_nats=None if night == 1 else a_verdict().effective_noise_nats,
        )  # fmt: skip
        a_run(root / day(night) / "bazaar", name="[b]azaar", night=night, verdict=verdict)
    return root


def assert_one_line(ended: Ended, *names: str) -> None:
    assert ended.code == 2, ended.said
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert [name for name in names if name not in line] == [], line


def test_the_table_shows_every_night_and_the_change(
    changed: Path, weighbridge_cli: Weighbridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    ended = weighbridge_cli("history", "--runs", changed)
    assert ended.code == 0
    assert ended.said.count("[b]azaar") == 9
    assert f"[b]azaar: changed on {day(4)} against the reference, found on {day(4)}" in ended.said
    assert "Shop: changed" not in ended.said


def test_nothing_of_a_night_or_a_name_is_cut_off_in_a_narrow_terminal(
    root: Path, weighbridge_cli: Weighbridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "honest-host-of-the-second-provider"
    verdict = a_verdict(verdict="differs", cause="partial_routing")
    a_run(root / "shop", name=name, night=3, verdict=verdict)
    out = weighbridge_cli("history", "--runs", root).out
    assert day(3) in out
    assert "…" not in out
    first = next(line for line in out.splitlines() if day(3) in line)
    at = first.index("hon")
    column = [line[at:].split(" ")[0] for line in out.splitlines()]
    assert "".join(column).endswith(name)


def test_the_table_shows_the_last_runs_and_says_how_many_there_are(root: Path, weighbridge_cli: Weighbridge) -> None:
    for night in range(33):
        a_run(root / day(night), night=night)
    ended = weighbridge_cli("history", "--runs", root)
    assert "the last 30 of 33 runs" in ended.said
    assert day(2) not in ended.out
    assert day(32) in ended.out


def test_the_document_has_a_schema_all_runs_and_the_changes(changed: Path, weighbridge_cli: Weighbridge) -> None:
    ended = weighbridge_cli("history", "--runs", changed, "--json")
    document = json.loads(ended.out)
    assert document["schema"] == "weighbridge/history/1"
    assert len(document["runs"]) == 16
    assert document["average_run_length_nights"] == run_length(2) == 1460
    (change,) = document["changes"]
    assert (change["endpoint"], change["began"], change["cause"]) == ("[b]azaar", day(4), "precision")
    one = json.loads(weighbridge_cli("history", "Shop", "--runs", changed, "--json").out)
    assert (len(one["runs"]), one["changes"], one["average_run_length_nights"]) == (8, [], 1460)


def test_the_csv_is_a_table(changed: Path, weighbridge_cli: Weighbridge) -> None:
    table = pd.read_csv(io.StringIO(weighbridge_cli("history", "--runs", changed, "--csv").out))
    assert len(table) == 16
    assert table.loc[table["endpoint"] == "[b]azaar", "log10_e_value"].tolist() == [-1.0] * 4 + [8.0] * 4
    assert {"latency_s", "first_token_s", "tokens_per_s", "errors", "cost_usd"} <= set(table.columns)


def test_the_csv_of_no_runs_has_its_columns(root: Path, weighbridge_cli: Weighbridge) -> None:
    table = pd.read_csv(io.StringIO(weighbridge_cli("history", "--runs", root, "--csv").out))
    assert len(table) == 0
    assert "verdict" in table.columns


def test_the_picture_is_well_formed_and_marks_the_change(
    changed: Path, tmp_path: Path, weighbridge_cli: Weighbridge
) -> None:
    file = tmp_path / "pictures" / "course.svg"
    assert weighbridge_cli("history", "[b]azaar", "--runs", changed, "--plot", file).code == 0
    picture = ElementTree.fromstring(file.read_bytes())
    assert picture.tag == f"{SVG}svg"
    words = ["".join(text.itertext()).strip() for text in picture.iter(f"{SVG}text")]
    assert f"changed {day(4)}" in words
    assert {"consistent", "differs", day(0), day(7)} <= set(words)
    assert "<script" not in file.read_text().lower()


def test_no_name_breaks_the_picture() -> None:
    night = a_night(0, noise_nats=0.1, noise_low_nats=0.05, noise_high_nats=0.2)
    name = 'A & B "<script>alert(1)</script>" \x00 $x^$'
    text = course_of_nights([night], [], name)
    picture = ElementTree.fromstring(text)
    assert picture.get("aria-label", "").startswith('A & B "<script>')
    assert "<script" not in text


def test_nights_without_a_distance_are_drawn_too() -> None:
    words: list[VerdictWord] = ["consistent", "inconclusive", "differs", "differs_replicated"]
    ElementTree.fromstring(course_of_nights([a_night(n, verdict=word) for n, word in enumerate(words)], [], "Nights"))


def test_an_unknown_endpoint_is_told_the_known_ones(changed: Path, weighbridge_cli: Weighbridge) -> None:
    assert_one_line(weighbridge_cli("history", "Sop", "--runs", changed), "'Sop'", "Shop", "[b]azaar")


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    assert_one_line(weighbridge_cli("history", "--runs", tmp_path / "none"), "none", "--runs")


def test_a_picture_needs_an_endpoint(changed: Path, tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    assert_one_line(weighbridge_cli("history", "--runs", changed, "--plot", tmp_path / "a.svg"), "--plot")
    assert not (tmp_path / "a.svg").exists()


def test_a_picture_that_cannot_be_written_is_one_line(
    changed: Path, tmp_path: Path, weighbridge_cli: Weighbridge
) -> None:
    (tmp_path / "file").write_text("")
    ended = weighbridge_cli("history", "Shop", "--runs", changed, "--plot", tmp_path / "file" / "a.svg")
    assert_one_line(ended, "a.svg", "cannot be written")


# -- changes ---------------------------------------------------------------------------------------------------


def test_nothing_has_changed_where_nothing_is_known() -> None:
    assert changes_of([], LEVEL) == []
    assert changes_of([a_night(n) for n in range(50)], LEVEL) == []


@pytest.mark.parametrize("sealed", [0, 1])
def test_a_change_against_the_reference_is_dated_to_its_first_night(sealed: int) -> None:
    rng = np.random.default_rng(1)
    log10_e = np.concatenate([-rng.exponential(1, 20), 2 + rng.exponential(1, 5)])
    nights = [a_night(n, log10_e_value=float(e), sealed=sealed) for n, e in enumerate(log10_e)]
    (change,) = changes_of(nights, LEVEL)
    assert (change.against, change.began, change.run_length_nights) == ("reference", day(20), LEVEL)
    assert day(20) <= change.found <= day(22)
    assert change.log10_detector >= np.log10(LEVEL)


def test_an_endpoint_that_differed_on_its_first_night_has_not_changed() -> None:
    nights = [a_night(n, log10_e_value=9.0, noise_nats=1.0 + 0.01 * (n % 7)) for n in range(60)]
    assert changes_of(nights, LEVEL) == []


def noise_of(rng: np.random.Generator, *parts: tuple[int, float], spread: float = 0.15) -> list[float]:
    return [float(scale * np.exp(spread * rng.normal())) for count, scale in parts for _ in range(count)]


def test_a_return_after_a_change_is_found_too() -> None:
    rng = np.random.default_rng(2)
    noise = noise_of(rng, (40, 0.03), (40, 0.8), (40, 0.03))
    log10_e = [-1.0] * 40 + [6.0] * 40 + [-1.0] * 40
    nights = [a_night(n, log10_e_value=e, noise_nats=x) for n, (e, x) in enumerate(zip(log10_e, noise, strict=True))]
    changes = changes_of(nights, LEVEL)
    assert [(c.against, c.began) for c in changes] == [("reference", day(40)), ("own past", day(80))]


def test_a_change_that_was_found_stays_found_when_a_larger_one_comes() -> None:
    """First within what an honest stack may be, later beyond it."""
    rng = np.random.default_rng(3)
    noise = noise_of(rng, (40, 0.01), (60, 0.03), (30, 0.9))
    nights = [a_night(n, log10_e_value=6.0 if n >= 100 else -1.0, noise_nats=x) for n, x in enumerate(noise)]
    early = changes_of(nights[:100], LEVEL)
    assert len(early) == 1
    assert abs((date.fromisoformat(early[0].began) - BEGIN).days - 40) <= 5
    late = changes_of(nights, LEVEL)
    assert late[0] == early[0]
    assert [(c.against, c.began) for c in late[1:]] == [("reference", day(100))]


def test_a_doubled_noise_is_found_and_dated_within_a_few_nights() -> None:
    """Forty nights of an endpoint of its own, then twice the distance: of many series nearly all, and most to within three nights."""
    rng = np.random.default_rng(4)
    found, near, delays = 0, 0, []
    for _ in range(60):
        noise = noise_of(rng, (40, 0.03), (40, 0.06))
        changes = changes_of([a_night(n, noise_nats=x) for n, x in enumerate(noise)], LEVEL)
        dated = [(date.fromisoformat(c.began) - BEGIN).days for c in changes]
        found += any(abs(at - 40) <= 10 for at in dated)
        near += any(abs(at - 40) <= 3 for at in dated)
        delays += [(date.fromisoformat(c.found) - BEGIN).days - 40 for c in changes[:1]]
    assert found >= 57
    assert near >= 50
    assert np.median(delays) <= 10


def test_a_halved_noise_is_a_change_as_well() -> None:
    noise = noise_of(np.random.default_rng(5), (40, 0.06), (40, 0.03))
    (change,) = changes_of([a_night(n, noise_nats=x) for n, x in enumerate(noise)], LEVEL)
    assert abs((date.fromisoformat(change.began) - BEGIN).days - 40) <= 3


def test_no_change_is_dated_into_the_nights_that_say_what_is_usual() -> None:
    """What is strange from the first judged night on, came then at the earliest."""
    log_e = np.array([0.0] * BASELINE_NIGHTS + [9.0])
    alarm = first_alarm(log_e, shiryaev_roberts, LEVEL)
    assert alarm is not None
    assert alarm[:2] == (BASELINE_NIGHTS, BASELINE_NIGHTS)
    assert alarm[2] == pytest.approx(np.log10((1 + BASELINE_NIGHTS) * np.exp(9)))


def test_honest_series_raise_alarms_no_more_often_than_stated() -> None:
    """E[M] ≤ n after n nights of no change, so that an alarm by then has a chance of n / A at most."""
    rng = np.random.default_rng(6)
    series, nights = 400, 200
    alarms = 0
    for _ in range(series):
        noise = np.exp(0.4 * rng.normal(size=nights))
        scores = np.abs(np.log(noise) - np.median(np.log(noise[:BASELINE_NIGHTS])))
        alarms += first_alarm(own_past_log_e(scores), shiryaev_roberts, LEVEL) is not None
    allowed = nights / LEVEL
    assert alarms / series <= allowed
    assert alarms > 0, "a test that nothing can fail says nothing"


def test_an_alarm_does_not_depend_on_the_nights_after_it() -> None:
    scores = np.abs(np.random.default_rng(7).normal(size=80))
    assert own_past_log_e(scores)[:50].tolist() == own_past_log_e(scores[:50]).tolist()


@pytest.mark.parametrize(
    ("changed_fields", "multiplies"),
    [
        ({}, True),
        ({"sealed": 0}, False),
        ({"probes": '["the same"]'}, False),
        ({"probes": "[]", "sealed": 0}, False),
    ],
)
def test_evidence_multiplies_only_where_draws_are_sealed_and_disjoint(
    changed_fields: dict[str, Any], multiplies: bool
) -> None:
    """Seven nights of e = 10^0.6 reach 10^4 as a product and 28 as a sum."""
    nights = [a_night(0, log10_e_value=-2.0, sealed=1)]
    nights += [a_night(n, **({"log10_e_value": 0.6, "sealed": 1} | changed_fields)) for n in range(1, 8)]
    changes = changes_of(nights, LEVEL)
    assert [c.began for c in changes] == ([day(1)] if multiplies else [])


def test_one_probe_that_was_shown_before_ends_the_multiplying() -> None:
    nights = [a_night(n, log10_e_value=0.6, sealed=1) for n in range(8)]
    nights[0]["log10_e_value"] = -2.0
    assert changes_of(nights, LEVEL)
    nights[7]["probes"] = '["new", "probe-3"]'
    assert changes_of(nights, LEVEL) == []
    nights[7]["pool"] = "another pool, whose probe only has the same name"
    assert changes_of(nights, LEVEL)


# -- a fleet's night -------------------------------------------------------------------------------------------


def a_fleet(night: int, *log10_e: float | None, cause: str | None = "precision", **first: Any) -> list[Run]:
    """One night of so many endpoints; the first one differs by itself."""
    fleet = [
        a_night(night, endpoint=f"e{i}", log10_e_value=e, commitment=f"{night} {i}") for i, e in enumerate(log10_e)
    ]
    fleet[0] |= {"verdict": "differs", "cause": cause} | first
    return fleet


def said_of_first(tonight: list[Run], earlier: list[Run] | None = None) -> FleetVerdict:
    return judge_night(tonight, earlier or [], 0.1)[0]


def test_an_endpoint_is_named_where_its_evidence_is_enough_for_the_whole_fleet() -> None:
    """Of K = 4 at 10 % one needs 40."""
    said = judge_night(a_fleet(0, np.log10(41.0), 0.0, 0.0, 0.0), [], 0.1)
    assert [v.verdict for v in said] == ["differs", "consistent", "consistent", "consistent"]
    assert (said[0].cause, said[0].before, said[0].judged_together) == ("precision", None, 4)
    assert "not a replication" in said[0].sentence


def test_the_same_evidence_does_not_name_it_among_many() -> None:
    said = said_of_first(a_fleet(0, np.log10(41.0), *[0.0] * 9))
    assert (said.verdict, said.cause, said.judged_together) == ("inconclusive", None, 10)
    assert "10 endpoints judged together" in said.sentence


def test_nights_without_an_e_value_count_among_those_that_are_judged() -> None:
    """They say nothing, e = 1, and are of the K that is stated."""
    assert said_of_first(a_fleet(0, np.log10(41.0), None, None, None)).verdict == "differs"
    said = said_of_first(a_fleet(0, np.log10(39.0), None, None, None))
    assert (said.verdict, said.judged_together) == ("inconclusive", 4)


def test_an_endpoint_without_an_e_value_is_not_named() -> None:
    assert said_of_first(a_fleet(0, None, 0.0)).verdict == "inconclusive"


def test_an_endpoint_that_is_consistent_is_not_named_whatever_the_evidence() -> None:
    said = said_of_first(a_fleet(0, 9.0, 0.0, verdict="consistent", cause=None))
    assert (said.verdict, said.cause) == ("consistent", None)


def test_what_is_not_verified_stays_so() -> None:
    said = said_of_first(a_fleet(0, 9.0, 0.0, verdict="inconclusive", cause=None))
    assert (said.verdict, said.sentence) == ("inconclusive", "Not verified.")


def test_names_that_are_read_need_no_e_value() -> None:
    said = said_of_first(a_fleet(0, None, *[0.0] * 9, cause="route"))
    assert (said.verdict, said.cause) == ("differs", "route")


def test_a_second_night_with_another_draw_replicates() -> None:
    said = said_of_first(a_fleet(5, 9.0, 0.0), a_fleet(2, 9.0, 0.0))
    assert (said.verdict, said.before, said.cause) == ("differs_replicated", "differs", "precision")


@pytest.mark.parametrize(
    ("before", "word"),
    [
        (a_fleet(2, 9.0, 0.0, commitment="5 0"), "differs"),  # the same draw
        (a_fleet(2, 9.0, 0.0, cause="kv_cache"), "differs"),
        (a_fleet(2, 1.0, *[0.0] * 20), "inconclusive"),  # differed by itself, and was not named
        (a_fleet(2, 9.0, 0.0, verdict="consistent", cause=None), "consistent"),
    ],
)
def test_a_second_night_does_not_replicate_what_the_first_did_not_say(before: list[Run], word: VerdictWord) -> None:
    said = said_of_first(a_fleet(5, 9.0, 0.0), before)
    assert (said.verdict, said.before) == ("differs", word)


def test_only_the_last_night_on_which_it_was_audited_counts() -> None:
    consistent = a_fleet(3, 0.0, 0.0, verdict="consistent", cause=None)
    said = said_of_first(a_fleet(5, 9.0, 0.0), a_fleet(2, 9.0, 0.0) + consistent)
    assert (said.verdict, said.before) == ("differs", "consistent")
    absent = a_fleet(3, 0.0, 0.0)[1:]
    said = said_of_first(a_fleet(5, 9.0, 0.0), a_fleet(2, 9.0, 0.0) + absent)
    assert (said.verdict, said.before) == ("differs_replicated", "differs")


def test_a_fleet_of_nobody_is_judged() -> None:
    assert judge_night([], [], 0.01) == []


# -- records of one-token answers ------------------------------------------------------------------------------

OneToken = dict[str, dict[str, list[list[str | None]]]]


def a_record(rng: np.random.Generator, shares: list[float], answers: int = 10) -> OneToken:
    """Five prompts whose first token is nearly a tie; by batch, the share of one of two tokens."""
    return {
        f"prompt {p}": {
            f"{day(n)}T03:00:00": [
                [f"{day(n)}T03:00:{a:02d}", "a" if rng.random() < share else "b"] for a in range(answers)
            ]
            for n, share in enumerate(shares)
        }
        for p in range(5)
    }


def judged(tmp_path: Path, record: object) -> list[str]:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record))
    return [change.began[:10] for change in read_one_token_history(file)]


def test_a_change_in_the_middle_of_a_record_is_found_and_dated(tmp_path: Path) -> None:
    near = 0
    for seed in range(20):
        record = a_record(np.random.default_rng(seed), [0.5] * 40 + [0.95] * 40)
        dated = [(date.fromisoformat(began) - BEGIN).days for began in judged(tmp_path, record)]
        near += any(abs(at - 40) <= 3 for at in dated)
    assert near >= 18


def test_a_record_without_a_change_is_said_to_have_none(tmp_path: Path) -> None:
    """Eighty batches: at most 80 / 730 of such records raise an alarm."""
    wrong = sum(bool(judged(tmp_path, a_record(np.random.default_rng(seed), [0.5] * 80))) for seed in range(50))
    assert wrong <= 50 * 80 / LEVEL


def test_answers_that_failed_say_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    whole = a_record(rng, [0.5] * 40 + [0.95] * 40)
    with_failures = {
        prompt: {time: [*answers, [time, None], [time, None]] for time, answers in batches.items()}
        for prompt, batches in whole.items()
    }
    assert judged(tmp_path, with_failures) == judged(tmp_path, whole) != []


def test_batches_that_failed_as_a_whole_are_no_change(tmp_path: Path) -> None:
    """An outage: were its batches taken for quite usual ones, those after it would be strange."""
    record = a_record(np.random.default_rng(9), [0.5] * 100)
    for batches in record.values():
        for n in range(10, 60):
            batches[f"{day(n)}T03:00:00"] = [[day(n), None]]
    assert judged(tmp_path, record) == []


def test_batches_of_fewer_answers_are_no_change(tmp_path: Path) -> None:
    """Of ten answers seven begin to fail: three are further from any distribution than ten, by chance alone."""
    wrong = 0
    for seed in range(30):
        record = a_record(np.random.default_rng(seed), [0.5] * 80)
        for batches in record.values():
            for n in range(40, 80):
                batches[f"{day(n)}T03:00:00"][3:] = [[day(n), None]] * 7
        wrong += bool(judged(tmp_path, record))
    assert wrong <= 30 * 80 / LEVEL


def test_batches_that_are_numbered_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    record = a_record(np.random.default_rng(10), [0.5] * 40 + [0.95] * 100)
    numbered = {prompt: dict(zip(map(str, range(1, 141)), b.values(), strict=True)) for prompt, b in record.items()}
    (began,) = judged(tmp_path, numbered)
    assert abs(int(began) - 41) <= 1


def test_a_short_record_has_no_change(tmp_path: Path) -> None:
    assert judged(tmp_path, {}) == []
    assert judged(tmp_path, a_record(np.random.default_rng(0), [0.5] * BASELINE_NIGHTS)) == []


def test_a_record_is_shown_as_every_history_is(tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    file = tmp_path / "monitor.json"
    file.write_text(json.dumps(a_record(np.random.default_rng(3), [0.5] * 40 + [0.95] * 40)))
    assert "monitor.json: changed on 2026-02-" in weighbridge_cli("history", "--one-token", file).said
    document = json.loads(weighbridge_cli("history", "--one-token", file, "--json").out)
    assert (document["schema"], document["runs"]) == ("weighbridge/history/1", [])
    assert [change["endpoint"] for change in document["changes"]] == ["monitor.json"]


MALFORMED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is not JSON"),
    "nothing": ("", "is not JSON"),
    "not UTF-8": ("\udcff", "is not JSON"),
    "nested too deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "the whole"),
    "a prompt without batches": ('{"Say": []}', "prompt 'Say'"),
    "batches without a list": ('{"Say": {"t1": {}}}', "prompt 'Say', batch 't1'"),
    "an answer that is a word": ('{"Say": {"t1": ["yes"]}}', "prompt 'Say', batch 't1'"),
    "an answer of three": ('{"Say": {"t1": [["t", "a", "b"]]}}', "prompt 'Say', batch 't1'"),
    "a token that is a number": ('{"Say": {"t1": [["t", 1]]}}', "prompt 'Say', batch 't1'"),
    "a second prompt that is wrong": ('{"Say": {"t1": [["t", "a"]]}, "Tell": 1}', "prompt 'Tell'"),
    "a time that is half a character": ('{"Say": {"\\ud800": [["t", "a"]]}}', "prompt 'Say', batch '\\ud800'"),
    "a time that moves the cursor": ('{"Say": {"\\u001b[2J": [["t", "a"]]}}', "prompt 'Say', batch '\\x1b[2J'"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_record_is_one_line_that_names_the_place(
    kind: str, tmp_path: Path, weighbridge_cli: Weighbridge
) -> None:
    text, place = MALFORMED[kind]
    file = tmp_path / "monitor.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_one_line(weighbridge_cli("history", "--one-token", file), "monitor.json", place)


def test_a_record_that_is_not_there_is_one_line(tmp_path: Path, weighbridge_cli: Weighbridge) -> None:
    assert_one_line(weighbridge_cli("history", "--one-token", tmp_path / "none.json"), "none.json")
    assert_one_line(weighbridge_cli("history", "--one-token", tmp_path), "cannot be read")


def test_a_record_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighbridge_cli: Weighbridge
) -> None:
    monkeypatch.setattr("weighbridge.history.one_token.MOST_BYTES", 2**20)
    (tmp_path / "monitor.json").write_bytes(b" " * (2**20 + 1))
    assert_one_line(weighbridge_cli("history", "--one-token", tmp_path / "monitor.json"), "too large", "1 MiB")


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
answers = st.lists(st.tuples(any_json, st.none() | st.text(max_size=3)).map(list), max_size=4)
nearly_records = st.dictionaries(
    st.text(), st.dictionaries(st.text(max_size=4), answers | any_json, max_size=15) | any_json, max_size=3
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=any_json | nearly_records)
def test_any_json_is_a_record_or_one_line(record: Any, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record))
    said = file.name
    try:
        read_one_token_history(file)
    except ConfigurationError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert "record.json" in said


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    change=st.dictionaries(
        st.sampled_from(["night", "created_at", "verdict", "probes", "errors", "axes", "cost_usd", "x"]), any_json
    )
)
def test_any_row_is_entered_or_named(change: dict[str, Any], tmp_path: Path) -> None:
    """A folder may come from a stranger: nothing in it keeps the others from being entered."""
    root = tmp_path / "strangers"
    if not root.exists():
        for name in ("bad", "good"):
            write_row(a_run(root / name), make_row(root / name))
        shutil.copy(root / "good" / ROW, tmp_path / ROW)
    for suffix in ("", "-wal", "-shm"):
        (root / f"{INDEX}{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / ROW, root / "bad" / ROW)
    edit(root / "bad" / ROW, **change)
    told: list[str] = []
    folders = [run["folder"] for run in entered(root, tell=told.append)]
    assert folders.count("good") == 1
    assert folders.count("bad") + len(told) == 1


def test_a_plan_is_written_as_it_is_read(tmp_path: Path) -> None:
    """What the helpers above write is what an audit writes."""
    run = a_run(tmp_path / "run")
    assert plan_bytes(RunFolder(run).plan()) == (run / "plan.json").read_bytes()


# -- between pools ----------------------------------------------------------------------------------------------


def _on_pool(endpoint: str, night: str, pool: str | None, verdict: str, *, sealed: bool = False) -> Run:
    cause = "precision" if verdict == "differs" else None
    return {"endpoint": endpoint, "night": night, "verdict": verdict, "cause": cause, "pool": pool, "sealed": sealed}


def test_who_is_consistent_on_one_pool_and_differs_on_another_is_named() -> None:
    runs = [
        _on_pool("evader", "2026-11-01", "a" * 64, "consistent"),
        _on_pool("evader", "2026-11-03", "b" * 64, "differs", sealed=True),
        _on_pool("evader", "2026-11-03", "a" * 64, "consistent"),
        _on_pool("honest", "2026-11-03", "a" * 64, "consistent"),
        _on_pool("honest", "2026-11-03", "b" * 64, "consistent", sealed=True),
        _on_pool("altered", "2026-11-03", "a" * 64, "differs"),
        _on_pool("altered", "2026-11-03", "b" * 64, "differs", sealed=True),
        _on_pool("changed", "2026-11-01", "a" * 64, "consistent"),
        _on_pool("changed", "2026-11-20", "b" * 64, "differs"),
        _on_pool("same pool", "2026-11-01", "a" * 64, "consistent"),
        _on_pool("same pool", "2026-11-02", "a" * 64, "differs"),
        _on_pool("no pool", "2026-11-02", None, "differs"),
        _on_pool("unsure", "2026-11-02", "a" * 64, "inconclusive"),
        _on_pool("unsure", "2026-11-02", "b" * 64, "differs"),
    ]
    (found,) = pools_that_disagree(runs)
    assert (found.endpoint, found.consistent_night, found.differs_night) == ("evader", "2026-11-03", "2026-11-03")
    assert found.differs_sealed
    assert "recognises" in found.sentence
    assert "changed" not in found.sentence


def test_pools_that_disagree_on_different_nights_leave_a_change_open() -> None:
    runs = [_on_pool("e", "2026-11-01", "a" * 64, "consistent"), _on_pool("e", "2026-11-04", "b" * 64, "differs")]
    (found,) = pools_that_disagree(runs)
    assert "or it changed in between" in found.sentence
