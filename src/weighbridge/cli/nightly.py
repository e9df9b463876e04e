"""weighbridge nightly and weighbridge merge."""

import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from weighbridge.canonical import rounded
from weighbridge.cli.common import json_option, judge_and_report, print_json, talk
from weighbridge.cli.publish import enter_draws, key_option
from weighbridge.errors import RunFolderError
from weighbridge.fleet import Fleet, night_of
from weighbridge.history.index import opened, refresh, runs
from weighbridge.nightly.collection import Locked, collect_all, commit
from weighbridge.nightly.judgement import FleetNight, FleetRow, judge_runs, judge_together, write_night
from weighbridge.nightly.merge import merge_shards
from weighbridge.nightly.schedule import Shard, Task, collected, schedule
from weighbridge.nightly.webhook import address_of, tell
from weighbridge.records import read_toml

_SYMBOL = {"consistent": "✓", "inconclusive": "?", "differs": "✗", "differs_replicated": "✗✗"}


@click.command("nightly")
@click.argument("fleet_file", metavar="FLEET.toml", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The folder of the fleet's nights. Default: reports/ and the file's name.",
)
@click.option(
    "--shard",
    default="1/1",
    metavar="I/N",
    show_default=True,
    help="Only the I-th of N parts of the fleet; `merge` puts them together.",
)
@click.option(
    "--site",
    type=click.Path(path_type=Path),
    help="Enter tonight's draws into the log of this site before the first request.",
)
@key_option
@click.option("--dry-run", is_flag=True, help="Say what is due and what it may cost at most; send nothing.")
@json_option
def nightly_command(
    fleet_file: Path, out: Path | None, shard: str, site: Path | None, key_file: Path | None, dry_run: bool, as_json: bool
) -> int:  # fmt: skip
    """Audit every endpoint of a fleet that is due, and judge them together.

    Run it as often as you like: what is done is done, what was interrupted goes on, and nothing is asked twice. A night is from noon
    to noon, UTC.
    """
    fleet = read_toml(Fleet, fleet_file)
    part = Shard.parse(shard)
    webhook = address_of(fleet.webhook_url_env)
    root = out or Path("reports") / fleet_file.stem
    if part.count > 1 and out is None:
        root = root.with_name(f"{root.name}-{part.index}-of-{part.count}")
    now = datetime.now(UTC)
    try:
        with Locked(root), opened(root, _say) as connection:
            refresh(connection, root, _say)
            tasks = schedule(fleet, root, runs(connection), now, part)
            if dry_run:
                return _show_due(fleet, tasks, as_json)
            night = _night(connection, fleet, root, tasks, now, site, key_file)
            problem = tell(webhook, root, night) if webhook is not None else None
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it stopped")
        return 130
    except OSError as error:
        raise RunFolderError(
            f"{root} cannot be written ({error.strerror or error})",
            "Check the folder and the disk; what was collected is kept",
        ) from None
    if problem is not None:
        _say(f"{problem}; it will be told the next time")
    _show(night, root, as_json)
    return _exit_code(night)


@click.command("merge")
@click.argument("fleet_file", metavar="FLEET.toml", type=click.Path(path_type=Path))
@click.argument("shards", metavar="SHARD...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder of the whole fleet's nights.")
@json_option
def merge_command(fleet_file: Path, shards: tuple[Path, ...], out: Path, as_json: bool) -> int:
    """Put the shards of a fleet's nights together, and judge each night as one."""
    fleet = read_toml(Fleet, fleet_file)
    try:
        with Locked(out), opened(out, _say) as connection:
            nights = merge_shards(list(shards), out, _say)
            refresh(connection, out, _say)
            judged = []
            for name, said in nights.items():
                tasks = collected(fleet, out, name, said)
                problems = {task.endpoint.name: task.why or "" for task in tasks if task.state == "failed"}
                problems |= judge_runs(connection, out, tasks, judge_and_report, _say)
                judged.append(judge_together(connection, fleet, name, tasks, problems))
                write_night(out / name, judged[-1])
    except OSError as error:
        raise RunFolderError(
            f"{out} cannot be written ({error.strerror or error})", "Check the folder and the disk"
        ) from None
    _show(judged[-1], out, as_json)
    return _exit_code(judged[-1])


def _night(
    connection: sqlite3.Connection, fleet: Fleet, root: Path, tasks: list[Task], now: datetime, site: Path | None, key_file: Path | None
) -> FleetNight:  # fmt: skip
    night = night_of(now).isoformat()
    due = [task for task in tasks if task.state in ("begin", "resume")]
    problems: dict[str, str] = {}
    if due:
        _say(f"night of {night}: {len(due)} endpoints are due")
        problems = commit(root, night, fleet.name, now, tasks)
        if site is not None:
            enter_draws(site, root / night, key_file)
        due = [task for task in due if task.endpoint.name not in problems]
        through = 0

        def told(task: Task, because: str) -> None:
            nonlocal through
            through += 1
            _say(f"{through} of {len(due)} {task.endpoint.name}: {because}")

        problems |= collect_all(due, fleet.concurrency, fleet.jitter_s, told)
    whole = [task for task in tasks if task.endpoint.name not in problems]
    problems |= judge_runs(connection, root, whole, judge_and_report, _say)
    judged = judge_together(connection, fleet, night, tasks, problems)
    write_night(root / night, judged)
    return judged


def _show_due(fleet: Fleet, tasks: list[Task], as_json: bool) -> int:
    rows = [
        {
            "endpoint": task.endpoint.name, "state": task.state, "why": task.why,
            "max_requests": task.plan.endpoint.limits.max_requests if task.plan is not None else None,
            "max_cost_usd": task.plan.endpoint.limits.max_cost_usd if task.plan is not None else None,
        }
        for task in tasks
    ]  # fmt: skip
    if as_json:
        print_json({"schema": "weighbridge/due/1", "fleet": fleet.name, "endpoints": rounded(rows)})
        return 0
    table = Table(box=None, header_style="bold")
    for heading in ("endpoint", "tonight", "requests at most", "USD at most"):
        table.add_column(heading)
    for row in rows:
        cost = "" if row["max_cost_usd"] is None else f"{row['max_cost_usd']:.4f}"
        why = f"{row['state']}: {row['why']}" if row["why"] else str(row["state"])
        table.add_row(escape(str(row["endpoint"])), escape(why), str(row["max_requests"] or ""), cost)
    Console().print(table)
    return 0


def _show(night: FleetNight, root: Path, as_json: bool) -> None:
    if as_json:
        print_json({**rounded(night.model_dump(mode="json", by_alias=True)), "folder": str(root)})
        return
    table = Table(
        box=None, header_style="bold", title=f"{escape(night.fleet)}, night of {night.night}", title_justify="left"
    )
    for heading in ("", "endpoint", "verdict", "cause", "before", "changed", "requests", "USD"):
        table.add_column(heading, no_wrap=heading == "verdict")
    for row in night.endpoints:
        words = row.state if row.verdict is None else row.verdict.replace("_", " ")
        table.add_row(
            _SYMBOL.get(str(row.verdict), "·"), escape(row.endpoint), escape(words), row.cause or "",
            (row.before or "").replace("_", " "), _changed(row), str(row.requests_sent or ""),
            "" if row.cost_usd is None else f"{row.cost_usd:.4f}",
        )  # fmt: skip
    Console().print(table)
    for row in night.endpoints:
        if row.why is not None:
            Console().print(f"{row.endpoint}: {row.why}", markup=False, highlight=False, soft_wrap=True)
    Console().print(f"everything: {root / night.night}", markup=False, highlight=False, soft_wrap=True)


def _changed(row: FleetRow) -> str:
    return row.change.began if row.change is not None else ""


def _exit_code(night: FleetNight) -> int:
    """0: all that was judged is consistent; 1: something differs; 3: something is not verified."""
    words = [row.verdict for row in night.endpoints]
    if any(word is not None and word.startswith("differs") for word in words):
        return 1
    return 0 if all(word == "consistent" for word in words) else 3


def _say(text: str) -> None:
    talk.print(text, markup=False, highlight=False, soft_wrap=True)
