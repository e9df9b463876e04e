"""What a host says of itself when it is asked by GET: its listing, which is its claim, and a router's record of an answer."""

from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from weighbridge.dialects.reading import bounded, count, read_object
from weighbridge.records import AnswerRecord, Endpoint, Exchange, ListedEndpoint, Listing, Observation

LISTING = "route-listing"
RECORDS = ("route-record-1", "route-record-2", "route-record-3")
# What is read of a router's record; the rest of it is about the account of who asked.
RECORD_FIELDS = (
    "id", "provider_name", "model", "native_tokens_prompt", "native_tokens_completion", "native_finish_reason", "total_cost",
    "provider_responses",
)  # fmt: skip
_MAX_LISTED = 200
_MAX_PARAMETERS = 100
_MAX_PRICES = 20


def route_requests(endpoint: Endpoint) -> list[str]:
    """What may be asked, in order: a listing of every host, records of answers of a router."""
    return [LISTING, *RECORDS] if endpoint.on_openrouter else [LISTING]


def listing_path(endpoint: Endpoint) -> str:
    """Where a router lists who serves the model, and any other host its models."""
    return f"/models/{quote(endpoint.model, safe='/:')}/endpoints" if endpoint.on_openrouter else "/models"


def record_path(answer_id: str) -> str:
    """Where OpenRouter keeps its record of an answer."""
    return f"/generation?{urlencode({'id': answer_id})}"


def observe_route(request_id: str, attempts: list[Exchange], endpoint: Endpoint) -> Observation:
    """Read the last attempt. Whatever the host sent, this returns an observation and never raises."""
    last = attempts[-1]
    document, fault, detail = read_object(last.received)
    listing: Listing | None = None
    record: AnswerRecord | None = None
    if fault is None and request_id == LISTING:
        read = _endpoints if endpoint.on_openrouter else _models
        listing = read(document.get("data"), endpoint.model)
        if listing is None:
            fault, detail = "no_listing", "the answer lists nothing"
    elif fault is None:
        record = _record(document.get("data"), last.sent.path or "")
        if record is None:
            fault, detail = "no_record", "the answer is no record of what was asked for"
    return Observation(
        request_id=request_id, probe_id=request_id, answered=fault is None, fault=fault, fault_detail=detail,
        status=last.received.status, attempts=len(attempts), latency_s=last.received.latency_s, listing=listing, record=record,
    )  # fmt: skip


def _endpoints(data: Any, model: str) -> Listing | None:
    """OpenRouter's listing of one model: who serves it, and what each says of itself."""
    listed = data.get("endpoints") if isinstance(data, dict) else None
    if not isinstance(listed, list):
        return None
    return Listing(
        endpoints=[_endpoint(e) for e in listed[:_MAX_LISTED] if isinstance(e, dict)],
        names_model=data.get("id") == model,
    )


def _endpoint(entry: dict[str, Any]) -> ListedEndpoint:
    parameters, pricing = entry.get("supported_parameters"), entry.get("pricing")
    parameters = parameters[:_MAX_PARAMETERS] if isinstance(parameters, list) else []
    pricing = list(pricing.items())[:_MAX_PRICES] if isinstance(pricing, dict) else []
    return ListedEndpoint(
        provider_name=bounded(entry.get("provider_name")),
        tag=bounded(entry.get("tag")),
        quantization=bounded(entry.get("quantization")),
        context_length=count(entry.get("context_length")),
        supported_parameters=[text for value in parameters if (text := bounded(value)) is not None],
        prices={
            name: text
            for key, value in pricing
            if (name := bounded(key)) is not None and (text := bounded(value)) is not None
        },
    )


def _models(data: Any, model: str) -> Listing | None:
    """OpenAI's listing of a host's models."""
    if not isinstance(data, list):
        return None
    return Listing(models=len(data), names_model=any(isinstance(e, dict) and e.get("id") == model for e in data))


def _record(data: Any, path: str) -> AnswerRecord | None:
    """OpenRouter's record of an answer, where it is that of the one that was asked for."""
    asked = parse_qs(urlsplit(path).query).get("id", [])
    if not isinstance(data, dict) or [data.get("id")] != asked:
        return None
    cost: Any = data.get("total_cost")
    responses = data.get("provider_responses")
    billed = isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 1e9
    return AnswerRecord(
        answer_id=asked[0],
        provider_named=bounded(data.get("provider_name")),
        model_named=bounded(data.get("model")),
        native_prompt_tokens=count(data.get("native_tokens_prompt")),
        native_completion_tokens=count(data.get("native_tokens_completion")),
        native_finish_reason=bounded(data.get("native_finish_reason")),
        total_cost_usd=float(cost) if billed else None,
        provider_responses=len(responses) if isinstance(responses, list) else None,
    )
