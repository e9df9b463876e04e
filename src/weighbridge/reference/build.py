"""Building a reference bundle: every stack is asked every probe of its pools, shard by shard, and written down.

The build is resumable: a shard is computed whole and then written at once, in ``OUT.partial``, so that a build that
was killed ends with the same bytes as one that was not.
"""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weighbridge import __version__
from weighbridge.canonical import canonical_bytes, rounded, sha256_hex, write_atomically
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import VARIANTS
from weighbridge.lab.weights import matrix_bits
from weighbridge.probes import Pool, load_pool
from weighbridge.records import Probe
from weighbridge.reference.bundle import (
    LOCK,
    LOCKS,
    OFFICIAL,
    Bundle,
    HypothesisRecord,
    Manifest,
    PoolRecord,
    Precision,
    StackRecord,
    WeightsSource,
    pack_arrays,
    read_locks,
    rendered_id,
    vocabulary_digest,
)
from weighbridge.reference.checkpoint import Checkpoint, fetch_checkpoint, open_checkpoint, read_vocabulary
from weighbridge.reference.engine import Engine, Prompt
from weighbridge.reference.licence import TEXT_NAME, read_licence
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.noise import one_token_rows, with_noise
from weighbridge.reference.paths import KEPT
from weighbridge.reference.servers import TrustedServer
from weighbridge.reference.spec import PoolSpec, Spec, StackSpec, WeightsSpec
from weighbridge.reference.templates import render_conversations

Say = Callable[[str], None]
Step = Callable[[str, int, int], None]
Ids = NDArray[np.int32]
Values = NDArray[np.float32]


@contextmanager
def open_engine(stack: StackSpec, checkpoint: Checkpoint, say: Say) -> Iterator[Engine]:
    """The engine of one stack, started where Weighbridge starts it itself."""
    if stack.local is not None:
        if stack.folder is not None:
            checkpoint = _sibling(Path(stack.folder), checkpoint)
        yield LocalWeights(checkpoint, stack.local)
    elif stack.server is not None:
        server = stack.server
        yield TrustedServer(server.kind, server.base_url, server.served_model, concurrency=server.concurrency)
    else:
        assert stack.lab_variant is not None
        variant = VARIANTS[stack.lab_variant]
        with lab_backend(variant, say) as backend:
            yield TrustedServer("llama.cpp", backend.base_url, "lab", concurrency=variant.settings.slots)


def _sibling(folder: Path, original: Checkpoint) -> Checkpoint:
    """Another model's folder; probes are token ids, so its tokenizer has to be the same."""
    checkpoint = open_checkpoint(folder, {})
    if read_vocabulary(checkpoint) != read_vocabulary(original):
        raise ConfigurationError(
            f"{folder} has another tokenizer than the original", "Serve that model and record its answers as text"
        )
    return checkpoint


def open_weights(weights: WeightsSpec, say: Say) -> Checkpoint:
    """The folder of the original weights, checked against the spec's hashes."""
    if weights.lab:
        return open_checkpoint(lab_checkpoint(say), weights.files)
    if weights.repo is not None:
        return fetch_checkpoint(weights.repo, weights.revision, weights.files)
    assert weights.folder is not None
    return open_checkpoint(Path(weights.folder), weights.files)


def build_bundle(
    spec: Spec, spec_folder: Path, out: Path, say: Say, step: Step, *, reference_from: Bundle | None = None
) -> Manifest:
    """Build a bundle.

    Parameters
    ----------
    spec : Spec
        What to build.
    spec_folder : pathlib.Path
        Where the spec lies; its licence's file and its pools' folders are relative to it.
    out : pathlib.Path
        The bundle's folder; must not hold a bundle yet.
    say : callable
        Receives a line for each stage.
    step : callable
        Receives stack, probes done and probes in all, after each shard.
    reference_from : Bundle, optional
        Takes the reference stack from this bundle instead of running it, so that stacks built on another machine
        can be merged with it.

    Raises
    ------
    ConfigurationError
        If the weights, template, licence or pools cannot be used.
    BundleError
        If an engine fails (what was recorded is kept) or the folder already holds a bundle.
    """
    if (out / "manifest.json").exists():
        raise BundleError(f"{out} already holds a bundle", "Choose another --out; a bundle is never overwritten")
    licence, licence_text = read_licence(spec.licence, spec_folder) if spec.licence is not None else (None, b"")
    pools = {name.name: open_pool(name.name, spec_folder) for name in spec.pool}
    checkpoint = open_weights(spec.weights, say)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    _guard(partial / "build.sha256", spec, pools.values(), checkpoint, reference_from)

    probes = {probe.id: probe for pool in pools.values() for probe in pool.probes}
    if len(probes) != sum(len(pool.probes) for pool in pools.values()):
        raise ConfigurationError("a probe's id stands in two pools", "Give each probe an id of its own")
    # What runs anyway also tokenises: where the reference is taken from a bundle, its engine need not be at hand.
    tokeniser = spec.stack[0] if reference_from is None or len(spec.stack) == 1 else spec.stack[1]
    renderings = _render(spec, tokeniser, list(pools.values()), checkpoint, partial, say)
    recordings = _recordings(spec, pools, renderings)
    prompts = [prompt for recording in recordings for prompt in recording.prompts]
    layout = _Layout.of(prompts)
    tokens = [len(prompt.token_ids) for prompt in prompts]
    say(f"{len(tokens)} probes of {sum(tokens)} prompt tokens, {max(tokens)} in the longest")

    whole = [p for r in recordings if r.pool.description.level == "whole" for p in r.prompts]
    whole_rows = [row for prompt in whole for row in layout.rows_of(prompt)]

    token_ids: Ids | None = None
    values: list[Values] = []
    stacks: list[StackRecord] = []
    for stack in spec.stack:
        asked = [r for r in recordings if r.spec.only_on is None or stack.id in r.spec.only_on]
        if stack is spec.stack[0] and reference_from is not None:
            _same_prompts(reference_from, prompts, layout, spec, checkpoint)
            row = reference_from.stack_index[reference_from.manifest.reference_stack]
            token_ids = reference_from.token_ids
            values.append(reference_from.logprobs_nats[row])
            stacks.append(reference_from.manifest.stacks[row])
            continue
        own = [prompt for recording in asked for prompt in recording.prompts]
        shards = _record(stack, own, layout, token_ids, checkpoint, spec, partial, say, step)
        if token_ids is None:
            token_ids = np.zeros((layout.rows, spec.top_k), np.int32)
            for shard in shards:
                token_ids[shard.rows] = shard.token_ids
        filled = np.full((layout.rows, spec.top_k), np.nan, np.float32)
        for shard in shards:
            filled[shard.rows] = shard.logprobs_nats
        filled[whole_rows, KEPT:] = np.nan
        values.append(filled)
        facts = json.loads((partial / stack.id / "engine.json").read_text("utf-8"))
        stacks.append(_stack_record(stack, facts, [recording.key for recording in asked]))
    assert token_ids is not None
    token_ids = token_ids.copy()
    token_ids[whole_rows, KEPT:] = 0

    logprobs = np.stack(values)
    place = {prompt.probe_id: i for i, prompt in enumerate(renderings[OFFICIAL])}
    originals = [place[prompt.probe_id.split("@")[0]] for prompt in prompts]
    vocabulary = read_vocabulary(checkpoint)
    # A model's output may be wider than its tokenizer; what lies beyond has no text.
    vocabulary += [b""] * (int(token_ids.max()) + 1 - len(vocabulary))
    arrays = pack_arrays(
        {
            "prompt_ids": np.concatenate([p.token_ids for p in prompts]),
            "prompt_offsets": np.cumsum([0, *tokens]),
            "row_probe": layout.probe,
            "row_position": layout.position,
            "token_ids": token_ids,
            "logprobs_nats": logprobs,
            "prompt_tokens": np.array([[len(renderings[h][i].token_ids) for i in originals] for h in renderings]),
        },
        vocabulary,
    )
    index = {prompt.probe_id: i for i, prompt in enumerate(prompts)}
    pool_records = [
        PoolRecord(
            **recording.pool.identity.model_dump(), level=recording.pool.description.level, rendering=recording.rendering,
            probes=[index[p.probe_id] for p in recording.prompts],
        )
        for recording in recordings
    ]  # fmt: skip
    manifest = Manifest(
        id=spec.id,
        version=spec.version,
        model=spec.model,
        model_names=spec.model_names,
        keeper=spec.keeper,
        built_with=f"weighbridge {__version__}",
        weights=WeightsSource(
            **spec.weights.model_dump(include={"source", "repo", "revision", "precision"}), files=checkpoint.files
        ),
        licence=licence,
        vocabulary_sha256=vocabulary_digest(vocabulary),
        template_sha256=sha256_hex(checkpoint.template.encode()),
        pools=pool_records,
        probe_ids=list(index),
        top_k=spec.top_k,
        shard=spec.shard,
        reference_stack=spec.stack[0].id,
        stacks=with_noise(stacks, logprobs, spec.stack[0].id, one_token_rows(pool_records, layout.probe)),
        hypotheses=_hypotheses(spec, checkpoint),
        arrays_sha256=sha256_hex(arrays),
    )
    for pool_name, pool in pools.items():
        folder = spec_folder / pool_name
        if folder.is_dir():
            for name in ("pool.toml", "probes.jsonl"):
                write_atomically(out / "pools" / pool.description.id / name, (folder / name).read_bytes())
    lock_folders = [partial / LOCKS] + ([reference_from.path / LOCKS] if reference_from is not None else [])
    for name, lock in read_locks(manifest, lock_folders).items():
        write_atomically(out / LOCKS / name, lock)
    if (partial / "build-log.jsonl").exists():  # not where every stack was taken from another bundle
        write_atomically(out / "build-log.jsonl", (partial / "build-log.jsonl").read_bytes())
    write_bundle(out, manifest, arrays, licence_text)
    shutil.rmtree(partial)
    return manifest


def write_bundle(out: Path, manifest: Manifest, arrays: bytes, licence_text: bytes) -> None:
    """Write a bundle's files, the manifest last: a folder without one is no bundle."""
    write_atomically(out / "arrays.npz", arrays)
    if manifest.licence is not None:
        write_atomically(out / TEXT_NAME, licence_text)
    document = rounded(manifest.model_dump(mode="json", by_alias=True))
    write_atomically(out / "manifest.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


# -- prompts ---------------------------------------------------------------------------------------------------


def open_pool(name: str, spec_folder: Path) -> Pool:
    """The pool that a spec names: a folder beside the spec, or one that the package carries."""
    return load_pool(str(spec_folder / name) if (spec_folder / name / "pool.toml").is_file() else name)


def _guard(path: Path, spec: Spec, pools: Any, checkpoint: Checkpoint, reference_from: Bundle | None) -> None:
    """Refuse to go on with the beginning of another build; stacks are guarded one by one."""
    document = {
        "spec": spec.model_dump(mode="json", by_alias=True, exclude={"stack", "pool"}), "pools": [pool.identity.sha256 for pool in pools],
        "files": checkpoint.files, "reference": spec.stack[0].id, "reference_from": reference_from.identity.digest if reference_from else None,
    }  # fmt: skip
    _same_or_new(path, sha256_hex(canonical_bytes(document)), f"{path.parent} holds the beginning of another build (another spec, pool or weights)", "Remove it or choose another --out")  # fmt: skip


def _same_or_new(path: Path, text: str, what: str, next_step: str) -> None:
    """Write a text, or refuse where another stands."""
    if not path.exists():
        write_atomically(path, text.encode())
    elif path.read_text("utf-8") != text:
        raise ConfigurationError(what, next_step)


def _hypotheses(spec: Spec, checkpoint: Checkpoint) -> list[HypothesisRecord]:
    """The official rendering and the others."""
    official = HypothesisRecord(
        id=OFFICIAL,
        description="the model's own chat template",
        cause=None,
        template_sha256=sha256_hex(checkpoint.template.encode()),
    )
    others = [(h, *_text_of(h)) for h in spec.hypothesis]
    return [official] + [
        HypothesisRecord(id=h.id, description=text, cause=h.cause, template_sha256=sha256_hex(template.encode()))
        for h, text, template in others
    ]


def _text_of(hypothesis: Any) -> tuple[str, str]:
    """A hypothesis's description and template."""
    if hypothesis.lab_variant is not None:
        variant = VARIANTS[hypothesis.lab_variant]
        return hypothesis.description or variant.description, str(variant.template)
    return str(hypothesis.description), str(hypothesis.template)


def _render(
    spec: Spec, tokeniser: StackSpec, pools: list[Pool], checkpoint: Checkpoint, partial: Path, say: Say
) -> dict[str, list[Prompt]]:
    """Every probe as token ids under every rendering; once, and then read back."""
    path = partial / "prompts.json"
    if not path.exists():
        say("rendering the probes")
        probes = [(probe, pool.description.score_every) for pool in pools for probe in pool.probes]
        templates = {OFFICIAL: checkpoint.template} | {h.id: _text_of(h)[1] for h in spec.hypothesis}
        forced = [probe.messages[-1].content if probe.messages[-1].role == "assistant" else "" for probe, _ in probes]
        asked = [
            probe.messages[:-1] if text else probe.messages for (probe, _), text in zip(probes, forced, strict=True)
        ]
        with open_engine(tokeniser, checkpoint, say) as engine:
            texts_after = iter(engine.tokenize([text for text in forced if text]))
            continuations = [next(texts_after) if text else [] for text in forced]
            rendered = {}
            for name, template in templates.items():
                texts = render_conversations(
                    template, asked, special_tokens=checkpoint.special_tokens, name=name, date=spec.template_date,
                    tools=[probe.tools for probe, _ in probes],
                )  # fmt: skip
                rendered[name] = [
                    _prompt(probe, ids, more, every)
                    for (probe, every), ids, more in zip(probes, engine.tokenize(texts), continuations, strict=True)
                ]
        document = {
            name: [[p.probe_id, p.token_ids, p.positions] for p in prompts] for name, prompts in rendered.items()
        }
        write_atomically(path, json.dumps(document).encode())
    return {
        name: [Prompt(probe_id, tuple(ids), tuple(positions)) for probe_id, ids, positions in prompts]
        for name, prompts in json.loads(path.read_text("utf-8")).items()
    }


@dataclass(frozen=True)
class _Recording:
    """One pool under one rendering: what is asked, and by which table of the spec."""

    spec: PoolSpec
    pool: Pool
    rendering: str
    prompts: list[Prompt]

    @property
    def key(self) -> str:
        return rendered_id(self.pool.description.id, self.rendering)


def _recordings(spec: Spec, pools: dict[str, Pool], renderings: dict[str, list[Prompt]]) -> list[_Recording]:
    """Everything that is asked, what belongs to the official rendering first."""
    found = []
    for table in sorted(spec.pool, key=lambda table: not table.is_official):
        pool = pools[table.name]
        wanted = {probe.id for probe in pool.probes[: table.first]}
        if not table.is_official and pool.description.level not in ("L3", "L4", "L5", "prompt"):
            raise ConfigurationError(
                f"the pool {table.name} is not asked for one token a probe, so it is recorded under the official rendering only",
                "Remove its renderings",
            )
        for rendering in table.renderings:
            prompts = [
                Prompt(rendered_id(p.probe_id, rendering), p.token_ids, p.positions)
                for p in renderings[rendering] if p.probe_id in wanted
            ]  # fmt: skip
            found.append(_Recording(table, pool, rendering, prompts))
    return found


def _prompt(probe: Probe, ids: list[int], continuation: list[int], every: int) -> Prompt:
    if not ids:
        raise ConfigurationError(f"the probe {probe.id} renders to nothing", "Leave it out of the pool")
    last = len(ids) - 1
    # The last token of a forced text is not followed by any, so its distribution is not wanted.
    positions = range(last, last + len(continuation), every) if continuation else (last,)
    return Prompt(probe.id, tuple(ids + continuation), tuple(positions))


def _same_prompts(bundle: Bundle, prompts: list[Prompt], layout: "_Layout", spec: Spec, checkpoint: Checkpoint) -> None:
    ids = [t for prompt in prompts for t in prompt.token_ids]
    same = (
        bundle.manifest.probe_ids == [p.probe_id for p in prompts]
        and bundle.prompt_ids.tolist() == ids
        and bundle.row_probe.tolist() == layout.probe.tolist()
        and bundle.row_position.tolist() == layout.position.tolist()
        and bundle.manifest.weights.files == checkpoint.files
        and bundle.manifest.top_k == spec.top_k
        and bundle.manifest.reference_stack == spec.stack[0].id
    )
    if not same:
        raise ConfigurationError(
            f"the bundle {bundle.manifest.id} has other weights, probes, prompts or top_k, or another reference, than the spec",
            "Use the spec that it was built from, with other [[stack]] tables after the first",
        )


@dataclass(frozen=True)
class _Layout:
    """Which row belongs to which probe (its index) and position."""

    probe: NDArray[np.int32]
    position: NDArray[np.int32]
    first: dict[str, int]

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "_Layout":
        counts = [len(p.positions) for p in prompts]
        starts = np.cumsum([0, *counts])[:-1].tolist()
        return cls(
            np.repeat(np.arange(len(prompts), dtype=np.int32), counts),
            np.array([i for p in prompts for i in p.positions], np.int32),
            {p.probe_id: start for p, start in zip(prompts, starts, strict=True)},
        )

    @property
    def rows(self) -> int:
        return int(self.probe.size)

    def rows_of(self, prompt: Prompt) -> list[int]:
        start = self.first[prompt.probe_id]
        return list(range(start, start + len(prompt.positions)))


# -- recording -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    rows: list[int]
    token_ids: Ids
    logprobs_nats: Values


def _record(
    stack: StackSpec, prompts: list[Prompt], layout: _Layout, token_ids: Ids | None, checkpoint: Checkpoint, spec: Spec,
    partial: Path, say: Say, step: Step,
) -> list[_Shard]:  # fmt: skip
    """Every shard of one stack: those that were written before, and the missing ones."""
    folder = partial / stack.id
    folder.mkdir(exist_ok=True)
    _same_or_new(
        folder / "stack.sha256", sha256_hex(canonical_bytes(stack.model_dump(mode="json"))),
        f"{stack.id} was recorded with other settings than the spec's", f"Restore them, or remove {folder} to record the stack anew",
    )  # fmt: skip
    parts = [prompts[i : i + spec.shard] for i in range(0, len(prompts), spec.shard)]
    paths = [folder / f"{number:05d}.npz" for number in range(len(parts))]
    rows_of = [[row for prompt in part for row in layout.rows_of(prompt)] for part in parts]
    found = [_read_shard(path, rows) for path, rows in zip(paths, rows_of, strict=True)]
    if all(shard is not None for shard in found) and (folder / "engine.json").exists():
        return [shard for shard in found if shard is not None]
    say(f"recording {stack.id}: {describe(stack)}")
    started = time.perf_counter()
    with open_engine(stack, checkpoint, say) as engine:
        facts = engine.facts() | (
            {"sibling_files": open_checkpoint(Path(stack.folder), {}).files} if stack.folder else {}
        )
        if stack.server is None:
            lock = "".join(sorted({f"{d.metadata['Name']}=={d.version}\n" for d in distributions()})).encode()
            facts[LOCK] = sha256_hex(lock)
            write_atomically(partial / LOCKS / f"{sha256_hex(lock)}.txt", lock)
        _same_or_new(
            folder / "engine.json", json.dumps(facts, sort_keys=True),
            f"{stack.id} was begun with another engine, machine or set of packages", f"Go on with that one, or remove {folder} to record the stack anew",
        )  # fmt: skip
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        if len(longest.token_ids) > facts.get("context_tokens", len(longest.token_ids)):
            raise BundleError(
                f"the probe {longest.probe_id} has {len(longest.token_ids)} tokens, the context of {stack.id} {facts['context_tokens']}",
                "Name the stacks that can hold it in the pool's only_on, or leave it out of the pool",
            )
        loaded_s = time.perf_counter() - started
        for number, (part, path) in enumerate(zip(parts, paths, strict=True)):
            if found[number] is not None:
                continue
            started = time.perf_counter()
            rows = rows_of[number]
            wanted = [None if token_ids is None else token_ids[layout.rows_of(prompt)] for prompt in part]
            scored = engine.score(part, wanted, spec.top_k)
            shard = _Shard(
                rows, np.concatenate([r.token_ids for r in scored]), np.concatenate([r.logprobs_nats for r in scored])
            )
            if shard.token_ids.shape != (len(rows), spec.top_k):
                raise BundleError(f"{stack.id} returned fewer than {spec.top_k} logprobs", "Lower top_k in the spec")
            _write_shard(path, shard)
            found[number] = shard
            seconds = time.perf_counter() - started
            _log(
                partial,
                stack=stack.id,
                shard=number,
                prompt_tokens=sum(len(p.token_ids) for p in part),
                seconds=round(seconds, 3),
                load_seconds=round(loaded_s, 3),
            )
            step(stack.id, min(len(prompts), (number + 1) * spec.shard), len(prompts))
    return [shard for shard in found if shard is not None]


def _write_shard(path: Path, shard: _Shard) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, rows=np.array(shard.rows, np.int64), token_ids=shard.token_ids, logprobs_nats=shard.logprobs_nats)
    write_atomically(path, buffer.getvalue())


def _read_shard(path: Path, rows: list[int]) -> _Shard | None:
    """A shard of just these rows, or None: then it is computed again."""
    if not path.exists():
        return None
    try:
        # numpy leaves a path open where the archive is damaged
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            shard = _Shard(found["rows"].tolist(), found["token_ids"], found["logprobs_nats"])
            return shard if shard.rows == rows else None
    except Exception:  # noqa: BLE001 - a damaged archive fails in many ways; each means that it is computed again
        return None


def _log(partial: Path, **facts: Any) -> None:
    """Timings: they differ from run to run, so they stand outside the digest."""
    with (partial / "build-log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


# -- describing ------------------------------------------------------------------------------------------------


def describe(stack: StackSpec) -> str:
    """The spec's description, or the lab's."""
    if stack.description is not None:
        return stack.description
    assert stack.lab_variant is not None
    return VARIANTS[stack.lab_variant].description


def _stack_record(stack: StackSpec, facts: dict[str, Any], pools: list[str]) -> StackRecord:
    common: dict[str, Any] = {
        "id": stack.id, "description": describe(stack), "departure": stack.departs, "departure_class": stack.departure_class,
        "variant": None if stack.departs is None else stack.variant or stack.id, "pools": pools, "bits_held": stack.bits_held,
    }  # fmt: skip
    if stack.server is not None:
        server = stack.server
        engine = {**facts, "version": server.version, "hardware": server.hardware}
        return StackRecord(**common, engine=engine, family=server.family, precision=server.precision,
                           start_command=server.start_command, environment=server.environment or None)  # fmt: skip
    if stack.local is not None:
        common["bits_held"] = facts.get("bits_held", stack.bits_held)
        engine = {k: v for k, v in facts.items() if k != "bits_held"}
        return StackRecord(**common, engine=engine, family=_family(stack.local), precision=_precision(stack.local))
    variant = VARIANTS[str(stack.lab_variant)]
    kind = {"f32": "float32", "bf16": "bfloat16"}.get(variant.weights, "float16")
    cache = variant.settings.cache_type
    kernel = "int8 blocks (inside the kernel)" if variant.weights in ("q8_0", "q4_0") else kind
    common["bits_held"] = matrix_bits(variant.weights)
    return StackRecord(
        **common, family=f"llama.cpp/{kind}",
        engine={**facts, "version": f"xllamacpp {version('xllamacpp')}", "hardware": "CPU", **vars(variant.settings)},
        precision=Precision(
            weights=kind if variant.weights in ("f32", "f16", "bf16") else variant.weights, activations=kernel,
            kv_cache="float16" if cache == "f16" else cache, logits="float32",
        ),
        start_command=f"weighbridge lab serve --variant {variant.name}",
    )  # fmt: skip


def _family(local: LocalSetting) -> str:
    """Engine and compute type; emulated rounding points count with what they emulate."""
    emulated = local.module_outputs or local.logits
    return f"transformers/{emulated or local.dtype}"


def _precision(local: LocalSetting) -> Precision:
    outputs = local.module_outputs or local.dtype
    return Precision(
        weights=local.weights or local.dtype,
        activations=local.activations or outputs,
        kv_cache=local.kv_cache or outputs,
        logits=local.logits or local.dtype,
    )
