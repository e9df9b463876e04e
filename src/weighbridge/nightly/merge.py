"""Shards put together: what several runs of one fleet collected apart, as if one had."""

import shutil
from collections.abc import Callable
from pathlib import Path

from weighbridge.canonical import canonical_bytes, file_sha256, write_atomically
from weighbridge.errors import ConfigurationError, RunFolderError
from weighbridge.nightly.collection import NIGHT, Night
from weighbridge.nightly.judgement import FLEET_NIGHT, FleetNight
from weighbridge.nightly.schedule import DRAW_KEY, State
from weighbridge.records import read_json

# What is read of a run to know whether two are the same one.
_EVIDENCE = ("plan.json", "exchanges.jsonl")
Said = dict[str, tuple[State, str | None]]


def merge_shards(shards: list[Path], out: Path, say: Callable[[str], None]) -> dict[str, Said]:
    """Copy every run of every shard into one folder; returns the nights that were touched, and what the shards said of each endpoint.

    Parameters
    ----------
    shards : list of pathlib.Path
        Folders that `weighbridge nightly --shard` has made. They are left as they are.
    out : pathlib.Path
        May hold nights already; the same run is not copied twice.
    say : callable

    Raises
    ------
    RunFolderError
        If two shards hold different runs of one endpoint on one night: both are left where they are.
    ConfigurationError
        If a folder is no shard, or the shards did not draw from one key.
    """
    keys = {path.read_bytes() for path in (folder / DRAW_KEY for folder in (*shards, out)) if path.exists()}
    if len(keys) > 1:
        raise ConfigurationError(
            "these shards did not draw from one key", f"Copy {DRAW_KEY} to every machine before the first night"
        )
    touched: dict[str, Said] = {}
    for shard in shards:
        # Nothing is committed on a night on which nothing was due.
        nights = sorted({path.parent for name in (NIGHT, FLEET_NIGHT) for path in shard.glob(f"*/{name}")})
        if not nights:
            raise ConfigurationError(f"{shard} holds no nights", "Name folders that `weighbridge nightly` has made")
        for night in nights:
            if night.name not in touched:
                touched[night.name] = _said(out / night.name)
            touched[night.name] |= _said(night)
            for run in sorted(path.parent for path in night.glob("*/plan.json")):
                _copy(run, out / night.name / run.name, say)
            if (night / NIGHT).exists():
                _join(night / NIGHT, out / night.name / NIGHT)
    if keys:
        write_atomically(out / DRAW_KEY, keys.pop())
        (out / DRAW_KEY).chmod(0o600)
    return dict(sorted(touched.items()))


def _said(night: Path) -> Said:
    said: Said = {}
    if (night / NIGHT).exists():
        said |= {one.endpoint: ("done", None) for one in read_json(Night, night / NIGHT).committed}
    if (night / FLEET_NIGHT).exists():
        said |= {row.endpoint: (row.state, row.why) for row in read_json(FleetNight, night / FLEET_NIGHT).endpoints}
    return said


def _copy(run: Path, place: Path, say: Callable[[str], None]) -> None:
    if (place / "plan.json").exists():
        pairs = [(run / name, place / name) for name in _EVIDENCE]
        if any(a.exists() != b.exists() or (a.exists() and file_sha256(a) != file_sha256(b)) for a, b in pairs):
            raise RunFolderError(f"{run} and {place} are two runs of one endpoint on one night", "Keep one of them")
        return
    # Whole or not at all: a copy that was cut short lies beside its place until the next try.
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(run, part, ignore=shutil.ignore_patterns("*.lock"))
    part.replace(place)
    say(f"{place.parent.name}: {place.name}")


def _join(shard: Path, whole: Path) -> None:
    one = read_json(Night, shard)
    other = read_json(Night, whole) if whole.exists() else one
    if one.fleet != other.fleet:
        raise ConfigurationError(
            f"{shard} is a night of {one.fleet}, and {whole} one of {other.fleet}", "Merge shards of one fleet"
        )
    committed = {c.endpoint: c for c in (*other.committed, *one.committed)}
    joined = other.model_copy(
        update={
            "began_at": min(one.began_at, other.began_at),
            "committed": sorted(committed.values(), key=lambda c: c.endpoint),
        }
    )
    write_atomically(whole, canonical_bytes(joined.model_dump(mode="json", by_alias=True)) + b"\n")
