"""The morning after: every run judged by itself, all of them together, and what changed."""

import sqlite3
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import Field

from weighbridge.audit import bundle_of
from weighbridge.canonical import canonical_bytes, rounded, write_atomically
from weighbridge.fleet import Fleet
from weighbridge.history.changes import changes_of, run_length
from weighbridge.history.fleetwide import judge_night
from weighbridge.history.index import Run, enter, runs
from weighbridge.history.row import ROW, make_row, write_row
from weighbridge.nightly.schedule import State, Task, bundle_at, said_of
from weighbridge.records import Cause, Findings, Finite, Plan, Record, Verdict, VerdictWord
from weighbridge.reference.bundle import Bundle
from weighbridge.report.junit import clean
from weighbridge.store import RunFolder

FLEET_NIGHT = "fleet.json"
JudgeAndReport = Callable[[RunFolder, Bundle | None], tuple[Plan, Findings, Verdict]]


class FleetChange(Record):
    """The latest change of an endpoint: the night on which it was found, and the likeliest one on which it came."""

    against: Literal["reference", "own past"]
    found: str
    began: str
    log10_detector: Finite
    run_length_nights: Finite
    cause: str | None


class FleetRow(Record):
    """One endpoint on one night."""

    endpoint: str
    folder: str
    state: State
    why: str | None
    verdict: VerdictWord | None = None
    cause: Cause | None = None
    before: VerdictWord | None = Field(default=None, description="what was last said of it")
    judged_together: int | None = None
    log10_e_value: Finite | None = None
    sentence: str | None = None
    requests_sent: int | None = None
    cost_usd: Finite | None = None
    change: FleetChange | None = None


class FleetNight(Record):
    """A fleet's night: what is said of every endpoint, and why nothing is said of the others."""

    schema_: Literal["weighbridge/fleet-night/1"] = Field(default="weighbridge/fleet-night/1", alias="schema")
    fleet: str
    night: str
    false_discovery_rate: float
    endpoints: list[FleetRow]

    model_config = Record.model_config | {"populate_by_name": True}


def judge_runs(
    connection: sqlite3.Connection,
    root: Path,
    tasks: list[Task],
    judge_and_report: JudgeAndReport,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Judge what was collected and not judged yet, and enter it; returns, by endpoint, what kept one from being judged."""
    problems: dict[str, str] = {}
    for number, task in enumerate(tasks, start=1):
        if task.plan is None or (task.state in ("done", "waits") and (task.folder / ROW).exists()):
            continue
        try:
            bundle = bundle_of(task.plan, load=bundle_at)
            judge_and_report(RunFolder(task.folder), bundle)
            row = make_row(task.folder)
            write_row(task.folder, row)
            enter(connection, root, task.folder, row)
            connection.commit()
        except sqlite3.Error:
            raise  # the index is everybody's
        except Exception as error:  # noqa: BLE001 - whatever befalls one is no other's concern
            problems[task.endpoint.name] = said_of(error, task.folder)
        tell(f"judged {number} of {len(tasks)}: {task.endpoint.name}")
    return problems


def judge_together(
    connection: sqlite3.Connection, fleet: Fleet, night: str, tasks: list[Task], problems: dict[str, str]
) -> FleetNight:
    """Judge all runs of a night together, with what is known of the nights before it."""
    names = {endpoint.name for endpoint in fleet.endpoint}
    tonight = {run["endpoint"]: run for run in runs(connection, night=night) if run["endpoint"] in names}
    earlier = runs(connection, before=night)
    verdicts = {v.endpoint: v for v in judge_night([*tonight.values()], earlier, fleet.false_discovery_rate)}
    past: dict[str, list[Run]] = {}
    for one in earlier:
        past.setdefault(one["endpoint"], []).append(one)
    rows = []
    for task in tasks:
        name = task.endpoint.name
        verdict, run = verdicts.get(name), tonight.get(name)
        why = problems.get(name, task.why)
        state: State = "failed" if name in problems else "done" if run is not None else task.state
        if verdict is None or run is None:
            rows.append(FleetRow(endpoint=name, folder=task.folder.name, state=state, why=why))
            continue
        found = changes_of([*past.get(name, []), run], run_length(len(fleet.endpoint)))
        latest = {key: value for key, value in asdict(found[-1]).items() if key != "endpoint"} if found else None
        rows.append(
            FleetRow(
                endpoint=name, folder=task.folder.name, state=state, why=why, verdict=verdict.verdict, cause=verdict.cause,
                before=verdict.before, judged_together=verdict.judged_together, log10_e_value=verdict.log10_e_value,
                sentence=verdict.sentence, requests_sent=run["requests_sent"], cost_usd=run["cost_usd"],
                change=FleetChange.model_validate(latest) if latest is not None else None,
            )
        )  # fmt: skip
    return FleetNight(fleet=fleet.name, night=night, false_discovery_rate=fleet.false_discovery_rate, endpoints=rows)


def write_night(folder: Path, night: FleetNight) -> None:
    """Write fleet.json and junit.xml."""
    document = rounded(night.model_dump(mode="json", by_alias=True))
    write_atomically(folder / FLEET_NIGHT, canonical_bytes(document) + b"\n")
    suite = ElementTree.Element(
        "testsuite", name=clean(f"weighbridge {night.fleet}"), timestamp=f"{night.night}T12:00:00"
    )
    counts = {"failures": 0, "errors": 0, "skipped": 0}
    for row in night.endpoints:
        case = ElementTree.SubElement(suite, "testcase", classname="weighbridge", name=clean(row.endpoint), time="0")
        text = clean(row.sentence or row.why or row.state)
        if row.verdict is not None and row.verdict.startswith("differs"):
            counts["failures"] += 1
            ElementTree.SubElement(case, "failure", message=text, type=row.cause or "none_of_these")
        elif row.state == "failed":
            counts["errors"] += 1
            ElementTree.SubElement(case, "error", message=clean(row.why or "failed"))
        elif row.verdict != "consistent":
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=text)
    suite.set("tests", str(len(night.endpoints)))
    for name, count in counts.items():
        suite.set(name, str(count))
    write_atomically(folder / "junit.xml", ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))
