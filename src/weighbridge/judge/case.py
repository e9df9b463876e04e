"""What every check reads, and the shape of a check."""

from dataclasses import dataclass
from typing import Protocol

from weighbridge.judge.answers import Residuals
from weighbridge.judge.library import Library
from weighbridge.judge.sizes import WeightEvidence
from weighbridge.records import Capability, Finding, Observation, Plan


@dataclass(frozen=True)
class Case:
    """One audit at one moment.

    ``answers`` holds the observations of the probes, in the order of the draw; ``library``, ``residuals`` and
    ``evidence`` are ``None`` where there is no reference or there are no logprobs.
    """

    plan: Plan
    capability: Capability
    answers: list[Observation]
    library: Library | None
    residuals: Residuals | None
    evidence: WeightEvidence | None


class Check(Protocol):
    """One question; one of the three extension points. A check is a pure function of a case."""

    def __call__(self, case: Case) -> Finding:
        """Conclude, or say why nothing can be concluded."""
        ...
