"""What flows through an audit, as frozen records: endpoint, policy, plan, exchange, observation, finding, verdict.

Every file of a run folder holds records of this module; each carries the name and version of its schema.
"""

import base64
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from weighbridge.errors import ConfigurationError

Outcome = Literal["consistent", "inconsistent", "inconclusive", "not_supported", "not_applicable", "error"]
Axis = Literal["route", "prompt", "sampling", "weights", "share", "service"]
AXES: tuple[Axis, ...] = ("route", "prompt", "sampling", "weights", "share", "service")
VerdictWord = Literal["consistent", "inconclusive", "differs", "differs_replicated"]
Cause = Literal[
    "precision", "kv_cache", "template", "hidden_prompt", "sampling", "route", "other_model", "partial_routing", "none_of_these",
]  # fmt: skip
# Of evidence that rests on logprobs: forced text, the tokens of a short answer, one token.
LogprobLevel = Literal["L1", "L2", "L3"]
# And where there are none: one token as text, at temperature 0 and at any other.
EvidenceLevel = Literal["L1", "L2", "L3", "L4", "L5"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
_PROVIDER_SLUG = r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)?$"
_AUTHOR_AND_SLUG = re.compile(r"[a-z0-9~][a-z0-9._:~-]*/[a-z0-9][a-z0-9._:~-]*", re.IGNORECASE | re.ASCII)
AGAIN = "-again"  # ends the id of a request that asks once more
RAW = "raw-"  # begins the id of one that sends the reference's own tokens
# What an answer may be called, if its name is to stand in a URL.
ANSWER_ID = r"^[A-Za-z0-9_-]{1,100}$"


class Record(BaseModel):
    """A frozen record that refuses fields it does not know."""

    # A NaN that slips into a record stays one, so that `canonical.rounded` refuses it; it never becomes a null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


AnyRecord = TypeVar("AnyRecord", bound=Record)


# -- what the user states --------------------------------------------------------------------------------------


class Price(Record):
    """What the endpoint charges, for the plan and the cost limit."""

    prompt_usd_per_million_tokens: float = Field(ge=0, allow_inf_nan=False)
    completion_usd_per_million_tokens: float = Field(ge=0, allow_inf_nan=False)

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens, in US dollars."""
        return (
            prompt_tokens * self.prompt_usd_per_million_tokens
            + completion_tokens * self.completion_usd_per_million_tokens
        ) / 1e6


class Limits(Record):
    """How the endpoint may be asked."""

    max_requests: int = Field(default=100, ge=1, le=100_000)
    max_cost_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    concurrency: int = Field(default=1, ge=1, le=64)
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    timeout_s: float = Field(default=60.0, gt=0, le=3600, allow_inf_nan=False)


class Endpoint(Record):
    """A place that claims to serve a model: base URL, dialect, model name, and where the key is."""

    schema_: Literal["weighbridge/endpoint/1"] = Field(default="weighbridge/endpoint/1", alias="schema")
    name: str = Field(min_length=1, max_length=120)
    base_url: str = Field(max_length=2000)
    model: str = Field(min_length=1, max_length=300)
    dialect: Literal["openai-chat", "anthropic-messages"] = "openai-chat"
    router: Literal["openrouter"] | None = Field(
        default=None, description="the router behind base_url; known without this where the host is openrouter.ai"
    )
    provider: str | None = Field(
        default=None,
        max_length=100,
        pattern=_PROVIDER_SLUG,
        description="the slug of the provider that a router such as OpenRouter is to ask, and no other one",
    )
    reference: str | None = None
    policy: str = "strict"
    claimed_precision: str | None = Field(default=None, max_length=100)
    api_key_env: str | None = None
    identify_client: bool = True
    extra_body: dict[str, Any] = Field(default_factory=dict)
    price: Price | None = None
    limits: Limits = Field(default_factory=Limits)

    model_config = Record.model_config | {"populate_by_name": True}

    @field_validator("base_url")
    @classmethod
    def _plain_https_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError("must be a URL such as https://api.example.com/v1")
        if parts.username or parts.password:
            raise ValueError("must not hold credentials; name the key's environment variable in api_key_env")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("must hold a port between 0 and 65535, or none") from None
        if not value.isprintable():
            raise ValueError("must not hold control characters")
        if parts.query or parts.fragment:
            raise ValueError("must not hold a query string or a fragment")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK_HOSTS:
            raise ValueError("must use https unless the host is this machine (127.0.0.1, localhost, ::1)")
        return value.rstrip("/")

    @field_validator("extra_body")
    @classmethod
    def _json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("holds a value that JSON lacks, such as a date or nan") from None
        return value

    @model_validator(mode="after")
    def _cost_needs_price(self) -> Self:
        if self.limits.max_cost_usd is not None and self.price is None:
            raise ValueError("limits.max_cost_usd needs [price], so that a cost can be known before it is spent")
        return self

    @model_validator(mode="after")
    def _routed_plainly(self) -> Self:
        if self.provider is not None and "provider" in self.extra_body:
            raise ValueError("extra_body must not hold provider where provider is set; remove it there")
        if self.on_openrouter and not _AUTHOR_AND_SLUG.fullmatch(self.model):
            raise ValueError("model must be author/slug on OpenRouter, such as qwen/qwen3-8b")
        return self

    @property
    def on_openrouter(self) -> bool:
        """Whether it is OpenRouter that passes requests on."""
        host = urlsplit(self.base_url).hostname or ""
        return self.router == "openrouter" or host == "openrouter.ai" or host.endswith(".openrouter.ai")

    @property
    def unpinned(self) -> bool:
        """Whether a router chooses, request by request, who answers."""
        return self.on_openrouter and self.provider is None

    @property
    def origin(self) -> str:
        """Scheme, host and port: what a key is bound to."""
        parts = urlsplit(self.base_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{port}"


class Policy(Record):
    """Which stacks count as honest, what a verdict requires, and every threshold with its source."""

    schema_: Literal["weighbridge/policy/1"] = Field(alias="schema")
    id: str
    version: int
    title: str
    accepts: list[str] = Field(description="classes of departure that count as honest, such as kv8 or int8")
    requires: list[Axis] = Field(description="axes whose inconsistency makes the verdict `differs`")
    differs_e_value: float = Field(gt=1, description="evidence against the honest library at which it is rejected")
    consistent_e_value: float = Field(
        gt=1, description="evidence against each excluded departure at which it is excluded"
    )
    null_scale_floor_nats: float = Field(
        gt=0, description="no honest stack is held to a smaller residual scale than this"
    )
    null_scale_floor_source: str
    stack_margin: float = Field(
        ge=1, description="least factor on the noisiest honest stack's scale, for stacks not in the library"
    )
    stack_coverage: float = Field(
        gt=0.5, lt=1, description="share of unrecorded honest stacks of a numeric class that its limit is meant to hold"
    )
    few_stacks_sd: float = Field(
        gt=0, description="spread of ln ŝ from stack to stack where fewer than three of a class are recorded"
    )
    outlier_share: float = Field(ge=0, lt=1, description="share of probes on which an honest stack may do anything")
    score_cap: float = Field(gt=1, description="the most that one request may count, before normalising")
    direction_floor_cosine: float = Field(gt=0, lt=1)
    direction_margin_cosine: float = Field(ge=0, lt=1)
    exact_name_cosine: float = Field(
        gt=0, lt=1, description="a variant is named from this cosine, if nothing honest is exceeded by what it leaves"
    )
    exact_name_cosine_alone: float = Field(
        gt=0, lt=1, description="a variant is named from this cosine, whatever it leaves"
    )
    family_cosine: float = Field(gt=0, lt=1)
    min_answers: int = Field(ge=2, description="no `differs` from fewer answers")
    min_answers_consistent: int = Field(ge=2, description="no `consistent` from fewer answers")
    min_counted: int = Field(ge=2, description="no statement about the prompt from fewer token counts")

    model_config = Record.model_config | {"populate_by_name": True}


# -- plan ------------------------------------------------------------------------------------------------------


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Probe(Record):
    """One request with a purpose."""

    id: str = Field(pattern=r"^[a-z0-9-]{1,80}$")
    purpose: str
    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = Field(default=None, description="functions that the model is told of")


class PlannedRequest(Record):
    """One request of a plan, in sending order.

    ``max_tokens`` are generated at temperature 0 where they are more than one; a ``forced`` request ends with the assistant's own
    words and asks for the logprobs of its prompt; a ``raw`` one sends the reference's own tokens and no conversation.
    ``settings`` are fields of the body that are asked instead of the usual ones.
    """

    request_id: str
    probe: Probe
    max_tokens: int = Field(default=1, ge=1, le=512)
    forced: bool = False
    raw: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)


class BundleIdentity(Record):
    """Which reference bundle: its name and the digest of its manifest."""

    id: str
    digest: str


class PoolIdentity(Record):
    """Which pool of probes: its name, version and the digest of its probes."""

    id: str
    version: int
    sha256: str


class Draw(Record):
    """The probes of one audit: the seed of the keyed generator, and the commitment to the draw."""

    seed: str
    commitment: str


class Estimate(Record):
    """What an audit costs at most."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Finite | None
    price_source: str


class Plan(Record):
    """Everything that is decided before the first request is sent."""

    schema_: Literal["weighbridge/plan/1"] = Field(default="weighbridge/plan/1", alias="schema")
    weighbridge_version: str
    run_id: str
    created_at: str
    endpoint: Endpoint
    policy: Policy
    reference: BundleIdentity | None
    reference_path: str | None
    pool: PoolIdentity | None
    sealed: bool = Field(default=False, description="whether nobody but the auditor could foresee the pool")
    draw: Draw
    level: LogprobLevel = "L3"
    fleet_size: int = Field(default=1, ge=1, description="how many endpoints are judged together")
    route_requests: list[str] = Field(
        default_factory=list, description="what the host is asked by GET of itself: its listing, records of answers"
    )
    capability_requests: list[PlannedRequest]
    prompt_requests: list[PlannedRequest] = Field(default_factory=list, description="what becomes of a prompt")
    probe_requests: list[PlannedRequest] = Field(description="the weights; sent until the question is answered")
    sampling_requests: list[PlannedRequest] = Field(
        default_factory=list, description="what becomes of sampling parameters"
    )
    text_requests: list[PlannedRequest] = Field(
        default_factory=list, description="the weights at temperature 0, where no logprobs are returned"
    )
    whole_requests: list[PlannedRequest] = Field(
        default_factory=list, description="whole answers at temperature 0, where no logprobs are returned"
    )
    estimate: Estimate

    model_config = Record.model_config | {"populate_by_name": True}

    @property
    def requests(self) -> list[PlannedRequest]:
        """All of them, in the order in which they would be sent, and after them the twins of the probes."""
        raw = [raw_twin(request) for request in (*self.probe_requests, *self.text_requests)]
        again = [again_twin(twin) for request in self.text_requests for twin in (request, raw_twin(request))]
        whole = [twin for r in self.whole_requests for twin in (r, again_twin(r), again_twin(again_twin(r)))]
        drawn = [drawn_twin(request) for request in self.probe_requests] if self.text_requests else []
        return [
            *self.capability_requests, *self.prompt_requests, *self.probe_requests, *self.sampling_requests, *raw,
            *self.text_requests, *again, *drawn, *whole,
        ]  # fmt: skip


def raw_twin(request: PlannedRequest) -> PlannedRequest:
    """The same probe as the reference's own tokens, which no chat template touches."""
    return request.model_copy(update={"request_id": f"{RAW}{request.request_id}", "raw": True})


def again_twin(request: PlannedRequest) -> PlannedRequest:
    """The same text probe, or its twin, once more: weights give the same answer twice, a temperature seldom does."""
    # It differs in what changes no answer at temperature 0, so that a cache which goes by the body does not give a copy.
    top_p = round(request.settings.get("top_p", 1) - 0.01, 2)
    return request.model_copy(update={"request_id": f"{request.request_id}{AGAIN}", "settings": {"top_p": top_p}})


def drawn_twin(request: PlannedRequest) -> PlannedRequest:
    """The same probe at temperature 1, where an endpoint returns no logprobs and does not serve temperature 0."""
    # Where nothing is stated, some servers leave out what is unlikely.
    changed = {"request_id": f"drawn-{request.request_id}", "max_tokens": 1, "forced": False, "settings": {"top_p": 1}}
    return request.model_copy(update=changed)


# -- exchanges -------------------------------------------------------------------------------------------------

FailureCode = Literal[
    "unknown_host", "refused", "tls", "timeout", "connection_lost", "too_large", "bad_encoding", "interrupted",
]  # fmt: skip


def _base64(value: str) -> str:
    base64.b64decode(value, validate=True)
    return value


Base64 = Annotated[str, AfterValidator(_base64)]


class Sent(Record):
    """An attempt that is about to be sent; written and synced before it is."""

    event: Literal["sent"] = "sent"
    request_id: str
    attempt: int
    sent_at: str
    method: Literal["POST", "GET"] = "POST"
    path: str | None = Field(default=None, description="and query, relative to the base URL")
    body: dict[str, Any] = Field(default_factory=dict, description="empty for a GET")


class Received(Record):
    """What came back from an attempt, as received; written and synced before anything else happens."""

    event: Literal["received"] = "received"
    request_id: str
    attempt: int
    status: int | None = None
    headers: dict[str, str]
    body_base64: Base64 | None = Field(default=None, description="the body where it is not UTF-8 text")
    body_text: str | None = Field(default=None, description="the body where it is UTF-8 text")
    body_sha256: str | None = Field(default=None, description="of the decoded body before redaction")
    redacted: bool = False
    failure: FailureCode | None = None
    failure_detail: str | None = None
    first_byte_s: Finite | None = None
    latency_s: Finite


class Exchange(Record):
    """One attempt of one request and what came back."""

    sent: Sent
    received: Received


# -- observations ----------------------------------------------------------------------------------------------


class TopToken(Record):
    """One entry of a top-k list."""

    bytes_hex: str
    logprob_nats: Finite


class Position(Record):
    """One place of a text: the token that stands there, where it is known, and the most likely ones."""

    bytes_hex: str | None
    logprob_nats: Finite | None = None
    top: list[TopToken]


class ListedEndpoint(Record):
    """One endpoint of a router's listing, in the host's own words: this is the claim."""

    provider_name: str | None
    tag: str | None = Field(description="the provider's slug, and often a variant of it after a slash")
    quantization: str | None
    context_length: int | None
    supported_parameters: list[str]
    prices: dict[str, str] = Field(description="in US dollars, as they are listed")


class Listing(Record):
    """What a host lists: on a router who serves the model, elsewhere its models."""

    endpoints: list[ListedEndpoint] | None = None
    models: int | None = None
    names_model: bool | None = Field(default=None, description="whether the claimed model is among them")


class AnswerRecord(Record):
    """A router's own record of one answer."""

    answer_id: str
    provider_named: str | None
    model_named: str | None
    native_prompt_tokens: int | None
    native_completion_tokens: int | None
    native_finish_reason: str | None
    total_cost_usd: Finite | None
    provider_responses: int | None = Field(description="how many attempts at providers there were")


class Observation(Record):
    """The flat facts read from the last attempt of one request.

    ``listing`` and ``record`` are read from what was asked by GET, everything else from answers of the model. ``top`` is the list of the first generated token and ``drawn`` that token; ``positions`` holds one list for each generated token
    where more than one was asked for, or one for each token of the prompt where its logprobs were. ``raw`` answers are those to the
    reference's own tokens.
    """

    schema_: Literal["weighbridge/observation/1"] = Field(default="weighbridge/observation/1", alias="schema")
    request_id: str
    probe_id: str
    answered: bool
    fault: str | None = Field(default=None, description="why there is no answer, or no logprobs, in one word")
    fault_detail: str | None = None
    status: int | None = None
    attempts: int
    latency_s: Finite
    first_byte_s: Finite | None = None
    answer_id: str | None = Field(default=None, pattern=ANSWER_ID)
    model_named: str | None = None
    provider_named: str | None = None
    fingerprint: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    shows_reasoning: bool = False
    raw: bool = False
    streamed: bool = False
    text: str | None = Field(default=None, description="the beginning of what was generated")
    choices: int | None = None
    drawn: TopToken | None = None
    top: list[TopToken] | None = None
    nameless: int = Field(default=0, description="tokens of that list that are special and have no name, beyond one")
    positions: list[Position] | None = None
    quirks: list[str] = Field(default_factory=list)
    listing: Listing | None = None
    record: AnswerRecord | None = None

    model_config = Record.model_config | {"populate_by_name": True}


class Capability(Record):
    """What the endpoint exposes and what its logprobs mean."""

    reachable: bool
    refused: str | None = Field(default=None, description="why no request can be answered, in one line")
    top_logprobs: int = Field(description="how many logprobs a position carries; 0 for none")
    temperature_regime: Literal["before_temperature", "after_temperature", "other", "unknown"]
    temperature_slope: Finite | None = Field(
        default=None, description="slope of gaps at temperature 2 on gaps at temperature 1"
    )
    logprobs_in_bfloat16: bool = Field(
        default=False, description="whether every logprob was rounded to bfloat16 before it was written"
    )
    usage_reported: bool
    model_named: str | None = None
    fingerprint: str | None = None
    quirks: list[str] = Field(default_factory=list)


# -- findings and verdict --------------------------------------------------------------------------------------


class Effect(Record):
    """An effect size with its interval."""

    name: str
    value: Finite
    low: Finite | None = None
    high: Finite | None = None
    unit: str
    confidence: Finite | None = None


class Finding(Record):
    """What one check concludes. ``family`` is the class of departure, such as ``int8``, where not more is known."""

    check: str
    version: int = 1
    axis: Axis
    outcome: Outcome
    cause: Cause | None = None
    exact_variant: str | None = None
    family: str | None = None
    summary: str
    effects: list[Effect] = Field(default_factory=list)
    log10_e_value: Finite | None = Field(default=None, description="evidence against the honest library")
    answers_used: int = 0
    not_excluded: list[str] = Field(default_factory=list)
    excluded: list[str] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)
    to_resolve: str | None = Field(default=None, description="what it would take to answer, where it is not answered")


class Findings(Record):
    """All findings of one judgement."""

    schema_: Literal["weighbridge/findings/1"] = Field(default="weighbridge/findings/1", alias="schema")
    weighbridge_version: str
    capability: Capability
    findings: list[Finding]

    model_config = Record.model_config | {"populate_by_name": True}


ControlKind = Literal["honest", "altered"]


class Control(Record):
    """An endpoint whose truth is known, audited the same night through the same client, and what came out."""

    kind: ControlKind
    endpoint: str
    verdict: VerdictWord
    cause: Cause | None
    as_expected: bool
    sentence: str


class Verdict(Record):
    """What the findings together say under a policy."""

    schema_: Literal["weighbridge/verdict/1"] = Field(default="weighbridge/verdict/1", alias="schema")
    weighbridge_version: str
    verdict: VerdictWord
    cause: Cause | None
    exact_variant: str | None
    family: str | None
    policy: str
    axes: dict[Axis, Outcome]
    level: EvidenceLevel | None = Field(default=None, description="of the evidence on the weights; None without any")
    not_excluded: list[str]
    excluded: list[str]
    sentence: str
    error_rate: str
    log10_e_value: Finite | None = Field(
        default=None, description="of the whole audit against an honest stack, prompt and sampling, when it stopped"
    )
    effective_noise_nats: Effect | None
    answers_used: int
    requests_sent: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Finite | None
    stopped_because: str
    endpoint_refused: bool
    observations_sha256: str
    controls: list[Control] = Field(default_factory=list, description="where one is not as expected, the night is void")

    model_config = Record.model_config | {"populate_by_name": True}


# -- reading ---------------------------------------------------------------------------------------------------


def read_toml(kind: type[AnyRecord], path: Path) -> AnyRecord:
    """Read a record from a TOML file.

    Raises
    ------
    ConfigurationError
        If the file is missing, is not TOML, or a field is unknown, missing or wrong: one line that names the
        file, the field and the remedy.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"there is no file {path}", "Check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error})", "Check the file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}", "Correct that line") from None
    except RecursionError:
        raise ConfigurationError(f"{path} is not TOML: it is nested too deep", "Correct it") from None
    return checked(kind, table, str(path))


def read_json(kind: type[AnyRecord], path: Path) -> AnyRecord:
    """Read a record from a JSON file.

    Raises
    ------
    ConfigurationError
        If the file cannot be read, is not JSON, or a field is unknown, missing or wrong.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})", "Check the file") from None
    except (ValueError, RecursionError):
        raise ConfigurationError(f"{path} is not JSON", "Restore it") from None
    return checked(kind, value, str(path))


def checked(kind: type[AnyRecord], value: object, where: str) -> AnyRecord:
    """Validate a value as a record; `where` names its origin in the error.

    Raises
    ------
    ConfigurationError
        Naming the first field that is wrong.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the table"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted((f.alias or n) for n, f in kind.model_fields.items()))
            # Of a table within it, it is not known here which fields that has.
            what_is = (
                f"; {kind.__name__.lower()} knows: {known}" if len(first["loc"]) == 1 else ", or correct its spelling"
            )
            raise ConfigurationError(f"{where}: unknown field {field}", f"Remove it{what_is}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{where}: field {field}: {message}", "Correct it and run again") from None
