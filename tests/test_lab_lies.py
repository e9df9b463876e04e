"""Each lie of the lab's front really happens in front of a real model, and an honest front does not tell it."""

import contextlib
import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import weighbridge.cli.lab
from weighbridge.errors import ConfigurationError, LabError
from weighbridge.lab.front import CHAT, COMPLETIONS, MODEL_NAME, Front
from weighbridge.lab.json_http import post_json
from weighbridge.lab.lies import OWN_MAX_TOKENS, REASONING_TOKENS, Lies
from weighbridge.lab.process import ModelServer
from weighbridge.lab.provider import lab_backend, lab_endpoint
from weighbridge.lab.variants import HIDDEN_SYSTEM_PROMPT, VARIANTS, Settings

pytestmark = pytest.mark.lab

Fronts = Callable[..., Front]
Document = dict[str, Any]
Answers = Callable[..., Document]

USER = {"role": "user", "content": "Tell me about the sea."}
SEA = [{"role": "system", "content": "Be brief."}, USER]  # shorter than with the default system prompt
GREEDY: Document = {"temperature": 0, "max_tokens": 4}
DRAWN: Document = {"temperature": 1, "seed": 1, "max_tokens": 4}
WITH_LOGPROBS: Document = {"logprobs": True, "top_logprobs": 3}
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
    asked = {"model": MODEL_NAME, **({"messages": SEA} if path == CHAT else {}), **fields}
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


def stream(front: Front, **fields: Any) -> tuple[str, list[Document]]:
    """The content type and the chunks of a stream, which must end as streams do."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(front), timeout=60)
    body = {"model": MODEL_NAME, "messages": SEA, "stream": True, **fields}
    connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    kind, lines = response.headers["content-type"], response.read().decode().split("\n\n")
    connection.close()
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


@pytest.mark.parametrize(
    "given", [{"ignored": ("temprature",)}, {"refused": ("",)}, {"max_top_logprobs": 21}, {"divert_share": -0.1}]
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
        "logprobs_after_temperature": "true",
        "max_top_logprobs": "5",
        "sentinels": "true",
        "divert_share": "0.25",
        "usage": "official",
        "usage_offset": "-3",
        "stream_usage_offset": "4",
        "cached": "true",
        "reasoning": "hidden",
        "model_named": "m=1",
        "provider_named": "p",
    }
    lies = [word for name, value in told.items() for word in ("--lie", f"{name}={value}")]
    options = ["--template", "hidden-system", "--forge-from", "q8_0", "--variant", "q4_0", *lies]
    ended, asked = serve_arguments(monkeypatch, weighbridge_cli, *options)
    assert (ended.code, "not today" in ended.said) == (2, True)
    assert asked["lies"] == Lies(
        ignored=("temperature", "top_p"),
        refused=("seed",),
        max_temperature=0.5,
        logprobs_after_temperature=True,
        max_top_logprobs=5,
        sentinels=True,
        divert_share=0.25,
        usage="official",
        usage_offset=-3,
        stream_usage_offset=4,
        cached=True,
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
