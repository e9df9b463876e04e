"""How tokens are drawn from a local model, one after the other; for several answers side by side.

Logprobs are those of the model's own distribution, before bias, penalties and temperature.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from weighbridge.records import Finite, Record
from weighbridge.reference.local import LocalWeights

if TYPE_CHECKING:
    import torch


class Sampling(Record):
    """What a request says of sampling; a temperature of 0 takes the most likely token."""

    temperature: Finite = Field(default=1.0, ge=0)
    top_p: Finite = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, description="0 or -1 for all")
    min_p: Finite = Field(default=0.0, ge=0, le=1)
    presence_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Finite] = Field(default_factory=dict)
    seed: int | None = None
    n: int = Field(default=1, ge=1, le=1024)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=16)


@dataclass(frozen=True)
class Position:
    """What the model said at one place: the token that stands there, and the most likely ones."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass
class Answer:
    """One drawn continuation."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


class Sampler:
    """A model and its vocabulary.

    Parameters
    ----------
    weights : LocalWeights
    vocabulary : list of bytes
        The bytes of each token.
    """

    def __init__(self, weights: LocalWeights, vocabulary: list[bytes]) -> None:
        self._weights, self._vocabulary = weights, vocabulary
        ends = weights.model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    def text(self, token_ids: list[int]) -> str:
        """What tokens spell; special tokens spell nothing."""
        return b"".join(self._vocabulary[i] for i in token_ids).decode("utf-8", "replace")

    def answer(
        self, prompt: list[int], sampling: Sampling, max_tokens: int, top: int, prompt_top: int | None
    ) -> tuple[list[Position], list[Answer]]:
        """Draw ``sampling.n`` answers.

        Parameters
        ----------
        prompt : list of int
            At least one token.
        sampling : Sampling
        max_tokens : int
            The longest an answer may be; 0 for none.
        top : int
            How many of the most likely tokens are listed at each place of an answer.
        prompt_top : int or None
            The same of the prompt's tokens from the second on; None if they are not wanted at all.

        Returns
        -------
        list of Position
            The prompt's, from its second token on.
        list of Answer
        """
        import torch

        random = np.random.default_rng(None if sampling.seed is None else sampling.seed % 2**64)
        answers = [Answer() for _ in range(sampling.n)]
        with torch.inference_mode():
            cache = self._weights.new_cache()
            logits = self._forward(torch.tensor([prompt]), cache, keep=1 if prompt_top is None else 0)[0]
            inside = [] if prompt_top is None else _positions(logits[:-1], prompt[1:], prompt_top)
            logits, active = logits[-1:], answers
            for step in range(max_tokens):
                drawn = self._draw(logits, active, sampling, random)
                positions = _positions(logits, drawn, top)
                for one, token, position in zip(active, drawn, positions, strict=True):
                    one.token_ids.append(token)
                    one.positions.append(position)
                    self._settle(one, sampling.stop, last=step == max_tokens - 1)
                going = [i for i, one in enumerate(active) if one.finish_reason is None]
                if not going:
                    break
                if step == 0 and len(answers) > 1:
                    cache.batch_repeat_interleave(len(answers))
                if len(going) < len(active):
                    cache.batch_select_indices(torch.tensor(going, device=self._weights.device))
                active = [active[i] for i in going]
                logits = self._forward(torch.tensor([[one.token_ids[-1]] for one in active]), cache, keep=1)[:, 0]
        for one in answers:
            one.finish_reason = one.finish_reason or "length"
        return inside, answers

    def _forward(self, ids: "torch.Tensor", cache: Any, keep: int) -> "torch.Tensor":
        """Logits after the last ``keep`` tokens (0 for all), shape (rows, tokens, vocabulary)."""
        out = self._weights.model(
            ids.to(self._weights.device), past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        logits: torch.Tensor = out.logits.float().cpu()
        return logits

    def _draw(
        self, logits: "torch.Tensor", active: list[Answer], sampling: Sampling, random: np.random.Generator
    ) -> list[int]:
        """One token for each answer; a single row of logits is that of all answers, which are empty then."""
        chances = random.random(len(active))
        if len(logits) == 1:
            return [int(token) for token in pick(logits[0].double().numpy(), active[0].token_ids, sampling, chances)]
        return [
            int(pick(row, one.token_ids, sampling, chances[i : i + 1])[0])
            for i, (row, one) in enumerate(zip(logits.double().numpy(), active, strict=True))
        ]

    def _settle(self, one: Answer, stops: list[str], last: bool) -> None:
        """Say whether an answer has ended, and what its text is then."""
        ended = one.token_ids[-1] in self._ends
        if not (ended or last or stops):
            return
        one.text = self.text(one.token_ids)
        found = [at for at in map(one.text.find, stops) if at >= 0]
        if found:
            one.text = one.text[: min(found)]
        if ended or found:
            one.finish_reason = "stop"
        elif last:
            one.finish_reason = "length"


def _positions(logits: "torch.Tensor", token_ids: list[int], top: int) -> list[Position]:
    """Describe the tokens that stand after each row of logits; a single row is that of all tokens."""
    import torch

    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, top, dim=-1)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    rows = [0] * len(token_ids) if len(logits) == 1 else range(len(token_ids))
    out = []
    for row, token in zip(rows, token_ids, strict=True):
        own = logprobs[row, token]
        out.append(Position(token, own.item(), int((logprobs[row] > own).sum()) + 1, tops[row]))
    return out


def pick(
    logits: NDArray[np.float64], before: list[int], sampling: Sampling, chances: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Draw tokens from one row of logits, one for each number between 0 and 1."""
    logits = logits.copy()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if before:
        tokens, counts = np.unique(before, return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.temperature == 0:
        return np.full(len(chances), logits.argmax())
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    weights[weights < sampling.min_p * weights.max()] = 0
    if sampling.top_k > 0 or sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        if sampling.top_k > 0:
            weights[order[sampling.top_k :]] = 0
        share = np.cumsum(weights[order]) / weights.sum()
        if sampling.top_p < 1:
            weights[order[1:][share[:-1] >= sampling.top_p]] = 0
    edges = np.cumsum(weights)
    drawn: NDArray[np.int64] = np.searchsorted(edges, chances * edges[-1], side="right")
    return drawn
