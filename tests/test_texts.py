"""First tokens as text alone: exact small cases, recorded stacks that are served as text, and hosts that fail at it.

The answers are drawn from recorded rows, so no endpoint is involved but in the last part, where a made-up host fails and nothing is
detected. Whatever is random has a seed.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from conftest import Ended, Weighbridge
from fault_server import MODEL, Answer, Call, FaultServer, completion, first, refuses, says, silence
from weighbridge.capability import capability_requests, sampling_of
from weighbridge.dialects import DIALECTS
from weighbridge.errors import RunFolderError
from weighbridge.judge.case import Case
from weighbridge.judge.checks.texts import (
    exact_variant,
    excluded_by_text,
    is_consistent_text,
    kind_of,
    text_differs_after,
    text_explanation,
)
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.texts import (
    TextEvidence,
    TextLibrary,
    build_text_library,
    cold_process,
    exceptions_allowed,
    excludable,
    same_text,
    weigh_texts,
)
from weighbridge.judge.verdict import is_decided, judge
from weighbridge.plan import check_draw, make_plan
from weighbridge.probes import draw
from weighbridge.records import (
    Capability,
    Endpoint,
    Finding,
    Observation,
    Plan,
    PlannedRequest,
    Received,
    Verdict,
    again_twin,
    drawn_twin,
)
from weighbridge.records import Exchange as OneExchange
from weighbridge.records import Sent as SentRequest
from weighbridge.reference.bundle import OFFICIAL, Bundle, HypothesisRecord, load_bundle
from weighbridge.reference.contexts import BAND, UNSEEN_NATS, Contexts, cold_probes, contexts_of, lead_noise_nats
from weighbridge.stats.draws import at_temperature, cell_logprobs
from weighbridge.stats.texts import (
    TEMPERATURES,
    TRUNCATIONS,
    answer_log_likelihood,
    flip_probability,
    kept_tokens,
    noise_temperature,
)

Floats = NDArray[np.float64]
POLICY = load_policy("strict")
DIFFERS = float(np.log(POLICY.differs_e_value))
UNHEARD_OF = "\u2603 unheard of"  # no token's text
SEEDS = ("first", "second", "third")
HOSTILE = [
    "<script>alert(1)</script>",
    "</p><img src=https://evil.example/x onerror=alert(1)>",
    "\x1b[31mred\x1b]0;title\x07",
    "nul \x00 and \x0b and \x85",
    "\u202eright to left\u2067 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "W" * 200_000,
    " " * 100_000,
    "{{ 7 * 7 }} {% raw %}",
    "\ufffd\ufffe\U0010ffff\u200b",
    "",
    "\n",
    "\ud800",
]


# -- the recorded stacks, served as text -----------------------------------------------------------------------


@cache
def bundle() -> Bundle:
    return load_bundle("smollm2-135m-instruct")


@cache
def contexts() -> Contexts:
    found = contexts_of(bundle())
    assert found is not None
    return found


@cache
def library() -> TextLibrary:
    found = build_text_library(bundle(), POLICY)
    assert found is not None
    return found


@cache
def plan(seed: str = "x") -> Plan:
    endpoint = Endpoint(name="recorded", base_url="http://127.0.0.1:1/v1", model="recorded")
    return make_plan(endpoint, POLICY, bundle(), seed=seed, run_id="0" * 16, created_at="2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True, scope="module")
def _whole_plan() -> None:
    """The plan that these tests share is made before any of them leaves requests out."""
    plan()


@cache
def names() -> list[str]:
    """What every distribution was recorded from."""
    return [*(s.id for s in contexts().stacks), *(h.id for h in contexts().renderings)]


HONEST = [s.id for s in contexts().stacks if s.departure is None]
RENDERINGS = [h.id for h in contexts().renderings]


def name_of(place: int, column: int) -> str:
    """What a server shows of a token, its white space included."""
    row = bundle().row_index[contexts().probe_ids[place]]
    if column == bundle().token_ids.shape[1]:
        assert UNHEARD_OF not in contexts().names[place]
        return UNHEARD_OF
    token: int = bundle().token_ids[row, column]
    return bundle().vocabulary[token].decode("utf-8", "replace")


def answer(request: PlannedRequest, text: str | None, **more: Any) -> Observation:
    facts: dict[str, Any] = {
        "request_id": request.request_id, "probe_id": request.probe.id, "answered": True, "fault": "no_logprobs", "status": 200,
        "attempts": 1, "latency_s": 0.1, "text": text, "completion_tokens": 1,
    }  # fmt: skip
    return Observation.model_validate(facts | more)


Says = Callable[[int], str]  # what is said at a place; called once for each request


def served(stack_id: str, temperature: float = 0.0, seed: int = 1) -> Says:
    """A recorded stack, at some temperature."""
    index, rng = names().index(stack_id), np.random.default_rng(seed)

    def says_at(place: int) -> str:
        if temperature == 0:
            return name_of(place, int(contexts().likeliest[index, place]))
        shares = np.exp(at_temperature(contexts().tokens_nats[index, place][None].copy(), temperature)[0])
        return name_of(place, int(rng.choice(len(shares), p=shares / shares.sum())))

    return says_at


def second_likeliest(place: int) -> str:
    """What nothing recorded says: the reference's likeliest token of another text than that of its likeliest."""
    ranked = np.argsort(-contexts().tokens_nats[0, place, :-1], kind="stable")
    best = name_of(place, int(ranked[0])).strip()
    return next(name for column in ranked if (name := name_of(place, int(column))).strip() != best)


def asked(
    says_at: Says, count: int | None = None, *, of: Plan | None = None, of_stack: str | None = None, drawn: int = 0
) -> dict[str, Observation]:
    """What an audit would have collected: texts, once more what is in doubt, and answers that are drawn at temperature 1.

    Of a stack that was not recorded everywhere, only where it was.
    """
    of = of or plan()
    known = contexts().recorded[names().index(of_stack)] if of_stack else np.ones(len(contexts().probe_ids), np.bool_)
    seen: dict[str, Observation] = {}
    requests = [r for r in of.text_requests if known[contexts().index[r.probe.id]]]
    for request in requests[:count]:
        place = contexts().index[request.probe.id]
        seen[request.request_id] = answer(request, says_at(place))
        if library().is_in_doubt(seen[request.request_id]):
            again = again_twin(request)
            seen[again.request_id] = answer(again, says_at(place))
    for request in [r for r in of.probe_requests if library().is_drawn(r.probe.id)][:drawn]:
        twin = drawn_twin(request)
        seen[twin.request_id] = answer(twin, says_at(contexts().index[request.probe.id]))
    return seen


def stack(stack_id: str, count: int | None = None, *, of: Plan | None = None) -> dict[str, Observation]:
    return asked(served(stack_id), count, of=of, of_stack=stack_id)


def weighed(seen: dict[str, Observation], of: Plan | None = None) -> TextEvidence:
    found = weigh_texts(library(), of or plan(), seen)
    assert found is not None
    return found


def explained(texts: TextEvidence) -> str | None:
    """The kind of departure that explains the answers."""
    index = text_explanation(texts, POLICY)
    return None if index is None else kind_of(texts, index)


# -- one token, by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, 0.07, 0.5])
def test_noise_is_a_temperature_at_which_draws_spread_as_much(noise: float) -> None:
    """Drawing at temperature β is adding Gumbel variables of scale β and taking the largest."""
    scale = noise_temperature(noise)
    assert scale * np.pi / np.sqrt(3) == pytest.approx(np.sqrt(2) * noise, rel=1e-12)
    drawn = np.random.default_rng(1).gumbel(scale=scale, size=(2, 200_000))
    assert (drawn[0] - drawn[1]).std() == pytest.approx(np.sqrt(2) * noise, rel=0.01)


@pytest.mark.parametrize("lead", [0.0, 0.03, 0.1, 0.2, 0.4])
def test_flips_are_as_frequent_as_noise_makes_them(lead: float) -> None:
    noise = 0.07
    expected = float(flip_probability(np.array([lead]), noise)[0])
    rng = np.random.default_rng(2)
    logprobs = np.array([0.0, -lead])[:, None] + rng.normal(0, noise, (2, 200_000))
    assert (logprobs[1] > logprobs[0]).mean() == pytest.approx(expected, abs=0.004)
    drawn = np.array([0.0, -lead])[:, None] + rng.gumbel(scale=noise_temperature(noise), size=(2, 200_000))
    # The normal and the logistic distribution of equal spread are nowhere further apart than that.
    assert (drawn[1] > drawn[0]).mean() == pytest.approx(expected, abs=0.027)


def test_a_flip_at_no_lead_is_even_and_a_larger_lead_makes_it_rarer() -> None:
    shares = flip_probability(np.linspace(0, 1, 20), 0.1)
    assert shares[0] == pytest.approx(0.5)
    assert (np.diff(shares) < 0).all()
    assert (flip_probability(np.full(3, 0.2), 0.2) > flip_probability(np.full(3, 0.2), 0.1)).all()


def test_each_truncation_keeps_what_it_says() -> None:
    shares = np.array([0.5, 0.3, 0.11, 0.03, 0.02, 0.01, 0.03])  # the last is all that is not listed
    order = [3, 0, 5, 1, 4, 2]
    rows = np.log(np.array([shares, [*shares[:-1][order], shares[-1]]]))
    listed = {
        ("none", 0.0): 6, ("min_p", 0.05): 4, ("min_p", 0.1): 3, ("top_k", 20): 6, ("top_p", 0.95): 5, ("top_p", 0.9): 3,
    }  # fmt: skip
    assert set(listed) == set(TRUNCATIONS)
    kept = kept_tokens(rows)
    assert kept.shape == (len(TRUNCATIONS), 2, 7)
    for own, (kind, value) in zip(kept, TRUNCATIONS, strict=True):
        expected = np.arange(6) < listed[kind, value]
        np.testing.assert_array_equal(own[0, :-1], expected, err_msg=f"{kind} {value}")
        np.testing.assert_array_equal(own[1, :-1], expected[order], err_msg=f"{kind} {value}")
        # What is not listed is kept only where nothing is left out.
        assert (own[:, -1] == (kind == "none")).all()


def test_the_twenty_likeliest_are_kept_by_number() -> None:
    listed = np.log(np.linspace(0.03, 0.01, 30))[None]
    rows = cell_logprobs(np.concatenate([listed[:, 15:], listed[:, :15]], axis=1))
    kept = kept_tokens(rows)[TRUNCATIONS.index(("top_k", 20)), 0]
    np.testing.assert_array_equal(kept, [*[True] * 5, *[False] * 10, *[True] * 15, False])


def with_a_likeliest(listed: Floats) -> Floats:
    """Lists begin with what is likelier than anything that they leave out."""
    return np.concatenate([np.full((len(listed), 1), -3.0), listed], axis=1)


listed_nats = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 3), st.integers(2, 25)), elements=st.floats(-12, -3.5, width=32)
).map(with_a_likeliest)


def alone(column: int, of: int) -> NDArray[np.bool_]:
    return np.asarray(np.arange(of) == column)


@settings(max_examples=40, deadline=None)
@given(listed_nats, st.floats(0.001, 0.3), st.sampled_from([(0.05, 0.6, 1.0, 1.9), (1.0, 0.3)]))
def test_answers_of_one_token_are_a_distribution(listed: Floats, share: float, temperatures: tuple[float, ...]) -> None:
    tokens = cell_logprobs(listed)
    before = tokens.copy()
    width = tokens.shape[1]
    each = np.array([
        answer_log_likelihood(tokens, alone(j, width), temperatures, outlier_share=share) for j in range(width)
    ])  # fmt: skip
    assert each.shape == (width, len(tokens), len(temperatures), len(TRUNCATIONS))
    np.testing.assert_allclose(np.exp(each).sum(axis=0), 1, rtol=1e-4)
    np.testing.assert_array_equal(tokens, before)
    # At temperature 1 with nothing left out it is what was recorded, whatever the share of outliers.
    plain = each[:, :, temperatures.index(1.0), TRUNCATIONS.index(("none", 0.0))]
    np.testing.assert_allclose(plain, tokens.T, atol=1e-3)
    # And no answer is impossible: there is always the share that may be anything.
    assert (each >= np.log(share) + tokens.T[:, :, None, None] - 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(listed_nats, st.data())
def test_an_answer_that_several_tokens_read_as_is_all_of_them(listed: Floats, data: st.DataObject) -> None:
    tokens = cell_logprobs(listed)
    width = tokens.shape[1]
    members = np.array(data.draw(st.lists(st.booleans(), min_size=width, max_size=width).filter(any)))
    together = answer_log_likelihood(tokens, members, TEMPERATURES[::9], outlier_share=0.01)
    each = [
        answer_log_likelihood(tokens, alone(int(j), width), TEMPERATURES[::9], outlier_share=0.01)
        for j in np.flatnonzero(members)
    ]
    np.testing.assert_allclose(np.exp(together), np.exp(np.array(each)).sum(axis=0), rtol=1e-4, atol=1e-6)


def test_what_a_truncation_leaves_out_is_shared_among_the_rest() -> None:
    tokens = np.log([[0.5, 0.3, 0.11, 0.03, 0.02, 0.01, 0.03]])
    found = np.exp(
        [
            answer_log_likelihood(tokens, alone(j, 7), (1.0,), outlier_share=0.1)[
                0, 0, TRUNCATIONS.index(("min_p", 0.1))
            ]
            for j in range(7)
        ]
    )
    left = np.array([0.5, 0.3, 0.11, 0, 0, 0, 0]) / 0.91
    np.testing.assert_allclose(found, 0.9 * left + 0.1 * np.exp(tokens[0]), rtol=1e-5)


def test_a_very_low_temperature_gives_the_likeliest_token() -> None:
    tokens = np.log([[0.5, 0.3, 0.11, 0.09]])
    found = [np.exp(answer_log_likelihood(tokens, alone(j, 4), (0.02,), outlier_share=0.01))[0, 0, 0] for j in range(4)]
    np.testing.assert_allclose(found, [0.99 + 0.005, 0.003, 0.0011, 0.0009], rtol=1e-3)


# -- contexts --------------------------------------------------------------------------------------------------


def test_tokens_are_told_apart_by_their_stripped_text() -> None:
    for place, known in enumerate(contexts().names):
        columns = sorted(column for own in known.values() for column in own)
        assert columns == list(range(bundle().token_ids.shape[1]))
        for name, own in known.items():
            assert {name_of(place, column).strip() for column in own} == {name}
    assert any(len(own) > 1 for known in contexts().names for own in known.values())


def test_a_lead_is_over_another_text() -> None:
    for place, lead in enumerate(contexts().lead_nats):
        own = contexts().tokens_nats[0, place, :-1]
        best = int(own.argmax())
        texts = [name_of(place, column).strip() for column in range(len(own))]
        other = max(value for value, text in zip(own, texts, strict=True) if text != texts[best])
        assert lead == pytest.approx(own[best] - other, abs=1e-5)


def test_a_second_token_of_the_same_text_is_no_rival() -> None:
    own = contexts().tokens_nats[0, :, :-1]
    best, second = np.argsort(-own, axis=1)[:, :2].T
    ids = bundle().token_ids[[bundle().row_index[probe_id] for probe_id in contexts().probe_ids]]
    vocabulary = list(bundle().vocabulary)
    vocabulary[ids[0, second[0]]] = b" " + vocabulary[ids[0, best[0]]].strip() + b"\n"
    found = contexts_of(dataclasses.replace(bundle(), vocabulary=tuple(vocabulary)))
    assert found is not None
    text = name_of(0, int(best[0])).strip()
    same = found.names[0][text]
    assert set(same) == {*contexts().names[0][text], int(second[0])}
    others = np.delete(own[0], list(same))
    assert found.lead_nats[0] == pytest.approx(own[0, best[0]] - others.max(), abs=1e-5)
    assert found.lead_nats[0] > contexts().lead_nats[0] + 1e-3


def test_distributions_are_those_that_were_recorded_and_the_reference_is_first() -> None:
    assert names()[0] == bundle().manifest.reference_stack
    assert len(set(contexts().probe_ids)) == len(contexts().probe_ids)
    np.testing.assert_allclose(np.exp(contexts().tokens_nats).sum(axis=2), 1, rtol=1e-6)
    for index in (0, names().index("int4-g64-bfloat16"), names().index("llamacpp-q4_0")):
        own = bundle().logprobs_nats[bundle().stack_index[names()[index]]]
        for place in range(0, len(contexts().probe_ids), 7):
            row = own[bundle().row_index[contexts().probe_ids[place]]].astype(np.float64)
            assert contexts().recorded[index, place] == bool(np.isfinite(row[:2]).all())
            if contexts().recorded[index, place]:
                assert contexts().likeliest[index, place] == np.nanargmax(row)
                np.testing.assert_allclose(contexts().tokens_nats[index, place], cell_logprobs(row[None])[0], atol=1e-9)
            else:
                np.testing.assert_array_equal(contexts().tokens_nats[index, place], contexts().tokens_nats[0, place])


def test_of_a_rendering_are_the_tokens_that_the_official_prompt_lists() -> None:
    reference = bundle().stack_index[bundle().manifest.reference_stack]
    assert OFFICIAL not in RENDERINGS
    for rendering in RENDERINGS[::4]:
        index = names().index(rendering)
        known = np.flatnonzero(contexts().recorded[index])
        assert 0 < known.size < len(contexts().probe_ids)
        for place in known:
            probe_id = contexts().probe_ids[place]
            other = bundle().row_index[f"{probe_id}@{rendering}"]
            listed = dict(
                zip(
                    bundle().token_ids[other].tolist(), bundle().logprobs_nats[reference, other].tolist(), strict=True
                )
            )  # fmt: skip
            row = bundle().token_ids[bundle().row_index[probe_id]].tolist()
            expected = np.array([listed.get(token, UNSEEN_NATS) for token in row])
            # Where a rendering's own tokens are not all listed the rest is what is not; listed ones keep their distances.
            found = contexts().tokens_nats[index, place, :-1]
            np.testing.assert_allclose(found - found.max(), expected - expected.max(), atol=1e-6)
        unknown = np.flatnonzero(~contexts().recorded[index])
        np.testing.assert_array_equal(contexts().tokens_nats[index, unknown], contexts().tokens_nats[0, unknown])


def test_the_likeliest_is_a_listed_token() -> None:
    likeliest = contexts().likeliest
    assert likeliest.shape == contexts().tokens_nats.shape[:2]
    assert likeliest.max() < bundle().token_ids.shape[1]
    listed = contexts().tokens_nats[:, :, :-1]
    np.testing.assert_array_equal(
        np.take_along_axis(listed, likeliest[:, :, None], axis=2)[:, :, 0], listed.max(axis=2)
    )


def _repeats(probe_id: str) -> bool:
    """Whether the reference's likeliest token stands in the prompt, where a penalty on repeating may pass it over."""
    row = bundle().row_index[probe_id]
    best = int(contexts().likeliest[0, contexts().index[probe_id]])
    return int(bundle().token_ids[row, best]) in bundle().prompt_of(probe_id)


def test_what_is_asked_at_temperature_0_lies_in_the_band() -> None:
    unit = np.sqrt(2) * lead_noise_nats(contexts())
    assert unit > 0
    asked_for = cold_probes(contexts())
    inside = [BAND[0] * unit <= lead <= BAND[1] * unit for lead in contexts().lead_nats]
    pool = bundle().pool_at("L4")
    assert pool is not None
    chosen = {bundle().manifest.probe_ids[i] for i in pool.probes}
    # Hosts hold back what begins with white space alone or with a part of a character.
    best = [name_of(place, int(column)).strip() for place, column in enumerate(contexts().likeliest[0])]
    shown = [text != "" and "\ufffd" not in text for text in best]
    assert asked_for == [
        probe
        for probe, within, is_shown in zip(contexts().probe_ids, inside, shown, strict=True)
        if within and is_shown and probe in chosen and not _repeats(probe)
    ]
    assert 50 < len(asked_for) < len(contexts().probe_ids)
    assert [contexts().probe_ids[place] for place in library().cold] == asked_for


def test_a_bundle_without_pools_of_one_token_has_no_contexts() -> None:
    pools = [pool for pool in bundle().manifest.pools if pool.level == "prompt"]
    assert pools
    manifest = bundle().manifest.model_copy(update={"pools": pools})
    bare = dataclasses.replace(bundle(), manifest=manifest)
    assert contexts_of(bare) is None
    assert build_text_library(bare, POLICY) is None


def test_honest_is_what_the_policy_accepts() -> None:
    assert [names()[i] for i in library().honest] == HONEST
    assert sorted([*library().honest, *library().departures]) == list(range(len(names())))
    accepting = POLICY.model_copy(update={"accepts": ["int8", "kv8"]})
    wider = build_text_library(bundle(), accepting)
    assert wider is not None
    more = {names()[i] for i in wider.honest} - set(HONEST)
    assert more == {s.id for s in contexts().stacks if s.departure_class in ("int8", "kv8")}
    # The least steady of them says what every honest stack is allowed.
    assert wider.flips_allowed > library().flips_allowed


def test_flips_that_are_allowed_are_the_limit_of_a_family_that_was_seen_to_have_none() -> None:
    """No recorded honest stack answers otherwise at temperature 0, so the limit is that of none among so many."""
    cold = library().cold
    for name in HONEST:
        index = names().index(name)
        known = cold[contexts().recorded[index, cold]]
        assert (contexts().likeliest[index, known] == contexts().likeliest[0, known]).all()
    assert library().flips_allowed == pytest.approx(1 - 0.05 ** (1 / cold.size))


# -- honest stacks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack_id", HONEST)
def test_an_honest_stack_at_temperature_0_is_never_rejected_and_cleared_in_the_end(stack_id: str) -> None:
    asked_for = plan(SEEDS[HONEST.index(stack_id) % 3])
    texts = weighed(stack(stack_id, of=asked_for), asked_for)
    assert texts.log_total.max() < np.log(10)
    assert text_differs_after(texts, POLICY) is None
    assert (texts.is_cold, texts.wavering, int(texts.flips.sum())) == (True, 0, 0)
    assert text_explanation(texts, POLICY) is None
    assert is_consistent_text(texts, asked_for)


def test_a_stack_with_all_the_noise_that_is_allowed_is_never_rejected() -> None:
    flips = 0
    for seed in range(16):
        rng = np.random.default_rng(seed)
        own = contexts().tokens_nats[0, :, :-1]
        noisy = (own + rng.normal(0, library().limit_nats, own.shape)).argmax(axis=1)
        asked_for = plan(SEEDS[seed % 3])
        texts = weighed(asked(lambda place, noisy=noisy: name_of(place, int(noisy[place])), of=asked_for), asked_for)  # type: ignore[misc]
        flips += int(texts.flips.sum())
        assert texts.log_total.max() < DIFFERS
        assert text_explanation(texts, POLICY) is None
    assert flips


@pytest.mark.parametrize("alike", [None, "int8", "fp8-e4m3", "llamacpp-q4_0"])
def test_as_many_other_answers_as_an_honest_stack_is_allowed_reject_it_nowhere(alike: str | None) -> None:
    """Wherever they are, and though they are a departure's own, over the whole pool."""
    most = exceptions_allowed(library(), library().cold)
    assert most >= 1
    index = names().index(alike) if alike else 0
    known = [p for p in library().cold.tolist() if contexts().recorded[index, p]]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        others = (
            known
            if alike is None
            else [p for p in known if contexts().likeliest[index, p] not in same_text(contexts(), p)]
        )
        exceptions = set(rng.choice(others, most, replace=False).tolist())
        places = rng.permutation(library().cold)
        columns = [int(contexts().likeliest[index if alike and p in exceptions else 0, p]) for p in places.tolist()]
        flips = np.array([p in exceptions for p in places.tolist()])
        if alike is None:
            columns = [
                int(np.argsort(-contexts().tokens_nats[0, p, :-1])[int(p in exceptions)]) for p in places.tolist()
            ]
        likelihood = library().at_zero_nats[:, places, columns][library().departures].astype(np.float64)
        assert cold_process(library(), places, flips, likelihood).max() < DIFFERS


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("stack_id", ["hf-bfloat16", "llamacpp-f16", "emulated-both"])
def test_an_honest_stack_that_wavers_is_never_rejected(stack_id: str, temperature: float) -> None:
    seed = HONEST.index(stack_id)
    # Requests at temperature 0 alone, as if none followed, and what an audit goes on with once it knows.
    for count, drawn in ((40, 0), (8, 50)):
        texts = weighed(asked(served(stack_id, temperature, seed), count, of_stack=stack_id, drawn=drawn))
        assert texts.asked == count + drawn
        assert count + drawn - 20 < texts.answers <= count + drawn
        assert texts.log_total.max() < DIFFERS
        assert text_differs_after(texts, POLICY) is None
        assert text_explanation(texts, POLICY) is None
        if count == 40:
            assert texts.wavering >= 2
            assert not texts.is_cold


def test_the_evidence_after_some_answers_does_not_depend_on_those_that_follow() -> None:
    for seen in (
        stack("int4-g64-bfloat16", 20),
        asked(served("hf-bfloat16", 0.7, 3), 20),
        asked(served("int8", 0.7, 3), 6, drawn=14),
    ):
        texts = weighed(seen)
        firsts = [name for name in seen if not name.endswith("-again")]
        for count in (1, 5, 13):
            kept = {name: o for name, o in seen.items() if name.removesuffix("-again") in firsts[:count]}
            part = weighed(kept)
            # White space alone says nothing.
            assert count - 2 <= part.answers <= count
            np.testing.assert_allclose(part.log_total, texts.log_total[: part.answers], atol=1e-9)
            np.testing.assert_allclose(part.log_exclusion, texts.log_exclusion[:, : part.answers], atol=1e-9)


def test_an_honest_endpoint_excludes_coarse_weights_and_not_what_texts_cannot_show() -> None:
    texts = weighed(stack("hf-bfloat16"))
    done = excluded_by_text(texts, POLICY)
    excluded = {names()[i] for i, out in zip(library().departures, done, strict=True) if out}
    assert {"llamacpp-q4_0", "int4-g64", "nf4-g64", "mxfp4", "int3-g64", "depth-24"} <= excluded
    assert not {"kv-int8", "llamacpp-kv-q8_0", "kv-fp8"} & excluded
    can = {names()[i] for i, can in zip(library().departures, excludable(library(), plan()), strict=True) if can}
    assert "llamacpp-q4_0" in can
    assert "kv-int8" not in can


def test_a_larger_budget_waits_for_no_fewer_departures() -> None:
    found = []
    for most in (1, 40, 60, 100, 1000):
        limits = plan().endpoint.limits.model_copy(update={"max_requests": most})
        endpoint = plan().endpoint.model_copy(update={"limits": limits})
        can = excludable(library(), plan().model_copy(update={"endpoint": endpoint}))
        found.append({names()[i] for i, one in zip(library().departures, can, strict=True) if one})
    assert not found[0]
    assert all(fewer <= more for fewer, more in itertools.pairwise(found))
    assert "llamacpp-q4_0" in found[3]
    assert "kv-int8" not in found[-1]


@pytest.mark.parametrize("stack_id", ["llamacpp-q4_0", "int4-g64-bfloat16", "int6-g64", "fp8-e4m3", "kv-int4"])
def test_a_departure_does_not_exclude_itself(stack_id: str) -> None:
    place = library().departures.index(names().index(stack_id))
    for seed in SEEDS:
        texts = weighed(stack(stack_id, of=plan(seed)), plan(seed))
        assert texts.log_exclusion[place].max() < np.log(POLICY.consistent_e_value)
        assert not is_consistent_text(texts, plan())


# -- departures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_4_bit_weights_are_told_and_named(seed: str) -> None:
    told = weighed(stack("int4-g64-bfloat16", 15, of=plan(seed)), plan(seed))
    reached = text_differs_after(told, POLICY)
    assert reached is not None
    assert reached <= 15
    texts = weighed(stack("int4-g64-bfloat16", 60, of=plan(seed)), plan(seed))
    assert text_differs_after(texts, POLICY) == reached
    best = text_explanation(texts, POLICY)
    assert best is not None
    assert kind_of(texts, best) == "int4"
    assert exact_variant(texts, best, POLICY) == "int4-g64"
    assert texts.matches[best] > 0.9
    assert texts.is_cold


@pytest.mark.parametrize("stack_id", ["nf4-g64-bfloat16", "llamacpp-q4_0", "int3-g64", "depth-24", "fp8-e4m3"])
def test_other_departures_are_told_and_never_called_something_else(stack_id: str) -> None:
    index = names().index(stack_id)
    record = contexts().stacks[index]
    for count in (4, 8, 16, 32, 100):
        texts = weighed(stack(stack_id, count))
        assert explained(texts) in (None, record.departure_class)
        best = text_explanation(texts, POLICY)
        if best is not None:
            assert exact_variant(texts, best, POLICY) in (None, record.variant)
    assert text_differs_after(texts, POLICY) is not None
    assert explained(texts) == record.departure_class


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_another_rendering_is_never_explained_by_weights(rendering: str) -> None:
    for count in (3, 5, 8, 12, 16, 25):
        texts = weighed(stack(rendering, count))
        best = text_explanation(texts, POLICY)
        assert best is None or isinstance(library().departure(best), HypothesisRecord)
        assert best is None or names()[best] == rendering


def test_most_renderings_are_named() -> None:
    named = [rendering for rendering in RENDERINGS if explained(weighed(stack(rendering))) == rendering]
    assert len(named) > len(RENDERINGS) / 2


def test_what_nobody_recorded_differs_and_is_explained_by_nothing() -> None:
    for count in (3, 5, 10, 20, 60):
        texts = weighed(asked(second_likeliest, count))
        assert text_explanation(texts, POLICY) is None
    assert text_differs_after(texts, POLICY) is not None
    assert int(texts.flips.sum()) == texts.answers >= 58


@pytest.mark.parametrize("seed", range(2))
def test_draws_at_temperature_1_tell_4_bit_weights_from_honest_ones(seed: int) -> None:
    altered = weighed(asked(served("int4-g64-bfloat16", 1.0, seed), 8, drawn=160))
    reached = text_differs_after(altered, POLICY)
    assert not altered.is_cold
    assert reached is not None
    assert 8 < reached <= 168
    assert altered.asked == 168
    assert explained(altered) in (None, "int4")
    honest = weighed(asked(served("hf-bfloat16", 1.0, seed), 8, drawn=160))
    assert honest.log_total.max() < DIFFERS
    assert honest.log_total[-1] < 0 < altered.log_total[-1]


def test_draws_alone_are_evidence_as_well() -> None:
    texts = weighed(asked(served("int3-g64", 1.0, 1), 0, drawn=120))
    assert (texts.cold.count, texts.drawn.asked) == (0, 120)
    assert text_differs_after(texts, POLICY) is not None
    honest = weighed(asked(served("hf-bfloat16", 1.0, 1), 0, drawn=120))
    assert text_differs_after(honest, POLICY) is None


# -- answers as they come --------------------------------------------------------------------------------------


def flipped(request: PlannedRequest) -> tuple[Observation, Observation]:
    """Another answer than the reference's, and the same again."""
    text = second_likeliest(contexts().index[request.probe.id])
    return answer(request, text), answer(again_twin(request), text)


def test_nothing_is_weighed_where_nothing_came() -> None:
    assert weigh_texts(library(), plan(), {}) is None
    lost = {
        r.request_id: answer(r, None, answered=False, fault="http_500", status=500) for r in plan().text_requests[:4]
    }
    assert weigh_texts(library(), plan(), lost) is None


def test_nothing_counts_that_came_before_the_repeat_of_an_earlier_answer() -> None:
    seen = stack("hf-bfloat16", 10)
    once, again = flipped(plan().text_requests[3])
    before = {name: o for name, o in seen.items() if name < once.request_id}
    open_one = weighed(seen | {once.request_id: once})
    assert (open_one.answers, open_one.asked) == (3, 3)
    np.testing.assert_array_equal(open_one.log_total, weighed(before).log_total)
    lost = again.model_copy(update={"answered": False, "text": None, "fault": "http_500"})
    assert (missing := weighed(seen | {once.request_id: once, again.request_id: lost})).answers == 9
    assert missing.asked == 10
    closed = weighed(seen | {once.request_id: once, again.request_id: again})
    assert (closed.answers, closed.asked) == (10, 10)
    np.testing.assert_array_equal(closed.flips, [False] * 3 + [True] + [False] * 6)
    assert closed.log_total[3] > open_one.log_total[2]


def test_another_answer_whose_repeat_is_lost_is_left_out_and_was_asked() -> None:
    seen = stack("hf-bfloat16", 10)
    once, again = flipped(plan().text_requests[3])
    lost = again.model_copy(update={"answered": False, "text": None, "fault": "http_500", "status": 500})
    texts = weighed(seen | {once.request_id: once, lost.request_id: lost})
    assert (texts.answers, texts.asked) == (9, 10)
    assert texts.wavering == 0


@pytest.mark.parametrize("after", ["the reference's", "a third one"])
def test_another_answer_that_does_not_come_again_wavers(after: str) -> None:
    seen = stack("hf-bfloat16", 10)
    for count in (1, 2):
        request = plan().text_requests[count]
        place = contexts().index[request.probe.id]
        once, again = flipped(request)
        other = name_of(place, int(contexts().likeliest[0, place])) if after == "the reference's" else UNHEARD_OF
        seen |= {once.request_id: once, again.request_id: again.model_copy(update={"text": other})}
        texts = weighed(seen)
        assert (texts.wavering, int(texts.flips.sum()), texts.answers) == (count, 0, 10)
        assert texts.is_cold == (count < 2)
    # It is no flip, so temperature 0 is not contradicted by it.
    assert texts.log_cold.max() < np.log(10)


def test_an_answer_that_is_the_references_is_not_asked_again() -> None:
    request = plan().text_requests[0]
    place = contexts().index[request.probe.id]
    own = name_of(place, int(contexts().likeliest[0, place]))
    assert not library().is_in_doubt(answer(request, own))
    assert not library().is_in_doubt(answer(request, f" {own}\n"))
    assert library().is_in_doubt(answer(request, second_likeliest(place)))
    assert library().is_in_doubt(answer(request, UNHEARD_OF))
    assert not library().is_in_doubt(answer(request, None))
    assert not library().is_in_doubt(answer(request, UNHEARD_OF, answered=False))
    assert not library().is_in_doubt(answer(request, UNHEARD_OF, probe_id="of another pool"))


def test_an_endpoint_that_leaves_out_a_fifth_is_not_cleared() -> None:
    seen = stack("hf-bfloat16")
    assert is_consistent_text(weighed(seen), plan())
    for place, request in enumerate(plan().text_requests):
        if place % 5 == 0:
            seen[request.request_id] = answer(request, None, answered=False, fault="http_500", status=500)
    texts = weighed(seen)
    assert texts.asked == len(plan().text_requests)
    assert texts.answers == texts.asked - len(plan().text_requests[::5])
    assert texts.log_total.max() < np.log(10)
    assert not is_consistent_text(texts, plan())


def test_a_longer_text_is_read_by_its_beginning() -> None:
    """Hosts may generate more than the one token that they are asked for, and count as they like."""
    place = int(library().cold[0])
    known = contexts().names[place]
    own = name_of(place, int(contexts().likeliest[0, place])).strip()
    nothing_known = (contexts().tokens_nats.shape[2] - 1,)
    for completion_tokens in (None, 1, 16):
        assert library().columns_of(place, own, completion_tokens) == known[own]
        assert library().columns_of(place, f" {own} and so on", completion_tokens) == known[own]
        assert library().columns_of(place, UNHEARD_OF, completion_tokens) == nothing_known
    # The longest of the names that it can begin with.
    place, short, long = next(
        (p, a, b) for p, n in enumerate(contexts().names) for a in n for b in n if a and a != b and b.startswith(a)
    )
    begins = [name for name in contexts().names[place] if name and f"{long}~~".startswith(name)]
    assert short in begins
    for completion_tokens in (None, 0, 16):
        assert (
            library().columns_of(place, f"{long}~~", completion_tokens) == contexts().names[place][max(begins, key=len)]
        )
    # One token that is not listed is none of those that are.
    assert library().columns_of(place, f"{long}~~", 1) == nothing_known


@pytest.mark.parametrize(
    "ended",
    [{"fault": "end_of_turn", "finish_reason": "stop"}, {"finish_reason": "stop"}, {"finish_reason": "end_turn"}],
)
@pytest.mark.parametrize("text", [None, "", "\n"])
def test_an_empty_answer_that_ends_the_turn_is_an_answer(text: str | None, ended: dict[str, str]) -> None:
    request = plan().text_requests[0]
    place = contexts().index[request.probe.id]
    expected = contexts().names[place].get("", (contexts().tokens_nats.shape[2] - 1,))
    seen = [answer(one, text, completion_tokens=0, **ended) for one in (request, again_twin(request))]
    assert library().is_in_doubt(seen[0])
    texts = weighed({o.request_id: o for o in seen})
    assert (texts.answers, texts.cold.columns, texts.flips.tolist()) == (1, [expected], [True])


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (None, {}),
        (None, {"fault": "no_content"}),
        ("", {"finish_reason": "length"}),
        ("", {"finish_reason": "content_filter", "fault": "end_of_turn"}),
        (None, {"finish_reason": "tool_calls", "fault": "end_of_turn"}),
        (" \n\t", {}),
        ("\ufffd", {}),
        ("caf\ufffd", {"finish_reason": "stop"}),
        ("thought", {"reasoning_tokens": 1}),
        ("thought", {"shows_reasoning": True}),
    ],
)
def test_what_says_nothing_of_the_first_token_is_left_out(text: str | None, more: dict[str, Any]) -> None:
    """Reasoning, or a part of a character that is held back, may have used it up."""
    request = plan().text_requests[0]
    held_back = answer(request, text, **more)
    assert not library().is_in_doubt(held_back)
    assert weigh_texts(library(), plan(), {request.request_id: held_back}) is None
    seen = stack("hf-bfloat16", 10)
    assert request.request_id in seen
    texts = weighed(seen | {request.request_id: held_back})
    assert (texts.answers, texts.asked) == (9, 10)


def test_white_space_alone_is_the_token_that_reads_so() -> None:
    place = next(place for place, known in enumerate(contexts().names) if "" in known)
    for text in ("", "\n", "  \n\t "):
        assert library().columns_of(place, text, 1) == contexts().names[place][""]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_is_too_strange(text: str) -> None:
    twins = [twin for r in plan().text_requests[:4] for twin in (r, again_twin(r))]
    twins += [drawn_twin(r) for r in plan().probe_requests if library().is_drawn(r.probe.id)][:2]
    for completion_tokens in (None, 0, 1, 10**9 - 1):
        seen = {one.request_id: answer(one, text, completion_tokens=completion_tokens) for one in twins}
        found = weigh_texts(library(), plan(), seen)
        if text.strip() == "" or "\ufffd" in text:
            assert found is None
            continue
        assert found is not None
        assert (found.answers, found.asked, found.wavering) == (6, 6, 0)
        for values in (found.log_total, found.gain_nats, found.log_exclusion, found.matches):
            assert np.isfinite(values).all()
        assert text_explanation(found, POLICY) is None
        assert not is_consistent_text(found, plan())


@settings(max_examples=150, deadline=None)
@given(st.text(), st.integers(0, 10**6))
def test_every_text_is_some_token(text: str, place: int) -> None:
    place %= len(contexts().probe_ids)
    columns = library().columns_of(place, text, None)
    rest = (contexts().tokens_nats.shape[2] - 1,)
    begins = [name for name in contexts().names[place] if name and text.strip().startswith(name)]
    if text.strip() in contexts().names[place]:
        assert columns == contexts().names[place][text.strip()]
    else:
        assert columns == (contexts().names[place][max(begins, key=len)] if begins else rest)


def test_half_of_a_surrogate_pair_never_gets_as_far() -> None:
    request = plan().text_requests[0]
    body = json.dumps(completion(None, content="\ud83d"))
    assert "\\ud83d" in body
    sent = SentRequest(request_id=request.request_id, attempt=1, sent_at="2026-01-01T00:00:00Z", body={})
    received = Received(request_id=request.request_id, attempt=1, status=200, headers={}, latency_s=0.1, body_text=body)
    observed = DIALECTS["openai-chat"].observe(request.probe.id, [OneExchange(sent=sent, received=received)])
    assert observed.text == "?"
    assert library().is_in_doubt(observed)


def test_the_order_in_which_answers_came_does_not_matter() -> None:
    seen = asked(served("int4-g64-bfloat16", 0.3, 5), 15, drawn=15)
    mixed = list(seen.items())
    np.random.default_rng(1).shuffle(mixed)
    assert [name for name, _ in mixed] != list(seen)
    one, other = weighed(seen), weighed(dict(mixed))
    for name in ("log_total", "gain_nats", "log_exclusion", "matches", "flips"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_answers_that_were_not_planned_count_for_nothing() -> None:
    seen = stack("int4-g64-bfloat16", 10)
    request = plan().text_requests[20]
    stranger = answer(request, UNHEARD_OF, request_id="text-9999")
    of_another_pool = request.model_copy(
        update={"request_id": "text-9998", "probe": request.probe.model_copy(update={"id": "of-another-pool"})}
    )
    wider = plan().model_copy(update={"text_requests": [*plan().text_requests, of_another_pool]})
    more = seen | {"text-9999": stranger, "text-9998": answer(of_another_pool, UNHEARD_OF)}
    texts = weighed(more, wider)
    assert (texts.answers, texts.asked) == (weighed(seen).answers, 10)
    np.testing.assert_array_equal(texts.log_total, weighed(seen).log_total)


# -- the verdict -----------------------------------------------------------------------------------------------


@cache
def whole_library() -> Library:
    return build_library(bundle(), POLICY, 20)


@dataclass(frozen=True)
class Judged:
    case: Case
    verdict: Verdict
    findings: dict[str, Finding]

    @property
    def weights(self) -> Finding:
        return self.findings["weights"]


ANEW = {"warm": "A lighthouse keeper", "warm-new": "One stormy night", "warm-other": "The letter had no name on it"}


def judged(
    seen: dict[str, Observation], *, counted: bool = True, of: Plan | None = None, sampled: dict[str, str] = ANEW
) -> Judged:
    """An audit of an endpoint without logprobs; where prompts are counted, as the official template has them.

    ``sampled`` is what it answers at temperature 1 under several seeds.
    """
    of = of or plan()
    capability = Capability(reachable=True, top_logprobs=0, temperature_regime="unknown", usage_reported=counted)
    prompts = [
        answer(r, "Hello", prompt_tokens=int(bundle().prompt_tokens[0, bundle().probe_index[r.probe.id]]) if counted else None)
        for r in of.prompt_requests
    ]  # fmt: skip
    requests = {r.request_id.removeprefix("sampling-"): r for r in of.sampling_requests}
    drawn = [answer(requests[name], text) for name, text in sampled.items()]
    everything = [*prompts, *seen.values(), *drawn]
    case = open_case(of, capability, everything, whole_library())
    findings, verdict = judge(
        case, requests_sent=len(everything), stopped_because="probes_used_up", all_observations=everything,
        observations_sha256="0" * 64,
    )  # fmt: skip
    return Judged(case, verdict, {finding.check: finding for finding in findings.findings})


def test_where_no_prompts_are_asked_the_texts_own_counts_tell_the_prompt() -> None:
    without = plan().model_copy(update={"prompt_requests": []})
    counts = bundle().prompt_tokens[0]
    for added, expected in ((0, "consistent"), (30, "inconclusive")):
        seen = {
            name: o.model_copy(update={"prompt_tokens": int(counts[bundle().probe_index[o.probe_id]]) + added})
            for name, o in stack("hf-bfloat16").items()
        }
        found = judged(seen, of=without)
        assert (found.verdict.axes["prompt"], found.verdict.axes["weights"]) == (expected, "consistent")


def test_an_honest_endpoint_is_consistent_and_what_texts_cannot_show_is_said() -> None:
    found = judged(stack("hf-bfloat16"))
    assert (found.verdict.verdict, found.verdict.cause) == ("consistent", None)
    assert (found.verdict.axes["weights"], found.verdict.axes["prompt"]) == ("consistent", "consistent")
    assert {"kv-int8", "kv-fp8", "kv-q8_0"} <= set(found.verdict.not_excluded)
    assert {"q4_0", "int4-g64", "mxfp4"} <= set(found.verdict.excluded)
    assert not set(found.verdict.excluded) & set(found.verdict.not_excluded)
    assert "kv-int8" in found.verdict.sentence
    assert found.weights.answers_used == len(plan().text_requests)
    assert "level L4" in found.weights.summary
    assert is_decided(found.case)
    assert found.weights.details["temperature_0_served"] is True
    share = found.weights.effects[0]
    assert share.value == share.low == 0
    assert share.high == pytest.approx(1 - 0.025 ** (1 / len(plan().text_requests)))
    # The prompt is known by its counts alone, where only texts are compared.
    assert judged(stack("hf-bfloat16"), counted=False).verdict.verdict == "inconclusive"


@pytest.mark.parametrize("seed", SEEDS)
def test_an_audit_of_an_honest_endpoint_is_decided_before_a_hundred_answers(seed: str) -> None:
    seen = stack("llamacpp-f16", of=plan(seed))
    decided = [n for n in (5, 95) if is_decided(judged(dict(list(seen.items())[:n]), of=plan(seed)).case)]
    assert decided == [95]


@pytest.mark.parametrize(("stack_id", "variant"), [("int4-g64-bfloat16", "int4-g64"), ("llamacpp-q4_0", "q4_0")])
@pytest.mark.parametrize("count", [20, 60])
def test_altered_weights_differ_by_their_precision(stack_id: str, variant: str, count: int) -> None:
    found = judged(stack(stack_id, count))
    assert (found.verdict.verdict, found.verdict.cause) == ("differs", "precision")
    assert (found.verdict.exact_variant, found.verdict.family) == (variant, "int4")
    assert (found.verdict.axes["weights"], found.verdict.axes["prompt"]) == ("inconsistent", "consistent")
    assert "No logprobs are returned" in found.verdict.sentence
    assert (found.case.settled, found.case.served, is_decided(found.case)) == (True, OFFICIAL, True)
    assert count - 2 <= found.verdict.answers_used <= count
    ranked = found.weights.details["text_departures"]
    assert ranked[0]["departure"] == variant
    assert ranked[0]["log10_gain"] >= 3
    assert len(found.weights.details["text_course"]) == found.verdict.answers_used


@pytest.mark.parametrize("rendering", ["generic-system", "no-template", "missing-bos", "hidden-system"])
def test_another_rendering_is_called_by_its_own_cause(rendering: str) -> None:
    found = judged(stack(rendering))
    record = next(h for h in bundle().manifest.hypotheses if h.id == rendering)
    assert (found.verdict.verdict, found.verdict.cause) == ("differs", record.cause)
    assert found.case.served == rendering
    assert record.description in found.findings["prompt"].summary
    assert (found.verdict.exact_variant, found.verdict.family) == (None, None)
    assert (found.weights.outcome, found.weights.cause, found.weights.exact_variant) == ("inconclusive", None, None)


def copying(says: Says) -> Says:
    """What answers a prompt once and gives a copy ever after."""
    stored: dict[int, str] = {}

    def says_at(place: int) -> str:
        return stored.setdefault(place, says(place))

    return says_at


COPIES = [
    {"warm": "A tale", "warm-new": "A tale", "warm-other": "A tale of two"},
    {"warm": "A tale", "warm-new": "A tale", "warm-other": "Once"},
    {"warm": "A tale", "warm-other": "A tale of two"},
    {"warm": "A tale"},
    {},
]


@pytest.mark.parametrize("sampled", COPIES, ids=["all", "new", "other", "not asked", "nothing"])
@pytest.mark.parametrize("count", [8, 30])
def test_copies_of_what_an_honest_stack_drew_accuse_nobody(sampled: dict[str, str], count: int) -> None:
    """A host that ignores temperature and stores its answers says twice what it seldom says."""
    for seed in range(3):
        seen = asked(copying(served("hf-bfloat16", 1.0, seed)), count)
        assert text_differs_after(weighed(seen), POLICY) is not None
        found = judged(seen, sampled=sampled)
        assert (found.verdict.verdict, found.weights.outcome, found.weights.log10_e_value) == (
            "inconclusive",
            "inconclusive",
            None,
        )
        assert "may be a copy" in found.verdict.sentence
        assert "copies" in found.findings["share"].summary
        assert "text_course" not in found.weights.details
        assert found.verdict.log10_e_value is not None
        assert found.verdict.log10_e_value < 1
    # The same answers to one that was seen to answer anew are not the reference's.
    assert judged(seen).verdict.verdict == "differs"


@pytest.mark.parametrize("stack_id", ["llamacpp-q4_0", "fp8-e4m3"])
def test_a_departures_own_answers_are_told_from_copies(stack_id: str) -> None:
    def needed(sampled: dict[str, str]) -> int:
        for count in range(1, 60):
            found = judged(stack(stack_id, count), sampled=sampled)
            if found.verdict.verdict == "differs" and found.verdict.cause == "precision":
                assert is_decided(found.case)
                assert found.verdict.log10_e_value is not None
                assert found.verdict.log10_e_value >= 3
                return count
            assert found.verdict.verdict == "differs" or not is_decided(found.case)
        raise AssertionError

    assert needed(ANEW) <= needed(COPIES[0])


@pytest.mark.parametrize("counted", [True, False])
def test_an_unknown_departure_is_none_of_these_and_not_blamed_on_the_weights(counted: bool) -> None:
    found = judged(asked(second_likeliest, 30), counted=counted)
    assert (found.verdict.verdict, found.verdict.cause) == ("differs", "none_of_these")
    assert (found.verdict.axes["weights"], found.verdict.exact_variant) == ("inconclusive", None)
    assert (found.weights.cause, found.weights.family) == (None, None)
    assert "whether the prompt or the weights are why is not known" in found.weights.summary
    assert (found.case.served, found.case.official_differs) == (None, True)
    # So long more is asked, so that a cause may still be named; and then no more.
    assert is_decided(found.case)
    assert not is_decided(judged(asked(second_likeliest, 8), counted=counted).case)


@pytest.mark.parametrize("stack_id", ["hf-bfloat16", "int4-g64-bfloat16"])
@pytest.mark.parametrize("count", [1, POLICY.min_answers - 1])
def test_few_answers_are_no_verdict(stack_id: str, count: int) -> None:
    found = judged(stack(stack_id, count))
    assert (found.verdict.verdict, found.weights.outcome, found.weights.answers_used) == (
        "inconclusive", "inconclusive", count,
    )  # fmt: skip
    assert found.weights.to_resolve
    assert not is_decided(found.case)


def test_some_honest_answers_are_no_verdict() -> None:
    found = judged(stack("hf-bfloat16", 12))
    assert (found.verdict.verdict, found.weights.outcome) == ("inconclusive", "inconclusive")
    assert "neither the honest library nor every departure is excluded" in found.weights.summary


def test_an_endpoint_that_leaves_answers_out_is_not_cleared() -> None:
    seen = stack("hf-bfloat16")
    for request in plan().text_requests[::5]:
        seen[request.request_id] = answer(request, None, answered=False, fault="http_500", status=500)
    found = judged(seen)
    assert (found.verdict.verdict, found.weights.outcome) == ("inconclusive", "inconclusive")
    assert f"of {len(plan().text_requests)} probes came back with text" in found.weights.summary


def test_an_honest_endpoint_at_another_temperature_is_not_accused() -> None:
    found = judged(asked(served("hf-bfloat16", 1.0, 4), 8, drawn=60))
    assert found.verdict.verdict == "inconclusive"
    assert "temperature 0 is not served" in found.weights.summary
    assert "level L5" in found.weights.summary
    # A part of a character is left out.
    assert 55 <= found.weights.details["drawn"] <= 60
    assert found.weights.details["temperature_0_served"] is False
    assert found.weights.details["wavering"] >= 2


def test_answers_in_another_order_and_twice_come_to_the_same() -> None:
    seen = stack("int4-g64-bfloat16", 20)
    mixed = list(seen.items())
    np.random.default_rng(2).shuffle(mixed)
    one, other = judged(seen), judged(dict(mixed))
    assert one.weights == other.weights
    assert one.verdict == other.verdict
    assert one.case.texts is not None
    capability = one.case.capability
    twice = open_case(plan(), capability, [*seen.values(), *seen.values()], whole_library())
    assert twice.texts is not None
    np.testing.assert_array_equal(twice.texts.log_total, one.case.texts.log_total)


# -- the plan --------------------------------------------------------------------------------------------------


def test_texts_are_asked_in_the_order_of_the_draw() -> None:
    cold = cold_probes(contexts())
    for seed in SEEDS:
        requests = plan(seed).text_requests
        assert [r.probe.id for r in requests] == draw(cold, seed)
        assert [r.request_id for r in requests] == [f"text-{n:04d}" for n in range(1, len(cold) + 1)]
        assert all(r.max_tokens == 1 and not r.raw and not r.forced and not r.settings for r in requests)
    assert len({tuple(r.probe.id for r in plan(seed).text_requests) for seed in SEEDS}) == len(SEEDS)


CHANGES: dict[str, Callable[[list[PlannedRequest]], list[PlannedRequest]]] = {
    "order": lambda requests: [requests[1], requests[0], *requests[2:]],
    "fewer": lambda requests: requests[:-1],
    "twice": lambda requests: [*requests, requests[0]],
    "longer": lambda requests: [requests[0].model_copy(update={"max_tokens": 2}), *requests[1:]],
    "settings": lambda requests: [requests[0].model_copy(update={"settings": {"top_p": 0.1}}), *requests[1:]],
    "other probe": lambda requests: [requests[0].model_copy(update={"probe": requests[1].probe}), *requests[1:]],
    "other seed": lambda _: plan("another seed").text_requests,
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_a_changed_draw_of_texts_is_refused(change: Callable[[list[PlannedRequest]], list[PlannedRequest]]) -> None:
    changed = plan().model_copy(update={"text_requests": change(plan().text_requests)})
    assert changed.text_requests != plan().text_requests
    with pytest.raises(RunFolderError, match="not the draw of its seed"):
        check_draw(changed, bundle())


def test_a_plan_as_it_was_made_and_one_without_texts_are_accepted() -> None:
    check_draw(plan(), bundle())
    check_draw(plan().model_copy(update={"text_requests": []}), bundle())


def test_a_plan_of_before_texts_were_compared_is_read() -> None:
    document = json.loads(plan().model_dump_json(by_alias=True))
    del document["text_requests"]
    old = Plan.model_validate(document)
    assert old.text_requests == []
    assert old == plan().model_copy(update={"text_requests": []})
    assert not [r.request_id for r in old.requests if r.request_id.startswith(("text-", "drawn-"))]
    check_draw(old, bundle())
    assert Plan.model_validate_json(plan().model_dump_json(by_alias=True)) == plan()


def test_requests_have_names_of_their_own() -> None:
    counts = Counter(request.request_id for request in plan().requests)
    assert max(counts.values()) == 1
    expected = {r.request_id for r in plan().text_requests}
    expected |= {f"{name}-again" for name in expected} | {f"drawn-{r.request_id}" for r in plan().probe_requests}
    assert expected <= set(counts)


def test_texts_are_asked_at_temperature_0_and_their_draws_at_1_with_nothing_left_out() -> None:
    capability = Capability(reachable=True, top_logprobs=0, temperature_regime="unknown", usage_reported=True)
    text, probe = plan().text_requests[0], plan().probe_requests[0]
    for request, temperature in ((text, 0.0), (again_twin(text), 0.0), (drawn_twin(probe), 1.0)):
        assert sampling_of(request, capability) == (temperature, 0)
        for name, dialect in DIALECTS.items():
            assert dialect.asks(request)
            endpoint = plan().endpoint.model_copy(update={"dialect": name})
            body = dialect.body(endpoint, request, temperature=temperature, top_logprobs=0, seed=1, prompt_ids=[])
            assert (body["temperature"], body.get("max_tokens")) == (temperature, 1)
            assert "logprobs" not in body or not body["logprobs"]
            assert temperature == 0 or body["top_p"] == 1
    # The second time it is the same request, but for what makes no difference at temperature 0 and is another key to a cache.
    again = again_twin(text)
    assert again.model_copy(update={"request_id": text.request_id, "settings": {}}) == text
    assert again.settings == {"top_p": 0.99}


def test_a_plan_for_messages_lacks_what_that_api_cannot_be_asked() -> None:
    endpoint = plan().endpoint.model_copy(update={"dialect": "anthropic-messages"})
    made = make_plan(endpoint, POLICY, bundle(), seed="x", run_id=plan().run_id)
    dialect = DIALECTS["anthropic-messages"]
    left_out = {r.request_id for r in plan().sampling_requests} - {r.request_id for r in made.sampling_requests}
    assert left_out == {r.request_id for r in plan().sampling_requests if not dialect.asks(r)}
    assert {"sampling-hot", "sampling-two", "sampling-min-p"} <= left_out
    assert made.sampling_requests
    assert made.text_requests == plan().text_requests
    assert made.capability_requests == capability_requests()
    check_draw(made, bundle())
    with pytest.raises(RunFolderError):
        check_draw(made.model_copy(update={"sampling_requests": plan().sampling_requests}), bundle())


# -- hosts that fail -------------------------------------------------------------------------------------------


@cache
def own_texts() -> dict[str, str]:
    """The reference's own answer to every prompt that is asked for its text."""
    return {
        json.dumps([m.model_dump() for m in r.probe.messages]): name_of(place, int(contexts().likeliest[0, place]))
        for r in (*plan().text_requests, *plan().probe_requests)
        if (place := contexts().index.get(r.probe.id)) is not None
    }


def text_only(call: Call) -> None:
    """The reference's own text, and no logprobs: what fails is on the way."""
    call.send_json(200, completion(None, content=own_texts().get(call.request.prompt, "Hello")))


def every_fourth(bad: Answer) -> Answer:
    return lambda call: (bad if call.request.number % 4 == 0 else text_only)(call)


@pytest.fixture
def audit(
    weighbridge_cli: Weighbridge, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    monkeypatch.setattr("weighbridge.collect.FIRST_WAIT_S", 0.001)

    def run(base_url: str, max_requests: int, timeout_s: float = 10.0) -> Ended:
        file = tmp_path / "ENDPOINT.toml"
        file.write_text(
            f'name = "text only"\nbase_url = "{base_url}"\nmodel = "{MODEL}"\nreference = "{reference}"\n'
            f"[limits]\nmax_requests = {max_requests}\ntimeout_s = {timeout_s}\n",
            "utf-8",
        )
        return weighbridge_cli("audit", file, "--seed", "texts", "--out", tmp_path / "run")

    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "exchanges.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


def answered(run: Path) -> Counter[str]:
    """How often each request was answered."""
    return Counter(line["request_id"] for line in events(run, "received") if line.get("status") == 200)


def assert_whole(ended: Ended, run: Path) -> dict[str, Any]:
    """No crash, nobody accused, reports written."""
    assert "Traceback" not in ended.err, ended.err
    for name in ("report.html", "report.json", "junit.xml"):
        assert (run / name).is_file()
    verdict: dict[str, Any] = json.loads((run / "verdict.json").read_bytes())
    assert verdict["verdict"] in ("consistent", "inconclusive")
    assert verdict["axes"]["weights"] != "inconsistent"
    return verdict


def test_a_host_that_refuses_every_fourth_request_is_asked_on_and_nothing_twice(
    audit: Callable[..., Ended], weights_only: None, weighbridge_cli: Weighbridge, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with FaultServer(every_fourth(refuses(500, "out of order"))) as server:
        assert_whole(audit(server.base_url, 20), run)
        before, sent = answered(run), len(server.requests)
        assert sent == 20
        assert any(name.startswith("text-") for name in before)
        assert_whole(weighbridge_cli("resume", run, "--max-requests", 32), run)
        assert 20 < len(server.requests) <= 32
    after = answered(run)
    assert max(after.values()) == 1
    assert before.keys() < after.keys()
    failed = [line for line in events(run, "received") if line.get("status") == 500]
    assert len(failed) == len(server.requests) // 4
    texts = [line["body"] for line in events(run, "sent") if line["request_id"].startswith("text-")]
    assert texts
    assert all(body["temperature"] == 0 and body["max_tokens"] == 1 and not body.get("logprobs") for body in texts)


def test_a_host_that_hangs_ends_unreachable_and_the_audit_goes_on_later(
    audit: Callable[..., Ended], weights_only: None, weighbridge_cli: Weighbridge, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with FaultServer(first(9, text_only, silence)) as server:
        ended = audit(server.base_url, 28, timeout_s=0.25)
        assert_whole(ended, run)
        assert ended.code != 0
        assert {line.get("failure") for line in events(run, "received")} == {None, "timeout"}
        before = answered(run)
        assert before
        server.answer = text_only
        assert_whole(weighbridge_cli("resume", run), run)
    after = answered(run)
    assert max(after.values()) == 1
    assert before.keys() < after.keys()
    lost = {line["request_id"] for line in events(run, "received") if line.get("failure") == "timeout"}
    assert lost <= after.keys()


def test_a_host_whose_repeats_are_lost_is_not_accused(
    audit: Callable[..., Ended], weights_only: None, tmp_path: Path
) -> None:
    """Another answer than the reference's counts only where it comes again."""
    seen: Counter[str] = Counter()

    def once(call: Call) -> None:
        seen[call.request.prompt] += 1
        if seen[call.request.prompt] > 1:
            refuses(403, "asked too often")(call)
        else:
            says(completion(None, content=UNHEARD_OF))(call)

    run = tmp_path / "run"
    with FaultServer(first(4, text_only, once)) as server:
        verdict = assert_whole(audit(server.base_url, 24), run)
    assert verdict["verdict"] == "inconclusive"
    assert any(line["request_id"].endswith("-again") for line in events(run, "received"))
    assert verdict["answers_used"] <= 3


def test_a_hostile_text_is_written_where_it_can_do_nothing(audit: Callable[..., Ended], tmp_path: Path) -> None:
    run, text = tmp_path / "run", " ".join(HOSTILE[:5])
    document = completion(None, content=text) | {"model": text}
    with FaultServer(says(document)) as server:
        ended = audit(server.base_url, 75)
    assert "Traceback" not in ended.err, ended.err
    page = (run / "report.html").read_text("utf-8")
    assert "&lt;script&gt;" in page
    assert not [bad for bad in ("<script", "<img", "\x1b", "\x00") if bad in page]
    assert not [bad for bad in "\x1b\x00\x07\x0b" if bad in ended.out + ended.err]
    report = json.loads((run / "report.json").read_bytes())
    assert report["verdict"]["verdict"] == "inconclusive"
    weights = next(f for f in report["findings"]["findings"] if f["check"] == "weights")
    assert weights["answers_used"] > POLICY.min_answers
    assert weights["outcome"] == "inconclusive"
    assert "one and the same text, whatever was asked" in weights["summary"]
    # It is kept as it came.
    kept = [line["body_text"] for line in events(run, "received") if line["request_id"].startswith("text-")]
    assert kept
    assert all(json.loads(body)["choices"][0]["message"]["content"] == text for body in kept)
