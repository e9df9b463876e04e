"""Asking every endpoint that is due, all at once, from one process; what befalls one is no other's concern."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Literal

import filelock
from pydantic import Field

from weighbridge import __version__
from weighbridge.audit import Auditor, bundle_of
from weighbridge.canonical import canonical_bytes, write_atomically
from weighbridge.errors import ConfigurationError, RunFolderError, WeighbridgeError
from weighbridge.keys import key_for
from weighbridge.nightly.schedule import Task, bundle_at, said_of
from weighbridge.records import Record, read_json
from weighbridge.store import RunFolder

NIGHT = "night.json"
LOCK = "nightly.lock"
LOOKUPS_AT_ONCE = 64  # of names: a host that has none any more keeps its thread for long


class Committed(Record):
    """One endpoint's draw, by which the auditor is bound before the first request."""

    endpoint: str
    folder: str
    run_id: str
    commitment: str


class Night(Record):
    """What was decided of a night before it was asked."""

    schema_: Literal["weighbridge/night/1"] = Field(default="weighbridge/night/1", alias="schema")
    night: str
    fleet: str
    weighbridge_version: str
    began_at: datetime
    committed: list[Committed]

    model_config = Record.model_config | {"populate_by_name": True}


class Locked(contextlib.AbstractContextManager["Locked"]):
    """One nightly run at a time in one folder."""

    def __init__(self, root: Path) -> None:
        self._lock = filelock.FileLock(root / LOCK, timeout=0)
        self._root = root

    def __enter__(self) -> "Locked":
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise RunFolderError(
                f"another nightly run is at work in {self._root}", "Wait for it to end; it does whatever is due"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self._root} cannot be used ({error.strerror})", "Check the folder and the disk"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def commit(root: Path, night: str, fleet: str, now: datetime, tasks: list[Task]) -> dict[str, str]:
    """Write every draw's commitment down, those of an earlier run of the same night included, and make the run folders.

    A record that cannot be read is put aside and made again from the plans of the night's runs. Returns, by endpoint, what kept a folder
    from being made.
    """
    path = root / night / NIGHT
    try:
        before = read_json(Night, path) if path.exists() else None
    except ConfigurationError:
        path.replace(path.with_suffix(".broken"))
        before = None
    known = {one.endpoint: one for one in (before.committed if before is not None else [])}
    for task in tasks:
        if task.plan is not None:
            known[task.endpoint.name] = Committed(
                endpoint=task.endpoint.name, folder=task.folder.name, run_id=task.plan.run_id, commitment=task.plan.draw.commitment,
            )  # fmt: skip
    document = Night(
        night=night, fleet=fleet, weighbridge_version=__version__, began_at=before.began_at if before is not None else now,
        committed=sorted(known.values(), key=lambda one: one.endpoint),
    )  # fmt: skip
    write_atomically(path, canonical_bytes(document.model_dump(mode="json", by_alias=True)) + b"\n")
    problems: dict[str, str] = {}
    for task in tasks:
        if task.state == "begin" and task.plan is not None:
            try:
                RunFolder.create(task.folder, task.plan)
            except (WeighbridgeError, OSError) as error:
                problems[task.endpoint.name] = said_of(error, task.folder)
    return problems


def collect_all(
    tasks: list[Task], concurrency: int, jitter_s: float, tell: Callable[[Task, str], None]
) -> dict[str, str]:
    """Collect every run that is due; returns, by endpoint, what kept one from being collected.

    Parameters
    ----------
    tasks : list of Task
        Those to begin or to go on with.
    concurrency : int
        How many are asked at once.
    jitter_s : float
        Within which time they begin, spread evenly.
    tell : callable
        Told of each endpoint that is through, and why it stopped.
    """
    return asyncio.run(_collect_all(tasks, concurrency, jitter_s, tell))


async def _collect_all(
    tasks: list[Task], concurrency: int, jitter_s: float, tell: Callable[[Task, str], None]
) -> dict[str, str]:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUPS_AT_ONCE))
    places = asyncio.Semaphore(concurrency)
    problems: dict[str, str] = {}

    async def one(task: Task) -> None:
        assert task.plan is not None
        await asyncio.sleep(jitter_s * int(task.plan.draw.commitment[:8], 16) / 2**32)
        async with places:
            try:
                because = await _auditor(task).run()
            except Exception as error:  # noqa: BLE001 - whatever befalls one is no other's concern
                because = problems[task.endpoint.name] = said_of(error, task.folder)
            tell(task, problems.get(task.endpoint.name, because.replace("_", " ")))

    async with asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(one(task))
    return problems


def _auditor(task: Task) -> Auditor:
    plan = task.plan
    assert plan is not None
    bundle = bundle_of(plan, load=bundle_at)
    key = key_for(plan.endpoint.api_key_env, plan.endpoint.origin)
    return Auditor(RunFolder(task.folder), plan, plan.endpoint, bundle, key, lambda _: None)
