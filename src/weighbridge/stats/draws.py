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


def cut_off(cells_nats: Floats, *, least_of_likeliest: float, listed_only: bool) -> Floats:
    """The same distribution without what is unlikely.

    Parameters
    ----------
    cells_nats : float array, shape (n, k + 1)
        From `cell_logprobs`.
    least_of_likeliest : float
        Tokens with a smaller share of the likeliest one's probability are left out, as ``min_p`` does; 0 for none.
    listed_only : bool
        Whether what is not listed is left out, as a ``top_k`` of about the list's length does.
    """
    likeliest = cells_nats[:, :-1].max(axis=1, keepdims=True)
    kept = cells_nats >= likeliest + np.log(max(least_of_likeliest, _LEAST))
    # What is not listed is many tokens, each less likely than the listed ones.
    kept[:, -1] = not listed_only and least_of_likeliest == 0
    cut = np.where(kept, cells_nats, -np.inf)
    return np.asarray(cut - special.logsumexp(cut, axis=1, keepdims=True))


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
