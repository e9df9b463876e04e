"""SPEC.toml: what a keeper writes to have a bundle built."""

from typing import Literal

from pydantic import Field, model_validator

from weighbridge.lab.variants import VARIANTS
from weighbridge.records import Cause, Record
from weighbridge.reference.bundle import NAME, OFFICIAL, Precision
from weighbridge.reference.licence import LicenceSpec
from weighbridge.reference.local import LocalSetting
from weighbridge.reference.servers import ASKED_LOGPROBS, ServerKind


class WeightsSpec(Record):
    """Where the original weights are: one of a local folder, a pinned revision on the hub, or the lab's model."""

    source: str
    precision: str
    folder: str | None = None
    repo: str | None = None
    revision: str | None = None
    lab: bool = False
    files: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 by file name; checked before anything runs"
    )

    @model_validator(mode="after")
    def _one_place(self) -> "WeightsSpec":
        if sum([self.folder is not None, self.repo is not None, self.lab]) != 1:
            raise ValueError("name one of folder, repo (with revision), or lab = true")
        return self


class ServerSpec(Record):
    """A server that the keeper has started; its command and environment are recorded as text."""

    kind: ServerKind
    base_url: str
    served_model: str
    family: str = Field(
        pattern=r"^[a-z0-9._-]+/[a-z0-9._-]+$", description="engine/compute type, such as vllm/bfloat16"
    )
    version: str
    precision: Precision
    start_command: str
    environment: str = ""
    hardware: str
    concurrency: int = Field(default=1, ge=1, le=256)


class StackSpec(Record):
    """One stack to record: local weights, a server of the keeper's, or a variant of the lab."""

    id: str = Field(pattern=NAME)
    description: str | None = None
    variant: str | None = Field(default=None, description="the departure's name; its id by default")
    departure: Cause | None = None
    departure_class: str | None = None
    bits_held: float | None = None
    local: LocalSetting | None = None
    folder: str | None = Field(
        default=None, description="a sibling's folder, run by `local`: another model with the same tokenizer"
    )
    server: ServerSpec | None = None
    lab_variant: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "StackSpec":
        if sum(source is not None for source in (self.local, self.server, self.lab_variant)) != 1:
            raise ValueError("name one of local, server and lab_variant")
        if self.folder is not None and (self.local is None or self.departure is None):
            raise ValueError("folder names another model: it needs local, and a departure such as other_model")
        rounds = self.local is not None and (
            self.local.weights or self.local.activations or self.local.kv_cache or self.local.remove_blocks
        )
        if rounds and self.departure is None:
            raise ValueError(
                "weights, activations, kv_cache and remove_blocks depart from the original: name the departure"
            )
        if self.lab_variant is not None and self.lab_variant not in VARIANTS:
            raise ValueError(f"the lab has no variant {self.lab_variant!r}")
        if self.lab_variant is not None and VARIANTS[self.lab_variant].template is not None:
            raise ValueError("a template is a hypothesis, not a stack: name it in a pool's `renderings`")
        if self.lab_variant is None and self.description is None:
            raise ValueError("a description is needed")
        return self

    @property
    def departs(self) -> Cause | None:
        """The kind of departure; None for an honest stack."""
        own = VARIANTS[self.lab_variant].departure if self.lab_variant is not None else None
        return own or self.departure


class HypothesisSpec(Record):
    """One way in which an endpoint may render the prompt: a Jinja template, or that of a variant of the lab."""

    id: str = Field(pattern=NAME)
    cause: Cause
    description: str | None = None
    template: str | None = None
    lab_variant: str | None = None

    @model_validator(mode="after")
    def _one_template(self) -> "HypothesisSpec":
        if (self.template is None) == (self.lab_variant is None):
            raise ValueError("name either template or lab_variant")
        if self.lab_variant is not None and (
            self.lab_variant not in VARIANTS or VARIANTS[self.lab_variant].template is None
        ):
            raise ValueError(f"the lab has no template variant {self.lab_variant!r}")
        if self.lab_variant is None and self.description is None:
            raise ValueError("a description is needed")
        return self


class PoolSpec(Record):
    """A pool to record: its name or folder; under which renderings, how many of its probes, and on which stacks where not on all."""

    name: str
    renderings: list[str] = Field(
        default=[OFFICIAL], min_length=1, description="official, or ids of hypotheses; one-token pools only"
    )
    first: int | None = Field(default=None, ge=1, description="how many probes, from the first; all by default")
    only_on: list[str] | None = None

    @property
    def is_official(self) -> bool:
        """Whether this is how the pool is asked in an audit, and not how a wrong prompt is recorded."""
        return OFFICIAL in self.renderings


class Spec(Record):
    """What to build: the SPEC.toml of ``weighbridge reference build``. The first stack is the reference."""

    schema_: Literal["weighbridge/reference-spec/3"] = Field(alias="schema")
    id: str = Field(pattern=NAME)
    version: int
    model: str
    model_names: list[str]
    keeper: str
    top_k: int = Field(default=128, ge=20, le=ASKED_LOGPROBS)
    shard: int = Field(default=32, ge=1, description="probes that are computed and written together")
    template_date: str | None = Field(default=None, description="the day that a dated template renders, YYYY-MM-DD")
    weights: WeightsSpec
    licence: LicenceSpec | None = None
    pool: list[PoolSpec] = Field(min_length=1)
    stack: list[StackSpec] = Field(min_length=1)
    hypothesis: list[HypothesisSpec] = Field(default_factory=list)

    model_config = Record.model_config | {"populate_by_name": True}

    @model_validator(mode="after")
    def _names_fit(self) -> "Spec":
        stacks = [stack.id for stack in self.stack]
        renderings = [OFFICIAL, *(h.id for h in self.hypothesis)]
        pools = [f"{p.name}@{rendering}" for p in self.pool for rendering in p.renderings]
        for names, what in ((stacks, "stack"), (renderings, "hypothesis"), (pools, "pool")):
            if len(set(names)) != len(names):
                raise ValueError(f"a {what} stands twice")
        meanings: dict[str, tuple[Cause | None, str | None]] = {}
        for stack in self.stack:
            if stack.lab_variant is not None and not self.weights.lab:
                raise ValueError(f"stack {stack.id}: a lab variant serves the lab's model, and [weights] names another")
            meaning = (stack.departs, stack.departure_class)
            if stack.departs is not None and meanings.setdefault(stack.variant or stack.id, meaning) != meaning:
                raise ValueError(
                    f"stack {stack.id}: another recording of {stack.variant} has another departure or class"
                )
        for pool in self.pool:
            missing = set(pool.renderings) - set(renderings)
            if missing:
                raise ValueError(f"pool {pool.name}: there is no hypothesis {min(missing)!r}")
            if pool.is_official and (len(pool.renderings) > 1 or pool.first is not None):
                raise ValueError(f"pool {pool.name}: the official rendering is recorded whole, in a table of its own")
            if f"{pool.name}@{OFFICIAL}" not in pools:
                raise ValueError(f"pool {pool.name}: it is not recorded under the official rendering")
            unknown = set(pool.only_on or ()) - set(stacks)
            if unknown:
                raise ValueError(f"pool {pool.name}: there is no stack {min(unknown)!r}")
            if pool.only_on is not None and stacks[0] not in pool.only_on:
                raise ValueError(f"pool {pool.name}: the reference {stacks[0]!r} is missing in only_on")
        first = self.stack[0]
        if first.departs is not None:
            raise ValueError(f"the first stack is the reference, and {first.id} departs from the original")
        return self
