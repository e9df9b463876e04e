"""What token counts and answers say of the prompt that was served: made-up counts and distances, and the embedded bundle's own rows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from weighbridge.judge.checks.prompt import explain_counts
from weighbridge.judge.policy import load_policy
from weighbridge.judge.renderings import MIN_ANSWERS, PromptReading, has_system, read_prompt, stands_ahead
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Message, Observation, Probe, TopToken
from weighbridge.reference.bundle import OFFICIAL, Bundle, HypothesisRecord, load_bundle, rendered_id

Floats = NDArray[np.float64]
LEAST = load_policy("strict").min_counted


def hypothesis(name: str) -> HypothesisRecord:
    return HypothesisRecord(
        id=name, description=name, cause=None if name == OFFICIAL else "template", template_sha256="0"
    )


def reading(
    *,
    offsets: Sequence[Sequence[int]] = ((),),
    scales: Sequence[Sequence[float]] = ((),),
    same_prompt: frozenset[tuple[int, int]] = frozenset(),
    has_system: Sequence[bool] | None = None,
    turns: Sequence[int] | None = None,
    official: Sequence[int] | None = None,
) -> PromptReading:
    """Rows are renderings, the official one first; `same_prompt` names renderings and answers where it is the official prompt."""
    number = max(len(offsets), len(scales))
    x = np.array(scales, np.float64) if len(scales) == number else np.zeros((number, 0))
    counts = np.array(offsets, np.int64) if len(offsets) == number else np.zeros((number, 0), np.int64)
    n, m = x.shape[1], counts.shape[1]
    prompts = [
        [b"" if np.isnan(x[h, i]) else f"{0 if (h, i) in same_prompt else h}-{i}".encode() for i in range(n)]
        for h in range(number)
    ]
    return PromptReading(
        hypotheses=[hypothesis(OFFICIAL), *(hypothesis(f"other-{i}") for i in range(1, number))],
        log_scales=x,
        prompts=prompts,
        fisher=np.full((number, n), np.nan),
        structures=[f"p-{i}" for i in range(n)],
        counted_structures=[f"p-{i}" for i in range(m)],
        offsets=counts,
        official_tokens=np.array(official if official is not None else [40 + 3 * i for i in range(m)], np.int64),
        has_system=np.array(has_system if has_system is not None else [False] * m, np.bool_),
        turns=np.array(turns if turns is not None else [1] * m, np.int64),
    )


# -- counts ----------------------------------------------------------------------------------------------------

GROUPS = [False] * 6 + [True] * 4


def test_one_constant_is_something_that_was_added() -> None:
    cause, text, length = explain_counts(reading(offsets=[[17] * 10], has_system=GROUPS))
    assert (cause, length) == ("hidden_prompt", 17)
    assert "Every prompt is counted 17 tokens longer" in text


@pytest.mark.parametrize(("without", "length"), [(12, 12), (-25, -25)])
def test_a_constant_of_prompts_without_a_system_message_alone_is_another_default_one(without: int, length: int) -> None:
    offsets = [0 if own else without for own in GROUPS]
    cause, text, found = explain_counts(reading(offsets=[offsets], has_system=GROUPS))
    assert (cause, found) == ("hidden_prompt", length)
    assert f"counted {without:+d} tokens" in text
    assert "another default system prompt" in text


def test_two_constants_are_a_text_that_replaces_the_default_one_or_joins_it() -> None:
    offsets = [20 if own else 8 for own in GROUPS]
    cause, text, length = explain_counts(reading(offsets=[offsets], has_system=GROUPS))
    assert (cause, length) == ("hidden_prompt", 20)
    assert "8 or 20 tokens longer" in text
    assert "without, and with, a system message of their own" in text


@pytest.mark.parametrize(("without", "own"), [(-4, -4), (-3, 2), (-25, -5)])
def test_a_constant_that_is_missing_is_another_template(without: int, own: int) -> None:
    offsets = [own if has else without for has in GROUPS]
    cause, text, length = explain_counts(reading(offsets=[offsets], has_system=GROUPS))
    assert (cause, length) == ("template", None)
    assert "differ from the official rendering by constants" in text


def test_tokens_for_each_message_are_another_template() -> None:
    turns = [1, 1, 2, 3, 3, 5, 5, 4, 2, 1]
    offsets = [3 + 2 * t for t in turns]
    cause, text, length = explain_counts(reading(offsets=[offsets], turns=turns))
    assert (cause, length) == ("template", None)
    assert "+5 for 1 message, +7 for 2 messages, +9 for 3 messages" in text


def test_tokens_that_go_with_roles_are_another_template() -> None:
    """As a template has it that knows no default system message and writes roles of its own."""
    own = [False] * 8 + [True] * 3
    turns = [1] * 7 + [5, 2, 2, 4]
    offsets = [-25] * 7 + [-35, -8, -8, -14]
    cause, text, length = explain_counts(reading(offsets=[offsets], turns=turns, has_system=own))
    assert (cause, length) == ("template", None)
    assert "-8 for 2 messages with a system message" in text


def test_a_number_for_each_shape_is_no_explanation_where_every_shape_stands_alone() -> None:
    """Any one number fits one count."""
    offsets, turns = [2, -3, 7, 1, -8, 4], [1, 2, 3, 4, 5, 6]
    assert explain_counts(reading(offsets=[offsets], turns=turns))[0] == "none_of_these"


@pytest.mark.parametrize(("official", "explained"), [((20, 140), "template"), ((40, 52), "none_of_these")])
def test_a_token_more_or_less_is_forgiven_only_where_a_proportion_would_have_shown(
    official: tuple[int, int], explained: str
) -> None:
    """Tokens merge where texts meet; over prompts of one length that could as well be an estimate."""
    offsets = [-25, -24, -25, -26, -25, -25, -25, -24, -35]
    lengths = [*np.linspace(*official, 8).round().astype(int), 60]
    order = [3, 0, 6, 1, 7, 4, 2, 5, 8]
    cause, _, _ = explain_counts(
        reading(offsets=[offsets], turns=[1] * 8 + [5], official=[int(lengths[i]) for i in order])
    )
    assert cause == explained


@pytest.mark.parametrize("ratio", [0.7, 1.3])
def test_counts_in_proportion_are_another_tokenizer(ratio: float) -> None:
    official = [20, 31, 44, 52, 67, 80, 95, 120, 140, 33]
    offsets = [round(n * ratio) - n for n in official]
    cause, text, length = explain_counts(reading(offsets=[offsets], official=official))
    assert (cause, length) == ("none_of_these", None)
    assert f"{ratio:.2f} times the official ones" in text
    assert "another tokenizer, or an estimate" in text


def test_varying_lengths_that_are_all_larger_are_something_added_that_goes_with_the_text() -> None:
    offsets = [31, 42, 28, 55, 37, 33, 49, 29]
    cause, text, length = explain_counts(reading(offsets=[offsets], official=[50, 40, 60, 45, 55, 52, 48, 43]))
    assert (cause, length) == ("hidden_prompt", 35)
    assert "by 28 to 55 tokens that vary" in text


def test_counts_that_follow_nothing_are_explained_by_nothing() -> None:
    cause, text, length = explain_counts(reading(offsets=[[3, -2, 0, 5, -7, 1]], official=[50, 40, 60, 45, 55, 52]))
    assert (cause, length) == ("none_of_these", None)
    assert "follow no recorded rendering" in text


def test_a_rare_slip_of_a_count_does_not_hide_a_constant() -> None:
    offsets = [9] * 39 + [8]
    cause, _, length = explain_counts(reading(offsets=[offsets]))
    assert (cause, length) == ("hidden_prompt", 9)


def test_counts_are_those_of_every_rendering_that_is_as_long() -> None:
    found = reading(offsets=[[5] * 20, [0] * 20, [0] * 19 + [1], [0] * 18 + [1, 1]])
    assert found.counted == 20
    np.testing.assert_allclose(found.matches, [0, 1, 0.95, 0.9])
    assert found.by_counts(LEAST) == [1, 2]
    assert found.by_counts(21) == []


def test_without_counts_nothing_is_said_by_them() -> None:
    found = reading(scales=[[0.0] * 4, [0.0] * 4])
    assert found.counted == 0
    assert found.matches.tolist() == [0, 0]
    assert found.by_counts(LEAST) == []


# -- answers ---------------------------------------------------------------------------------------------------


def test_the_nearest_rendering_has_the_smallest_residuals() -> None:
    assert reading(scales=[[0.1, 0.2, 0.0], [-3.0, -3.1, -2.9], [-1.0, -1.0, -1.0]]).nearest() == 1
    assert reading(scales=[[-3.0] * 3, [0.0] * 3]).nearest() == 0


def test_what_was_recorded_under_some_renderings_only_is_not_compared() -> None:
    # The second rendering's one good answer is the only one that it has.
    assert reading(scales=[[-2.0, -2.0, 1.0], [np.nan, np.nan, 0.5]]).nearest() == 1
    assert reading(scales=[[-2.0, np.nan], [np.nan, -3.0]]).nearest() is None
    assert reading(scales=[[], []]).nearest() is None


def test_a_margin_rests_on_the_answers_whose_prompt_is_another_one() -> None:
    scales = [[-1.0, -1.1, -0.9, -3.0, -3.0], [-3.0, -3.2, -2.9, -3.0, -3.0]]
    found = reading(scales=scales, same_prompt=frozenset({(1, 3), (1, 4)}))
    gain, low, n = found.margin(1, 0)
    assert n == 3
    assert gain == pytest.approx(np.mean([2.0, 2.1, 2.0]))
    assert 0 < low < gain
    assert found.is_nearer(1, 0)
    assert not found.is_nearer(0, 1)


def test_a_margin_is_as_large_the_other_way_round() -> None:
    rng = np.random.default_rng(4)
    found = reading(scales=rng.normal(-2, 1, (3, 12)).tolist())
    (one, low, n), (other, lower, m) = found.margin(1, 2), found.margin(2, 1)
    assert one == pytest.approx(-other)
    assert n == m
    assert one - low == pytest.approx(other - lower)


def test_too_few_answers_have_no_margin() -> None:
    found = reading(scales=[[0.0] * (MIN_ANSWERS - 1), [-5.0] * (MIN_ANSWERS - 1)])
    assert found.margin(1, 0) == (5.0, -np.inf, MIN_ANSWERS - 1)
    assert not found.is_nearer(1, 0)
    assert reading(scales=[[], []]).margin(1, 0) == (0.0, -np.inf, 0)


def test_by_chance_no_rendering_is_nearer() -> None:
    """Of 400 audits of 10 answers in which no rendering is nearer than another, at most a few say that one of 16 is."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(400):
        found = reading(scales=rng.normal(-2, 0.5, (17, 10)).tolist())
        wrong += any(found.is_nearer(h, 0) for h in range(1, 17))
    assert wrong <= 3


def test_an_answer_without_a_token_in_common_is_far_from_a_rendering_that_was_recorded() -> None:
    """Altered weights behind a template without its end: hardly a likely token is among the official prompt's."""
    near = [-1.0, -1.2, -0.9, -1.1, -1.0]
    found = reading(scales=[[np.nan] * 5, near])
    assert (found.is_foreign(0), found.is_nearer(1, 0)) == (True, False), "where none was recorded nothing is said"
    found = replace(found, prompts=[[f"0-{i}".encode() for i in range(5)], found.prompts[1]])
    assert found.is_nearer(1, 0)
    assert not found.is_foreign(1)
    assert found.nearest() == 1


# -- the embedded bundle's rows --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def probes(bundle: Bundle) -> dict[str, Probe]:
    endpoint = Endpoint(name="e", base_url="http://127.0.0.1:1/v1", model="m")
    plan = make_plan(endpoint, load_policy("strict"), bundle, seed="prompt")
    return {r.probe.id: r.probe for r in (*plan.prompt_requests, *plan.probe_requests)}


def served(bundle: Bundle, rendering: str, counted_as: str = OFFICIAL) -> list[Observation]:
    """The reference's own answers to the probes of structure, under a rendering, and with another one's token counts."""
    pool = bundle.pool_at("prompt")
    assert pool is not None
    names = [h.id for h in bundle.manifest.hypotheses]
    out = []
    for probe_id in bundle.usable_probes(pool):
        row = bundle.row_index[rendered_id(probe_id, rendering)]
        values = bundle.logprobs_nats[bundle.stack_index[bundle.manifest.reference_stack], row].astype(np.float64)
        columns = bundle.columns_of_row(row)
        nats = {name: float(values[column]) for name, column in columns.items() if np.isfinite(values[column])}
        top = sorted(nats.items(), key=lambda pair: -pair[1])[:20]
        out.append(
            Observation(
                request_id=probe_id, probe_id=probe_id, answered=True, attempts=1, latency_s=0.1,
                prompt_tokens=int(bundle.prompt_tokens[names.index(counted_as), bundle.probe_index[probe_id]]),
                top=[TopToken(bytes_hex=name, logprob_nats=min(0.0, value)) for name, value in top],
            )
        )  # fmt: skip
    return out


RENDERINGS = [h.id for h in load_bundle("smollm2-135m-instruct").manifest.hypotheses]


def read(bundle: Bundle, answers: list[Observation], probes: dict[str, Probe]) -> PromptReading:
    return read_prompt(bundle, answers, probes, "L3", 20, bfloat16_logprobs=False)


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_every_rendering_is_nearest_to_itself_whatever_its_tokens_are_counted_as(
    rendering: str, bundle: Bundle, probes: dict[str, Probe]
) -> None:
    at = RENDERINGS.index(rendering)
    found = read(bundle, served(bundle, rendering), probes)
    assert found.nearest() == at
    assert np.exp(found.log_scales[at]).max() < 1e-3
    assert 0 in found.by_counts(LEAST)
    if at > 0:
        assert found.margin(at, 0)[0] > 1
    counted = read(bundle, served(bundle, OFFICIAL, rendering), probes)
    assert counted.nearest() == 0
    assert at in counted.by_counts(LEAST)


def test_a_rendering_that_only_drops_system_messages_shows_where_there_are_some(
    bundle: Bundle, probes: dict[str, Probe]
) -> None:
    at = RENDERINGS.index("system-dropped")
    found = read(bundle, served(bundle, "system-dropped"), probes)
    gain, _, n = found.margin(at, 0)
    own = [has_system(probes[name]) for name in probes if name in {o.probe_id for o in served(bundle, OFFICIAL)}]
    assert n == sum(own) >= 2
    assert gain > 1


def test_only_first_answers_to_known_chat_requests_are_read(bundle: Bundle, probes: dict[str, Probe]) -> None:
    answers = served(bundle, OFFICIAL)
    again = [o.model_copy(update={"prompt_tokens": 1}) for o in answers]
    raw = [o.model_copy(update={"raw": True, "probe_id": answers[-1].probe_id}) for o in answers[:1]]
    unknown = [answers[0].model_copy(update={"probe_id": "nobody-knows-it"})]
    found = read(bundle, [*unknown, *raw, *answers, *again], probes)
    assert found.counted == len(answers) == found.log_scales.shape[1]
    assert (found.offsets[0] == 0).all()


def test_short_lists_and_absent_counts_are_left_out(bundle: Bundle, probes: dict[str, Probe]) -> None:
    answers = served(bundle, OFFICIAL)
    bare = [o.model_copy(update={"prompt_tokens": None, "top": (o.top or [])[:4]}) for o in answers]
    found = read(bundle, bare, probes)
    assert (found.counted, found.log_scales.shape[1], found.nearest()) == (0, 0, None)


def test_a_system_message_is_one_that_stands_first() -> None:
    system, user = Message(role="system", content="s"), Message(role="user", content="u")
    assert has_system(Probe(id="p", purpose="p", messages=[system, user]))
    assert not has_system(Probe(id="p", purpose="p", messages=[user]))


@pytest.mark.parametrize(
    ("rendering", "ahead"),
    [
        ("generic-system", True), ("no-default-system", True), ("dated-system", True), ("double-bos", True), ("missing-bos", True),
        ("no-final-newline", False), ("no-generation-prompt", False), ("vicuna-template", False), ("thinking-on", False),
    ],
)  # fmt: skip
def test_what_stands_ahead_of_the_conversation_is_told_from_what_stands_around_it(
    rendering: str, ahead: bool, bundle: Bundle
) -> None:
    assert stands_ahead(bundle, rendering, bundle.usable_probe_ids[0]) == ahead
