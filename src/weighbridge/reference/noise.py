"""How far each stack of a bundle is from the reference: stated by a build, and again by a merge."""

import numpy as np
from numpy.typing import NDArray

from weighbridge.reference.bundle import OFFICIAL, PoolRecord, StackRecord
from weighbridge.stats.residuals import centred_difference, log_scale, own_top

Values = NDArray[np.float32]
NOISE_TOP_K = 20  # what an endpoint returns at most, and so what the noise of a stack is stated over


def with_noise(
    stacks: list[StackRecord], logprobs_nats: Values, reference: str, rows: NDArray[np.int64]
) -> list[StackRecord]:
    """State each stack's effective noise ŝ over the given rows, and which departures are smaller than honest noise.

    Parameters
    ----------
    stacks : list of StackRecord
    logprobs_nats : float32 array, shape (stacks, rows, K)
    reference : str
        The reference stack's id.
    rows : int array
        Rows of the one-token probes.
    """
    base = logprobs_nats[[s.id for s in stacks].index(reference)][rows].astype(np.float64)
    noise: list[float | None] = []
    for stack, values in zip(stacks, logprobs_nats, strict=True):
        if stack.id == reference:
            noise.append(0.0)
            continue
        columns, own = own_top(values[rows].astype(np.float64), NOISE_TOP_K)
        scales = log_scale(centred_difference(own, np.take_along_axis(base, columns, axis=1)))
        known = scales[np.isfinite(scales)]
        noise.append(float(np.exp(known.mean())) if known.size else None)
    honest = [n for s, n in zip(stacks, noise, strict=True) if s.departure is None and n is not None]
    return [
        stack.model_copy(update={
            "noise_nats": n,
            "indistinguishable": stack.departure is not None and n is not None and n < max(honest, default=0.0),
            "missing": int(np.isnan(values[rows]).sum()) if n is not None else 0,
        })
        for stack, n, values in zip(stacks, noise, logprobs_nats, strict=True)
    ]  # fmt: skip


def one_token_rows(pools: list[PoolRecord], row_probe: NDArray[np.int32]) -> NDArray[np.int64]:
    """Rows of the one-token probes, over which noise is stated."""
    official = [i for pool in pools if pool.level == "L3" and pool.rendering == OFFICIAL for i in pool.probes]
    return np.flatnonzero(np.isin(row_probe, official))
