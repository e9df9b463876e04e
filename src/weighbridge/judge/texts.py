"""Where an endpoint returns only text: what its first tokens are evidence for. Levels L4 (temperature 0) and L5 (any other).

At temperature 0 an honest stack gives the reference's likeliest token wherever that leads by more than the stacks' own noise; a departure
often does not. A token that is not the reference's is asked for again: weights give it twice, a temperature seldom does. So two nulls are
held against the answers, and a host differs only where both fall: an honest stack at temperature 0, and one at any other temperature and
truncation, whichever explains the answers best.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.library import build_library, travels
from weighbridge.records import Observation, Plan, PlannedRequest, Policy, again_twin, drawn_twin
from weighbridge.reference.bundle import Bundle, HypothesisRecord, StackRecord
from weighbridge.reference.contexts import Contexts, cold_probes, contexts_of
from weighbridge.stats.draws import at_temperature
from weighbridge.stats.evidence import exceptions_process, mixture
from weighbridge.stats.residuals import share_upper_limit
from weighbridge.stats.texts import TEMPERATURES, answer_log_likelihood, flip_probability, noise_temperature

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TOP_LOGPROBS = 20  # over which the noise of honest stacks is stated
# How much is bet, chosen on the recorded departures (dd-009, item 28).
# Multiples of the honest limit at which bets on a departure of that size are placed, and the share of the wealth that is on them.
NOISE_MULTIPLES = (3.0, 16.0, 40.0, 120.0)
ON_SIZES = 0.7
# Of the scale at which a departure's other answers just pay for those that an honest stack is allowed.
SCALES = (3.0, 1.0, 0.4)
NEAR_A_TIE = 0.03
KEPT_FOR_DRAWS = 0.2
CONFIDENCE = 0.95
# At temperature 1 what is held back would make the rest no draw like any other: contexts with more of it are left out.
MOST_HELD_BACK = 0.01
# Answers that did not come again: from so many on, and so large a share, temperature 0 is not what is served. Fewer may have gone elsewhere.
NOT_COLD = 2
NOT_COLD_SHARE = 0.15
# Of the requests that are left for texts: a departure that is expected to take more answers than that is not waited for.
WAITED_FOR = 0.6
# A departure that every engine rounds anew may be this much smaller on another one.
STEADIER = 1.25
ENDS = ("stop", "end_turn", "eos")  # what hosts call the end of a turn
Departure = StackRecord | HypothesisRecord
Twin = Callable[[PlannedRequest], PlannedRequest]


@dataclass(frozen=True, eq=False)
class TextLibrary:
    """What honest and other stacks say first, in every context; S distributions, N contexts.

    Attributes
    ----------
    contexts : Contexts
    cold, drawn : int array
        The contexts that are asked at temperature 0 and at 1.
    honest : list of int
        Distributions that the policy accepts, the reference first.
    departures : list of int
        All others: stacks, and the reference under other renderings.
    limit_nats : float
        Noise that an honest stack may have.
    outlier_share : float
        Share of answers that may be anything, whatever is served.
    flips_allowed : float
        Share of the contexts at which an honest stack may answer otherwise, beyond what its noise explains: the upper limit (95 %) of
        the family that does so most.
    flip_at_most : float array, shape (N,)
        Probability of another answer than the reference's at temperature 0.
    at_zero_nats : float array, shape (S, N, tokens + 1)
        Logprob of every token at temperature 0, with an engine's noise, as `log_likelihood` has it.
    stays_nats : float array, shape (S, N)
        Logprob of the reference's answer at temperature 0; of what every engine rounds anew, by its size alone.
    excludable : bool array, shape (D,)
        Which departures so many answers as are waited for are expected to tell from an honest stack.
    """

    contexts: Contexts
    cold: Ints
    drawn: Ints
    honest: list[int]
    departures: list[int]
    limit_nats: float
    outlier_share: float
    flips_allowed: float
    flip_at_most: Floats
    at_zero_nats: NDArray[np.float32]
    stays_nats: Floats
    exclusion_nats: Floats

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those of the tables; the first one stands for temperature 0 with an engine's noise."""
        return (noise_temperature(self.limit_nats), *TEMPERATURES)

    def departure(self, index: int) -> Departure:
        """What a distribution was recorded from."""
        stacks = self.contexts.stacks
        return stacks[index] if index < len(stacks) else self.contexts.renderings[index - len(stacks)]

    def columns_of(self, place: int, text: str, completion_tokens: int | None) -> tuple[int, ...]:
        """The tokens that an answer can begin with: by its text, or by its beginning where the host generated more than one token.

        What has white space inside is more than one, whatever is counted.
        """
        names, text = self.contexts.names[place], text.strip()
        if completion_tokens == 1 and len(text.split()) <= 1:
            return names.get(text, (self.contexts.tokens_nats.shape[2] - 1,))
        begins = max(
            (name for name in names if name == text or (name and text.startswith(name))), key=len, default=None
        )
        if begins is None:
            return (self.contexts.tokens_nats.shape[2] - 1,)
        # What can be the reference's own token, gone on with, is no other one.
        own = next(name for name, columns in names.items() if int(self.contexts.likeliest[0, place]) in columns)
        return names[begins] + (names[own] if own and own != begins and text.startswith(own) else ())

    def is_drawn(self, probe_id: str) -> bool:
        """Whether a probe is one of those that are drawn at temperature 1."""
        return self.contexts.index.get(probe_id, -1) in self.drawn

    def is_in_doubt(self, observation: Observation) -> bool:
        """Whether an answer at temperature 0 is not the reference's, so that it is worth asking for again."""
        place = self.contexts.index.get(observation.probe_id)
        columns = _columns(self, place, observation) if place is not None else None
        return columns is not None and place is not None and self.contexts.likeliest[0, place] not in columns

    def log_likelihood(self, place: int, columns: tuple[int, ...]) -> Floats:
        """Logprob of an answer under every distribution; shape (S, temperatures, truncations)."""
        return _answer(self, place, columns)


@lru_cache(maxsize=1024)
def _answer(library: TextLibrary, place: int, columns: tuple[int, ...]) -> Floats:
    tokens = library.contexts.tokens_nats[:, place]
    members = np.zeros(tokens.shape[1], np.bool_)
    members[list(columns)] = True
    return answer_log_likelihood(tokens, members, library.temperatures, outlier_share=library.outlier_share)


def build_text_library(bundle: Bundle, policy: Policy) -> TextLibrary | None:
    """What is compared with; the same for every audit against a bundle under a policy. None where it holds too little.

    Raises
    ------
    BundleError
        If the bundle cannot be judged against at all.
    """
    return _built(bundle, policy.model_dump_json(by_alias=True))


@lru_cache(maxsize=4)
def _built(bundle: Bundle, policy_text: str) -> TextLibrary | None:
    policy = Policy.model_validate_json(policy_text)
    contexts = contexts_of(bundle)
    if contexts is None:
        return None
    index = contexts.index
    cold = np.array([index[probe_id] for probe_id in cold_probes(contexts)], np.int64)
    limit = honest_limit_nats(bundle, policy)
    stacks = contexts.stacks
    honest = [i for i, s in enumerate(stacks) if s.departure is None or s.departure_class in policy.accepts]
    others = [i for i in range(contexts.tokens_nats.shape[0]) if i not in honest]
    allowed = _flips_allowed(contexts, cold, honest)
    at_most = np.minimum(flip_probability(contexts.lead_nats, limit) + allowed, 0.99)
    at_zero = _at_zero(contexts, noise_temperature(limit), policy.outlier_share)
    stays = _stays(contexts, others, at_zero)
    gain = np.log1p(-np.minimum(at_most, 0.5)) - np.log(np.maximum(np.exp(stays), policy.outlier_share))
    return TextLibrary(
        contexts=contexts, cold=cold, drawn=np.flatnonzero(_held_back(contexts) <= MOST_HELD_BACK), honest=honest, departures=others, limit_nats=limit, outlier_share=policy.outlier_share,
        flips_allowed=allowed, flip_at_most=at_most, at_zero_nats=at_zero, stays_nats=stays,
        exclusion_nats=gain[others][:, cold].mean(axis=1) if cold.size else np.zeros(len(others)),
    )  # fmt: skip


def honest_limit_nats(bundle: Bundle, policy: Policy) -> float:
    """Noise that an honest stack may have, whatever its grid: for where no logprobs tell that."""
    return max(null.limit_nats for null in build_library(bundle, policy, TOP_LOGPROBS).nulls)


def _held_back(contexts: Contexts) -> Floats:
    """The share of each context's answers that hosts hold back: parts of characters, white space, the end of a turn."""
    out = np.zeros(len(contexts.names))
    for place, names in enumerate(contexts.names):
        columns = [column for name, own in names.items() if not name or "\ufffd" in name for column in own]
        out[place] = np.exp(contexts.tokens_nats[0, place, columns]).sum()
    return out


def _at_zero(contexts: Contexts, temperature: float, outlier_share: float) -> NDArray[np.float32]:
    """Logprob of every token at temperature 0; the share of outliers is drawn at temperature 1."""
    out: NDArray[np.float32] = np.empty(contexts.tokens_nats.shape, np.float32)
    for place in range(len(contexts.names)):
        own = contexts.tokens_nats[:, place]
        mixed = (1 - outlier_share) * np.exp(at_temperature(own.copy(), temperature)) + outlier_share * np.exp(own)
        out[:, place] = np.log(np.maximum(mixed, 1e-12))
    return out


def _stays(contexts: Contexts, departures: list[int], at_zero_nats: NDArray[np.float32]) -> Floats:
    """Logprob of the reference's answer under every distribution at temperature 0; shape (S, N)."""
    out = np.zeros(contexts.tokens_nats.shape[:2])
    for place in range(len(contexts.names)):
        out[:, place] = special.logsumexp(at_zero_nats[:, place, list(same_text(contexts, place))], axis=1)
    for i in departures:
        stack = contexts.stacks[i] if i < len(contexts.stacks) else None
        if stack is not None and not travels(stack):
            # Rounded anew by every engine: how often it answers otherwise is known, and not where.
            out[i] = np.log1p(-flip_probability(contexts.lead_nats, (stack.noise_nats or 0.0) / STEADIER))
    return out


def same_text(contexts: Contexts, place: int) -> tuple[int, ...]:
    """The tokens that read as the reference's likeliest one."""
    best = int(contexts.likeliest[0, place])
    return next(columns for columns in contexts.names[place].values() if best in columns)


def _flips_allowed(contexts: Contexts, cold: Ints, honest: list[int]) -> float:
    """The upper limit of the share of contexts at which the least steady honest stack answers otherwise."""
    likeliest = contexts.likeliest
    limits = []
    for i in honest[1:]:
        known = cold[contexts.recorded[i, cold]]
        if known.size:
            flips = int((likeliest[i, known] != likeliest[0, known]).sum())
            limits.append(share_upper_limit(flips, int(known.size), CONFIDENCE))
    return max(limits, default=1.0)


def excludable(library: TextLibrary, plan: Plan) -> NDArray[np.bool_]:
    """Which departures the requests that the plan allows are expected to exclude; shape (D,)."""
    always = (plan.route_requests, plan.capability_requests, plan.prompt_requests, plan.sampling_requests)
    left = plan.endpoint.limits.max_requests - sum(len(requests) for requests in always)
    answers = min(WAITED_FOR * max(0, left), library.cold.size)
    return np.asarray(library.exclusion_nats * answers >= np.log(plan.policy.consistent_e_value))


@dataclass(frozen=True)
class Answers:
    """First tokens that came back, in the order of the draw; n of them.

    Attributes
    ----------
    places : int array, shape (n,)
        Context of each.
    columns : list of tuple of int
        The tokens that each can be.
    again : list of tuple of int or None
        The same of the second answer, where one was asked for and came.
    asked : int
        How many contexts were asked.
    texts : list of str
        What came, without white space at its ends.
    """

    places: Ints
    columns: list[tuple[int, ...]]
    again: list[tuple[int, ...] | None]
    asked: int
    texts: list[str]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.columns)


@dataclass(frozen=True)
class TextEvidence:
    """The evidence of texts after each answer; n answers (those at temperature 0 first), S distributions, D departures.

    Attributes
    ----------
    library : TextLibrary
    cold, drawn : Answers
        Asked at temperature 0, and at temperature 1 where 0 is not served.
    flips : bool array, shape (cold answers,)
        Another answer than the reference's, and the same when it was asked for again.
    wavering : int
        Answers that were another one when they were asked for again.
    log_cold : float array, shape (cold answers,)
        Log e-process against "an honest stack at temperature 0".
    log_warm : float array, shape (cold answers,)
        Against "an honest stack at some other temperature".
    log_total : float array, shape (n,)
        Against both.
    gain_nats : float array, shape (S,)
        By how much each distribution explains the answers better than a departure of no recorded kind does, over the contexts that it
        was recorded for.
    log_exclusion : float array, shape (D, n)
        Log e-process against "this departure is served".
    matches : float array, shape (S,)
        Share of the answers at temperature 0 that are the distribution's own likeliest one.
    """

    library: TextLibrary
    cold: Answers
    drawn: Answers
    flips: NDArray[np.bool_]
    wavering: int
    log_cold: Floats
    log_warm: Floats
    log_total: Floats
    gain_nats: Floats
    log_exclusion: Floats
    matches: Floats

    @property
    def answers(self) -> int:
        """How many answers count."""
        return self.cold.count + self.drawn.count

    @property
    def asked(self) -> int:
        """How many contexts were asked, those without an answer included."""
        return self.cold.asked + self.drawn.asked

    @property
    def alike(self) -> float:
        """The share of the answers that are one and the same text."""
        texts = [*self.cold.texts, *self.drawn.texts]
        return Counter(texts).most_common(1)[0][1] / len(texts)

    @property
    def differing(self) -> NDArray[np.bool_]:
        """Which answers at temperature 0 are not the reference's, whether they come again or not."""
        return _differing(self.library, self.cold)

    @property
    def is_cold(self) -> bool:
        """Whether temperature 0 is served, as far as was seen."""
        return self.wavering < NOT_COLD or self.wavering <= NOT_COLD_SHARE * self.cold.count


def weigh_texts(library: TextLibrary, plan: Plan, observations: dict[str, Observation]) -> TextEvidence | None:
    """Compute the evidence of all answers so far; None where there is none."""
    cold = _answers(library, plan.text_requests, observations, again_twin)
    drawn = _answers(library, [drawn_twin(r) for r in plan.probe_requests], observations, None)
    if cold.count + drawn.count == 0:
        return None
    differs = _differing(library, cold)
    same = np.array([a is None or a == c for a, c in zip(cold.again, cold.columns, strict=True)], np.bool_)
    confirmed = np.array([a is not None for a in cold.again], np.bool_) & same
    flips = differs & confirmed
    by_cold = _against_cold(library, cold, flips)
    tables = np.array([library.log_likelihood(p, c) for p, c in zip(cold.places.tolist(), cold.columns, strict=True)])
    again = np.array([
        library.log_likelihood(p, a) if a is not None else np.zeros(_table_shape(library))
        for p, a in zip(cold.places.tolist(), cold.again, strict=True)
    ])  # fmt: skip
    warm, steady, generic = _warm_likelihoods(library, cold, tables, again, same)
    by_warm = _against_warm(library, warm, steady, generic)
    later = np.array([library.log_likelihood(p, c) for p, c in zip(drawn.places.tolist(), drawn.columns, strict=True)])
    # A part of the wealth is kept for the draws at temperature 1, whatever the answers before them come to.
    first = np.logaddexp(np.log1p(-KEPT_FOR_DRAWS) + np.minimum(by_cold, by_warm), np.log(KEPT_FOR_DRAWS))
    log_total = np.concatenate([first, (first[-1] if first.size else 0.0) + _against_drawn(library, drawn, later)])
    return TextEvidence(
        library=library, cold=cold, drawn=drawn, flips=flips, wavering=int((~same).sum()), log_cold=by_cold, log_warm=by_warm,
        log_total=log_total, gain_nats=_gains(library, cold, steady, generic) + _drawn_gains(library, drawn, later), log_exclusion=_exclusions(library, cold, tables, drawn, later),
        matches=_matches(library, cold),
    )  # fmt: skip


def _table_shape(library: TextLibrary) -> tuple[int, ...]:
    return library.log_likelihood(0, (0,)).shape


def _answers(
    library: TextLibrary, requests: Iterable[PlannedRequest], observations: dict[str, Observation], twin: "Twin | None"
) -> Answers:
    """The answers to some requests, each probe once; those that are in doubt and were not asked for again are left out."""
    index, reference = library.contexts.index, library.contexts.likeliest[0]
    wanted = set((library.cold if twin is not None else library.drawn).tolist())
    places: list[int] = []
    columns: list[tuple[int, ...]] = []
    again: list[tuple[int, ...] | None] = []
    texts: list[str] = []
    asked = 0
    for request in requests:
        observation = observations.get(request.request_id)
        place = index.get(request.probe.id)
        if observation is None or place not in wanted:
            continue
        assert place is not None
        wanted.discard(place)  # each probe once
        asked += 1
        first = _columns(library, place, observation)
        if first is None:
            continue
        second = None
        if twin is not None and reference[place] not in first:
            repeat = observations.get(twin(request).request_id)
            second = _columns(library, place, repeat) if repeat is not None else None
            if repeat is None:  # not yet: what has come after it does not count before it
                asked -= 1
                break
            if second is None:
                continue
        places.append(place)
        columns.append(first)
        again.append(second)
        texts.append((observation.text or "").strip())
    return Answers(np.array(places, np.int64), columns, again, asked, texts)


def _columns(library: TextLibrary, place: int, observation: Observation) -> tuple[int, ...] | None:
    """What an answer begins with; None where that is not known.

    Nothing but white space says only something where it is the end of a turn: else reasoning that is not shown, or a part of a character
    that the host holds back, may have used the token up.
    """
    text = (observation.text or "").strip()
    ended = observation.finish_reason in ENDS
    thinks = observation.shows_reasoning or (observation.reasoning_tokens or 0) > 0
    if not observation.answered or thinks or "\ufffd" in text or (not text and not ended):
        return None
    return library.columns_of(place, text, observation.completion_tokens)


def _against_cold(library: TextLibrary, answers: Answers, flips: NDArray[np.bool_], *, drawn: bool = False) -> Floats:
    """Log e-process against honest stacks at temperature 0, whatever they do in as many contexts as they are allowed to."""
    if answers.count == 0:
        return np.zeros(0)
    likelihood = np.array([
        special.logsumexp(library.at_zero_nats[library.departures, p][:, list(c)], axis=1)
        for p, c in zip(answers.places.tolist(), answers.columns, strict=True)
    ]).T  # fmt: skip
    # What did not come again is no flip: it counts as kept.
    return cold_process(library, answers.places, flips, likelihood, drawn=drawn)


@dataclass(frozen=True)
class _ColdBets:
    """Bets against honest stacks at temperature 0 over one pool of contexts; B bets, N contexts of the library.

    Attributes
    ----------
    kept : float array, shape (B, N)
        The score of the reference's answer; NaN where the bet, or the pool, has nothing to do with a context.
    scale : float array, shape (B,)
        By which the probability of another answer is multiplied to be its score.
    other : float array, shape (sizes, N)
        Probability of any other answer under each bet on a size.
    inside : bool array, shape (N,)
        The pool: contexts whose lead is beyond an honest stack's noise.
    exceptions : float array, shape (B, allowed + 1)
        The most that so many other answers in the pool, from none to the allowed number, add to the sum of the scores, wherever they are.
    """

    kept: Floats
    scale: Floats
    other: Floats
    inside: NDArray[np.bool_]
    exceptions: Floats


@lru_cache(maxsize=8)
def _cold_bets(library: TextLibrary, *, drawn: bool) -> _ColdBets:
    contexts, at_most = library.contexts, library.flip_at_most
    inside = np.zeros(at_most.size, np.bool_)
    inside[library.drawn if drawn else library.cold] = True
    # Where the lead is within the noise, an honest stack may answer anything.
    inside &= at_most - library.flips_allowed <= NEAR_A_TIE
    other = np.array([
        np.maximum(flip_probability(contexts.lead_nats, multiple * library.limit_nats), at_most)
        for multiple in NOISE_MULTIPLES
    ])  # fmt: skip
    departures = library.departures
    kept = np.concatenate([1 - other, np.minimum(np.exp(library.stays_nats[departures]), 1.0)])
    known = inside & np.concatenate([np.ones_like(other, np.bool_), contexts.recorded[departures]])
    kept = np.where(known, kept, np.nan)
    exact = np.zeros((len(departures), at_most.size))
    for place in np.flatnonzero(inside).tolist():
        rest = np.delete(library.at_zero_nats[departures, place], list(same_text(contexts, place)), axis=1)
        exact[:, place] = np.exp(rest.max(axis=1))
    most = np.concatenate([other, exact])
    allowed = exceptions_allowed(library, inside)
    # With a scale of 1, what is expected of the departure pays for what is allowed to an honest stack.
    fair = np.nansum(1 - kept, axis=1) / allowed
    scale = np.concatenate([factor * fair for factor in SCALES])
    kept, most = np.concatenate([kept] * len(SCALES)), np.concatenate([most] * len(SCALES))
    gains = np.sort(np.nan_to_num(np.maximum(scale[:, None] * most - kept, 0.0)), axis=1)[:, ::-1]
    return _ColdBets(kept, scale, other, inside, np.pad(gains[:, :allowed].cumsum(axis=1), ((0, 0), (1, 0))))


def exceptions_allowed(library: TextLibrary, places: NDArray[np.bool_] | Ints) -> int:
    """In how many of some contexts an honest stack may answer otherwise, at temperature 0."""
    return max(1, int(library.flip_at_most[places].sum()))


def cold_process(
    library: TextLibrary, places: Ints, flips: NDArray[np.bool_], likelihood_nats: Floats, *, drawn: bool = False
) -> Floats:
    """Log e-process of all bets against honest stacks at temperature 0 together.

    A bet is on a departure of some size, or on a recorded one, and scores an answer by its probability under it. An honest stack gives the
    reference's answer in all contexts but a few; in which, and what it says there, is left open. Each other answer that was seen is one
    fewer that is left; but one is always left, since how many are allowed is an estimate.

    Parameters
    ----------
    places : int array, shape (..., n)
        In the order of the draw (of several draws at once, where there are leading axes).
    flips : bool array, shape (..., n)
        Whether the answer is another one than the reference's.
    likelihood_nats : float array, shape (D, ..., n)
        Logprob of the answer under every departure.
    drawn : bool
        Whether they are contexts that are drawn at temperature 1.
    """
    bets = _cold_bets(library, drawn=drawn)
    total, pool = np.nansum(bets.kept, axis=1), np.isfinite(bets.kept).sum(axis=1)
    sizes, departures = len(NOISE_MULTIPLES), len(library.departures)
    seen = flips & bets.inside[places]
    left = np.maximum(bets.exceptions.shape[1] - 1 - (seen.cumsum(axis=-1) - seen), 1)
    weights: list[float] = []
    processes = []
    for bet, (kept, scale) in enumerate(zip(bets.kept, bets.scale, strict=True)):
        kind = bet % (sizes + departures)
        other = bets.other[kind][places] if kind < sizes else np.exp(likelihood_nats[kind - sizes])
        usual = kept[places]
        scores = np.where(flips, scale * other, usual)
        weights.append(ON_SIZES / sizes if kind < sizes else (1 - ON_SIZES) / departures)
        processes.append(
            exceptions_process(
                scores,
                usual,
                usual_total=float(total[bet]),
                pool=int(pool[bet]),
                exceptions=bets.exceptions[bet][left],
            )
        )
    return mixture(np.stack(processes), np.array(weights))


def _warm_likelihoods(
    library: TextLibrary, cold: Answers, tables: Floats, again: Floats, same: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats]:
    """Logprobs of answers and their repeats: drawn anew (n, S, warm temperatures, truncations), or steady at temperature 0 (n, S).

    The third, of shape (n, temperatures): steady, by the reference's own distribution at each temperature, which is what noise of any size
    makes of it.
    """
    if cold.count == 0:
        shape = _table_shape(library)
        return np.zeros((0, shape[0], shape[1] - 1, shape[2])), np.zeros((0, shape[0])), np.zeros((0, shape[1]))
    repeated = np.array([a is not None for a in cold.again], np.bool_)
    wavers = np.log(library.outlier_share) + again[:, 0, 0, 0]
    kept = np.where(repeated, np.where(same, np.log1p(-library.outlier_share), wavers), 0.0)
    warm = tables[:, :, 1:] + again[:, :, 1:]
    return warm, tables[:, :, 0, 0] + kept[:, None], tables[:, 0, :, 0] + kept[:, None]


def _against_warm(library: TextLibrary, warm: Floats, steady: Floats, generic: Floats) -> Floats:
    """Log e-process against honest stacks at any temperature but 0: the best of them, at each moment, against a mixture."""
    if len(warm) == 0:
        return np.zeros(0)
    honest = warm[:, library.honest].cumsum(axis=0).reshape(len(warm), -1).max(axis=1)
    others = steady[:, library.departures].cumsum(axis=0)
    drawn = warm[:, library.departures].cumsum(axis=0).reshape(len(warm), -1)
    kinds = [_log_mean(generic.cumsum(axis=0)), _log_mean(others), _log_mean(drawn)]
    return np.asarray(special.logsumexp(kinds, axis=0) - np.log(len(kinds)) - honest)


def _against_drawn(library: TextLibrary, drawn: Answers, tables: Floats) -> Floats:
    """Log e-process of answers at temperature 1 against honest stacks at any, 0 included."""
    if drawn.count == 0:
        return np.zeros(0)
    course = tables.cumsum(axis=0)
    honest = course[:, library.honest, 1:].reshape(drawn.count, -1).max(axis=1)
    others = course[:, library.departures]
    # Half of the wealth is on the temperature that was asked for.
    asked_for = int(np.abs(np.array(library.temperatures) - 1).argmin())
    kinds = [_log_mean(others.reshape(drawn.count, -1)), _log_mean(others[:, :, asked_for].reshape(drawn.count, -1))]
    by_warm = _log_mean(np.array(kinds).T) - honest
    by_cold = _against_cold(library, drawn, _differing(library, drawn), drawn=True)
    return np.asarray(np.minimum(by_cold, by_warm))


def _differing(library: TextLibrary, answers: Answers) -> NDArray[np.bool_]:
    """Which answers are not the reference's likeliest one."""
    reference = library.contexts.likeliest[0]
    return np.asarray([reference[p] not in c for p, c in zip(answers.places, answers.columns, strict=True)], np.bool_)


def _gains(library: TextLibrary, cold: Answers, steady: Floats, generic: Floats) -> Floats:
    """At temperature 0: each distribution's likelihood over that of noise of the size that suits the answers best; shape (S,)."""
    if cold.count == 0:
        return np.zeros(_table_shape(library)[0])
    known = library.contexts.recorded[:, cold.places].T
    return np.asarray(np.where(known, steady, 0.0).sum(axis=0) - (known.T.astype(np.float64) @ generic).max(axis=1))


def _drawn_gains(library: TextLibrary, drawn: Answers, tables: Floats) -> Floats:
    """At any other: over that of the honest stack that suits them best."""
    if drawn.count == 0:
        return np.zeros(_table_shape(library)[0])
    known = library.contexts.recorded[:, drawn.places].T
    own = np.where(known[:, :, None, None], tables, 0.0).sum(axis=0).max(axis=(1, 2))
    honest = np.einsum("ns,nbtk->sbtk", known.astype(np.float64), tables[:, library.honest])
    return np.asarray(own - honest.reshape(len(own), -1).max(axis=1))


def _log_mean(logs: Floats) -> Floats:
    return np.asarray(special.logsumexp(logs, axis=1) - np.log(logs.shape[1]))


def _exclusions(library: TextLibrary, cold: Answers, tables: Floats, drawn: Answers, later: Floats) -> Floats:
    """For every departure the evidence that it is not served, at whatever temperature and truncation."""
    reference = library.contexts.likeliest[0]
    stays = np.array([reference[p] in c for p, c in zip(cold.places, cold.columns, strict=True)], np.bool_)
    at_most = library.flip_at_most[cold.places]
    anything = np.log(library.outlier_share)
    parts = []
    before = np.zeros(len(library.departures))
    if cold.count:
        honest = np.where(stays, np.log1p(-at_most), anything + tables[:, 0, 0, 0]).cumsum()
        own = tables[:, library.departures, 1:].cumsum(axis=0).reshape(cold.count, len(library.departures), -1)
        steady = np.where(
            stays, np.maximum(library.stays_nats[library.departures][:, cold.places], anything), tables[:, library.departures, 0, 0].T
        ).cumsum(axis=1)  # fmt: skip
        parts.append(honest - np.maximum(own.max(axis=2).T, steady))
        before = parts[0][:, -1]
    if drawn.count:
        course = later.cumsum(axis=0)
        honest = _log_mean(course[:, library.honest].reshape(drawn.count, -1))
        own = course[:, library.departures].reshape(drawn.count, len(library.departures), -1).max(axis=2).T
        parts.append(before[:, None] + honest - own)
    return np.concatenate(parts, axis=1)


def _matches(library: TextLibrary, cold: Answers) -> Floats:
    """The share of answers at temperature 0 that are each distribution's own likeliest one, where it was recorded."""
    if cold.count == 0:
        return np.zeros(library.contexts.tokens_nats.shape[0])
    likeliest = library.contexts.likeliest[:, cold.places]
    own = np.array([[best in c for best in likeliest[:, i]] for i, c in enumerate(cold.columns)], np.bool_).T
    known = library.contexts.recorded[:, cold.places]
    return np.asarray((own & known).sum(axis=1) / np.maximum(known.sum(axis=1), 1))
