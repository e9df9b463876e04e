"""The log of a site: append-only, each line bound to the one before it by its hash, the whole bound by a signed head.

Nothing in it is ever changed. A report that turns out wrong is superseded by a later entry and stays where it is. Whoever keeps a copy
of an earlier head sees whether what they saw then still stands.
"""

import json
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from weighbridge.attest import SignatureState, TrustedKey, sign_statement, statement_bytes, unsigned, verify_statement
from weighbridge.canonical import canonical_bytes, rounded, sha256_hex, write_atomically
from weighbridge.errors import EvidenceError, SignatureError
from weighbridge.publish.entries import ENTRY, FIRST, Entry, LogEntry, ReportEntry, StatementEntry

LOG = "log.jsonl"
HEAD = "log.head.json"
HEAD_TYPE = "urn:weighbridge:log-head:1"
MOST_BYTES = 2 * 2**30
MOST_LINE_BYTES = 2 * 2**20
Added = TypeVar("Added", bound=LogEntry)
_RESTORE = "Restore the log from a copy; an append-only log is never edited"


@dataclass(frozen=True)
class Log:
    """What a site has said so far. ``head`` is the hash of its last line, ``sha256`` that of all of it."""

    entries: tuple[Entry, ...]
    head: str
    sha256: str
    size: int

    def reports(self) -> list[ReportEntry]:
        """Every report, oldest first, superseded ones included."""
        return [entry for entry in self.entries if isinstance(entry, ReportEntry)]

    def statements(self) -> list[StatementEntry]:
        """Every statement about a report, oldest first."""
        return [entry for entry in self.entries if isinstance(entry, StatementEntry)]


def read_log(path: Path) -> Log:
    """Read a log and check every link of its chain. A last line that a crash cut short is left out.

    Raises
    ------
    EvidenceError
        Naming the first line that is not what the next one says it is, or is no entry.
    """
    try:
        if path.exists() and path.stat().st_size > MOST_BYTES:
            raise EvidenceError(f"{path} is larger than {MOST_BYTES // 2**30} GiB", _RESTORE)
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read ({error.strerror})", "Check the file") from None
    whole = data[: data.rfind(b"\n") + 1]
    entries: list[Entry] = []
    previous = FIRST
    for index, line in enumerate(whole.split(b"\n")[:-1]):
        entry = _entry(line, f"{path}, line {index + 1}")
        if entry.index != index or entry.previous != previous:
            raise EvidenceError(
                f"{path}: the chain is broken at line {index + 1}, or a line before it was changed", _RESTORE
            )
        _fits(entry, entries, f"{path}, line {index + 1}")
        entries.append(entry)
        previous = sha256_hex(line)
    return Log(tuple(entries), previous, sha256_hex(whole), len(whole))


def first_lines(path: Path, log: Log, count: int) -> Log:
    """The log as it was after so many lines."""
    if count == len(log.entries):
        return log
    lines = path.read_bytes().split(b"\n")[:count]
    data = b"".join(line + b"\n" for line in lines)
    return Log(log.entries[:count], sha256_hex(lines[-1]) if lines else FIRST, sha256_hex(data), len(data))


def _entry(line: bytes, where: str) -> Entry:
    if len(line) > MOST_LINE_BYTES:
        raise EvidenceError(f"{where}: too long", _RESTORE)
    try:
        return ENTRY.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the line"
        said = re.sub(r"[^ -~]", "?", f"{field}: {first['msg']}")[:200]  # a stranger's words, on the way to a terminal
        raise EvidenceError(f"{where}: no entry of a log ({said})", _RESTORE) from None


def _fits(entry: Entry, before: list[Entry], where: str) -> None:
    """What an entry points at stands before it and is a report of the same endpoint."""
    if isinstance(entry, ReportEntry):
        pointed = [entry.supersedes]
    elif isinstance(entry, StatementEntry):
        pointed = [entry.about, entry.report]
    else:
        return
    slugs = {entry.slug} if isinstance(entry, ReportEntry) else set()
    for index in pointed:
        if index is None:
            continue
        report = before[index] if 0 <= index < len(before) else None
        if not isinstance(report, ReportEntry):
            raise EvidenceError(f"{where}: it points at line {index + 1}, where no report stands", _RESTORE)
        slugs.add(report.slug)
    if len(slugs) > 1:
        raise EvidenceError(f"{where}: it points at a report of another endpoint", _RESTORE)


class Appending:
    """Entries that are added to the end of a log; nothing is on disk before `write`."""

    def __init__(self, log: Log) -> None:
        self.entries = list(log.entries)
        self._lines: list[bytes] = []
        self._head = log.head
        self._size = log.size

    def add(self, kind: type[Added], at: datetime, **fields: Any) -> Added:
        """Add one entry."""
        entry = kind(index=len(self.entries), previous=self._head, at=at, **fields)
        line = canonical_bytes(rounded(entry.model_dump(mode="json", by_alias=True)))
        entered = kind.model_validate_json(line)
        self.entries.append(cast(Entry, entered))
        self._lines.append(line)
        self._head = sha256_hex(line)
        return entered

    def write(self, path: Path) -> Log:
        """Append what was added, synced, and return the log as it then is; a line that a crash once cut short is taken off first."""
        if self._lines or (path.exists() and path.stat().st_size != self._size):
            self._append(path)
        data = path.read_bytes() if path.exists() else b""
        return Log(tuple(self.entries), self._head, sha256_hex(data), len(data))

    def _append(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "xb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(b"".join(line + b"\n" for line in self._lines))
            file.flush()
            os.fsync(file.fileno())
            self._size = file.tell()
        self._lines = []


def write_head(root: Path, log: Log, key_file: Path | None) -> None:
    """Sign how long the log is and what it holds; without a key the same is stated unsigned."""
    payload = statement_bytes({LOG: log.sha256}, HEAD_TYPE, {"entries": len(log.entries), "head": log.head})
    envelope = unsigned(payload) if key_file is None else sign_statement(payload, key_file)
    data = canonical_bytes(envelope) + b"\n"
    if not (root / HEAD).exists() or (root / HEAD).read_bytes() != data:
        write_atomically(root / HEAD, data)


def verify_head(root: Path, log: Log, trusted: list[TrustedKey]) -> SignatureState:
    """Check that a signed head is of this log.

    Raises
    ------
    EvidenceError
        If there is none, it is malformed or wrongly signed, or the log is another than the one that was signed.
    """
    path = root / HEAD
    try:
        data = path.read_bytes()[: MOST_LINE_BYTES + 1]
        state, statement = verify_statement(json.loads(data), trusted)
    except OSError as error:
        raise EvidenceError(f"{path} cannot be read ({error.strerror})", "Fetch it again") from None
    except (ValueError, RecursionError):
        raise EvidenceError(f"{path} is not JSON", "Fetch it again") from None
    except SignatureError as error:
        raise EvidenceError(f"{path}: {error.what}", error.next_step) from None
    if statement.predicate_type != HEAD_TYPE:
        raise EvidenceError(f"{path} is not about a log", "Fetch it again")
    if statement.digests != {LOG: log.sha256} or statement.predicate.get("entries") != len(log.entries):
        raise EvidenceError(
            f"{path.with_name(LOG)} is not the log that was signed: it was changed, cut or added to since", _RESTORE
        )
    return state
