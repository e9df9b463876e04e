"""Search for prompts whose first token tells precisions apart as text: many endings of many stems, scored with shared prefixes.

    python benchmarks/search_contexts.py STEMS --out FOLDER [--stems N]

STEMS is a pool of chat probes, such as `weighbridge pool generate --family chat` makes. Every stem is asked with every ending of
`ENDINGS`; the reference scores all of them, the other stacks those whose lead lies in `LEADS`, the last three only what one of those before
may answer otherwise. One forward pass holds a stem once and all its endings behind it, each blind to the others, so that a stem's tokens are
paid for once. What is found is written as a bundle of candidates for `weighbridge pool select FOLDER/candidates --level L4`. Needs the
extra hf; some 6 minutes a stack on two cores. What is on the disk is not computed again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from weighbridge.canonical import sha256_hex
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.probes import load_pool, write_pool
from weighbridge.records import Message, Probe
from weighbridge.reference.build import write_bundle
from weighbridge.reference.bundle import OFFICIAL, PoolRecord, load_bundle, pack_arrays
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.templates import render_conversations

Floats = NDArray[np.float32]
REFERENCE = "smollm2-135m-instruct"
TOP_K = 8
LEADS = (0.15, 0.7)  # nats: outside, an honest stack may answer otherwise, or no 8-bit one does
WAVERING = 0.03  # a lead below which a stack's answer may be another one
# Named as in the embedded bundle, and computed with the same settings. The second group is asked only what one of the first may answer otherwise.
EVERYWHERE = {
    "hf-bfloat16": LocalSetting(dtype="bfloat16"),
    "int8": LocalSetting(weights="int8"),
    "fp8-e4m3": LocalSetting(weights="fp8-e4m3"),
    "w8a8-int8": LocalSetting(weights="int8", activations="int8"),
    "w8a8-fp8": LocalSetting(weights="fp8-e4m3", activations="fp8-e4m3"),
}
WHERE_OTHERS_WAVER = {name: LocalSetting(weights=name) for name in ("nf4-g64", "int4-g64", "int5-g64")}
ENDINGS = (Path(__file__).parent / "endings.txt").read_text("utf-8").splitlines()


def score(
    engine: LocalWeights, prompts: list[list[int]], tokens: NDArray[np.int32] | None
) -> tuple[NDArray[np.int32], Floats]:
    """Logprobs of the next token after prompts that begin alike: of the TOP_K likeliest, or of the given tokens."""
    shortest = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = next((i for i in range(shortest) if any(prompt[i] != first[i] for prompt in prompts)), shortest)
    rests = [prompt[shared:] for prompt in prompts]
    ids = first[:shared] + [token for rest in rests for token in rest]
    positions = list(range(shared)) + [shared + i for rest in rests for i in range(len(rest))]
    branch = torch.tensor([-1] * shared + [i for i, rest in enumerate(rests) for _ in rest])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & (
        (branch[None, :] == -1) | (branch[None, :] == branch[:, None])
    )
    lowest = torch.finfo(engine.model.dtype).min
    mask = torch.zeros(1, 1, len(ids), len(ids), dtype=engine.model.dtype).masked_fill(~seen, lowest)
    with torch.inference_mode():
        hidden = engine.model.get_decoder()(
            torch.tensor([ids]), attention_mask=mask, position_ids=torch.tensor([positions]), use_cache=False
        ).last_hidden_state[0]
        ends = torch.from_numpy(np.cumsum([shared, *map(len, rests)])[1:] - 1)
        logprobs = torch.log_softmax(engine.model.get_output_embeddings()(hidden[ends]).float(), -1)
        if tokens is None:
            values, found = torch.topk(logprobs, TOP_K, -1)
        else:
            found = torch.from_numpy(tokens.astype(np.int64))
            values = torch.gather(logprobs, 1, found)
    return found.numpy().astype(np.int32), values.numpy()


def scored(
    path: Path, setting: LocalSetting, checkpoint: Any, prompts: list[list[list[int]]], wanted: NDArray[np.bool_],
    tokens: NDArray[np.int32] | None,
) -> tuple[NDArray[np.int32], Floats]:  # fmt: skip
    """One stack's logprobs of all contexts, NaN where it was not asked; read back where they are on the disk."""
    if not path.exists():
        engine, started = LocalWeights(checkpoint, setting), time.perf_counter()
        all_tokens = np.zeros((wanted.size, TOP_K), np.int32) if tokens is None else tokens
        values = np.full((wanted.size, TOP_K), np.nan, np.float32)
        for stem, branches in enumerate(prompts):
            at = [i for i in range(stem * len(ENDINGS), (stem + 1) * len(ENDINGS)) if wanted[i]]
            if at:
                all_tokens[at], values[at] = score(
                    engine, [branches[i % len(ENDINGS)] for i in at], None if tokens is None else tokens[at]
                )
            if stem % 20 == 19:
                print(
                    f"{path.stem}: {stem + 1} of {len(prompts)} stems, {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
        np.savez(path, tokens=all_tokens, nats=values)
    with np.load(path) as found:
        return found["tokens"], found["nats"]


def lead(values: Floats) -> Floats:
    """By how much the reference's likeliest token leads the others."""
    return np.asarray(values[:, 0] - values[:, 1:].max(axis=1))


def main() -> None:
    """Score everything, and write the candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", help="a pool of chat probes")
    parser.add_argument("--stems", dest="count", type=int, default=420)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(lab_checkpoint(print), {})
    stems = [p for p in load_pool(given.stems).probes if p.messages[-1].role == "user"][: given.count]
    probes = [
        Probe(
            id=f"{stem.id}-{number:02d}",
            purpose=stem.purpose,
            messages=[
                *stem.messages[:-1],
                Message(role="user", content=f"{stem.messages[-1].content.rstrip()} {ending}"),
            ],
        )
        for stem in stems
        for number, ending in enumerate(ENDINGS, start=1)
    ]
    texts = render_conversations(
        checkpoint.template, [probe.messages for probe in probes], special_tokens=checkpoint.special_tokens, name=OFFICIAL, date=None
    )  # fmt: skip
    ids = LocalWeights(checkpoint, LocalSetting()).tokenize(texts)
    prompts = [ids[i : i + len(ENDINGS)] for i in range(0, len(ids), len(ENDINGS))]

    everything = np.ones(len(ids), np.bool_)
    tokens, reference = scored(given.out / "reference.npz", LocalSetting(), checkpoint, prompts, everything, None)
    wanted = (lead(reference) > LEADS[0]) & (lead(reference) < LEADS[1])
    found = {
        name: scored(given.out / f"{name}.npz", setting, checkpoint, prompts, wanted, tokens)[1]
        for name, setting in EVERYWHERE.items()
    }
    wavers = np.any([lead(values) < WAVERING for name, values in found.items() if name != "hf-bfloat16"], axis=0)
    found |= {
        name: scored(given.out / f"{name}.npz", setting, checkpoint, prompts, wanted & wavers, tokens)[1]
        for name, setting in WHERE_OTHERS_WAVER.items()
    }

    pool = write_pool(given.out / "pool", "candidates-text", "L3", probes, visibility="public",
                      motivation=f"{len(stems)} generated prompts with {len(ENDINGS)} endings each.")  # fmt: skip
    own = load_bundle(REFERENCE).manifest
    names = [own.reference_stack, *found]
    arrays = pack_arrays(
        {
            "prompt_ids": np.concatenate(ids), "prompt_offsets": np.cumsum([0, *map(len, ids)]), "row_probe": np.arange(len(ids)),
            "row_position": np.array([len(prompt) - 1 for prompt in ids]), "token_ids": tokens,
            "logprobs_nats": np.stack([reference, *found.values()]), "prompt_tokens": np.array([list(map(len, ids))]),
        },
        load_bundle(REFERENCE).vocabulary,
    )  # fmt: skip
    stacks = {stack.id: stack for stack in own.stacks}
    manifest = own.model_copy(update={
        "id": "candidates-text", "version": 1, "licence": None, "top_k": TOP_K, "probe_ids": [probe.id for probe in probes],
        "pools": [PoolRecord(**pool.identity.model_dump(), level="L3", probes=list(range(len(probes))))],
        "stacks": [stacks[name].model_copy(update={"pools": ["candidates-text"]}) for name in names],
        "hypotheses": own.hypotheses[:1], "arrays_sha256": sha256_hex(arrays),
    })  # fmt: skip
    folder = given.out / "candidates"
    folder.mkdir(exist_ok=True)
    (folder / "pools").mkdir(exist_ok=True)
    (given.out / "pool").rename(folder / "pools" / "candidates-text")
    write_bundle(folder, manifest, arrays, b"")
    print(f"{len(probes)} candidates, {int(wanted.sum())} with a lead of {LEADS[0]} to {LEADS[1]} nats, in {folder}")


if __name__ == "__main__":
    main()
