"""Grids: whether logprobs were computed or written in 16 bits, which adds a rounding noise of its own.

Logits in bfloat16 between 16 and 32 are multiples of 1/8, so that the gaps of a list of logprobs are multiples of 1/8 as well. A
list that was computed without such a grid has other noise, and the two must never be compared with the same null.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEPS_NATS = tuple(2.0**-power for power in range(-3, 10))  # coarsest first
DECIMAL_STEPS_NATS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
TOLERANCE = 0.02  # of a step; gaps without a grid come this near by chance in 4 % of cases
SHARE_ON_GRID = 0.95
MIN_GAPS = 10
NEGLIGIBLE_STEP_NATS = (
    2.0**-6
)  # rounding to it (float16 logits) moves a logprob by 0.0045 nats, far less than bfloat16 arithmetic does


def grid_step(logprobs_nats: Floats) -> float:
    """The coarsest grid that the gaps within the lists lie on; 0 where there is none, or too few gaps to tell.

    Parameters
    ----------
    logprobs_nats : float array, shape (lists, k)
        May hold NaN.

    Returns
    -------
    float
        In nats. Powers of two are logits kept in 16 bits; 0.1 and 0.01 are logprobs written with so few digits.
    """
    if logprobs_nats.size == 0:
        return 0.0
    gaps = (logprobs_nats - logprobs_nats[:, :1])[:, 1:].ravel()
    gaps = gaps[np.isfinite(gaps)]
    if gaps.size < MIN_GAPS:
        return 0.0
    for step in sorted((*STEPS_NATS, *DECIMAL_STEPS_NATS), reverse=True):
        off = np.abs(gaps / step - np.round(gaps / step))
        if float((off < TOLERANCE).mean()) >= SHARE_ON_GRID:
            return step
    return 0.0


def kind_of_grid(step_nats: float) -> float:
    """The grid, or 0 where it is too fine to matter."""
    return step_nats if step_nats > NEGLIGIBLE_STEP_NATS else 0.0


def fits_grid(endpoint_nats: float, recorded_nats: float) -> bool:
    """Whether lists on one grid may be compared with stacks on another: both have none to speak of, or the endpoint's is no coarser.

    A finer one, down to half, occurs where the answers so far have smaller logits. A coarser one is a rounding that no stack had.
    """
    endpoint, recorded = kind_of_grid(endpoint_nats), kind_of_grid(recorded_nats)
    return bool(recorded / 2 <= endpoint <= recorded)


def rounding_noise(step_nats: float) -> float:
    """Standard deviation of rounding to a grid: step / √12, the error being uniform over one step."""
    return float(step_nats / np.sqrt(12))


def round_bfloat16(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Round to the nearest bfloat16 (ties to even), returned as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def round_to_bfloat16(values: Floats) -> Floats:
    """The same, as 64-bit floats: logprobs are computed with in these."""
    return round_bfloat16(values).astype(np.float64)


def written_in_bfloat16(logprobs_nats: Floats) -> bool:
    """Whether the logprobs themselves, not only the logits, were rounded to bfloat16."""
    known = logprobs_nats[np.isfinite(logprobs_nats) & (logprobs_nats < 0)]
    return bool(
        known.size >= MIN_GAPS and np.mean(np.abs(round_to_bfloat16(known) / known - 1) < 1e-6) >= SHARE_ON_GRID
    )
