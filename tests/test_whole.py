"""Whole answers as text: where they leave the reference's, which honest stacks' never do, and what that is evidence for."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from weighbridge.errors import RunFolderError
from weighbridge.judge.case import Case
from weighbridge.judge.checks.share import check_share
from weighbridge.judge.checks.texts import check_texts
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import diversions
from weighbridge.judge.texts import TextLibrary, build_text_library, weigh_texts
from weighbridge.judge.verdict import is_diversion_owed
from weighbridge.judge.whole import (
    HONEST_CHANCE,
    LEAST_KEPT_AGAIN,
    WholeEvidence,
    WholeLibrary,
    _each_text_once,
    _log_served,
    build_whole_library,
    coarse,
    evidence_of,
    honest_chances,
    owed_repeats,
    read_whole,
)
from weighbridge.plan import check_draw, make_plan
from weighbridge.probes import load_pool
from weighbridge.records import Capability, Endpoint, Finding, Observation
from weighbridge.reference.bundle import Precision, StackRecord, load_bundle
from weighbridge.reference.paths import MOST_REPEATS, Paths, paths_of
from weighbridge.stats.draws import cell_logprobs
from weighbridge.stats.honest import tail_chance
from weighbridge.stats.paths import Leaving, leaving

TOKENS = [b"The", b" sky", b" is", b" blue"]
LISTED = [
    [b"The", b"A", b""],
    [b" sky", b" sea", b" s"],
    [b" is", b" was", b""],
    [b" blue", b" b", b""],
]
OWN = [0, 0, 0, 0]


def left(answer: str, *, ended: bool = False) -> Leaving:
    return leaving(answer.encode(), TOKENS, LISTED, OWN, ended=ended)


@pytest.mark.parametrize("answer", ["The sky is blue", "The sky is blue and", "The sky is bluer"])
def test_an_answer_that_begins_with_the_path_is_kept_whole(answer: str) -> None:
    assert left(answer) == Leaving(4)


def test_an_answer_leaves_by_the_listed_token_that_it_goes_on_with() -> None:
    assert left("The sea is blue") == Leaving(1, ((1, 1), (1, 2)))
    assert left("A sky") == Leaving(0, ((0, 1),))
    assert left("The sky was blue") == Leaving(1, ((1, 2), (2, 1)))


def test_every_token_that_the_text_allows_is_named() -> None:
    # " b" may have been the token, with "lack" after it; so may " s" in "sky", but only where the rest agrees.
    assert left("The sky is black") == Leaving(1, ((1, 2), (3, 1)))


def test_what_is_not_listed_is_one_cell() -> None:
    assert left("Error: too many requests") == Leaving(0, ((0, 3),))
    assert left("The sky is green") == Leaving(1, ((1, 2), (3, 3)))


def test_a_shorter_answer_says_something_only_where_its_turn_has_ended() -> None:
    assert left("The sky") == Leaving(2)
    assert left("The sk") == Leaving(1)
    assert left("The sky", ended=True) == Leaving(1, ((1, 2), (2, 2)))
    assert left("", ended=True) == Leaving(0, ((0, 2),))


def test_white_space_at_the_ends_is_no_difference() -> None:
    tokens, listed = [b" The", b" end", b".\n\n"], [[b" The", b"A"], [b" end", b" start"], [b".\n\n", b"!"]]
    assert leaving(b"The end.", tokens, listed, [0, 0, 0], ended=False) == Leaving(3)


@given(st.lists(st.sampled_from([b"a", b"b", b" a", b"ab", b" "]), min_size=1, max_size=6), st.binary(max_size=8))
def test_no_answer_is_both_kept_and_left(tokens: list[bytes], answer: bytes) -> None:
    listed = [[token, b"a", b"b", b""] for token in tokens]
    found = leaving(answer.strip(), tokens, listed, [0] * len(tokens), ended=True)
    assert (found.kept == len(tokens)) == (not found.cells)
    assert all(0 <= place < len(tokens) and 0 < column <= 4 for place, column in found.cells)


def test_the_tail_is_that_of_the_values_where_they_are_many() -> None:
    values = np.random.default_rng(5).exponential(size=200_000)
    at = np.array([0.5, 2.0, 7.0, 10.0])
    found = tail_chance(values, at)
    assert found[:2] == pytest.approx(np.exp(-at[:2]), rel=0.02)
    # The least shape makes the tail heavier than an exponential one, never lighter.
    assert np.all(found[2:] >= np.exp(-at[2:]) * 0.7)
    assert found[3] < 1e-3


def test_a_heavy_tail_is_found_to_be_heavy() -> None:
    values = np.random.default_rng(6).pareto(2.0, size=100_000)
    assert tail_chance(values, np.array([300.0]))[0] == pytest.approx(300.0**-2, rel=0.6)


def test_of_few_values_nothing_is_extrapolated() -> None:
    assert tail_chance(np.linspace(0, 1, 20), np.array([5.0]))[0] == pytest.approx(1 / 20)


# -- evidence ------------------------------------------------------------------------------------------------------

LENGTH, ANSWERS_KNOWN, K = 4, 60, 3


def paths(noise_nats: float = 0.05, seed: int = 3) -> Paths:
    """Answers of four tokens; three honest stacks beside the reference, and one departure that moves leads by a nat."""
    rng = np.random.default_rng(seed)
    rows = LENGTH * ANSWERS_KNOWN
    lead = np.tile(np.array([[0.0, 0.2, 4.0], [0.0, 1.5, 4.0], [0.0, 2.0, 5.0], [0.0, 0.1, 6.0]]), (ANSWERS_KNOWN, 1))
    listed = -lead - np.log(np.exp(-lead).sum(axis=1, keepdims=True)) - 0.01
    noises = [0.0, noise_nats, noise_nats, noise_nats, 1.0]
    moved = [cell_logprobs(special.log_softmax(listed + rng.normal(0, s, (rows, K)), axis=1) - 0.01) for s in noises]
    stacks = [stack(name, departs) for name, departs in (("ref", False), ("a", False), ("b", False), ("c", False), ("int4", True))]  # fmt: skip
    return Paths(
        probe_ids=[f"p{i}" for i in range(ANSWERS_KNOWN)], rows=[slice(LENGTH * i, LENGTH * (i + 1)) for i in range(ANSWERS_KNOWN)],
        tokens=[b" t"] * rows, listed=[[b" t", b" u", b" v"]] * rows, own=np.zeros(rows, np.int64), repeats=np.zeros(rows, np.bool_),
        stacks=stacks, tokens_nats=np.stack(moved),
    )  # fmt: skip


def stack(name: str, departs: bool) -> StackRecord:
    precision = Precision(weights="float32", activations="float32", kv_cache="float32", logits="float32")
    return StackRecord(
        id=name, description=name, departure="precision" if departs else None, departure_class="int4" if departs else None,
        variant=name if departs else None, family=f"{name}/float32", engine={}, precision=precision, pools=[],
    )  # fmt: skip


def library(known: Paths | None = None) -> WholeLibrary:
    known = known or paths()
    return WholeLibrary(known, [0, 1, 2, 3], [4], 0.065, honest_chances(known, [0, 1, 2, 3], 0.065, 1.25))


WHOLE = Leaving(LENGTH)
TIE, SURE, STRANGE = Leaving(0, ((0, 1),)), Leaving(2, ((2, 1),)), Leaving(0, ((0, K),))


def evidence(leavings: list[Leaving], repeats: list[tuple[int, Leaving]]) -> WholeEvidence:
    return evidence_of(library(), [*range(len(leavings))], leavings, repeats, asked=len(leavings))


def test_what_stands_out_is_what_no_honest_stack_gives() -> None:
    known = library()
    assert not known.is_outstanding(0, WHOLE)
    assert not known.is_outstanding(0, TIE)
    assert known.is_outstanding(0, SURE)
    # One token by which an honest stack might have left is enough to say nothing.
    assert not known.is_outstanding(0, Leaving(0, ((0, 1), (2, 1))))
    assert not known.is_outstanding(0, STRANGE)
    # Among the departure's answers many do, and among those of every honest stack none.
    assert known.told[0].mean() > 0.05
    assert not any(leave is not None and known.stands_out[leave] for i in known.honest for leave in known.leaves(i))


def test_what_repeats_the_text_never_stands_out() -> None:
    repeating = dataclasses.replace(paths(), repeats=np.ones(LENGTH * ANSWERS_KNOWN, np.bool_))
    assert not library(repeating).is_outstanding(0, SURE)


def test_noisier_stacks_ask_for_larger_leads() -> None:
    assert not library(paths(noise_nats=0.6)).is_outstanding(0, SURE)


def test_one_answer_never_decides_and_two_do() -> None:
    one = evidence([SURE, *[WHOLE] * 40], [(0, WHOLE)])
    two = evidence([SURE, *[WHOLE] * 30, SURE, *[WHOLE] * 9], [(0, WHOLE), (31, WHOLE)])
    assert two.log_cold[-1] > np.log(5000)
    assert one.log_cold[-1] < np.log(1000)
    assert two.returned == [True, True]


def test_an_honest_host_at_another_temperature_is_not_accused() -> None:
    # At temperature 1 answers leave where they will, and other ones come when they are asked for again.
    rng = np.random.default_rng(8)
    known = library()

    def drawn(place: int) -> Leaving:
        for position, row in enumerate(range(known.paths.rows[place].start, known.paths.rows[place].stop)):
            column = int(rng.choice(K + 1, p=np.exp(known.paths.tokens_nats[1, row])))
            if column:
                return Leaving(position, ((position, column),))
        return WHOLE

    for _ in range(20):
        order = rng.permutation(ANSWERS_KNOWN).tolist()
        leavings = [drawn(place) for place in order]
        repeats: list[tuple[int, Leaving]] = []
        found = evidence_of(known, order, leavings, repeats, asked=len(order))
        while owed := owed_repeats(found):
            repeats += [(i, drawn(order[i])) for i, _ in owed]
            found = evidence_of(known, order, leavings, repeats, asked=len(order))
        assert found.log_cold[-1] > np.log(1000)
        assert found.log_warm.max() < np.log(1000)


def test_repeats_tell_temperature_0() -> None:
    first = [SURE, WHOLE, SURE, *[WHOLE] * 30]
    before = evidence(first, [])
    again = [(0, WHOLE), (2, WHOLE), *((i, WHOLE) for i in range(3, 17))]
    after = evidence(first, again)
    assert after.log_warm[-1] > before.log_warm[-1]
    other = evidence(first, [(0, WHOLE), (2, WHOLE), *((i, TIE) for i in range(3, 17))])
    assert other.log_warm[-1] < after.log_warm[-1]


def test_what_stands_out_is_asked_for_again_first() -> None:
    assert owed_repeats(evidence([WHOLE, SURE, WHOLE, SURE], [])) == [(1, 0), (3, 0), (0, 0), (2, 0)]
    # Half of the room is left for what was the reference's own.
    many = [*[SURE] * 30, *[WHOLE] * 10]
    first = owed_repeats(evidence(many, []))
    assert first == [(i, 0) for i in (*range(8), *range(30, 38))]
    assert len(first) == MOST_REPEATS
    assert owed_repeats(evidence(many, [(i, many[i]) for i, _ in first])) == []
    assert MOST_REPEATS / 2 >= LEAST_KEPT_AGAIN


def test_what_stands_out_twice_is_asked_for_once_more() -> None:
    first = [SURE, SURE, *[WHOLE] * 30]
    kept = [(i, WHOLE) for i in range(2, 10)]
    once = evidence(first, [(0, SURE), (1, WHOLE), *kept])
    assert owed_repeats(once) == [(0, 1)]
    assert not once.is_asked_again
    twice = evidence(first, [(0, SURE), (0, WHOLE), (1, WHOLE), *kept])
    assert twice.is_asked_again
    assert twice.is_some
    steady = evidence(first, [(0, SURE), (0, SURE), (1, WHOLE), *kept])
    assert steady.is_asked_again
    assert not steady.is_some


@pytest.mark.parametrize(
    ("out", "kept", "some"),
    [
        ([WHOLE, WHOLE], [WHOLE] * 6, True),
        ([SURE, SURE], [WHOLE] * 6, False),  # all requests are answered so
        ([WHOLE, SURE], [WHOLE] * 6, False),  # one answer is none
        ([TIE, WHOLE], [WHOLE] * 6, True),  # an honest stack's answer, too
        ([STRANGE, WHOLE], [WHOLE] * 6, False),
        ([Leaving(1), WHOLE], [WHOLE] * 6, False),  # cut short
        ([WHOLE, WHOLE], [WHOLE] * 5 + [TIE], True),
        ([WHOLE, WHOLE], [WHOLE, TIE] * 3, False),  # nothing comes again: the prompt may be another one each time
        ([WHOLE, WHOLE], [WHOLE] * 3, False),  # too few to know
    ],
)
def test_some_requests_are_told_from_all(out: list[Leaving], kept: list[Leaving], some: bool) -> None:
    found = evidence([SURE, SURE, *[WHOLE] * 30], [*enumerate(out), *((i + 2, left) for i, left in enumerate(kept))])
    assert found.is_some == some


# -- the embedded bundle --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> WholeLibrary:
    found = build_whole_library(load_bundle("smollm2-135m-instruct"), load_policy("strict"))
    assert found is not None
    return found


def test_no_recorded_honest_stack_gives_an_answer_that_stands_out(embedded: WholeLibrary) -> None:
    stacks = embedded.paths.stacks
    for left_out in {stacks[i].family for i in embedded.honest[1:]}:
        kept = [i for i in embedded.honest if i == embedded.honest[0] or stacks[i].family != left_out]
        allowed = honest_chances(embedded.paths, kept, embedded.limit_nats, 1.25) <= HONEST_CHANCE
        for i in embedded.honest:
            assert not any(leave is not None and allowed[leave] for leave in embedded.leaves(i)), stacks[i].id


def test_most_answers_of_4_bit_weights_stand_out(embedded: WholeLibrary) -> None:
    told = embedded.told.mean(axis=1)
    names = [embedded.paths.stacks[i].id for i in embedded.departures]
    assert {names[i] for i in coarse(embedded)} >= {"llamacpp-q4_0", "nf4-g64", "int4-g64"}
    assert told[coarse(embedded)].min() > 0.6
    assert told[names.index("int8")] == 0


def test_a_plan_holds_every_whole_answer_once_what_tells_most_first() -> None:
    bundle = load_bundle("smollm2-135m-instruct")
    endpoint = Endpoint(name="x", base_url="http://127.0.0.1:1/v1", model="m")
    plans = [make_plan(endpoint, load_policy("strict"), bundle, seed=seed) for seed in ("1", "2")]
    orders = [[r.probe.id for r in plan.whole_requests] for plan in plans]
    known = paths_of(bundle)
    assert known is not None
    assert orders[0] == orders[1] == known.probe_ids == [probe.id for probe in load_pool("whole-answer").probes]
    assert len(set(orders[0])) == 100
    assert all(r.max_tokens == 16 and r.probe.messages[-1].role == "user" for r in plans[0].whole_requests)
    check_draw(plans[0], bundle)
    changed = plans[0].model_copy(update={"whole_requests": plans[0].whole_requests[1:]})
    with pytest.raises(RunFolderError):
        check_draw(changed, bundle)


def test_power_says_after_how_many_whole_answers_a_share_is_found(embedded: WholeLibrary) -> None:
    found = {d.departure: d for d in diversions(embedded, load_policy("strict"), draws=200)}
    assert found["llamacpp-q4_0"].answers_median is not None
    assert found["int8"].answers_median is None
    assert found["int8"].reached_share == 0
    assert diversions(embedded, load_policy("strict"), draws=20) == diversions(
        embedded, load_policy("strict"), draws=20
    )


def answered(embedded: WholeLibrary, place: int, text: str, finish: str | None = "length") -> Leaving | None:
    return read_whole(
        embedded,
        Observation(
            request_id="whole-0001", probe_id=embedded.paths.probe_ids[place], answered=True, attempts=1, latency_s=0.0, text=text, finish_reason=finish
        ),
    )  # fmt: skip


def own_text(embedded: WholeLibrary, place: int) -> str:
    return b"".join(embedded.paths.tokens[embedded.paths.rows[place]]).decode()


CANNED = (
    "I'm sorry, but I can't assist with that request.", "It looks like something went wrong.", "An error occurred while processing your request.",
    "The model is overloaded. Please try again later.", "Too many requests", "Error", "",
)  # fmt: skip


@pytest.mark.parametrize("text", CANNED)
def test_what_a_gateway_writes_stands_out_nowhere(text: str, embedded: WholeLibrary) -> None:
    for place in range(len(embedded.paths.probe_ids)):
        left = answered(embedded, place, text, "stop")
        assert left is None or not embedded.is_outstanding(place, left)


def test_an_answer_that_is_told_stands_out_as_text(embedded: WholeLibrary) -> None:
    q4_0 = next(i for i in embedded.departures if embedded.paths.stacks[i].id == "llamacpp-q4_0")
    told = embedded.told[embedded.departures.index(q4_0)]
    shown = 0
    for place, leave in enumerate(embedded.leaves(q4_0)):
        if leave is None or not told[place]:
            continue
        rows = embedded.paths.rows[place]
        text = (
            b"".join(embedded.paths.tokens[rows.start : leave[0]])
            + embedded.paths.listed[leave[0]][leave[1]]
            + "\N{SNOWMAN}".encode()
        )
        left = answered(embedded, place, text.decode("utf-8", "ignore"))
        assert left is not None
        shown += embedded.is_outstanding(place, left)
    assert shown >= 0.9 * told.sum()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'", "\N{RIGHT SINGLE QUOTATION MARK}"),
        ("...", "\N{HORIZONTAL ELLIPSIS}"),
        (" ", "\N{NO-BREAK SPACE}"),
        ("-", "\N{EN DASH}"),
    ],
)
def test_other_quotes_and_dashes_do_not_stand_out(old: str, new: str, embedded: WholeLibrary) -> None:
    for place in range(len(embedded.paths.probe_ids)):
        left = answered(embedded, place, own_text(embedded, place).replace(old, new))
        assert left is not None
        assert not embedded.is_outstanding(place, left)


@pytest.mark.parametrize(
    "text", ["\ud800", "\x00" * 50, "x" * 100_000, "\N{IDEOGRAPHIC SPACE}", "\N{COMBINING ACUTE ACCENT}"]
)
@pytest.mark.parametrize("finish", ["length", "stop", None])
def test_odd_texts_are_read_without_harm(text: str, finish: str | None, embedded: WholeLibrary) -> None:
    for place in range(0, len(embedded.paths.probe_ids), 9):
        left = answered(embedded, place, text, finish)
        assert left is None or isinstance(embedded.is_outstanding(place, left), bool)


def test_quiet_stacks_alone_do_not_make_a_low_threshold(embedded: WholeLibrary) -> None:
    stacks = embedded.paths.stacks
    quiet = [0, next(i for i, s in enumerate(stacks) if s.id == "llamacpp-f16")]
    allowed = honest_chances(embedded.paths, quiet, embedded.limit_nats, 1.25) <= HONEST_CHANCE
    for i in embedded.honest:
        assert not any(leave is not None and allowed[leave] for leave in embedded.leaves(i)), stacks[i].id
    nothing_moves = honest_chances(embedded.paths, [0, 0], embedded.limit_nats, 1.25)
    assert (nothing_moves == 1).all()


def test_a_stack_that_lists_too_few_tokens_breaks_nothing(embedded: WholeLibrary) -> None:
    table = embedded.paths.tokens_nats.copy()
    table[embedded.honest[3], ::7, 1] = -np.inf
    known = dataclasses.replace(embedded.paths, tokens_nats=table)
    assert np.isfinite(honest_chances(known, embedded.honest, embedded.limit_nats, 1.25)).all()


def test_the_numerator_is_no_more_than_a_probability(embedded: WholeLibrary) -> None:
    # Of every answer that is left by a listed or an unlisted token, or not at all: together at most one.
    for place in (0, 17, 42):
        rows = embedded.paths.rows[place]
        ways = [Leaving(16)] + [
            Leaving(i, ((i, column),)) for i in range(16) for column in range(embedded.chance.shape[1] + 1) if column != embedded.paths.own[rows.start + i]
        ]  # fmt: skip
        assert np.exp([_log_served(embedded, place, way) for way in ways]).sum(axis=0) == pytest.approx(1, abs=1e-6)


def test_one_text_for_several_prompts_is_held_against_nobody_but_once() -> None:
    once = _each_text_once([SURE, WHOLE, SURE, SURE], ["busy, try in 5 s", "fine", "busy, try in 7 s", "another"])
    assert [left.counts for left in once] == [True, True, False, True]


def test_what_is_held_against_nobody_clears_nobody_either() -> None:
    may_be_a_gateways = dataclasses.replace(SURE, counts=False)
    found = evidence([WHOLE, TIE, SURE, STRANGE, may_be_a_gateways, Leaving(2)], [])
    assert found.stand_out.tolist() == [False, False, True, False, False, False]
    assert found.silent.tolist() == [False, False, False, True, True, True]


# -- what is said of the share --------------------------------------------------------------------------------------


def case_of(whole: WholeEvidence, *, diverted: bool) -> Case:
    bundle, policy = load_bundle("smollm2-135m-instruct"), load_policy("strict")
    plan = make_plan(Endpoint(name="x", base_url="http://127.0.0.1:1/v1", model="m"), policy, bundle, seed="1")
    capability = Capability(reachable=True, refused=None, top_logprobs=0, temperature_regime="unknown", temperature_slope=None, usage_reported=True, model_named=None, fingerprint=None, quirks=[])  # fmt: skip
    texts = build_text_library(bundle, policy)
    assert texts is not None
    cold = {r.request_id: Observation(request_id=r.request_id, probe_id=r.probe.id, answered=True, attempts=1, latency_s=0.0, text=_first(texts, r.probe.id), completion_tokens=1, finish_reason="length") for r in plan.text_requests}  # fmt: skip
    return Case(
        plan=plan, capability=capability, answers=[], library=None, residuals=None, evidence=None, prompt_answers=[], raw_answers=[], sampling={}, reading=None,
        served="official", official_differs=False, texts=weigh_texts(texts, plan, cold), whole=whole, diverted=diverted,
    )  # fmt: skip


def share_of(whole: WholeEvidence, *, diverted: bool) -> Finding:
    return check_share(case_of(whole, diverted=diverted))


def _first(texts: TextLibrary, probe_id: str) -> str:
    place = texts.contexts.index[probe_id]
    best = int(texts.contexts.likeliest[0, place])
    return next(name for name, columns in texts.contexts.names[place].items() if best in columns)


def test_the_share_is_that_of_whole_answers_where_these_tell_more(embedded: WholeLibrary) -> None:
    def kept(n: int) -> WholeEvidence:
        return evidence_of(embedded, [*range(n)], [Leaving(16)] * n, [], asked=n)

    few, many = (share_of(kept(n), diverted=False) for n in (4, 80))
    assert "first tokens" in few.summary
    assert "whole answers" in many.summary
    assert many.effects[0].value < few.effects[0].value < 0.3
    lost = share_of(dataclasses.replace(kept(80), asked=90), diverted=False)
    assert lost.effects[0].value > many.effects[0].value


def test_a_diversion_has_an_interval_without_recorded_4_bit_weights_too(embedded: WholeLibrary) -> None:
    none = dataclasses.replace(embedded, departures=[i for i in embedded.departures if embedded.paths.stacks[i].departure_class != "int4"])  # fmt: skip
    q4_0 = next(i for i in embedded.departures if embedded.paths.stacks[i].id == "llamacpp-q4_0")
    told = np.flatnonzero(embedded.told[embedded.departures.index(q4_0)])[:2].tolist()
    leave = embedded.leaves(q4_0)
    lefts = [embedded.as_text(place, *known) for place in told if (known := leave[place]) is not None]
    rest = [place for place in range(40) if place not in told]
    for known in (embedded, none):
        found = evidence_of(known, [*told, *rest], [*lefts, *[Leaving(16)] * len(rest)], [], asked=40)
        share = share_of(found, diverted=True).effects[0]
        assert share.low is not None
        assert share.high is not None
        assert 0 < share.low < share.value < share.high <= 1
    assert share.high == 1


def test_what_could_not_be_asked_for_again_is_no_clean_answer(embedded: WholeLibrary) -> None:
    case = case_of(evidence([SURE, SURE, *[WHOLE] * 30], []), diverted=False)
    assert check_texts(case).outcome == "inconclusive"
    assert check_texts(case_of(evidence([WHOLE] * 30, []), diverted=False)).outcome == "consistent"


def test_repeats_are_asked_again_whenever_one_more_stands_out() -> None:
    def is_owed(first: list[Leaving], again: list[tuple[int, Leaving]], *, diverted: bool = False) -> bool:
        return is_diversion_owed(case_of(evidence(first, again), diverted=diverted))

    two, rest = [SURE, SURE], [WHOLE] * 20
    again = [(0, WHOLE), (1, SURE), (1, SURE), *((i, WHOLE) for i in range(2, 10))]
    assert not is_owed([SURE, *rest], [])
    assert is_owed([*two, *rest], [])
    # The second one came again each time: not settled, and nothing more to ask for.
    assert not is_owed([*two, *rest], again)
    assert is_owed([*two, *rest, SURE], again)
    assert not is_owed([*two, *rest, SURE], [*again, (22, WHOLE)])
    assert not is_owed([*two, *rest, SURE], again, diverted=True)
