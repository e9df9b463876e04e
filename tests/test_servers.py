"""Trusted servers in the shapes of vLLM 0.32, SGLang and llama.cpp, and one real llama.cpp.

The host on loopback stands for shapes and faults only. What it answers is a function of the tokens that were sent, so a
value that lands at the wrong position cannot be right by accident.
"""

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fault_server import Call, FaultServer, html, large_body, not_utf8, nothing, refuses, says, silence, truncated_json
from weighbridge.errors import BundleError
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, VARIANTS
from weighbridge.records import Limits, Message
from weighbridge.reference.engine import Prompt, Rows
from weighbridge.reference.servers import ASKED_LOGPROBS, ASKED_PROMPT_LOGPROBS, MAX_TRIES, ServerKind, TrustedServer
from weighbridge.reference.templates import render_conversations

VOCABULARY = 1500
Found = TypeVar("Found")
KINDS: tuple[ServerKind, ...] = ("vllm", "sglang", "llama.cpp")
# The least that the list of one position holds: a prompt's is shorter than the last one with vLLM.
SHORTEST = {"vllm": ASKED_PROMPT_LOGPROBS, "sglang": ASKED_LOGPROBS, "llama.cpp": ASKED_LOGPROBS}
ONE = Prompt("one", (1, 17, 9, 4), (3,))
FORCED = Prompt("forced", (1, 17, 9, 4, 800, 801, 3, 12), (2, 4, 6, 7))
INSIDE = Prompt("inside", (1, 9, 17, 4, 44), (1, 3))  # does not ask for the last position
PROMPTS = (ONE, FORCED, INSIDE)


@cache
def truth(prefix: tuple[int, ...]) -> NDArray[np.float64]:
    """The logprobs after these tokens, on a grid as bfloat16 gives it, so that some are equal."""
    logits = np.round(np.random.default_rng(list(prefix)).normal(0, 2, VOCABULARY) * 16) / 16
    return np.asarray(logits - np.log(np.exp(logits).sum()))


@cache
def by_likelihood(prefix: tuple[int, ...]) -> list[int]:
    values = truth(prefix).tolist()
    return sorted(range(VOCABULARY), key=lambda token: (-values[token], token))


def likeliest(prefix: tuple[int, ...], count: int) -> list[int]:
    return by_likelihood(prefix)[:count]


def listed(prefix: tuple[int, ...], count: int) -> list[tuple[int, float]]:
    """What a server lists, in an order that promises nothing."""
    values = truth(prefix)
    tokens = likeliest(prefix, count)
    np.random.default_rng(len(prefix)).shuffle(tokens)
    return [(token, float(values[token])) for token in tokens]


def sampled(prefix: tuple[int, ...]) -> int:
    """A rather unlikely token: servers add it to the list."""
    return likeliest(prefix, VOCABULARY)[-1]


# -- the shapes ------------------------------------------------------------------------------------------------


def vllm(asked: dict[str, Any]) -> dict[str, Any]:
    ids = tuple(asked["prompt"])
    inside: list[Any] | None = None
    if "prompt_logprobs" in asked:
        inside = [None]
        for i in range(1, len(ids)):
            entries = [*listed(ids[:i], asked["prompt_logprobs"]), (ids[i], float(truth(ids[:i])[ids[i]]))]
            inside.append({str(t): {"logprob": v, "rank": 1, "decoded_token": "x"} for t, v in entries})
    new = sampled(ids)
    last = [*listed(ids, asked["logprobs"]), (new, float(truth(ids)[new]))]
    top = {f"token_id:{token}": value for token, value in last}
    return {
        "id": "cmpl-1", "object": "text_completion", "created": 0, "model": asked["model"],
        "choices": [{
            "index": 0, "text": " x", "finish_reason": "length", "stop_reason": None, "token_ids": None,
            "logprobs": {"text_offset": [0], "token_logprobs": [last[-1][1]], "tokens": [f"token_id:{new}"], "top_logprobs": [top]},
            "prompt_logprobs": inside, "prompt_token_ids": None,
        }],
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1},
    }  # fmt: skip


def sglang(asked: dict[str, Any]) -> dict[str, Any]:
    ids, start, count = tuple(asked["input_ids"]), asked["logprob_start_len"], asked["top_logprobs_num"]

    def entries(prefix: tuple[int, ...]) -> list[list[Any]]:
        return [[value, token, None] for token, value in listed(prefix, count)]

    # The first of the asked tokens has no list: nothing before it was scored.
    inside = [None, *(entries(ids[:i]) for i in range(start + 1, len(ids)))]
    new = sampled(ids)
    return {
        "text": "x",
        "meta_info": {
            "id": "1", "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": len(ids), "cached_tokens": 0,
            "input_token_logprobs": [[None, ids[start], None]], "input_top_logprobs": inside,
            "output_token_logprobs": [[float(truth(ids)[new]), new, None]], "output_top_logprobs": [entries(ids)],
        },
    }  # fmt: skip


def llamacpp(asked: dict[str, Any]) -> dict[str, Any]:
    ids = tuple(asked["prompt"])
    top = [{"id": t, "token": "x", "bytes": [120], "logprob": v} for t, v in listed(ids, asked["n_probs"])]
    new = sampled(ids)
    chosen = {"id": new, "token": "x", "bytes": [120], "logprob": float(truth(ids)[new]), "top_logprobs": top}
    return {"index": 0, "content": "x", "tokens": [], "stop": True, "completion_probabilities": [chosen]}


SHAPES: dict[ServerKind, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llamacpp,
}
PATHS = {"vllm": "/v1/completions", "sglang": "/generate", "llama.cpp": "/completion"}


def shaped(kind: ServerKind) -> Callable[[Call], None]:
    return lambda call: call.send_json(200, SHAPES[kind](call.request.document))


def ask(host: FaultServer, kind: ServerKind, *, concurrency: int = 1, timeout_s: float = 60) -> TrustedServer:
    server = TrustedServer(kind, host.origin, "smollm2", concurrency=concurrency)
    limits = Limits(timeout_s=timeout_s, concurrency=concurrency)
    server._endpoint = server._endpoint.model_copy(update={"limits": limits})
    return server


def assert_one_line(error: pytest.ExceptionInfo[BundleError]) -> str:
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 700
    assert error.value.next_step
    return said


# -- values and positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_belong_to_the_position_that_was_asked(kind: ServerKind) -> None:
    with FaultServer(shaped(kind)) as host:
        found = ask(host, kind).score(PROMPTS, [None] * 3, 64)
    assert {request.path for request in host.requests} == {PATHS[kind]}
    for prompt, rows in zip(PROMPTS, found, strict=True):
        assert rows.token_ids.shape == rows.logprobs_nats.shape == (len(prompt.positions), 64)
        assert [str(rows.token_ids.dtype), str(rows.logprobs_nats.dtype)] == ["int32", "float32"]
        for row, position in enumerate(prompt.positions):
            prefix = prompt.token_ids[: position + 1]
            # Most likely first, equal ones by id.
            assert rows.token_ids[row].tolist() == likeliest(prefix, 64)
            expected = truth(prefix)[rows.token_ids[row]].astype(np.float32)
            assert np.array_equal(rows.logprobs_nats[row], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_wanted_tokens_are_looked_up_and_unlisted_ones_are_unknown(kind: ServerKind) -> None:
    rng = np.random.default_rng(5)
    wanted = [
        np.stack([rng.permutation(VOCABULARY)[:200] for _ in prompt.positions]).astype(np.int32) for prompt in PROMPTS
    ]
    with FaultServer(shaped(kind)) as host:
        found = ask(host, kind).score(PROMPTS, wanted, 128)
    unknown = 0
    for prompt, asked, rows in zip(PROMPTS, wanted, found, strict=True):
        assert np.array_equal(rows.token_ids, asked)
        for row, position in enumerate(prompt.positions):
            prefix = prompt.token_ids[: position + 1]
            last = position == len(prompt.token_ids) - 1
            known = set(likeliest(prefix, ASKED_LOGPROBS if last else SHORTEST[kind]))
            if kind == "vllm":  # the token itself is always listed
                known.add(sampled(prefix) if last else prompt.token_ids[position + 1])
            expected = [truth(prefix)[t] if t in known else np.nan for t in asked[row].tolist()]
            unknown += int(np.isnan(expected).sum())
            assert np.array_equal(rows.logprobs_nats[row], np.array(expected, np.float32), equal_nan=True)
    assert unknown > 20


def test_token_ids_are_sent_untouched_and_only_the_needed_part_of_a_prompt_is_scored() -> None:
    with FaultServer(shaped("vllm")) as host:
        ask(host, "vllm").score(PROMPTS, [None] * 3, 20)
    sent = [request.document for request in host.requests]
    assert [body["prompt"] for body in sent] == [list(p.token_ids) for p in PROMPTS]
    assert ["prompt_logprobs" in body for body in sent] == [False, True, True]
    with FaultServer(shaped("sglang")) as host:
        ask(host, "sglang").score(PROMPTS, [None] * 3, 20)
    sent = [request.document for request in host.requests]
    assert [body["input_ids"] for body in sent] == [list(p.token_ids) for p in PROMPTS]
    assert [body["logprob_start_len"] for body in sent] == [3, 2, 1]
    with FaultServer(shaped("llama.cpp")) as host:
        ask(host, "llama.cpp").score(PROMPTS, [None] * 3, 20)
    prefixes = [list(p.token_ids[: i + 1]) for p in PROMPTS for i in p.positions]
    assert sorted(request.document["prompt"] for request in host.requests) == sorted(prefixes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_asks_for_the_plain_distribution(kind: ServerKind) -> None:
    with FaultServer(shaped(kind)) as host:
        ask(host, kind).score(PROMPTS, [None] * 3, 20)
    for request in host.requests:
        body = request.document | request.document.get("sampling_params", {})
        assert (body["temperature"], body["top_p"], body["min_p"]) == (1, 1, 0)
        assert body["top_k"] in ((-1,) if kind == "sglang" else (0,))
        assert {body.get(name) for name in ("max_tokens", "n_predict", "max_new_tokens")} - {None} == {1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_under_way_than_the_stack_says(kind: ServerKind, limit: int) -> None:
    lock, now, seen = threading.Lock(), 0, []
    full = threading.Barrier(limit)  # nothing is answered before as many are under way

    def slowly(call: Call) -> None:
        nonlocal now
        with lock:
            now += 1
            seen.append(now)
        full.wait(timeout=60)
        time.sleep(0.03)
        with lock:
            now -= 1
        shaped(kind)(call)

    prompts = [Prompt(f"p{i}", (1, 2, 3 + i), (2,)) for i in range(9)]
    with FaultServer(slowly) as host:
        found = ask(host, kind, concurrency=limit).score(prompts, [None] * 9, 20)
    assert max(seen) == limit
    for prompt, rows in zip(prompts, found, strict=True):  # whichever came back first
        assert rows.token_ids[0].tolist() == likeliest(prompt.token_ids, 20)


@pytest.mark.parametrize(("kind", "path"), [("vllm", "/tokenize"), ("sglang", "/v1/tokenize"), ("llama.cpp", "/tokenize")])  # fmt: skip
def test_texts_are_tokenised_by_the_server_without_added_tokens(kind: ServerKind, path: str) -> None:
    def answer(call: Call) -> None:
        body = call.request.document
        text = body["content" if kind == "llama.cpp" else "prompt"]
        assert body["add_special" if kind == "llama.cpp" else "add_special_tokens"] is False
        call.send_json(200, {"count": len(text), "max_model_len": 4096, "tokens": [ord(c) for c in text]})

    with FaultServer(answer) as host:
        assert ask(host, kind).tokenize(["ab", "", "c"]) == [[97, 98], [], [99]]
    assert {request.path for request in host.requests} == {path}


def test_an_end_of_turn_that_llamacpp_lists_nothing_for_is_drawn_again_with_another_seed() -> None:
    def answer(call: Call) -> None:
        body = call.request.document
        if body["seed"] < 3:
            call.send_json(200, {"content": "", "stop": True, "completion_probabilities": []})
        else:
            shaped("llama.cpp")(call)

    with FaultServer(answer) as host:
        rows = ask(host, "llama.cpp").score([ONE], [None], 20)[0]
    assert rows.token_ids[0].tolist() == likeliest(ONE.token_ids, 20)
    assert [request.document["seed"] for request in host.requests] == [0, 1, 2, 3]
    with FaultServer(says({"content": "", "completion_probabilities": []})) as host, pytest.raises(BundleError) as error:  # fmt: skip
        ask(host, "llama.cpp").score([ONE], [None], 20)
    assert str(MAX_TRIES) in assert_one_line(error)
    assert len(host.requests) == MAX_TRIES


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_server_that_returns_fewer_logprobs_than_asked_is_named_with_the_remedy(
    kind: ServerKind, wanted: bool
) -> None:
    def capped(call: Call) -> None:
        document = dict(call.request.document)
        for name in ("logprobs", "prompt_logprobs", "top_logprobs_num", "n_probs"):
            document |= {name: 15} if name in document else {}
        call.send_json(200, SHAPES[kind](document))

    asked = [np.zeros((len(p.positions), 30), np.int32) if wanted else None for p in PROMPTS]
    with FaultServer(capped) as host, pytest.raises(BundleError) as error:
        ask(host, kind).score(PROMPTS, asked, 128)
    said = assert_one_line(error)
    assert kind in said
    assert "fewer" in said or "logprobs for" in said
    assert "--max-logprobs" in error.value.next_step
    assert "top_k" in error.value.next_step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (refuses(400, "Requested sample logprobs of 1024, which is greater than max allowed: 20"), "greater than max allowed: 20"),
        (refuses(500, "worker died"), "worker died"),
        (refuses(404, "The model `nix` does not exist"), "404"),
        (html, "no JSON object"), (nothing, "no JSON object"), (not_utf8, "no JSON object"),
        (truncated_json, "no JSON object"), (says([1, 2]), "no JSON object"), (says(None), "no JSON object"),
        (lambda call: call.send(200, b"[" * 200_000), "no JSON object"), (large_body, "too_large"),
        (lambda call: call.drop(), "connection_lost"),
    ],
    ids=["400", "500", "404", "html", "empty", "garbage", "cut", "list", "null", "deep", "huge", "dropped"],
)  # fmt: skip
def test_whatever_fails_is_one_line_that_names_server_and_remedy(
    kind: ServerKind, answer: Callable[[Call], None], said: str
) -> None:
    calls: list[Callable[[TrustedServer], object]] = [
        lambda server: server.score(PROMPTS, [None] * 3, 20),
        lambda server: server.tokenize(["a", "b"]),
    ]
    with FaultServer(answer) as host:
        for call in calls:
            with pytest.raises(BundleError) as error:
                call(ask(host, kind, concurrency=2))
            line = assert_one_line(error)
            assert said in line
            assert host.origin in line
            assert "docs/REFERENCES.md" in error.value.next_step


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_hangs_is_given_up(kind: ServerKind) -> None:
    started = time.monotonic()
    with FaultServer(silence) as host, pytest.raises(BundleError, match="timeout") as error:
        ask(host, kind, timeout_s=0.3).score([ONE], [None], 20)
    assert_one_line(error)
    assert time.monotonic() - started < 30


def test_a_server_that_is_not_there_is_named() -> None:
    with FaultServer(nothing) as host:
        origin = host.origin
    with pytest.raises(BundleError, match="refused") as error:
        TrustedServer("vllm", origin, "smollm2").score([ONE], [None], 20)
    assert origin in assert_one_line(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", ["\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m \u202e", "two\r\nlines\n" * 500])
def test_what_a_server_says_cannot_move_the_terminal(kind: ServerKind, body: str) -> None:
    with FaultServer(lambda call: call.send(500, body.encode())) as host, pytest.raises(BundleError) as error:
        ask(host, kind).score([ONE], [None], 20)
    line = assert_one_line(error)
    assert "\x1b" not in line
    assert "red" in line or "lines" in line


# -- any answer at all -------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, VOCABULARY),
    st.sampled_from([-(10**400), 10**400, 2**31, 2**63, -1]),
    st.floats(width=64),
    st.just(0.7),
)
ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["token_id:3", "token_id:", "7", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("logprob"), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON document, in which long lists are represented by their first entries."""
    yield path
    if isinstance(document, dict):
        for key in list(document)[:12]:
            yield from places(document[key], (*path, key))
    elif isinstance(document, list):
        for i, inner in enumerate(document[:4]):
            yield from places(inner, (*path, i))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = document.copy()
    copy[path[0]] = replaced(document[path[0]], path[1:], value)
    return copy


def small(kind: ServerKind, prompt: Prompt) -> dict[str, Any]:
    """A good answer with lists of 25."""
    body = {"vllm": {"model": "m", "prompt": prompt.token_ids, "logprobs": 25, "prompt_logprobs": 25},
            "sglang": {"input_ids": prompt.token_ids, "logprob_start_len": min(prompt.positions), "top_logprobs_num": 25},
            "llama.cpp": {"prompt": prompt.token_ids, "n_probs": 25}}[kind]  # fmt: skip
    return cast(dict[str, Any], json.loads(json.dumps(SHAPES[kind](body))))


@pytest.fixture(scope="module")
def saying() -> Iterator[tuple[FaultServer, list[bytes]]]:
    body = [b""]
    with FaultServer(lambda call: call.send(200, body[0])) as host:
        yield host, body


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_json_is_read_or_refused_in_one_line(
    kind: ServerKind, saying: tuple[FaultServer, list[bytes]], data: st.DataObject
) -> None:
    host, body = saying
    good = small(kind, FORCED)
    where = data.draw(st.sampled_from(list(places(good))))
    document = replaced(good, where, data.draw(ANY_JSON))
    body[0] = _json(document)
    wanted = data.draw(st.sampled_from([None, np.tile(np.arange(30, dtype=np.int32), (4, 1))]))
    rows = unless_refused(lambda: ask(host, kind, concurrency=4).score([FORCED], [wanted], 20)[0])
    if rows is not None:
        _assert_plausible(rows)
    body[0] = _json({"tokens": data.draw(ANY_JSON)})
    tokens = unless_refused(lambda: ask(host, kind).tokenize(["a"])[0])
    assert all(type(token) is int and 0 <= token < 2**31 for token in tokens or [])


def unless_refused(read: Callable[[], Found]) -> Found | None:
    """What was read, or None where it was refused in one line."""
    said = ""
    try:
        return read()
    except BundleError as error:
        said = str(error)
    assert said.isprintable()
    return None


def _json(document: object) -> bytes:
    """As json writes it, with integers of any length."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _assert_plausible(rows: Rows) -> None:
    assert (rows.token_ids >= 0).all()
    assert not np.isinf(rows.logprobs_nats).any()
    assert (np.nan_to_num(rows.logprobs_nats) <= 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, "x", "-1.5", True, 0.7, float("nan"), float("inf"), -(10**400), [], {}])
def test_a_logprob_that_is_none_is_refused_not_recorded(kind: ServerKind, value: object) -> None:
    good = small(kind, FORCED)
    ways: dict[ServerKind, tuple[Any, ...]] = {
        "vllm": ("choices", 0, "logprobs", "top_logprobs", 0, f"token_id:{likeliest(FORCED.token_ids, 1)[0]}"),
        "sglang": ("meta_info", "output_top_logprobs", 0, 2, 0),
        "llama.cpp": ("completion_probabilities", 0, "top_logprobs", 2, "logprob"),
    }
    with FaultServer(lambda call: call.send(200, _json(replaced(good, ways[kind], value)))) as host, pytest.raises(BundleError) as error:  # fmt: skip
        ask(host, kind).score([FORCED], [None], 20)
    assert_one_line(error)


# -- the real one --------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_a_real_llamacpp_says_the_same_by_token_ids_as_on_the_chat_route() -> None:
    messages = [{"role": "user", "content": "Name one planet that has rings. Answer with its name only."}]
    text = render_conversations(
        OFFICIAL_TEMPLATE, [[Message(role="user", content=messages[0]["content"])]], special_tokens={}, name="official"
    )[0]
    with lab_backend(VARIANTS["f16"], lambda _: None) as backend:
        server = TrustedServer("llama.cpp", backend.base_url, "lab")
        ids = server.tokenize([text])[0]
        # Two places that follow each other would be asked as an answer is, from what was computed for the one before.
        rows = server.score([Prompt("planet", tuple(ids), (len(ids) - 3, len(ids) - 1))], [None], 20)[0]
        body = {
            "messages": messages,
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 1,
            "temperature": 1,
            "seed": 1,
        }
        request = urllib.request.Request(
            f"{backend.base_url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            chat = json.load(reply)
    assert chat["usage"]["prompt_tokens"] == len(ids)
    top = {entry["id"]: entry["logprob"] for entry in chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    assert rows.token_ids[1].tolist() == sorted(top, key=lambda token: (-top[token], token))
    np.testing.assert_allclose(rows.logprobs_nats[1], [top[t] for t in rows.token_ids[1].tolist()], atol=2e-4)
    assert np.abs(rows.logprobs_nats[0] - rows.logprobs_nats[1]).max() > 0.1
