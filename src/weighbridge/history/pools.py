"""Whether an endpoint answers the probes of one pool otherwise than those of another: who recognises published probes does."""

from dataclasses import dataclass
from datetime import date, timedelta

from weighbridge.history.index import Run

# The columns of a run that are looked at.
LOOKED_AT = ("endpoint", "night", "verdict", "cause", "pool", "sealed")
WITHIN = timedelta(days=7)  # nights further apart say more of a change than of a pool


@dataclass(frozen=True)
class PoolsDisagree:
    """One endpoint that was consistent on one pool and differed on another, on nights that are near to each other."""

    endpoint: str
    consistent_on: str
    consistent_night: str
    differs_on: str
    differs_night: str
    differs_sealed: bool
    cause: str | None

    @property
    def sentence(self) -> str:
        """What it means, and what else it could."""
        sealed = "the sealed pool " if self.differs_sealed else "the pool "
        apart = "" if self.consistent_night == self.differs_night else "; or it changed in between"
        return (
            f"{self.endpoint}: inconsistent between pools. Consistent on the pool {self.consistent_on[:12]}… on {self.consistent_night}, and different "
            f"({self.cause}) on {sealed}{self.differs_on[:12]}… on {self.differs_night}: it recognises the probes of the first one{apart}."
        )


def pools_that_disagree(runs: list[Run]) -> list[PoolsDisagree]:
    """Of every endpoint and pair of pools the two nights that are nearest to each other.

    Parameters
    ----------
    runs : list of dict
        With the columns `LOOKED_AT`, oldest first.
    """
    nearest: dict[tuple[str, str, str], tuple[int, PoolsDisagree]] = {}
    consistent = [run for run in runs if run["verdict"] == "consistent" and run["pool"]]
    for differing in (run for run in runs if run["verdict"].startswith("differs") and run["pool"]):
        for fine in consistent:
            apart = abs(date.fromisoformat(fine["night"]) - date.fromisoformat(differing["night"]))
            if fine["endpoint"] != differing["endpoint"] or fine["pool"] == differing["pool"] or apart > WITHIN:
                continue
            key = (fine["endpoint"], fine["pool"], differing["pool"])
            if key not in nearest or apart.days < nearest[key][0]:
                found = PoolsDisagree(
                    endpoint=fine["endpoint"], consistent_on=fine["pool"], consistent_night=fine["night"], differs_on=differing["pool"],
                    differs_night=differing["night"], differs_sealed=bool(differing["sealed"]), cause=differing["cause"],
                )  # fmt: skip
                nearest[key] = apart.days, found
    return [found for _, found in nearest.values()]
