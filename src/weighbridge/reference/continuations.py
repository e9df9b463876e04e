"""The reference's own likeliest answers, as forced texts: what an endpoint at temperature 0 generates if it is honest.

An answer is worth comparing as far as the endpoint's tokens are the reference's. So texts are chosen whose every token leads
the next likeliest one by as much as possible: there honest stacks do not part ways.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from weighbridge.records import Message, Probe
from weighbridge.reference.checkpoint import Checkpoint
from weighbridge.reference.local import LocalWeights
from weighbridge.reference.templates import render_conversations


def continue_greedily(
    engine: LocalWeights, checkpoint: Checkpoint, probes: Sequence[Probe], tokens: int, count: int
) -> list[Probe]:
    """Give the probes whose greedy answers have the widest narrowest lead, with these answers as the assistant's turn.

    Parameters
    ----------
    engine : LocalWeights
        The original weights.
    checkpoint : Checkpoint
        Their folder, for the chat template.
    probes : sequence of Probe
        Candidates, without an assistant's turn.
    tokens : int
        Length of an answer. Shorter answers, and texts that are tokenised otherwise than they were generated, are
        left out.
    count : int
        How many to keep at most, in the order of the candidates.
    """
    texts = render_conversations(
        checkpoint.template, [p.messages for p in probes], special_tokens=checkpoint.special_tokens, name="official", date=None
    )  # fmt: skip
    found: list[tuple[float, int, str]] = []
    for number, ids in enumerate(engine.tokenize(texts)):
        generated, lead = _greedy(engine, ids, tokens)
        text = engine.tokenizer.decode(generated, skip_special_tokens=False)
        if engine.tokenize([text])[0] == generated:
            found.append((lead, number, text))
    best = sorted(sorted(found, reverse=True)[:count], key=lambda item: item[1])
    return [
        probes[number].model_copy(
            update={
                "id": f"greedy-{probes[number].id}",
                "purpose": "the tokens of the reference's own likeliest answer",
                "messages": [*probes[number].messages, Message(role="assistant", content=text)],
            }
        )
        for _, number, text in best
    ]


def _greedy(engine: LocalWeights, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """The likeliest continuation and its narrowest lead over the second likeliest token, in nats."""
    import torch

    out: list[int] = []
    lead = float("inf")
    cache: Any = engine.new_cache()
    given = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(tokens):
            logits = engine.model(given, past_key_values=cache, use_cache=True).logits[0, -1].float()
            values, likeliest = torch.topk(logits, 2)
            lead = min(lead, float(np.diff(-values.numpy())[0]))
            out.append(int(likeliest[0]))
            given = likeliest[:1][None]
    return out, lead
