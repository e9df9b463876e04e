"""Pools of probes, and the keyed draw that chooses the probes of one audit."""

import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.errors import ConfigurationError
from weighbridge.paths import data_path
from weighbridge.records import PoolIdentity, Probe, Record, checked, read_toml


class PoolDescription(Record):
    """What `pool.toml` says of a pool."""

    schema_: Literal["weighbridge/pool/1"] = Field(alias="schema")
    id: str
    version: int
    lifecycle: str
    visibility: str
    family: str
    motivation: str
    cost: str
    needs: str
    licence: str


@dataclass(frozen=True)
class Pool:
    """A family of probes in a fixed order."""

    description: PoolDescription
    probes: tuple[Probe, ...]

    @property
    def identity(self) -> PoolIdentity:
        """Name, version and digest: the SHA-256 of the canonical JSON of all probes."""
        digest = sha256_hex(canonical_bytes([probe.model_dump(mode="json") for probe in self.probes]))
        return PoolIdentity(id=self.description.id, version=self.description.version, sha256=digest)


def load_pool(name_or_folder: str) -> Pool:
    """Load a pool that the package carries, by name, or one from a folder.

    Raises
    ------
    ConfigurationError
        If there is no such pool, or a line of it is wrong or stands twice.
    """
    folder = Path(name_or_folder)
    if not (folder / "pool.toml").is_file():
        try:
            folder = data_path(f"probes/{name_or_folder}")
        except FileNotFoundError:
            raise ConfigurationError(
                f"there is no pool {name_or_folder!r}", "Name a folder that holds pool.toml and probes.jsonl"
            ) from None
    description = read_toml(PoolDescription, folder / "pool.toml")
    path = folder / "probes.jsonl"
    probes: dict[str, Probe] = {}
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error})", "Restore the pool") from None
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            raise ConfigurationError(f"{where}: not JSON", "Correct the line") from None
        probe = checked(Probe, value, where)
        if probe.id in probes:
            raise ConfigurationError(f"{where}: the probe {probe.id} stands twice", "Give it another id")
        probes[probe.id] = probe
    return Pool(description, tuple(probes.values()))


def draw(probe_ids: list[str], seed: str) -> list[str]:
    """Put probes into the order that a seed gives: sorted by HMAC-SHA-256(seed, id).

    Every prefix of the order is a draw without replacement; whoever does not know the seed cannot foresee it.
    """
    key = seed.encode()
    return sorted(probe_ids, key=lambda probe_id: hmac.new(key, probe_id.encode(), hashlib.sha256).digest())
