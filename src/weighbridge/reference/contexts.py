"""One-token probes as contexts for text: what can come first, and how sure the reference is of it.

An endpoint without logprobs returns a text, which servers strip of white space, so tokens are told apart by their stripped text alone.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from weighbridge.probes import Level
from weighbridge.reference.bundle import OFFICIAL, Bundle, HypothesisRecord, StackRecord
from weighbridge.stats.draws import cell_logprobs

Floats = NDArray[np.float64]
LEVELS: tuple[Level, ...] = ("L3", "L4", "L5")
# Leads of the likeliest text at temperature 0 that are asked about, in units of √2 times the noise that an unseen honest stack may have:
# nearer, an honest stack may answer otherwise; further, hardly any departure does (docs/STATISTICS.md, Text).
BAND = (2.0, 8.0)
STACK_MARGIN = 1.25
UNSEEN_NATS = -14.0  # of a token that a rendering's list does not hold


@dataclass(frozen=True, eq=False)
class Contexts:
    """N probes that were recorded for one token, S distributions of that token.

    Attributes
    ----------
    probe_ids : list of str
    names : list of dict
        For each probe: a stripped text, and the columns of the tokens that read so.
    stacks : list of StackRecord
        Those of the first distributions, the reference first.
    renderings : list of HypothesisRecord
        Those of the others: the reference under another rendering of the prompt.
    tokens_nats : float array, shape (S, N, tokens + 1)
        Logprobs at temperature 1; the last column holds all tokens that the reference does not list. Where a distribution was not
        recorded, the reference's stands.
    recorded : bool array, shape (S, N)
    lead_nats : float array, shape (N,)
        Of the reference's likeliest text over any other one.
    prompt_tokens : int array, shape (N,)
    for_text : frozenset of str
        The probes of the pool that was chosen for text.
    repeats : bool array, shape (N,)
        Whether the reference's likeliest token stands in the prompt.
    """

    probe_ids: list[str]
    names: list[dict[str, tuple[int, ...]]]
    stacks: list[StackRecord]
    renderings: list[HypothesisRecord]
    tokens_nats: Floats
    recorded: NDArray[np.bool_]
    lead_nats: Floats
    prompt_tokens: NDArray[np.int64]
    for_text: frozenset[str]
    repeats: NDArray[np.bool_]

    @cached_property
    def index(self) -> dict[str, int]:
        """Place of each probe."""
        return {probe_id: i for i, probe_id in enumerate(self.probe_ids)}

    @cached_property
    def likeliest(self) -> NDArray[np.int64]:
        """Column of the likeliest listed token under every distribution; shape (S, N)."""
        return np.asarray(self.tokens_nats[:, :, :-1].argmax(axis=2), np.int64)


def contexts_of(bundle: Bundle) -> Contexts | None:
    """Read the contexts of a bundle; None where it has no one-token pool."""
    return _contexts(bundle)


@lru_cache(maxsize=4)
def _contexts(bundle: Bundle) -> Contexts | None:
    pools = [pool for level in LEVELS if (pool := bundle.pool_at(level)) is not None]
    probe_ids = [probe_id for pool in pools for probe_id in bundle.usable_probes(pool)]
    for_text = bundle.pool_at("L4")
    if not probe_ids:
        return None
    rows = np.array([bundle.row_index[probe_id] for probe_id in probe_ids], np.int64)
    reference = bundle.stack_index[bundle.manifest.reference_stack]
    stacks = [s for s in bundle.manifest.stacks if s.is_judged and any(pool.key in s.pools for pool in pools)]
    stacks.sort(key=lambda s: s.id != bundle.manifest.reference_stack)
    values = bundle.logprobs_nats[[bundle.stack_index[s.id] for s in stacks]][:, rows].astype(np.float64)
    recorded: NDArray[np.bool_] = np.asarray(np.isfinite(values[:, :, :2]).all(axis=2))
    base = bundle.logprobs_nats[reference][rows].astype(np.float64)
    values = np.where(recorded[:, :, None], values, base[None])
    renderings = [h for h in bundle.manifest.hypotheses if h.id != OFFICIAL]
    rendered = [_rendered(bundle, h, probe_ids, rows, base) for h in renderings]
    kept = [i for i, (_, known) in enumerate(rendered) if known.any()]
    values = np.concatenate([values, *(rendered[i][0][None] for i in kept)])
    recorded = np.concatenate([recorded, *(rendered[i][1][None] for i in kept)])
    names = [_names(bundle, row) for row in rows.tolist()]
    return Contexts(
        probe_ids=probe_ids,
        names=names,
        stacks=stacks,
        renderings=[renderings[i] for i in kept],
        tokens_nats=np.stack([cell_logprobs(one) for one in values]),
        recorded=recorded,
        lead_nats=np.array([_lead(own, at) for own, at in zip(base, names, strict=True)]),
        repeats=np.array(
            [
                bundle.token_ids[row, int(np.nanargmax(own))] in bundle.prompt_of(probe_id)
                for probe_id, row, own in zip(probe_ids, rows.tolist(), base, strict=True)
            ]
        ),
        for_text=frozenset(bundle.usable_probes(for_text) if for_text is not None else []),
        prompt_tokens=bundle.prompt_tokens[0, [bundle.probe_index[probe_id] for probe_id in probe_ids]].astype(
            np.int64
        ),
    )


def _names(bundle: Bundle, row: int) -> dict[str, tuple[int, ...]]:
    """The columns of every stripped text; bytes that are no text read as servers show them."""
    names: dict[str, tuple[int, ...]] = {}
    for column, token_id in enumerate(bundle.token_ids[row].tolist()):
        text = bundle.vocabulary[token_id].decode("utf-8", "replace").strip()
        names[text] = (*names.get(text, ()), column)
    return names


def _lead(own_nats: Floats, names: dict[str, tuple[int, ...]]) -> float:
    """By how much the likeliest token leads the likeliest one of another text."""
    best = int(np.nanargmax(own_nats))
    same = next(columns for columns in names.values() if best in columns)
    others = np.delete(own_nats, list(same))
    return float(own_nats[best] - np.nanmax(others))


def _rendered(
    bundle: Bundle, hypothesis: HypothesisRecord, probe_ids: list[str], rows: NDArray[np.int64], base: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """The reference's distributions under another rendering, over the tokens that it lists under the official one."""
    values, known = base.copy(), np.zeros(len(probe_ids), np.bool_)
    reference = bundle.stack_index[bundle.manifest.reference_stack]
    for i, (probe_id, row) in enumerate(zip(probe_ids, rows.tolist(), strict=True)):
        other = bundle.row_index.get(f"{probe_id}@{hypothesis.id}")
        if other is None or not np.isfinite(bundle.logprobs_nats[reference, other, 0]):
            continue
        listed = dict(
            zip(bundle.token_ids[other].tolist(), bundle.logprobs_nats[reference, other].tolist(), strict=True)
        )
        values[i] = [listed.get(token, UNSEEN_NATS) for token in bundle.token_ids[row].tolist()]
        known[i] = True
    return values, known


def lead_noise_nats(contexts: Contexts) -> float:
    """Noise of one logprob that an honest stack beyond the recorded ones may have, from the leads of the reference's likeliest token."""
    own = contexts.tokens_nats
    ranked = np.argsort(-own[0, :, :-1], axis=1)
    first, second = ranked[:, 0], ranked[:, 1]
    at = np.arange(len(first))
    change = (own[:, at, first] - own[:, at, second]) - (own[0, at, first] - own[0, at, second])
    honest = [i for i, s in enumerate(contexts.stacks) if s.departure is None and i > 0]
    noise = [float(np.sqrt((change[i][contexts.recorded[i]] ** 2).mean() / 2)) for i in honest]
    return STACK_MARGIN * max(noise, default=0.0)


def cold_probes(contexts: Contexts) -> list[str]:
    """The probes that are worth asking at temperature 0: those at which the reference's lead lies in the band.

    They are those of the pool that was chosen for text, where the bundle has one: others tell less, and take as many requests.

    Left out is what begins with a part of a character, or with white space: hosts hold such text back. And so is what repeats the prompt: some hosts punish
    that, as a model's own generation settings may say.
    """
    unit = np.sqrt(2) * lead_noise_nats(contexts)
    inside = (contexts.lead_nats >= BAND[0] * unit) & (contexts.lead_nats <= BAND[1] * unit)
    shown = [_is_shown(names, int(best)) for names, best in zip(contexts.names, contexts.likeliest[0], strict=True)]
    inside &= np.array(shown) & ~contexts.repeats
    chosen = inside & np.array([probe_id in contexts.for_text for probe_id in contexts.probe_ids])
    return [
        probe_id
        for probe_id, wanted in zip(contexts.probe_ids, chosen if chosen.any() else inside, strict=True)
        if wanted
    ]


def _is_shown(names: dict[str, tuple[int, ...]], column: int) -> bool:
    text = next(name for name, columns in names.items() if column in columns)
    return text != "" and "\ufffd" not in text
