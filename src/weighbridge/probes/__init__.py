"""Pools of probes, and the keyed draw that chooses the probes of one audit."""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from weighbridge.canonical import canonical_bytes, sha256_hex, write_atomically
from weighbridge.errors import ConfigurationError
from weighbridge.paths import data_path
from weighbridge.records import PoolIdentity, Probe, Record, checked, read_toml

# Of evidence: L1 forced text, L2 top-k on the tokens of a short answer, L3 top-k on one token, L4 text at temperature 0, L5 text at another temperature;
# "long" is L3 on prompts of more than 1,000 tokens, "whole" L4 on answers of several tokens; "prompt" tells what becomes of a prompt, by its tokens and by one answer.
Level = Literal["L1", "L2", "L3", "L4", "L5", "long", "whole", "prompt"]

FAMILIES: dict[Level, str] = {
    "L1": "forced texts",
    "L2": "chat probes with the reference's own likeliest answer",
    "L3": "one-token chat probes",
    "L4": "one-token chat probes with a narrow lead of the likeliest token",
    "L5": "short answers of high entropy",
    "long": "long one-token chat probes",
    "whole": "chat probes with the reference's own likeliest answer, as text",
    "prompt": "one-token chat probes of every structure that a prompt has",
}


class PoolDescription(Record):
    """What `pool.toml` says of a pool.

    A probe that ends with the assistant's turn is a forced text: every ``score_every``-th of its tokens is scored.
    """

    schema_: Literal["weighbridge/pool/2"] = Field(alias="schema")
    id: str = Field(pattern=r"^[a-z0-9-]{1,80}$")
    version: int
    level: Level
    score_every: int = Field(default=1, ge=1)
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
        digest = sha256_hex(
            canonical_bytes([probe.model_dump(mode="json", exclude_none=True) for probe in self.probes])
        )
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
        except (ValueError, RecursionError):
            raise ConfigurationError(f"{where}: not JSON", "Correct the line") from None
        probe = checked(Probe, value, where)
        if probe.id in probes:
            raise ConfigurationError(f"{where}: the probe {probe.id} stands twice", "Give it another id")
        probes[probe.id] = probe
    return Pool(description, tuple(probes.values()))


def write_pool(
    folder: Path,
    pool_id: str,
    level: Level,
    probes: Sequence[Probe],
    *,
    visibility: str,
    motivation: str,
    version: int = 1,
    score_every: int = 1,
) -> Pool:
    """Write a pool's two files and read them back.

    Raises
    ------
    ConfigurationError
        If the folder holds a pool already, or the pool is not a valid one.
    """
    if (folder / "pool.toml").exists():
        raise ConfigurationError(f"{folder} already holds a pool", "Choose another folder; a pool is never overwritten")
    description = {
        "schema": "weighbridge/pool/2", "id": pool_id, "version": version, "level": level, "lifecycle": "stable",
        "visibility": visibility, "family": FAMILIES[level], "motivation": motivation, **({"score_every": score_every} if score_every > 1 else {}),
        "cost": "one request for each probe, and as many completion tokens as its answer" if level in ("L2", "whole") else "one request and one completion token for each probe",
        "needs": "chat completions" if level in ("L4", "L5", "whole") else "chat completions with logprobs", "licence": "Apache-2.0",
    }  # fmt: skip
    checked(PoolDescription, description, str(folder / "pool.toml"))
    twice = [probe_id for probe_id, times in Counter(probe.id for probe in probes).items() if times > 1]
    if twice:
        raise ConfigurationError(f"the probe {twice[0]} stands twice", "Give it another id")
    # A JSON string is a TOML one, but for the one control character that JSON leaves as it is.
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")
        for key, value in description.items()
    ]
    texts = [
        json.dumps(probe.model_dump(mode="json", exclude_none=True), ensure_ascii=False) + "\n" for probe in probes
    ]
    write_atomically(folder / "probes.jsonl", "".join(texts).encode())
    write_atomically(folder / "pool.toml", "".join(lines).encode())
    return load_pool(str(folder))


def draw(probe_ids: list[str], seed: str) -> list[str]:
    """Put probes into the order that a seed gives: sorted by HMAC-SHA-256(seed, id).

    Every prefix of the order is a draw without replacement; whoever does not know the seed cannot foresee it.
    """
    key = seed.encode()
    return sorted(probe_ids, key=lambda probe_id: hmac.new(key, probe_id.encode(), hashlib.sha256).digest())
