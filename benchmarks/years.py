"""Resampled years: nights of audits drawn again and again from what real engines really answered.

An audit of one night draws probes without replacement, goes on until it is decided, and keeps its e-value as it then stands. Honest
nights come from stacks whose whole family is taken out of the library first; what an endpoint is changed to comes from departures that
were really served over HTTP (`served.py`) and from prompts that were (`conditions.py`).
"""

from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

import conditions
from first_weighing import keeping
from power import recorded_answers
from served import DEPARTURES, HONEST, answers_of
from weighbridge.history.changes import Change, changes_of, run_length
from weighbridge.history.index import Run
from weighbridge.judge.answers import line_up
from weighbridge.judge.library import Library, Null, build_library
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import answers_to_consistent, answers_to_differ
from weighbridge.judge.sizes import Features, against_honest, features_of
from weighbridge.plan import FLEET_FALSE_DISCOVERY_RATE
from weighbridge.records import Observation, Policy
from weighbridge.reference.bundle import Bundle
from weighbridge.stats.grid import grid_step

Floats = NDArray[np.float64]
LOG10 = float(np.log(10))
MOST_ANSWERS = 40  # that a night's budget buys
AT_ONCE = 250  # audits computed in one array
FIRST_NIGHT = date(2026, 1, 1)


@dataclass(frozen=True)
class Nights:
    """Many audits of one thing: log10 of the e-value when each stopped, its noise, and whether it differs or is consistent."""

    log10_e: Floats
    noise_nats: Floats
    differs: NDArray[np.bool_]
    consistent: NDArray[np.bool_]
    answers: Floats


def fleet_policy(endpoints: int) -> Policy:
    """The strict policy with the evidence that naming one of so many endpoints takes."""
    policy = load_policy("strict")
    return policy.model_copy(
        update={"differs_e_value": max(policy.differs_e_value, endpoints / FLEET_FALSE_DISCOVERY_RATE)}
    )


def audits(
    library: Library, null: Null, features: Features, policy: Policy, count: int, rng: np.random.Generator
) -> Nights:
    """Draw so many audits from one thing's answers."""
    parts = [_some(library, null, features, policy, min(AT_ONCE, count - i), rng) for i in range(0, count, AT_ONCE)]
    return Nights(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _some(
    library: Library, null: Null, features: Features, policy: Policy, count: int, rng: np.random.Generator
) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.bool_], Floats]:
    n = features.log_scales.size
    order = np.argsort(rng.random((count, n)), axis=1)[:, :MOST_ANSWERS]
    drawn = Features(features.log_scales[order], features.fisher[:, order], features.shape[order])
    total = against_honest(library, null, drawn, policy)
    differs = answers_to_differ(library, null, drawn, policy)
    consistent = answers_to_consistent(library, null, drawn, policy)
    stop = np.minimum(np.minimum(differs, consistent), order.shape[1]).astype(np.int64)
    at = stop[:, None] - 1
    mean = np.take_along_axis(np.cumsum(drawn.log_scales, axis=1), at, axis=1)[:, 0] / stop
    log10_e = np.take_along_axis(total, at, axis=1)[:, 0] / LOG10
    return log10_e, np.exp(mean), differs <= stop, (consistent <= stop) & (differs > stop), stop.astype(np.float64)


def features_against(library: Library, observations: list[Observation]) -> tuple[Null, Features] | None:
    """What answers come to against a library; None where no honest stack of it has their kind of grid."""
    found = line_up(library, observations)
    null = library.null_for(grid_step(found.endpoint_nats))
    return None if null is None else (null, features_of(found))


@lru_cache(maxsize=64)
def honest_nights(bundle: Bundle, stack_id: str, endpoints: int, count: int, seed: int) -> Nights | None:
    """Audits of an honest stack against a library without its family."""
    stacks = bundle.manifest.stacks
    stack = stacks[bundle.stack_index[stack_id]]
    kept = {
        s.id for s in stacks
        if s.departure is not None or s.family != stack.family or s.id == bundle.manifest.reference_stack
    }  # fmt: skip
    policy = fleet_policy(endpoints)
    library = build_library(keeping(bundle, kept), policy, 20)
    found = features_against(library, recorded_answers(bundle, stack))
    return None if found is None else audits(library, *found, policy, count, np.random.default_rng(seed))


def served_nights(bundle: Bundle, name: str, endpoints: int, count: int, seed: int) -> Nights:
    """Audits of something that was really served, by its name in `served.py`, or a condition's name."""
    policy = fleet_policy(endpoints)
    library = build_library(bundle, policy, 20)
    served = next((s for s in (*HONEST, *DEPARTURES) if s.name == name), None)
    if served is not None:
        _, observations = answers_of(served, bundle)
    else:
        condition = next(c for c in conditions.conditions() if c.name == name)
        plan, _, by_request = conditions.answers_of(condition, bundle)
        observations = [by_request[r.request_id] for r in plan.probe_requests if r.request_id in by_request]
    found = features_against(library, observations)
    assert found is not None, f"{name} lies on a grid that no honest stack has"
    return audits(library, *found, policy, count, np.random.default_rng(seed))


def year(
    endpoint: str, before: Nights, after: Nights | None, change: int, nights: int, rng: np.random.Generator
) -> list[Run]:
    """One endpoint's year as the history has it: so many nights of the one, and from night `change` on of the other."""
    runs = []
    for night in range(nights):
        source = before if after is None or night < change else after
        i = int(rng.integers(source.log10_e.size))
        word = "differs" if source.differs[i] else "consistent" if source.consistent[i] else "inconclusive"
        day = (FIRST_NIGHT + timedelta(days=night)).isoformat()
        runs.append({
            "endpoint": endpoint, "night": day, "created_at": f"{day}T22:00:00Z", "verdict": word, "cause": "precision" if word == "differs" else None,
            "log10_e_value": float(source.log10_e[i]), "noise_nats": float(source.noise_nats[i]), "sealed": 0, "pool": "public",
            "probes": "[]", "commitment": f"{endpoint} {day}",
        })  # fmt: skip
    return runs


@dataclass(frozen=True)
class Dated:
    """What was found of a swap: nights from it to the alarm, and from it to the date that was given; None where nothing was."""

    delay_nights: int | None
    off_nights: int | None
    false_alarms: int


def swap(before: Nights, after: Nights, endpoints: int, nights: int, rng: np.random.Generator) -> Dated:
    """One resampled year with one swap in it, on a random night that leaves a month on either side."""
    change = int(rng.integers(30, nights - 30))
    found: list[Change] = changes_of(year("swapped", before, after, change, nights, rng), run_length(endpoints))
    at = [
        ((date.fromisoformat(c.found) - FIRST_NIGHT).days, (date.fromisoformat(c.began) - FIRST_NIGHT).days)
        for c in found
    ]
    early = sum(alarm < change for alarm, _ in at)
    true = next(((alarm, began) for alarm, began in at if alarm >= change), None)
    if true is None:
        return Dated(None, None, early)
    return Dated(true[0] - change, true[1] - change, early)
