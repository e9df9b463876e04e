"""Whole answers at temperature 0, as text: which of them no honest stack would have given.

An honest stack may leave the reference's answer where two tokens are nearly as likely; a coarser precision leaves it where the reference was sure.
How sure it has to be follows from how far recorded honest stacks ever moved. An answer that stands out so says something of the one request
that it answers, so a small share of requests that go elsewhere is found by it. Two nulls, as for first tokens: an honest stack at temperature 0, and one
at any other temperature; answers that are asked for again tell the second.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.texts import ENDS, honest_limit_nats
from weighbridge.records import Observation, Plan, PlannedRequest, Policy, again_twin
from weighbridge.reference.bundle import Bundle
from weighbridge.reference.paths import MOST_REPEATS, Paths, paths_of
from weighbridge.stats.draws import at_temperature
from weighbridge.stats.honest import tail_chance
from weighbridge.stats.mixtures import MIN_STANDING_OUT, SHARES, stand_out_process
from weighbridge.stats.paths import WHITE_SPACE, Leaving, folded, leaving
from weighbridge.stats.texts import TEMPERATURES, answer_log_likelihood, noise_temperature

Floats = NDArray[np.float64]
# With which an honest stack's answer may stand out: so seldom that two of a hundred suffice.
HONEST_CHANCE = 4e-5
# Honest stacks that are nearly as noisy as the noisiest one; those that hardly move would hide how those do that move.
NOISY_SHARE = 0.5
# Temperatures at which a departure of no recorded kind gives the reference's other answers.
GENERIC = (0.2, 0.4, 0.8)
# So many of the reference's own answers come again where only some requests are answered otherwise; and so many have to be asked for that.
COMES_AGAIN_SHARE = 0.75
LEAST_KEPT_AGAIN = 4
ALIKE_CHARACTERS = 40  # of an answer's beginning, by which it is told to be another one's as well
CUT_OFF = ("length", "max_tokens")  # what hosts say where an answer was as long as it was asked to be


@dataclass(frozen=True, eq=False)
class WholeLibrary:
    """What is known of the reference's whole answers; S stacks, R tokens of all answers, K listed tokens.

    Attributes
    ----------
    paths : Paths
    honest, departures : list of int
        Stacks that the policy accepts, the reference first, and all others.
    limit_nats : float
        Noise that an honest stack may have.
    chance : float array, shape (R, K)
        With which an honest stack leaves the answer by this token, or by any by which it is left no more easily.
    """

    paths: Paths
    honest: list[int]
    departures: list[int]
    limit_nats: float
    chance: Floats

    @cached_property
    def stands_out(self) -> NDArray[np.bool_]:
        """Whether an answer that leaves the path by this token stands out; shape (R, K).

        Where the path's own token has been in the text before, none does: some hosts punish repeating.
        """
        return np.asarray(self.is_sure & ~self.paths.repeats[:, None])

    @cached_property
    def is_sure(self) -> NDArray[np.bool_]:
        """Whether honest stacks' noise hardly ever makes this token the likeliest; shape (R, K)."""
        return np.asarray(self.chance <= HONEST_CHANCE)

    def is_outstanding(self, place: int, left: Leaving) -> bool:
        """Whether every token by which an answer can have left the path is one by which no honest stack leaves it."""
        start = self.paths.rows[place].start
        if not left.cells or not left.counts or _is_strange(self, left):
            return False
        last = left.cells[-1][0]
        # Before the texts part, a token that is begun otherwise has to go on with the very same text: a penalty on repeating does not do that.
        return all(
            bool((self.stands_out if position == last else self.is_sure)[start + position, column])
            for position, column in left.cells
        )

    @cached_property
    def drawn_nats(self) -> NDArray[np.float32]:
        """Logprob of the path's own token under every honest stack at every temperature and truncation; shape (R, honest, T, truncations)."""
        return np.stack([self.drawn(row, (int(own),)) for row, own in enumerate(self.paths.own)])

    def drawn(self, row: int, columns: tuple[int, ...]) -> NDArray[np.float32]:
        """The same of any of some tokens."""
        cells = self.paths.tokens_nats[self.honest, row]
        members = np.zeros(cells.shape[1], np.bool_)
        members[list(columns)] = True
        return np.asarray(answer_log_likelihood(cells, members, TEMPERATURES, outlier_share=HONEST_CHANCE), np.float32)

    @cached_property
    def served_nats(self) -> Floats:
        """Logprob of every token under the reference at temperature 0, each departure there, and the reference at the generic temperatures.

        Shape (1 + departures + generic, R, K + 1).
        """
        cold = noise_temperature(self.limit_nats)
        cells = self.paths.tokens_nats
        kinds = [(0, cold), *((i, cold) for i in self.departures), *((0, t) for t in GENERIC)]
        return np.stack([_at(cells[i], t) for i, t in kinds])

    def leaves(self, stack: int) -> list[tuple[int, int] | None]:
        """Where every stack leaves each answer at temperature 0, as row and column; None where it does not."""
        best = self.paths.tokens_nats[stack, :, :-1].argmax(axis=1)
        out: list[tuple[int, int] | None] = []
        for rows in self.paths.rows:
            left = np.flatnonzero(best[rows] != self.paths.own[rows])
            out.append((rows.start + int(left[0]), int(best[rows.start + left[0]])) if left.size else None)
        return out

    @cached_property
    def told(self) -> Floats:
        """Whether each departure's answer stands out, as far as its text tells; shape (departures, N)."""
        return np.array([
            [leave is not None and self.is_outstanding(place, self.as_text(place, *leave)) for place, leave in enumerate(self.leaves(i))]
            for i in self.departures
        ], np.float64)  # fmt: skip

    def as_text(self, place: int, row: int, column: int) -> Leaving:
        """What the text of an answer tells that leaves the path by a token."""
        rows, paths = self.paths.rows[place], self.paths
        # What follows the token is taken to be nothing that the path goes on with.
        text = b"".join(paths.tokens[rows.start : row]) + paths.listed[row][column] + b"\x01"
        return leaving(
            text.lstrip(WHITE_SPACE), paths.tokens[rows], paths.listed[rows], paths.own[rows].tolist(), ended=True
        )


def _at(cells_nats: Floats, temperature: float) -> Floats:
    """At a temperature, with the share of outliers at temperature 1; what is not listed stays one cell."""
    scaled = at_temperature(cells_nats.copy(), temperature)
    return np.asarray(np.logaddexp(np.log1p(-HONEST_CHANCE) + scaled, np.log(HONEST_CHANCE) + cells_nats))


def build_whole_library(bundle: Bundle, policy: Policy) -> WholeLibrary | None:
    """What whole answers are compared with; None where the bundle has none, or too few honest stacks.

    Raises
    ------
    BundleError
        If the bundle cannot be judged against at all.
    """
    return _built(bundle, policy.model_dump_json(by_alias=True))


@lru_cache(maxsize=4)
def _built(bundle: Bundle, policy_text: str) -> WholeLibrary | None:
    policy = Policy.model_validate_json(policy_text)
    paths = paths_of(bundle)
    if paths is None:
        return None
    honest = [i for i, s in enumerate(paths.stacks) if s.departure is None or s.departure_class in policy.accepts]
    if len(honest) < 2 or paths.stacks[0].id != bundle.manifest.reference_stack:
        return None
    limit = honest_limit_nats(bundle, policy)
    return WholeLibrary(
        paths=paths, honest=honest, departures=[i for i in range(len(paths.stacks)) if i not in honest], limit_nats=limit,
        chance=honest_chances(paths, honest, limit, policy.stack_margin),
    )  # fmt: skip


def honest_chances(paths: Paths, honest: Sequence[int], limit_nats: float, margin: float) -> Floats:
    """The chance that an honest stack leaves each answer by a token, or by any by which it is left no more easily; shape (R, K).

    How far leads move is taken from the noisiest recorded honest stacks, at all places of all answers, and a further stack may move them
    `margin` times as far, and no less than the limit on an honest stack's noise says. The chances of all tokens of an answer with at least so large a lead are added up.
    """
    lead = paths.lead_nats
    moved = lead[0] - lead[honest[1:]]
    second = np.where(np.arange(lead.shape[2]) == paths.own[:, None], np.inf, lead[0]).argmin(axis=1)
    at_second = np.take_along_axis(moved, second[None, :, None], axis=2)[:, :, 0]
    at_second = np.where(np.isfinite(at_second), at_second, np.nan)  # a stack that did not list one of the two
    noise = np.sqrt(np.nanmean(at_second**2, axis=1))
    noisy = at_second[noise >= NOISY_SHARE * noise.max()]
    noisy = np.abs(noisy[np.isfinite(noisy)])
    rms = float(np.sqrt(np.mean(noisy**2)))
    if rms == 0:
        return np.ones(lead.shape[1:])
    further = max(margin, float(np.sqrt(2)) * limit_nats / rms)
    # A sign says only which of the two tokens was counted from.
    flips = np.asarray(tail_chance(noisy, np.nan_to_num(np.maximum(lead[0], 0.0)) / further) / 2)
    flips[np.arange(len(flips)), paths.own] = 0.0
    chance = np.ones_like(flips)
    for rows in paths.rows:
        own_lead, own_flips = lead[0][rows].ravel(), flips[rows].ravel()
        order = np.argsort(-own_lead, kind="stable")
        summed = np.empty_like(own_flips)
        summed[order] = own_flips[order].cumsum()
        chance[rows] = summed.reshape(flips[rows].shape)
    chance[np.arange(len(flips)), paths.own] = 1.0
    return np.asarray(np.minimum(chance, 1.0))


@dataclass(frozen=True)
class WholeEvidence:
    """The evidence of whole answers after each of n first answers and then m repeats.

    Attributes
    ----------
    library : WholeLibrary
    places : list of int
        Which answer each of the n is.
    asked : int
        How many were asked, those without a usable text included.
    stand_out : bool array, shape (n,)
    kept : bool array, shape (n,)
        The reference's own, whole.
    silent : bool array, shape (n,)
        Cut short, strange, or such that a gateway may have written it: these say nothing of who answered.
    strange : int
        Answers that leave the path by a token that is not listed: they count as evidence of nothing, since a gateway's own words are such.
    again : dict of int to list of bool
        For the answers that were asked for again, each time: of one that stands out, whether it then was one that an honest stack may give; of the
        reference's own, whether it came again.
    log_cold, log_warm : float array, shape (n + m,)
        Log e-processes against an honest stack at temperature 0, and at any other.
    """

    library: WholeLibrary
    places: list[int]
    leavings: list[Leaving]
    asked: int
    stand_out: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    silent: NDArray[np.bool_]
    strange: int
    again: dict[int, list[bool]]
    log_cold: Floats
    log_warm: Floats

    @property
    def count(self) -> int:
        """How many first answers count."""
        return len(self.places)

    @property
    def log_total(self) -> Floats:
        """Against both nulls."""
        return np.minimum(self.log_cold, self.log_warm)

    @property
    def returned(self) -> list[bool]:
        """For each time that an answer that stands out was asked for again, whether it then was one that an honest stack may give."""
        return [one for i, times in self.again.items() if self.stand_out[i] for one in times]

    @property
    def kept_again(self) -> list[bool]:
        """For each of the reference's own that was asked for again, whether it came again."""
        return [one for i, times in self.again.items() if not self.stand_out[i] for one in times]

    @property
    def is_some(self) -> bool:
        """Whether some requests are answered otherwise: what stands out mostly is the reference's own the second time, and its other answers come again.

        What comes again is how all requests are answered; where nothing comes again the prompt may be another one each time.
        """
        some = sum(self.returned) >= MIN_STANDING_OUT and 2 * sum(self.returned) > len(self.returned)
        steady = len(self.kept_again) >= LEAST_KEPT_AGAIN and sum(self.kept_again) >= COMES_AGAIN_SHARE * len(
            self.kept_again
        )
        return some and steady

    @property
    def is_asked_again(self) -> bool:
        """Whether enough has been asked for again to tell some requests from all."""
        owed = any(self.stand_out[i] for i, _ in owed_repeats(self))
        return not owed and len(self.kept_again) >= LEAST_KEPT_AGAIN

    @cached_property
    def gain_nats(self) -> Floats:
        """By how much each departure explains what stands out better than the reference at any other temperature does; shape (departures,)."""
        served = np.array([
            _log_served(self.library, place, left)
            for place, left, far in zip(self.places, self.leavings, self.stand_out, strict=True) if far
        ]).sum(axis=0)  # fmt: skip
        departures = len(self.library.departures)
        return np.asarray(served[1 : 1 + departures] - served[1 + departures :].max())


def weigh_whole(library: WholeLibrary, plan: Plan, observations: dict[str, Observation]) -> WholeEvidence | None:
    """Compute the evidence of all whole answers so far; None where there is none."""
    seen = [(r, observations[r.request_id]) for r in plan.whole_requests if r.request_id in observations]
    read = [(r, read_whole(library, o)) for r, o in seen]
    known = [(r, library.paths.index[r.probe.id], left) for r, left in read if left is not None]
    if not known:
        return None
    places = [place for _, place, _ in known]
    leavings = _each_text_once(
        [left for _, _, left in known], [observations[r.request_id].text or "" for r, _, _ in known]
    )
    stand_out, kept = _flags(library, places, leavings)
    repeats: list[tuple[int, Leaving]] = []
    for i in [*np.flatnonzero(stand_out).tolist(), *np.flatnonzero(kept).tolist()]:
        for twin in _times(known[i][0]):
            observation = observations.get(twin.request_id)
            found = read_whole(library, observation) if observation is not None else None
            if found is not None:
                repeats.append((i, found))
    return evidence_of(library, places, leavings, repeats, asked=len(seen))


def _each_text_once(leavings: list[Leaving], texts: list[str]) -> list[Leaving]:
    """One text in answer to several prompts is a gateway's: beyond the first it is held against nobody."""
    said: set[str] = set()
    out = []
    for left, text in zip(leavings, texts, strict=True):
        beginning = "".join(c for c in text if not c.isdigit())[:ALIKE_CHARACTERS]
        out.append(replace(left, counts=False) if left.cells and beginning in said else left)
        said |= {beginning} if left.cells else set()
    return out


def evidence_of(
    library: WholeLibrary,
    places: list[int],
    leavings: list[Leaving],
    repeats: list[tuple[int, Leaving]],
    *,
    asked: int,
) -> WholeEvidence:
    """The evidence of first answers, and of repeats of some of these (by their number among the first answers)."""
    stand_out, kept = _flags(library, places, leavings)
    cold = stand_out_process(stand_out, false_positive=HONEST_CHANCE)
    return WholeEvidence(
        library=library, places=places, leavings=leavings, asked=asked, stand_out=stand_out, kept=kept,
        silent=np.array([_is_strange(library, left) or not left.counts or (not left.cells and not own) for left, own in zip(leavings, kept.tolist(), strict=True)], np.bool_),
        strange=sum(_is_strange(library, left) for left in leavings), again=_again(library, places, leavings, stand_out, repeats),
        log_cold=np.concatenate([cold, np.full(len(repeats), cold[-1])]), log_warm=_against_warm(library, places, leavings, stand_out, repeats),
    )  # fmt: skip


def _flags(
    library: WholeLibrary, places: list[int], leavings: list[Leaving]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which answers stand out, and which are the reference's own to the end."""
    pairs = list(zip(places, leavings, strict=True))
    out = [library.is_outstanding(place, left) for place, left in pairs]
    whole = [not left.cells and left.kept == _length(library, place) for place, left in pairs]
    return np.array(out, np.bool_), np.array(whole, np.bool_)


def _again(
    library: WholeLibrary,
    places: list[int],
    leavings: list[Leaving],
    stand_out: NDArray[np.bool_],
    repeats: list[tuple[int, Leaving]],
) -> dict[int, list[bool]]:
    """`WholeEvidence.again`."""
    found: dict[int, list[bool]] = {}
    for i, later in repeats:
        first = leavings[i]
        # It stayed on the path where it had left it, or left it before by a token by which an honest stack may.
        tells = bool(later.cells) and later.counts and not _is_strange(library, later)
        honest = tells and not library.is_outstanding(places[i], later)
        other = later.kept > first.kept or (honest and later.cells != first.cells)
        found.setdefault(i, []).append(other if stand_out[i] else later.kept == first.kept)
    return found


def owed_repeats(evidence: WholeEvidence) -> list[tuple[int, int]]:
    """What is worth asking for again: numbers of first answers, and how often each has been asked for again before; in order.

    What stands out, once, and a second time where it came again, since that may have gone elsewhere too; then what was the reference's own.
    Half of all repeats for each of the two.
    """
    most = MOST_REPEATS // 2
    far = [i for i in np.flatnonzero(evidence.stand_out).tolist() if i not in evidence.again]
    twice = [i for i, times in evidence.again.items() if evidence.stand_out[i] and times == [False]]
    own = [i for i in np.flatnonzero(evidence.kept).tolist()[:most] if i not in evidence.again]
    left = max(most - len(evidence.returned), 0)
    return [*[*((i, 0) for i in far), *((i, 1) for i in twice)][:left], *((i, 0) for i in own)]


def wanted_repeats(evidence: WholeEvidence, requests: Iterable[PlannedRequest]) -> list[PlannedRequest]:
    """The requests for them, in order."""
    by_place = {evidence.library.paths.index[r.probe.id]: r for r in requests}
    return [_times(by_place[evidence.places[i]])[times] for i, times in owed_repeats(evidence)]


def _times(request: PlannedRequest) -> list[PlannedRequest]:
    """Its repeats."""
    return [again_twin(request), again_twin(again_twin(request))]


def _length(library: WholeLibrary, place: int) -> int:
    rows = library.paths.rows[place]
    return int(rows.stop - rows.start)


def read_whole(library: WholeLibrary, observation: Observation) -> Leaving | None:
    """How an answer goes along its path; None where that is not known."""
    place = library.paths.index.get(observation.probe_id)
    text = (observation.text or "").strip()
    thinks = observation.shows_reasoning or (observation.reasoning_tokens or 0) > 0
    ended = observation.finish_reason in ENDS
    if place is None or not observation.answered or thinks or "\ufffd" in text or (not text and not ended):
        return None
    rows, paths = library.paths.rows[place], library.paths
    tokens, listed, own = paths.tokens[rows], paths.listed[rows], paths.own[rows].tolist()
    left = leaving(text.encode("utf-8", "replace"), tokens, listed, own, ended=ended)
    if not library.is_outstanding(place, left):
        return left
    # A gateway's own words end by themselves; and some hosts write other quotes and dashes.
    if observation.finish_reason not in CUT_OFF:
        return replace(left, counts=False)
    plain = leaving(folded(text.encode("utf-8", "replace")), [folded(t) for t in tokens], [[folded(t) for t in row] for row in listed], own, ended=ended)  # fmt: skip
    return left if library.is_outstanding(place, plain) else replace(left, counts=False)


def _is_strange(library: WholeLibrary, left: Leaving) -> bool:
    return any(column == library.chance.shape[1] for _, column in left.cells)


def _log_served(library: WholeLibrary, place: int, left: Leaving) -> Floats:
    """Logprob of an answer under everything that may be served; shape (kinds,)."""
    rows = library.paths.rows[place]
    tables = library.served_nats[:, rows]
    own = np.take_along_axis(tables, library.paths.own[rows][None, :, None], axis=2)[:, :, 0].cumsum(axis=1)
    before = np.concatenate([np.zeros((len(own), 1)), own], axis=1)
    if not left.cells:
        return np.asarray(before[:, left.kept])
    # Each outcome once: of the tokens that fit, the longest one where the texts part; so that all outcomes together have a chance of one.
    last = left.cells[-1][0]
    lengths = {column: len(library.paths.listed[rows.start + last][column]) if column < library.chance.shape[1] else 0 for i, column in left.cells if i == last}  # fmt: skip
    longest = max(lengths, key=lambda column: lengths[column])
    return np.asarray(before[:, last] + tables[:, last, longest])


def _log_drawn(library: WholeLibrary, place: int, left: Leaving) -> Floats:
    """Logprob of an answer under every honest stack at every temperature but 0; shape (honest, T, truncations)."""
    rows = library.paths.rows[place]
    own = library.drawn_nats[rows].astype(np.float64)
    before = np.concatenate([np.zeros((1, *own.shape[1:])), own.cumsum(axis=0)])
    if not left.cells:
        return np.asarray(before[left.kept])
    # Whatever fits, and where the texts part also what is not listed: a null may be given too much, never too little.
    last, unlisted = left.cells[-1][0], library.chance.shape[1]
    ways = [before[i] + library.drawn(rows.start + i, (column,)) for i, column in {*left.cells, (last, unlisted)}]
    return np.asarray(special.logsumexp(ways, axis=0))


def _against_warm(
    library: WholeLibrary,
    places: list[int],
    leavings: list[Leaving],
    stand_out: NDArray[np.bool_],
    repeats: list[tuple[int, Leaving]],
) -> Floats:
    """Log e-process against an honest stack at any other temperature: the best of them, against a mixture over shares and departures.

    Under the mixture a request is answered by the reference at temperature 0, or with the chance ε by something else; and an answer of the
    reference comes again as it was.
    """
    asked = [*zip(places, leavings, strict=True), *((places[i], second) for i, second in repeats)]
    null = np.stack([_log_drawn(library, place, left) for place, left in asked]).cumsum(axis=0)
    served = np.stack([_log_served(library, place, left) for place, left in asked])
    reference = served[:, 0].copy()
    for n, (i, second) in enumerate(repeats, start=len(places)):
        if not stand_out[i]:
            same = second.cells == leavings[i].cells and second.kept == leavings[i].kept
            reference[n] = np.logaddexp(
                np.log1p(-HONEST_CHANCE) if same else -np.inf, np.log(HONEST_CHANCE) + reference[n]
            )
    shares = np.log(SHARES)[None, :, None], np.log1p(-np.array(SHARES))[None, :, None]
    course = np.logaddexp(shares[1] + reference[:, None, None], shares[0] + served[:, None, 1:]).cumsum(axis=0)
    bets = course.reshape(len(asked), -1)
    mixed = special.logsumexp(bets, axis=1) - np.log(bets.shape[1])
    return np.asarray(mixed - null.reshape(len(asked), -1).max(axis=1))


def coarse(library: WholeLibrary) -> list[int]:
    """The recorded 4-bit weights, as places among the departures."""
    return [n for n, i in enumerate(library.departures) if library.paths.stacks[i].departure_class == "int4"]
