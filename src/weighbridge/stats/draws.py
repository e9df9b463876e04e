"""Tokens that were drawn, held against the distribution that they are said to be drawn from.

A list of logprobs divides the vocabulary into its tokens and all others together; what was drawn is one of these cells. Under the
list's own distribution the likelihood ratio of any other distribution over the cells has mean 1, so products over draws are
e-processes (Ville 1939; Grünwald, de Heide and Koolen 2024, JRSS B 86).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
OTHERS = 1000  # tokens among which the share of what is not listed is divided, where a temperature is put on it
VOCABULARY = 300_000  # more tokens than any tokenizer has
_LEAST = 1e-12


def cell_logprobs(listed_nats: Floats) -> Floats:
    """Logprobs of the listed tokens and, last, of all others together.

    Parameters
    ----------
    listed_nats : float array, shape (n, k)
        NaN where a list is shorter than k.

    Returns
    -------
    float array, shape (n, k + 1)
    """
    listed = np.where(np.isfinite(listed_nats), listed_nats, -np.inf)
    rest = np.log(np.maximum(1 - np.exp(listed).sum(axis=1), _LEAST))
    cells = np.concatenate([listed, rest[:, None]], axis=1)
    return np.asarray(cells - special.logsumexp(cells, axis=1, keepdims=True))


def at_temperature(cells_nats: Floats, temperature: float) -> Floats:
    """The same distribution at another temperature; what is not listed is taken to be `OTHERS` equal tokens.

    Parameters
    ----------
    cells_nats : float array, shape (n, k + 1)
        From `cell_logprobs`.
    temperature : float
        Greater than 0.
    """
    scaled = cells_nats / temperature
    scaled[:, -1] = (cells_nats[:, -1] - np.log(OTHERS)) / temperature + np.log(OTHERS)
    return np.asarray(scaled - special.logsumexp(scaled, axis=1, keepdims=True))


def truncated_log_likelihood(cells_nats: Floats, drawn: NDArray[np.int64], *, most_cut: float) -> Floats:
    """The most that each draw can be worth under the list's own distribution where a server leaves out what is unlikely; shape (n,).

    Servers do so unless they are told not to: by ``min_p``, the same for all draws and here the one under which they are likeliest, and by
    ``top_k`` of at least the list's length. How much of what is not listed they keep is not known and another share at each place, so a
    listed token is given the smallest total that it can have been drawn from, and one that is not listed the largest share.

    Parameters
    ----------
    cells_nats : float array, shape (n, k + 1)
        From `cell_logprobs`.
    drawn : int array, shape (n,)
        Cells, the last one for a token that is not listed.
    most_cut : float
        No token with a larger share of the likeliest one's probability is left out.
    """
    if drawn.size == 0:
        return np.zeros(0)
    # The more is cut, the likelier is what is left: up to the least likely token that was drawn all the same.
    cut = min(
        float(np.log(most_cut)), float(np.take_along_axis(_over_likeliest(cells_nats), drawn[:, None], axis=1).min())
    )
    worth = _worth_where_cut(cells_nats, np.full(cells_nats.shape, cut))
    return np.asarray(np.maximum(np.take_along_axis(worth, drawn[:, None], axis=1)[:, 0], np.log(_LEAST)))


def tells(cells_nats: Floats, other_nats: Floats, *, most_cut: float) -> NDArray[np.bool_]:
    """At which places a draw from `other_nats` is expected to speak against every truncation of `cells_nats`; shape (n,).

    Known before anything is drawn, so that bets may be placed there alone: where much is not listed, nearly every draw can come from some
    truncation.
    """
    cuts = np.minimum(np.log(most_cut), _over_likeliest(cells_nats))
    gain = other_nats - _worth_where_cut(cells_nats, cuts)
    return np.asarray((np.exp(other_nats) * np.where(other_nats > np.log(_LEAST), gain, 0.0)).sum(axis=1) > 0)


def _over_likeliest(cells_nats: Floats) -> Floats:
    """Log of the largest share of the likeliest token's that a token of each cell can have; shape (n, k + 1)."""
    listed = cells_nats[:, :-1]
    least = np.where(np.isfinite(listed), listed, np.inf).min(axis=1, keepdims=True)
    return np.asarray(np.concatenate([listed, least], axis=1) - listed.max(axis=1, keepdims=True))


def _worth_where_cut(cells_nats: Floats, cuts: Floats) -> Floats:
    """The largest logprob of each cell where tokens below its cut, a log share of the likeliest one's, are left out."""
    listed, rest = cells_nats[:, :-1], cells_nats[:, -1:]
    over = _over_likeliest(cells_nats)[:, :-1]
    is_kept = over[:, None, :] >= cuts[:, :, None] - 1e-9
    kept = special.logsumexp(np.where(is_kept, listed[:, None, :], -np.inf), axis=2)
    return np.concatenate([listed - kept[:, :-1], rest - np.logaddexp(kept[:, -1:], rest)], axis=1)


def log_likelihood(cells_nats: Floats, drawn: NDArray[np.int64]) -> Floats:
    """Logprob of each draw; shape (n,). `drawn` holds cells, the last one for a token that is not listed."""
    return np.asarray(np.maximum(np.take_along_axis(cells_nats, drawn[:, None], axis=1)[:, 0], np.log(_LEAST)))


def temperature_interval(
    cells_nats: Floats, drawn: NDArray[np.int64], *, drop_nats: float
) -> tuple[float, float, float]:
    """The temperature, relative to the list's, under which the draws are likeliest, and those less likely by at most `drop_nats`.

    How many tokens are not listed is not known, so a temperature's likelihood has a smallest and a largest value: each of those tokens is less
    likely than the least listed one, and there are at most `VOCABULARY`. A temperature falls out where its largest value is below the
    largest smallest one; at 1 both are the list's own.

    Returns
    -------
    tuple of float
        Estimate, lower and upper limit, on a grid from 0.02 to 10.
    """
    grid = np.unique(np.append(np.geomspace(0.02, 10.0, 125), 1.0))
    bounds = np.array([_likelihood_bounds(cells_nats, drawn, float(t)).sum(axis=1) for t in grid])
    near = grid[bounds[:, 1] >= bounds[:, 0].max() - drop_nats]
    return float(grid[int(bounds[:, 0].argmax())]), float(near.min()), float(near.max())


def _likelihood_bounds(cells_nats: Floats, drawn: NDArray[np.int64], temperature: float) -> Floats:
    """The smallest and the largest logprob that each draw can have at a temperature; shape (2, n)."""
    listed, rest = cells_nats[:, :-1], cells_nats[:, -1]
    least = np.where(np.isfinite(listed), listed, np.inf).min(axis=1)
    total = special.logsumexp(listed / temperature, axis=1)
    # Sums of p^(1/T) over what is not listed: by p <= the least listed one, and by there being so many at most.
    by_least = rest + least * (1 / temperature - 1)
    by_number = rest / temperature + np.log(VOCABULARY) * (1 - 1 / temperature)
    few, many = (
        (by_least, np.maximum(by_number, by_least)) if temperature > 1 else (np.minimum(by_number, by_least), by_least)
    )
    own = np.take_along_axis(cells_nats, drawn[:, None], axis=1)[:, 0] / temperature
    is_listed = drawn < listed.shape[1]
    smallest = np.where(is_listed, own - np.logaddexp(total, many), few - np.logaddexp(total, few))
    largest = np.where(is_listed, own - np.logaddexp(total, few), many - np.logaddexp(total, many))
    return np.asarray([smallest, largest])


def flip_log_e(flips: int, draws: int, *, honest_share: float, shares: tuple[float, ...]) -> float:
    """Log e-value against "at most `honest_share` of the draws are not the likeliest token", a mean over larger shares."""
    logs = [
        flips * np.log(share / honest_share) + (draws - flips) * np.log((1 - share) / (1 - honest_share))
        for share in shares
    ]
    return float(special.logsumexp(logs) - np.log(len(logs)))
