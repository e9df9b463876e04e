"""Anthropic-style messages: what is asked, that no answer breaks the reading, and a real server's answers."""

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Ended, Weighbridge
from fault_server import (
    MODEL,
    Answer,
    Call,
    FaultServer,
    gzip_bomb,
    html,
    large_body,
    message,
    redirect_to,
    refuses,
    says,
)
from test_dialect import ESCAPES, WRONG, few, json_values, slots, with_slot
from weighbridge.canonical import canonical_bytes, rounded
from weighbridge.capability import capability_requests
from weighbridge.dialects import DIALECTS
from weighbridge.dialects.anthropic_messages import ABOUT_SEEDS, AnthropicMessages
from weighbridge.dialects.openai_chat import OpenAIChat
from weighbridge.keys import Key, key_for
from weighbridge.lab.process import ModelServer
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import VARIANTS
from weighbridge.records import (
    Endpoint,
    Exchange,
    Message,
    Observation,
    PlannedRequest,
    Probe,
    Received,
    Sent,
    raw_twin,
)
from weighbridge.reference.bundle import load_bundle
from weighbridge.sampling import sampling_requests
from weighbridge.transport import MAX_BODY_BYTES, Reply, Transport

DIALECT = AnthropicMessages()
NAME = "SHOP_API_KEY"
TOKEN_NAME = "SHOP_AUTH_TOKEN"
SECRET = "sk-ant-te/st+0123456789=abcdefghijklmnop"
WITHOUT_ANSWER = {"html", "truncated_json", "not_json", "not_an_object", "error_object", "no_content"}


def answer(**more: Any) -> dict[str, Any]:
    """A whole, valid answer, with every kind of block that is read."""
    return {
        "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "type": "message",
        "role": "assistant",
        "model": "some-model",
        "content": [
            {"type": "thinking", "thinking": "A word?", "signature": "c2ln"},
            {"type": "text", "text": "Har"},
            {"type": "text", "text": "bour"},
        ],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 12,
            "cache_creation_input_tokens": 8,
            "cache_read_input_tokens": 20,
            "output_tokens": 5,
        },
    } | more


def plain(text: str = "Harbour", **more: Any) -> dict[str, Any]:
    """An answer with one text and nothing from a cache."""
    usage = {"input_tokens": 40, "output_tokens": 5}
    return answer(content=[{"type": "text", "text": text}] if text else [], usage=usage, **more)


STREAM: list[dict[str, Any]] = [
    {
        "type": "message_start",
        "message": answer(content=[], stop_reason=None, usage={"input_tokens": 12, "cache_read_input_tokens": 28, "output_tokens": 1}),
    },
    {"type": "ping"},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "A word?"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "c2ln"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Har"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "bour"}},
    {"type": "content_block_stop", "index": 1},
    {"type": "message_delta", "delta": {"stop_reason": "max_tokens", "stop_sequence": None}, "usage": {"output_tokens": 5}},
    {"type": "message_stop"},
]  # fmt: skip


def events(*documents: Any, end: str = "\n\n") -> str:
    return "".join(f"event: {d.get('type')}\ndata: {json.dumps(d, ensure_ascii=False)}{end}" for d in documents)


def attempt(number: int = 1, **received: Any) -> Exchange:
    facts: dict[str, Any] = {"status": 200, "headers": {}, "latency_s": 0.25} | received
    return Exchange(
        sent=Sent(request_id="probe-0001", attempt=number, sent_at="2026-01-01T00:00:00Z", body={"messages": []}),
        received=Received(request_id="probe-0001", attempt=number, **facts),
    )


def observe(body: str, **received: Any) -> Observation:
    return DIALECT.observe("p-1", [attempt(body_text=body, **received)])


def observe_json(value: Any, **received: Any) -> Observation:
    return observe(json.dumps(value), **received)


def assert_sane(observation: Observation) -> None:
    """What every observation holds, whatever was sent."""
    for text in (
        observation.fault_detail, observation.model_named, observation.provider_named, observation.finish_reason,
    ):  # fmt: skip
        assert text is None or (text.isprintable() and len(text) <= 1000)
    for count in (observation.prompt_tokens, observation.completion_tokens, observation.cached_tokens):
        assert count is None or 0 <= count < 10**9
    assert observation.text is None or len(observation.text) <= 2000
    assert observation.top is None
    assert observation.positions is None
    assert observation.answered == (observation.fault in ("no_logprobs", "end_of_turn"))
    known = WITHOUT_ANSWER | {"redirect"}
    assert observation.answered or observation.fault in known or str(observation.fault)[:5] == "http_"
    assert canonical_bytes(rounded(observation.model_dump(mode="json", by_alias=True)))


# -- asking ----------------------------------------------------------------------------------------------------


def endpoint(**more: Any) -> Endpoint:
    given = {"name": "e", "base_url": "https://api.example.com/v1", "model": "some-model"} | more
    return Endpoint(dialect="anthropic-messages", **given)


def request(*messages: tuple[str, str], **more: Any) -> PlannedRequest:
    said = [
        Message.model_validate({"role": role, "content": content})
        for role, content in messages or [("user", "Say a word.")]
    ]
    probe = Probe(id="p", purpose="a probe", messages=said, tools=more.pop("tools", None))
    return PlannedRequest(request_id=more.pop("request_id", "p"), probe=probe, **more)


def body(planned: PlannedRequest, asked: Endpoint | None = None, temperature: float = 1.0) -> dict[str, Any]:
    return DIALECT.body(
        asked or endpoint(), planned, temperature=temperature, top_logprobs=20, seed=7, prompt_ids=[5, 6, 7]
    )


PLAIN = {
    "model": "some-model", "max_tokens": 1, "temperature": 1.0, "stream": False,
    "messages": [{"role": "user", "content": "Say a word."}],
}  # fmt: skip


def test_the_dialect_is_registered() -> None:
    assert isinstance(DIALECTS[endpoint().dialect], AnthropicMessages)
    assert DIALECT.path(request()) == "/messages"


def test_nothing_is_asked_that_the_api_lacks() -> None:
    assert body(request()) == PLAIN
    lacking = {
        "seed": 2,
        "n": 2,
        "logit_bias": {"5": 100},
        "presence_penalty": 2.0,
        "reasoning_effort": "low",
        "min_p": 1.0,
    }
    assert body(request(settings=lacking)) == PLAIN
    assert body(request(settings={"stream": True, "stream_options": {"include_usage": True}})) == PLAIN | {
        "stream": True
    }


def test_what_is_said_to_the_system_has_a_field_of_its_own() -> None:
    talk = [("user", "One."), ("assistant", "Two."), ("user", "Three.")]
    sent = body(request(("system", "Be brief."), *talk))
    assert sent["system"] == "Be brief."
    assert [(m["role"], m["content"]) for m in sent["messages"]] == talk
    assert "system" not in body(request(*talk))


def test_two_texts_to_the_system_are_not_glued_together() -> None:
    sent = body(request(("system", "Be brief."), ("system", "Be kind."), ("user", "One.")))
    assert sent["system"] == [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]


def test_a_text_to_the_system_within_a_conversation_stays_where_it_is() -> None:
    talk = [("user", "One."), ("system", "Be brief."), ("user", "Three.")]
    sent = body(request(*talk))
    assert "system" not in sent
    assert [(m["role"], m["content"]) for m in sent["messages"]] == talk


def test_tools_are_told_in_the_apis_own_shape() -> None:
    schema = {"type": "object", "properties": {"place": {"type": "string"}}}
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True}
    tools = [{"type": "function", "function": function}, {"type": "function", "function": {"name": "g"}}]
    assert body(request(tools=tools))["tools"] == [
        {"name": "f", "description": "d", "input_schema": schema},
        {"name": "g", "input_schema": {"type": "object"}},
    ]
    own = [{"name": "h", "input_schema": schema}]
    assert body(request(tools=own))["tools"] == own
    assert "tools" not in body(request())


@pytest.mark.parametrize("stop", ["e", ["e"]])
def test_a_stop_has_the_apis_own_name(stop: Any) -> None:
    assert body(request(settings={"stop": stop})) == PLAIN | {"stop_sequences": ["e"]}


def test_what_narrows_the_choice_is_sent_only_where_a_request_states_it() -> None:
    assert not {"top_p", "top_k"} & set(body(request()))
    narrow = {"top_p": 0.01, "top_k": 1}
    assert body(request(settings=narrow)) == PLAIN | narrow
    # No smaller number than 0 is a top_k here.
    assert body(request(settings={"top_p": 1, "top_k": -1, "min_p": 0})) == PLAIN | {"top_p": 1}


def test_a_temperature_out_of_range_is_never_bent_into_it() -> None:
    assert body(request(settings={"temperature": 2.0}))["temperature"] == 2.0
    assert body(request(), temperature=2.0)["temperature"] == 2.0


def test_what_a_user_adds_is_sent_and_what_a_request_is_about_wins() -> None:
    asked = endpoint(extra_body={"top_k": 0, "temperature": 0.5, "thinking": {"type": "disabled"}})
    assert body(request(), asked) == PLAIN | asked.extra_body
    assert body(request(settings={"temperature": 0.0}), asked)["temperature"] == 0.0


def test_a_provider_is_pinned_as_in_the_other_dialect() -> None:
    router = {"router": "openrouter", "provider": "acme", "model": "a/b"}
    routed = Endpoint.model_validate({"name": "e", "base_url": "https://openrouter.ai/api/v1", **router})
    other = OpenAIChat().body(routed, request(), temperature=1.0, top_logprobs=0, seed=7, prompt_ids=[])
    assert body(request(), endpoint(**router))["provider"] == other["provider"]


def test_only_requests_that_make_sense_here_are_asked() -> None:
    planned = sampling_requests(load_bundle("smollm2-135m-instruct"), "nonce")
    names = {r.request_id.removeprefix("sampling-") for r in planned}
    assert {r.request_id.removeprefix("sampling-") for r in planned if not DIALECT.asks(r)} == {
        "warm-again", "warm-new", "hot", "hot-drawer", "min-p", "frequency", "presence", "two", "bias", "effort-low",
        "effort-high",
    }  # fmt: skip
    assert {name.removeprefix("sampling-") for name in ABOUT_SEEDS} <= names
    assert all(DIALECT.asks(r) for r in capability_requests())
    assert all(OpenAIChat().asks(r) for r in [*planned, raw_twin(request()), request(forced=True)])


def test_neither_tokens_nor_forced_text_are_asked() -> None:
    assert DIALECT.asks(request())
    assert not DIALECT.asks(raw_twin(request()))
    assert not DIALECT.asks(request(forced=True))
    assert (DIALECT.gives_logprobs, OpenAIChat().gives_logprobs) == (False, True)


# -- reading a valid answer ------------------------------------------------------------------------------------


def test_a_valid_answer_is_read() -> None:
    assert observe_json(answer()).model_dump(exclude_defaults=True) == {
        "request_id": "probe-0001", "probe_id": "p-1", "answered": True, "fault": "no_logprobs",
        "fault_detail": "the answer carries no logprobs: this kind of API has none",
        "status": 200, "attempts": 1, "latency_s": 0.25, "answer_id": "msg_01XFDUDYJgAACzvnptvVoYEL",
        "model_named": "some-model", "finish_reason": "max_tokens", "prompt_tokens": 40, "completion_tokens": 5,
        "cached_tokens": 20, "shows_reasoning": True, "text": "Harbour", "quirks": ["prompt_tokens_summed"],
    }  # fmt: skip
    assert_sane(observe_json(answer()))


def test_a_prompt_is_counted_whole_wherever_it_came_from() -> None:
    counts = [
        ({"input_tokens": 12}, 12, None, []),
        ({"input_tokens": 12, "cache_read_input_tokens": 0, "cache_creation_input_tokens": None}, 12, 0, []),
        ({"input_tokens": 0, "cache_read_input_tokens": 12}, 12, 12, ["prompt_tokens_summed"]),
        ({"input_tokens": 2, "cache_creation_input_tokens": 10}, 12, None, ["prompt_tokens_summed"]),
        ({"cache_read_input_tokens": 12}, None, 12, ["prompt_tokens_summed"]),
        ({"prompt_tokens": 12}, None, None, []),
    ]
    for usage, prompt, cached, quirks in counts:
        seen = observe_json(answer(usage=usage))
        assert (seen.prompt_tokens, seen.cached_tokens, seen.quirks) == (prompt, cached, quirks), usage


def test_an_answer_that_is_only_the_end_of_the_turn_is_named() -> None:
    assert observe_json(plain("", stop_reason="end_turn")).fault == "end_of_turn"
    assert observe_json(answer(content=[{"type": "text", "text": ""}], stop_reason="end_turn")).fault == "end_of_turn"
    others: list[dict[str, Any]] = [
        plain("a", stop_reason="end_turn"), plain("", stop_reason="max_tokens"), plain("", stop_reason="refusal"),
        plain("", stop_reason="end_turn", stop_sequence="e"), answer(content=answer()["content"][:1], stop_reason="end_turn"),
    ]  # fmt: skip
    for other in others:
        assert (observe_json(other).answered, observe_json(other).fault) == (True, "no_logprobs"), other


def test_a_stop_sequence_that_is_called_the_end_of_the_turn_is_noted() -> None:
    assert observe_json(plain(stop_reason="end_turn", stop_sequence="e")).quirks == ["stop_sequence_as_end_turn"]
    assert observe_json(plain(stop_reason="stop_sequence", stop_sequence="e")).quirks == []


@pytest.mark.parametrize(
    ("blocks", "shows", "quirks"),
    [
        ([{"type": "thinking", "thinking": "Hm."}], True, []),
        ([{"type": "thinking", "thinking": ""}], False, ["hidden_thinking"]),
        ([{"type": "redacted_thinking", "data": "c2ln"}], False, ["hidden_thinking"]),
        ([{"type": "redacted_thinking", "data": "c2ln"}, {"type": "thinking", "thinking": "Hm."}], True, []),
        ([{"type": "tool_use", "id": "t", "name": "f", "input": {}}], False, []),
        ([], False, []),
    ],
)
def test_reasoning_is_seen_where_it_is_shown(blocks: list[Any], shows: bool, quirks: list[str]) -> None:
    document = plain()
    observation = observe_json(document | {"content": [*blocks, *document["content"]]})
    assert (observation.shows_reasoning, observation.quirks, observation.text) == (shows, quirks, "Harbour")


def test_of_a_long_text_the_beginning_is_kept() -> None:
    assert observe_json(answer(content=[{"type": "text", "text": "é" * 1500}] * 2)).text == "é" * 2000


def test_the_last_attempt_decides() -> None:
    tried = [attempt(1, status=529, body_text="no"), attempt(2, body_text=json.dumps(answer()))]
    observation = DIALECT.observe("p-1", tried)
    assert (observation.answered, observation.attempts) == (True, 2)


# -- streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n", "\n\n: a comment\n\n", "\n\nid: 1\nretry: 5\n"])
def test_a_stream_is_read_as_the_answer_that_it_is_a_stream_of(end: str) -> None:
    observation = observe(events(*STREAM, end=end))
    assert observation.streamed
    assert_sane(observation)
    whole = observe_json(answer(usage={"input_tokens": 12, "cache_read_input_tokens": 28, "output_tokens": 5}))
    assert observation.model_copy(update={"streamed": False}) == whole


def test_a_stream_without_names_of_events_or_after_a_comment_is_one() -> None:
    data = "".join(f"data: {json.dumps(event)}\n\n" for event in STREAM)
    assert observe(data).text == observe(f": waiting\n\n{data}").text == "Harbour"


def test_counts_at_the_end_of_a_stream_hold() -> None:
    start = {
        "type": "message_start",
        "message": plain("", stop_reason=None) | {"usage": {"input_tokens": 0, "output_tokens": 0}},
    }
    end = STREAM[-2] | {"usage": {"input_tokens": 30, "cache_read_input_tokens": 4, "output_tokens": 7}}
    observation = observe(events(start, *STREAM[6:9], end))
    assert (observation.prompt_tokens, observation.cached_tokens, observation.completion_tokens) == (34, 4, 7)


@pytest.mark.parametrize("after", range(len(STREAM)))
def test_an_error_within_a_stream_is_an_error(after: int) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    observation = observe(events(*STREAM[:after], error, *STREAM[after:]))
    assert (observation.answered, observation.fault, observation.fault_detail) == (False, "error_object", "Overloaded")


@pytest.mark.parametrize("kept", range(1, len(STREAM)))
def test_a_stream_that_breaks_off_is_read_as_far_as_it_goes(kept: int) -> None:
    observation = observe(events(*STREAM[:kept]))
    assert observation.answered
    assert "Harbour".startswith(observation.text or "")
    assert_sane(observation)


@pytest.mark.parametrize("text", ["data: {}", "event: ping\ndata: x\n\n", events(STREAM[1]), events(STREAM[-2]), ": x"])
def test_a_stream_without_an_answer_has_no_content(text: str) -> None:
    assert (observe(text).answered, observe(text).fault) == (False, "no_content")


# -- reading what is no answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not_json"),
        ("<!doctype html><p>down</p>", "html"),
        (json.dumps(answer())[:-20], "truncated_json"),
        ('{"content":' + "[" * 100_000, "truncated_json"),
        ("[]", "not_an_object"),
        ("{}", "no_content"),
        ('{"content": "Harbour"}', "no_content"),
        ('{"choices": [{"message": {"content": "Harbour"}}]}', "no_content"),
        ('{"type": "error", "error": {"type": "api_error", "message": "no"}}', "error_object"),
        ('{"error": "Unauthorized"}', "error_object"),
    ],
)
def test_what_is_no_answer_has_a_name(text: str, fault: str) -> None:
    observation = observe(text)
    assert (observation.answered, observation.fault) == (False, fault)
    assert_sane(observation)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 529])
def test_a_status_is_a_fault_with_the_hosts_words(status: int) -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "temperature: range 0..1"}}
    observation = observe_json(error | {"request_id": "req_1"}, status=status)
    assert (observation.fault, observation.fault_detail) == (f"http_{status}", "temperature: range 0..1")


def test_no_control_character_survives() -> None:
    names = {"model": ESCAPES, "provider": ESCAPES, "stop_reason": ESCAPES, "id": ESCAPES}
    observation = observe_json(answer(**names))
    assert observation.answer_id is None
    assert_sane(observation)
    assert_sane(observe_json({"type": "error", "error": {"message": ESCAPES}}))


# -- whatever comes --------------------------------------------------------------------------------------------

SLOTS = slots(answer())
STREAM_SLOTS = slots(STREAM)


@pytest.mark.parametrize("path", SLOTS, ids=lambda path: ".".join(map(str, path)) or "whole")
def test_every_slot_may_hold_the_wrong_thing(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        assert_sane(observe_json(with_slot(answer(), path, wrong)))


def streamed(documents: Any) -> str:
    return "".join(f"data: {json.dumps(document)}\n\n" for document in documents)


@pytest.mark.parametrize("path", STREAM_SLOTS[1:], ids=lambda path: ".".join(map(str, path)))
def test_every_slot_of_a_stream_may_hold_the_wrong_thing(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        documents: Any = {"events": STREAM}
        assert_sane(observe(streamed(with_slot(documents, ("events", *path), wrong)["events"])))


@given(st.sampled_from(SLOTS), json_values, st.sampled_from([200, 204, 301, 400, 500]))
@few
def test_every_slot_may_hold_anything(path: tuple[Any, ...], value: Any, status: int) -> None:
    assert_sane(observe_json(with_slot(answer(), path, value), status=status))


@given(st.sampled_from(STREAM_SLOTS[1:]), json_values)
@few
def test_every_slot_of_a_stream_may_hold_anything(path: tuple[Any, ...], value: Any) -> None:
    documents: Any = {"events": STREAM}
    assert_sane(observe(streamed(with_slot(documents, ("events", *path), value)["events"])))


@given(st.binary(max_size=200))
@few
def test_any_bytes_are_read(raw: bytes) -> None:
    for sent in (raw, b"data:" + raw, b"event: message_start\ndata:" + raw):
        assert_sane(DIALECT.observe("p-1", [attempt(body_base64=base64.b64encode(sent).decode())]))


# -- over HTTP -------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_other_keys(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "ANTHROPIC_")):
            monkeypatch.delenv(name)


async def sent(base_url: str, key: Key | None, get: str | None = None, timeout_s: float = 5.0) -> Reply:
    asked = endpoint(base_url=base_url, limits={"timeout_s": timeout_s})
    async with Transport(asked, key) as transport:
        return await (transport.get(get) if get else transport.post(DIALECT.path(request()), body(request())))


def test_a_request_carries_the_key_and_the_version_and_says_nothing_else_of_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-0123456789")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "sk-another-0123456789")
    with FaultServer(says(message())) as server:
        replies = [asyncio.run(sent(server.base_url, Key(SECRET), get)) for get in (None, "/models?limit=1")]
        post, get = server.requests
    assert [reply.status for reply in replies] == [200, 200]
    assert (post.path, get.path) == ("/v1/messages", "/v1/models?limit=1")
    assert post.document == PLAIN
    for asked in (post, get):
        assert asked.api_key == SECRET
        assert asked.headers["anthropic-version"] == "2023-06-01"
        assert set(asked.headers) <= {
            "host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent", "x-api-key",
            "anthropic-version",
        }  # fmt: skip
        assert (asked.headers["user-agent"], asked.headers["accept"]) == ("python", "application/json")


def test_without_a_key_none_is_sent() -> None:
    with FaultServer(says(message())) as server:
        asyncio.run(sent(server.base_url, None))
        asked = server.requests[0]
    assert not {"x-api-key", "authorization"} & set(asked.headers)
    assert "anthropic-version" in asked.headers


@pytest.mark.parametrize(("name", "bearer"), [(NAME, False), (TOKEN_NAME, True)])
def test_a_token_is_sent_as_one(name: str, bearer: bool, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    with FaultServer(says(message())) as server:
        asyncio.run(sent(server.base_url, key_for(name, server.origin)))
        asked = server.requests[0]
    assert (asked.bearer, asked.api_key) == ((SECRET, "") if bearer else ("", SECRET))


def test_the_other_dialect_sends_its_key_as_before(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_NAME, SECRET)
    with FaultServer(says({})) as server:

        async def ask(key: Key | None) -> None:
            plain = Endpoint(name="e", base_url=server.base_url, model="m")
            async with Transport(plain, key) as transport:
                await transport.post("/chat/completions", {})

        for key in (Key(SECRET), key_for(TOKEN_NAME, server.origin)):
            asyncio.run(ask(key))
        assert [asked.bearer for asked in server.requests] == [SECRET, SECRET]
        assert not any({"x-api-key", "anthropic-version"} & set(asked.headers) for asked in server.requests)


def test_a_redirect_is_not_followed_and_the_key_stays() -> None:
    with FaultServer(html) as elsewhere:
        with FaultServer(redirect_to(f"{elsewhere.base_url}/messages")) as server:
            reply = asyncio.run(sent(server.base_url, Key(SECRET)))
        assert elsewhere.requests == []
    assert (reply.status, reply.failure) == (307, None)


@pytest.mark.parametrize("fault", [large_body, gzip_bomb])
def test_an_answer_is_bounded(fault: Answer) -> None:
    with FaultServer(fault) as server:
        reply = asyncio.run(sent(server.base_url, Key(SECRET), timeout_s=30))
    assert reply.failure == "too_large"
    assert reply.body is not None
    assert len(reply.body) < MAX_BODY_BYTES


def test_a_connection_that_is_refused_is_named() -> None:
    with FaultServer(html) as server:
        gone = server.base_url
    assert asyncio.run(sent(gone, Key(SECRET))).failure == "refused"


# -- a whole audit ---------------------------------------------------------------------------------------------


def audit(cli: Weighbridge, base_url: str, folder: Path, reference: str, more: str = "") -> Ended:
    file = folder / "ENDPOINT.toml"
    head = f'name = "shop"\nbase_url = "{base_url}"\nmodel = "{MODEL}"\nreference = "{reference}"\n'
    file.write_text(
        f'{head}dialect = "anthropic-messages"\napi_key_env = "{NAME}"\n{more}[limits]\ntimeout_s = 5\n', "utf-8"
    )
    return cli("audit", file, "--out", folder / "run")


@pytest.mark.usefixtures("_no_other_keys")
def test_an_audit_goes_to_messages_and_writes_the_key_nowhere(
    weighbridge_cli: Weighbridge, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def echoing(call: Call) -> None:
        call.send_json(200, message(f"You are {call.request.api_key}"), {"server": SECRET})

    monkeypatch.setenv(NAME, SECRET)
    with FaultServer(echoing) as server:
        ended = audit(weighbridge_cli, server.base_url, tmp_path, reference)
        assert {asked.path for asked in server.requests} == {"/v1/messages", "/v1/models"}
        assert {asked.api_key for asked in server.requests} == {SECRET}
    assert ended.code == 3, ended.err
    files = [p.read_text("utf-8", "replace") for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert not any(SECRET in text.replace("\n", "") for text in [ended.out, ended.err, *files])
    assert "[redacted key]" in (tmp_path / "run" / "exchanges.jsonl").read_text("utf-8")


@pytest.mark.usefixtures("_no_other_keys")
def test_a_host_that_refuses_is_told_in_its_own_words(
    weighbridge_cli: Weighbridge, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, SECRET)
    with FaultServer(refuses(401, "invalid x-api-key")) as server:
        ended = audit(weighbridge_cli, server.base_url, tmp_path, reference)
    assert ended.code == 4
    assert "invalid x-api-key" in ended.said


# -- a real server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Iterator[ModelServer]:
    """llama.cpp's own server, which speaks both dialects."""
    with lab_backend(VARIANTS["f16"], lambda _: None) as server:
        yield server


async def asked_of(server: ModelServer, dialect: str, planned: PlannedRequest) -> Observation:
    where = Endpoint.model_validate(
        {
            "name": "e",
            "base_url": f"http://127.0.0.1:{server.port}/v1",
            "model": MODEL,
            "dialect": dialect,
            "limits": {"timeout_s": 600},
        }
    )
    speaks = DIALECTS[dialect]
    document = speaks.body(where, planned, temperature=0.0, top_logprobs=0, seed=7, prompt_ids=[])
    async with Transport(where, None) as transport:
        reply = await transport.post(speaks.path(planned), document)
    assert reply.body is not None, reply
    received: dict[str, Any] = {
        "status": reply.status,
        "headers": reply.headers,
        "body_text": reply.body.decode(),
        "latency_s": 0.25,
    }
    return speaks.observe("p-1", [attempt(**received)])


@pytest.mark.lab
@pytest.mark.parametrize(
    "talk",
    [
        [("user", "Name a fruit.")],
        [("system", "Answer in French."), ("user", "Name a fruit.")],
        [("user", "Name a fruit."), ("assistant", "Pear."), ("user", "And a tree?")],
    ],
)
def test_a_real_server_says_the_same_in_both_dialects(talk: list[tuple[str, str]], llama: ModelServer) -> None:
    planned = request(*talk, max_tokens=8)
    here, there = (asyncio.run(asked_of(llama, name, planned)) for name in ("anthropic-messages", "openai-chat"))
    assert here.answered
    assert here.text
    assert (here.text, here.prompt_tokens, here.completion_tokens, here.model_named) == (
        there.text, there.prompt_tokens, there.completion_tokens, there.model_named,
    )  # fmt: skip
    assert here.finish_reason == {"length": "max_tokens", "stop": "end_turn"}[there.finish_reason or ""]
    assert (here.cached_tokens, here.fault, here.quirks) == (0, "no_logprobs", [])


@pytest.mark.lab
def test_a_real_stream_is_the_answer_that_it_is_a_stream_of(llama: ModelServer) -> None:
    whole, stream = (
        asyncio.run(asked_of(llama, "anthropic-messages", request(max_tokens=8, settings={"stream": streams})))
        for streams in (False, True)
    )
    assert (whole.streamed, stream.streamed) == (False, True)
    same = {"streamed": False, "answer_id": whole.answer_id}
    assert stream.model_copy(update=same) == whole


@pytest.mark.lab
def test_a_real_server_stops_where_it_is_told_to(llama: ModelServer) -> None:
    whole = asyncio.run(asked_of(llama, "anthropic-messages", request(max_tokens=8)))
    assert whole.text is not None
    stop = whole.text[3]
    stopped = asyncio.run(asked_of(llama, "anthropic-messages", request(max_tokens=8, settings={"stop": [stop]})))
    assert stopped.text == whole.text[: whole.text.index(stop)]
