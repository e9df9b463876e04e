"""The share ε of requests that something else answered, from one score for each response.

The unit is the response, never its tokens: a request is answered by one or the other as a whole, and the tokens of a
text depend on each other. Two kinds of score are used:

- Λ, the log-likelihood ratio of an exactly known variant against honest, in nats;
- whether a response *stands out*, which an honest one does with a chance of at most c₀, as it was measured (an upper
  limit), and a diverted one with a chance between two limits, which may be unknown.

All functions take each request to be diverted by a throw of its own: where a key or an address is always sent to the
same place, as many requests as there are are one throw, and ε is the share of what this key is given. An honest
response is one from any stack that the null allows; a diverted one is whatever else is served.

What one response shows is never a diversion: see `diversion_shown`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from weighbridge.stats.evidence import mixture
from weighbridge.stats.residuals import share_upper_limit

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Tails = Literal["both", "lower", "upper"]

CONFIDENCE = 0.95
RATES_ERROR = 0.002  # of an interval's 0.05; with more for the rates the count has less, and the interval is wider
SHARES = (0.02, 0.05, 0.1, 0.25, 0.6)  # that `share_process` bets on, with a fifth of the stake each
MIN_STANDING_OUT = 2
PRIOR = (0.35, 3.0)  # of the anytime intervals, a Beta distribution: most of it below 0.2, where width matters most
_PRIOR_POINTS = 512
_LEAST_ERROR = 1e-12  # less than it is what rounding leaves of nothing
_STEPS = 45  # of bisection, which leaves 2⁻⁴⁵
_LARGEST_NATS = 600.0  # whose exponential is still finite; e^600 to 1 is as good as certain


class Rates(NamedTuple):
    """How often responses stand out, as limits that were measured or stated beforehand.

    Parameters
    ----------
    false_positive : float
        The upper limit of the chance that an honest response stands out, c₀.
    true_positive : float
        The lower limit of the chance that a diverted response does; 0 where it is unknown, so that no share can be
        excluded from above.
    most_true_positive : float
        Its upper limit.
    error : float
        The chance that any of the three is wrong, which intervals count as theirs; 0 where they are stated and not
        measured.
    """

    false_positive: float
    true_positive: float = 0.0
    most_true_positive: float = 1.0
    error: float = 0.0


def measured_rates(
    honest_nats: Floats,
    variant_nats: Floats | None = None,
    *,
    cut_nats: float | None = None,
    spared: int = 0,
    error: float = RATES_ERROR,
) -> tuple[float, Rates]:
    """The cut above which Λ stands out, and how often it does so in calibration draws.

    Where no cut is given, it is the largest honest draw but for those that are spared, and the limit of the false
    positives is Wilks's (1941, Ann. Math. Statist. 12, "Determination of sample sizes for setting tolerance limits"):
    a further draw exceeds the largest of m with a chance of at most 1 − δ^(1/m), at confidence 1 − δ, whatever the
    distribution, and the (s + 1)-th largest with one of at most the Clopper-Pearson limit of s in m. A cut that is
    given must not have been chosen by looking at these draws, nor at the responses that are to be judged.

    Parameters
    ----------
    honest_nats : float array, shape (m,)
        Λ of responses of one honest stack to the same kind of request. Of several stacks: call this for each with the
        same cut and take the largest false positive.
    variant_nats : float array, shape (m',), optional
        Λ of the variant's responses.
    cut_nats : float, optional
    spared : int
        How many honest draws may lie above a cut that is not given, decided beforehand. The largest of thousands of
        draws with a long tail is above many of the variant's.
    error : float
        In (0, 1), the chance that any of the limits is wrong: one half for the false positives and a quarter for each
        limit of the true ones, since these have only ε of the responses to act on.

    Returns
    -------
    tuple
        The cut in nats (Λ must be larger than it to stand out), and the rates.

    Raises
    ------
    ValueError
        If there is no honest draw, no draw of a variant that is given, a value that is not a number, an error outside
        (0, 1), or nothing left that is not spared.
    """
    honest = _ratios(honest_nats, "honest draws")
    if not 0 < error < 1:
        raise ValueError(f"the error of the rates must lie between 0 and 1, not {error}")
    if not 0 <= spared < honest.size:
        raise ValueError(f"{spared} of {honest.size} honest draws cannot be spared")
    cut = float(np.sort(honest)[honest.size - 1 - spared]) if cut_nats is None else float(cut_nats)
    if np.isnan(cut):
        raise ValueError("the cut is not a number")
    # Draws that equal the cut are not above it, but might as well have been: the limit is that of what was spared.
    above = int((honest > cut).sum()) if cut_nats is not None else spared
    if variant_nats is None:
        return cut, Rates(share_upper_limit(above, honest.size, 1 - error), error=error)
    variant = _ratios(variant_nats, "draws of the variant")
    found, asked = int((variant > cut).sum()), variant.size
    return cut, Rates(
        false_positive=share_upper_limit(above, honest.size, 1 - error / 2),
        true_positive=1 - share_upper_limit(asked - found, asked, 1 - error / 4),
        most_true_positive=share_upper_limit(found, asked, 1 - error / 4),
        error=error,
    )


# -- at a number of responses that was fixed beforehand ------------------------------------------------------------


def share_interval(
    stand_out: ArrayLike, rates: Rates, *, confidence: float = CONFIDENCE, tails: Tails = "both"
) -> tuple[float, float]:
    """An interval of ε that covers it with at least `confidence`, for any ε and any n that was fixed beforehand.

    The count of what stands out is binomial with q = ε t + (1 − ε) f. Clopper and Pearson's interval of q (1934,
    Biometrika 26) inverts the two one-sided exact tests; its coverage is never less than said, which mid-p intervals
    do not promise. Blaker's (2000, Can. J. Statist. 28) is exact too and 2 to 7 % narrower here, but its ends are no
    one-sided limits. Then

      lower = (q_lower − c₀) / (t_most − c₀),  upper = q_upper / t_least,

    the least and the largest ε that any f in [0, c₀] and t in [t_least, t_most] allow. What the rates may err is
    taken off what the count may, so the coverage is that of both together (Bonferroni; Berger and Boos 1994, JASA
    89). With 0 of n, upper is (1 − (α/2)^(1/n)) / t_least, and with tails="upper" (1 − α^(1/n)) / t_least: at t = 1,
    0 of 59 exclude 5 % and 0 of 299 1 %.

    Chances that differ from probe to probe make the count's tails lighter than the binomial's (Hoeffding 1956, Ann.
    Math. Statist. 27, theorem 4; not so where one alone stands out, or all but one: 0.025 may then be 0.0253, and a
    one-sided 0.05 be 0.0513; for confidences of 0.9 and more), so the interval then covers the ε that all requests have, if c₀ and t are limits of the means over what was asked.

    Parameters
    ----------
    stand_out : bool array, shape (n,)
        Whether each response stands out; 0 and 1 do as well.
    rates : Rates
        Where the lower limit of the true positives is 0 (unknown), the upper end is 1 and the lower one has all of
        the error.
    confidence : float
        In (0, 1).
    tails : {"both", "lower", "upper"}
        Which ends are wanted, decided before the responses are seen; the other one is then 0 or 1.

    Returns
    -------
    tuple of float
        Lower and upper end, between 0 and 1.

    Raises
    ------
    ValueError
        If there is no response, a value is neither 0 nor 1, or the rates or the confidence make no sense.
    """
    flags = _flags(stand_out)
    found, asked = int(flags.sum()), flags.size
    lower_error, upper_error = _errors(rates, confidence, tails)
    least = 1 - share_upper_limit(asked - found, asked, 1 - lower_error) if lower_error else 0.0
    most = share_upper_limit(found, asked, 1 - upper_error) if upper_error else 1.0
    return _shares(least, most, rates)


# -- at every number of responses at once --------------------------------------------------------------------------


def anytime_share_interval(
    stand_out: ArrayLike, rates: Rates, *, confidence: float = CONFIDENCE, tails: Tails = "both"
) -> tuple[float, float]:
    """An interval of ε from all responses so far, which may be looked at after each of them.

    With a chance of at least `confidence`, the intervals after 1, 2, 3, … responses all cover ε. Against "each
    response stands out with a chance of at most q, whatever came before" the bet ∫ Π (v/q)^z ((1 − v)/(1 − q))^(1 −
    z) dπ(u), v = max(u, q), is an e-process, since each factor has a mean of at most 1; the lower end of q is the
    least that it has not reached 2/α against, and the upper one likewise (a Beta-binomial mixture: Robbins 1970, Ann.
    Math. Statist. 41; compare, one-sided, Howard, Ramdas, McAuliffe and Sekhon 2021, Ann. Stat. 49). One-sided
    bets hold where chances differ from response to response: then c₀ and t are to be limits of each of them, and the
    interval covers ε if it is the same throughout. ε follows from q as in `share_interval`.

    Parameters, returns and errors are those of `share_interval`, but for n, which may be chosen by looking.
    """
    flags = _flags(stand_out)
    found, asked = int(flags.sum()), flags.size
    lower_error, upper_error = _errors(rates, confidence, tails)
    least = _anytime_lower(found, asked, PRIOR, lower_error) if lower_error else 0.0
    most = 1 - _anytime_lower(asked - found, asked, (PRIOR[1], PRIOR[0]), upper_error) if upper_error else 1.0
    return _shares(least, most, rates)


def _anytime_lower(found: int, asked: int, prior: tuple[float, float], error: float) -> float:
    """The least q that the bet on larger ones has not yet refuted; never more than the count's own share."""
    if found == 0:
        return 0.0
    # Below the count's share the bet falls with q, to at most 1 there, so that what is refuted is one piece beside 0.
    return _end(lambda q: _log_bet_on_more(q, found, asked, prior) < -np.log(error), inside=found / asked, outside=0.0)


def _log_bet_on_more(q: float, found: int, asked: int, prior: tuple[float, float]) -> float:
    """Log of ∫ Π (v/q)^z ((1 − v)/(1 − q))^(1 − z) dπ(u), v = max(u, q), in closed form."""
    a, b = prior
    after = found + a, asked - found + b
    with np.errstate(divide="ignore"):
        not_staked = np.log(special.betainc(a, b, q))
        above = np.log(special.betaincc(*after, q)) + special.betaln(*after) - special.betaln(a, b)
        return float(np.logaddexp(not_staked, above - special.xlogy(found, q) - special.xlog1py(asked - found, -q)))


def universal_share_interval(log_ratios_nats: Floats, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """An interval of ε from the likelihood ratios themselves, which may be looked at after each response.

    {ε : ℓ(ε) ≥ log ∫ e^ℓ(u) dπ(u) − log(1/α)} with ℓ(ε) = Σ log(1 − ε + ε e^Λ): under ε, ∫ e^(ℓ(u) − ℓ(ε)) dπ(u) has
    mean 1 after each response, so it ever reaches 1/α with a chance of at most α (Wasserman, Ramdas and Balakrishnan
    2020, PNAS 117, run sequentially, with Robbins's mixture in the place of the plug-in estimate: as narrow, and the
    order of the responses means nothing). No rate is needed.

    It holds only where Λ **is** the log-likelihood ratio of what a diverted response was drawn from against what an
    honest one was: text drawn from two known distributions, given the prompt. A ratio of fitted densities of
    residuals is none; use `anytime_share_interval` there. Probes may be of any kind and in any order: the chance is
    the server's.

    Parameters
    ----------
    log_ratios_nats : float array, shape (n,)
        Λ of each response. Beyond ±600 nats it counts as ±600.
    confidence : float
        In (0, 1).

    Returns
    -------
    tuple of float
        Lower and upper end, between 0 and 1.

    Raises
    ------
    ValueError
        If there is no response, a value is not a number, or the confidence makes no sense.
    """
    ratios = np.clip(_ratios(log_ratios_nats, "responses"), -_LARGEST_NATS, _LARGEST_NATS)
    _check_confidence(confidence)
    points = special.betaincinv(*PRIOR, (np.arange(_PRIOR_POINTS) + 0.5) / _PRIOR_POINTS)
    at_points = np.array([_log_likelihood(ratios, float(point)) for point in points])
    needed = float(special.logsumexp(at_points) - np.log(_PRIOR_POINTS) + np.log(1 - confidence))
    # ℓ is concave, so what is left is one piece; the best point is in it, being no worse than the mean over all.
    best = float(points[int(at_points.argmax())])

    def left(share: float) -> bool:
        return _log_likelihood(ratios, share) >= needed

    return (
        0.0 if left(0.0) else _end(left, inside=best, outside=0.0),
        1.0 if left(1.0) else _end(left, inside=best, outside=1.0),
    )


def _log_likelihood(ratios_nats: Floats, share: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.logaddexp(np.log1p(-share), np.log(share) + ratios_nats).sum())


# -- whether there is any ------------------------------------------------------------------------------------------


def share_process(
    log_ratios_nats: Floats,
    *,
    contamination: float,
    cap: float | None = None,
    shares: tuple[float, ...] = SHARES,
    pool: int | None = None,
) -> Floats:
    """Log e-process against "nothing is diverted", from likelihood ratios, after each response.

    The mean over ε of Π (1 − ε + ε min(LR, B) / C), with LR = e^Λ, B the cap and C = 1 − c₀ + c₀ B.

    *Null*: given all that came before, a response has a chance of at least 1 − c₀ to be drawn from a distribution
    under which the mean of LR is at most 1, and is otherwise anything at all. *Proof*: min(LR, B) then has a mean of
    at most (1 − c₀) · 1 + c₀ · B = C, so that each factor has one of at most 1; products of such factors, and means
    of these over fixed ε, are not expected to grow (Ville 1939; mixtures of bets: Robbins 1970, Ann. Math. Statist.
    41).

    The mean of LR is at most 1 where LR is the ratio of *any* density that was fixed before the response to the one
    that it was drawn from; where several honest stacks are allowed, to the largest of theirs. It is not so for
    products over a position's tokens of fitted densities: let such responses stand out above a cut whose c₀ was
    measured (`stand_out_process`).

    *Without replacement*: as it stands, the null is about each probe by itself, with chance on the server's side;
    then the order of the probes is nobody's matter, and they may come without replacement. Where it is only the mean
    of min(LR, B) over a pool of N probes that C bounds (as where honest answers are always the same), the chance is
    in our draw. Give `pool` then: the mean over those left after j − 1 draws is at most N C / (N − j + 1), as scores
    are not negative, and stands in the place of C. That needs each probe to be asked once, in an order uniformly
    drawn that the endpoint does not know.

    Parameters
    ----------
    log_ratios_nats : float array, shape (..., n)
        Λ of each response; of several runs at once, where there are leading axes. May be infinite.
    contamination : float
        c₀, in (0, 1).
    cap : float, optional
        B, at least 1. By default 1/c₀, at which a response counts at least half of min(LR, 1/c₀), and 1/c₀ is
        more than any response can count.
    shares : tuple of float
        The ε that are bet on, each in (0, 1), equally weighted.
    pool : int, optional
        N, where the draw is without replacement and the null bounds the mean over the pool alone.

    Returns
    -------
    float array, shape (..., n)

    Raises
    ------
    ValueError
        If a value is not a number, there are more responses than probes in the pool, or c₀, the cap or a share is out
        of its range.
    """
    ratios = _ratios(log_ratios_nats, "responses", several=True)
    if not 0 < contamination < 1:
        raise ValueError(f"the contamination must lie between 0 and 1, not {contamination}")
    most = 1 / contamination if cap is None else cap
    if not 1 <= most < np.inf:
        raise ValueError(f"the cap must be finite and at least 1, not {most}")
    scores = np.exp(np.minimum(ratios, np.log(most)))
    return _bets(scores, 1 - contamination + contamination * most, most, shares, pool)


def stand_out_process(
    stand_out: ArrayLike, *, false_positive: float, shares: tuple[float, ...] = SHARES, pool: int | None = None
) -> Floats:
    """Log e-process against "nothing is diverted", from what stands out, after each response.

    The mean over ε of Π (1 − ε + ε z / c₀), with z = 1 where a response stands out and 0 where it does not.

    *Null*: given all that came before, a response stands out with a chance of at most c₀. *Proof*: each factor then has
    a mean of at most 1 − ε + ε c₀ / c₀ = 1; the rest is as in `share_process`. A power t < 1 needs no knowing: it makes
    ε t of ε, on the same grid.

    c₀ must be an upper limit. That it was measured with an error of δ adds δ to the chance of a false alarm, 1/e.

    *Without replacement*: as in `share_process`, with z in the place of min(LR, B).

    Parameters
    ----------
    stand_out : bool array, shape (..., n)
        0 and 1 do as well.
    false_positive : float
        c₀, in (0, 1).
    shares, pool
        See `share_process`.

    Returns
    -------
    float array, shape (..., n)

    Raises
    ------
    ValueError
        If a value is neither 0 nor 1, there are more responses than probes in the pool, or c₀ or a share is out of
        its range.
    """
    flags = _flags(stand_out, several=True)
    if not 0 < false_positive < 1 or not np.isfinite(1 / false_positive):
        raise ValueError(f"the rate of false positives must lie between 0 and 1, not {false_positive}")
    return _bets(flags.astype(np.float64), false_positive, 1.0, shares, pool)


def _bets(scores: Floats, mean: float, largest: float, shares: tuple[float, ...], pool: int | None) -> Floats:
    """Log of the mean over ε of Π (1 − ε + ε score / mean), the mean being the most that a score is expected to be."""
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError("the shares that are bet on must be given and lie between 0 and 1")
    expected = np.full(scores.shape[-1], mean)
    if pool is not None:
        if scores.shape[-1] > pool:
            raise ValueError(f"{scores.shape[-1]} responses were not drawn without replacement from {pool} probes")
        expected = np.minimum(pool * mean / (pool - np.arange(scores.shape[-1])), largest)
    return mixture(np.array([np.cumsum(np.log1p(share * (scores / expected - 1)), axis=-1) for share in shares]))


def diversion_shown(
    log_process: Floats, stand_out: ArrayLike, *, e_value: float, least: int = MIN_STANDING_OUT
) -> int | None:
    """After how many responses a diversion may be spoken of, or None: never because of a single one.

    The first moment at which the process is at its level **and** at least `least` responses so far stand out. One
    response, however strange, may be a fault of the line or of the recording; and below c₀ = 1/4900 it would lift the
    process to 1000 by itself. It is a stopping time, so that the process there is an e-value.

    Parameters
    ----------
    log_process : float array, shape (n,)
        From `share_process` or `stand_out_process`.
    stand_out : bool array, shape (n,)
    e_value : float
        The level, above 1.
    least : int
        At least 2.

    Raises
    ------
    ValueError
        If the lengths differ, the level is not above 1, or fewer than two responses were to be enough.
    """
    flags = _flags(stand_out, empty=True)
    if log_process.shape != flags.shape:
        raise ValueError(f"{flags.size} responses and a process of shape {log_process.shape}")
    if not e_value > 1:
        raise ValueError(f"the level must be above 1, not {e_value}")
    if least < MIN_STANDING_OUT:
        raise ValueError("one response never shows a diversion")
    reached = np.flatnonzero((log_process >= np.log(e_value)) & (np.cumsum(flags) >= least))
    return int(reached[0]) + 1 if reached.size else None


# -- parts ---------------------------------------------------------------------------------------------------------


def _shares(least: float, most: float, rates: Rates) -> tuple[float, float]:
    """The least and the largest ε with ε t + (1 − ε) f in [least, most], over all rates within their limits."""
    # Honest responses that stand out as often as diverted ones explain any count: nothing is then excluded from below.
    room = rates.most_true_positive - rates.false_positive
    lower = (least - rates.false_positive) / room if room > 0 else 0.0
    upper = most / rates.true_positive if rates.true_positive > 0 else 1.0
    return min(max(lower, 0.0), 1.0), min(upper, 1.0)


def _errors(rates: Rates, confidence: float, tails: Tails) -> tuple[float, float]:
    """What the count may err at the lower and at the upper end; 0 for an end that is not wanted or cannot be had."""
    if not 0 <= rates.false_positive <= 1:
        raise ValueError(f"the rate of false positives must lie in [0, 1], not {rates.false_positive}")
    if not 0 <= rates.true_positive <= rates.most_true_positive <= 1:
        raise ValueError(
            "the limits of the true positives must be in order and lie in [0, 1], "
            f"not {rates.true_positive} and {rates.most_true_positive}"
        )
    _check_confidence(confidence)
    error = 1 - confidence - rates.error
    if not rates.error >= 0 or not error > _LEAST_ERROR:
        raise ValueError(f"rates that err with {rates.error} leave nothing for a confidence of {confidence}")
    if tails not in ("both", "lower", "upper"):
        raise ValueError(f"tails are both, lower or upper, not {tails!r}")
    if tails == "upper":
        return 0.0, error
    if tails == "lower" or rates.true_positive == 0:
        return error, 0.0
    return error / 2, error / 2


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must lie between 0 and 1, not {confidence}")


def _flags(stand_out: ArrayLike, *, several: bool = False, empty: bool = False) -> Flags:
    values = np.asarray(stand_out)
    _check_shape(values, "responses", several=several, empty=empty or several)
    if not np.isin(values, (0, 1)).all():
        raise ValueError("a response stands out or does not: only 0 and 1, or booleans")
    return values.astype(np.bool_)


def _ratios(log_ratios_nats: Floats, what: str, *, several: bool = False) -> Floats:
    values = np.asarray(log_ratios_nats, np.float64)
    _check_shape(values, what, several=several, empty=several)
    if np.isnan(values).any():
        raise ValueError(f"a log-likelihood ratio of the {what} is not a number")
    return values


def _check_shape(values: NDArray[np.generic], what: str, *, several: bool, empty: bool) -> None:
    if values.ndim != 1 and not (several and values.ndim > 1):
        raise ValueError(f"the {what} must be one row, not of shape {values.shape}")
    if values.size == 0 and not empty:
        raise ValueError(f"there are no {what}")


def _end(left: Callable[[float], bool], *, inside: float, outside: float) -> float:
    """Where what is left ends, between a point in it and one outside: the outer side of the last step."""
    for _ in range(_STEPS):
        middle = (inside + outside) / 2
        if left(middle):
            inside = middle
        else:
            outside = middle
    return outside
