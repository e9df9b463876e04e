"""How many requests it takes to tell each recorded departure from honest, from a bundle alone.

A departure whose weights are changed is put on every honest stack in turn: its residual plus that stack's own noise. One that rounds
activations or the KV cache would be rounded anew by another engine, so its recorded size counts and its direction does not. Audits are
then drawn from the pool as the keyed draw of a real one is.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.answers import Residuals
from weighbridge.judge.library import Library, Null, travels
from weighbridge.judge.sizes import Features, against_honest, exclusion_processes, features_of
from weighbridge.judge.texts import KEPT_FOR_DRAWS, TextLibrary, cold_process, same_text
from weighbridge.judge.whole import HONEST_CHANCE, WholeLibrary
from weighbridge.records import Finite, LogprobLevel, Policy, Record
from weighbridge.reference.bundle import StackRecord
from weighbridge.stats.draws import at_temperature
from weighbridge.stats.mixtures import MIN_STANDING_OUT, stand_out_process
from weighbridge.stats.residuals import own_top

Floats = NDArray[np.float64]
TEXT_LEVEL: Literal["L4"] = "L4"
DRAWS = 200
FEW_DRAWS = 10
RESOLVED_SHARE = 0.9  # of draws that must reach the level
DIVERTED_SHARE = 0.05  # of the requests
LONGEST = 120  # answers: what takes more is not resolvable at a price that anybody pays


class Resolution(Record):
    """How many answers tell one departure from every honest stack at one level; the worst engine that it was put on."""

    variant: str
    level: LogprobLevel | Literal["L4"]
    family: str | None
    bits_held: Finite | None
    noise_nats: Finite
    served_on: str
    reached_share: Finite
    requests_median: int | None
    requests_p90: int | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: Finite | None = None

    @property
    def resolvable(self) -> bool:
        """Whether at least nine draws of ten reach the level within the pool and, where logprobs are compared, 120 answers."""
        return self.reached_share >= RESOLVED_SHARE


class Diversion(Record):
    """How many whole answers, as text, tell that a departure answers a share of the requests; repeats are not counted."""

    departure: str
    family: str | None
    share: Finite
    stand_out_share: Finite
    reached_share: Finite
    answers_median: int | None
    answers_p90: int | None


def put_on(library: Library, variant: int, stack: int) -> Features:
    """What every probe would show if a departure were served on the engine of an honest stack.

    Parameters
    ----------
    variant : int
        Index into ``library.variants``.
    stack : int
        Index into ``library.honest``.
    """
    bundle, reference = library.bundle, library.reference_nats
    honest = bundle.logprobs_nats[bundle.stack_index[library.honest[stack].id]].astype(np.float64)[library.rows]
    whole = reference + library.differences_nats[variant]
    moves = travels(library.variants[variant])
    columns, endpoint = own_top(whole + honest - reference if moves else whole, library.top_k)
    bank = np.take_along_axis(
        library.differences_nats, np.broadcast_to(columns, (len(library.variants), *columns.shape)), axis=2
    )
    if not moves:
        bank = bank.copy()
        bank[variant] = np.nan
    rows = reference.shape[0]
    return features_of(
        Residuals(
            answer_of_row=library.unit_of_row,
            endpoint_nats=endpoint,
            reference_nats=np.take_along_axis(reference, columns, axis=1),
            bank_nats=bank,
            unlisted_nats=np.zeros(rows),
            listed_share=np.ones(rows),
            agrees=columns[:, 0] == 0,
            answers=len(library.probe_ids),
            asked=len(library.probe_ids),
            repeated=0,
        )
    )


def drawn(features: Features, draws: int, generator: np.random.Generator) -> Features:
    """The same answers in the order of many draws, shape (..., draws, n)."""
    n = features.log_scales.size
    order = np.argsort(generator.random((draws, n)), axis=1)[:, :LONGEST]
    return Features(features.log_scales[order], features.fisher[:, order], features.shape[order])


def answers_to_differ(library: Library, null: Null, features: Features, policy: Policy) -> Floats:
    """After how many answers each draw rejects every honest stack; infinity where they do not suffice."""
    total = against_honest(library, null, features, policy)
    return _first(total >= np.log(policy.differs_e_value), policy.min_answers)


def answers_to_consistent(library: Library, null: Null, features: Features, policy: Policy) -> Floats:
    """After how many answers each draw excludes every departure that can be; infinity where they do not suffice."""
    processes, excludable = exclusion_processes(library, null, features, policy)
    if not excludable.any():
        return np.full(features.log_scales.shape[:-1], np.inf)
    reached = np.maximum.accumulate(processes[excludable], axis=-1).min(axis=0) >= np.log(policy.consistent_e_value)
    return _first(reached, policy.min_answers_consistent)


def _first(reached: NDArray[np.bool_], least: int) -> Floats:
    first = np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1.0, np.inf)
    return np.maximum(first, least)


def resolutions(library: Library, policy: Policy, *, draws: int = DRAWS, seed: int = 1) -> list[Resolution]:
    """Every recorded departure, smallest first, on the engine where telling it takes longest.

    Parameters
    ----------
    library : Library
    policy : Policy
    draws : int
        Audits drawn for each departure and engine.
    seed : int
        Of the draws.
    """
    generator = np.random.default_rng(seed)
    out = []
    for v, variant in enumerate(library.variants):
        # A few draws find the engine on which it takes longest; all of them are drawn there.
        slowest: tuple[tuple[float, float], Null, int] | None = None
        for null in library.nulls:
            for stack in null.stacks.tolist() if travels(variant) else null.stacks[:1].tolist():
                features = drawn(put_on(library, v, stack), FEW_DRAWS, generator)
                needed = np.minimum(answers_to_differ(library, null, features, policy), 2 * LONGEST)
                pace = float(np.quantile(needed, 0.9)), float(needed.mean())
                if slowest is None or pace > slowest[0]:
                    slowest = pace, null, stack
        assert slowest is not None
        _, null, stack = slowest
        features = drawn(put_on(library, v, stack), draws, generator)
        out.append(_resolution(library, v, stack, answers_to_differ(library, null, features, policy)))
    return sorted(out, key=lambda r: r.noise_nats)


def text_resolutions(library: TextLibrary, policy: Policy, *, draws: int = DRAWS, seed: int = 1) -> list[Resolution]:
    """The same where no logprobs are returned, at temperature 0: every departure's own likeliest tokens, as they were recorded.

    Each answer that is not the reference's is asked for again, and comes again; these requests are counted. Against temperatures, the reference
    stands for all honest stacks.
    """
    generator = np.random.default_rng(seed)
    contexts = library.contexts
    out = []
    for index in library.departures:
        stack = library.departure(index)
        if not isinstance(stack, StackRecord):
            continue
        places = library.cold[contexts.recorded[index, library.cold]]
        if places.size < policy.min_answers:
            continue
        cold, warm, flips = _text_bets(library, index, places)
        order = np.argsort(generator.random((draws, places.size)), axis=1)
        by_warm = special.logsumexp(warm[0][:, order].cumsum(axis=-1), axis=0) - np.log(len(warm[0]))
        by_warm -= warm[1][:, order].cumsum(axis=-1).max(axis=0)
        total = np.minimum(cold_process(library, places[order], flips[order], cold[:, order]), by_warm)
        needed = _first(total >= np.log(policy.differs_e_value), policy.min_answers)
        repeats = flips[order].cumsum(axis=-1)
        last = np.minimum(np.nan_to_num(needed, posinf=1), places.size).astype(np.int64) - 1
        requests = needed + np.take_along_axis(repeats, last[:, None], axis=1)[:, 0]
        median, p90 = (float(np.quantile(requests, q, method="higher")) for q in (0.5, 0.9))
        tokens = float(contexts.prompt_tokens[places].mean())
        out.append(Resolution(
            variant=stack.id, level=TEXT_LEVEL, family=stack.departure_class, bits_held=stack.bits_held, noise_nats=stack.noise_nats or 0.0,
            served_on="as recorded", reached_share=float(np.isfinite(needed).mean()),
            requests_median=int(median) if np.isfinite(median) else None, requests_p90=int(p90) if np.isfinite(p90) else None,
            prompt_tokens=round(median * tokens) if np.isfinite(median) else None,
            completion_tokens=int(median) if np.isfinite(median) else None,
        ))  # fmt: skip
    return sorted(out, key=lambda r: r.noise_nats)


def diversions(library: WholeLibrary, policy: Policy, *, draws: int = DRAWS, seed: int = 1) -> list[Diversion]:
    """Where a share of the requests goes to a departure, each by itself, and its own likeliest answers come back, as they were recorded.

    First tokens are taken to have left no more than what is kept of the evidence for what comes after them. That temperature 0 is served is taken as told.
    """
    generator = np.random.default_rng(seed)
    kept = float(np.log(KEPT_FOR_DRAWS))
    out = []
    for index, told in zip(library.departures, library.told, strict=True):
        stack = library.paths.stacks[index]
        # In the pool's order, as an audit asks.
        shown = (told > 0) & (generator.random((draws, told.size)) < DIVERTED_SHARE)
        course = kept + stand_out_process(shown, false_positive=HONEST_CHANCE)
        enough = shown.cumsum(axis=-1) >= MIN_STANDING_OUT
        needed = _first((course >= np.log(policy.differs_e_value)) & enough, 1)
        median, p90 = (float(np.quantile(needed, q, method="higher")) for q in (0.5, 0.9))
        out.append(Diversion(
            departure=stack.id, family=stack.departure_class, share=DIVERTED_SHARE, stand_out_share=float(told.mean()),
            reached_share=float(np.isfinite(needed).mean()),
            answers_median=int(median) if np.isfinite(median) else None, answers_p90=int(p90) if np.isfinite(p90) else None,
        ))  # fmt: skip
    return sorted(out, key=lambda d: d.stand_out_share)


def _text_bets(
    library: TextLibrary, index: int, places: NDArray[np.int64]
) -> tuple[Floats, tuple[Floats, Floats], NDArray[np.bool_]]:
    """Of a departure's own likeliest tokens: logprobs under every departure at temperature 0; bets and honest likelihoods at others; and what flips."""
    contexts = library.contexts
    likeliest = contexts.likeliest[index, places]
    flips = np.array(
        [best not in same_text(contexts, int(p)) for p, best in zip(places, likeliest, strict=True)], np.bool_
    )
    zero = library.at_zero_nats[:, places, likeliest].astype(np.float64)
    reference = np.array([_at(library, temperature, places, likeliest) for temperature in library.temperatures])
    kept = np.where(flips, np.log1p(-library.outlier_share), 0.0)
    bets = np.concatenate([reference + kept, zero[library.departures] + kept])
    return zero[library.departures], (bets, reference[1:] * np.where(flips, 2.0, 1.0)), flips


def _at(library: TextLibrary, temperature: float, places: NDArray[np.int64], tokens: NDArray[np.int64]) -> Floats:
    """Logprob that the reference gives one token of each context at a temperature."""
    own = library.contexts.tokens_nats[0, places]
    at = np.arange(places.size)
    drawn, plain = np.exp(at_temperature(own.copy(), temperature)[at, tokens]), np.exp(own[at, tokens])
    return np.asarray(np.log((1 - library.outlier_share) * drawn + library.outlier_share * plain))


def _resolution(library: Library, v: int, stack: int, needed: Floats) -> Resolution:
    variant = library.variants[v]
    median, p90 = (float(np.quantile(needed, q, method="higher")) for q in (0.5, 0.9))
    tokens = float(np.mean([_prompt_tokens(library, probe) for probe in library.probe_ids]))
    completion = 1.0 if library.level != "L2" else _answer_tokens(library)
    return Resolution(
        variant=variant.id, level=library.level, family=variant.departure_class, bits_held=variant.bits_held,
        noise_nats=float(np.exp(np.nanmean(library.variant_log_scales[v]))),
        served_on=library.honest[stack].id if travels(variant) else "as recorded, by size alone",
        reached_share=float(np.isfinite(needed).mean()),
        requests_median=int(median) if np.isfinite(median) else None, requests_p90=int(p90) if np.isfinite(p90) else None,
        prompt_tokens=round(median * tokens) if np.isfinite(median) else None,
        completion_tokens=round(median * completion) if np.isfinite(median) else None,
    )  # fmt: skip


def _prompt_tokens(library: Library, probe_id: str) -> int:
    """Of the request: what is forced counts, what the endpoint generates itself does not."""
    bundle = library.bundle
    probe = bundle.probe_index[probe_id]
    whole = int(bundle.prompt_offsets[probe + 1] - bundle.prompt_offsets[probe])
    return int(bundle.row_position[bundle.row_index[probe_id]]) + 1 if library.level == "L2" else whole


def _answer_tokens(library: Library) -> float:
    """Tokens that a level-L2 answer generates, on average: up to the last position that is scored."""
    return float(np.mean([library.bundle.scored_tokens(probe_id) for probe_id in library.probe_ids]))
