"""Search for prompts whose whole answer tells 4-bit weights as text.

    python benchmarks/search_answers.py --out FOLDER [--quick]

The reference answers many short prompts greedily. Kept are those at which it would leave its own path, at a place where it is sure of itself, under
noise of the size of 4-bit weights; of these, those at which the most of `SEEN` do so. What an honest stack may do is taken from `HONEST`, on the same
answers. Writes FOLDER/pool, with its selection.json. Needs the extra hf; some 25 minutes on two cores. What is on the disk is not computed again.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from weighbridge.canonical import write_atomically
from weighbridge.judge.whole import HONEST_CHANCE, honest_chances
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.probes import write_pool
from weighbridge.probes.generate import generate_probes
from weighbridge.records import Message, Probe
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.engine import Prompt
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.paths import KEPT, Paths
from weighbridge.reference.templates import render_conversations
from weighbridge.stats.draws import cell_logprobs

Floats = NDArray[np.float64]
KEY = b"weighbridge public pool of long answers, 2026"  # public: whoever has it can make the candidates again
# Of the texts from the first number to the second, so many of the shortest.
CANDIDATES = ((0, 4000, 1500), (4000, 12_000, 3000))
TOKENS = 16
BATCH = 64
MOST_CHARACTERS = 150  # of an answer: an audit reads 200
NOISE_NATS, LEAD_NATS = 1.0, 1.0  # of 4-bit weights in long answers; from which on an answer is expected to stand out
PRESELECTED, CHOSEN = 700, 80
MOST_ALIKE, ALIKE_TOKENS = 2, 4  # so many answers that begin with the same tokens: a small model has few beginnings
MARGIN = 1.25
LIMIT_NATS = 0.067  # noise that an honest stack may have in the embedded library
HONEST = {"hf-bfloat16": LocalSetting(dtype="bfloat16"), "hf-bfloat16-eager": LocalSetting(dtype="bfloat16", attention="eager")}  # fmt: skip
SEEN = {name: LocalSetting(weights=name) for name in ("nf4-g64", "int4-asym-g64", "int4-g32", "mxfp4")}


def answer(engine: LocalWeights, prompts: list[list[int]]) -> list[tuple[list[int], list[list[float]]]]:
    """Greedy answers, and at each token the logprobs of the likeliest ones."""
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.inference_mode():
        found: Any = engine.model.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.0, output_logits=True,
            return_dict_in_generate=True, pad_token_id=engine.model.config.eos_token_id,
        )  # fmt: skip
    tops = torch.stack(
        [torch.topk(torch.log_softmax(step.float(), -1), KEPT).values for step in found.logits], 1
    ).tolist()
    return [(row[width:], top) for row, top in zip(found.sequences.tolist(), tops, strict=True)]


def expected(top_nats: list[list[float]], repeats: list[bool]) -> float:
    """The chance that an answer is left where the reference leads by `LEAD_NATS` and the token is no repeat, under noise of `NOISE_NATS`."""
    leads = np.array([row[0] - row[1] for row in top_nats])
    flips = special.ndtr(-leads / (np.sqrt(2) * NOISE_NATS))
    kept = np.concatenate([[1.0], np.cumprod(1 - flips)[:-1]])
    return float((kept * flips * (leads >= LEAD_NATS) * ~np.array(repeats)).sum())


def score(setting: LocalSetting, checkpoint: Any, prompts: list[Prompt], tokens: Any, path: Path) -> Any:
    """Token ids and logprobs at every place of the answers: of the likeliest tokens, or of the given ones."""
    if not path.exists():
        print(path.stem, flush=True)
        rows = LocalWeights(checkpoint, setting).score(
            prompts, [None] * len(prompts) if tokens is None else tokens.reshape(len(prompts), TOKENS, KEPT), KEPT
        )
        np.savez(path, tokens=np.concatenate([r.token_ids for r in rows]), nats=np.concatenate([r.logprobs_nats for r in rows]))  # fmt: skip
    with np.load(path) as found:
        return found["tokens"], found["nats"].astype(np.float64)


def main() -> None:
    """Search, and write the pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a tenth of the candidates, to see that it runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(lab_checkpoint(print), {})
    scale = 10 if arguments.quick else 1
    probes = generate_probes(KEY, CANDIDATES[-1][1] // scale, "chat")
    texts = render_conversations(
        checkpoint.template, [p.messages for p in probes], special_tokens=checkpoint.special_tokens, name="official", date=None
    )  # fmt: skip
    engine = LocalWeights(checkpoint, LocalSetting())
    ids = engine.tokenize(texts)
    numbers = [
        n for low, high, count in CANDIDATES
        for n in sorted(range(low // scale, high // scale), key=lambda n: len(ids[n]))[: count // scale]
    ]  # fmt: skip
    answers_path = arguments.out / "answers.json"
    if not answers_path.exists():
        found: dict[int, tuple[list[int], list[list[float]]]] = {}
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            found |= dict(zip(batch, answer(engine, [ids[n] for n in batch]), strict=True))
            print(f"{start + len(batch)} of {len(numbers)} answered", flush=True)
        write_atomically(answers_path, json.dumps(found).encode())
    answers = {int(n): own for n, own in json.loads(answers_path.read_text("utf-8")).items()}

    fits: list[tuple[float, int, str]] = []
    for n in numbers:
        tokens, tops = answers[n]
        text = engine.tokenizer.decode(tokens, skip_special_tokens=False)
        whole = (
            len(tokens) == TOKENS and len(text) <= MOST_CHARACTERS and text == text.lstrip() and "\ufffd" not in text
        )
        if whole and engine.tokenize([text])[0] == tokens:
            before = [token in (ids[n] + tokens[:i]) for i, token in enumerate(tokens)]
            fits.append((expected(tops, before), n, text))
    alike: Counter[tuple[int, ...]] = Counter()
    for fit in sorted(fits, reverse=True):
        beginning = tuple(answers[fit[1]][0][:ALIKE_TOKENS])
        alike[beginning] += 1
        if alike[beginning] > MOST_ALIKE:
            fits.remove(fit)
    fits = sorted(fits, reverse=True)[: PRESELECTED // scale]
    prompts = [
        Prompt(str(n), (*ids[n], *answers[n][0]), tuple(range(len(ids[n]) - 1, len(ids[n]) - 1 + TOKENS)))
        for _, n, _ in fits
    ]
    columns, reference = score(LocalSetting(), checkpoint, prompts, None, arguments.out / "reference.npz")
    own = np.array([token for _, n, _ in fits for token in answers[n][0]])
    sure = (columns[:, 0] == own).reshape(len(fits), TOKENS).all(axis=1)
    nats = {
        name: score(setting, checkpoint, prompts, columns, arguments.out / f"{name}.npz")[1]
        for name, setting in (HONEST | SEEN).items()
    }
    repeats = [token in (ids[n] + answers[n][0][:i]) for _, n, _ in fits for i, token in enumerate(answers[n][0])]
    paths = Paths(
        probe_ids=[str(n) for _, n, _ in fits], rows=[slice(TOKENS * i, TOKENS * (i + 1)) for i in range(len(fits))], tokens=[], listed=[],
        own=np.zeros(len(own), np.int64), repeats=np.array(repeats), stacks=[],
        tokens_nats=np.stack([cell_logprobs(one) for one in (reference, *(nats[name] for name in HONEST))]),
    )  # fmt: skip
    sure_of = honest_chances(paths, range(1 + len(HONEST)), LIMIT_NATS, MARGIN) <= HONEST_CHANCE
    out = sure_of & ~paths.repeats[:, None]
    told = {name: stands_out(nats[name], out) & sure for name in SEEN}
    for name in HONEST:
        print(f"{name}: {stands_out(nats[name], out).sum()} of {len(fits)} stand out", flush=True)
    rank = sorted(range(len(fits)), key=lambda i: (-sum(int(told[name][i]) for name in SEEN), -fits[i][0]))
    chosen = sorted(rank[: CHOSEN // scale], key=lambda i: fits[i][1])
    for name in SEEN:
        print(f"{name}: {np.mean([told[name][i] for i in chosen]):.2f} of the chosen stand out", flush=True)
    rule = f"the reference's own likeliest answers of {TOKENS} tokens; those that noise of {NOISE_NATS:g} nats leaves most often where the reference leads by {LEAD_NATS:g} ({MOST_ALIKE} at most that begin alike), and of these {PRESELECTED // scale} those that most of {', '.join(SEEN)} leave where an honest stack does in fewer than one of {1 / HONEST_CHANCE:,.0f}"
    selection = {
        "rule": rule, "candidates": len(numbers), "honest_stacks_seen": list(HONEST), "variants_seen": list(SEEN),
        "chosen": [{"id": name_of(probes[fits[i][1]]), "expected": round(fits[i][0], 3), "told": [name for name in SEEN if told[name][i]]} for i in chosen],
    }  # fmt: skip
    made = [
        Probe(id=name_of(probes[fits[i][1]]), purpose=probes[fits[i][1]].purpose,
              messages=[*probes[fits[i][1]].messages, Message(role="assistant", content=fits[i][2])])
        for i in chosen
    ]  # fmt: skip
    folder = arguments.out / "pool"
    write_pool(folder, "whole-answer", "whole", made, visibility="public", motivation=f"Of {len(numbers)} candidates {rule}.")  # fmt: skip
    write_atomically(folder / "selection.json", (json.dumps(selection, indent=1) + "\n").encode())


def name_of(probe: Probe) -> str:
    """The chosen probe's id."""
    return probe.id.replace("sealed-chat", "whole")


def stands_out(stack_nats: Floats, out: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a stack's own answers stand out where they leave the reference's; shape (answers,)."""
    best = stack_nats.argmax(axis=1).reshape(-1, TOKENS)
    left = best != 0
    first = left.argmax(axis=1)
    rows = np.arange(len(best)) * TOKENS + first
    return np.asarray(left.any(axis=1) & out[rows, best[np.arange(len(best)), first]])


if __name__ == "__main__":
    main()
