"""A reference bundle: a manifest that names everything by hash, and one file of arrays.

A bundle from somebody else is hostile input: arrays are read without pickle, sizes are bounded before anything
is unpacked, and nothing in a manifest names a path or is executed.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from weighbridge.canonical import canonical_bytes, file_sha256, sha256_hex
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.paths import data_path
from weighbridge.probes import Level
from weighbridge.records import BundleIdentity, Cause, PoolIdentity, Record, checked
from weighbridge.reference.licence import LicenceRecord, bundled_text

# The embedded bundles, pinned: the digest of each one's manifest.
EMBEDDED = {"smollm2-135m-instruct": "4a41b40ca9bd68efaa77b720c0bd254b0d21c3d0c6520c6a112be33179244bed"}
OFFICIAL = "official"  # the model's own chat template
NAME = r"^[a-z0-9][a-z0-9._-]{0,79}$"  # of a stack, pool or bundle; some name a folder, so none begins with a dot
SCHEMA_FILE = Path(__file__).resolve().parent.parent / "schemas" / "bundle-3.json"
# Departures that are told from the residuals of the weights' check.
JUDGED: tuple[Cause, ...] = ("precision", "kv_cache", "other_model")
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_VOCABULARY = 2**21
MAX_LOCK_BYTES = 2**20
LOCK = "lock_sha256"  # fact of an engine: the list of packages that it was run with
LOCKS = "locks"  # folder of a bundle: the packages that each stack was run with, by hash
ARRAYS: dict[str, Any] = {
    "prompt_ids": np.int32, "prompt_offsets": np.int64, "row_probe": np.int32, "row_position": np.int32, "token_ids": np.int32,
    "logprobs_nats": np.float32, "prompt_tokens": np.int32, "vocabulary_offsets": np.int64, "vocabulary_bytes": np.uint8,
}  # fmt: skip


class WeightsSource(Record):
    """Where the original weights come from, and the SHA-256 of every file that their behaviour depends on."""

    source: str
    repo: str | None = None
    revision: str | None = None
    precision: str
    files: dict[str, str]


class Precision(Record):
    """In what a stack keeps what: each of them can be squeezed alone."""

    weights: str
    activations: str
    kv_cache: str
    logits: str


class StackRecord(Record):
    """One stack or variant of a bundle.

    ``departure`` is ``None`` for an honest stack, else the kind of departure; ``departure_class`` is the word
    by which a policy accepts it (``int8``, ``kv8``, …). ``variant`` names the departure: the same one may be recorded
    on several engines. ``family`` is engine and compute type; a stack that emulates an engine's rounding points counts
    with the family that it emulates. ``noise_nats`` is ŝ against the reference over the one-token probes; a departure
    whose ŝ is below the noisiest honest stack's is ``indistinguishable`` by size.
    """

    id: str = Field(pattern=NAME)
    description: str
    departure: Cause | None
    departure_class: str | None
    variant: str | None = None
    family: str
    precision: Precision
    bits_held: float | None = Field(default=None, allow_inf_nan=False)
    pools: list[str] = Field(description="keys of the pools that it was asked")
    engine: dict[str, Any] = Field(description="engine, version, hardware and settings, as the engine states them")
    start_command: str | None = None
    environment: str | None = None
    noise_nats: float | None = Field(default=None, allow_inf_nan=False)
    indistinguishable: bool = False
    missing: int = Field(default=0, description="values that the server's list was too short to hold")

    @property
    def is_judged(self) -> bool:
        """Whether the check of the weights looks at it."""
        return self.departure in (None, *JUDGED)

    @property
    def engine_name(self) -> str:
        """The first half of the family."""
        return self.family.split("/", 1)[0]


class HypothesisRecord(Record):
    """A way in which the prompt may have been rendered, and what it would be called if it were."""

    id: str = Field(pattern=NAME)
    description: str
    cause: Cause | None
    template_sha256: str


class PoolRecord(PoolIdentity):
    """A pool that the bundle was recorded on, under one rendering of its prompts, and which of the manifest's probes are its."""

    id: str = Field(pattern=r"^[a-z0-9-]{1,80}$", description="also the name of its folder")
    level: Level
    rendering: str = Field(default=OFFICIAL, description="official, or the id of a hypothesis")
    probes: list[int] = Field(description="indices into probe_ids")

    @property
    def key(self) -> str:
        """By which a stack says that it was asked this pool under this rendering."""
        return self.id if self.rendering == OFFICIAL else f"{self.id}@{self.rendering}"


def rendered_id(probe_id: str, rendering: str) -> str:
    """How a manifest calls a probe under a rendering; no probe's own id holds the sign."""
    return probe_id if rendering == OFFICIAL else f"{probe_id}@{rendering}"


class Manifest(Record):
    """Everything that a bundle's numbers depend on."""

    schema_: Literal["weighbridge/bundle/3"] = Field(default="weighbridge/bundle/3", alias="schema")
    id: str = Field(pattern=NAME)
    version: int
    model: str
    model_names: list[str] = Field(description="names under which endpoints serve this model")
    keeper: str
    built_with: str
    weights: WeightsSource
    licence: LicenceRecord | None
    vocabulary_sha256: str
    template_sha256: str
    pools: list[PoolRecord] = Field(min_length=1)
    probe_ids: list[str]
    top_k: int
    shard: int = Field(description="probes that were computed and written together")
    reference_stack: str
    stacks: list[StackRecord]
    hypotheses: list[HypothesisRecord]
    arrays_sha256: str

    model_config = Record.model_config | {"populate_by_name": True}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded bundle.

    Attributes
    ----------
    prompt_ids : int32 array, shape (tokens,)
        The tokens of all probes, each under its own rendering, one after another.
    prompt_offsets : int64 array, shape (probes + 1,)
        Where each probe's tokens begin.
    row_probe, row_position : int32 array, shape (rows,)
        To which probe each row belongs, and after which of its tokens.
    token_ids : int32 array, shape (rows, top_k)
        The reference's most likely next tokens at each row, most likely first.
    logprobs_nats : float32 array, shape (stacks, rows, top_k)
        Each stack's logprobs of those tokens; NaN where its list was too short or it was not asked.
    prompt_tokens : int32 array, shape (hypotheses, probes)
        Length of the rendered prompt under each hypothesis; the first one is the official template.
    vocabulary : tuple of bytes
        The bytes of every token of the tokenizer, by id; empty for special tokens.
    """

    manifest: Manifest
    path: Path
    prompt_ids: NDArray[np.int32]
    prompt_offsets: NDArray[np.int64]
    row_probe: NDArray[np.int32]
    row_position: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    logprobs_nats: NDArray[np.float32]
    prompt_tokens: NDArray[np.int32]
    vocabulary: tuple[bytes, ...]

    @cached_property
    def identity(self) -> BundleIdentity:
        """Name and digest."""
        return BundleIdentity(id=self.manifest.id, digest=manifest_digest(self.manifest))

    @cached_property
    def probe_index(self) -> dict[str, int]:
        """Index of each probe in `manifest.probe_ids` and `prompt_tokens`."""
        return {probe_id: i for i, probe_id in enumerate(self.manifest.probe_ids)}

    @cached_property
    def row_index(self) -> dict[str, int]:
        """The first row of each probe; a one-token probe has no other."""
        first: dict[str, int] = {}
        for row, probe in enumerate(self.row_probe.tolist()):
            first.setdefault(self.manifest.probe_ids[probe], row)
        return first

    @cached_property
    def stack_index(self) -> dict[str, int]:
        """Row of each stack."""
        return {stack.id: row for row, stack in enumerate(self.manifest.stacks)}

    def pool_at(self, level: Level, rendering: str = OFFICIAL) -> PoolRecord | None:
        """The pool for a level of evidence under a rendering, or None."""
        pools = self.manifest.pools
        return next((pool for pool in pools if pool.level == level and pool.rendering == rendering), None)

    @property
    def usable_probe_ids(self) -> list[str]:
        """The usable probes of the one-token pool."""
        pool = self.pool_at("L3")
        return [] if pool is None else self.usable_probes(pool)

    def prompt_of(self, probe_id: str) -> list[int]:
        """The token ids of a probe's prompt."""
        probe = self.probe_index[probe_id]
        return [int(i) for i in self.prompt_ids[self.prompt_offsets[probe] : self.prompt_offsets[probe + 1]]]

    def answer_tokens(self, probe_id: str) -> int:
        """How many tokens of a probe's prompt are its forced text."""
        probe = self.probe_index[probe_id]
        asked = int(self.row_position[self.row_index[probe_id]]) + 1
        return int(self.prompt_offsets[probe + 1] - self.prompt_offsets[probe]) - asked

    def scored_tokens(self, probe_id: str) -> int:
        """How many tokens of a forced text reach its last scored position."""
        rows = self.row_position[self.row_probe == self.probe_index[probe_id]]
        return int(rows.max() - rows.min()) + 1

    def usable_probes(self, pool: PoolRecord) -> list[str]:
        """Probes of a pool on which every stack that is judged has answered with tokens that the reference knows."""
        if pool.key not in self._usable:
            self._usable[pool.key] = self._find_usable(pool)
        return list(self._usable[pool.key])

    @cached_property
    def _usable(self) -> dict[str, list[str]]:
        return {}

    def _find_usable(self, pool: PoolRecord) -> list[str]:
        asked = [i for i, s in enumerate(self.manifest.stacks) if pool.key in s.pools and s.is_judged]
        wanted = np.isin(self.row_probe, pool.probes)
        answered = (np.isfinite(self.logprobs_nats[asked][:, wanted, :20]).sum(axis=2) >= 4).all(axis=0)
        incomplete_probes = set(self.row_probe[wanted][~answered].tolist())
        return [self.manifest.probe_ids[probe] for probe in pool.probes if probe not in incomplete_probes]

    def columns_of_row(self, row: int) -> dict[str, int]:
        """Column of each token (its bytes in hexadecimal digits); bytes that two tokens share are left out."""
        if row not in self._columns:
            self._columns[row] = self._find_columns(row)
        return self._columns[row]

    @cached_property
    def _columns(self) -> dict[int, dict[str, int]]:
        return {}

    def _find_columns(self, row: int) -> dict[str, int]:
        columns: dict[str, int] = {}
        shared: set[str] = set()
        for column, token_id in enumerate(self.token_ids[row].tolist()):
            name = self.vocabulary[token_id].hex()
            if not name or name in columns:
                shared.add(name)
            columns[name] = column
        return {name: column for name, column in columns.items() if name not in shared}


def manifest_digest(manifest: Manifest) -> str:
    """The SHA-256 of a manifest's canonical JSON; it covers the arrays through their own hash."""
    return sha256_hex(canonical_bytes(manifest.model_dump(mode="json", by_alias=True)))


def resolve(name_or_folder: str) -> Path:
    """The folder of a bundle, given its path or the name of an embedded one.

    Raises
    ------
    BundleError
        If there is no such bundle.
    """
    if name_or_folder in EMBEDDED:
        try:
            return data_path(f"reference_outputs/{name_or_folder}")
        except FileNotFoundError as error:
            raise BundleError(str(error), "Install Weighbridge again") from None
    folder = Path(name_or_folder)
    if (folder / "manifest.json").is_file():
        return folder
    known = ", ".join(EMBEDDED)
    raise BundleError(
        f"there is no reference bundle {name_or_folder!r}",
        f"Name a folder that holds manifest.json, or an embedded bundle ({known}); `weighbridge reference build` makes one",
    )


def load_bundle(name_or_folder: str) -> Bundle:
    """Load a bundle and check every hash.

    Raises
    ------
    BundleError
        If it is unknown, incomplete, too large, or does not match its hashes.
    """
    folder = resolve(name_or_folder)
    manifest = _read_manifest(folder / "manifest.json")
    problem = _inconsistent(manifest)
    if problem is not None:
        raise BundleError(f"{folder / 'manifest.json'}: {problem}", "Record the bundle again")
    arrays = folder / "arrays.npz"
    if not arrays.is_file():
        raise BundleError(f"{folder} lacks arrays.npz", "Fetch the whole bundle again")
    if file_sha256(arrays) != manifest.arrays_sha256:
        raise BundleError(
            f"{arrays} does not have the hash that its manifest names", "Fetch the bundle again; do not use this copy"
        )
    if name_or_folder in EMBEDDED and manifest_digest(manifest) != EMBEDDED[name_or_folder]:
        raise BundleError(
            f"the embedded bundle {name_or_folder} is not the one that this version pins", "Install Weighbridge again"
        )
    try:
        bundle = _unpack(manifest, folder, arrays)
    except (
        ValueError,
        KeyError,
        OSError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise BundleError(f"{arrays} cannot be read ({error})", "Fetch the bundle again") from None
    if manifest.licence is not None:
        bundled_text(manifest.licence, folder)
    if bundle.pool_at("L3") is not None and not bundle.usable_probe_ids:
        raise BundleError(f"{arrays} holds no probe that every stack has answered", "Record the bundle again")
    return bundle


def read_locks(manifest: Manifest, folders: Sequence[Path]) -> dict[str, bytes]:
    """The lists of packages that a manifest's stacks were run with, by file name, each checked against its hash.

    Raises
    ------
    BundleError
        If one is missing, is no plain file, or is not the one that a stack names.
    """
    found: dict[str, bytes] = {}
    # Pools that were recorded later may have a list of their own: lock_sha256@POOL.
    named = [
        (stack, digest)
        for stack in manifest.stacks
        for fact, digest in stack.engine.items()
        if fact.split("@")[0] == LOCK
    ]
    for stack, digest in named:
        name = f"{digest}.txt"
        if name in found:
            continue
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BundleError(f"the stack {stack.id} names no hash as its lock_sha256", "Record the bundle again")
        paths = [folder / name for folder in folders if (folder / name).is_file() and not (folder / name).is_symlink()]
        if not paths or paths[0].stat().st_size > MAX_LOCK_BYTES or file_sha256(paths[0]) != digest:
            raise BundleError(
                f"{LOCKS}/{name} of {manifest.id} is missing or not the file that {stack.id} names",
                "Fetch the whole bundle again",
            )
        found[name] = paths[0].read_bytes()
    return found


def incomplete(stacks: list[tuple[str, bool]], reference_stack: str) -> str | None:
    """Why a set of stacks (name, whether it is honest) cannot be judged against, or None.

    A part that is still to be merged may lack what judging needs, so `load_bundle` does not ask for it.
    """
    if (reference_stack, True) not in stacks:
        return "the reference stack is missing or departs from the original"
    if sum(honest for _, honest in stacks) < 2:
        return "an honest stack beside the reference is needed: without one nothing says how much honest stacks differ"
    if all(honest for _, honest in stacks):
        return "a departure is needed, such as 8-bit weights: what is not recorded cannot be excluded"
    return None


def unfit_to_judge(bundle: Bundle, level: Level = "L3", rendering: str = OFFICIAL) -> str | None:
    """Why no endpoint can be judged against a bundle at a level, or None: what counts was recorded on that level's pool."""
    pool, manifest = bundle.pool_at(level, rendering), bundle.manifest
    if pool is None:
        return "it holds no one-token pool" if level == "L3" else f"it holds no pool for level {level}"
    if not bundle.usable_probes(pool):
        return f"its pool {pool.id} holds no probe that every stack has answered"
    recorded = [(s.id, s.departure is None) for s in manifest.stacks if pool.key in s.pools and s.is_judged]
    return incomplete(recorded, manifest.reference_stack)


def _inconsistent(manifest: Manifest) -> str | None:
    """What of a manifest contradicts itself, or None."""
    names = [stack.id for stack in manifest.stacks]
    if len(set(names)) != len(names):
        return "a stack stands twice"
    if not any(stack.id == manifest.reference_stack and stack.departure is None for stack in manifest.stacks):
        return "the reference stack is missing or departs from the original"
    if not manifest.hypotheses:
        return "the official rendering's token counts are missing"
    if len(set(manifest.probe_ids)) != len(manifest.probe_ids):
        return "a probe stands twice"
    if any(not 0 <= i < len(manifest.probe_ids) for pool in manifest.pools for i in pool.probes):
        return "a pool names a probe that is not there"
    if len({pool.key for pool in manifest.pools}) != len(manifest.pools):
        return "a pool stands twice"
    if {pool.rendering for pool in manifest.pools} - {OFFICIAL, *(h.id for h in manifest.hypotheses)}:
        return "a pool has a rendering that is no hypothesis"
    return None


def _read_manifest(path: Path) -> Manifest:
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than a manifest can be", "Fetch the bundle again")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise BundleError(f"{path} is not JSON", "Fetch the bundle again") from None
    try:
        return checked(Manifest, value, str(path))
    except ConfigurationError as error:
        raise BundleError(error.what, "Fetch the bundle again, or one for this version of Weighbridge") from None


def _unpack(manifest: Manifest, folder: Path, arrays: Path) -> Bundle:
    with zipfile.ZipFile(arrays) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_UNPACKED_BYTES:
            raise BundleError(
                f"{arrays} unpacks to more than {MAX_UNPACKED_BYTES // 2**30} GiB", "Do not use this bundle"
            )
    with np.load(arrays, allow_pickle=False) as loaded:
        found = {name: loaded[name] for name in ARRAYS}
    probes, rows = len(manifest.probe_ids), len(found["row_probe"])
    shapes = {
        "prompt_offsets": (probes + 1,),
        "row_position": (rows,),
        "token_ids": (rows, manifest.top_k),
        "logprobs_nats": (len(manifest.stacks), rows, manifest.top_k),
        "prompt_tokens": (len(manifest.hypotheses), probes),
    }
    for name, kind in ARRAYS.items():
        wanted = shapes.get(name, (found[name].size,))
        if found[name].shape != wanted or found[name].dtype != kind:
            raise BundleError(
                f"{arrays}: {name} is {found[name].dtype} of shape {found[name].shape}, {kind} of {wanted} is wanted",
                "Fetch the bundle again",
            )
    blob, offsets = found["vocabulary_bytes"].tobytes(), found["vocabulary_offsets"]
    # Checked before anything is cut: overlapping pieces would be copied again and again.
    if (
        not 1 < offsets.size <= MAX_VOCABULARY
        or (offsets[0], offsets[-1]) != (0, len(blob))
        or (np.diff(offsets) < 0).any()
    ):
        raise BundleError(f"{arrays}: vocabulary_offsets do not divide the vocabulary", "Fetch the bundle again")
    ends = offsets.tolist()
    vocabulary = tuple(blob[start:end] for start, end in pairwise(ends))
    for name, limit in (("token_ids", len(vocabulary)), ("row_probe", probes), ("prompt_ids", len(vocabulary))):
        if found[name].size and not 0 <= found[name].min() <= found[name].max() < limit:
            raise BundleError(f"{arrays}: {name} points outside of what is there", "Fetch the bundle again")
    starts = found["prompt_offsets"]
    lengths = np.diff(starts)
    if starts[0] != 0 or starts[-1] != len(found["prompt_ids"]) or (lengths < 1).any():
        raise BundleError(f"{arrays}: prompt_offsets do not divide the prompts", "Fetch the bundle again")
    if not ((found["row_position"] >= 0) & (found["row_position"] < lengths[found["row_probe"]])).all():
        raise BundleError(f"{arrays}: row_position points outside of its prompt", "Fetch the bundle again")
    if set(found["row_probe"].tolist()) != set(range(probes)):
        raise BundleError(f"{arrays}: a probe has no row", "Fetch the bundle again")
    if vocabulary_digest(vocabulary) != manifest.vocabulary_sha256:
        raise BundleError(f"{arrays}: the vocabulary is not the one that the manifest names", "Fetch the bundle again")
    rest = {name: found[name] for name in ARRAYS if not name.startswith("vocabulary")}
    return Bundle(manifest=manifest, path=folder, vocabulary=vocabulary, **rest)


def vocabulary_digest(vocabulary: Sequence[bytes]) -> str:
    """The SHA-256 of the canonical JSON of all tokens' bytes in hexadecimal digits."""
    return sha256_hex(canonical_bytes([token.hex() for token in vocabulary]))


def pack_arrays(bundle_arrays: Mapping[str, NDArray[Any]], vocabulary: Sequence[bytes]) -> bytes:
    """The bytes of arrays.npz; equal arrays give equal bytes."""
    arrays = dict(bundle_arrays) | {
        "vocabulary_offsets": np.cumsum([0, *map(len, vocabulary)]),
        "vocabulary_bytes": np.frombuffer(b"".join(vocabulary), np.uint8),
    }
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, allow_pickle=False, **{name: arrays[name].astype(kind) for name, kind in ARRAYS.items()}
    )
    return buffer.getvalue()


def bundle_schema() -> str:
    """The JSON Schema of a manifest, as text; `python -m weighbridge.reference.bundle` writes it into the package."""
    schema = Manifest.model_json_schema(by_alias=True, mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(bundle_schema(), "utf-8")
