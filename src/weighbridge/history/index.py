"""The index over run folders: one SQLite file that can be made again from them at any time."""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from weighbridge.errors import RunFolderError
from weighbridge.history.row import ROW, Row, make_row, read_row

Run = dict[str, Any]
INDEX = "history.sqlite"
TIMEOUT_S = 60  # for which another command that writes is waited for
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
    """
    ALTER TABLE runs ADD COLUMN judged_ns INTEGER;
    CREATE INDEX runs_by_time ON runs (created_at, folder);
    """,
)
_AS_JSON = ("probes", "axes")
_VERDICT = "verdict.json"
_ROWS_A_COMMIT = 2000  # while an index is made
_SOON_NS = 10**9  # a copy of a run folder may write its files in any order


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
        If the index was made by a later version, cannot be written, or turns out to be damaged while it is read.
    """
    path = root / INDEX
    try:
        connection = _connect(path)
    except sqlite3.DatabaseError:
        say(f"{path} cannot be read; it was put aside as {_put_aside(path)} and is made again from the run folders")
        connection = _connect(path)
    try:
        with closing(connection):
            yield connection
    except sqlite3.OperationalError as error:
        raise _unusable(path, error) from None
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise RunFolderError(
            f"{path} is damaged ({error}); it was put aside as {_put_aside(path)}",
            "Run the same command again: it is made again from the run folders",
        ) from None


def _put_aside(path: Path) -> str:
    broken = path.with_suffix(".broken")
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.replace(broken)
    return broken.name


def _unusable(path: Path, error: sqlite3.Error) -> RunFolderError:
    return RunFolderError(f"{path} cannot be used ({error})", "Check the disk, or remove the file: it is made again")


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=TIMEOUT_S)
    except (OSError, sqlite3.OperationalError) as error:
        raise RunFolderError(f"{path} cannot be opened ({error})", "Check the folder and the disk") from None
    try:
        _write_ahead(connection)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise RunFolderError(
                f"{path} was made by a later version of Weighbridge",
                "Use that version, or remove the file: it is made again",
            )
        if version < len(MIGRATIONS):
            _migrate(connection)
        connection.execute("SELECT count(*) FROM runs").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        raise _unusable(path, error) from None
    except BaseException:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Turn on the write-ahead log; SQLite waits for nobody there, whatever the connection's timeout."""
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def _migrate(connection: sqlite3.Connection) -> None:
    """Apply what is missing, all or nothing; whoever opens the index meanwhile waits for it."""
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for migration in MIGRATIONS[version:]:
        for statement in migration.split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {max(version, len(MIGRATIONS))}")
    connection.commit()


def enter(connection: sqlite3.Connection, root: Path, folder: Path, row: Row) -> None:
    """Enter one run, or enter it anew."""
    values = row.model_dump(mode="json", exclude={"schema_"})
    values |= {name: json.dumps(values[name]) for name in _AS_JSON}
    values |= {"folder": folder.relative_to(root).as_posix(), "judged_ns": _judged_ns(folder)}
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT OR REPLACE INTO runs ({names}) VALUES ({places})", values)  # noqa: S608 - names of our own record


def refresh(connection: sqlite3.Connection, root: Path, say: Callable[[str], None]) -> int:
    """Enter every run that is not in the index or was judged again, and take out those that are gone; returns how many were entered.

    A run that cannot be read is named and left out; the others are entered all the same.
    """
    known: dict[str, int | None] = dict(connection.execute("SELECT folder, judged_ns FROM runs"))
    found: set[str] = set()
    entered = 0
    for folder in _runs(root, known, found):
        try:
            enter(connection, root, folder, current_row(folder))
        except RunFolderError as error:
            say(f"left out: {error}")
            continue
        except (OverflowError, UnicodeEncodeError):
            say(f"left out: {folder} holds a number or a name that no index takes")
            continue
        found.add(folder.relative_to(root).as_posix())
        entered += 1
        if entered % _ROWS_A_COMMIT == 0:
            connection.commit()
            say(f"{entered} runs entered")
    connection.executemany("DELETE FROM runs WHERE folder = ?", [(folder,) for folder in known.keys() - found])
    connection.commit()
    return entered


def current_row(folder: Path) -> Row:
    """A run's row: its own one, made again where the run was judged again since."""
    path = folder / ROW
    if not path.exists():
        return make_row(folder)
    row = read_row(path)
    judged_ns = _judged_ns(folder)
    is_old = judged_ns is not None and judged_ns > path.stat().st_mtime_ns + _SOON_NS
    return make_row(folder, sealed=row.sealed) if is_old else row


def _judged_ns(folder: Path | str) -> int | None:
    try:
        return os.stat(f"{folder}/{_VERDICT}").st_mtime_ns  # noqa: PTH116 - of every run, each time
    except OSError:
        return None


def _runs(root: Path, known: dict[str, int | None], found: set[str]) -> Iterator[Path]:
    """Run folders that are not known as they are; those that are, are noted and not looked into."""
    waiting = [(str(root), "")]
    while waiting:
        path, name = waiting.pop()
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            continue
        if any(entry.name == "plan.json" for entry in entries):
            # Runs below it, such as its controls, are part of it.
            if any(entry.name == _VERDICT for entry in entries):
                yield Path(path)
            continue
        for entry in entries:
            below = f"{name}/{entry.name}" if name else entry.name
            judged_ns = known.get(below)
            if judged_ns is not None and judged_ns == _judged_ns(entry.path):
                found.add(below)
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, below))


def endpoints(connection: sqlite3.Connection) -> list[str]:
    """The names of all endpoints of the history, in order."""
    return [name for (name,) in connection.execute("SELECT DISTINCT endpoint FROM runs ORDER BY endpoint")]


def runs(
    connection: sqlite3.Connection, *, endpoint: str | None = None, night: str | None = None, before: str | None = None,
    last: int | None = None, columns: tuple[str, ...] = ("*",),
) -> list[Run]:  # fmt: skip
    """The runs of the history, oldest first: columns by name, lists and tables as JSON text.

    Parameters
    ----------
    connection : sqlite3.Connection
    endpoint, night : str, optional
        Only of this endpoint; only of this night.
    before : str, optional
        Only of nights before this one.
    last : int, optional
        Only so many, the latest ones.
    columns : tuple of str, optional
        Only these; a year of a fleet is read several times as fast.
    """
    conditions, values = [], []
    for condition, value in (("endpoint = ?", endpoint), ("night = ?", night), ("night < ?", before)):
        if value is not None:
            conditions.append(condition)
            values.append(value)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    order = "ORDER BY created_at, folder"
    if last is not None:
        order = f"ORDER BY created_at DESC, folder DESC LIMIT {last:d}"
    cursor = connection.execute(f"SELECT {', '.join(columns)} FROM runs {where} {order}", values)  # noqa: S608 - values are bound
    names = [column[0] for column in cursor.description]
    found = [dict(zip(names, row, strict=True)) for row in cursor]
    return found if last is None else found[::-1]
