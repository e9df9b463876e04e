"""What runs the original weights: one of the three extension points.

An engine is asked with token ids, which were rendered once; no probe is tokenised twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prompt:
    """One probe as token ids.

    Attributes
    ----------
    probe_id : str
    token_ids : tuple of int
    positions : tuple of int
        Indices of the tokens after which the distribution of the next one is wanted: the last one for a one-token
        probe, several for a forced text.
    """

    probe_id: str
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Distributions of the next token, one row for each position of a prompt.

    Attributes
    ----------
    token_ids : int32 array, shape (positions, k)
    logprobs_nats : float32 array, shape (positions, k)
        NaN where the engine did not say.
    """

    token_ids: NDArray[np.int32]
    logprobs_nats: NDArray[np.float32]


Wanted = NDArray[np.int32] | None


class Engine(Protocol):
    """Something that runs the original weights, or a departure from them."""

    def facts(self) -> dict[str, Any]:
        """What its numbers depend on and a manifest records: engine, version, hardware, arguments."""
        ...

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, with special tokens read as such and none added."""
        ...

    def score(self, prompts: Sequence[Prompt], wanted: Sequence[Wanted], top_k: int) -> list[Rows]:
        """Logprobs at every position of every prompt.

        Parameters
        ----------
        prompts : sequence of Prompt
        wanted : sequence of int32 array, shape (positions, k), or None
            The token ids whose logprobs are wanted, for each prompt; None for the ``top_k`` most likely ones, most
            likely first.
        top_k : int

        Raises
        ------
        BundleError
            If the engine fails; nothing of what it was asked is lost but this call.
        """
        ...
