"""Search for prompts whose whole answer tells 4-bit weights as text.

    python benchmarks/search_answers.py --version 3 --out FOLDER [--key-file FILE --id POOL] [--quick]

The reference answers many short prompts greedily. Kept are those whose path 4-bit weights are
expected to leave at a place where the reference is sure of itself; of these, in two rounds, those whose text tells `SEEN` from every honest stack. What an honest stack may do is
taken from `HONEST`, on the same answers. Writes FOLDER/pool, with its selection.json. With a key of your own (`weighbridge pool keygen`) the pool is a sealed one. Needs the
extras lab and hf; an hour and a half on two cores. What is on the disk is not computed again.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from weighbridge.canonical import write_atomically
from weighbridge.judge.whole import HONEST_CHANCE, WholeLibrary, honest_chances
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.probes import write_pool
from weighbridge.probes.generate import generate_probes
from weighbridge.records import Message, Probe
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.engine import Prompt
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.paths import KEPT, Paths
from weighbridge.reference.roundings import WEIGHT_ROUNDINGS, Matrix, Rounding
from weighbridge.reference.templates import render_conversations
from weighbridge.stats.draws import cell_logprobs

Floats = NDArray[np.float64]
BUNDLE = "smollm2-135m-instruct"
KEY = b"weighbridge public pool of long answers, 2026"  # public: whoever has it can make the candidates again
# Of the texts from the first number to the second, so many of the shortest.
CANDIDATES = ((0, 4000, 1500), (4000, 12_000, 3000), (12_000, 28_000, 6000), (28_000, 44_000, 6000))
TOKENS = 16
LIKELIEST = 8  # tokens at each place, from which it is told how likely an answer is left
BATCH = 64
MOST_CHARACTERS = 150  # of an answer: an audit reads 200
FLIP, FLIP_NATS = 0.4, 1.2  # of 4-bit weights; by likelihood, of `SEEN` along 1,500 answers of an earlier search
LEAD_NATS = 0.9  # from which on an answer is expected to stand out
PRESELECTED, SECOND, CHOSEN = 2500, 900, 100
MOST_ALIKE, ALIKE_TOKENS = 2, 4  # so many answers that begin with the same tokens: a small model has few beginnings
MARGIN = 1.25
LIMIT_NATS = 0.067  # noise that an honest stack may have in the embedded library
HONEST = {"hf-bfloat16": LocalSetting(dtype="bfloat16"), "hf-bfloat16-eager": LocalSetting(dtype="bfloat16", attention="eager")}  # fmt: skip
FAIRNESS = 8  # the larger, the more is given to the departure told least of
SEED = 1


def shifted(seed: int, group: int) -> Rounding:
    """Four bits in groups, on grids that are shifted by chance: errors as large as those of such weights, and no scheme's own."""

    def rounded(matrix: Matrix) -> Matrix:
        grouped = matrix.reshape(len(matrix), -1, group)
        scale = np.abs(grouped).max(axis=2, keepdims=True) / 7
        shift = np.random.default_rng([SEED, seed]).uniform(-0.5, 0.5, scale.shape)
        return np.asarray((np.round(grouped / scale + shift) - shift) * scale, np.float32).reshape(matrix.shape)

    return Rounding(f"shifted-{seed}-g{group}", 4, group, 16, rounded)


def scaled(name: str, seed: int) -> Rounding:
    """A scheme after each input channel was scaled by chance, and scaled back: as large errors as the scheme's, and others (the scales of AWQ are chosen ones)."""
    scheme = WEIGHT_ROUNDINGS[name]

    def rounded(matrix: Matrix) -> Matrix:
        by = np.asarray(np.random.default_rng([SEED, seed]).uniform(0.9, 1.1, matrix.shape[-1]), np.float32)
        return np.asarray(scheme.apply(matrix * by) / by, np.float32)

    return Rounding(f"{name}-scaled-{seed}", scheme.code_bits, scheme.group, scheme.shared_bits, rounded)


def q4_0(matrix: Matrix) -> Matrix:
    """llama.cpp's format, by its authors' own Python."""
    kind = GGMLQuantizationType.Q4_0
    return np.asarray(quants.dequantize(quants.quantize(matrix, kind), kind), np.float32)


WEIGHT_ROUNDINGS["q4_0"] = Rounding("q4_0", 4, 32, 16, q4_0)
SHIFTED = [shifted(0, 64), shifted(4, 32)]
SCALED = [scaled(name, seed) for name in ("nf4-g64", "q4_0", "int4-asym-g64") for seed in (0, 1, 2)]
WEIGHT_ROUNDINGS |= {r.name: r for r in (*SHIFTED, *SCALED)}
# What the first round sees, and what the second one sees besides.
FIRST = ("nf4-g64", "q4_0", *(r.name for r in SHIFTED))
SEEN = (*FIRST, "int4-asym-g64", "int4-g32", "mxfp4", *(r.name for r in SCALED))


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
        [torch.topk(torch.log_softmax(step.float(), -1), LIKELIEST).values for step in found.logits], 1
    ).tolist()
    return [(row[width:], top) for row, top in zip(found.sequences.tolist(), tops, strict=True)]


def expected(top_nats: list[list[float]], repeats: list[bool]) -> float:
    """The chance that 4-bit weights leave an answer first by a token that the reference leads by `LEAD_NATS`, where the path's own is no repeat.

    That a token led by g nats becomes the likeliest is taken to have the chance `FLIP` exp(−g / `FLIP_NATS`).
    """
    leads = np.array([[row[0] - other for other in row[1:]] for row in top_nats])
    each = FLIP * np.exp(-leads / FLIP_NATS)
    flips = 1 - (1 - each).prod(axis=1)
    kept = np.concatenate([[1.0], np.cumprod(1 - flips)[:-1]])
    outstanding = (each * (leads >= LEAD_NATS)).sum(axis=1) / each.sum(axis=1)
    return float((kept * flips * outstanding * ~np.array(repeats)).sum())


def score(setting: LocalSetting, checkpoint: Any, prompts: list[Prompt], tokens: Any, top_k: int, path: Path) -> Any:
    """Token ids and logprobs at every place of the answers: of the likeliest tokens, or of the given ones."""
    if not path.exists():
        print(path.stem, flush=True)
        wanted = [None] * len(prompts) if tokens is None else tokens.reshape(len(prompts), TOKENS, KEPT)
        rows = LocalWeights(checkpoint, setting).score(prompts, wanted, top_k)
        np.savez(path, tokens=np.concatenate([r.token_ids for r in rows]), nats=np.concatenate([r.logprobs_nats for r in rows]))  # fmt: skip
    with np.load(path) as found:
        return found["tokens"], found["nats"].astype(np.float64)


def main() -> None:
    """Search, and write the pool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--id", default="whole-answer", help="the new pool's name")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--key-file", type=Path, help="for a sealed pool; from `weighbridge pool keygen`")
    parser.add_argument("--quick", action="store_true", help="a tenth of the candidates, to see that it runs")
    arguments = parser.parse_args()
    if (arguments.out / "pool").exists():
        parser.error(f"{arguments.out / 'pool'} holds a pool already, and a pool is never overwritten")
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(lab_checkpoint(print), {})
    scale = 10 if arguments.quick else 1
    key = KEY if arguments.key_file is None else bytes.fromhex(arguments.key_file.read_text("ascii"))
    probes = generate_probes(key, CANDIDATES[-1][1] // scale, "chat")
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
    found: dict[str, tuple[list[int], list[list[float]]]] = {}
    if answers_path.exists():
        found = json.loads(answers_path.read_text("utf-8"))
    missing = [n for n in numbers if str(n) not in found]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        found |= {str(n): own for n, own in zip(batch, answer(engine, [ids[n] for n in batch]), strict=True)}
        if start // BATCH % 10 == 9 or start + BATCH >= len(missing):
            write_atomically(answers_path, json.dumps(found).encode())
            print(f"{start + len(batch)} of {len(missing)} answered", flush=True)
    answers = {int(n): own for n, own in found.items()}

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
    columns, reference = score(LocalSetting(), checkpoint, prompts, None, KEPT, arguments.out / "reference.npz")
    nats = [
        score(setting, checkpoint, prompts, columns, KEPT, arguments.out / f"{name}.npz")[1]
        for name, setting in HONEST.items()
    ]
    own = np.array([token for _, n, _ in fits for token in answers[n][0]])
    sure = (columns[:, 0] == own).reshape(len(fits), TOKENS).all(axis=1)
    vocabulary = load_bundle(BUNDLE).vocabulary
    repeats = [token in (ids[n] + answers[n][0][:i]) for _, n, _ in fits for i, token in enumerate(answers[n][0])]
    paths = Paths(
        probe_ids=[str(n) for _, n, _ in fits], rows=[slice(TOKENS * i, TOKENS * (i + 1)) for i in range(len(fits))],
        tokens=[vocabulary[t] for t in own], listed=[[vocabulary[t] for t in row] for row in columns.tolist()],
        own=np.zeros(len(own), np.int64), repeats=np.array(repeats), stacks=[],
        tokens_nats=np.stack([cell_logprobs(one) for one in (reference, *nats)]),
    )  # fmt: skip
    honest = [*range(1 + len(HONEST))]
    library = WholeLibrary(paths, honest, [], LIMIT_NATS, honest_chances(paths, honest, LIMIT_NATS, MARGIN))
    for name, found_nats in zip(HONEST, nats, strict=True):
        best = np.take_along_axis(columns, found_nats.argmax(axis=1)[:, None], axis=1)[:, 0]
        sure &= (best == own).reshape(len(fits), TOKENS).all(axis=1)
        print(f"{name}: {told_by(library, columns, own, best).sum()} of {len(fits)} stand out", flush=True)

    def tell(name: str, places: list[int]) -> NDArray[np.bool_]:
        setting = LocalSetting(dtype="bfloat16", weights=name)
        rows = [row for place in places for row in range(TOKENS * place, TOKENS * (place + 1))]
        best = np.full(len(own), -1)
        asked = [prompts[i] for i in places]
        best[rows] = score(setting, checkpoint, asked, None, 1, arguments.out / f"{name}.npz")[0][:, 0]
        out = np.zeros(len(fits), np.bool_)
        out[places] = told_by(library, columns, own, best)[places] & sure[places]
        return out

    told = {name: tell(name, [*range(len(fits))]) for name in FIRST}
    first = np.array([*told.values()]).sum(axis=0)
    second = sorted(sorted(range(len(fits)), key=lambda i: (-first[i], -fits[i][0]))[: SECOND // scale])
    told |= {name: tell(name, second) for name in SEEN if name not in FIRST}
    chosen = choose(np.array([*told.values()]), [fit[0] for fit in fits], CHOSEN // scale)
    for name in SEEN:
        # The first round has seen it where it is one of `FIRST`.
        unseen = choose(np.array([told[n] for n in SEEN if n != name]), [fit[0] for fit in fits], CHOSEN // scale)
        shares = [float(np.mean(told[name][places])) for places in (chosen, unseen, unseen[: len(unseen) // 2])]
        print("{}: {:.2f} of the chosen stand out; {:.2f} where the last choice does not see it, {:.2f} of the first half".format(name, *shares), flush=True)  # fmt: skip
    rule = f"the reference's own likeliest answers of {TOKENS} tokens; those that 4-bit weights are expected to leave most often where the reference leads by {LEAD_NATS:g} nats ({MOST_ALIKE} at most that begin alike), of these {PRESELECTED // scale} the {SECOND // scale} that tell most of {', '.join(FIRST)}, and of these, one after another, what tells most of those of {', '.join(SEEN)} that the chosen ones tell least of: they leave it, as their text tells, by a token by which an honest stack does in fewer than one of {1 / HONEST_CHANCE:,.0f}, and {' and '.join(HONEST)} do not leave it"
    prefix = "whole" if arguments.key_file is None else arguments.id  # several sealed pools may stand in one bundle
    selection = {
        "rule": rule, "candidates": len(numbers), "honest_stacks_seen": list(HONEST), "variants_seen": list(SEEN),
        "chosen": [{"id": name_of(probes[fits[i][1]], prefix), "expected": round(fits[i][0], 3), "told": [name for name in SEEN if told[name][i]]} for i in chosen],
    }  # fmt: skip
    made = [
        Probe(id=name_of(probes[fits[i][1]], prefix), purpose=probes[fits[i][1]].purpose,
              messages=[*probes[fits[i][1]].messages, Message(role="assistant", content=fits[i][2])])
        for i in chosen
    ]  # fmt: skip
    folder = arguments.out / "pool"
    write_pool(folder, arguments.id, "whole", made, version=arguments.version, visibility="public" if arguments.key_file is None else "sealed", motivation=f"Of {len(numbers)} candidates {rule}.")  # fmt: skip
    write_atomically(folder / "selection.json", (json.dumps(selection, indent=1) + "\n").encode())


def choose(told: NDArray[np.bool_], expected_of: list[float], count: int) -> list[int]:
    """One after another what tells most of those departures that the chosen ones tell least of; in this order; of told, shape (departures, answers)."""
    chosen: list[int] = []
    for _ in range(count):
        worth = (told / (1 + told[:, chosen].sum(axis=1, keepdims=True)) ** FAIRNESS).sum(axis=0)
        chosen.append(max(set(range(told.shape[1])) - set(chosen), key=lambda i: (worth[i], expected_of[i])))
    return chosen


def name_of(probe: Probe, prefix: str) -> str:
    """The chosen probe's id."""
    return probe.id.replace("sealed-chat", prefix)


def told_by(library: WholeLibrary, columns: NDArray[Any], own: NDArray[Any], best: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a stack's answers stand out, by its likeliest token at each place; shape (answers,)."""
    out = np.zeros(len(library.paths.rows), np.bool_)
    for place, rows in enumerate(library.paths.rows):
        left = np.flatnonzero(best[rows] != own[rows])
        if left.size:
            row = rows.start + int(left[0])
            listed = np.flatnonzero(columns[row] == best[row])
            out[place] = listed.size > 0 and library.is_outstanding(place, library.as_text(place, row, int(listed[0])))
    return out


if __name__ == "__main__":
    main()
