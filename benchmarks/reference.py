"""What the embedded reference bundle holds, and what building one costs.

The library's figures are read from the bundle. Speed and memory are measured beside a bare forward pass of the same
model, batches and lengths in the same run (extra hf). The sealed pool is generated from a key made of the seed, chosen
as the public one was, and both are compared on stacks and variants that neither choice saw.

    python benchmarks/reference.py [--quick] [--seed 1] [--device cpu] [--json]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from figures import CACHE, Document, Figure, say
from first_weighing import audit_again, keeping
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.policy import load_policy
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.plan import make_plan
from weighbridge.probes import write_pool
from weighbridge.probes.generate import generate_probes
from weighbridge.records import Capability, Endpoint, Observation, TopToken, checked
from weighbridge.reference.build import build_bundle
from weighbridge.reference.bundle import Bundle, StackRecord, load_bundle
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.engine import Prompt
from weighbridge.reference.local import LocalSetting, LocalWeights, in_batches
from weighbridge.reference.select import candidates_of, select, size_evidence
from weighbridge.reference.spec import Spec

# What the choice of the public pool saw (its selection.json), and some of what it did not see.
SEEN: dict[str, dict[str, Any]] = {"hf-bfloat16": {"dtype": "bfloat16"}, "int8": {"weights": "int8"}}
UNSEEN: dict[str, dict[str, Any]] = {
    "emulated-both": {"module_outputs": "bfloat16", "logits": "bfloat16", "attention": "eager"},
    "fp8-e4m3": {"weights": "fp8-e4m3"},
    "nf4-g64": {"weights": "nf4-g64"},
    "int4-g64": {"weights": "int4-g64"},
}
PAIRS = 5


def library_figures(document: Document, bundle: Bundle) -> None:
    """What the honest library and the variants amount to."""
    stacks = bundle.manifest.stacks
    honest = [s for s in stacks if s.departure is None]
    counted = {s.variant for s in stacks if s.departure is not None and not s.indistinguishable}
    families = {s.family for s in honest}
    twice = [v for v in counted if len({s.family for s in stacks if s.variant == v}) > 1]
    size_mb = sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) / 1e6
    tokens = int(bundle.prompt_tokens[0].sum())
    document.figures |= {
        "honest_stacks": Figure(len(honest), "stacks", ">= 12", len(honest) >= 12),
        "families": Figure(len(families), "engine × compute type", ">= 5", len(families) >= 5),
        "variants": Figure(len(counted), "variants", ">= 20", len(counted) >= 20),
        "variants_on_two_families": Figure(len(twice), "variants", ">= 4", len(twice) >= 4),
        "bundle_size": Figure(size_mb, "MB", "< 20", size_mb < 20),
        "prompt_tokens_of_all_pools": Figure(tokens, "tokens", "<= 60000", tokens <= 60_000),
    }
    noisiest = _noisiest_class(honest)
    farthest = max(_nearest_ratio(s, noisiest) for s in noisiest)
    document.figures |= {
        "stacks_in_noisiest_class": Figure(len(noisiest), "stacks", ">= 6", len(noisiest) >= 6),
        "nearest_other_scheme_in_that_class": Figure(farthest, "ratio of ŝ, largest", "<= 1.25", farthest <= 1.25),
    }
    reference = bundle.logprobs_nats[bundle.stack_index[bundle.manifest.reference_stack]]
    vllm = bundle.logprobs_nats[bundle.stack_index["vllm-float32"]]
    asked = np.isin(bundle.row_probe, [i for p in bundle.manifest.pools if p.level != "long" for i in p.probes])
    apart = float(np.abs(vllm[asked][:, :20] - reference[asked][:, :20]).max())  # NaN where a value is missing: no pass
    f16 = next(s.noise_nats for s in stacks if s.id == "llamacpp-f16")
    assert f16 is not None
    document.figures |= {
        "vllm_float32_from_reference": Figure(apart, "nats, largest of the top 20", "<= 0.001", apart <= 1e-3),
        "llamacpp_f16_noise": Figure(f16, "nats", "<= 0.0029, measured by the study before", f16 <= 0.0029),
    }
    document.reported["noise_nats"] = {s.id: s.noise_nats for s in stacks}
    document.reported["indistinguishable"] = [s.id for s in stacks if s.indistinguishable]


def _noisiest_class(honest: list[StackRecord]) -> list[StackRecord]:
    """The honest stacks whose logits have the type of the noisiest one's."""
    kind = max(honest, key=lambda s: s.noise_nats or 0).precision.logits
    return [s for s in honest if s.precision.logits == kind]


def _scheme(stack: StackRecord) -> tuple[object, ...]:
    return stack.engine_name, stack.engine.get("module_outputs"), stack.engine.get("logits"), stack.engine.get("dtype")


def _nearest_ratio(stack: StackRecord, others: list[StackRecord]) -> float:
    """Ratio of ŝ to the nearest stack of another engine or rounding scheme."""
    noise = stack.noise_nats or 0
    return min(
        max(noise / (o.noise_nats or 1), (o.noise_nats or 1) / noise) for o in others if _scheme(o) != _scheme(stack)
    )


def left_out_families(document: Document, bundle: Bundle, seed: int, draws: int) -> None:
    """Audits of honest stacks whose family the library lacks, and of departures on another compute type than the recorded.

    Answers are the recorded rows, so no HTTP is involved.
    """
    policy = load_policy("strict")
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True
    )
    chat = bundle.pool_at("L3")
    assert chat is not None
    stacks = bundle.manifest.stacks
    reference = next(s for s in stacks if s.id == bundle.manifest.reference_stack)
    plan = make_plan(
        Endpoint(name="recorded", base_url="http://127.0.0.1:1/v1", model="recorded"), policy, bundle, seed="x"
    )

    def audits(stack: StackRecord, library: Library) -> list[tuple[str, str | None, str | None, int | None, str]]:
        answers = _answers(bundle, stack)
        return [audit_again(plan, capability, answers, library, f"{seed}-{stack.id}-{d}") for d in range(draws)]

    differs = consistent = total = 0
    for stack in (s for s in stacks if s.departure is None and s.family != reference.family):
        kept = keeping(bundle, {s.id for s in stacks if s.departure is not None or s.family != stack.family})
        rows = audits(stack, build_library(kept, policy, 20))
        differs += sum(r[0] == "differs" for r in rows)
        consistent += sum(r[0] == "consistent" for r in rows)
        total += len(rows)
    document.figures["left_out_family_differs"] = Figure(differs, f"of {total} audits", "0", differs == 0)
    document.reported["left_out_family_consistent"] = f"{consistent} of {total}"
    for variant in ("int8", "fp8-e4m3", "nf4-g64", "int4-g64"):
        kept = keeping(bundle, {s.id for s in stacks if s.id != f"{variant}-bfloat16"})
        rows = audits(next(s for s in stacks if s.id == f"{variant}-bfloat16"), build_library(kept, policy, 20))
        needed = [r[3] for r in rows if r[3] is not None]
        document.reported[f"{variant} on bfloat16, recorded on float32"] = (
            f"differs in {sum(r[0] == 'differs' for r in rows)} of {len(rows)}, median {np.median(needed) if needed else None} answers; exactly named in {sum(r[2] == variant for r in rows)}, otherwise named in {sum(r[2] not in (None, variant) for r in rows)}"
        )


def _answers(bundle: Bundle, stack: StackRecord) -> list[Observation]:
    """What an endpoint with this stack would have answered to the one-token probes."""
    values = bundle.logprobs_nats[bundle.stack_index[stack.id]]
    out = []
    for probe_id in bundle.usable_probe_ids:
        row = bundle.row_index[probe_id]
        columns = np.argsort(-np.nan_to_num(values[row], nan=-np.inf), kind="stable")[:20]
        top = [
            TopToken(
                bytes_hex=bundle.vocabulary[bundle.token_ids[row, c]].hex(),
                logprob_nats=min(0.0, float(values[row, c])),
            )
            for c in columns
        ]
        out.append(Observation(
            request_id=probe_id, probe_id=probe_id, answered=True, status=200, attempts=1, latency_s=0.1,
            prompt_tokens=int(bundle.prompt_tokens[0, bundle.probe_index[probe_id]]), completion_tokens=1, top=top,
        ))  # fmt: skip
    return out


def throughput(document: Document, prompts: list[Prompt], device: str) -> None:
    """Scoring beside a bare forward pass of the same batches, alternating."""
    import torch

    engine = LocalWeights(open_checkpoint(lab_checkpoint(say), {}), LocalSetting(device=device))
    inputs = []
    for chosen in in_batches([len(p.token_ids) for p in prompts], LocalSetting().batch):
        width = max(len(prompts[i].token_ids) for i in chosen)
        ids = torch.zeros((len(chosen), width), dtype=torch.long)
        for row, i in enumerate(chosen):
            ids[row, : len(prompts[i].token_ids)] = torch.tensor(prompts[i].token_ids)
        inputs.append(ids.to(engine.device))

    def bare() -> None:
        with torch.inference_mode():
            for ids in inputs:
                engine.model(ids, use_cache=False, logits_to_keep=1)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    def scored() -> None:
        engine.score(prompts, [None] * len(prompts), 128)

    def timed(run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    bare()
    scored()
    pairs = []
    for n in range(PAIRS):  # each goes first in turn
        first, second = (bare, scored) if n % 2 == 0 else (scored, bare)
        times = {first: timed(first), second: timed(second)}
        pairs.append((times[bare], times[scored]))
    ratios = [b / s for b, s in pairs]
    ratio = float(np.median(ratios))
    document.figures["throughput_over_bare_forward"] = Figure(
        ratio, f"ratio, median of {PAIRS} pairs", ">= 0.9", ratio >= 0.9, (min(ratios), max(ratios))
    )
    tokens = sum(len(p.token_ids) for p in prompts)
    document.reported["prompt_tokens_per_second"] = round(tokens / float(np.median([s for _, s in pairs])), 1)
    document.reported["engine"] = engine.facts()


def memory(document: Document, prompts: list[Prompt]) -> None:
    """Peak memory of a process that loads the model and scores, above that of its imports."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "import torch, transformers, tokenizers\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from weighbridge.reference.local import *\n"
        "from weighbridge.reference.checkpoint import open_checkpoint\n"
        "from weighbridge.reference.engine import Prompt\n"
        "from tokenizers import Tokenizer\n"
        "folder = Path(sys.argv[1])\n"
        "tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))\n"
        "prompts = [Prompt(p[0], tuple(p[1]), tuple(p[2])) for p in json.loads(sys.stdin.read())]\n"
        "def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "before = peak()\n"
        "engine = LocalWeights(open_checkpoint(folder, {}), LocalSetting())\n"
        "engine.score(prompts, [None] * len(prompts), 128)\n"
        "weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())\n"
        "print(json.dumps([before * 1024, peak() * 1024, weights]))\n"
    )
    batch = prompts[:16]
    width = max(len(p.token_ids) for p in batch)
    rows = sum(len(p.positions) for p in batch)
    done = subprocess.run(
        [sys.executable, "-c", code, str(lab_checkpoint(say))], check=True, capture_output=True, text=True,
        input=json.dumps([[p.probe_id, p.token_ids, p.positions] for p in batch]),
    )  # fmt: skip
    before, peak, weights = json.loads(done.stdout.splitlines()[-1])
    # One batch: one row of logits for each wanted distribution, twice, and the activations of one block.
    one_batch = rows * 49152 * 8 + 16 * width * (1536 * 3 + 576 * 8) * 4
    assert peak - before > weights / 2, "the kernel did not count"
    ratio = (peak - before) / (weights + one_batch)
    document.figures["peak_memory"] = Figure(
        ratio, "of the weights plus one batch, above the imports", "<= 1.2", ratio <= 1.2
    )
    document.reported["peak_memory_mb"] = {
        "imports": before / 1e6, "peak": peak / 1e6, "weights": weights / 1e6, "one_batch": one_batch / 1e6,
    }  # fmt: skip


def sealed_ratio(document: Document, public: Bundle, seed: int, candidates: int) -> None:
    """Evidence per token of a sealed pool and of the public one, on what neither choice saw."""
    key = f"weighbridge benchmark {seed:04d}".encode()
    cache = CACHE / "reference" / f"sealed-{seed}-{candidates}"
    if not (cache / "bundle" / "manifest.json").exists():
        if not (cache / "pool" / "pool.toml").exists():
            probes = generate_probes(key, candidates, "chat")
            write_pool(cache / "pool", "sealed-candidates", "L3", probes, visibility="sealed", motivation="a benchmark")
        stacks: list[dict[str, Any]] = [{"id": "hf-float32", "description": "reference", "local": {}}]
        stacks += [
            {"id": name, "description": name, "local": local, "departure": _departure(name)}
            for name, local in (SEEN | UNSEEN).items()
        ]
        document_: dict[str, Any] = {
            "schema": "weighbridge/reference-spec/3", "id": "sealed", "version": 1, "model": "SmolLM2", "model_names": ["SmolLM2"],
            "keeper": "a benchmark", "weights": {"source": "the lab", "precision": "bfloat16", "lab": True},
            "pool": [{"name": "pool"}], "stack": stacks,
        }  # fmt: skip
        spec = checked(Spec, document_, "the sealed pool's spec")
        build_bundle(spec, cache, cache / "bundle", say, lambda s, d, n: say(f"  {s}: {d} of {n}"))
    sealed = load_bundle(str(cache / "bundle"))
    # The choice sees what the public pool's choice saw; the comparison uses the rest.
    chosen = select(keeping(sealed, {"hf-float32", *SEEN}), "L3", candidates // 3)
    names = {c.id for c in chosen.chosen}
    per_token = {}
    for label, bundle, keep in (("sealed", sealed, names), ("public", public, None)):
        found = candidates_of(keeping(bundle, {"hf-float32", *UNSEEN}), ("L3",))
        wanted = np.array([keep is None or probe_id in keep for probe_id in found.probe_ids])
        per_token[label] = float(size_evidence(found)[wanted].sum() / found.prompt_tokens[wanted].sum())
    ratio = per_token["sealed"] / per_token["public"]
    document.figures["sealed_over_public_evidence_per_token"] = Figure(ratio, "ratio", ">= 0.8", ratio >= 0.8)
    document.reported["sealed_pool"] = (
        f"{len(names)} of {candidates} generated; worth {chosen.effective_sample_size:.0f} independent probes; chosen on {', '.join(SEEN)}; compared on {', '.join(UNSEEN)}"
    )
    whole = candidates_of(keeping(sealed, {"hf-float32", *UNSEEN}), ("L3",))
    document.reported["evidence_per_token_unchosen_over_public"] = (
        float(size_evidence(whole).sum() / whole.prompt_tokens.sum()) / per_token["public"]
    )


def _departure(name: str) -> str | None:
    return None if name in ("hf-bfloat16", "emulated-both") else "precision"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle = load_bundle("smollm2-135m-instruct")
    document = Document("reference")
    library_figures(document, bundle)
    left_out_families(document, bundle, arguments.seed, 5 if arguments.quick else 20)
    offsets = bundle.prompt_offsets
    chat = next(pool for pool in bundle.manifest.pools if pool.level == "L3")
    prompts = [
        Prompt(bundle.manifest.probe_ids[i], tuple(bundle.prompt_ids[offsets[i] : offsets[i + 1]].tolist()), (int(offsets[i + 1] - offsets[i]) - 1,))
        for i in chat.probes[: 64 if arguments.quick else None]
    ]  # fmt: skip
    throughput(document, prompts, arguments.device)
    memory(document, prompts)
    sealed_ratio(document, bundle, arguments.seed, 120 if arguments.quick else 480)
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
