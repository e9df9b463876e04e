"""The checks of the host's service and of its sampling, on answers of a made-up host whose lies are known.

The host draws from made-up distributions that depend on nothing but the text before them, as a model's do. No endpoint is asked.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from weighbridge.judge.case import Case
from weighbridge.judge.checks.caching import check_caching
from weighbridge.judge.checks.counting import check_counting
from weighbridge.judge.checks.parameters import STANDARD, check_parameters, treatments
from weighbridge.judge.checks.reasoning import check_reasoning, hides_reasoning, reasons
from weighbridge.judge.checks.sampling import check_sampling, draws_of
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan
from weighbridge.records import Capability, Endpoint, Observation, Plan, PlannedRequest, Position, TopToken
from weighbridge.reference.bundle import load_bundle
from weighbridge.sampling import STOP

Floats = NDArray[np.float64]
WORDS = [f" {a}{b}" for a in "bdfgklmnprst" for b in "aeio"]  # STOP is in a quarter of them
WORDS.append(" blue")  # the token that is asked for by its number
LISTED = 20
POLICY = load_policy("strict")


@cache
def library() -> Library:
    return build_library(load_bundle("smollm2-135m-instruct"), POLICY, LISTED)


@cache
def plan() -> Plan:
    endpoint = Endpoint(name="made up", base_url="http://127.0.0.1:1/v1", model="made-up")
    # The run's id stands in the prompts, on which the hosts' draws depend.
    return make_plan(endpoint, POLICY, library().bundle, seed="x", run_id="0123456789abcdef")


@dataclass
class Host:
    """What answers, and its lies. ``writer`` is the model that writes the text where it is not that of the logprobs."""

    model: int = 1
    writer: int | None = None
    ignored: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    max_temperature: float = 10.0
    min_p: float = 0.0
    top_k: int = len(WORDS)
    top_p: float = 1.0
    flips_by_noise: float = 0.0
    logprobs: bool = True
    after_temperature: bool = False
    stored: bool = False
    sticky: bool = False
    seconds: float = 1.0
    counted_more: int = 0
    same_numbers: bool = False
    drawn_before: int = 0

    def answer(self, request: PlannedRequest) -> Observation:
        settings = {k: v for k, v in request.settings.items() if k not in self.ignored}
        name = request.probe.id.removeprefix("sampling-")
        facts: dict[str, Any] = {
            "request_id": request.request_id,
            "probe_id": request.probe.id,
            "attempts": 1,
            "latency_s": self.seconds,
        }
        tools = [] if "tools" in self.ignored else request.probe.tools or []
        if {*settings, *(["tools"] if tools else [])} & set(self.refused):
            return Observation(**facts, answered=False, status=400, fault="http_400", fault_detail="not supported")
        prompt = request.probe.messages[-1].content
        length = 64 if "max_tokens" in self.ignored else request.max_tokens
        if self.stored:
            settings, length = {"temperature": 0.0}, min(length, 8)
            facts["latency_s"] = self.seconds if name == "cold-nonce" else self.seconds / 50
        text, positions = self.write(prompt, length, settings)
        return Observation(
            **facts, answered=True, status=200, text=text, positions=positions if self.logprobs and request.max_tokens > 1 else None,
            top=positions[0].top if self.logprobs else None, fault=None if self.logprobs else "no_logprobs",
            drawn=TopToken(bytes_hex=positions[0].bytes_hex or "", logprob_nats=positions[0].logprob_nats or 0.0) if self.logprobs else None,
            choices=settings.get("n", 1), streamed=bool(settings.get("stream")), prompt_tokens=len(prompt) // 4 + 40 * bool(tools),
            completion_tokens=len(positions) + self.counted_more,
        )  # fmt: skip

    def write(self, prompt: str, length: int, settings: dict[str, Any]) -> tuple[str, list[Position]]:
        temperature = min(settings.get("temperature", 1.0), self.max_temperature)
        seed = settings.get("seed")
        self.drawn_before += 1
        rng = np.random.default_rng([seed, 77] if seed is not None else [self.drawn_before, 78])
        if self.same_numbers:
            rng = np.random.default_rng([self.model, 79])
        before: list[int] = []
        positions = []
        for _ in range(length):
            told = distribution(self.model, prompt, before, sticky=self.sticky)
            own = told if self.writer is None else distribution(self.writer, prompt, before)
            drawn = self.draw(own, before, temperature, settings, rng)
            shown = told if not self.after_temperature or temperature == 0 else normalised(told / temperature)
            top = [
                TopToken(bytes_hex=WORDS[i].encode().hex(), logprob_nats=float(shown[i]))
                for i in np.argsort(-shown)[:LISTED]
            ]
            positions.append(Position(bytes_hex=WORDS[drawn].encode().hex(), logprob_nats=float(shown[drawn]), top=top))
            before.append(drawn)
            if any(stop in WORDS[drawn] for stop in settings.get("stop", ())):
                break
        text = "".join(WORDS[i] for i in before)
        for stop in settings.get("stop", ()):
            text = text.split(stop)[0]
        return text, positions

    def draw(
        self, own: Floats, before: list[int], temperature: float, settings: dict[str, Any], rng: np.random.Generator
    ) -> int:
        values = own.copy()
        for i, times in Counter(before).items():
            values[i] -= settings.get("frequency_penalty", 0) * times + settings.get("presence_penalty", 0)
        if "logit_bias" in settings:
            wanted = library().bundle.vocabulary[int(next(iter(settings["logit_bias"])))].decode()
            values[WORDS.index(wanted)] += 100
        if temperature == 0:
            best = np.argsort(-values)
            return int(
                best[1] if rng.random() < self.flips_by_noise and values[best[0]] - values[best[1]] < 0.2 else best[0]
            )
        values = normalised(values / temperature)
        shares = np.exp(values)
        order = np.argsort(-shares)
        keep = np.zeros(len(shares), np.bool_)
        keep[order[: min(self.top_k, settings.get("top_k", -1) if settings.get("top_k", -1) > 0 else len(shares))]] = (
            True
        )
        nucleus = settings.get("top_p", self.top_p)
        keep[order[1:][shares[order].cumsum()[:-1] >= nucleus]] = False
        keep &= shares >= settings.get("min_p", self.min_p) * shares.max()
        keep[order[0]] = True
        shares = np.where(keep, shares, 0)
        # A server that sorts first gives one random number one rank.
        places = order if self.same_numbers else np.arange(len(shares))
        return int(places[rng.choice(len(shares), p=shares[places] / shares.sum())])


def normalised(values: Floats) -> Floats:
    return np.asarray(values - np.log(np.exp(values - values.max()).sum()) - values.max())


def distribution(model: int, prompt: str, before: list[int], *, sticky: bool = False) -> Floats:
    """Logprobs of the words after a text; a prompt that asks for one word again and again gets it, with a small lead."""
    where = hashlib.sha256(repr((model, prompt, before)).encode()).digest()
    logits = np.random.default_rng(list(where)).normal(0, 2.0, len(WORDS))
    if sticky or "Repeat" in prompt:
        logits[7] = logits.max() + 0.8
    return normalised(logits)


def case_of(
    host: Host, change: Callable[[Observation], Observation] | None = None, regime: Any = "before_temperature"
) -> Case:
    requests = [r for r in plan().sampling_requests if not r.request_id.startswith("sampling-effort")]
    prompts = [o.model_copy(update={"top": None, "drawn": None}) for o in map(host.answer, plan().prompt_requests)]
    answers = [host.answer(r) for r in requests]
    capability = Capability(
        reachable=True, top_logprobs=LISTED if host.logprobs else 0, temperature_regime=regime, usage_reported=True,
    )  # fmt: skip
    return open_case(plan(), capability, [*prompts, *(map(change, answers) if change else answers)], library())


def changed(name: str, **update: Any) -> Callable[[Observation], Observation]:
    return lambda o: o.model_copy(update=update) if o.probe_id == f"sampling-{name}" else o


def everywhere(**update: Any) -> Callable[[Observation], Observation]:
    return lambda o: o.model_copy(update=update)


def first_tokens(host: Host, temperature: float, count: int = 100) -> list[Observation]:
    """Answers of one token each to as many prompts."""
    requests = [r.model_copy(update={"settings": {"temperature": temperature}}) for r in plan().probe_requests[:count]]
    return [host.answer(r) for r in requests]


def test_the_word_that_is_asked_for_by_its_number_is_one_of_the_hosts() -> None:
    request = next(r for r in plan().sampling_requests if r.probe.id == "sampling-bias")
    assert Host().answer(request).text == WORDS[-1]


# -- parameters ------------------------------------------------------------------------------------------------


def test_an_honest_host_honours_every_parameter() -> None:
    case = case_of(Host())
    assert treatments(case) == dict.fromkeys(treatments(case), "honoured")
    finding = check_parameters(case)
    assert (finding.check, finding.axis, finding.outcome) == ("parameters", "service", "consistent")
    assert finding.details["parameters"] == treatments(case)
    assert finding.to_resolve is None


REQUEST_FIELDS = {name: name for name in ("top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "stop", "max_tokens", "n", "logit_bias")}  # fmt: skip


@pytest.mark.parametrize("name", REQUEST_FIELDS)
def test_a_parameter_that_is_dropped_in_silence_is_called_ignored(name: str) -> None:
    case = case_of(Host(ignored=(name,)))
    found = treatments(case)
    assert found[name] == "ignored"
    assert {other for other, word in found.items() if word == "ignored"} == {name}
    finding = check_parameters(case)
    # Nobody has to know an extension of the API, so only the others are held against a host.
    assert finding.outcome == ("inconsistent" if name in STANDARD else "consistent")
    assert (finding.to_resolve is not None) == (name in STANDARD)


def test_tools_that_leave_the_prompt_as_it_was_are_not_told_to_the_model() -> None:
    assert treatments(case_of(Host(ignored=("tools",))))["tools"] == "no_effect"
    assert check_parameters(case_of(Host(ignored=("tools",)))).outcome == "consistent"


@pytest.mark.parametrize("name", [*REQUEST_FIELDS.keys() - {"max_tokens", "seed", "top_p", "top_k", "min_p"}, "tools"])
def test_a_refusal_is_an_answer(name: str) -> None:
    case = case_of(Host(refused=(name,)))
    assert treatments(case)[name] == "refused"
    assert check_parameters(case).outcome == "consistent"


@pytest.mark.parametrize("fault", ["timeout", "connection_lost", "http_500", "http_429"])
def test_a_failure_is_no_refusal(fault: str) -> None:
    case = case_of(Host(), changed("stop", answered=False, fault=fault, text=None))
    assert treatments(case)["stop"] == "unclear"


def test_a_temperature_that_is_ignored_leaves_other_parameters_open() -> None:
    """Where the text of temperature 0 is another one each time, a text that differs from it shows nothing."""
    found = treatments(case_of(Host(ignored=("temperature",))))
    assert "ignored" not in {found[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    # With a seed that is ignored as well, nothing repeats.
    found = treatments(case_of(Host(ignored=("temperature", "seed"))))
    assert found["temperature"] == found["seed"] == found["top_k"] == "unclear"


def test_texts_that_never_vary_leave_parameters_open() -> None:
    found = treatments(case_of(Host(stored=True)))
    assert {found[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed")} == {"unclear"}


def test_a_penalty_that_need_not_change_a_text_is_not_called_ignored() -> None:
    """Where every word is new, or the lead over a new one is larger than the penalty, nothing had to change."""

    def far_ahead(o: Observation) -> Observation:
        if o.probe_id not in ("sampling-red", "sampling-presence", "sampling-frequency"):
            return o
        top = [TopToken(bytes_hex=WORDS[i].encode().hex(), logprob_nats=-0.01 - 40.0 * i) for i in range(5)]
        return o.model_copy(
            update={
                "text": WORDS[0] * 3,
                "positions": [Position(bytes_hex=top[0].bytes_hex, logprob_nats=-0.01, top=top)] * 3,
            }
        )

    found = treatments(case_of(Host(), far_ahead))
    assert found["presence_penalty"] == found["frequency_penalty"] == "unclear"


def test_a_frequency_penalty_grows_with_every_repeat() -> None:
    """A lead of five is too large for a penalty of 2, and not for the third repeat's 6."""

    def ahead(o: Observation) -> Observation:
        if o.probe_id not in ("sampling-red", "sampling-presence", "sampling-frequency"):
            return o
        top = [TopToken(bytes_hex=WORDS[i].encode().hex(), logprob_nats=-0.01 - 5.0 * i) for i in range(5)]
        return o.model_copy(
            update={
                "text": WORDS[0] * 4,
                "positions": [Position(bytes_hex=top[0].bytes_hex, logprob_nats=-0.01, top=top)] * 4,
            }
        )

    found = treatments(case_of(Host(), ahead))
    assert (found["presence_penalty"], found["frequency_penalty"]) == ("unclear", "ignored")


def test_what_was_not_asked_is_inconclusive_and_what_was_not_answered_is_not_supported() -> None:
    case = case_of(Host())
    nothing = check_parameters(replace(case, sampling={}))
    assert (nothing.outcome, nothing.to_resolve) == ("inconclusive", "Raise --max-requests")
    silent = {n: o.model_copy(update={"answered": False, "fault": "http_400"}) for n, o in case.sampling.items()}
    assert check_parameters(replace(case, sampling=silent)).outcome == "not_supported"


def test_parameters_that_were_not_asked_are_not_named() -> None:
    case = case_of(Host())
    some = {n: o for n, o in case.sampling.items() if n in ("cold", "cold-again", "warm", "warm-other")}
    found = treatments(replace(case, sampling=some))
    assert {n for n, word in found.items() if word == "honoured"} == {"temperature", "max_tokens"}
    assert set(found.values()) == {"honoured", "not_asked"}


def test_a_stop_sequence_that_the_text_never_holds_tells_nothing() -> None:
    without = "".join(word for word in WORDS[:8] if STOP not in word)
    found = treatments(case_of(Host(), everywhere(text=without)))
    assert found["stop"] == "unclear"


# -- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "cut", [{}, {"min_p": 0.05}, {"min_p": 0.1}, {"top_k": 20}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.95, "min_p": 0.05}], ids=repr,
)  # fmt: skip
def test_an_honest_host_is_consistent_whatever_its_defaults_cut_off(cut: dict[str, Any], seed: int) -> None:
    host = Host(model=seed, **cut)
    case = case_of(host)
    finding = check_sampling(replace(case, answers=first_tokens(host, 1.0, 40)))
    assert (finding.check, finding.axis, finding.outcome) == ("sampling", "sampling", "consistent")
    assert finding.details["not_the_likeliest_at_0"] == 0
    assert finding.details["drawn_at_temperature_0"] >= 30
    assert finding.details["drawn_at_temperature_1"] >= 50


def test_a_host_that_takes_the_same_random_numbers_for_every_request_is_not_accused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first tokens of all its answers are one draw; taken for many they look as if drawn at another temperature."""
    cases = []
    for model in range(12):
        host = Host(model=model, same_numbers=True)
        cases.append(replace(case_of(host), answers=first_tokens(host, 1.0, 40)))
    assert [check_sampling(case).outcome for case in cases] == ["consistent"] * len(cases)
    monkeypatch.setattr("weighbridge.judge.checks.sampling._draws_anew", lambda _: True)
    assert "inconsistent" in {check_sampling(case).outcome for case in cases}


@pytest.mark.parametrize("seed", range(6))
def test_an_honest_host_whose_likeliest_token_is_always_the_same_is_consistent(seed: int) -> None:
    """What is left out of the draws must not depend on what was drawn, or honest draws look colder than they are."""
    host = Host(model=seed, sticky=True)
    finding = check_sampling(replace(case_of(host), answers=first_tokens(host, 1.0, 40)))
    assert finding.outcome == "consistent"
    # An interval that is too wide to say anything is not stated.
    effect = next((e for e in finding.effects if e.name == "temperature drawn at, where 2 was asked for"), None)
    assert effect is None or (effect.high is not None and effect.high >= 2)


@pytest.mark.parametrize("seed", range(6))
def test_near_ties_that_fall_otherwise_are_no_flips(seed: int) -> None:
    """Text and logprobs may come from two kernels: what leads by less than their noise is not the likeliest token."""
    finding = check_sampling(case_of(Host(model=seed, flips_by_noise=1.0)))
    assert finding.outcome == "consistent"


@pytest.mark.parametrize("seed", range(6))
def test_a_temperature_that_is_ignored_is_found_at_temperature_0(seed: int) -> None:
    finding = check_sampling(case_of(Host(model=seed, ignored=("temperature", "seed"))))
    assert (finding.outcome, finding.cause) == ("inconsistent", "sampling")
    assert finding.log10_e_value is not None
    assert finding.log10_e_value >= 3
    assert "At temperature 0 tokens are drawn as at" in finding.summary
    effect = next(e for e in finding.effects if e.name == "temperature drawn at, where 0 was asked for")
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low <= 1 <= effect.high
    assert "as at 1: it is ignored" in finding.summary


@pytest.mark.parametrize("seed", range(6))
def test_text_that_another_model_writes_is_found(seed: int) -> None:
    finding = check_sampling(case_of(Host(model=seed, writer=seed + 100)))
    assert (finding.outcome, finding.cause) == ("inconsistent", "route")
    assert "text and logprobs are not of one model" in finding.summary


@pytest.mark.parametrize("asked_as", [0.2, 3.0])
def test_another_temperature_than_1_is_found_in_the_first_tokens(asked_as: float) -> None:
    host = Host(model=3)
    case = replace(case_of(host), answers=first_tokens(host, asked_as))
    finding = check_sampling(case)
    assert (finding.outcome, finding.cause) == ("inconsistent", "sampling")
    effect = next(e for e in finding.effects if e.name == "temperature drawn at, where 1 was asked for")
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low > 1 or effect.high < 1


@pytest.mark.parametrize("cut", [{"top_k": 8}, {"top_k": 20}, {"min_p": 0.1}, {"top_k": 8, "min_p": 0.05}], ids=repr)
def test_a_host_that_cannot_be_told_to_leave_nothing_out_is_not_said_to_clamp(cut: dict[str, Any]) -> None:
    """`top_k` and `min_p` are not OpenAI's: a host that ignores them leaves out what it always does."""
    found = [check_sampling(case_of(Host(model=m, ignored=("top_k", "min_p"), **cut))) for m in range(12)]
    assert not [f.summary for f in found if "temperature 2" in f.summary]


def test_a_high_temperature_that_is_clamped_is_found() -> None:
    found = [check_sampling(case_of(Host(model=seed, max_temperature=1.0))) for seed in range(8)]
    clamped = [f for f in found if f.outcome == "inconsistent"]
    # From sixteen tokens not every draw tells 1 from 2; none is called anything else.
    assert len(clamped) >= 2
    assert all(f.outcome in ("consistent", "inconsistent") for f in found)
    for finding in clamped:
        assert finding.cause == "sampling"
        assert "At temperature 2 tokens are drawn as at 1: it is ignored" in finding.summary


def test_the_temperature_that_was_asked_for_is_inside_its_interval() -> None:
    for regime, after in (("before_temperature", False), ("after_temperature", True)):
        inside = 0
        for seed in range(6):
            finding = check_sampling(case_of(Host(model=seed, after_temperature=after), regime=regime))
            assert finding.outcome == "consistent"
            effect = next((e for e in finding.effects if e.name == "temperature drawn at, where 2 was asked for"), None)
            # An interval that is too wide to say anything is not stated.
            inside += effect is None or bool(effect.low <= 2 <= effect.high)  # type: ignore[operator]
        assert inside >= 5


def test_a_nucleus_that_is_ignored_is_found() -> None:
    finding = check_sampling(case_of(Host(ignored=("top_p",))))
    assert (finding.outcome, finding.cause) == ("inconsistent", "sampling")
    assert "top_p is ignored" in finding.summary


def test_without_logprobs_texts_alone_accuse_nobody() -> None:
    for host in (
        Host(logprobs=False),
        Host(logprobs=False, ignored=("temperature", "seed")),
        Host(logprobs=False, stored=True),
    ):
        finding = check_sampling(case_of(host))
        assert (finding.outcome, finding.cause) == ("inconclusive", None)
        assert finding.to_resolve == "Ask the host for logprobs"
    texts = [
        check_sampling(case_of(h)).summary
        for h in (
            Host(logprobs=False),
            Host(logprobs=False, ignored=("temperature", "seed")),
            Host(logprobs=False, stored=True),
        )
    ]
    assert [t.split(";")[0].split(",")[0].split(":")[0] for t in texts] == [
        "Texts repeat at temperature 0 and vary at temperature 1",
        "At temperature 0 the same request does not give the same text again",
        "Two seeds at temperature 1 give one text",
    ]


def test_what_was_not_asked_is_not_judged() -> None:
    host = Host()
    case = replace(case_of(host), sampling={}, answers=first_tokens(host, 1.0))
    assert check_sampling(case).outcome == "inconclusive"
    cold_missing = {n: o for n, o in case_of(host).sampling.items() if n.startswith("warm")}
    finding = check_sampling(replace(case, sampling=cold_missing))
    assert (finding.outcome, finding.to_resolve) == ("inconclusive", "Raise --max-requests")


def test_draws_are_put_beside_their_lists() -> None:
    a, b, c = (TopToken(bytes_hex=n.encode().hex(), logprob_nats=x) for n, x in (("a", -0.5), ("b", -1.5), ("c", -4.0)))
    unlisted = TopToken(bytes_hex="ff", logprob_nats=-6.0)
    draws = draws_of([(a, [a, b, c]), (c, [a, b, c]), (unlisted, [a, b]), (None, [a, b]), (a, [a])])
    assert draws.count == 3
    assert draws.drawn.tolist() == [0, 2, 3]  # the last cell is what is not listed
    np.testing.assert_allclose(draws.leads, [0, 3.5, 5.5])
    np.testing.assert_allclose(np.exp(draws.cells).sum(axis=1), 1)


def test_a_place_where_the_likeliest_token_has_been_before_tells_nothing() -> None:
    """Some servers penalise repeats by themselves."""

    def passed_over(o: Observation) -> Observation:
        positions = []
        for n, position in enumerate(o.positions or []):
            again = position.top[0].model_copy(update={"bytes_hex": WORDS[0].encode().hex()})
            drawn = WORDS[0] if n == 0 else WORDS[1 + n]
            positions.append(
                Position(bytes_hex=drawn.encode().hex(), logprob_nats=-5.0, top=[again, *position.top[1:]])
            )
        return o.model_copy(update={"positions": positions}) if o.positions else o

    case = case_of(Host(), lambda o: passed_over(o) if o.probe_id.startswith(("sampling-cold", "sampling-red")) else o)
    finding = check_sampling(case)
    assert finding.details["not_the_likeliest_at_0"] == 0
    assert finding.outcome != "inconsistent"


# -- caching ---------------------------------------------------------------------------------------------------


def test_stored_answers_that_come_at_once_are_found() -> None:
    finding = check_caching(case_of(Host(stored=True)))
    assert (finding.check, finding.axis, finding.outcome) == ("caching", "service", "inconsistent")
    assert "50 times as fast" in finding.summary
    assert finding.details["same_text_again"] is True


def test_one_text_for_all_seeds_alone_is_no_cache() -> None:
    """A model that is sure of its text gives it at every temperature; only with a sign of a cache is it one."""
    slow = everywhere(latency_s=1.0)
    assert check_caching(case_of(Host(stored=True), slow)).outcome == "consistent"
    said = everywhere(latency_s=1.0, cached_tokens=12)
    assert check_caching(case_of(Host(stored=True), said)).outcome == "inconsistent"


def test_a_prompt_cache_is_no_stored_answer() -> None:
    finding = check_caching(case_of(Host(), everywhere(cached_tokens=30)))
    assert finding.outcome == "consistent"
    assert "up to 30 prompt tokens are said to come from a cache" in finding.summary


def test_an_honest_host_shows_no_sign_of_stored_answers() -> None:
    finding = check_caching(case_of(Host()))
    assert (finding.outcome, finding.summary) == (
        "consistent",
        "Each request is answered anew: no sign of stored answers",
    )


def test_texts_that_never_repeat_are_said() -> None:
    finding = check_caching(case_of(Host(ignored=("temperature", "seed"))))
    assert finding.outcome == "consistent"
    assert "another text each time" in finding.summary


@pytest.mark.parametrize("missing", ["cold", "cold-again"])
def test_without_repeats_nothing_is_said_of_a_cache(missing: str) -> None:
    case = case_of(Host())
    left = {n: o for n, o in case.sampling.items() if n != missing}
    assert check_caching(replace(case, sampling=left)).outcome == "inconclusive"
    assert check_caching(case_of(Host(), changed(missing, answered=False, fault="timeout"))).outcome == "inconclusive"


# -- counting --------------------------------------------------------------------------------------------------


def test_counts_that_are_those_of_what_came_are_right() -> None:
    finding = check_counting(case_of(Host()))
    assert (finding.check, finding.axis, finding.outcome) == ("counting", "service", "consistent")
    assert finding.details["latency_s"] == 1.0
    assert "a stream" in finding.details["checked"]


@pytest.mark.parametrize(
    ("more", "outcome"), [(-2, "inconsistent"), (-1, "consistent"), (1, "consistent"), (2, "inconsistent")]
)
def test_the_end_of_a_turn_may_be_counted_and_no_more(more: int, outcome: str) -> None:
    assert check_counting(case_of(Host(counted_more=more))).outcome == outcome


def test_a_character_of_several_tokens_may_be_listed_once() -> None:
    """At temperature 2 some hosts write such characters, and list their parts together."""

    def accented(o: Observation) -> Observation:
        listed = o.positions and o.completion_tokens is not None and o.probe_id == "sampling-hot"
        return o.model_copy(update={"text": "né", "completion_tokens": len(o.positions or []) + 3}) if listed else o

    assert check_counting(case_of(Host(), accented)).outcome == "consistent"


def test_reasoning_that_is_counted_is_not_missed_among_the_tokens() -> None:

    def spent(o: Observation) -> Observation:
        return o.model_copy(update={"reasoning_tokens": 30, "completion_tokens": (o.completion_tokens or 0) + 30})

    assert check_counting(case_of(Host(), spent)).outcome == "consistent"


def test_a_stream_that_is_counted_otherwise_is_found() -> None:
    case = case_of(Host())
    count = case.sampling["stream"].prompt_tokens
    assert count is not None
    finding = check_counting(case_of(Host(), changed("stream", prompt_tokens=count + 3)))
    assert finding.outcome == "inconsistent"
    assert f"counts {count + 3} prompt tokens where the same request without one counts {count}" in finding.summary


@pytest.mark.parametrize("counted", [True, False])
def test_a_stream_that_was_not_given_is_found_whether_or_not_it_is_counted(counted: bool) -> None:
    update: dict[str, Any] = {"streamed": False} | ({} if counted else {"prompt_tokens": None})
    finding = check_counting(case_of(Host(), changed("stream", **update)))
    assert finding.outcome == "inconsistent"
    assert "stream was asked for and not given" in finding.summary.lower()


def test_without_counts_and_lists_nothing_is_said() -> None:
    bare = everywhere(prompt_tokens=None, completion_tokens=None, positions=None)
    finding = check_counting(case_of(Host(), bare))
    assert (finding.outcome, finding.details["checked"]) == ("inconclusive", [])


# -- reasoning -------------------------------------------------------------------------------------------------


def test_without_reasoning_the_question_does_not_arise() -> None:
    case = case_of(Host())
    assert check_reasoning(case).outcome == "not_applicable"
    assert not reasons(case.observed)


def test_reasoning_that_is_counted_and_not_shown_leaves_the_weights_open() -> None:
    case = case_of(Host(), everywhere(reasoning_tokens=8))
    assert hides_reasoning(case.observed)
    finding = check_reasoning(case)
    assert (finding.check, finding.axis, finding.outcome) == ("reasoning", "service", "inconclusive")
    assert "counted and not shown" in finding.summary


def test_reasoning_that_is_shown_is_said_and_its_effort_is_compared() -> None:
    case = case_of(Host(), everywhere(reasoning_tokens=8, shows_reasoning=True))
    assert not hides_reasoning(case.observed)
    one = case.sampling["cold"]
    sampling = case.sampling | {
        "effort-low": one.model_copy(update={"reasoning_tokens": 5, "text": None}),
        "effort-high": one.model_copy(update={"reasoning_tokens": 50}),
    }
    finding = check_reasoning(replace(case, sampling=sampling))
    assert finding.outcome == "inconclusive"
    assert finding.summary == "Reasoning is shown; 5 tokens at low effort and 50 at high; 1 answers hold nothing else"
    assert finding.details["tokens_at_low_and_high_effort"] == (5, 50)


def test_a_host_that_answers_nothing_is_not_judged() -> None:
    case = case_of(Host(), everywhere(answered=False, fault="timeout"))
    assert check_reasoning(replace(case, prompt_answers=[], answers=[], raw_answers=[])).outcome == "inconclusive"


# -- together --------------------------------------------------------------------------------------------------


def judged_axes(case: Case) -> tuple[str, str | None, dict[str, str]]:
    observations = [*case.observed]
    findings, verdict = judge(
        case, requests_sent=len(observations), stopped_because="probes_used_up", all_observations=observations, observations_sha256="0" * 64,
    )  # fmt: skip
    assert len({f.check for f in findings.findings}) == len(findings.findings) == 9
    return verdict.verdict, verdict.cause, {str(axis): outcome for axis, outcome in verdict.axes.items()}


def test_sampling_is_required_by_every_policy_and_service_by_none() -> None:
    for name in ("strict", "kv8", "int8-ok", "fp8-ok"):
        policy = load_policy(name)
        assert policy.version == 4
        assert "sampling" in policy.requires
        assert "service" not in policy.requires
    word, cause, axes = judged_axes(case_of(Host(ignored=("temperature", "seed"))))
    assert (word, cause, axes["sampling"]) == ("differs", "sampling", "inconsistent")
    word, cause, axes = judged_axes(case_of(Host(ignored=("stop",))))
    assert (word, cause, axes["service"]) == ("inconclusive", None, "inconsistent")
