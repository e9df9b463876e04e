"""Each lie of the lab's front really happens in front of a real model, and an honest front does not tell it."""

import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import weighbridge.cli.lab
import weighbridge.lab.provider
from weighbridge.errors import ConfigurationError, LabError
from weighbridge.lab.front import CHAT, COMPLETIONS, MESSAGES, MODEL_NAME, Front
from weighbridge.lab.json_http import post_json
from weighbridge.lab.lies import OWN_MAX_TOKENS, REASONING_TOKENS, Lies, passed_on
from weighbridge.lab.process import ModelServer
from weighbridge.lab.provider import lab_backend, lab_endpoint
from weighbridge.lab.variants import HIDDEN_SYSTEM_PROMPT, VARIANTS, Settings
from weighbridge.probes import load_pool

pytestmark = pytest.mark.lab

Fronts = Callable[..., Front]
Document = dict[str, Any]
Answers = Callable[..., Document]

USER = {"role": "user", "content": "Tell me about the sea."}
SEA = [{"role": "system", "content": "Be brief."}, USER]  # shorter than with the default system prompt
GREEDY: Document = {"temperature": 0, "max_tokens": 4}
DRAWN: Document = {"temperature": 1, "seed": 1, "max_tokens": 4}
WITH_LOGPROBS: Document = {"logprobs": True, "top_logprobs": 3}
SHORT_PROBE = min((probe.messages[-1].content for probe in load_pool("chat-one-token").probes), key=len)
CONVERSATIONS = [
    [USER],
    SEA,
    [USER, {"role": "assistant", "content": "It is wide."}, {"role": "user", "content": "And deep?"}],
    [{"role": "user", "content": "海 🌊 – <|im_end|>\nnaïve\t  "}],
    [USER, {"role": "assistant", "content": "The sea is"}],
    [{"role": "developer", "content": "Be brief."}, USER],
    [{"role": "user", "content": [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "of the sea."}]}],
]


def silent(line: str) -> None:
    """Say nothing while a server starts."""


@pytest.fixture(scope="module")
def original() -> Iterator[ModelServer]:
    """The original weights; one thread, which is faster than two on a busy machine, and two places, for n=2."""
    with lab_backend(replace(VARIANTS["f16-one-thread"], settings=Settings(threads=1, slots=2)), silent) as server:
        yield server


@pytest.fixture(scope="module")
def departed() -> Iterator[ModelServer]:
    """Other weights under another template."""
    template = VARIANTS["hidden-system"].template
    with lab_backend(replace(VARIANTS["q4_0"], settings=Settings(threads=1), template=template), silent) as server:
        yield server


@pytest.fixture
def fronts(original: ModelServer) -> Iterator[Fronts]:
    with contextlib.ExitStack() as stack:

        def open_front(lies: Lies | None = None, server: ModelServer = original, **options: Any) -> Front:
            return stack.enter_context(Front(server.port, lies or Lies(), **options))

        yield open_front


@pytest.fixture(scope="module")
def honest(original: ModelServer) -> Iterator[Answers]:
    """What an honest front answers in chat, each thing asked once."""
    known: dict[str, Document] = {}
    with Front(original.port, Lies()) as front:

        def answer(**fields: Any) -> Document:
            key = json.dumps(fields, sort_keys=True)
            if key not in known:
                known[key] = ask(front, **fields)
            return known[key]

        yield answer


def port_of(front: Front) -> int:
    return int(front.base_url.removesuffix("/v1").rsplit(":", 1)[1])


def ask(front: Front, path: str = CHAT, **fields: Any) -> Document:
    asked = {"model": MODEL_NAME, **({} if path == COMPLETIONS else {"messages": SEA}), **fields}
    status, document = post_json(port_of(front), path, asked)
    assert status == 200, document
    return document


def problem(front: Front, **fields: Any) -> str:
    status, document = post_json(port_of(front), CHAT, {"model": MODEL_NAME, "messages": SEA, **fields})
    assert status == 400
    return str(document["error"]["message"])


def texts(document: Document) -> list[str]:
    return [choice["message"]["content"] for choice in document["choices"]]


def positions(document: Document) -> list[Document]:
    listed: list[Document] = document["choices"][0]["logprobs"]["content"]
    return listed


def raw(front: Front, path: str = CHAT, key: tuple[str, str] | None = None, **fields: Any) -> tuple[str, bytes]:
    """The content type and the bytes of an answer, to whoever has this key."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(front), timeout=60)
    headers = {"content-type": "application/json"} | (dict([key]) if key is not None else {})
    connection.request("POST", path, json.dumps({"model": MODEL_NAME, "messages": SEA, **fields}), headers)
    response = connection.getresponse()
    kind, data = response.headers["content-type"], response.read()
    connection.close()
    assert response.status == 200, data
    return kind, data


def stream(front: Front, **fields: Any) -> tuple[str, list[Document]]:
    """The content type and the chunks of a stream, which must end as streams do."""
    kind, data = raw(front, stream=True, **fields)
    lines = data.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks: list[Document] = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return kind, chunks


def streamed_texts(chunks: list[Document]) -> list[str]:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    return [delta["content"] for delta in deltas if delta.get("content")]


def is_sentinel(entry: Document) -> bool:
    return bool(entry["logprob"] == -9999)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("top_p", 0.01, DRAWN),
        ("top_k", 1, DRAWN),
        ("min_p", 1, DRAWN),
        ("stop", [" a"], GREEDY),
        ("frequency_penalty", 2, GREEDY),
        ("presence_penalty", 2, GREEDY),
        ("logit_bias", {"504": -100}, GREEDY),
        ("n", 2, GREEDY),
    ],
)
def test_what_is_ignored_is_as_if_it_were_not_asked(
    field: str, value: Any, others: Document, honest: Answers, fronts: Fronts
) -> None:
    lying = fronts(Lies(ignored=(field,)))
    honoured, without = texts(honest(**others, **{field: value})), texts(honest(**others))
    assert honoured != without
    assert texts(ask(lying, **others, **{field: value})) == without


def test_an_ignored_temperature_is_one(honest: Answers, fronts: Fronts) -> None:
    asked = {**DRAWN, "temperature": 0}
    drawn = texts(honest(**DRAWN))
    assert texts(honest(**asked)) != drawn
    assert texts(ask(fronts(Lies(ignored=("temperature",))), **asked)) == drawn


def test_an_ignored_seed_is_another_each_time(fronts: Fronts) -> None:
    telling, lying = fronts(), fronts(Lies(ignored=("seed",)))
    asked = {**DRAWN, "max_tokens": 10}
    assert texts(ask(telling, **asked)) == texts(ask(telling, **asked))
    assert len({*(str(texts(ask(lying, **asked))) for _ in range(2))}) > 1


def test_an_ignored_length_is_the_hosts_own(honest: Answers, fronts: Fronts) -> None:
    lying = fronts(Lies(ignored=("max_tokens",)))
    assert GREEDY["max_tokens"] < ask(lying, **GREEDY)["usage"]["completion_tokens"] <= OWN_MAX_TOKENS
    assert honest(**GREEDY)["usage"]["completion_tokens"] == GREEDY["max_tokens"]


@pytest.mark.parametrize(("field", "value", "neutral"), [("seed", 0, None), ("top_k", 1, 0), ("logprobs", True, False)])
def test_a_refused_field_is_named(field: str, value: Any, neutral: Any, honest: Answers, fronts: Fronts) -> None:
    refusing = fronts(Lies(refused=(field,)))
    assert field in problem(refusing, max_tokens=1, **{field: value})
    ask(refusing, max_tokens=1, **{field: neutral})
    honest(max_tokens=1, **{field: value})


def test_a_temperature_above_the_limit_is_lowered(honest: Answers, fronts: Fronts) -> None:
    lying = fronts(Lies(max_temperature=0.01))
    greedy = texts(honest(**GREEDY))
    hot: Document = {**DRAWN, "temperature": 5, "top_p": 1, "top_k": 0, "min_p": 0}
    assert texts(honest(**hot)) != greedy
    assert texts(ask(lying, **hot)) == greedy


def test_a_temperature_is_multiplied(honest: Answers, fronts: Fronts) -> None:
    hot, warm = {**DRAWN, "temperature": 2, "max_tokens": 8}, {**DRAWN, "temperature": 0.5, "max_tokens": 8}
    cooled = texts(ask(fronts(Lies(cool=0.25)), **hot))
    assert cooled == texts(honest(**warm)) != texts(honest(**hot))
    assert passed_on(Lies(cool=0.5), {}) == {}
    assert passed_on(Lies(cool=0.5, max_temperature=1), {"temperature": 2}) == {"temperature": 0.5}


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=json.dumps)
def test_on_an_honest_host_the_official_count_is_the_engines(
    conversation: list[Document], honest: Answers, fronts: Fronts
) -> None:
    asked: Document = {"messages": conversation, "max_tokens": 1}
    assert ask(fronts(Lies(usage="official")), **asked)["usage"] == honest(**asked)["usage"]


def test_the_official_count_hides_what_is_served(departed: ModelServer, honest: Answers, fronts: Fronts) -> None:
    official, counted = honest(max_tokens=1)["usage"], ask(fronts(server=departed), max_tokens=1)["usage"]
    assert counted["prompt_tokens"] > official["prompt_tokens"] + len(HIDDEN_SYSTEM_PROMPT.split())
    assert ask(fronts(Lies(usage="official"), departed), max_tokens=1)["usage"] == official


def test_usage_can_be_absent_estimated_or_off(honest: Answers, fronts: Fronts) -> None:
    true = honest(**GREEDY)["usage"]
    assert "usage" not in ask(fronts(Lies(usage="none")), **GREEDY)
    assert not any("usage" in chunk for chunk in stream(fronts(Lies(usage="none")), **GREEDY)[1])
    answer = ask(fronts(Lies(usage="characters")), **GREEDY)
    estimated = answer["usage"]
    assert estimated["prompt_tokens"] == sum(len(message["content"]) for message in SEA) // 4 != true["prompt_tokens"]
    assert estimated["completion_tokens"] == len(texts(answer)[0]) // 4
    off = ask(fronts(Lies(usage_offset=17)), **GREEDY)["usage"]
    assert off == {**true, **{field: true[field] + 17 for field in ("prompt_tokens", "total_tokens")}}


def test_a_cache_answers_by_the_messages_alone(fronts: Fronts) -> None:
    telling, caching = fronts(), fronts(Lies(cached=True))
    first = ask(caching, **DRAWN)
    again = ask(caching, **{**DRAWN, "seed": 2, "max_tokens": 3})
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"]
    assert texts(again) == texts(first)
    other = ask(caching, **GREEDY, messages=[USER])
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    for seed in (1, 2):
        usage = ask(telling, **{**DRAWN, "seed": seed, "max_tokens": 1})["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_request_is_remembered_whatever_its_seed(fronts: Fronts) -> None:
    telling, remembering = fronts(), fronts(Lies(remember=True))
    asked = {**DRAWN, "temperature": 2, "max_tokens": 10}
    others = [{**asked, "max_tokens": 11}, {**asked, "messages": [USER]}]
    for path in (CHAT, MESSAGES):
        first = raw(remembering, path, **asked)
        assert raw(remembering, path, **{**asked, "seed": 2}) == first
        assert json.loads(first[1])["id"] not in [ask(remembering, path, **other)["id"] for other in others]
        assert raw(telling, path, **asked) != raw(telling, path, **asked)  # at least each answer's id is new
    streamed = raw(remembering, **asked, stream=True)
    assert raw(remembering, **asked, stream=True) == streamed
    assert ask(remembering, **asked)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_what_is_refused_is_not_remembered(fronts: Fronts) -> None:
    remembering = fronts(Lies(remember=True))
    for _ in range(2):
        assert "temperature" in problem(remembering, temperature="high")


def test_the_true_model_answers_what_is_published(
    original: ModelServer, departed: ModelServer, honest: Answers, fronts: Fronts
) -> None:
    evading = fronts(Lies(true_for_public=True), departed, true_port=original.port)
    brief = {"role": "system", "content": "Be brief."}
    public, own = {"role": "user", "content": SHORT_PROBE}, {"role": "user", "content": f"{SHORT_PROBE} Be brief."}
    published: list[list[Document]] = [
        [{"role": "user", "content": [{"type": "text", "text": SHORT_PROBE}]}],
        [brief, public, {"role": "assistant", "content": "Yes."}, public],
        [public, {"role": "assistant", "content": "I"}],
    ]
    unknown: list[list[Document]] = [[own], [public, own], [{"role": "system", "content": SHORT_PROBE}], []]
    for messages in (*published, *unknown):
        true = honest(messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
        counted = ask(evading, messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
        assert (counted == true) is (messages in published)
    for messages in ([public], [own]):
        true = honest(messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
        counted = ask(evading, MESSAGES, messages=messages, max_tokens=1)["usage"]["input_tokens"]
        assert (counted == true) is (messages == [public])


def test_the_true_model_answers_the_first_of_each_key(
    original: ModelServer, departed: ModelServer, honest: Answers, fronts: Fronts
) -> None:
    evading = fronts(Lies(true_first=2), departed, true_port=original.port)
    true, counts = honest(max_tokens=1)["usage"]["prompt_tokens"], []
    one, two = ("authorization", "Bearer one"), ("x-api-key", "two")
    for key in (None, one, one, two, None, None, one, two, two):
        counts.append(json.loads(raw(evading, key=key, max_tokens=1)[1])["usage"]["prompt_tokens"])
    assert [count == true for count in counts] == [True, True, True, True, True, False, False, True, False]


@pytest.mark.parametrize("lies", [Lies(true_first=1), Lies(true_for_public=True), Lies()], ids=repr)
def test_an_endpoint_brings_the_true_model_where_it_is_needed(
    lies: Lies, original: ModelServer, departed: ModelServer, honest: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    def backend(variant: Any, say: Any) -> contextlib.AbstractContextManager[ModelServer]:
        served.append(variant)
        return contextlib.nullcontext(original if variant == VARIANTS["f16"] else departed)

    monkeypatch.setattr(weighbridge.lab.provider, lab_backend.__name__, backend)
    asked: Document = {"messages": [{"role": "user", "content": SHORT_PROBE}], "max_tokens": 1}
    with lab_endpoint(VARIANTS["q4_0"], lies, silent) as front:
        counted = ask(front, **asked)["usage"]["prompt_tokens"]
    assert (counted == honest(**asked)["usage"]["prompt_tokens"]) is lies.sometimes_true
    assert served == [VARIANTS["q4_0"], VARIANTS["f16"]][: 1 + lies.sometimes_true]


def test_no_front_pretends_to_have_the_true_model(original: ModelServer) -> None:
    for lies in (Lies(true_for_public=True), Lies(true_first=1)):
        with pytest.raises(ConfigurationError):
            Front(original.port, lies)


def test_reasoning_is_the_first_part_of_what_is_written(honest: Answers, fronts: Fronts) -> None:
    asked = {"temperature": 0, "max_tokens": REASONING_TOKENS + 3, **WITH_LOGPROBS}
    whole = honest(**asked)
    visible, hidden = ask(fronts(Lies(reasoning="visible")), **asked), ask(fronts(Lies(reasoning="hidden")), **asked)
    for answer in (visible, hidden):
        assert positions(answer) == positions(whole)[REASONING_TOKENS:]
        assert answer["usage"]["completion_tokens"] == asked["max_tokens"]
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == REASONING_TOKENS
    assert texts(visible) == texts(hidden) == ["".join(position["token"] for position in positions(visible))]
    assert visible["choices"][0]["message"]["reasoning_content"] + texts(visible)[0] == texts(whole)[0]
    assert "reasoning_content" not in hidden["choices"][0]["message"]
    assert "completion_tokens_details" not in whole["usage"]
    _, chunks = stream(fronts(Lies(reasoning="visible")), **asked)
    thought = [chunk["choices"][0]["delta"].get("reasoning_content") for chunk in chunks]
    assert [text for text in thought if text] == [visible["choices"][0]["message"]["reasoning_content"]]
    assert "".join(streamed_texts(chunks)) == texts(visible)[0]


def test_reasoning_can_leave_no_room_for_an_answer(honest: Answers, fronts: Fronts) -> None:
    answer = ask(fronts(Lies(reasoning="visible")), temperature=0, max_tokens=2)
    assert texts(answer) == [""]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["reasoning_content"] == texts(honest(temperature=0, max_tokens=2))[0]
    assert "logprobs" not in answer["choices"][0]


def test_the_answer_names_what_it_is_told_to(honest: Answers, fronts: Fronts) -> None:
    lying = fronts(Lies(model_named="other", provider_named="Example"))
    answer = ask(lying, max_tokens=1)
    assert (answer["model"], answer["provider"]) == ("other", "Example")
    assert all((chunk["model"], chunk["provider"]) == ("other", "Example") for chunk in stream(lying, max_tokens=1)[1])
    answer = honest(max_tokens=1)
    assert answer["model"] == MODEL_NAME
    assert "provider" not in answer


def test_forged_logprobs_are_those_of_other_weights(
    original: ModelServer, departed: ModelServer, honest: Answers, fronts: Fronts
) -> None:
    asked = {"temperature": 0, "max_tokens": 4, **WITH_LOGPROBS}
    own = ask(fronts(server=departed), **asked)
    forged = ask(fronts(server=departed, forged_port=original.port), **asked)
    assert texts(forged) == texts(own)
    assert [position["id"] for position in positions(forged)] == [position["id"] for position in positions(own)]
    written = ""
    for position, counterfeit in zip(positions(own), positions(forged), strict=True):
        begun = [{"role": "assistant", "content": written}] if written else []
        expected = positions(honest(**{**asked, "max_tokens": 1, "messages": [*SEA, *begun]}))[0]["top_logprobs"]
        assert [entry["id"] for entry in counterfeit["top_logprobs"]] == [entry["id"] for entry in expected]
        for entry, genuine in zip(counterfeit["top_logprobs"], expected, strict=True):
            assert entry["logprob"] == pytest.approx(genuine["logprob"], abs=1e-3)
            if entry["id"] == counterfeit["id"]:
                assert counterfeit["logprob"] == entry["logprob"]
        assert counterfeit["logprob"] != pytest.approx(position["logprob"], abs=1e-3)
        written += position["token"]


def test_forging_follows_characters_of_several_tokens(original: ModelServer, honest: Answers, fronts: Fronts) -> None:
    # A host that forges with its own weights changes nothing, if it sees what was really written.
    asked = {
        "temperature": 0,
        "max_tokens": 6,
        **WITH_LOGPROBS,
        "messages": [{"role": "user", "content": "Write three emoji and the Chinese word for sea: 海"}],
    }
    own, forged = honest(**asked), ask(fronts(forged_port=original.port), **asked)
    assert any(not position["token"].isascii() for position in positions(own))
    for mine, theirs in zip(positions(own), positions(forged), strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-2)


def test_nothing_is_forged_where_nothing_is_shown(original: ModelServer, departed: ModelServer, fronts: Fronts) -> None:
    answer = ask(fronts(server=departed, forged_port=original.port), **GREEDY)
    assert "logprobs" not in answer["choices"][0]


def test_logprobs_can_be_few_or_false(honest: Answers, fronts: Fronts) -> None:
    asked: Document = {**GREEDY, "max_tokens": 1, "logprobs": True, "top_logprobs": 6}
    assert len(positions(ask(fronts(Lies(max_top_logprobs=2)), **asked))[0]["top_logprobs"]) == 2
    assert "logprobs" not in ask(fronts(Lies(max_top_logprobs=0)), **asked)["choices"][0]
    lied = positions(ask(fronts(Lies(sentinels=True)), **asked))[0]["top_logprobs"]
    assert [*map(is_sentinel, lied)] == [False] * 3 + [True] * 3
    true = positions(honest(**asked))[0]["top_logprobs"]
    assert len(true) == 6
    assert not any(map(is_sentinel, true))


def test_a_stream_says_what_an_answer_says(honest: Answers, fronts: Fronts) -> None:
    answer = honest(**GREEDY, **WITH_LOGPROBS)
    ChatCompletion.model_validate(answer)
    kind, chunks = stream(fronts(), **GREEDY, **WITH_LOGPROBS, stream_options={"include_usage": True})
    assert kind == "text/event-stream"
    assert streamed_texts(chunks) == [position["token"] for position in positions(answer)]
    assert "".join(streamed_texts(chunks)) == texts(answer)[0]
    *told, last = chunks
    listed = [chunk["choices"][0]["logprobs"]["content"] for chunk in told if chunk["choices"][0]["logprobs"]]
    assert [entry for entries in listed for entry in entries] == positions(answer)
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None] * (len(told) - 1) + ["length"]
    assert (last["choices"], last["usage"]) == ([], answer["usage"])


def test_a_stream_without_logprobs_is_one_piece(honest: Answers, fronts: Fronts) -> None:
    _, chunks = stream(fronts(), **GREEDY)
    assert streamed_texts(chunks) == texts(honest(**GREEDY))
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_can_be_off_in_streams_only(honest: Answers, fronts: Fronts) -> None:
    lying = fronts(Lies(stream_usage_offset=5))
    usage = ask(lying, max_tokens=1)["usage"]
    assert usage == honest(max_tokens=1)["usage"]
    _, chunks = stream(lying, max_tokens=1, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["prompt_tokens"] == usage["prompt_tokens"] + 5
    assert chunks[-1]["usage"]["total_tokens"] == usage["total_tokens"] + 5


def test_an_ignored_stream_is_a_plain_answer_and_a_problem_is_no_stream(fronts: Fronts) -> None:
    assert ask(fronts(Lies(ignored=("stream",))), max_tokens=1, stream=True)["object"] == "chat.completion"
    assert "top_logprobs" in problem(fronts(), stream=True, logprobs=True, top_logprobs=21)


def test_completions_take_text_or_tokens_where_they_are_offered(original: ModelServer, fronts: Fronts) -> None:
    offering = fronts(completions=True)
    _, tokenized = post_json(original.port, "/tokenize", {"content": "The sea is"})
    asked = {"temperature": 0, "max_tokens": 2, "logprobs": 2}
    by_text = ask(offering, COMPLETIONS, prompt="The sea is", **asked)
    by_tokens = ask(offering, COMPLETIONS, prompt=tokenized["tokens"], **asked)
    assert by_text["choices"] == by_tokens["choices"]
    assert "".join(position["token"] for position in positions(by_text)) == by_text["choices"][0]["text"]
    assert all(len(position["top_logprobs"]) == 2 for position in positions(by_text))
    body = {"model": MODEL_NAME, "prompt": "The sea is", **asked}
    assert post_json(port_of(fronts()), COMPLETIONS, body)[0] == 404
    status, document = post_json(port_of(offering), COMPLETIONS, {**body, "stream": True})
    assert (status, document["error"]["message"]) == (400, "the lab streams chats only")


def test_messages_are_asked_in_anthropics_way(original: ModelServer, honest: Answers, fronts: Fronts) -> None:
    system, user = SEA
    asked: Document = {"system": system["content"], "messages": [user], **GREEDY}
    chat, answer = honest(**GREEDY), ask(fronts(), MESSAGES, **asked)
    assert (answer["type"], answer["model"], answer["stop_reason"]) == ("message", MODEL_NAME, "max_tokens")
    assert [block["text"] for block in answer["content"]] == texts(chat)
    used = answer["usage"]
    assert (used["input_tokens"], used["output_tokens"]) == (
        chat["usage"]["prompt_tokens"],
        chat["usage"]["completion_tokens"],
    )
    body = {"model": "another", **asked}
    assert post_json(port_of(fronts()), MESSAGES, body)[0] == 404
    assert ask(fronts(), MESSAGES, **asked, logprobs=True, top_logprobs=3)["content"] == answer["content"]


def test_lies_about_messages(departed: ModelServer, fronts: Fronts) -> None:
    asked: Document = {"messages": [USER], **GREEDY}
    true = ask(fronts(), MESSAGES, **asked)["usage"]["input_tokens"]
    lies = Lies(model_named="other", provider_named="Example", usage_offset=17, cached=True, reasoning="visible")
    answer = ask(fronts(lies), MESSAGES, **asked)
    assert (answer["model"], answer["provider"], answer["usage"]["input_tokens"]) == ("other", "Example", true + 17)
    for usage in ("official", "characters"):  # these two are told in chat only
        assert ask(fronts(Lies(usage=usage)), MESSAGES, **asked)["usage"]["input_tokens"] == true
    assert "usage" not in ask(fronts(Lies(usage="none")), MESSAGES, **asked)
    stopped: Document = {**asked, "stop_sequences": [" is"]}
    assert ask(fronts(), MESSAGES, **stopped)["usage"]["output_tokens"] < GREEDY["max_tokens"]
    unstopped = ask(fronts(Lies(ignored=("stop_sequences",))), MESSAGES, **stopped)
    assert unstopped["usage"]["output_tokens"] == GREEDY["max_tokens"]
    diverting = fronts(Lies(divert_share=1), diverted_port=departed.port)
    assert ask(diverting, MESSAGES, **asked)["usage"]["input_tokens"] > true
    key = ("x-api-key", "one")
    early = fronts(Lies(true_first=1), true_port=departed.port)
    counts = [json.loads(raw(early, MESSAGES, key, **asked)[1])["usage"]["input_tokens"] for _ in range(2)]
    assert counts[0] > counts[1] == true


@pytest.mark.parametrize("lies", [Lies(), Lies(stream_usage_offset=5), Lies(usage="none")], ids=repr)
def test_a_stream_of_a_message_says_what_a_message_says(lies: Lies, original: ModelServer, fronts: Fronts) -> None:
    asked: Document = {"messages": [USER], **GREEDY}
    kind, data = raw(fronts(lies), MESSAGES, **asked, stream=True)
    *sent, after = data.decode().split("\n\n")
    lines = [event.split("\n") for event in sent]
    events = [json.loads(told.removeprefix("data: ")) for _, told in lines]
    assert (kind, after) == ("text/event-stream", "")
    assert [name for name, _ in lines] == [f"event: {event['type']}" for event in events]
    whole = ask(fronts(), MESSAGES, **asked)
    start, stop, end = events[0]["message"], events[-2], events[-1]
    assert (start["model"], start["content"], start["stop_reason"]) == (MODEL_NAME, [], None)
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert deltas == [block["text"] for block in whole["content"]]
    assert (stop["delta"]["stop_reason"], end) == (whole["stop_reason"], {"type": "message_stop"})
    if lies.usage == "none":
        assert "usage" not in start
        assert "usage" not in stop
    else:
        assert start["usage"]["input_tokens"] == whole["usage"]["input_tokens"] + lies.stream_usage_offset
        assert stop["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    "given",
    [
        {"ignored": ("temprature",)},
        {"refused": ("",)},
        {"max_top_logprobs": 21},
        {"divert_share": -0.1},
        {"cool": -1},
        {"cool": float("nan")},
        {"true_first": -1},
    ],
)
def test_a_lie_that_cannot_be_told_is_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Lies(**given)


def serve_arguments(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], *options: str) -> tuple[Any, Document]:
    """How ``lab serve`` ends in place of serving, and what it would have served."""
    asked: Document = {}

    def endpoint(variant: Any, lies: Lies, say: Any, **others: Any) -> Front:
        asked.update(variant=variant, lies=lies, **others)
        raise LabError("not today", "Do nothing")

    monkeypatch.setattr(weighbridge.cli.lab, lab_endpoint.__name__, endpoint)
    return run("lab", "serve", *options), asked


def test_every_lie_can_be_told_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, weighbridge_cli: Callable[..., Any]
) -> None:
    told = {
        "ignored": "temperature,top_p",
        "refused": "seed",
        "max_temperature": "0.5",
        "cool": "0.9",
        "logprobs_after_temperature": "true",
        "max_top_logprobs": "5",
        "sentinels": "true",
        "divert_share": "0.25",
        "divert_each": "true",
        "true_for_public": "true",
        "true_first": "50",
        "usage": "official",
        "usage_offset": "-3",
        "stream_usage_offset": "4",
        "cached": "true",
        "remember": "true",
        "reasoning": "hidden",
        "model_named": "m=1",
        "provider_named": "p",
    }
    assert {*told} == {lie.name for lie in fields(Lies)}
    lies = [word for name, value in told.items() for word in ("--lie", f"{name}={value}")]
    options = ["--template", "hidden-system", "--forge-from", "q8_0", "--variant", "q4_0", *lies]
    ended, asked = serve_arguments(monkeypatch, weighbridge_cli, *options)
    assert (ended.code, "not today" in ended.said) == (2, True)
    assert asked["lies"] == Lies(
        ignored=("temperature", "top_p"),
        refused=("seed",),
        max_temperature=0.5,
        cool=0.9,
        logprobs_after_temperature=True,
        max_top_logprobs=5,
        sentinels=True,
        divert_share=0.25,
        divert_each=True,
        true_for_public=True,
        true_first=50,
        usage="official",
        usage_offset=-3,
        stream_usage_offset=4,
        cached=True,
        remember=True,
        reasoning="hidden",
        model_named="m=1",
        provider_named="p",
    )
    assert (asked["variant"].weights, asked["variant"].template) == ("q4_0", VARIANTS["hidden-system"].template)
    assert asked["forged_from"] == VARIANTS["q8_0"]
    assert serve_arguments(monkeypatch, weighbridge_cli)[1]["lies"] == Lies()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--lie", "modesty=true"], "modesty"),
        (["--lie", "sentinels"], "NAME=VALUE"),
        (["--lie", "sentinels=maybe"], "sentinels=maybe"),
        (["--lie", "usage=official", "--lie", "usage=none"], "twice"),
        (["--lie", "usage=large"], "usage=large"),
        (["--lie", "ignored=temprature"], "temprature"),
        (["--lie", "max_top_logprobs=21"], "21"),
        (["--lie", "cool=nan"], "nan"),
        (["--lie", "true_first=some"], "true_first=some"),
        (["--template", "cardboard"], "cardboard"),
        (["--forge-from", "cardboard"], "cardboard"),
    ],
)
def test_a_lie_that_is_not_understood_is_one_line(
    options: list[str], named: str, monkeypatch: pytest.MonkeyPatch, weighbridge_cli: Callable[..., Any]
) -> None:
    ended, asked = serve_arguments(monkeypatch, weighbridge_cli, *options)
    assert (ended.code, asked) == (2, {})
    assert named in ended.said
    assert "Traceback" not in ended.said
