"""What every check reads, and the shape of a check."""

from dataclasses import dataclass, field
from typing import Protocol

from weighbridge.judge.answers import Residuals
from weighbridge.judge.library import Library
from weighbridge.judge.renderings import PromptReading
from weighbridge.judge.sizes import WeightEvidence
from weighbridge.judge.texts import TextEvidence
from weighbridge.judge.whole import WholeEvidence
from weighbridge.records import Capability, Finding, Observation, Plan


@dataclass(frozen=True)
class Case:
    """One audit at one moment.

    Attributes
    ----------
    plan, capability
        What was decided, and what the endpoint exposes.
    route, capability_answers : list of Observation
        What the host says of itself, and answers to the capability calls.
    answers, prompt_answers, raw_answers, text_answers : list of Observation
        Of the weights' probes in the order of the draw, of the probes that tell what becomes of a prompt, of the
        weights' probes that were sent as tokens, and of those that are asked where there are no logprobs.
    sampling : dict of Observation
        Answers to the requests of `weighbridge.sampling`, by their names.
    reading : PromptReading or None
        What answers and counts say of each rendering; None where there is no reference.
    served : str or None
        The rendering under which the weights are judged; None where what is served is another prompt than any recorded one, or
        it is not known whether it is the prompt or the weights that differ.
    official_differs : bool
        Whether the answers are none of the reference's under the official prompt, for whatever reason.
    mixed : bool
        Whether some answers are the reference's and some are not, among prompts of the same structure.
    settled : bool
        Whether a departure is explained so well that another rendering of the prompt need not be looked for.
    library, residuals, evidence
        Under that rendering, or the official one where it is None; None where there is no reference or there are no logprobs.
    log_e_official : float or None
        Log e-value of all answers against an honest stack behind the official prompt.
    raw_residuals, raw_evidence
        The same of the answers to the reference's own tokens.
    texts : TextEvidence or None
        Of first tokens as text; None where there are logprobs, or nothing was asked.
    raw_texts : TextEvidence or None
        The same of answers to the reference's own tokens.
    whole : WholeEvidence or None
        Of whole answers at temperature 0; None where there are logprobs, or none was asked.
    diverted : bool
        Whether these show that some requests are answered otherwise than the rest.
    """

    plan: Plan
    capability: Capability
    answers: list[Observation]
    library: Library | None
    residuals: Residuals | None
    evidence: WeightEvidence | None
    prompt_answers: list[Observation]
    raw_answers: list[Observation]
    sampling: dict[str, Observation]
    reading: PromptReading | None
    served: str | None
    official_differs: bool
    mixed: bool = False
    settled: bool = False
    log_e_official: float | None = None
    raw_residuals: Residuals | None = None
    raw_evidence: WeightEvidence | None = None
    texts: TextEvidence | None = None
    raw_texts: TextEvidence | None = None
    whole: WholeEvidence | None = None
    diverted: bool = False
    text_answers: list[Observation] = field(default_factory=list)
    route: list[Observation] = field(default_factory=list)
    capability_answers: list[Observation] = field(default_factory=list)

    @property
    def observed(self) -> list[Observation]:
        """Every answer that has come back."""
        return [*self.prompt_answers, *self.answers, *self.raw_answers, *self.text_answers, *self.sampling.values()]


class Check(Protocol):
    """One question; one of the three extension points. A check is a pure function of a case."""

    def __call__(self, case: Case) -> Finding:
        """Conclude, or say why nothing can be concluded."""
        ...
