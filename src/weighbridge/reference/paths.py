"""Whole answers of the reference as paths: its likeliest tokens one after another, and what every stack says at each of them."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from weighbridge.errors import BundleError
from weighbridge.reference.bundle import Bundle, StackRecord
from weighbridge.stats.draws import cell_logprobs

Floats = NDArray[np.float64]
# Tokens that are kept of every place of an answer. 4-bit weights leave one answer in 30 by another one; with 8 it was one in five (dd-009, item 24).
KEPT = 32
MOST_REPEATS = 16  # of answers that an audit asks for again


@dataclass(frozen=True, eq=False)
class Paths:
    """N answers with R tokens in all, at each of which K tokens are listed; S stacks.

    Attributes
    ----------
    probe_ids : list of str
        In the pool's order, in which an audit asks them.
    rows : list of slice
        Which of the R tokens are those of each answer.
    tokens : list of bytes
        The R tokens.
    listed : list of list of bytes
        The K tokens that are listed at each place; the end of a turn is empty.
    own : int array, shape (R,)
        The column of the path's own token.
    repeats : bool array, shape (R,)
        Whether the path's own token stands in the text before it.
    stacks : list of StackRecord
        The reference first.
    tokens_nats : float array, shape (S, R, K + 1)
        Logprobs at temperature 1; the last column holds all tokens that are not listed.
    """

    probe_ids: list[str]
    rows: list[slice]
    tokens: list[bytes]
    listed: list[list[bytes]]
    own: NDArray[np.int64]
    repeats: NDArray[np.bool_]
    stacks: list[StackRecord]
    tokens_nats: Floats

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of each probe."""
        return {probe_id: i for i, probe_id in enumerate(self.probe_ids)}

    @cached_property
    def lead_nats(self) -> Floats:
        """By how much every stack prefers the path's own token to each listed one; shape (S, R, K), 0 for itself."""
        listed = self.tokens_nats[:, :, :-1]
        own = np.take_along_axis(listed, self.own[None, :, None], axis=2)
        return np.asarray(own - listed)


def whole_rows(bundle: Bundle) -> NDArray[np.bool_]:
    """Which rows of a bundle are places of whole answers."""
    probes = [i for pool in bundle.manifest.pools if pool.level == "whole" for i in pool.probes]
    return np.isin(bundle.row_probe, probes)


def paths_of(bundle: Bundle) -> Paths | None:
    """Read the paths of a bundle; None where it has none."""
    return _paths(bundle)


@lru_cache(maxsize=4)
def _paths(bundle: Bundle) -> Paths | None:
    pool = bundle.pool_at("whole")
    probe_ids = bundle.usable_probes(pool) if pool is not None else []
    if pool is None or not probe_ids:
        return None
    rows: list[int] = []
    slices: list[slice] = []
    tokens: list[int] = []
    repeats: list[bool] = []
    for probe_id in probe_ids:
        own = np.flatnonzero(bundle.row_probe == bundle.probe_index[probe_id]).tolist()
        slices.append(slice(len(rows), len(rows) + len(own)))
        rows += own
        text = bundle.prompt_of(probe_id)
        tokens += text[-len(own) :]
        repeats += [text[i] in text[:i] for i in range(len(text) - len(own), len(text))]
    reference = bundle.manifest.reference_stack
    stacks = [s for s in bundle.manifest.stacks if s.is_judged and pool.key in s.pools]
    stacks.sort(key=lambda s: s.id != reference)
    values = bundle.logprobs_nats[[bundle.stack_index[s.id] for s in stacks]][:, rows].astype(np.float64)
    kept = np.isfinite(values[0]).any(axis=0)  # fewer tokens are kept of these rows than of others
    values, ids = values[:, :, kept], bundle.token_ids[rows][:, kept]
    return Paths(
        probe_ids=probe_ids,
        rows=slices,
        tokens=[bundle.vocabulary[token] for token in tokens],
        listed=[[bundle.vocabulary[token] for token in row] for row in ids.tolist()],
        own=np.array([_column(row, token) for row, token in zip(ids.tolist(), tokens, strict=True)], np.int64),
        repeats=np.array(repeats, np.bool_),
        stacks=stacks,
        tokens_nats=np.stack([cell_logprobs(one) for one in values]),
    )


def _column(listed: list[int], token: int) -> int:
    if token not in listed:
        raise BundleError(
            "an answer of the pool for whole answers is not the reference's own", "Do not use this bundle"
        )
    return listed.index(token)
