"""The lab's server of local weights: what a request asks for is done, and every number is the model's own."""

import contextlib
import http.client
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import MODEL_NAME, VOCABULARY, Front, Lies
from weighbridge.lab.process import ModelServer
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.sampling import Sampling, pick
from weighbridge.lab.torch_server import lab_template
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, TORCH_VARIANTS
from weighbridge.records import Message
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.engine import Prompt
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.servers import TrustedServer
from weighbridge.reference.templates import render_conversations

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTIONS = ["Name a colour.", "What is 17 times 23?", "Write the first line of a poem about rain."]
FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def others() -> Iterator[Callable[[str], ModelServer]]:
    """Servers of the variants that tests ask for, each started once; with one thread, so that all compute alike."""
    with contextlib.ExitStack() as stack:
        running: dict[str, ModelServer] = {}

        def get(name: str) -> ModelServer:
            if name not in running:
                variant = TORCH_VARIANTS[name]
                one_thread = replace(variant, setting=variant.setting.model_copy(update={"threads": 1}))
                running[name] = stack.enter_context(lab_backend(one_thread, lambda _: None))
            return running[name]

        yield get


@pytest.fixture(scope="module")
def server(others: Callable[[str], ModelServer]) -> ModelServer:
    return others("f32")


@pytest.fixture(scope="module")
def local() -> LocalWeights:
    return LocalWeights(open_checkpoint(lab_checkpoint(lambda _: None), {}), LocalSetting(threads=1))


@pytest.fixture(scope="module")
def bf16() -> LocalWeights:
    setting = LocalSetting(dtype="bfloat16", threads=1)
    return LocalWeights(open_checkpoint(lab_checkpoint(lambda _: None), {}), setting)


def post(server: ModelServer | Front, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    port = int(server.base_url.removesuffix("/v1").rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body if isinstance(body, str) else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(server: ModelServer | Front, path: str = CHAT, /, **body: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"model": MODEL_NAME, "max_tokens": 1, "temperature": 0}
    if path == CHAT:
        base["messages"] = [{"role": "user", "content": QUESTIONS[0]}]
    status, document = post(server, path, base | body)
    assert status == 200, document
    return document


def text(document: dict[str, Any]) -> str:
    content: str = document["choices"][0]["message"]["content"]
    return content


def chat_ids(local: LocalWeights, question: str) -> list[int]:
    conversation = [[Message(role="user", content=question)]]
    rendered = render_conversations(OFFICIAL_TEMPLATE, conversation, special_tokens={}, name="the official template")
    return local.tokenize(rendered)[0]


def logprobs(server: ModelServer, question: str, k: int = 20) -> dict[int, float]:
    """The k most likely first tokens of an answer."""
    messages = [{"role": "user", "content": question}]
    document = ask(server, messages=messages, logprobs=True, top_logprobs=k, temperature=1)
    return {e["id"]: e["logprob"] for e in document["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


# -- the model's own numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_text_is_that_of_transformers(question: str, server: ModelServer, local: LocalWeights) -> None:
    import torch

    ids = chat_ids(local, question)
    own = local.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, top_p=None, top_k=None)
    document = ask(server, messages=[{"role": "user", "content": question}], max_tokens=8, return_token_ids=True)
    choice = document["choices"][0]
    assert document["prompt_token_ids"] == ids
    assert choice["token_ids"] == own[0, len(ids) :].tolist()
    assert text(document) == local.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
    assert choice["finish_reason"] == ("stop" if choice["token_ids"][-1] == 2 else "length")
    assert document["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(choice["token_ids"]),
        "total_tokens": len(ids) + len(choice["token_ids"]),
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_chat_logprobs_are_those_of_the_weights(question: str, server: ModelServer, local: LocalWeights) -> None:
    ids = chat_ids(local, question)
    rows = local.score([Prompt("p", tuple(ids), (len(ids) - 1,))], [None], 1024)[0]
    messages = [{"role": "user", "content": question}]
    document = ask(server, messages=messages, logprobs=True, top_logprobs=1024, temperature=0.3, top_p=0.5, seed=1)
    position = document["choices"][0]["logprobs"]["content"][0]
    listed = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
    assert {e["id"] for e in position["top_logprobs"][:20]} == set(rows.token_ids[0, :20].tolist())
    assert [listed[i] for i in rows.token_ids[0, :1000]] == pytest.approx(rows.logprobs_nats[0, :1000], abs=1e-6)
    assert listed[position["id"]] == position["logprob"]
    assert all(e["token"].encode() == bytes(e["bytes"]) or "\ufffd" in e["token"] for e in position["top_logprobs"])


def test_prompt_logprobs_are_those_of_a_forced_text(server: ModelServer, local: LocalWeights) -> None:
    ids = tuple(chat_ids(local, QUESTIONS[0]))
    rows = local.score([Prompt("p", ids, tuple(range(len(ids))))], [None], 8)[0]
    document = ask(server, COMPLETIONS, prompt=[*ids], prompt_logprobs=8, logprobs=8)
    first, *rest = document["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(ids) - 1
    for i, row in enumerate(rest):
        listed = {int(token): entry["logprob"] for token, entry in row.items()}
        assert [listed[t] for t in rows.token_ids[i]] == pytest.approx(rows.logprobs_nats[i], abs=1e-6)
        assert [row[str(t)]["rank"] for t in rows.token_ids[i]] == [*range(1, 9)]
        assert set(listed) - set(rows.token_ids[i].tolist()) <= {ids[i + 1]}
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    assert ask(server, messages=messages, prompt_logprobs=8)["prompt_logprobs"] == [first, *rest]


def test_a_keeper_can_record_it_as_a_server(server: ModelServer, local: LocalWeights) -> None:
    trusted = TrustedServer("vllm", server.base_url, MODEL_NAME)
    ids = trusted.tokenize([FRANCE])
    assert ids == local.tokenize([FRANCE])
    prompts = [Prompt("p", tuple(ids[0]), (2, len(ids[0]) - 1))]
    (served,), (own,) = trusted.score(prompts, [None], 20), local.score(prompts, [None], 20)
    assert served.token_ids.tolist() == own.token_ids.tolist()
    assert served.logprobs_nats == pytest.approx(own.logprobs_nats, abs=1e-4)  # other shapes round otherwise


def test_templates_are_rendered_as_a_reference_renders_them(server: ModelServer, local: LocalWeights) -> None:
    conversation = [
        Message(role="system", content=" Be\n brief. "),
        Message(role="user", content="{{ 7 * 7 }} <|im_end|>\n"),
    ]
    for variant in (TORCH_VARIANTS["f32"], *(v for v in TORCH_VARIANTS.values() if v.template)):
        template = variant.template or OFFICIAL_TEMPLATE
        expected = render_conversations(template, [conversation], special_tokens={}, name=variant.name)
        messages = [message.model_dump() for message in conversation]
        assert [lab_template(template).render(messages=messages, add_generation_prompt=True)] == expected
    messages = [message.model_dump() for message in conversation]
    expected = render_conversations(OFFICIAL_TEMPLATE, [conversation], special_tokens={}, name="official")
    assert post(server, "/tokenize", {"messages": messages})[1]["tokens"] == local.tokenize(expected)[0]


# -- sampling -------------------------------------------------------------------------------------------------


def test_a_seed_decides_and_temperature_0_needs_none(server: ModelServer) -> None:
    def drawn(**body: Any) -> str:
        return text(ask(server, max_tokens=4, **body))

    assert drawn(temperature=1, seed=1) == drawn(temperature=1, seed=1)
    assert len({drawn(temperature=1, seed=seed) for seed in range(4)}) > 1
    greedy = drawn()
    assert drawn(seed=7) == greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}, {"temperature": 1e-4}):
        assert drawn(**{"temperature": 1, "seed": 7, **narrow}) == greedy


@pytest.fixture(scope="module")
def distribution(server: ModelServer) -> dict[int, float]:
    """The whole of it, most likely token first."""
    return logprobs(server, QUESTIONS[0], VOCABULARY)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_draws_have_the_frequencies_that_were_asked_for(
    sampling: dict[str, float], server: ModelServer, distribution: dict[int, float]
) -> None:
    draws = 300
    document = ask(server, **{"temperature": 1, "seed": 20, "n": draws, "return_token_ids": True, **sampling})
    counts = Counter(choice["token_ids"][0] for choice in document["choices"])
    chance = np.exp(np.array([*distribution.values()]) / sampling.get("temperature", 1))
    chance /= chance.sum()
    kept = chance >= sampling.get("min_p", 0) * chance[0]
    kept[1:] &= np.cumsum(chance)[:-1] < sampling.get("top_p", 2)
    kept[sampling.get("top_k", VOCABULARY) :] = False
    expected = np.where(kept, chance, 0) / chance[kept].sum() * draws
    observed = np.array([counts[token] for token in distribution])
    assert observed.sum() == draws
    assert not observed[~kept].any()
    common = expected >= 5
    bins = [*zip(observed[common], expected[common], strict=True), (observed[~common].sum(), expected[~common].sum())]
    found, wanted = np.array([one for one in bins if one[1] > 0]).T
    assert len(wanted) >= 3
    assert scipy.stats.chisquare(found, wanted).pvalue > 1e-3


def test_penalties_are_subtracted_from_the_logits_of_what_was_said() -> None:
    def best(before: list[int], **penalties: float) -> int:
        sampling = Sampling.model_validate({"temperature": 0, **penalties})
        return int(pick(np.array([1.0, 0.5, 0.3]), before, sampling, np.zeros(1))[0])

    assert best([0, 0]) == best([], presence_penalty=2, frequency_penalty=2) == 0
    assert best([0, 0], presence_penalty=0.4) == best([0], frequency_penalty=0.4) == 0
    assert best([0], presence_penalty=0.6) == best([0, 0], frequency_penalty=0.3) == 1
    assert best([0, 1], presence_penalty=0.9) == 2


def test_bias_and_stop_are_honoured(server: ModelServer, local: LocalWeights) -> None:
    prompt = {"prompt": FRANCE, "max_tokens": 8}
    plain = ask(server, COMPLETIONS, **prompt, return_token_ids=True)["choices"][0]
    assert plain["text"].startswith(" Paris.")
    first = plain["token_ids"][0]
    other = ask(server, COMPLETIONS, **prompt, logit_bias={str(first): -100}, return_token_ids=True, logprobs=1)
    assert first not in other["choices"][0]["token_ids"]
    assert [*other["choices"][0]["logprobs"]["top_logprobs"][0]] == [" Paris"]  # logprobs are those before the bias
    wanted = local.tokenize([" banana"])[0][0]
    forced = ask(server, COMPLETIONS, prompt=FRANCE, max_tokens=3, logit_bias={wanted: 100}, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [wanted] * 3
    stopped = ask(server, COMPLETIONS, **prompt, stop=["the", "."])
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == (" Paris", "stop")
    assert stopped["usage"]["completion_tokens"] == 2
    assert ask(server, COMPLETIONS, **prompt, stop=".")["choices"] == stopped["choices"]


def test_n_answers_side_by_side_are_continued_each_by_its_own(server: ModelServer, local: LocalWeights) -> None:
    document = ask(
        server, n=6, max_tokens=5, temperature=1.5, seed=3, logprobs=True, top_logprobs=2, return_token_ids=True
    )
    choices = document["choices"]
    assert [choice["index"] for choice in choices] == [*range(6)]
    assert len({text({"choices": [choice]}) for choice in choices}) > 3
    prompt = document["prompt_token_ids"]
    for choice in choices:
        ids = (*prompt, *choice["token_ids"])
        own = np.array(choice["token_ids"], np.int32)[:, None]
        rows = local.score([Prompt("p", ids, tuple(range(len(prompt) - 1, len(ids) - 1)))], [own], 1)[0]
        assert [p["logprob"] for p in choice["logprobs"]["content"]] == pytest.approx(
            rows.logprobs_nats[:, 0], abs=1e-3
        )
    assert document["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    greedy = ask(server, n=3, max_tokens=4)["choices"]
    assert len({choice["message"]["content"] for choice in greedy}) == 1


def test_an_answer_that_ends_at_once_still_has_logprobs(server: ModelServer) -> None:
    choice = ask(server, max_tokens=4, logit_bias={"2": 100}, logprobs=True, top_logprobs=3)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert len(choice["logprobs"]["content"]) == 1
    assert choice["logprobs"]["content"][0]["id"] == 2
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 3


def test_completions_take_ids_and_echo_them(server: ModelServer, local: LocalWeights) -> None:
    ids = local.tokenize([FRANCE])[0]
    for prompt in (FRANCE, ids):
        choice = ask(server, COMPLETIONS, prompt=prompt, echo=True, logprobs=2, max_tokens=2)["choices"][0]
        assert choice["text"] == FRANCE + " Paris."
        assert choice["logprobs"]["tokens"] == ["The", " capital", " of", " France", " is", " Paris", "."]
        assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"] == [0, 3, 11, 14, 21, 24, 30]
    alone = ask(server, COMPLETIONS, prompt=ids, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    assert alone["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"][:-2]
    assert "logprobs" in ask(server, COMPLETIONS, prompt=ids)["choices"][0]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "role"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "half a character"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}, "the context holds 4096 tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, "needs logprobs"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True}, "does not stream"),
        (COMPLETIONS, {"prompt": ""}, "must hold tokens"),
        (COMPLETIONS, {"prompt": [49152]}, "0 to 49151"),
        (COMPLETIONS, {"prompt": ["x"]}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * 4096}, "the context holds 4096 tokens"),
        (COMPLETIONS, {"prompt": "x", "n": 100, "max_tokens": 1000}, "n times the prompt"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, "temperature"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"50000": 1}}, "49152"),
        (COMPLETIONS, {"prompt": "x", "mirostat": 2}, "mirostat"),
        ("/tokenize", {}, "name one of"),
        (COMPLETIONS, "[", "not a JSON object"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(path: str, body: Any, said: str, server: ModelServer) -> None:
    status, document = post(server, path, body)
    assert status == 400
    assert said in document["error"]["message"]
    assert document["error"]["type"] == "invalid_request_error"


# -- departures and lies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8-int8", "kv-fp8"])
def test_departures_that_llama_cpp_cannot_serve_can_be_seen(
    name: str, server: ModelServer, others: Callable[[str], ModelServer], local: LocalWeights, bf16: LocalWeights
) -> None:
    differences, of_bf16 = [], []
    for question in QUESTIONS:
        ids = chat_ids(local, question)
        true, departed = logprobs(server, question), logprobs(others(name), question, 1024)
        rows = bf16.score([Prompt("p", tuple(ids), (len(ids) - 1,))], [np.array([[*true]], np.int32)], 20)[0]
        of_bf16 += [*np.abs(rows.logprobs_nats[0] - [*true.values()])]
        differences += [abs(value - departed[token]) for token, value in true.items()]
    assert np.mean(of_bf16) > 0.001
    assert np.mean(differences) > 1.5 * np.mean(of_bf16)


def test_the_front_lies_over_this_server_too(server: ModelServer, local: LocalWeights) -> None:
    ids = local.tokenize([FRANCE])[0]
    with Front(server.port, Lies(), completions=True) as front, Front(server.port, Lies()) as closed:
        honest = ask(front, logprobs=True, top_logprobs=20)
        completion = ask(front, COMPLETIONS, prompt=ids, logprobs=20, prompt_logprobs=20, echo=True)
        for field in ("logprobs", "prompt_logprobs"):
            assert post(front, COMPLETIONS, {"model": MODEL_NAME, "prompt": ids, field: 21})[0] == 400
        assert post(front, "/tokenize", {"prompt": "x"})[0] == 404
        assert post(front, CHAT, {"model": "another", "messages": []})[0] == 404
        assert post(closed, COMPLETIONS, {"model": MODEL_NAME, "prompt": ids})[0] == 404
    assert honest["model"] == completion["model"] == MODEL_NAME
    assert completion["choices"][0]["text"] == FRANCE + " Paris"
    with Front(server.port, Lies(usage_offset=17, sentinels=True, max_top_logprobs=6), completions=True) as front:
        lied = ask(front, logprobs=True, top_logprobs=20)
        of_text = ask(front, COMPLETIONS, prompt=ids, logprobs=20)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert lied["usage"]["prompt_tokens"] == honest["usage"]["prompt_tokens"] + 17
    listed = [e["logprob"] for e in lied["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
    assert listed[3:] == [*of_text.values()][3:] == [-9999.0] * 3
    true = [e["logprob"] for e in honest["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
    assert listed[:3] == true[:3]
    with Front(server.port, Lies(logprobs_after_temperature=True), completions=True) as front:
        sharper = ask(front, logprobs=True, top_logprobs=5, temperature=0.5)["choices"][0]["logprobs"]["content"][0]
        body = {"model": MODEL_NAME, "prompt": ids, "logprobs": 5, "temperature": 0.5}
        assert post(front, COMPLETIONS, body)[0] == 400
    shown = [e["logprob"] for e in sharper["top_logprobs"]]
    assert np.diff(shown) == pytest.approx(2 * np.diff(true[:5]), abs=1e-5)
    with Front(server.port, Lies(max_top_logprobs=0), completions=True) as front:
        assert "logprobs" not in ask(front, logprobs=True, top_logprobs=5)["choices"][0]
        assert ask(front, COMPLETIONS, prompt=ids, logprobs=5, prompt_logprobs=1)["choices"][0]["logprobs"] is None


def test_requests_are_diverted_to_another_variant(server: ModelServer, others: Callable[[str], ModelServer]) -> None:
    other = others("kv-fp8")
    own, departed = logprobs(server, QUESTIONS[0]), logprobs(other, QUESTIONS[0])
    assert np.mean([abs(value - departed.get(token, value)) for token, value in own.items()]) > 0.02
    elsewhere = 0
    with Front(server.port, Lies(divert_share=0.5), diverted_port=other.port) as front:
        for n in range(12):
            question = f"{QUESTIONS[0]} ({n})"
            messages = [{"role": "user", "content": question}]
            content = ask(front, messages=messages, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
            top = {entry["id"]: entry["logprob"] for entry in content[0]["top_logprobs"]}
            possible = (logprobs(server, question), logprobs(other, question))
            assert top in possible
            elsewhere += top == possible[1]
    assert 2 <= elsewhere <= 10
