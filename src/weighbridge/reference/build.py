"""Building a reference bundle: ask a trusted server every probe of a pool, stack by stack, and write it down.

The build is resumable: each answer is appended to a file of its stack in ``OUT.partial`` and never asked again.
"""

import asyncio
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from weighbridge import __version__
from weighbridge.canonical import canonical_bytes, file_sha256, rounded, sha256_hex, write_atomically
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, VARIANTS
from weighbridge.lab.weights import matrix_bits, weight_file
from weighbridge.probes import Pool, load_pool
from weighbridge.records import Cause, Endpoint, Limits, Message, Probe, Record
from weighbridge.reference.bundle import HypothesisRecord, Manifest, StackRecord, WeightsSource, incomplete
from weighbridge.transport import Transport

ASKED_LOGPROBS = 1024
MAX_TRIES = 12


class StackSpec(Record):
    """One stack to record: a variant of the lab, or a server that the keeper has started."""

    id: str
    departure_class: str | None = None
    lab_variant: str | None = None
    base_url: str | None = None
    served_model: str | None = None
    description: str | None = None
    departure: Cause | None = None
    engine: str | None = None
    start_command: str | None = None
    weights_sha256: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> "StackSpec":
        if (self.lab_variant is None) == (self.base_url is None):
            raise ValueError("name either lab_variant or base_url")
        if self.lab_variant is not None and self.lab_variant not in VARIANTS:
            raise ValueError(f"the lab has no variant {self.lab_variant!r}")
        if self.base_url is not None and not (self.served_model and self.description and self.engine):
            raise ValueError("a server needs served_model, description and engine")
        return self


class HypothesisSpec(Record):
    """One way of rendering the prompt, counted by a server that renders it so."""

    id: str
    cause: Cause | None = None
    stack: StackSpec


class Spec(Record):
    """What to build: the SPEC.toml of ``weighbridge reference build``."""

    schema_: Literal["weighbridge/reference-spec/1"] = Field(alias="schema")
    id: str
    version: int
    model: str
    model_names: list[str]
    keeper: str
    pool: str
    top_k: int = Field(default=128, ge=20, le=ASKED_LOGPROBS)
    seed: int = 20261122
    tokenizer_sha256: str
    template_sha256: str
    weights: WeightsSource
    stack: list[StackSpec] = Field(min_length=1)
    hypothesis: list[HypothesisSpec] = Field(default_factory=list)

    model_config = Record.model_config | {"populate_by_name": True}


class Answer(Record):
    """A trusted server's first-token distribution for one probe."""

    token_ids: list[int]
    token_bytes_hex: list[str]
    logprobs_nats: list[float]
    prompt_tokens: int


class Engine(Protocol):
    """Something that runs the original weights; one of the three extension points."""

    name: str

    def answer(self, messages: list[Message], seed: int) -> Answer:
        """The most likely first tokens of the answer to a conversation, most likely first."""
        ...


class TrustedServer:
    """A server on the keeper's own machine, asked through its OpenAI-style API (llama.cpp's token ids are read)."""

    def __init__(self, base_url: str, model: str, name: str) -> None:
        self.name = name
        self._endpoint = Endpoint(name=name, base_url=base_url, model=model, limits=Limits(timeout_s=120))

    def answer(self, messages: list[Message], seed: int) -> Answer:
        """Ask once for each seed until the sampled token is not the end of the turn, which carries no logprobs."""
        for attempt in range(MAX_TRIES):
            document = asyncio.run(self._ask(messages, seed + attempt))
            logprobs = document["choices"][0].get("logprobs")
            if logprobs:
                entries = logprobs["content"][0]["top_logprobs"]
                return Answer(
                    token_ids=[e["id"] for e in entries],
                    token_bytes_hex=[bytes(e["bytes"]).hex() for e in entries],
                    logprobs_nats=[e["logprob"] for e in entries],
                    prompt_tokens=document["usage"]["prompt_tokens"],
                )
        raise BundleError(f"{self.name} gave no logprobs in {MAX_TRIES} tries", "Remove that probe from the pool")

    async def _ask(self, messages: list[Message], seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._endpoint.model, "messages": [m.model_dump() for m in messages], "max_tokens": 1,
            "temperature": 1, "top_p": 1, "seed": seed, "logprobs": True, "top_logprobs": ASKED_LOGPROBS,
        }  # fmt: skip
        async with Transport(self._endpoint, None) as transport:
            reply = await transport.post("/chat/completions", body)
        if reply.status != 200 or reply.body is None:
            raise BundleError(
                f"{self.name} at {self._endpoint.base_url} answered {reply.status or reply.failure}",
                "Start the server and run the build again; it goes on where it stopped",
            )
        document: dict[str, Any] = json.loads(reply.body)
        return document


@contextmanager
def _engine(spec: StackSpec, say: Callable[[str], None]) -> Iterator[Engine]:
    if spec.lab_variant is not None:
        with lab_backend(VARIANTS[spec.lab_variant], say) as server:
            yield TrustedServer(f"{server.base_url}/v1", "lab", spec.id)
    else:
        assert spec.base_url is not None
        assert spec.served_model is not None
        yield TrustedServer(spec.base_url, spec.served_model, spec.id)


def build_bundle(spec: Spec, out: Path, say: Callable[[str], None], step: Callable[[str, int, int], None]) -> Manifest:
    """Build a bundle.

    Parameters
    ----------
    spec : Spec
        What to build.
    out : pathlib.Path
        The bundle's folder; must not hold a bundle yet.
    say : callable
        Receives a line for each stage.
    step : callable
        Receives stack, probes done and probes in all.

    Raises
    ------
    BundleError
        If a server fails (what was recorded is kept) or the folder already holds a bundle.
    """
    if (out / "manifest.json").exists():
        raise BundleError(f"{out} already holds a bundle", "Choose another --out; a bundle is never overwritten")
    problem = incomplete([(stack.id, _departure(stack) is None) for stack in spec.stack], spec.stack[0].id)
    if problem is not None:
        raise ConfigurationError(f"the spec of {spec.id}: {problem}", "Add a [[stack]]")
    pool = load_pool(spec.pool)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    _guard(
        partial / "spec.sha256",
        sha256_hex(canonical_bytes(spec.model_dump(mode="json", by_alias=True)) + pool.identity.sha256.encode()),
    )

    first = _record(spec.stack[0], pool, spec, partial, None, say, step)
    ids = np.array([row["token_ids"] for row in first], np.int32)
    token_bytes = {i: b for row in first for i, b in zip(row["token_ids"], row["token_bytes_hex"], strict=True)}
    stacks = [first] + [_record(stack, pool, spec, partial, ids, say, step) for stack in spec.stack[1:]]
    logprobs = np.array([[row["logprobs_nats"] for row in rows] for rows in stacks], np.float32)
    counts = [[row["prompt_tokens"] for row in first]]
    counts += [
        [row["prompt_tokens"] for row in _record(h.stack, pool, spec, partial, ids, say, step)] for h in spec.hypothesis
    ]

    vocabulary = sorted(token_bytes)
    blobs = [bytes.fromhex(token_bytes[i]) for i in vocabulary]
    arrays = partial / "arrays.npz"
    np.savez_compressed(
        arrays,
        token_ids=ids,
        logprobs_nats=logprobs,
        prompt_tokens=np.array(counts, np.int32),
        vocabulary_ids=np.array(vocabulary, np.int32),
        vocabulary_offsets=np.cumsum([0, *map(len, blobs)]).astype(np.int64),
        vocabulary_bytes=np.frombuffer(b"".join(blobs), np.uint8),
    )
    manifest = Manifest(
        id=spec.id,
        version=spec.version,
        model=spec.model,
        model_names=spec.model_names,
        keeper=spec.keeper,
        built_with=f"weighbridge {__version__}",
        weights=spec.weights,
        tokenizer_sha256=spec.tokenizer_sha256,
        template_sha256=spec.template_sha256,
        pool=pool.identity,
        probe_ids=[probe.id for probe in pool.probes],
        top_k=spec.top_k,
        seed=spec.seed,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
        reference_stack=spec.stack[0].id,
        stacks=[_stack_record(s, int(np.isnan(logprobs[i]).sum()), say) for i, s in enumerate(spec.stack)],
        hypotheses=[
            HypothesisRecord(id="official", description="the model's own chat template", cause=None),
            *(HypothesisRecord(id=h.id, description=_describe(h.stack), cause=h.cause) for h in spec.hypothesis),
        ],
        arrays_sha256=file_sha256(arrays),
    )
    out.mkdir(parents=True, exist_ok=True)
    arrays.replace(out / "arrays.npz")
    if Path(spec.pool).is_dir():
        for name in ("pool.toml", "probes.jsonl"):
            write_atomically(out / "pool" / name, (Path(spec.pool) / name).read_bytes())
    document = rounded(manifest.model_dump(mode="json", by_alias=True))
    write_atomically(out / "manifest.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def _guard(path: Path, value: str) -> None:
    if path.exists() and path.read_text() != value:
        raise ConfigurationError(
            f"{path.parent} holds the beginning of another build", "Remove it or choose another --out"
        )
    path.write_text(value)


def _record(
    stack: StackSpec,
    pool: Pool,
    spec: Spec,
    partial: Path,
    reference_ids: Any,
    say: Callable[[str], None],
    step: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Every probe's answer on one stack, in pool order; asks only for what the partial file lacks."""
    path = partial / f"{stack.id}.jsonl"
    done: dict[str, dict[str, Any]] = {}
    if path.exists():
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            path.write_bytes(whole + b"\n" if whole else b"")
        done = {row["probe_id"]: row for row in map(json.loads, whole.splitlines())}
    missing = [(n, probe) for n, probe in enumerate(pool.probes) if probe.id not in done]
    if missing:
        say(f"recording {stack.id}: {_describe(stack)}")
        with _engine(stack, say) as engine, path.open("a", encoding="utf-8") as file:
            for number, probe in missing:
                row = _row(engine, probe, spec, None if reference_ids is None else reference_ids[number])
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
                file.flush()
                done[probe.id] = row
                step(stack.id, len(done), len(pool.probes))
    return [done[probe.id] for probe in pool.probes]


def _row(engine: Engine, probe: Probe, spec: Spec, reference_ids: Any) -> dict[str, Any]:
    answer = engine.answer(probe.messages, spec.seed)
    if reference_ids is None:
        k = spec.top_k
        return {
            "probe_id": probe.id, "prompt_tokens": answer.prompt_tokens, "token_ids": answer.token_ids[:k],
            "token_bytes_hex": answer.token_bytes_hex[:k], "logprobs_nats": answer.logprobs_nats[:k],
        }  # fmt: skip
    listed = dict(zip(answer.token_ids, answer.logprobs_nats, strict=True))
    values = [listed.get(int(i), float("nan")) for i in reference_ids]
    return {"probe_id": probe.id, "prompt_tokens": answer.prompt_tokens, "logprobs_nats": values}


def _departure(stack: StackSpec) -> Cause | None:
    return stack.departure if stack.lab_variant is None else VARIANTS[stack.lab_variant].departure


def _describe(stack: StackSpec) -> str:
    if stack.description is not None:
        return stack.description
    assert stack.lab_variant is not None
    return VARIANTS[stack.lab_variant].description


def _stack_record(stack: StackSpec, missing: int, say: Callable[[str], None]) -> StackRecord:
    if stack.lab_variant is None:
        assert stack.engine is not None
        return StackRecord(
            id=stack.id, description=_describe(stack), departure=stack.departure, departure_class=stack.departure_class,
            engine=stack.engine, settings=stack.settings, start_command=stack.start_command,
            weights_sha256=stack.weights_sha256, missing=missing,
        )  # fmt: skip
    variant = VARIANTS[stack.lab_variant]
    template = variant.template or OFFICIAL_TEMPLATE
    return StackRecord(
        id=stack.id, description=variant.description, departure=variant.departure, departure_class=stack.departure_class,
        bits_held=matrix_bits(variant.weights), engine=f"llama.cpp server of xllamacpp {version('xllamacpp')}, CPU",
        settings=dict(vars(variant.settings)), start_command=f"weighbridge lab serve --variant {variant.name}",
        weights_sha256=file_sha256(weight_file(variant.weights, say)), template_sha256=sha256_hex(template.encode()), missing=missing,
    )  # fmt: skip
