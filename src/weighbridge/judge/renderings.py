"""Under which rendering the prompt was served: every recorded one held against the answers and the token counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from weighbridge.judge.library import MIN_TOP_LOGPROBS, most_unlisted
from weighbridge.records import LogprobLevel, Observation, Probe
from weighbridge.reference.bundle import Bundle, HypothesisRecord, rendered_id
from weighbridge.stats.grid import round_to_bfloat16
from weighbridge.stats.residuals import centred_difference, fisher_cosine, log_scale, mean_interval, reference_at

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MATCHING_SHARE = 0.95
# A rendering is nearer than another one where the difference of log s is positive at this confidence, over all that were tried.
NEARER_CONFIDENCE = 0.999
MIN_ANSWERS = 3
LEAN_ANSWERS = 8
LEAST_LEAN = 0.3
LEAN_CONFIDENCE = 0.99
OFF_BY = 3.0  # times what an honest stack may have on the whole: more than it has on any probe
LOG_FAR = float(np.log(5.0))


@dataclass(frozen=True)
class PromptReading:
    """What n answers and m token counts say of each of H recorded renderings; the official one stands first.

    Attributes
    ----------
    hypotheses : list of HypothesisRecord
    log_scales : float array, shape (H, n)
        x = log s of each answer against the original weights under each rendering; NaN where that was not recorded, or no token
        can be compared.
    prompts : list of list of bytes
        H lists of n prompts as token ids; empty where one was not recorded.
    fisher : float array, shape (H, n)
        Fisher transform of the cosine between each answer's difference from the official rendering and that of each rendering, both
        freed of the official distribution's own shape; NaN where it is not known.
    structures : list of str
        The probe of each answer.
    counted_structures : list of str
        The probe of each token count.
    offsets : int array, shape (H, m)
        Reported prompt tokens less those of the rendering.
    official_tokens : int array, shape (m,)
        What the official rendering has.
    has_system : bool array, shape (m,)
        Whether the probe has a system message of its own.
    turns : int array, shape (m,)
        How many messages it has.
    """

    hypotheses: list[HypothesisRecord]
    log_scales: Floats
    prompts: list[list[bytes]]
    fisher: Floats
    structures: list[str]
    counted_structures: list[str]
    offsets: Ints
    official_tokens: Ints
    has_system: NDArray[np.bool_]
    turns: Ints

    @property
    def counted(self) -> int:
        """How many token counts there are."""
        return int(self.offsets.shape[1])

    @property
    def matches(self) -> Floats:
        """The share of token counts that are those of each rendering."""
        return (self.offsets == 0).mean(axis=1) if self.counted else np.zeros(len(self.hypotheses))

    def by_counts(self, least: int) -> list[int]:
        """The renderings whose token counts are the reported ones."""
        return np.flatnonzero(self.matches >= MATCHING_SHARE).tolist() if self.counted >= least else []

    def nearest(self) -> int | None:
        """The rendering with the smallest residuals; None without any answer that was recorded under all."""
        return next(iter(self.by_distance()), None)

    def by_distance(self) -> list[int]:
        """The renderings, nearest first, by their mean residual over the answers that were recorded under all."""
        everywhere = np.array([all(prompts) for prompts in zip(*self.prompts, strict=True)], np.bool_)
        if not everywhere.any():
            return []
        # A rendering with whose likely tokens nothing has in common is far.
        scales = np.nan_to_num(self.log_scales[:, everywhere], nan=LOG_FAR)
        # A rendering that leaves these prompts as they are is not nearer by a bit of arithmetic.
        return [int(h) for h in np.argsort(np.round(scales.mean(axis=1), 2), kind="stable")]

    def margin(self, one: int, other: int) -> tuple[float, float, int]:
        """By how much rendering `one` is nearer than `other`: mean difference of x, its lower limit, and the answers it rests on.

        The limit is Student's, at `NEARER_CONFIDENCE` over all renderings (Bonferroni); prompts that are the same under both are
        left out.
        """
        near, far = self.log_scales[one], self._far_where_foreign(other)
        gain = far - near
        moved = np.array([a != b for a, b in zip(self.prompts[one], self.prompts[other], strict=True)], np.bool_)
        gain = gain[np.isfinite(gain) & moved]
        n = gain.size
        if n < MIN_ANSWERS:
            return (float(gain.mean()) if n else 0.0), -np.inf, n
        share = 1 - (1 - NEARER_CONFIDENCE) / len(self.hypotheses)
        half = float(special.stdtrit(n - 1, share)) * float(gain.std(ddof=1)) / np.sqrt(n)
        return float(gain.mean()), float(gain.mean() - half), n

    def _far_where_foreign(self, hypothesis: int) -> Floats:
        """The distances from a rendering, where an answer that has no token in common with it is far."""
        recorded = np.array([prompt != b"" for prompt in self.prompts[hypothesis]], np.bool_)
        scales = self.log_scales[hypothesis]
        return np.where(recorded & np.isnan(scales), LOG_FAR, scales)

    def is_foreign(self, hypothesis: int) -> bool:
        """Whether most answers have no token in common with a rendering."""
        return bool(np.isnan(self.log_scales[hypothesis]).mean() > 0.5) if self.structures else False

    def is_honest(self, hypothesis: int, limit_nats: float) -> bool:
        """Whether the answers are, on the whole, as near to a rendering as an honest stack may be."""
        known = self.log_scales[hypothesis][np.isfinite(self.log_scales[hypothesis])]
        return known.size >= MIN_ANSWERS and float(known.mean()) <= float(np.log(limit_nats))

    def is_nearer(self, one: int, other: int) -> bool:
        """Whether rendering `one` is nearer than `other` beyond chance."""
        return self.margin(one, other)[1] > 0

    def leans(self) -> tuple[int, float] | None:
        """The rendering that the answers lean towards, without being its, and the mean cosine; None where they lean nowhere.

        Texts that are put before a conversation move the answers in much the same direction, whatever they say. The whole interval
        of the mean has to be at least `LEAST_LEAN`, at `LEAN_CONFIDENCE` for all renderings together.
        """
        found: list[tuple[bool, float, int]] = []
        for h in range(1, len(self.hypotheses)):
            known = self.fisher[h][np.isfinite(self.fisher[h])]
            if known.size < LEAN_ANSWERS:
                continue
            mean, low, _ = np.tanh(mean_interval(known, 1 - 2 * (1 - LEAN_CONFIDENCE) / len(self.hypotheses)))
            if low >= LEAST_LEAN:
                found.append((self.hypotheses[h].cause == "hidden_prompt", float(mean), h))
        # A text of the host's own is the likelier one where both kinds are possible.
        best = max(found, default=None)
        return None if best is None else (best[2], best[1])

    def off(self, hypothesis: int, limit_nats: float) -> list[str]:
        """The probes whose answers are far from a rendering: further than an honest stack is on any."""
        return [
            probe_id for probe_id, x in zip(self.structures, self.log_scales[hypothesis], strict=True)
            if x > np.log(OFF_BY * limit_nats)
        ]  # fmt: skip

    def explains(self, one: int, other: int, limit_nats: float) -> bool:
        """Whether `one` makes honest answers of all that are not under `other`, and there are at least three of these."""
        x, y = self.log_scales[one], self.log_scales[other]
        off = np.isfinite(y) & (y > np.log(OFF_BY * limit_nats))
        return int(off.sum()) >= MIN_ANSWERS and bool((x[off] <= np.log(limit_nats)).all())


def read_prompt(
    bundle: Bundle,
    answers: list[Observation],
    probes: Mapping[str, Probe],
    level: LogprobLevel,
    top_k: int,
    *,
    bfloat16_logprobs: bool,
) -> PromptReading:
    """Hold answers to chat requests against every rendering that a bundle knows.

    Parameters
    ----------
    bundle : Bundle
    answers : list of Observation
        To chat requests; what the bundle does not know is left out.
    probes : mapping
        What was asked, by the probe's name.
    level : str
        At which the weights are asked.
    top_k : int
        How many logprobs the endpoint returns.
    bfloat16_logprobs : bool
        Whether it rounds them to bfloat16.
    """
    first = {o.probe_id: o for o in reversed(answers) if o.probe_id in bundle.probe_index and not o.raw}
    known = [o for o in answers if first.get(o.probe_id) is o]
    hypotheses = bundle.manifest.hypotheses
    listed = [
        o for o in known
        # What follows a forced text is not what the bundle's first row of it holds.
        if o.top is not None and len(o.top) >= MIN_TOP_LOGPROBS and (level != "L1" or bundle.answer_tokens(o.probe_id) == 0)
    ]  # fmt: skip
    scales = np.full((len(hypotheses), len(listed)), np.nan)
    fisher = np.full(scales.shape, np.nan)
    prompts = [[b""] * len(listed) for _ in hypotheses]
    for i, observation in enumerate(listed):
        for h, hypothesis in enumerate(hypotheses):
            row = bundle.row_index.get(rendered_id(observation.probe_id, hypothesis.id))
            if row is not None:
                prompts[h][i] = np.array(bundle.prompt_of(rendered_id(observation.probe_id, hypothesis.id))).tobytes()
                guessed = "bytes_absent" in observation.quirks
                top = tuple((t.bytes_hex, t.logprob_nats) for t in (observation.top or [])[:top_k])
                scales[h, i] = distance(bundle, row, top, guessed, bfloat16_logprobs)
                if h > 0 and prompts[h][i] != prompts[0][i]:
                    official = bundle.row_index[observation.probe_id]
                    fisher[h, i] = leaning(bundle, official, row, top)
    counted = [o for o in known if o.prompt_tokens is not None]
    at = [bundle.probe_index[o.probe_id] for o in counted]
    # The answer of a generated one is not sent with the question.
    unsent = [bundle.answer_tokens(o.probe_id) if level == "L2" else 0 for o in counted]
    reported = np.array([o.prompt_tokens for o in counted], np.int64) + np.array(unsent, np.int64)
    return PromptReading(
        hypotheses=hypotheses,
        log_scales=scales,
        prompts=prompts,
        fisher=fisher,
        structures=[o.probe_id for o in listed],
        counted_structures=[o.probe_id for o in counted],
        offsets=reported - bundle.prompt_tokens[:, at].astype(np.int64),
        official_tokens=bundle.prompt_tokens[0, at].astype(np.int64),
        has_system=np.array([has_system(probes[o.probe_id]) for o in counted], np.bool_),
        turns=np.array([len(probes[o.probe_id].messages) for o in counted], np.int64),
    )


def has_system(probe: Probe) -> bool:
    """Whether a probe begins with a system message of its own, so that no default one is put before it."""
    return probe.messages[0].role == "system"


def stands_ahead(bundle: Bundle, rendering: str, probe_id: str) -> bool:
    """Whether a rendering differs from the official one only in what stands before the last words of a probe's prompt."""
    prompts = [bundle.prompt_of(name) for name in (probe_id, rendered_id(probe_id, rendering))]
    shorter = min(len(prompt) for prompt in prompts) // 4
    return prompts[0][-shorter:] == prompts[1][-shorter:]


@lru_cache(maxsize=2048)
def distance(
    bundle: Bundle, row: int, top: tuple[tuple[str, float], ...], guessed: bool, bfloat16_logprobs: bool
) -> float:
    """Log s of one list against the reference's row; of a token that the reference does not list, the least that it is off."""
    reference = bundle.logprobs_nats[bundle.stack_index[bundle.manifest.reference_stack], row].astype(np.float64)
    if bfloat16_logprobs:
        reference = round_to_bfloat16(reference)
    columns_of_token = bundle.columns_of_row(row)
    columns = np.array([columns_of_token.get(name, -1) for name, _ in top], np.int64)
    values = np.array([nats for _, nats in top], np.float64)
    most = np.inf if guessed else most_unlisted(bundle, row, reference)
    scale = float(log_scale(centred_difference(values, reference_at(columns, values, reference, most))))
    if np.isfinite(scale):
        return scale
    beyond = values[columns < 0].max(initial=-np.inf) - most
    return float(np.log(beyond)) if np.isfinite(beyond) and beyond > 0 else float("nan")


@lru_cache(maxsize=2048)
def leaning(bundle: Bundle, official: int, row: int, top: tuple[tuple[str, float], ...]) -> float:
    """Fisher transform of the cosine between two differences from the official row: a list's, and that of another row."""
    stack = bundle.stack_index[bundle.manifest.reference_stack]
    at = [bundle.columns_of_row(official), bundle.columns_of_row(row)]
    common = [(nats, at[0][name], at[1][name]) for name, nats in top if name in at[0] and name in at[1]]
    if not common:
        return float("nan")
    values, first, second = (np.array(column) for column in zip(*common, strict=True))
    reference = bundle.logprobs_nats[stack, official][first].astype(np.float64)
    other = bundle.logprobs_nats[stack, row][second].astype(np.float64)
    return float(fisher_cosine(centred_difference(values, reference), other - reference, reference))
