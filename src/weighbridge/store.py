"""The run folder: one file for each stage, written so that a crash at any moment loses nothing that came back.

=====================  ==================================================================================
``plan.json``          what was decided before the first request
``owner``              a mark by which this user's Weighbridge knows its own runs
``exchanges.jsonl``    every attempt: a line before it is sent, a line with what came back, each synced to disk
``observations.jsonl`` flat facts read from the exchanges
``findings.json``      what each check concludes
``verdict.json``       what the findings say together
``report.*``           the same for people and machines
=====================  ==================================================================================
"""

import hmac
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import filelock

from weighbridge.canonical import canonical_bytes, rounded, sha256_hex, write_atomically
from weighbridge.errors import ConfigurationError, RunFolderError
from weighbridge.keys import owner_mark
from weighbridge.records import Exchange, Findings, Observation, Plan, Received, Record, Sent, Verdict, checked

_BLOCK_BYTES = 2**20


class Stopped(Record):
    """Why no more requests were sent."""

    event: Literal["stopped"] = "stopped"
    because: str


class RunFolder:
    """The files of one audit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: Plan) -> "RunFolder":
        """Make a new run folder and write its plan.

        Raises
        ------
        RunFolderError
            If the folder already holds a run.
        """
        if (path / "plan.json").exists():
            raise RunFolderError(
                f"{path} already holds a run", f"Choose another --out, or go on with: weighbridge resume {path}"
            )
        document = plan_bytes(plan)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be made ({error.strerror})", "Choose another --out") from None
        write_atomically(path / "owner", owner_mark(document).encode())
        write_atomically(path / "plan.json", document)
        return cls(path)

    def plan(self) -> Plan:
        """Read the plan.

        Raises
        ------
        RunFolderError
            If there is none or it cannot be read.
        """
        file = self.path / "plan.json"
        if not file.is_file():
            raise RunFolderError(f"{self.path} holds no plan.json", "Name a folder that `weighbridge audit` has made")
        try:
            return checked(Plan, json.loads(file.read_bytes()), str(file))
        except (ValueError, RecursionError):
            raise RunFolderError(f"{file} is not JSON", "Restore it; without its plan a run cannot be used") from None
        except ConfigurationError as error:
            raise RunFolderError(error.what, "Judge the run with the version of Weighbridge that made it") from None

    def is_own(self) -> bool:
        """Whether this user started the run and its plan is as it was."""
        try:
            mark, document = (self.path / "owner").read_text("ascii"), (self.path / "plan.json").read_bytes()
        except (OSError, UnicodeDecodeError):
            return False
        return hmac.compare_digest(mark.encode(), owner_mark(document).encode())

    def exchanges(self) -> tuple[list[Exchange], Stopped | None]:
        """Every attempt that was sent, in order, and why the collection stopped, if it did.

        A line that a crash cut short is left out; an attempt without an answer came back as ``interrupted``.

        Raises
        ------
        RunFolderError
            If a whole line cannot be read.
        """
        file = self.path / "exchanges.jsonl"
        if not file.exists():
            return [], None
        sent: dict[tuple[str, int], Sent] = {}
        received: dict[tuple[str, int], Received] = {}
        stopped: Stopped | None = None
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                where = f"{file}, line {number}"
                try:
                    value = json.loads(line)
                    event = value.get("event")
                    if event == "sent":
                        one = checked(Sent, value, where)
                        sent[one.request_id, one.attempt] = one
                        stopped = None
                    elif event == "received":
                        other = checked(Received, value, where)
                        received[other.request_id, other.attempt] = other
                    else:
                        stopped = checked(Stopped, value, where)
                except (ValueError, AttributeError, ConfigurationError, RecursionError):
                    raise RunFolderError(
                        f"{where} cannot be read", "Restore the file; a changed run cannot be judged"
                    ) from None
        return [Exchange(sent=s, received=received.get(key) or _interrupted(s)) for key, s in sent.items()], stopped

    def write_observations(self, observations: Iterable[Observation]) -> str:
        """Write observations.jsonl, canonical bytes; returns its SHA-256."""
        lines = [canonical_bytes(rounded(o.model_dump(mode="json", by_alias=True))) for o in observations]
        data = b"".join(line + b"\n" for line in lines)
        write_atomically(self.path / "observations.jsonl", data)
        return sha256_hex(data)

    def write_judgement(self, findings: Findings, verdict: Verdict) -> None:
        """Write findings.json and verdict.json: canonical bytes, numbers to six significant digits."""
        for name, record in (("findings.json", findings), ("verdict.json", verdict)):
            write_atomically(
                self.path / name, canonical_bytes(rounded(record.model_dump(mode="json", by_alias=True))) + b"\n"
            )

    def log(self) -> "ExchangeLog":
        """Open the log of exchanges for appending."""
        return ExchangeLog(self.path / "exchanges.jsonl")


class ExchangeLog:
    """Appends to exchanges.jsonl; each line is on the disk before anything else happens. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(str(path) + ".lock", timeout=0)
        self._file: Any = None

    def __enter__(self) -> Self:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise RunFolderError(
                f"{self._path.parent} is being collected by another process", "Wait for it to end"
            ) from None
        try:
            self._cut_torn_line()
            self._file = self._path.open("ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def append(self, record: Sent | Received | Stopped) -> None:
        """Write one line and wait until it is on the disk."""
        self._file.write(
            json.dumps(record.model_dump(mode="json", exclude_none=True), ensure_ascii=False).encode() + b"\n"
        )
        self._file.flush()
        os.fsync(self._file.fileno())

    def _cut_torn_line(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            # Look for the last newline block by block: a line may be as large as an answer.
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)


def plan_bytes(plan: Plan) -> bytes:
    """The bytes of plan.json: readable, and always the same for the same plan."""
    return (
        json.dumps(plan.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    ).encode()


def _interrupted(sent: Sent) -> Received:
    return Received(
        request_id=sent.request_id, attempt=sent.attempt, status=None, headers={}, failure="interrupted",
        failure_detail="the audit was killed while this attempt was under way", latency_s=0.0,
    )  # fmt: skip
