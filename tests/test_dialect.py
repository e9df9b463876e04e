"""OpenAI-style chat completions: what is asked, and that no answer whatsoever breaks the reading."""

import base64
import copy
import json
import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weighbridge.canonical import canonical_bytes, rounded
from weighbridge.dialects import DIALECTS
from weighbridge.dialects.openai_chat import _NOT_A_NAME, OpenAIChat
from weighbridge.records import (
    Endpoint,
    Exchange,
    FailureCode,
    Message,
    Observation,
    PlannedRequest,
    Probe,
    Received,
    Sent,
    TopToken,
    raw_twin,
)

few = settings(derandomize=True, deadline=None, max_examples=150)
DIALECT = OpenAIChat()
FAULTS_WITHOUT_ANSWER = {"html", "truncated_json", "not_json", "not_an_object", "error_object", "no_choices"}
FAULTS_WITH_ANSWER = {"end_of_turn", "no_logprobs", "bad_logprobs"}
ESCAPES = "\x1b[31mred\x1b[0m\x07\x9b2J\r\n\x00\u202e"


def entry(token: str, logprob: Any, **more: Any) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode()), **more}


def answer(*top: Any) -> dict[str, Any]:
    """A whole, valid answer."""
    entries = list(top) or [entry(" the", -0.7), entry(" a", -1.5), entry(" one", -3.0)]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "some-model",
        "provider": "some-host",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " the"},
                "finish_reason": "length",
                "logprobs": {
                    "content": [{"token": " the", "logprob": -0.7, "bytes": [32, 116], "top_logprobs": entries}]
                },
            }
        ],
        "usage": {
            "prompt_tokens": 40,
            "completion_tokens": 1,
            "total_tokens": 41,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def attempt(number: int = 1, body: dict[str, Any] | None = None, **received: Any) -> Exchange:
    facts: dict[str, Any] = {"status": 200, "headers": {}, "latency_s": 0.25} | received
    asked = {"messages": []} if body is None else body
    return Exchange(
        sent=Sent(request_id="probe-0001", attempt=number, sent_at="2026-01-01T00:00:00Z", body=asked),
        received=Received(request_id="probe-0001", attempt=number, **facts),
    )


def observe(body: str, **received: Any) -> Observation:
    return DIALECT.observe("p-1", [attempt(body_text=body, **received)])


def observe_json(value: Any, **received: Any) -> Observation:
    return observe(json.dumps(value), **received)


def tokens(observation: Observation) -> list[tuple[str, float]]:
    assert observation.top is not None, observation
    return [(bytes.fromhex(t.bytes_hex).decode(), t.logprob_nats) for t in observation.top]


def assert_sane(observation: Observation) -> None:
    """What every observation holds, whatever was sent."""
    shown = (
        observation.fault_detail, observation.model_named, observation.provider_named, observation.fingerprint,
        observation.finish_reason,
    )  # fmt: skip
    for text in shown:
        assert text is None or text.isprintable()
        assert text is None or len(text) <= 1000
    for count in (
        observation.prompt_tokens, observation.completion_tokens, observation.cached_tokens, observation.reasoning_tokens,
    ):  # fmt: skip
        assert count is None or 0 <= count < 10**9
    assert observation.choices is None or observation.choices >= 1
    assert observation.text is None or len(observation.text) <= 2000
    if observation.drawn is not None:
        assert -9998 < observation.drawn.logprob_nats <= 1e-4
        assert bytes.fromhex(observation.drawn.bytes_hex) is not None
    if observation.top is None:
        assert observation.fault is not None
        assert observation.answered == (observation.fault in FAULTS_WITH_ANSWER)
        assert observation.answered or observation.fault in FAULTS_WITHOUT_ANSWER or observation.fault[:5] == "http_"
    else:
        assert observation.answered
        assert observation.fault is None
        names = [token.bytes_hex for token in observation.top]
        values = [token.logprob_nats for token in observation.top]
        assert names
        assert len(set(names)) == len(names)
        assert all(bytes.fromhex(name) for name in names)
        assert values == sorted(values, reverse=True)
        assert all(math.isfinite(value) and -9999 < value <= 1e-4 for value in values)
        assert sum(math.exp(value) for value in values) <= 1.001 + 1e-9
    # It can be published: canonical JSON knows neither NaN nor lone surrogates nor integers beyond 2**53.
    assert canonical_bytes(rounded(observation.model_dump(mode="json", by_alias=True)))


# -- asking ----------------------------------------------------------------------------------------------------


def endpoint(**more: Any) -> Endpoint:
    return Endpoint(name="e", base_url="https://api.example.com/v1", model="some-model", **more)


def body(asked: Endpoint, top_logprobs: int = 20, **more: Any) -> dict[str, Any]:
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Say a word.")]
    request = PlannedRequest(request_id="p", probe=Probe(id="p", purpose="a probe", messages=messages), **more)
    return DIALECT.body(asked, request, temperature=1.0, top_logprobs=top_logprobs, seed=7, prompt_ids=[5, 6, 7])


def test_a_short_answer_is_asked_for_with_its_length() -> None:
    assert body(endpoint(), max_tokens=22) == body(endpoint()) | {"max_tokens": 22}


def test_a_forced_text_is_gone_on_with_and_its_own_logprobs_are_asked_for() -> None:
    forced = {"prompt_logprobs": 20, "continue_final_message": True, "add_generation_prompt": False}
    assert body(endpoint(), forced=True) == body(endpoint()) | forced


def test_settings_of_a_request_replace_the_usual_ones_and_the_users() -> None:
    settings = {"temperature": 2.0, "top_k": 1, "seed": 4, "stream": True}
    assert body(endpoint(), settings=settings) == body(endpoint()) | settings
    asked = endpoint(extra_body={"seed": 8, "min_p": 0})
    assert body(asked, settings=settings) == body(endpoint()) | {"min_p": 0} | settings


def test_tools_are_sent_as_they_are() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [Message(role="user", content="Say a word.")]
    request = PlannedRequest(request_id="p", probe=Probe(id="p", purpose="a probe", messages=messages, tools=tools))
    sent = DIALECT.body(endpoint(), request, temperature=1.0, top_logprobs=20, seed=7, prompt_ids=[])
    assert sent["tools"] == tools
    assert "tools" not in body(endpoint())
    assert DIALECT.path(request) == "/chat/completions"


def test_a_raw_request_is_the_references_own_tokens_and_no_conversation() -> None:
    messages = [Message(role="user", content="Say a word.")]
    request = PlannedRequest(request_id="p", probe=Probe(id="p", purpose="a probe", messages=messages))
    raw = raw_twin(request)
    assert (raw.request_id, raw.raw, raw.probe) == ("raw-p", True, request.probe)
    assert DIALECT.path(raw) == "/completions"
    assert body(endpoint(extra_body={"top_k": -1}), raw=True) == {
        "model": "some-model", "max_tokens": 1, "n": 1, "temperature": 1.0, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "seed": 7, "stream": False, "prompt": [5, 6, 7], "logprobs": 20, "top_k": -1,
    }  # fmt: skip


def test_every_sampling_parameter_is_stated() -> None:
    assert body(endpoint()) == {
        "model": "some-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say a word."}],
        "max_tokens": 1,
        "n": 1,
        "temperature": 1.0,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "seed": 7,
        "stream": False,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_logprobs_are_not_mentioned_where_none_are_asked_for() -> None:
    assert not {"logprobs", "top_logprobs"} & set(body(endpoint(), top_logprobs=0))


def test_extra_body_is_merged_and_wins() -> None:
    asked = endpoint(extra_body={"top_k": -1, "seed": 8, "provider": {"order": ["one"]}})
    assert body(asked) == {**body(endpoint()), "top_k": -1, "seed": 8, "provider": {"order": ["one"]}}


def test_a_body_does_not_change_the_endpoint() -> None:
    asked = endpoint(extra_body={"top_k": -1})
    body(asked)["added"] = True
    assert asked.extra_body == {"top_k": -1}


def test_the_dialect_is_registered() -> None:
    assert isinstance(DIALECTS["openai-chat"], OpenAIChat)


# -- reading a valid answer ------------------------------------------------------------------------------------


def test_a_valid_answer_is_read() -> None:
    assert observe_json(answer()).model_dump(exclude={"top", "schema_"}) == {
        "request_id": "probe-0001",
        "probe_id": "p-1",
        "answered": True,
        "fault": None,
        "fault_detail": None,
        "status": 200,
        "attempts": 1,
        "latency_s": 0.25,
        "first_byte_s": None,
        "model_named": "some-model",
        "provider_named": "some-host",
        "fingerprint": "fp_1",
        "finish_reason": "length",
        "prompt_tokens": 40,
        "completion_tokens": 1,
        "cached_tokens": 0,
        "reasoning_tokens": None,
        "shows_reasoning": False,
        "answer_id": "chatcmpl-1",
        "listing": None,
        "record": None,
        "raw": False,
        "streamed": False,
        "text": " the",
        "choices": 1,
        "drawn": {"bytes_hex": "2074", "logprob_nats": -0.7},
        "nameless": 0,
        "positions": None,
        "quirks": [],
    }
    assert tokens(observe_json(answer())) == [(" the", -0.7), (" a", -1.5), (" one", -3.0)]


def test_the_last_attempt_decides() -> None:
    tried = [attempt(1, status=500, body_text="no"), attempt(2, body_text=json.dumps(answer()))]
    observation = DIALECT.observe("p-1", tried)
    assert observation.answered
    assert observation.attempts == 2


def test_a_body_that_is_not_utf8_is_read_with_replacements() -> None:
    raw = json.dumps(answer()).encode().replace(b"some-host", b"some-\xff")
    observation = DIALECT.observe("p-1", [attempt(body_base64=base64.b64encode(raw).decode())])
    assert observation.provider_named == "some-\ufffd"
    assert observation.top is not None


def test_a_list_is_ordered() -> None:
    found = tokens(observe_json(answer(entry("b", -3.0), entry("c", -0.5), entry("a", -3.0))))
    assert found == [("c", -0.5), ("a", -3.0), ("b", -3.0)]


def test_a_sampled_token_appended_to_the_list_takes_its_place() -> None:
    found = tokens(observe_json(answer(entry("a", -0.5), entry("b", -4.0), entry("sampled", -3.0))))
    assert found == [("a", -0.5), ("sampled", -3.0), ("b", -4.0)]


def test_a_sampled_token_that_stands_in_the_list_already_counts_once() -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("b", -2.0), entry("b", -2.0)))
    assert tokens(observation) == [("a", -0.5), ("b", -2.0)]
    assert observation.quirks == ["duplicate_token"]


def test_the_first_of_two_values_for_a_token_counts() -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("a", -3.0)))
    assert tokens(observation) == [("a", -0.5)]
    assert observation.quirks == ["duplicate_token"]


@pytest.mark.parametrize("sentinel", [-9998, -9999.0, -9999, -10000.5, -1e300])
def test_sentinels_are_dropped_and_noted(sentinel: float) -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("b", sentinel)))
    assert tokens(observation) == [("a", -0.5)]
    assert observation.quirks == ["sentinel"]


def test_a_list_of_sentinels_alone_is_no_list() -> None:
    observation = observe_json(answer(entry("a", -9999), entry("b", -9999)))
    assert (observation.answered, observation.fault, observation.quirks) == (True, "no_logprobs", ["sentinel"])


@pytest.mark.parametrize("listed", [None, [], "abc", 7, {}])
def test_bytes_that_are_absent_are_taken_from_the_text(listed: object) -> None:
    observation = observe_json(answer(entry("é", -0.5, bytes=listed)))
    assert tokens(observation) == [("é", -0.5)]
    assert observation.quirks == ["bytes_absent"]


def test_a_missing_bytes_field_is_taken_from_the_text() -> None:
    assert tokens(observe_json(answer({"token": "x", "logprob": -0.5}))) == [("x", -0.5)]


def test_a_token_shown_as_a_replacement_character_is_dropped() -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("\ufffd", -1.0, bytes=None)))
    assert tokens(observation) == [("a", -0.5)]
    assert observation.quirks == ["token_without_bytes"]


def test_bytes_speak_for_a_token_that_is_no_text() -> None:
    observation = observe_json(answer(entry("\ufffd", -1.0, bytes=[0xF0, 0x9F])))
    assert observation.top is not None
    assert [token.bytes_hex for token in observation.top] == ["f09f"]


@pytest.mark.parametrize("wrong", [256, -1, 1.5, True, None, "97", 10**30, [97]])
def test_a_list_with_what_is_no_byte_is_refused(wrong: object) -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("b", -1.0, bytes=[98, wrong])))
    assert tokens(observation) == [("a", -0.5)]
    assert observation.quirks == ["token_without_bytes"]


def test_a_special_token_without_text_and_bytes_is_kept_as_nameless() -> None:
    observation = observe_json(answer(entry("", -0.1, bytes=[]), entry("a", -2.5), entry("", -4.0, bytes=None)))
    assert observation.top is not None
    assert [(token.bytes_hex, token.logprob_nats) for token in observation.top] == [("", -0.1), ("61", -2.5)]
    assert observation.quirks == ["token_without_bytes"]


def test_a_list_that_names_no_token_is_no_list_of_special_tokens() -> None:
    observation = observe_json(answer(*[entry("", -2.0 - n, bytes=[]) for n in range(4)], entry("a", -2.5)))
    assert tokens(observation) == [("a", -2.5)]


@pytest.mark.parametrize("bytes_", [None, "own"])
@pytest.mark.parametrize("token", ["token_id:42", "Ġthe", "Ċ", "▁the", "\ufffd"])
def test_a_name_in_a_tokenizer_s_own_alphabet_is_no_name(token: str, bytes_: str | None) -> None:
    listed = list(token.encode()) if bytes_ == "own" else None
    observation = observe_json(answer(entry("a", -0.5), entry(token, -1.0, bytes=listed)))
    assert tokens(observation) == [("a", -0.5)]
    assert observation.quirks == ["token_without_bytes"]


def test_a_lone_surrogate_is_no_token() -> None:
    observation = observe_json(answer(entry("a", -0.5), {"token": "\ud800", "logprob": -1.0}))
    assert tokens(observation) == [("a", -0.5)]
    assert "token_without_bytes" in observation.quirks


@pytest.mark.parametrize("logprob", [None, "-1", True, False, [], {}, math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_no_number_spoils_the_list(logprob: object) -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("b", logprob)))
    assert (observation.answered, observation.fault) == (True, "bad_logprobs")
    assert_sane(observation)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [308, 309, 4000])
def test_a_logprob_may_be_a_huge_integer(exponent: int, sign: int) -> None:
    assert_sane(observe_json(answer(entry("a", -0.5), entry("b", sign * 10**exponent))))


@pytest.mark.parametrize(("logprob", "is_read"), [(0, True), (0.0, True), (1e-5, True), (0.001, False), (3, False)])
def test_a_positive_logprob_is_refused_beyond_rounding(logprob: float, is_read: bool) -> None:
    observation = observe_json(answer(entry("a", logprob), entry("b", -20)))
    assert (observation.top is not None) == is_read
    assert observation.fault == (None if is_read else "bad_logprobs")


def test_probabilities_in_the_place_of_logprobs_are_taken_as_such_and_said() -> None:
    observation = observe_json(answer(entry("a", 0.5), entry("b", 0.25), entry("c", 0)))
    assert observation.top is not None
    assert [t.logprob_nats for t in observation.top] == pytest.approx([math.log(0.5), math.log(0.25)])
    assert "probability_as_logprob" in observation.quirks
    assert_sane(observation)


def test_a_drawn_token_at_the_end_of_a_list_is_one_of_it() -> None:
    observation = observe_json(answer(entry("a", -0.5), entry("b", -1.5), entry("drawn", -9)))
    assert observation.top is not None
    assert len(observation.top) == 3


def generated(*tokens: str, max_tokens: int) -> Observation:
    """An answer of several tokens, each with a list of its own."""
    document = answer()
    document["choices"][0]["logprobs"]["content"] = [
        entry(token, -0.5) | {"top_logprobs": [entry(token, -0.5), entry("other", -2)]} for token in tokens
    ]
    sent = Sent(request_id="p", attempt=1, sent_at="2026-11-22T00:00:00+00:00", body={"max_tokens": max_tokens})
    received = Received(
        request_id="p", attempt=1, status=200, headers={}, body_text=json.dumps(document), latency_s=0.1
    )
    return DIALECT.observe("p", [Exchange(sent=sent, received=received)])


def test_every_generated_token_that_was_asked_for_has_its_list() -> None:
    observation = generated("a", "b", "c", max_tokens=2)
    assert observation.positions is not None
    assert [p.bytes_hex for p in observation.positions] == [b"a".hex(), b"b".hex()]
    assert [p.top[0].bytes_hex for p in observation.positions] == [b"a".hex(), b"b".hex()]
    assert observation.top == observation.positions[0].top


def test_one_token_has_no_positions_however_many_come_back() -> None:
    assert generated("a", "b", max_tokens=1).positions is None


@pytest.mark.parametrize("inside_choice", [True, False])
def test_a_prompts_logprobs_are_read_in_the_shape_of_vllm(inside_choice: bool) -> None:
    document = answer(entry("x", -0.1))
    row = {
        "11": {"logprob": -0.25, "rank": 1, "decoded_token": " tea"},
        "7": {"logprob": -3.0, "rank": 9, "decoded_token": " pot"},
    }
    (document["choices"][0] if inside_choice else document)["prompt_logprobs"] = [None, row]
    sent = Sent(
        request_id="p", attempt=1, sent_at="2026-11-22T00:00:00+00:00", body={"max_tokens": 1, "prompt_logprobs": 20}
    )
    received = Received(
        request_id="p", attempt=1, status=200, headers={}, body_text=json.dumps(document), latency_s=0.1
    )
    observation = DIALECT.observe("p", [Exchange(sent=sent, received=received)])
    assert observation.positions is not None
    assert observation.positions[0].top == []
    assert [(t.bytes_hex, t.logprob_nats) for t in observation.positions[1].top] == [
        (b" tea".hex(), -0.25),
        (b" pot".hex(), -3.0),
    ]


@pytest.mark.parametrize(
    "rows", [7, "x", [7], [{"1": 3}], [{"1": {"logprob": "x"}}], [{"1": {"logprob": 3.0, "decoded_token": "a"}}] * 2]
)
def test_a_prompts_logprobs_that_are_nonsense_are_no_positions(rows: Any) -> None:
    document = answer(entry("x", -0.1)) | {"prompt_logprobs": rows}
    sent = Sent(
        request_id="p", attempt=1, sent_at="2026-11-22T00:00:00+00:00", body={"max_tokens": 1, "prompt_logprobs": 20}
    )
    received = Received(
        request_id="p", attempt=1, status=200, headers={}, body_text=json.dumps(document), latency_s=0.1
    )
    observation = DIALECT.observe("p", [Exchange(sent=sent, received=received)])
    assert not any(p.top for p in observation.positions or [])
    assert_sane(observation)


def test_probabilities_that_sum_to_more_than_one_are_refused() -> None:
    observation = observe_json(answer(entry("a", -0.1), entry("b", -0.2)))
    assert (observation.top, observation.fault) == (None, "bad_logprobs")


def test_an_end_of_turn_is_told_from_missing_logprobs() -> None:
    document = answer()
    del document["choices"][0]["logprobs"]
    assert observe_json(document).fault == "no_logprobs"
    document["choices"][0]["message"]["content"] = ""
    assert observe_json(document).fault == "end_of_turn"


# -- what was generated ----------------------------------------------------------------------------------------


def drawn_of(**entry_of_token: Any) -> TopToken | None:
    document = answer()
    document["choices"][0]["logprobs"]["content"][0] |= entry_of_token
    return observe_json(document).drawn


def test_the_drawn_token_is_named_by_its_bytes_and_need_not_be_listed() -> None:
    assert drawn_of() == TopToken(bytes_hex="2074", logprob_nats=-0.7)
    assert drawn_of(token="x", bytes=None, logprob=-9) == TopToken(bytes_hex="78", logprob_nats=-9.0)
    assert drawn_of(token="", bytes=[], logprob=0) == TopToken(bytes_hex="", logprob_nats=0.0)


@pytest.mark.parametrize("logprob", [None, "-1", True, math.nan, math.inf, -math.inf, 0.5, -9999, -(10**400), 10**400])
def test_a_drawn_token_without_a_logprob_is_none(logprob: Any) -> None:
    assert drawn_of(logprob=logprob) is None


@pytest.mark.parametrize("name", ["\ufffd", "Ġthe", "token_id:7", None, 7])
def test_a_drawn_token_without_a_name_is_none(name: Any) -> None:
    assert drawn_of(token=name, bytes=None) is None


def test_of_a_text_the_beginning_is_kept_as_it_is() -> None:
    document = answer()
    document["choices"][0]["message"]["content"] = "é\n\x1b" + "x" * 5000
    assert observe_json(document).text == "é\n\x1b" + "x" * 1997
    document["choices"][0]["message"]["content"] = "a\ud800b"
    assert observe_json(document).text == "a?b"
    document["choices"][0]["message"]["content"] = ["a"]
    assert observe_json(document).text is None


def test_choices_are_counted() -> None:
    document = answer()
    document["choices"] *= 2
    assert observe_json(document).choices == 2


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_that_is_shown_is_seen(field: str) -> None:
    document = answer()
    document["choices"][0]["message"][field] = "Let me think."
    document["usage"]["completion_tokens_details"] = {"reasoning_tokens": 12}
    observation = observe_json(document)
    assert (observation.shows_reasoning, observation.reasoning_tokens) == (True, 12)


@pytest.mark.parametrize("shown", [None, "", [], 7, {}])
def test_an_empty_field_of_reasoning_shows_none(shown: Any) -> None:
    document = answer()
    document["choices"][0]["message"]["reasoning_content"] = shown
    assert not observe_json(document).shows_reasoning


@pytest.mark.parametrize("counted", [None, -1, "12", 1.5, True, [], 10**9])
def test_a_count_of_reasoning_that_is_none_is_none(counted: Any) -> None:
    document = answer()
    document["usage"]["completion_tokens_details"] = {"reasoning_tokens": counted}
    assert observe_json(document).reasoning_tokens is None


# -- completions of token ids ----------------------------------------------------------------------------------

RAW_BODY = {"model": "some-model", "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 20}


def legacy(**logprobs: Any) -> dict[str, Any]:
    """An answer of /completions as vLLM gives it: each token once, and one dictionary of texts a position."""
    lists = {"text_offset": [0], "tokens": [" the"], "token_logprobs": [-0.7], "top_logprobs": [{" the": -0.7, " a": -1.5, " one": -3.0}]}  # fmt: skip
    return {
        "id": "cmpl-1", "object": "text_completion", "model": "some-model",
        "choices": [{"index": 0, "text": " the", "finish_reason": "length", "logprobs": lists | logprobs}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }  # fmt: skip


def observe_raw(document: Any) -> Observation:
    return DIALECT.observe("p-1", [attempt(body=RAW_BODY, body_text=json.dumps(document))])


def test_a_completion_of_token_ids_is_read_in_its_older_shape() -> None:
    observation = observe_raw(legacy())
    assert (observation.answered, observation.fault, observation.raw) == (True, None, True)
    assert tokens(observation) == [(" the", -0.7), (" a", -1.5), (" one", -3.0)]
    assert observation.drawn == TopToken(bytes_hex=b" the".hex(), logprob_nats=-0.7)
    assert (observation.text, observation.prompt_tokens, observation.quirks) == (" the", 3, ["bytes_absent"])
    assert_sane(observation)


def test_a_completion_of_token_ids_may_carry_lists_as_chat_does() -> None:
    document = legacy()
    document["choices"][0]["logprobs"] = answer()["choices"][0]["logprobs"]
    observation = observe_raw(document)
    assert observation.raw
    assert tokens(observation) == [(" the", -0.7), (" a", -1.5), (" one", -3.0)]
    assert observation.quirks == []


@pytest.mark.parametrize(
    "broken",
    [
        {"tokens": None}, {"tokens": []}, {"tokens": "the"}, {"top_logprobs": None}, {"top_logprobs": []},
        {"top_logprobs": [None]}, {"top_logprobs": [[]]}, {"top_logprobs": [{}]}, {"top_logprobs": 7},
        {"top_logprobs": [{"a": "b"}]}, {"top_logprobs": [{"a": None}]}, {"top_logprobs": [{"a": 0.5, "b": -1}]},
    ],
)  # fmt: skip
def test_a_broken_list_of_a_completion_is_no_list(broken: dict[str, Any]) -> None:
    observation = observe_raw(legacy(**broken))
    assert observation.answered
    assert observation.top is None
    assert observation.fault in FAULTS_WITH_ANSWER
    assert_sane(observation)


@pytest.mark.parametrize("values", [None, [], "x", [None], ["x"], [math.nan]])
def test_a_completions_lists_are_read_without_the_logprob_of_what_was_drawn(values: Any) -> None:
    observation = observe_raw(legacy(token_logprobs=values))
    assert observation.drawn is None
    assert tokens(observation) == [(" the", -0.7), (" a", -1.5), (" one", -3.0)]


# -- streams ---------------------------------------------------------------------------------------------------


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    content = [entry(text, -0.5) | {"top_logprobs": [entry(text, -0.5), entry("other", -2)]}] if text else None
    choice = {
        "index": 0,
        "delta": {"content": text},
        "finish_reason": finish,
        "logprobs": content and {"content": content},
    }
    return {"id": "c", "object": "chat.completion.chunk", "model": "some-model", "choices": [choice], **more}


STREAM = [
    {"id": "c", "model": "some-model", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    chunk("Once"), chunk(" upon"), chunk(" a", "length"),
    {"id": "c", "choices": [], "usage": {"prompt_tokens": 40, "completion_tokens": 3}},
]  # fmt: skip


def events(*documents: Any, end: str = "\n\n", done: bool = True) -> str:
    lines = [f"data: {d if isinstance(d, str) else json.dumps(d, ensure_ascii=False)}" for d in documents]
    return end.join([*lines, "data: [DONE]" if done else ""])


def observe_stream(text: str, max_tokens: int = 8, **received: Any) -> Observation:
    asked = {"messages": [], "stream": True, "max_tokens": max_tokens}
    return DIALECT.observe("p-1", [attempt(body=asked, body_text=text, **received)])


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n", "\n\n: a comment\n\n", "\n\nevent: message\nid: 1\n"])
@pytest.mark.parametrize("done", [True, False])
def test_a_stream_is_read_as_the_answer_that_it_is_a_stream_of(end: str, done: bool) -> None:
    observation = observe_stream(events(*STREAM, end=end, done=done))
    assert (observation.answered, observation.fault, observation.streamed) == (True, None, True)
    assert (observation.text, observation.finish_reason, observation.choices) == ("Once upon a", "length", 1)
    assert (observation.prompt_tokens, observation.completion_tokens) == (40, 3)
    assert observation.model_named == "some-model"
    assert observation.positions is not None
    assert [bytes.fromhex(p.bytes_hex or "") for p in observation.positions] == [b"Once", b" upon", b" a"]
    assert tokens(observation) == [("Once", -0.5), ("other", -2)]
    assert_sane(observation)


def test_an_answer_that_is_no_stream_is_not_called_one() -> None:
    assert not observe_stream(json.dumps(answer())).streamed


def test_a_line_separator_inside_a_token_does_not_end_an_event() -> None:
    """Only CR and LF end a line of a stream; JSON may hold other separators as they are."""
    for separator in ("\u2028", "\u2029", "\x85"):
        observation = observe_stream(events(chunk(f"a{separator}b"), chunk(" c", "stop")))
        assert observation.text == f"a{separator}b c"


def test_an_error_within_a_stream_is_a_fault() -> None:
    observation = observe_stream(events(*STREAM[:2], {"error": {"message": "out of\x1b memory"}}))
    assert (observation.answered, observation.fault) == (False, "error_object")
    assert observation.fault_detail == "out of\ufffd memory"
    assert_sane(observation)


def test_an_event_that_cannot_be_read_is_passed_over() -> None:
    broken = events(
        *STREAM[:2], '{"choices": [{"del', "", "null", "[]", '{"choices": 7}', '{"choices": [7]}', *STREAM[2:]
    )
    observation = observe_stream(broken)
    assert (observation.text, observation.finish_reason) == ("Once upon a", "length")
    assert_sane(observation)


def test_a_torn_stream_holds_what_came() -> None:
    whole = events(*STREAM)
    for length in range(0, len(whole), 7):
        observation = observe_stream(whole[:length])
        assert observation.text is None or "Once upon a".startswith(observation.text)
        assert_sane(observation)


@pytest.mark.parametrize("text", ["data:", "data: [DONE]", "data: {}", "data: null\n\n" * 5, 'data: {"choices": []}'])
def test_an_empty_stream_is_no_answer(text: str) -> None:
    observation = observe_stream(text)
    assert (observation.answered, observation.fault, observation.streamed) == (False, "no_choices", True)


def test_a_status_beside_a_stream_is_a_fault() -> None:
    assert observe_stream(events(*STREAM), status=500).fault == "http_500"


def test_a_long_stream_is_read_in_time_that_grows_with_its_length() -> None:
    """A hostile stream of very many tiny events; what grows with the square of their number would take minutes."""
    tiny = json.dumps({"choices": [{"delta": {"content": "xxxxxxxx"}}]})

    def cost(number: int) -> float:
        text = events(*[tiny] * number)
        started = time.process_time()
        assert observe_stream(text).text == "x" * min(2000, 8 * number)
        return time.process_time() - started

    cost(100)
    assert cost(16_000) < 16 * max(cost(4000), 0.01)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_of_a_stream_no_more_tokens_are_read_than_were_asked_for(max_tokens: int) -> None:
    positions = observe_stream(events(*STREAM), max_tokens=max_tokens).positions
    assert (0 if positions is None else len(positions)) == (0 if max_tokens == 1 else max_tokens)


# -- reading what is no answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not_json"),
        ("plain words", "not_json"),
        ("<!doctype html><p>down</p>", "html"),
        (json.dumps(answer())[:-20], "truncated_json"),
        ("[" * 100_000, "truncated_json"),
        ('{"a":' * 100_000, "truncated_json"),
        ("1" * 5000, "not_json"),
        ("[]", "not_an_object"),
        ("null", "not_an_object"),
        ("NaN", "not_an_object"),
        ("{}", "no_choices"),
        ('{"choices": []}', "no_choices"),
        ('{"error": {"message": "no"}}', "error_object"),
        ('{"error": "no"}', "error_object"),
        ('{"error": [1]}', "error_object"),
    ],
)
def test_what_is_no_answer_has_a_name(text: str, fault: str) -> None:
    observation = observe(text)
    assert (observation.answered, observation.fault) == (False, fault)
    assert_sane(observation)


@pytest.mark.parametrize("around", range(-12, 4))
def test_nesting_near_the_recursion_limit_does_not_break_an_error_message(around: int) -> None:
    """The deepest value that can be read must also be printable."""
    depth = next(d for d in range(5, 100_000, 5) if observe(nested_error(d)).fault == "truncated_json")
    assert_sane(observe(nested_error(depth + around)))


def nested_error(depth: int) -> str:
    return '{"error": ' + "[" * depth + "]" * depth + "}"


@pytest.mark.parametrize("status", [201, 204, 400, 401, 404, 422, 429, 500, 503, 599])
def test_a_status_is_a_fault(status: int) -> None:
    observation = observe_json({"error": {"message": "because", "code": 7}}, status=status)
    assert (observation.answered, observation.fault, observation.fault_detail) == (False, f"http_{status}", "because")


def test_a_status_without_a_body_is_a_fault() -> None:
    observation = DIALECT.observe("p-1", [attempt(status=502)])
    assert (observation.fault, observation.fault_detail) == ("http_502", "no explanation")


@pytest.mark.parametrize("status", [300, 301, 302, 307, 308, 399])
def test_a_redirect_is_a_fault(status: int) -> None:
    observation = observe("", status=status, headers={"location": "https://elsewhere.example"})
    assert (observation.answered, observation.fault) == (False, "redirect")
    assert "https://elsewhere.example" in (observation.fault_detail or "")


@pytest.mark.parametrize("failure", ["unknown_host", "refused", "tls", "timeout", "connection_lost", "too_large"])
def test_a_failure_of_the_transport_is_a_fault(failure: FailureCode) -> None:
    observation = DIALECT.observe("p-1", [attempt(status=None, failure=failure, failure_detail="why")])
    assert (observation.answered, observation.fault, observation.fault_detail) == (False, failure, "why")


@pytest.mark.parametrize(
    "received",
    [
        pytest.param({"body_text": json.dumps({"error": {"message": ESCAPES}}), "status": 400}, id="message"),
        pytest.param({"body_text": json.dumps({"error": {"code": ESCAPES}}), "status": 400}, id="code"),
        pytest.param({"body_text": json.dumps({"error": ESCAPES}), "status": 500}, id="text"),
        pytest.param({"body_text": json.dumps({"error": {"message": [ESCAPES]}})}, id="list"),
        pytest.param({"body_text": json.dumps({"error": {"message": ESCAPES}})}, id="error-object"),
        pytest.param({"body_text": ESCAPES, "status": 503}, id="plain-error"),
        pytest.param({"body_text": ESCAPES}, id="not-json"),
        pytest.param({"body_text": "<html>" + ESCAPES}, id="html"),
        pytest.param({"body_text": '{"model": "' + ESCAPES}, id="torn"),
        pytest.param({"body_text": "", "status": 302, "headers": {"location": ESCAPES}}, id="location"),
        pytest.param({"status": None, "failure": "tls", "failure_detail": ESCAPES}, id="failure"),
    ],
)
def test_no_control_character_survives_into_a_fault(received: dict[str, Any]) -> None:
    observation = DIALECT.observe("p-1", [attempt(**received)])
    assert not observation.answered
    assert observation.fault_detail is not None
    assert observation.fault_detail.isprintable()


def test_no_control_character_survives_into_a_name() -> None:
    document = answer()
    document |= {"model": ESCAPES, "provider": ESCAPES, "system_fingerprint": ESCAPES}
    document["choices"][0]["finish_reason"] = ESCAPES
    assert_sane(observe_json(document))


# -- whatever comes --------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, 2**64, 10**15, -(10**15), 10**308, 10**400, -(10**400)])
    | st.floats()
    | st.text(st.characters(), max_size=20)
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def slots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        found += slots(one, (*path, key))
    return found


def with_slot(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


SLOTS = slots(answer())
LEGACY_SLOTS = slots(legacy())
CHUNK_SLOTS = slots(STREAM[1])
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, -1e308, math.nan, math.inf, -math.inf, 10**15, 10**400, -(10**400), "", "x",
    "\ud800", "\x1b[31m", "é" * 5000, [], [None], [[]], [{}], [0] * 300, {}, {"content": None}, {"x": [1]},
]  # fmt: skip


@given(json_values)
@few
def test_any_json_value_is_read(value: Any) -> None:
    assert_sane(observe_json(value))


@given(json_values, st.sampled_from([None, 200, 204, 301, 400, 404, 500]))
@few
def test_any_json_value_is_read_under_any_status(value: Any, status: int | None) -> None:
    assert_sane_or_redirect(observe_json({"error": value}, status=status))


def assert_sane_or_redirect(observation: Observation) -> None:
    if observation.fault == "redirect":
        assert not observation.answered
    else:
        assert_sane(observation)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@example("\ufeff{}")
@example("-")
@few
def test_any_text_is_read(text: str) -> None:
    assert_sane(observe(text))


@given(st.binary(max_size=200))
@few
def test_any_bytes_are_read(raw: bytes) -> None:
    assert_sane(DIALECT.observe("p-1", [attempt(body_base64=base64.b64encode(raw).decode())]))


@pytest.mark.parametrize("path", SLOTS, ids=lambda path: ".".join(map(str, path)) or "whole")
def test_every_slot_may_hold_the_wrong_thing(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        assert_sane(observe_json(with_slot(answer(), path, wrong)))


@pytest.mark.parametrize("path", LEGACY_SLOTS, ids=lambda path: ".".join(map(str, path)) or "whole")
def test_every_slot_of_a_completion_may_hold_the_wrong_thing(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        assert_sane(observe_raw(with_slot(legacy(), path, wrong)))


@pytest.mark.parametrize("path", CHUNK_SLOTS, ids=lambda path: ".".join(map(str, path)) or "whole")
def test_every_slot_of_a_stream_may_hold_the_wrong_thing(path: tuple[Any, ...]) -> None:
    for wrong in WRONG:
        assert_sane(observe_stream(events(STREAM[0], with_slot(STREAM[1], path, wrong), *STREAM[2:])))


@given(st.sampled_from(LEGACY_SLOTS), json_values)
@few
def test_every_slot_of_a_completion_may_hold_anything(path: tuple[Any, ...], value: Any) -> None:
    assert_sane(observe_raw(with_slot(legacy(), path, value)))


@given(st.sampled_from(CHUNK_SLOTS), json_values)
@few
def test_every_slot_of_a_stream_may_hold_anything(path: tuple[Any, ...], value: Any) -> None:
    document = json.dumps(with_slot(STREAM[1], path, value))
    assert_sane(observe_stream(events(STREAM[0], document, *STREAM[2:])))


@given(st.lists(json_values, max_size=6))
@few
def test_any_events_are_read(values: list[Any]) -> None:
    assert_sane(observe_stream(events(*map(json.dumps, values))))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@few
def test_any_text_after_the_mark_of_an_event_is_read(text: str) -> None:
    assert_sane(observe_stream(f"data:{text}"))


@given(st.sampled_from(SLOTS), json_values)
@few
def test_every_slot_may_hold_anything(path: tuple[Any, ...], value: Any) -> None:
    assert_sane(observe_json(with_slot(answer(), path, value)))


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "token": st.text(st.characters(), max_size=6) | scalars,
                "logprob": st.floats(-12_000, 0) | st.sampled_from([-0.0, -9999.0, -9998.0, -9997.9]) | scalars,
                "bytes": st.none() | st.lists(st.integers(-1, 256), max_size=4) | scalars,
            },
        ),
        max_size=25,
    )
)
@few
def test_any_list_of_entries_is_read(entries: list[dict[str, Any]]) -> None:
    document = answer()
    document["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = entries
    assert_sane(observe_json(document))


@given(st.integers(0, 400))
@few
def test_an_answer_torn_anywhere_is_a_fault(length: int) -> None:
    observation = observe(json.dumps(answer())[:length])
    assert not observation.answered
    assert_sane(observation)


# What stands for a tokenizer's inner alphabet, or for a part of a character, is no name.
NAMES = st.text(min_size=1, max_size=5).filter(lambda name: not any(mark in name.encode() for mark in _NOT_A_NAME))


@given(st.lists(st.tuples(NAMES, st.floats(-30, -4)), min_size=1, max_size=40))
@few
def test_every_usable_entry_is_kept_once(pairs: list[tuple[str, float]]) -> None:
    observation = observe_json(answer(*(entry(token, logprob) for token, logprob in pairs)))
    expected: dict[str, float] = {}
    for token, logprob in pairs:
        expected.setdefault(token, logprob)
    assert dict(tokens(observation)) == expected
