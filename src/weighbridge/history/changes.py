"""The night on which an endpoint changed: against the reference, and against its own past."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from weighbridge.history.index import Run
from weighbridge.stats.changes import change_began, conformal_p_values, shiryaev_roberts, small_p_log_e, summed

Floats = NDArray[np.float64]
BASELINE_NIGHTS = 10  # of an endpoint's own past, which say what is usual
NIGHTS_A_YEAR = 365
LOG10 = float(np.log(10))

# The columns of a run in which changes are looked for.
LOOKED_AT = ("endpoint", "night", "cause", "log10_e_value", "noise_nats", "sealed", "pool", "probes")

Against = Literal["reference", "own past"]


@dataclass(frozen=True)
class Change:
    """One change: the night on which it was found, and the likeliest one on which it came.

    ``run_length_nights`` is how many nights without a change are expected, at least, before one is found all the same.
    """

    endpoint: str
    against: Against
    found: str
    began: str
    log10_detector: float
    run_length_nights: float
    cause: str | None


def run_length(endpoints: int) -> float:
    """The average run length at which a fleet has at most one false alarm a year, of both detectors together."""
    return 2.0 * NIGHTS_A_YEAR * max(1, endpoints)


def changes_of(runs: list[Run], run_length_nights: float) -> list[Change]:
    """Every change of one endpoint, oldest first.

    Parameters
    ----------
    runs : list of dict
        Its runs, oldest first, as `weighbridge.history.index.runs` gives them.
    run_length_nights : float
        A: no alarm is raised below it.
    """
    change = against_reference(runs, run_length_nights)
    if change is None:
        return _own_changes(runs, run_length_nights)
    begin = _begin(runs, change)
    before, rest = (_own_changes(part, run_length_nights) for part in (runs[:begin], runs[begin:]))
    # What differed on the first night of all has not changed.
    return [*before, *([change] if begin else []), *rest]


def _own_changes(runs: list[Run], run_length_nights: float) -> list[Change]:
    """Every change against the own past; what follows one is held against itself, from the change on."""
    found: list[Change] = []
    while (change := against_own_past(runs, run_length_nights)) is not None:
        found.append(change)
        runs = runs[max(_begin(runs, change), 1) :]
    return found


def _begin(runs: list[Run], change: Change) -> int:
    return next(i for i, run in enumerate(runs) if run["night"] == change.began)


def against_reference(runs: list[Run], run_length_nights: float) -> Change | None:
    """The first night on which the evidence against an honest stack, over all nights so far, is too much."""
    usable = [run for run in runs if run["log10_e_value"] is not None]
    log_e = np.array([run["log10_e_value"] for run in usable], np.float64) * LOG10
    detector = shiryaev_roberts if _foreseen_by_nobody(usable) else summed
    return _first(usable, log_e, detector, "reference", run_length_nights)


def against_own_past(runs: list[Run], run_length_nights: float) -> Change | None:
    """The first night that is too unlike the nights before it, by the distance from the reference."""
    usable = [run for run in runs if run["noise_nats"]]
    log_noise = np.log(np.array([run["noise_nats"] for run in usable], np.float64))
    usual = np.median(log_noise[:BASELINE_NIGHTS]) if log_noise.size else 0.0
    return _first(usable, own_past_log_e(np.abs(log_noise - usual)), shiryaev_roberts, "own past", run_length_nights)


def own_past_log_e(scores: Floats, seed: int = 1) -> Floats:
    """Log e-value of each night against "its score is one like those before", once `BASELINE_NIGHTS` are over.

    Parameters
    ----------
    scores : float array, shape (n,)
        How unlike the first `BASELINE_NIGHTS` each night is; those themselves are not judged.
    seed : int
        Of the draw between equal scores.
    """
    out = np.zeros(scores.size)
    judged = scores[BASELINE_NIGHTS:]
    ties = np.random.default_rng(seed).random(judged.size)
    out[BASELINE_NIGHTS:] = small_p_log_e(conformal_p_values(judged, ties))
    return out


def first_alarm(
    log_e: Floats, detector: Callable[[Floats], Floats], run_length_nights: float
) -> tuple[int, int, float] | None:
    """The index of the first alarm, that of the likeliest first night of the change, and log10 of the detector; or None."""
    process = detector(log_e)
    reached = np.flatnonzero(process >= np.log(run_length_nights))
    if not reached.size:
        return None
    alarm = int(reached[0])
    # Nights that say nothing, as those of a baseline, are not the first ones of a change.
    speaks = np.flatnonzero(log_e[: alarm + 1])
    began = max(change_began(log_e, alarm), int(speaks[0]) if speaks.size else 0)
    return alarm, began, float(process[alarm]) / LOG10


def _first(
    runs: list[Run], log_e: Floats, detector: Callable[[Floats], Floats], against: Against, run_length_nights: float
) -> Change | None:
    alarm = first_alarm(log_e, detector, run_length_nights) if log_e.size else None
    if alarm is None:
        return None
    found, began, log10_detector = alarm
    return Change(
        endpoint=runs[found]["endpoint"], against=against, found=runs[found]["night"], began=runs[began]["night"],
        log10_detector=log10_detector, run_length_nights=run_length_nights, cause=runs[found]["cause"],
    )  # fmt: skip


def _foreseen_by_nobody(runs: list[Run]) -> bool:
    """Whether every night asked probes of a sealed pool that no earlier night had shown to the endpoint."""
    shown: set[str] = set()
    for run in runs:
        asked = {f"{run['pool']} {probe}" for probe in json.loads(run["probes"])}
        if not run["sealed"] or asked & shown:
            return False
        shown |= asked
    return True
