"""An endpoint's answers lined up with the library: the same tokens, the same meaning, every answer once."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weighbridge.judge.library import MIN_TOP_LOGPROBS, Library
from weighbridge.records import Observation, TopToken
from weighbridge.stats.residuals import centred_difference, reference_at

Floats = NDArray[np.float64]


# An answer that ends at once carries no logprobs on some servers, and special tokens have no names in their lists; where the
# reference has such tokens at least once in twenty, that is no wonder.
LIKELY_END_NATS = float(np.log(0.05))


@dataclass(frozen=True)
class Residuals:
    """An endpoint's logprobs beside the library's: r rows of n answers, in the order of the draw.

    Attributes
    ----------
    answer_of_row : int array, shape (r,)
        To which answer each row belongs.
    endpoint_nats, reference_nats : float array, shape (r, k)
        NaN where a list is shorter than k or a token is to be left out.
    bank_nats : float array, shape (V, r, k)
        The difference of each variant from the reference, at the endpoint's tokens.
    unlisted_nats : float array, shape (r,)
        By how much the likeliest token that the reference does not list exceeds all that it can have there; 0 if
        it does not.
    listed_share : float array
        Share of the endpoint's tokens that stand in the reference's list, for every list of logprobs.
    agrees : bool array, shape (r,)
        Whether the most likely token is the same.
    answers : int
        n: how many answers have a row.
    asked : int
        How many probes were asked, those without an answer or without logprobs included.
    repeated : int
        Answers that were left out because an earlier one, to another probe, was the same to the last digit.
    probe_ids : tuple of str
        Of each answer.
    """

    answer_of_row: NDArray[np.int64]
    endpoint_nats: Floats
    reference_nats: Floats
    bank_nats: Floats
    unlisted_nats: Floats
    listed_share: Floats
    agrees: NDArray[np.bool_]
    answers: int
    asked: int
    repeated: int
    probe_ids: tuple[str, ...] = ()


def line_up(library: Library, observations: list[Observation]) -> Residuals:
    """Line an endpoint's top-k lists up with the reference's.

    An answer counts once: a second answer to a probe is left out, and so is one that repeats, digit by digit, what was
    answered to another probe, since a cache may have given it.
    """
    bundle, k = library.bundle, library.top_k
    unit_of = {probe_id: i for i, probe_id in enumerate(library.probe_ids)}
    rows_of: dict[int, list[int]] = {}
    for row, unit in enumerate(library.unit_of_row.tolist()):
        rows_of.setdefault(unit, []).append(row)
    answered: set[str] = set()
    seen: set[tuple[tuple[str, float], ...]] = set()
    lists: list[tuple[int, int, list[TopToken], bool]] = []  # answer, row, list, whether names were guessed
    repeated = answers = ended = 0
    probe_of_answer: list[str] = []
    for observation in observations:
        if observation.probe_id not in unit_of or observation.probe_id in answered:
            continue
        answered.add(observation.probe_id)
        found = _scored(library, observation, rows_of[unit_of[observation.probe_id]])
        if not found:
            row = rows_of[unit_of[observation.probe_id]][0]
            special = observation.fault == "end_of_turn" or observation.nameless > 0
            ended += special and library.most_unlisted_nats[row] > LIKELY_END_NATS
            continue
        whole = tuple((t.bytes_hex, t.logprob_nats) for _, top in found for t in top)
        if whole in seen:
            repeated += 1
            continue
        seen.add(whole)
        lists += [(answers, row, top, "bytes_absent" in observation.quirks) for row, top in found]
        answers += 1
        probe_of_answer.append(observation.probe_id)
    r, bank = len(lists), len(library.variants)
    endpoint_nats = np.full((r, k), np.nan)
    reference_nats = np.full((r, k), np.nan)
    columns = np.full((r, k), -1, np.int64)
    unlisted = np.zeros(r)
    listed = np.zeros(r)
    for i, (_, row, tokens, guessed) in enumerate(lists):
        top = tokens[:k]
        columns_of_token = bundle.columns_of_row(int(library.rows[row]))
        own = np.array([columns_of_token.get(t.bytes_hex, -1) for t in top], np.int64)
        values = np.array([t.logprob_nats for t in top], np.float64)
        # A name that was guessed from the text may be misspelt: that it is unknown then says nothing.
        most = np.inf if guessed else float(library.most_unlisted_nats[row])
        endpoint_nats[i, : len(top)] = values
        reference_nats[i, : len(top)] = reference_at(own, values, library.reference_nats[row], most)
        columns[i, : len(top)] = own
        listed[i] = (own >= 0).mean()
        if not (own >= 0).all() and np.isfinite(most):
            unlisted[i] = max(0.0, float(values[own < 0].max() - most))
    at = np.array([row for _, row, _, _ in lists], np.int64)
    bank_nats = np.where(columns >= 0, library.differences_nats[:, at[:, None], columns], np.nan)
    # An answer of which too little is known has no residual; it counts for nothing but `listed_share`.
    known = np.isfinite(centred_difference(endpoint_nats, reference_nats)).any(axis=1) | (unlisted > 0)
    answer_of_row = np.array([answer for answer, _, _, _ in lists], np.int64)[known]
    kept, answer_of_row = np.unique(answer_of_row, return_inverse=True)
    return Residuals(
        answer_of_row=answer_of_row.astype(np.int64),
        endpoint_nats=endpoint_nats[known],
        reference_nats=reference_nats[known],
        bank_nats=bank_nats.reshape(bank, r, k)[:, known],
        unlisted_nats=unlisted[known],
        listed_share=listed,
        # A reference row is ordered: its most likely token stands first.
        agrees=(columns[:, 0] == 0)[known] if r else np.zeros(0, np.bool_),
        answers=int(kept.size),
        asked=len({o.probe_id for o in observations}) - ended,
        repeated=repeated,
        probe_ids=tuple(probe_of_answer[answer] for answer in kept.tolist()),
    )


def _scored(library: Library, observation: Observation, rows: list[int]) -> list[tuple[int, list[TopToken]]]:
    """The lists of an answer that stand where the library has a row, each with that row.

    A generated answer counts as far as its tokens are the reference's: from then on the context is another one. The logprobs of a
    prompt count only where it has as many tokens as the reference's.
    """
    bundle = library.bundle
    places = [int(bundle.row_position[library.rows[row]]) for row in rows]
    positions = observation.positions or []
    if library.level == "L3":
        lists = [(rows[0], observation.top or [])]
    elif library.level == "L1":
        probe = bundle.probe_index[observation.probe_id]
        same = len(positions) == int(bundle.prompt_offsets[probe + 1] - bundle.prompt_offsets[probe])
        # What is listed at a token was said after the one before it.
        lists = [(row, positions[place + 1].top) for row, place in zip(rows, places, strict=True) if same]
    else:
        start = int(bundle.prompt_offsets[bundle.probe_index[observation.probe_id]]) + places[0] + 1
        path = [bundle.vocabulary[token].hex() for token in bundle.prompt_ids[start : start + len(positions)]]
        followed = 0
        while followed < min(len(path), len(positions)) and positions[followed].bytes_hex == path[followed]:
            followed += 1
        reached = [(row, place - places[0]) for row, place in zip(rows, places, strict=True)]
        lists = [(row, positions[i].top) for row, i in reached if i <= followed and i < len(positions)]
    return [(row, top) for row, top in lists if len(top) >= MIN_TOP_LOGPROBS]
