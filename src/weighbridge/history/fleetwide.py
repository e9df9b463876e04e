"""What is said of every endpoint of a fleet on one night: with a bound on false discoveries, and after a second night."""

from dataclasses import dataclass

import numpy as np

from weighbridge.history.index import Run
from weighbridge.records import Cause, VerdictWord
from weighbridge.stats.discovery import e_bh

LOG10 = float(np.log(10))
# The names of a router and of a provider are read, not drawn: no chance is in them that could be bounded.
WITHOUT_CHANCE = frozenset({"route"})


@dataclass(frozen=True)
class FleetVerdict:
    """What is said of one endpoint among all that were judged the same night.

    ``before`` is what was last said of it, None on its first night; ``judged_together`` is K.
    """

    endpoint: str
    night: str
    verdict: VerdictWord
    cause: Cause | None
    before: VerdictWord | None
    judged_together: int
    log10_e_value: float | None
    sentence: str


def judge_night(tonight: list[Run], earlier: list[Run], false_discovery_rate: float) -> list[FleetVerdict]:
    """Judge a night's runs together.

    Parameters
    ----------
    tonight : list of dict
        One run of each endpoint, all of one night, as `weighbridge.history.index.runs` gives them.
    earlier : list of dict
        Runs of nights before it, oldest first.
    false_discovery_rate : float
        At most so large is, on average, the share of wrong names among those that are named tonight.
    """
    named = _named(tonight, false_discovery_rate)
    last = {run["endpoint"]: run for run in earlier}
    nights = {run["night"] for run in last.values()}
    named_before = {
        night: _named([run for run in earlier if run["night"] == night], false_discovery_rate) for night in nights
    }
    together = len(tonight)
    out = []
    for run in tonight:
        name = run["endpoint"]
        previous = last.get(name)
        was_named = previous is not None and name in named_before[previous["night"]]
        word = _word(run["verdict"], name in named)
        if word == "differs" and was_named and previous is not None and _is_another_draw(run, previous):
            word = "differs_replicated"
        before = None if previous is None else _word(previous["verdict"], was_named)
        cause: Cause | None = run["cause"] if word.startswith("differs") else None
        out.append(
            FleetVerdict(
                endpoint=name, night=run["night"], verdict=word, cause=cause, before=before, judged_together=together,
                log10_e_value=run["log10_e_value"], sentence=_sentence(word, cause, together, false_discovery_rate, run["verdict"]),
            )
        )  # fmt: skip
    return out


def _named(runs: list[Run], false_discovery_rate: float) -> set[str]:
    """The endpoints that differ, and may be said to among all of their night."""
    log_e = np.array([(run["log10_e_value"] or 0.0) * LOG10 for run in runs], np.float64)
    discovered = e_bh(log_e, false_discovery_rate)
    return {
        run["endpoint"] for run, found in zip(runs, discovered.tolist(), strict=True)
        if run["verdict"] == "differs" and (found or run["cause"] in WITHOUT_CHANCE)
    }  # fmt: skip


def _is_another_draw(run: Run, previous: Run) -> bool:
    """Whether two runs say the same for one cause, and their probes were drawn apart."""
    return bool(run["cause"] == previous["cause"] and run["commitment"] != previous["commitment"])


def _word(verdict: str, named: bool) -> VerdictWord:
    if verdict == "consistent":
        return "consistent"
    return "differs" if named else "inconclusive"


def _sentence(word: VerdictWord, cause: Cause | None, together: int, rate: float, alone: str) -> str:
    basis = f"{together} endpoints judged together, at a false discovery rate of {rate:g}"
    if word == "differs_replicated":
        return f"Differs from the reference ({cause}), as on the night before with other draws; {basis}."
    if word == "differs":
        return f"Differs from the reference ({cause}); {basis}. A single night is not a replication."
    if word == "inconclusive" and alone == "differs":
        return f"Not verified: by itself it would differ, but not among {basis}."
    return "Consistent with the reference." if word == "consistent" else "Not verified."
