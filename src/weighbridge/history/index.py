"""The index over run folders: one SQLite file that can be made again from them at any time."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from weighbridge.errors import RunFolderError
from weighbridge.history.row import ROW, Row, make_row, read_row

Run = dict[str, Any]
INDEX = "history.sqlite"
# Each is applied once, in order; what has been published is never changed, only added to.
MIGRATIONS = (
    """
    CREATE TABLE runs (
        folder TEXT PRIMARY KEY, run_id TEXT NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL, night TEXT NOT NULL,
        created_at TEXT NOT NULL, weighbridge_version TEXT NOT NULL, policy TEXT NOT NULL, reference TEXT, pool TEXT,
        commitment TEXT NOT NULL, sealed INTEGER NOT NULL, probes TEXT NOT NULL, verdict TEXT NOT NULL, cause TEXT,
        exact_variant TEXT, axes TEXT NOT NULL, log10_e_value REAL, noise_nats REAL, noise_low_nats REAL, noise_high_nats REAL,
        stopped_because TEXT NOT NULL, answers_used INTEGER NOT NULL, requests_sent INTEGER NOT NULL, errors INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost_usd REAL, spent_usd REAL, latency_s REAL, first_token_s REAL,
        tokens_per_s REAL
    );
    CREATE INDEX runs_of_endpoint ON runs (endpoint, created_at);
    CREATE INDEX runs_of_night ON runs (night);
    """,
)
_AS_JSON = ("probes", "axes")
_NOT_ENTERED = 2000  # rows between two commits while an index is made
_SKIPPED = frozenset({"controls"})  # their runs are part of another one


@contextmanager
def opened(root: Path, say: Callable[[str], None]) -> Iterator[sqlite3.Connection]:
    """Open a folder's index, made or brought up to date where it has to be.

    Parameters
    ----------
    root : pathlib.Path
        Under which run folders lie.
    say : callable
        Told of what was mended or left out.

    Raises
    ------
    RunFolderError
        If the index was made by a later version, or cannot be written.
    """
    path = root / INDEX
    try:
        connection = _connect(path)
    except sqlite3.DatabaseError:
        broken = path.with_suffix(".broken")
        for suffix in ("-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        path.replace(broken)
        say(f"{path} cannot be read; it was put aside as {broken.name} and is made again from the run folders")
        connection = _connect(path)
    with closing(connection):
        yield connection


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
    except (OSError, sqlite3.OperationalError) as error:
        raise RunFolderError(f"{path} cannot be opened ({error})", "Check the folder and the disk") from None
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise RunFolderError(
                f"{path} was made by a later version of Weighbridge",
                "Use that version, or remove the file: it is made again",
            )
        for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
            connection.executescript(f"BEGIN; {migration} PRAGMA user_version = {number}; COMMIT;")
        connection.execute("SELECT count(*) FROM runs").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        raise RunFolderError(
            f"{path} cannot be used ({error})", "Check the disk, or remove the file: it is made again"
        ) from None
    except BaseException:
        connection.close()
        raise
    return connection


def enter(connection: sqlite3.Connection, root: Path, folder: Path, row: Row) -> None:
    """Enter one run, or enter it anew."""
    values = row.model_dump(mode="json", exclude={"schema_"})
    values |= {name: json.dumps(values[name]) for name in _AS_JSON}
    values["folder"] = folder.relative_to(root).as_posix()
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT OR REPLACE INTO runs ({names}) VALUES ({places})", values)  # noqa: S608 - names of our own record


def refresh(connection: sqlite3.Connection, root: Path, say: Callable[[str], None]) -> int:
    """Enter every run that is not in the index, and take out those that are gone; returns how many were entered.

    A run that cannot be read is named and left out; the others are entered all the same.
    """
    known = {folder for (folder,) in connection.execute("SELECT folder FROM runs")}
    found: set[str] = set()
    entered = 0
    for folder in _runs(root, known, found):
        try:
            row = read_row(folder / ROW) if (folder / ROW).exists() else make_row(folder)
        except RunFolderError as error:
            say(f"left out: {error.what}")
            continue
        enter(connection, root, folder, row)
        entered += 1
        if entered % _NOT_ENTERED == 0:
            connection.commit()
            say(f"{entered} runs entered")
    connection.executemany("DELETE FROM runs WHERE folder = ?", [(folder,) for folder in known - found])
    connection.commit()
    return entered


def _runs(root: Path, known: set[str], found: set[str]) -> Iterator[Path]:
    """Run folders that are not known; those that are, are noted and not looked into."""
    waiting = [(str(root), "")]
    while waiting:
        path, name = waiting.pop()
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            continue
        if any(entry.name == "plan.json" for entry in entries):
            if any(entry.name == "verdict.json" for entry in entries):
                yield Path(path)
            continue
        for entry in entries:
            below = f"{name}/{entry.name}" if name else entry.name
            if below in known:
                found.add(below)
            elif entry.name not in _SKIPPED and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, below))


def runs(
    connection: sqlite3.Connection, *, endpoint: str | None = None, night: str | None = None, before: str | None = None
) -> list[Run]:
    """The runs of the history, oldest first: columns by name, lists and tables as JSON text.

    Parameters
    ----------
    connection : sqlite3.Connection
    endpoint, night : str, optional
        Only of this endpoint; only of this night.
    before : str, optional
        Only of nights before this one.
    """
    conditions, values = [], []
    for condition, value in (("endpoint = ?", endpoint), ("night = ?", night), ("night < ?", before)):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    cursor = connection.execute(f"SELECT * FROM runs {where} ORDER BY created_at, folder", values)  # noqa: S608 - values are bound
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
