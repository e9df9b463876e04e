"""Which of many endpoints are named, with a bound on the share of those that are named wrongly."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def e_bh(log_e_values: Floats, false_discovery_rate: float) -> NDArray[np.bool_]:
    """The e-Benjamini-Hochberg procedure, valid whatever the e-values share (Wang and Ramdas 2022, JRSS B 84, section 4).

    Of K hypotheses those with the k largest e-values are rejected, for the largest k whose k-th e-value is at least K / (k α).

    Parameters
    ----------
    log_e_values : float array, shape (K,)
        At a fixed time, or at a stopping time of its own each; never a running maximum.
    false_discovery_rate : float
        α, in (0, 1).

    Returns
    -------
    bool array, shape (K,)
    """
    total = log_e_values.size
    order = np.argsort(-log_e_values, kind="stable")
    needed = np.log(total / (np.arange(1, total + 1) * false_discovery_rate))
    reached = np.flatnonzero(log_e_values[order] >= needed)
    named = np.zeros(total, np.bool_)
    if reached.size:
        named[order[: int(reached[-1]) + 1]] = True
    return named
