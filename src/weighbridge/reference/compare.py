"""Two bundles beside each other: parts that were built on different machines are merged, pools that were recorded later are added, revisions are compared."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from weighbridge.canonical import sha256_hex
from weighbridge.errors import BundleError
from weighbridge.records import Finite, Record
from weighbridge.reference.bundle import LOCK, OFFICIAL, Bundle, Manifest, StackRecord, pack_arrays, rendered_id
from weighbridge.reference.licence import bundled_text, compare_licence
from weighbridge.reference.noise import one_token_rows, with_noise

# What every part of a merge has in common: all but the stacks, and what follows from them.
_OWN_FIELDS = {"stacks", "built_with", "arrays_sha256"}
_SHARED_ARRAYS = ("prompt_ids", "prompt_offsets", "row_probe", "row_position", "token_ids", "prompt_tokens")
# Stated over all stacks of a bundle, so that it differs between parts.
_NOISE_FIELDS = {"noise_nats", "indistinguishable", "missing"}
_SAME_IN_PARTS = (
    "id", "model", "model_names", "keeper", "weights", "licence", "vocabulary_sha256", "template_sha256", "top_k", "shard", "reference_stack", "hypotheses",
)  # fmt: skip
_REBUILD = "Build each part from the same spec, with --reference-from the part that holds the reference"
MAX_SHOWN_CHARACTERS = 120

Kind = Literal[
    "manifest", "weights", "template", "vocabulary", "licence", "pool", "probes", "prompts", "hypothesis", "stack", "logprobs", "arrays",
]  # fmt: skip


# -- merging ---------------------------------------------------------------------------------------------------


def merge(bundles: list[Bundle]) -> tuple[Manifest, bytes, bytes]:
    """Join the stacks of bundles that were built against the same reference.

    Parameters
    ----------
    bundles : list of Bundle
        Their stacks are kept in this order; one that stands in several is kept once.

    Returns
    -------
    tuple of Manifest, bytes and bytes
        The manifest, the bytes of arrays.npz, and the licence's text (empty where there is none). The manifest's
        ``arrays_sha256`` is that of the arrays.

    Raises
    ------
    BundleError
        If they were not built against the same reference, or a stack stands in two with other numbers or settings.
    """
    first = bundles[0]
    stacks: dict[str, tuple[StackRecord, NDArray[np.float32], Bundle]] = {}
    for bundle in bundles:
        unlike = _unlike(first, bundle)
        if unlike is not None:
            raise BundleError(f"{first.path} and {bundle.path} differ in {unlike}, so they cannot be merged", _REBUILD)
        for stack, values in zip(bundle.manifest.stacks, bundle.logprobs_nats, strict=True):
            if stack.id not in stacks:
                stacks[stack.id] = (stack, values, bundle)
                continue
            record, known, other = stacks[stack.id]
            what = "settings" if _settings(record) != _settings(stack) else None
            what = what or ("logprobs" if not _same_bits(known, values) else None)
            if what is not None:
                remedy = (
                    _REBUILD
                    if stack.id == first.manifest.reference_stack
                    else "Give one of them another id and build it again"
                )
                raise BundleError(
                    f"the stack {stack.id} has other {what} in {other.path} than in {bundle.path}", remedy
                )
    logprobs = np.stack([values for _, values, _ in stacks.values()])
    arrays = pack_arrays(
        {name: getattr(first, name) for name in _SHARED_ARRAYS} | {"logprobs_nats": logprobs}, first.vocabulary
    )
    manifest = first.manifest
    rows = one_token_rows(manifest.pools, first.row_probe)
    merged = manifest.model_copy(update={
        "built_with": ", ".join(dict.fromkeys(word for b in bundles for word in b.manifest.built_with.split(", "))),
        "stacks": with_noise([record for record, _, _ in stacks.values()], logprobs, manifest.reference_stack, rows),
        "arrays_sha256": sha256_hex(arrays),
    })  # fmt: skip
    text = b"" if manifest.licence is None else bundled_text(manifest.licence, first.path).encode()
    return merged, arrays, text


def add_pools(bundle: Bundle, part: Bundle) -> tuple[Manifest, bytes, bytes]:
    """Add pools that were recorded later, by the same stacks; a pool of the same name is replaced.

    Parameters
    ----------
    bundle : Bundle
        What is added to; its stacks are kept in this order.
    part : Bundle
        Built by the same spec with other pools. Its version and what it was built with are the new bundle's.

    Returns
    -------
    tuple of Manifest, bytes and bytes
        As from `merge`; the same as if all pools had been recorded in one build, those of the bundle first.

    Raises
    ------
    BundleError
        If model, weights, template, renderings or top_k differ, a stack stands in both with other settings, or a probe stands in a pool of each.
    """
    old, new = bundle.manifest, part.manifest
    unlike = next((name for name in _SAME_IN_PARTS if getattr(old, name) != getattr(new, name)), None)
    if unlike is not None:
        raise BundleError(f"{bundle.path} and {part.path} differ in {unlike}, so no pools can be added", "Build the part from the same spec, with other [[pool]] tables")  # fmt: skip
    replaced = {pool.id for pool in new.pools}
    again = {rendered_id(pool.id, pool.rendering): pool for pool in new.pools}
    sources = []
    for pool in old.pools:
        later = again.pop(rendered_id(pool.id, pool.rendering), None)
        if later is not None or pool.id not in replaced:
            sources.append((bundle, pool) if later is None else (part, later))
    sources += [(part, pool) for pool in again.values()]
    sources.sort(key=lambda source: source[1].rendering != OFFICIAL)  # as a build records them
    asked = [(source, i) for source, pool in sources for i in pool.probes]
    names = [source.manifest.probe_ids[i] for source, i in asked]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise BundleError(f"the probe {twice} stands in a pool of {bundle.path} and in one of {part.path}", "Give each probe an id of its own")  # fmt: skip
    place = {name: i for i, name in enumerate(names)}
    rows = [(source, row) for source, i in asked for row in np.flatnonzero(source.row_probe == i).tolist()]
    row_probe = np.array([place[source.manifest.probe_ids[source.row_probe[row]]] for source, row in rows], np.int32)
    stacks = _joined_stacks(bundle, part, [rendered_id(pool.id, pool.rendering) for _, pool in sources])
    logprobs = np.full((len(stacks), len(rows), old.top_k), np.nan, np.float32)
    for at, stack in enumerate(stacks):
        for source in (bundle, part):
            own = [i for i, (where, _) in enumerate(rows) if where is source]
            if stack.id in source.stack_index:
                logprobs[at, own] = source.logprobs_nats[source.stack_index[stack.id], [rows[i][1] for i in own]]
    prompts = [_prompt(source, source.manifest.probe_ids[i]) for source, i in asked]
    arrays = pack_arrays(
        {
            "prompt_ids": np.concatenate(prompts),
            "prompt_offsets": np.cumsum([0, *(len(prompt) for prompt in prompts)]),
            "row_probe": row_probe,
            "row_position": np.array([source.row_position[row] for source, row in rows]),
            "token_ids": np.stack([source.token_ids[row] for source, row in rows]),
            "logprobs_nats": logprobs,
            "prompt_tokens": np.stack([source.prompt_tokens[:, i] for source, i in asked], axis=1),
        },
        bundle.vocabulary,
    )
    pools = [
        pool.model_copy(update={"probes": [place[source.manifest.probe_ids[i]] for i in pool.probes]}) for source, pool in sources
    ]  # fmt: skip
    joined = old.model_copy(update={
        "version": new.version, "built_with": new.built_with, "pools": pools, "probe_ids": names,
        "stacks": with_noise(stacks, logprobs, old.reference_stack, one_token_rows(pools, row_probe)), "arrays_sha256": sha256_hex(arrays),
    })  # fmt: skip
    text = b"" if old.licence is None else bundled_text(old.licence, bundle.path).encode()
    return joined, arrays, text


def _joined_stacks(bundle: Bundle, part: Bundle, keys: list[str]) -> list[StackRecord]:
    """The stacks of both, each with the pools that it was asked in one or the other."""
    replaced = {pool.id for pool in part.manifest.pools}
    found: dict[str, StackRecord] = {}
    for stack in bundle.manifest.stacks:
        kept = {key for key in stack.pools if key.split("@")[0] not in replaced}
        found[stack.id] = stack.model_copy(update={"pools": [key for key in keys if key in kept]})
    for stack in part.manifest.stacks:
        known = found.get(stack.id)
        if known is None:
            found[stack.id] = stack
            continue
        if _of_engine(known) != _of_engine(stack):
            raise BundleError(f"the stack {stack.id} has other settings in {part.path} than in {bundle.path}", "Record the pools with the same engine, or give the stack another id")  # fmt: skip
        engine = dict(known.engine)
        if stack.engine.get(LOCK) != engine.get(LOCK):
            # Each list of packages is that of the pools that were recorded with it.
            engine |= {f"{LOCK}@{key}": stack.engine[LOCK] for key in stack.pools}
        both = {*known.pools, *stack.pools}
        found[stack.id] = known.model_copy(update={"pools": [key for key in keys if key in both], "engine": engine})
    return list(found.values())


def _of_engine(stack: StackRecord) -> dict[str, Any]:
    """What has to be the same where pools are recorded later: everything but the packages beside the engine."""
    settings = stack.model_dump(exclude=_NOISE_FIELDS | {"pools", "engine"})
    # Early bundles state the bits that a weight holds among the engine's facts as well.
    apart = {name for name in stack.engine if name.split("@")[0] == LOCK} | {"bits_held"}
    return settings | {"engine": {name: fact for name, fact in stack.engine.items() if name not in apart}}


def _unlike(a: Bundle, b: Bundle) -> str | None:
    """The first thing in which two parts of a merge differ, or None."""
    for name in Manifest.model_fields:
        if name not in _OWN_FIELDS and getattr(a.manifest, name) != getattr(b.manifest, name):
            return name
    return next((name for name in _SHARED_ARRAYS if not np.array_equal(getattr(a, name), getattr(b, name))), None)


def _settings(stack: StackRecord) -> dict[str, Any]:
    return stack.model_dump(exclude=_NOISE_FIELDS)


def _same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.tobytes() == b.tobytes()


# -- comparing -------------------------------------------------------------------------------------------------


class Difference(Record):
    """One thing that changed between two revisions of a bundle."""

    kind: Kind
    change: Literal["added", "removed", "changed"]
    name: str
    detail: str = ""
    names: list[str] = Field(default_factory=list)
    max_nats: Finite | None = None
    rms_nats: Finite | None = None


def differences(a: Bundle, b: Bundle) -> list[Difference]:
    """What changed from revision `a` to revision `b`; an empty list where the digests are equal, and only there."""
    if a.identity.digest == b.identity.digest:
        return []
    old, new = a.manifest, b.manifest
    out: list[Difference] = []
    for name in ("id", "version", "model", "model_names", "keeper", "built_with", "top_k", "shard", "reference_stack"):
        out += _fields("manifest", name, {name: getattr(old, name)}, {name: getattr(new, name)})
    out += _fields(
        "weights", "source", old.weights.model_dump(exclude={"files"}), new.weights.model_dump(exclude={"files"})
    )
    out += _named(
        "weights",
        {n: {"sha256": h} for n, h in old.weights.files.items()},
        {n: {"sha256": h} for n, h in new.weights.files.items()},
    )
    out += _fields("template", "official", {"sha256": old.template_sha256}, {"sha256": new.template_sha256})
    out += _fields(
        "vocabulary",
        "tokens",
        {"sha256": old.vocabulary_sha256, "size": len(a.vocabulary)},
        {"sha256": new.vocabulary_sha256, "size": len(b.vocabulary)},
    )
    out += _licence(a, b)
    out += _named(
        "pool",
        *(
            {p.key: p.model_dump(exclude={"id", "probes"}) | {"probes": len(p.probes)} for p in m.pools}
            for m in (old, new)
        ),
    )
    out += _prompts(a, b)
    out += _named("hypothesis", *({h.id: h.model_dump(exclude={"id"}) for h in m.hypotheses} for m in (old, new)))
    out += _named("stack", *({s.id: s.model_dump(exclude={"id"}) for s in m.stacks} for m in (old, new)))
    out += _logprobs(a, b)
    return out or [
        Difference(kind="arrays", change="changed", name="arrays.npz", detail="other token lists or token counts")
    ]


def _fields(kind: Kind, name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[Difference]:
    """One difference that names every field which is not the same."""
    before, after = _flat(old), _flat(new)
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    if changed:
        words = [f"{_short(before.get(key))} → {_short(after.get(key))}" for key in changed]
        detail = "; ".join(word if key == name else f"{key}: {word}" for key, word in zip(changed, words, strict=True))
        yield Difference(kind=kind, change="changed", name=name, detail=detail)


def _named(kind: Kind, old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> Iterator[Difference]:
    """What was added, removed and changed of things that have names."""
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            yield Difference(kind=kind, change="removed", name=name)
        elif name not in old:
            yield Difference(kind=kind, change="added", name=name)
        else:
            yield from _fields(kind, name, old[name], new[name])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return out


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"


def _licence(a: Bundle, b: Bundle) -> Iterator[Difference]:
    old, new = a.manifest.licence, b.manifest.licence
    if old is None or new is None:
        if old is not None or new is not None:
            record = old or new
            assert record is not None
            yield Difference(kind="licence", change="added" if old is None else "removed", name=record.identifier)
        return
    text = compare_licence(old, bundled_text(old, a.path), bundled_text(new, b.path))
    words = "the same words" if text.same_words else "other words"
    before = {"identifier": old.identifier, "source": old.source, "asks": [ask.model_dump() for ask in old.asks]}
    after = {"identifier": new.identifier, "source": new.source, "asks": [ask.model_dump() for ask in new.asks]}
    if not text.same:
        before["text"], after["text"] = old.text_sha256, f"{new.text_sha256}, {words}"
    yield from _fields("licence", new.identifier, before, after)
    for ask in text.lost:
        yield Difference(kind="licence", change="removed", name=f"{ask.kind}, {ask.place}", detail=ask.quote)
    for sentence in text.new_obligations:
        yield Difference(kind="licence", change="added", name="obligation", detail=sentence)


def _prompts(a: Bundle, b: Bundle) -> Iterator[Difference]:
    removed = [name for name in a.manifest.probe_ids if name not in b.probe_index]
    added = [name for name in b.manifest.probe_ids if name not in a.probe_index]
    both = [name for name in a.manifest.probe_ids if name in b.probe_index]
    changed = [name for name in both if not np.array_equal(_prompt(a, name), _prompt(b, name))]
    if removed:
        yield Difference(kind="probes", change="removed", name=f"{len(removed)} probes", names=removed)
    if added:
        yield Difference(kind="probes", change="added", name=f"{len(added)} probes", names=added)
    if changed:
        yield Difference(
            kind="prompts",
            change="changed",
            name=f"{len(changed)} of {len(both)} probes",
            detail="they render to other tokens",
            names=changed,
        )


def _prompt(bundle: Bundle, probe_id: str) -> NDArray[np.int32]:
    i = bundle.probe_index[probe_id]
    return bundle.prompt_ids[bundle.prompt_offsets[i] : bundle.prompt_offsets[i + 1]]


@dataclass(frozen=True)
class _Common:
    """Where both bundles hold the same token after the same tokens: row and column in each."""

    rows: int
    row_a: NDArray[np.int64]
    column_a: NDArray[np.int64]
    row_b: NDArray[np.int64]
    column_b: NDArray[np.int64]


def _common(a: Bundle, b: Bundle) -> _Common:
    def keyed(bundle: Bundle) -> dict[tuple[str, bytes], int]:
        prompts = [_prompt(bundle, name) for name in bundle.manifest.probe_ids]
        places = zip(bundle.row_probe.tolist(), bundle.row_position.tolist(), strict=True)
        return {
            (bundle.manifest.probe_ids[i], prompts[i][: last + 1].tobytes()): row
            for row, (i, last) in enumerate(places)
        }

    there = keyed(b)
    pairs = [(row, there[key]) for key, row in keyed(a).items() if key in there]
    found: list[NDArray[np.int64]] = [np.empty((4, 0), np.int64)]
    for one, other in pairs:
        _, columns, columns_there = np.intersect1d(a.token_ids[one], b.token_ids[other], return_indices=True)
        found.append(np.stack([np.full(columns.size, one), columns, np.full(columns.size, other), columns_there]))
    return _Common(len(pairs), *np.concatenate(found, axis=1))


def _logprobs(a: Bundle, b: Bundle) -> Iterator[Difference]:
    """How far each stack moved at the same token after the same tokens, the reference first."""
    pairs = {(a.manifest.reference_stack, b.manifest.reference_stack): None}
    pairs |= {(s.id, s.id): None for s in a.manifest.stacks if s.id in b.stack_index}
    if a.manifest.vocabulary_sha256 != b.manifest.vocabulary_sha256:
        yield Difference(
            kind="logprobs",
            change="changed",
            name="all stacks",
            detail="not compared: the token ids are another vocabulary's",
        )
        return
    common = _common(a, b)
    if not common.rows:
        yield Difference(
            kind="logprobs", change="changed", name="all stacks", detail="not compared: no prompt is the same"
        )
        return
    for one, other in pairs:
        old = a.logprobs_nats[a.stack_index[one]][common.row_a, common.column_a]
        new = b.logprobs_nats[b.stack_index[other]][common.row_b, common.column_b]
        if _same_bits(old, new):
            continue
        moved = new.astype(np.float64) - old.astype(np.float64)
        known = moved[np.isfinite(moved)]
        only_one = int((np.isfinite(old) != np.isfinite(new)).sum())
        most, rms = (float(np.abs(known).max()), float(np.sqrt((known**2).mean()))) if known.size else (None, None)
        words = f"at most {most:.3g} nats, rms {rms:.3g} nats" if most is not None else "by nothing that both hold"
        words += f", over {known.size} values of {common.rows} rows"
        words += f"; {only_one} values stand in one only" if only_one else ""
        what = "the reference" if (one, other) == next(iter(pairs)) else "the stack"
        yield Difference(
            kind="logprobs", change="changed", name=other, detail=f"{what} moved {words}", max_nats=most, rms_nats=rms
        )
