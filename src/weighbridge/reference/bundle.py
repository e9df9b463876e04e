"""A reference bundle: a manifest that names everything by hash, and one file of arrays.

A bundle from somebody else is hostile input: arrays are read without pickle, sizes are bounded before anything
is unpacked, and nothing in a manifest names a path or is executed.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from weighbridge.canonical import canonical_bytes, file_sha256, sha256_hex
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.paths import data_path
from weighbridge.records import BundleIdentity, Cause, PoolIdentity, Record, checked

# The embedded bundles, pinned: the digest of each one's manifest.
EMBEDDED = {"smollm2-135m-instruct": "0b252dec5e820d3a843b943b7fb0114891d7e23ccea31b4abfebc3d8caaeff71"}
MAX_UNPACKED_BYTES = 2 * 2**30
MAX_MANIFEST_BYTES = 16 * 2**20


class WeightsSource(Record):
    """Where the original weights come from."""

    source: str
    sha256: str
    licence: str
    precision: str


class StackRecord(Record):
    """One stack or variant of a bundle.

    ``departure`` is ``None`` for an honest stack, else the kind of departure; ``departure_class`` is the word
    by which a policy accepts it (``int8``, ``kv8``, …).
    """

    id: str = Field(pattern=r"^[a-z0-9._-]{1,80}$")
    description: str
    departure: Cause | None
    departure_class: str | None
    bits_held: float | None = Field(default=None, allow_inf_nan=False)
    engine: str
    settings: dict[str, Any]
    start_command: str | None = None
    weights_sha256: str | None = None
    template_sha256: str | None = None
    missing: int = Field(default=0, description="values that the server's list was too short to hold")


class HypothesisRecord(Record):
    """A way in which the prompt may have been rendered, and what it would be called if it were."""

    id: str = Field(pattern=r"^[a-z0-9._-]{1,80}$")
    description: str
    cause: Cause | None


class Manifest(Record):
    """Everything that a bundle's numbers depend on."""

    schema_: Literal["weighbridge/bundle/1"] = Field(default="weighbridge/bundle/1", alias="schema")
    id: str
    version: int
    model: str
    model_names: list[str] = Field(description="names under which endpoints serve this model")
    keeper: str
    built_with: str
    weights: WeightsSource
    tokenizer_sha256: str
    template_sha256: str
    pool: PoolIdentity
    probe_ids: list[str]
    top_k: int
    seed: int
    machine: str
    reference_stack: str
    stacks: list[StackRecord]
    hypotheses: list[HypothesisRecord]
    arrays_sha256: str

    model_config = Record.model_config | {"populate_by_name": True}


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes
    ----------
    token_ids : int32 array, shape (probes, top_k)
        The reference's most likely first tokens for each probe, most likely first.
    logprobs_nats : float32 array, shape (stacks, probes, top_k)
        Each stack's logprobs of those tokens; NaN where its list was too short or there was no answer.
    prompt_tokens : int32 array, shape (hypotheses, probes)
        Length of the rendered prompt under each hypothesis; the first one is the official template.
    token_bytes : dict
        The bytes of each token id that occurs.
    """

    manifest: Manifest
    path: Path
    token_ids: NDArray[np.int32]
    logprobs_nats: NDArray[np.float32]
    prompt_tokens: NDArray[np.int32]
    token_bytes: dict[int, bytes]

    @property
    def identity(self) -> BundleIdentity:
        """Name and digest."""
        return BundleIdentity(id=self.manifest.id, digest=manifest_digest(self.manifest))

    @cached_property
    def probe_index(self) -> dict[str, int]:
        """Row of each probe."""
        return {probe_id: row for row, probe_id in enumerate(self.manifest.probe_ids)}

    @cached_property
    def stack_index(self) -> dict[str, int]:
        """Row of each stack."""
        return {stack.id: row for row, stack in enumerate(self.manifest.stacks)}

    @cached_property
    def usable_probe_ids(self) -> list[str]:
        """Probes on which every stack has answered with tokens that the reference knows."""
        answered: NDArray[np.bool_] = np.all(np.isfinite(self.logprobs_nats[:, :, :20]).sum(axis=2) >= 4, axis=0)
        return [probe_id for row, probe_id in enumerate(self.manifest.probe_ids) if answered[row]]

    def columns_of_probe(self, row: int) -> dict[str, int]:
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
            name = self.token_bytes[token_id].hex()
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
    problem = incomplete([(stack.id, stack.departure is None) for stack in manifest.stacks], manifest.reference_stack)
    if problem is None and not manifest.hypotheses:
        problem = "the official rendering's token counts are missing"
    if problem is not None or len(set(manifest.probe_ids)) != len(manifest.probe_ids):
        raise BundleError(f"{folder / 'manifest.json'}: {problem or 'a probe stands twice'}", "Record the bundle again")
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
    if not bundle.usable_probe_ids:
        raise BundleError(f"{arrays} holds no probe that every stack has answered", "Record the bundle again")
    return bundle


def incomplete(stacks: list[tuple[str, bool]], reference_stack: str) -> str | None:
    """Why a set of stacks (name, whether it is honest) cannot be judged against, or None."""
    names = [name for name, _ in stacks]
    if len(set(names)) != len(names):
        return "a stack stands twice"
    if (reference_stack, True) not in stacks:
        return "the reference stack is missing or departs from the original"
    if sum(honest for _, honest in stacks) < 2:
        return "an honest stack beside the reference is needed: without one nothing says how much honest stacks differ"
    if all(honest for _, honest in stacks):
        return "a departure is needed, such as 8-bit weights: what is not recorded cannot be excluded"
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
        token_ids = loaded["token_ids"]
        logprobs = loaded["logprobs_nats"]
        prompt_tokens = loaded["prompt_tokens"]
        vocabulary_ids = loaded["vocabulary_ids"]
        offsets = loaded["vocabulary_offsets"]
        blob = loaded["vocabulary_bytes"].astype(np.uint8).tobytes()
    probes = len(manifest.probe_ids)
    expected = {
        "token_ids": (token_ids.shape, (probes, manifest.top_k)),
        "logprobs_nats": (logprobs.shape, (len(manifest.stacks), probes, manifest.top_k)),
        "prompt_tokens": (prompt_tokens.shape, (len(manifest.hypotheses), probes)),
        "vocabulary_offsets": (offsets.shape, (len(vocabulary_ids) + 1,)),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise BundleError(
                f"{arrays}: {name} has shape {found}, the manifest wants {wanted}", "Fetch the bundle again"
            )
    token_bytes = {
        int(token_id): blob[offsets[i] : offsets[i + 1]] for i, token_id in enumerate(vocabulary_ids.tolist())
    }
    if not set(np.unique(token_ids).tolist()) <= set(token_bytes):
        raise BundleError(f"{arrays}: a token id has no bytes", "Fetch the bundle again")
    return Bundle(
        manifest,
        folder,
        token_ids.astype(np.int32),
        logprobs.astype(np.float32),
        prompt_tokens.astype(np.int32),
        token_bytes,
    )
