"""Who answered: what is asked of a router, what is made of its words, and that none of them leads anywhere."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Ended, Weighbridge
from fault_server import (
    Answer,
    Call,
    FaultServer,
    Request,
    completion,
    gzip_bomb,
    html,
    large_body,
    not_utf8,
    nothing,
    redirect_to,
    refuses,
    says,
    silence,
    steady_top,
    truncated_json,
)
from weighbridge.capability import read_capability
from weighbridge.dialects import DIALECTS
from weighbridge.dialects.routes import LISTING, RECORDS, listing_path, observe_route, record_path, route_requests
from weighbridge.errors import ConfigurationError
from weighbridge.judge.case import Case
from weighbridge.judge.checks.route import check_route
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import judge
from weighbridge.keys import Key
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.records import (
    AnswerRecord,
    Endpoint,
    Exchange,
    ListedEndpoint,
    Listing,
    Message,
    Observation,
    PlannedRequest,
    Probe,
    Received,
    Sent,
    checked,
)
from weighbridge.transport import MAX_BODY_BYTES, Reply, Transport

MODEL = "acme/small-1"
LISTED = f"/v1/models/{MODEL}/endpoints"
NAME, SECRET = "SHOP_API_KEY", "sk-router-0123456789-abcdef"
few = settings(derandomize=True, deadline=None, max_examples=60)


def listed(provider: str, tag: str, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{provider} | {MODEL}", "provider_name": provider, "tag": tag, "quantization": "fp8", "context_length": 32768,
        "supported_parameters": ["logprobs", "top_logprobs", "seed"], "pricing": {"prompt": "0.00000002", "completion": "0.00000004"},
    } | more  # fmt: skip


LISTING_OF_TWO = {
    "data": {"id": MODEL, "name": "Small", "endpoints": [listed("Acme", "acme/fp8"), listed("Bolt AI", "bolt")]}
}


@dataclass
class Router:
    """What a fake OpenRouter says; numbers are canned, names and faults are not."""

    provider: str | None = "Acme"
    listing: Answer = field(default_factory=lambda: says(LISTING_OF_TWO))
    record: Answer | None = None
    answer_id: Callable[[int], object] = lambda number: f"gen-1764000000-{number}"
    native_prompt_tokens: int = 50
    attempts: int = 1
    logprobs: bool = True

    def __call__(self, call: Call) -> None:
        path = call.request.path
        if path in ("/v1/models", LISTED):
            self.listing(call)
        elif path.startswith("/v1/generation"):
            (self.record or self._known)(call)
        else:
            count = call.request.document.get("top_logprobs", 0) if self.logprobs else 0
            document = completion(steady_top(count) if count else None) | {
                "id": self.answer_id(call.request.number),
                "model": MODEL,
            }
            call.send_json(200, document | ({"provider": self.provider} if self.provider else {}))

    def _known(self, call: Call) -> None:
        call.send_json(200, {"data": self.record_of(call.request)})

    def record_of(self, request: Request) -> dict[str, Any]:
        return {
            "id": parse_qs(urlsplit(request.path).query)["id"][0], "provider_name": self.provider, "model": MODEL,
            "native_tokens_prompt": self.native_prompt_tokens, "native_tokens_completion": 1, "native_finish_reason": "length",
            "total_cost": 0.0000012, "provider_responses": [{"provider_name": self.provider, "status": 200}] * self.attempts,
        }  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("weighbridge.audit.RECORD_WAIT_S", 0.001)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


PINNED = 'router = "openrouter"\nprovider = "acme"'
UNPINNED = 'router = "openrouter"'
Audit = Callable[..., Ended]


@pytest.fixture
def audit(weighbridge_cli: Weighbridge, run: Path, tmp_path: Path) -> Audit:
    """`weighbridge audit` without a reference: who answered is asked all the same."""

    def audit(base_url: str, text: str = PINNED, max_requests: int = 8, command: str = "audit") -> Ended:
        file = tmp_path / "ENDPOINT.toml"
        file.write_text(
            f'name = "shop"\nbase_url = "{base_url}"\nmodel = "{MODEL}"\n{text}\n[limits]\nmax_requests = {max_requests}\ntimeout_s = 5\n',
            "utf-8",
        )
        return weighbridge_cli(command, file, *(["--out", run] if command == "audit" else []))

    return audit


def finding(run: Path) -> dict[str, Any]:
    findings = json.loads((run / "findings.json").read_bytes())["findings"]
    found: dict[str, Any] = next(f for f in findings if f["check"] == "route")
    return found


def sentence(run: Path) -> str:
    return str(json.loads((run / "verdict.json").read_bytes())["sentence"])


def observed(run: Path) -> dict[str, dict[str, Any]]:
    lines = (run / "observations.jsonl").read_bytes().splitlines()
    return {o["request_id"]: o for o in map(json.loads, lines)}


def asked(server: FaultServer) -> list[str]:
    """The paths of all GETs."""
    return [r.path for r in server.requests if not r.document]


def written(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


# -- what is sent ----------------------------------------------------------------------------------------------


def endpoint(**more: Any) -> Endpoint:
    given = {"name": "x", "base_url": "http://127.0.0.1:9/v1", "model": MODEL, "router": "openrouter"}
    return Endpoint.model_validate(given | more)


def body(asked_of: Endpoint, **more: Any) -> dict[str, Any]:
    probe = Probe(id="p", purpose="x", messages=[Message(role="user", content="x")])
    return DIALECTS["openai-chat"].body(
        asked_of, PlannedRequest(request_id="p", probe=probe, **more), temperature=1, top_logprobs=5, seed=1, prompt_ids=[1],
    )  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
def test_a_pinned_provider_stands_in_every_body_as_openrouter_spells_it(raw: bool) -> None:
    sent = body(endpoint(provider="acme"), raw=raw)
    assert sent["provider"] == {"only": ["acme"], "allow_fallbacks": False, "require_parameters": True}
    assert "provider" not in body(endpoint(), raw=raw)


@pytest.mark.parametrize(
    ("claimed", "stated"), [("fp8", ["fp8"]), ("bf16", ["bf16"]), ("16 bit", None), ("FP8", None), (None, None)]
)
def test_a_claimed_precision_is_asked_for_where_openrouter_has_a_word_for_it(
    claimed: str | None, stated: list[str] | None
) -> None:
    sent = body(endpoint(provider="acme", claimed_precision=claimed))["provider"]
    assert sent.get("quantizations") == stated
    assert set(sent) - {"quantizations"} == {"only", "allow_fallbacks", "require_parameters"}


def test_the_rest_of_the_body_is_the_same() -> None:
    pinned = body(endpoint(provider="acme"))
    del pinned["provider"]
    assert pinned == body(endpoint())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"provider": "Acme Inc"}, "provider"),
        ({"provider": "a" * 101}, "provider"),
        ({"provider": "acme", "extra_body": {"provider": {"order": ["bolt"]}}}, "extra_body"),
        ({"model": "small-1"}, "author/slug"),
        ({"model": "../keys"}, "author/slug"),
        ({"model": "acme/.."}, "author/slug"),
        ({"model": "acme/small/1"}, "author/slug"),
        ({"model": "acme/small?x=1"}, "author/slug"),
        ({"router": "some-router"}, "router"),
    ],
)
def test_what_cannot_be_pinned_is_refused_in_one_line(fields: dict[str, Any], named: str) -> None:
    given = {"name": "x", "base_url": "http://127.0.0.1:9/v1", "model": MODEL, "router": "openrouter"}
    with pytest.raises(ConfigurationError, match=named):
        checked(Endpoint, given | fields, "ENDPOINT.toml")


@pytest.mark.parametrize(
    ("url", "is_router"),
    [
        ("https://openrouter.ai/api/v1", True),
        ("https://eu.openrouter.ai/api/v1", True),
        ("https://OpenRouter.ai/api/v1", True),
        ("https://notopenrouter.ai/v1", False),
        ("https://openrouter.ai.example/v1", False),
        ("https://api.example.com/openrouter.ai", False),
    ],
)
def test_openrouter_is_known_by_its_host(url: str, is_router: bool) -> None:
    given = endpoint(base_url=url, router=None)
    assert given.on_openrouter is is_router
    assert given.unpinned is is_router
    assert not endpoint(base_url=url, router=None, provider="acme").unpinned
    assert listing_path(given) == (f"/models/{MODEL}/endpoints" if is_router else "/models")
    assert route_requests(given) == ([LISTING, *RECORDS] if is_router else [LISTING])


def test_the_plan_counts_what_is_asked_by_get() -> None:
    policy = load_policy("strict")
    routed, direct = (make_plan(e, policy, None).estimate for e in (endpoint(), endpoint(router=None)))
    assert routed.requests == direct.requests + len(RECORDS)
    assert routed.prompt_tokens == direct.prompt_tokens
    few_requests = make_plan(endpoint(limits={"max_requests": 2}), policy, None).estimate
    assert (few_requests.requests, few_requests.prompt_tokens) == (2, 0)


# -- a router's words ------------------------------------------------------------------------------------------


def test_a_pinned_route_that_is_honoured(audit: Audit, run: Path) -> None:
    with FaultServer(Router()) as server:
        audit(server.base_url, f'{PINNED}\nclaimed_precision = "bf16"')
        gets = asked(server)
        posts = [r for r in server.requests if r.document]
    assert server.requests[0].path == LISTED, "the claim is on record before anything is asked"
    assert gets[0] == LISTED
    assert len(gets) == 3, "two answers had been given when the records were asked for"
    assert all(r.document["provider"]["only"] == ["acme"] for r in posts)
    assert all(r.document["provider"]["quantizations"] == ["bf16"] for r in posts)
    found = finding(run)
    assert found["outcome"] == "consistent"
    assert "'Acme'" in found["summary"]
    assert found["details"]["claim"]["precision"] == "bf16"
    assert [e["quantization"] for e in found["details"]["claim"]["listed"]] == ["fp8"]
    assert {r["provider_named"] for r in found["details"]["records"]} == {"Acme"}
    assert "not pinned" not in sentence(run)


def test_what_is_asked_by_get_is_kept_as_any_exchange(audit: Audit, run: Path) -> None:
    with FaultServer(Router()) as server:
        audit(server.base_url)
    sent = written(run, "sent")
    assert (sent[0]["method"], sent[0]["path"], sent[0]["body"]) == ("GET", f"/models/{MODEL}/endpoints", {})
    assert sent[1]["method"] == "POST"
    assert json.loads(written(run, "received")[0]["body_text"]) == LISTING_OF_TWO
    assert len(sent) == len(server.requests) == 8, "a GET counts as a request"
    seen = observed(run)
    of_acme = seen[LISTING]["listing"]["endpoints"][0]
    assert of_acme == {
        "provider_name": "Acme", "tag": "acme/fp8", "quantization": "fp8", "context_length": 32768,
        "supported_parameters": ["logprobs", "top_logprobs", "seed"], "prices": {"prompt": "0.00000002", "completion": "0.00000004"},
    }  # fmt: skip
    record = seen[RECORDS[0]]["record"]
    assert record == {
        "answer_id": seen["capability-top-20"]["answer_id"], "provider_named": "Acme", "model_named": MODEL,
        "native_prompt_tokens": 50, "native_completion_tokens": 1, "native_finish_reason": "length", "total_cost_usd": 0.0000012,
        "provider_responses": 1,
    }  # fmt: skip


def test_another_provider_than_the_pinned_one_differs_by_its_route(audit: Audit, run: Path) -> None:
    with FaultServer(Router(provider="Bolt AI")) as server:
        ended = audit(server.base_url)
    found = finding(run)
    assert (found["outcome"], found["cause"]) == ("inconsistent", "route")
    assert "'Bolt AI'" in found["summary"]
    assert "'acme'" in found["summary"]
    verdict = json.loads((run / "verdict.json").read_bytes())
    assert (verdict["verdict"], verdict["cause"]) == ("differs", "route")
    assert ended.code == 1


def test_a_record_that_names_another_provider_than_its_answers_is_found(audit: Audit, run: Path) -> None:
    router = Router()
    router.record = lambda call: call.send_json(
        200, {"data": router.record_of(call.request) | {"provider_name": "Bolt AI"}}
    )
    with FaultServer(router) as server:
        audit(server.base_url)
    assert (finding(run)["outcome"], finding(run)["cause"]) == ("inconsistent", "route")
    assert finding(run)["details"]["providers"]["Bolt AI"] == 2


def test_a_route_that_is_not_pinned_is_no_providers(audit: Audit, run: Path) -> None:
    with FaultServer(Router()) as server:
        ended = audit(server.base_url, UNPINNED)
        assert all("provider" not in r.document for r in server.requests)
    found = finding(run)
    assert found["outcome"] == "not_supported"
    assert "`provider`" in found["to_resolve"]
    assert "route was not pinned" in sentence(run)
    assert "Acme" not in sentence(run)
    assert "route was not pinned" in ended.said


def test_a_router_that_answers_nobody_is_said_to_be_that(audit: Audit, run: Path) -> None:
    with FaultServer(lambda call: (says(LISTING_OF_TWO) if call.request.path == LISTED else refuses(401, "no"))(call)) as server:  # fmt: skip
        ended = audit(server.base_url, UNPINNED)
        assert asked(server) == [LISTED]
    assert ended.code == 4
    assert finding(run)["outcome"] == "error"


def test_differing_counts_and_more_than_one_attempt_are_told(audit: Audit, run: Path) -> None:
    with FaultServer(Router(native_prompt_tokens=61, attempts=2)) as server:
        audit(server.base_url)
    found = finding(run)
    assert found["outcome"] == "consistent"
    assert "61, not 50" in found["summary"]
    assert "more than one attempt" in found["summary"]
    assert [(r["native_prompt_tokens"], r["prompt_tokens"]) for r in found["details"]["records"]] == [(61, 50)] * 2


# -- listings that are missing or hostile ----------------------------------------------------------------------

WRONG_TYPES: tuple[object, ...] = (
    [], 3, None, {}, {"data": 3}, {"data": []}, {"data": {}}, {"data": {"endpoints": 7}}, {"data": {"endpoints": [3, None, []]}},
    {"data": {"endpoints": [{"provider_name": 3, "tag": [], "quantization": {}, "context_length": "many", "supported_parameters": 5, "pricing": []}]}},
    {"data": {"endpoints": [{"provider_name": "\x1b[31m" + "A" * 10**5, "context_length": -1, "supported_parameters": [1, {}, "x" * 10**4],
                             "pricing": {"prompt": 0.1, "y" * 999: "z" * 999}}] * 500}},
    {"error": {"message": "no such model"}},
)  # fmt: skip
BAD_BODIES: dict[str, Answer] = {
    "404": refuses(404, "no such model"), "500": refuses(500, "asleep"), "429": refuses(429, "later", retry_after="1000"),
    "html": html, "truncated": truncated_json, "not UTF-8": not_utf8, "nothing": nothing,
    "redirect": redirect_to("https://elsewhere.example/"), "large": large_body, "bomb": gzip_bomb,
    "deep": lambda call: call.send(200, b"[" * 10**6),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_BODIES)
def test_a_listing_that_cannot_be_read_stops_nothing(fault: str, audit: Audit, run: Path) -> None:
    with FaultServer(Router(listing=BAD_BODIES[fault])) as server:
        ended = audit(server.base_url)
        assert asked(server).count(LISTED) == 1, "one request, whatever comes of it"
        assert len(server.requests) == 8
    assert "Traceback" not in ended.err
    assert observed(run)[LISTING]["fault"] is not None
    assert finding(run)["outcome"] == "consistent", "the answers name the pinned provider by its slug"
    assert (run / "exchanges.jsonl").stat().st_size < MAX_BODY_BYTES


@pytest.mark.parametrize("document", WRONG_TYPES)
def test_a_listing_of_wrong_types_is_no_listing(document: object, audit: Audit, run: Path) -> None:
    with FaultServer(Router(listing=says(document))) as server:
        ended = audit(server.base_url)
    assert "Traceback" not in ended.err
    assert finding(run)["outcome"] == "consistent"
    assert len((run / "findings.json").read_bytes()) < 64 * 1024
    assert "\x1b" not in (run / "observations.jsonl").read_text("utf-8")


def test_without_a_listing_nobody_is_accused_for_a_name(audit: Audit, run: Path) -> None:
    with FaultServer(Router(provider="Bolt AI", listing=BAD_BODIES["404"])) as server:
        audit(server.base_url)
    assert finding(run)["outcome"] == "inconclusive"
    assert "'Bolt AI'" in finding(run)["summary"]


def test_silence_on_a_listing_ends_in_time(audit: Audit, run: Path, tmp_path: Path) -> None:
    with FaultServer(Router(listing=silence)) as server:
        reply = asyncio.run(fetched(server.base_url, "/models", timeout_s=0.2))
    assert reply.failure == "timeout"


# -- records that are late, absent or hostile ------------------------------------------------------------------


def test_a_record_that_is_late_is_asked_for_once_more(audit: Audit, run: Path) -> None:
    router = Router()
    times: dict[str, int] = {}

    def late(call: Call) -> None:
        times[call.request.path] = times.get(call.request.path, 0) + 1
        if times[call.request.path] == 1:
            refuses(404, "not yet")(call)
        else:
            call.send_json(200, {"data": router.record_of(call.request)})

    router.record = late
    with FaultServer(router) as server:
        audit(server.base_url)
    assert list(times.values()) == [2, 2]
    assert observed(run)[RECORDS[0]]["attempts"] == 2
    assert finding(run)["outcome"] == "consistent"
    assert len(finding(run)["details"]["records"]) == 2


@pytest.mark.parametrize("fault", BAD_BODIES)
def test_records_that_are_not_there_or_cannot_be_read_stop_nothing(fault: str, audit: Audit, run: Path) -> None:
    with FaultServer(Router(record=BAD_BODIES[fault])) as server:
        ended = audit(server.base_url, max_requests=10)
        gets = asked(server)
        assert len(server.requests) == 10
    assert "Traceback" not in ended.err
    assert len(gets) <= 1 + 2 * 2
    assert finding(run)["outcome"] == "consistent"
    assert "records" not in finding(run)["details"]


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "gen-of-another"}, {"id": None}, {"id": ["x"]}, {"provider_name": 7, "native_tokens_prompt": "50", "total_cost": "x"},
        {"total_cost": -1, "provider_responses": 5}, {"total_cost": 10**400, "native_tokens_prompt": 10**400},
        {"model": "\x1b" + "m" * 10**5, "native_finish_reason": {"a": []}},
    ],
)  # fmt: skip
def test_a_hostile_record_is_read_as_far_as_it_is_one(changed: dict[str, Any], audit: Audit, run: Path) -> None:
    router = Router()
    router.record = lambda call: call.send_json(200, {"data": router.record_of(call.request) | changed})
    with FaultServer(router) as server:
        ended = audit(server.base_url)
    assert "Traceback" not in ended.err
    assert finding(run)["outcome"] == "consistent"
    record = observed(run)[RECORDS[0]]["record"]
    assert (record is None) == ("id" in changed)
    if record is not None:
        assert len(json.dumps(record)) < 1000


PATHS = (
    "../keys", "gen/../../x", "gen-1?x=1", "gen-1&id=2", "gen-1#x", "gen%2f1", "gen 1", "gen\r\nx: y", "", "x" * 101, "gen-é", "..",
    7, None, ["gen-1"], {"id": "gen-1"},
)  # fmt: skip


@pytest.mark.parametrize("answer_id", PATHS)
def test_an_answers_name_that_is_no_name_is_never_sent(answer_id: object, audit: Audit, run: Path) -> None:
    with FaultServer(Router(answer_id=lambda _: answer_id)) as server:
        audit(server.base_url)
        assert asked(server) == [LISTED]
    assert {o["answer_id"] for o in observed(run).values()} == {None}


def test_at_most_three_records_are_asked_for_and_not_those_of_the_last_answers(
    weighbridge_cli: Weighbridge, reference: str, run: Path, tmp_path: Path
) -> None:
    """Against a reference, ten answers to prompts of different structure come before."""
    file = tmp_path / "ENDPOINT.toml"
    with FaultServer(Router(logprobs=False)) as server:
        file.write_text(
            f'name = "shop"\nbase_url = "{server.base_url}"\nmodel = "{MODEL}"\nreference = "{reference}"\n{PINNED}\n[limits]\nmax_requests = 60\n',
            "utf-8",
        )
        weighbridge_cli("audit", file, "--seed", "route", "--out", run)
        first = next(i for i, r in enumerate(server.requests) if r.path.startswith("/v1/generation"))
        posts = [r for r in server.requests[:first] if r.document]
        gets = asked(server)
    assert len(gets) == 4
    assert gets[1] == f"/v1/generation?id=gen-1764000000-{posts[0].number}"
    asked_for = [int(path.rsplit("-", 1)[1]) for path in gets[1:]]
    assert len(posts) > 10
    assert max(asked_for) < posts[-1].number - 2
    assert "not pinned" not in sentence(run)


# -- the key, redirects, and what is asked again ---------------------------------------------------------------


def test_the_key_goes_to_the_origin_and_into_no_file(audit: Audit, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, SECRET)
    router = Router(listing=says({"data": {"id": SECRET, "endpoints": [listed(f"Acme {SECRET}", f"acme/{SECRET}")]}}))
    router.record = lambda call: call.send_json(200, {"data": router.record_of(call.request) | {"model": SECRET}})
    with FaultServer(router) as server:
        ended = audit(server.base_url, f'{PINNED}\napi_key_env = "{NAME}"')
        assert {r.bearer for r in server.requests} == {SECRET}
        assert len(asked(server)) == 3
    texts = [ended.out, ended.err, *(p.read_text("utf-8", "replace") for p in run.rglob("*") if p.is_file())]
    assert not any(SECRET in text.replace("\n", "") for text in texts)


def test_an_answer_that_is_called_by_the_key_is_not_asked_for(
    audit: Audit, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, SECRET)
    with FaultServer(Router(answer_id=lambda _: SECRET)) as server:
        audit(server.base_url, f'{PINNED}\napi_key_env = "{NAME}"')
        assert asked(server) == [LISTED]


def test_a_redirect_of_a_listing_is_not_followed(audit: Audit, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, SECRET)
    with FaultServer(html) as elsewhere:
        with FaultServer(Router(listing=redirect_to(f"{elsewhere.base_url}/x"))) as server:
            audit(server.base_url, f'{PINNED}\napi_key_env = "{NAME}"')
        assert elsewhere.requests == []
    assert observed(run)[LISTING]["fault"] == "redirect"


async def fetched(base_url: str, path: str, timeout_s: float = 5.0) -> Reply:
    async with Transport(endpoint(base_url=base_url, limits={"timeout_s": timeout_s}), Key(SECRET)) as transport:
        return await transport.get(path)


def test_a_get_carries_its_query_as_quoted_and_no_body() -> None:
    with FaultServer(says({})) as server:
        reply = asyncio.run(fetched(server.base_url, record_path("a b&id=c/../d?#%")))
        request = server.requests[0]
    assert reply.status == 200
    assert urlsplit(request.path).path == "/v1/generation"
    assert parse_qs(urlsplit(request.path).query) == {"id": ["a b&id=c/../d?#%"]}
    assert request.bearer == SECRET
    assert not {"content-type", "content-length"} & set(request.headers)


@pytest.mark.parametrize("answer", [large_body, gzip_bomb])
def test_a_get_is_bounded(answer: Answer) -> None:
    with FaultServer(answer) as server:
        reply = asyncio.run(fetched(server.base_url, "/models", timeout_s=30))
    assert reply.failure == "too_large"
    assert reply.body is not None
    assert len(reply.body) < MAX_BODY_BYTES


@pytest.mark.parametrize("kept", [0, 1, 2, 4, 6, 7, 8, 9, 10, 12])
def test_after_a_kill_nothing_that_came_back_is_asked_again(
    kept: int, audit: Audit, run: Path, weighbridge_cli: Weighbridge
) -> None:
    """A kill leaves the log's first lines: listing, two calls and two records are ten of them."""
    with FaultServer(Router()) as server:
        audit(server.base_url)
        whole = (finding(run), asked(server))
        log = run / "exchanges.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join(lines[:kept]))
        came_back = {json.loads(line)["request_id"] for line in lines[:kept] if json.loads(line)["event"] == "received"}
        sent = {e["request_id"]: f"/v1{e['path']}" for e in map(json.loads, lines) if e["event"] == "sent"}
        before = len(server.requests)
        assert weighbridge_cli("resume", run, "--max-requests", "9").code != 70
        again = [r.path for r in server.requests[before:] if not r.document]
    assert not set(again) & {sent[name] for name in came_back}
    # What was answered anew has other names.
    assert len(again) + len(came_back & {LISTING, *RECORDS}) == len(whole[1])
    assert finding(run)["outcome"] == whole[0]["outcome"]


def test_a_replay_gives_the_same_bytes(audit: Audit, run: Path, weighbridge_cli: Weighbridge) -> None:
    with FaultServer(Router(native_prompt_tokens=51)) as server:
        audit(server.base_url)
    before = {name: (run / name).read_bytes() for name in ("observations.jsonl", "findings.json", "verdict.json")}
    weighbridge_cli("replay", run)
    assert before == {name: (run / name).read_bytes() for name in before}


def test_a_run_of_an_earlier_version_can_be_read(audit: Audit, run: Path, weighbridge_cli: Weighbridge) -> None:
    with FaultServer(Router()) as server:
        audit(server.base_url, "")
    plan = json.loads((run / "plan.json").read_bytes())
    del plan["route_requests"], plan["endpoint"]["router"], plan["endpoint"]["provider"]
    (run / "plan.json").write_text(json.dumps(plan), "utf-8")
    kept = []
    for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines():
        event = json.loads(line)
        if event.get("request_id") != LISTING:
            kept.append(json.dumps({k: v for k, v in event.items() if k not in ("method", "path")}) + "\n")
    (run / "exchanges.jsonl").write_text("".join(kept), "utf-8")
    ended = weighbridge_cli("replay", run)
    assert "Traceback" not in ended.err
    assert finding(run)["outcome"] == "consistent"


# -- endpoints that are no routers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listing", "details"),
    [
        (says({"object": "list", "data": [{"id": "other"}, {"id": MODEL}]}), {"models": 2, "names_model": True}),
        (says({"object": "list", "data": [{"id": "other"}, 7]}), {"models": 2, "names_model": False}),
        (refuses(404, "not found"), None),
        (html, None),
        (says({"data": {"id": MODEL}}), None),
    ],
)
def test_an_ordinary_endpoints_listing_is_recorded_and_decides_nothing(
    listing: Answer, details: dict[str, Any] | None, audit: Audit, run: Path
) -> None:
    with FaultServer(Router(provider=None, listing=listing)) as server:
        audit(server.base_url, "")
        assert asked(server) == ["/v1/models"]
        assert all("provider" not in r.document for r in server.requests)
    found = finding(run)
    assert found["outcome"] == "consistent"
    assert found["summary"] == f"Every answer names '{MODEL}'; a name is the host's own word"
    assert found["details"].get("listing") == details
    assert "not pinned" not in sentence(run)


def test_an_ordinary_endpoint_that_answers_nobody_is_asked_for_nothing_else(audit: Audit, run: Path) -> None:
    with FaultServer(refuses(401, "no")) as server:
        assert audit(server.base_url, "").code == 4
        assert len(server.requests) == 1


# -- the check by itself ---------------------------------------------------------------------------------------


def answer(name: str, provider: str | None, model: str = MODEL, tokens: int | None = 50) -> Observation:
    return Observation(
        request_id=name, probe_id=name, answered=True, attempts=1, latency_s=0.1, answer_id=f"gen-{name}", model_named=model,
        provider_named=provider, prompt_tokens=tokens,
    )  # fmt: skip


def of_listing(*pairs: tuple[str, str]) -> Observation:
    endpoints = [
        ListedEndpoint(provider_name=name, tag=tag, quantization="fp8", context_length=1, supported_parameters=[], prices={})
        for name, tag in pairs
    ]  # fmt: skip
    return Observation(
        request_id=LISTING,
        probe_id=LISTING,
        answered=True,
        attempts=1,
        latency_s=0.1,
        listing=Listing(endpoints=endpoints),
    )


def of_record(provider: str | None, attempts: int = 1) -> Observation:
    record = AnswerRecord(
        answer_id="gen-capability-top-20", provider_named=provider, model_named=MODEL, native_prompt_tokens=50,
        native_completion_tokens=1, native_finish_reason=None, total_cost_usd=None, provider_responses=attempts,
    )  # fmt: skip
    return Observation(
        request_id=RECORDS[0], probe_id=RECORDS[0], answered=True, attempts=1, latency_s=0.1, record=record
    )


def case(asked_of: Endpoint, *seen: Observation) -> Case:
    by_id = {o.request_id: o for o in seen}
    plan = make_plan(asked_of, load_policy("strict"), None)
    return open_case(plan, read_capability(by_id), seen, None)


FIRST, SECOND = "capability-top-20", "capability-temperature"
TWO = (("Acme", "acme/fp8"), ("Bolt AI", "bolt"))


@pytest.mark.parametrize(
    ("provider", "router", "seen", "outcome", "cause"),
    [
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, "Acme")], "consistent", None),
        ("acme/fp8", "openrouter", [of_listing(*TWO), answer(FIRST, "Acme")], "consistent", None),
        ("bolt", "openrouter", [of_listing(*TWO), answer(FIRST, "Bolt AI")], "consistent", None),
        ("bolt-ai", "openrouter", [answer(FIRST, "Bolt AI")], "consistent", None),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, "Bolt AI")], "inconsistent", "route"),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, "Acme"), answer(SECOND, "Cobalt")], "inconsistent", "route"),
        ("acme", "openrouter", [of_listing(("Bolt AI", "bolt")), answer(FIRST, "Bolt AI")], "inconsistent", "route"),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, None), of_record("Bolt AI")], "inconsistent", "route"),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, None), of_record("Acme")], "consistent", None),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, "Acme Cloud")], "inconclusive", None),
        ("acme", "openrouter", [of_listing(("Bolt AI", "bolt")), answer(FIRST, "Cobalt")], "inconclusive", None),
        ("acme", "openrouter", [answer(FIRST, "Cobalt")], "inconclusive", None),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, None)], "inconclusive", None),
        ("acme", "openrouter", [of_listing(*TWO), answer(FIRST, "Acme", "acme/large-2")], "inconclusive", None),
        ("acme", None, [answer(FIRST, "Acme")], "consistent", None),
        (None, "openrouter", [of_listing(*TWO), answer(FIRST, "Acme")], "not_supported", None),
        (None, "openrouter", [answer(FIRST, None)], "not_supported", None),
        (None, "openrouter", [answer(FIRST, "Acme"), answer(SECOND, "Bolt AI")], "inconclusive", None),
        (None, "openrouter", [answer(FIRST, "Acme"), of_record("Bolt AI")], "inconclusive", None),
        (None, None, [answer(FIRST, "Acme"), answer(SECOND, "Bolt AI")], "inconclusive", None),
        (None, None, [answer(FIRST, "Acme")], "consistent", None),
        (None, None, [answer(FIRST, None, "acme/large-2")], "inconclusive", None),
        (None, "openrouter", [], "error", None),
    ],
)  # fmt: skip
def test_what_names_come_to(
    provider: str | None, router: str | None, seen: list[Observation], outcome: str, cause: str | None
) -> None:
    found = check_route(case(endpoint(provider=provider, router=router), *seen))
    assert (found.outcome, found.cause) == (outcome, cause)
    assert (found.to_resolve is not None) == (outcome in ("inconclusive", "not_supported"))


def test_several_providers_are_listed() -> None:
    found = check_route(case(endpoint(), answer(FIRST, "Acme"), answer(SECOND, "Bolt AI")))
    assert "'Acme', 'Bolt AI'" in found.summary
    assert found.details["providers"] == {"Acme": 1, "Bolt AI": 1}


@pytest.mark.parametrize(("provider", "said"), [(None, True), ("acme", False)])
def test_a_verdict_says_where_the_route_was_not_pinned_and_stays_as_it_is(provider: str | None, said: bool) -> None:
    one = case(endpoint(provider=provider), of_listing(*TWO), answer(FIRST, "Acme"))
    _, verdict = judge(
        one, requests_sent=1, stopped_because="decided", all_observations=[], observations_sha256="0" * 64
    )
    assert verdict.verdict == "inconclusive"
    assert ("The route was not pinned" in verdict.sentence) is said


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["data", "id", "endpoints", "provider_name", "tag", "pricing", "supported_parameters", "total_cost", "provider_responses"]),
        inner, max_size=5,
    ),
    max_leaves=20,
)  # fmt: skip


@few
@given(
    document=anything, request_id=st.sampled_from([LISTING, RECORDS[0]]), router=st.sampled_from(["openrouter", None])
)
def test_no_listing_and_no_record_breaks_the_reading(document: object, request_id: str, router: str | None) -> None:
    received = Received(
        request_id=request_id, attempt=1, status=200, headers={}, body_text=json.dumps(document), latency_s=0.1
    )
    sent = Sent(request_id=request_id, attempt=1, sent_at="2026-11-22T00:00:00Z", method="GET", path="/generation?id=x")
    exchange = Exchange(sent=sent, received=received)
    read = observe_route(request_id, [exchange], endpoint(router=router))
    assert read.answered == (read.listing is not None or read.record is not None)
    plan = make_plan(endpoint(), load_policy("strict"), None)
    assert list(observe(plan, [exchange])) == [request_id]
