"""The evidence engine against its targets and beside the field's methods, on the same departures, probes and budgets.

Thresholds come from the policy and from the recorded rows of honest stacks (the library). Reported on are: honest stacks whose whole family
is taken out of the library, and departures really served over HTTP on engines other than the recording one (served.py). Audits are drawn
again and again from these answers, as the keyed draw of an audit would draw them.

    python benchmarks/power.py [--quick] [--seed 1] [--json] [--out reports]

Needs the extras lab and hf; model-equality-testing (extra bench) is held against our count-based form of its statistic where installed.
"""

import argparse
import dataclasses
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peers
from figures import Document, Figure, say
from first_weighing import keeping
from served import AT_ALL_LEVELS, DEPARTURES, HONEST, Served, answers_of
from weighbridge.judge.answers import line_up
from weighbridge.judge.causes import weigh_causes
from weighbridge.judge.checks.weights import name_of, nearest
from weighbridge.judge.library import Library, Null, build_library, travels
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.power import answers_to_consistent, answers_to_differ, drawn, put_on
from weighbridge.judge.sizes import Features, against_honest, features_of, weigh
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan
from weighbridge.records import Capability, Endpoint, LogprobLevel, Observation, Policy
from weighbridge.reference.bundle import Bundle, StackRecord, load_bundle
from weighbridge.stats.grid import grid_step

Floats = NDArray[np.float64]
LOG10 = float(np.log(10))
ALPHA = 1e-3
QUICK = ("llamacpp-int8", "llamacpp-int4-g64", "transformers-int8", "transformers-kv-fp8")
SIBLINGS = (
    ("int4-g32", "int4-g64"),
    ("int4-g64", "int4-asym-g64"),
    ("int8", "int8-tensor"),
    ("nf4-g32", "nf4-g64"),
    ("fp8-e4m3", "fp8-e4m3-tensor"),
)
BUDGETS = (1, 2, 3, 4, 5, 7, 10, 15, 25, 50, 100)
PLOTTED = ("int8", "fp8-e4m3", "kv-fp8", "int4-g64")


@dataclasses.dataclass(frozen=True)
class Answered:
    """What was served, and what it answered, lined up with a library."""

    served: Served
    observations: list[Observation]
    features: Features
    null: Null


def lined_up(served: Served, bundle: Bundle, library: Library, level: LogprobLevel = "L3") -> Answered:
    """One served departure's answers as numbers."""
    _, observations = answers_of(served, bundle, level)
    found = line_up(library, observations)
    null = library.null_for(grid_step(found.endpoint_nats))
    assert null is not None, f"{served.name} lies on a grid that no honest stack has"
    return Answered(served, observations, features_of(found), null)


def recorded_answers(bundle: Bundle, stack: StackRecord) -> list[Observation]:
    """What an endpoint with a recorded stack would have answered to the one-token probes."""
    from reference import _answers

    return _answers(bundle, stack)


def quantiles(needed: Floats) -> tuple[float, float]:
    """Median and 90th percentile; infinity where audits did not get there."""
    return float(np.quantile(needed, 0.5, method="higher")), float(np.quantile(needed, 0.9, method="higher"))


def clopper_pearson_zero(n: int) -> float:
    """The 95 % upper limit of a share of which none was seen in n."""
    return float(1 - 0.05 ** (1 / n))


# -- honest stacks whose family the library lacks --------------------------------------------------------------


def left_out_families(
    document: Document, bundle: Bundle, policy: Policy, draws: int, generator: np.random.Generator
) -> None:
    """False `differs`, `consistent`, and the largest evidence at the worst moment, for every honest stack."""
    stacks = bundle.manifest.stacks
    pool = bundle.pool_at("L3")
    assert pool is not None
    families: set[str] = set()
    worst: dict[str, float] = {}
    needed: list[float] = []
    cause_e, cause_bf = {}, {}
    differs = total = in_class = 0
    for stack in (s for s in stacks if s.departure is None and s.id != bundle.manifest.reference_stack):
        kept = keeping(
            bundle,
            {
                s.id
                for s in stacks
                if s.departure is not None or s.family != stack.family or s.id == bundle.manifest.reference_stack
            },
        )
        library = build_library(kept, policy, 20)
        found = line_up(library, recorded_answers(bundle, stack))
        null = library.null_for(grid_step(found.endpoint_nats))
        if null is None:
            document.reported[f"left out {stack.id}"] = "no honest stack of its grid is left: inconclusive"
            continue
        families.add(stack.family)
        in_class += null.grid_nats > 0
        features = drawn(features_of(found), draws, generator)
        log_total = against_honest(library, null, features, policy)
        reached = answers_to_differ(library, null, features, policy)
        differs += int(np.isfinite(reached).sum())
        total += draws
        worst[stack.id] = float(log_total.max() / LOG10)
        needed += answers_to_consistent(library, null, features, policy).tolist()
        ever_e, ever_bf = ever_ten(
            library, recorded_answers(bundle, stack), policy, generator, 10 if draws > 100 else 3
        )
        cause_e[stack.id], cause_bf[stack.id] = ever_e, ever_bf
    largest = max(worst.values())
    document.figures["honest_differs"] = Figure(
        differs, f"of {total} audits of {len(worst)} stacks, each family left out", "0", differs == 0
    )
    document.figures["honest_largest_log10_e"] = Figure(
        largest, "at the worst moment of any audit", "<= 3 (moonshot 2)", largest <= 3
    )
    document.figures["honest_stacks"] = Figure(
        len(worst), "stacks left out with their family", ">= 12", len(worst) >= 12
    )
    document.figures["honest_stacks_bf16_class"] = Figure(
        in_class, "of them with logits in bfloat16", ">= 6", in_class >= 6
    )
    document.reported["error_bound_draws_95"] = clopper_pearson_zero(total) if differs == 0 else None
    document.reported["error_bound_families_95"] = (
        f"{clopper_pearson_zero(len(families)):.2f}: {len(families)} families ({', '.join(sorted(families))})"
        if differs == 0
        else None
    )
    document.reported["honest_largest_log10_e_by_stack"] = worst
    within = float((np.array(needed) <= 40).mean())
    document.figures["honest_consistent_within_40"] = Figure(within, "share of audits", ">= 0.9", within >= 0.9)
    for name, found_, target in (("e_value", cause_e, 0.10), ("bayes_factor", cause_bf, 0.05)):
        share = max(found_.values())
        document.figures[f"honest_{name}_ever_10"] = Figure(
            share, "largest share of a left-out stack's audits", f"<= {target}", share <= target
        )
    document.reported["honest_ever_10_by_stack"] = {
        s: {"e_value": cause_e[s], "bayes_factor": cause_bf[s]} for s in cause_e
    }


def ever_ten(
    library: Library, observations: list[Observation], policy: Policy, generator: np.random.Generator, audits: int
) -> tuple[float, float]:
    """Shares of audits in which any cause's e-value, or Bayes factor, reaches 10 at any of the moments looked at."""
    ever_e = ever_bf = 0
    for _ in range(audits):
        order = [observations[i] for i in generator.permutation(len(observations))[:40]]
        seen_e = seen_bf = False
        for n in (3, 5, 8, 12, 20, 30, 40):
            evidence = weigh(library, line_up(library, order[:n]), policy)
            assert evidence is not None
            rows = weigh_causes(library, evidence, policy)
            seen_e |= any(row.log10_e_value >= 1 for row in rows)
            seen_bf |= any((row.log10_bayes_factor or 0) >= 1 for row in rows)
        ever_e += seen_e
        ever_bf += seen_bf
    return ever_e / audits, ever_bf / audits


# -- departures served on other engines ------------------------------------------------------------------------

GROUPS: dict[str, tuple[Callable[[str], bool], int, int]] = {
    "weights_of_at_most_4.5_bits": (lambda v: v.startswith(("int4", "nf4", "mxfp4", "q4_0", "int3", "int2")), 3, 4),
    "fp8_weights": (lambda v: v in ("fp8-e4m3", "fp8-e4m3-tensor"), 4, 6),
    "int8_weights_per_channel": (lambda v: v == "int8", 12, 25),
    "q8_0_dequantised": (lambda v: v == "int8-g32", 30, 40),
    "kv_cache_fp8": (lambda v: v == "kv-fp8", 15, 30),
}  # fmt: skip


def requests(
    document: Document,
    answered: list[Answered],
    library: Library,
    policy: Policy,
    draws: int,
    generator: np.random.Generator,
) -> None:
    """Requests to e ≥ 1000 for everything that was served, and beside the bound."""
    rows: dict[str, dict[str, Any]] = {}
    needed: dict[str, list[Floats]] = defaultdict(list)
    for a in answered:
        features = drawn(a.features, draws, generator)
        reached = answers_to_differ(library, a.null, features, policy)
        median, p90 = quantiles(reached)
        bound = bound_by_size(a)
        rows[a.served.name] = {
            "median": median, "p90": p90, "reached_share": float(np.isfinite(reached).mean()), "noise_nats": float(np.exp(a.features.log_scales.mean())),
            "limit_nats": a.null.limit_nats, "bound_by_size": bound, "power": {str(n): float((reached <= n).mean()) for n in BUDGETS},
        }  # fmt: skip
        if a.served.variant is not None:
            needed[a.served.variant].append(reached)
    document.reported["requests_to_1000"] = rows
    for group, (belongs, most_median, most_p90) in GROUPS.items():
        members = {v: found for v, found in needed.items() if belongs(v)}
        if not members:
            continue
        worst = max((quantiles(f) for found in members.values() for f in found), key=lambda q: (q[0], q[1]))
        p90 = max(quantiles(f)[1] for found in members.values() for f in found)
        document.figures[f"{group}_median"] = Figure(
            worst[0],
            f"requests, the worst of {', '.join(members)} and engines",
            f"<= {most_median}",
            worst[0] <= most_median,
        )
        document.figures[f"{group}_p90"] = Figure(p90, "requests, the worst of them", f"<= {most_p90}", p90 <= most_p90)
    ratios = {
        name: row["median"] / row["bound_by_size"]
        for name, row in rows.items() if np.isfinite(row["bound_by_size"]) and row["bound_by_size"] >= 10 and np.isfinite(row["median"])
    }  # fmt: skip
    if ratios:
        largest = max(ratios.values())
        document.figures["requests_over_the_bound"] = Figure(
            largest, f"ratio of medians, largest of {', '.join(ratios)}", "<= 1.5", largest <= 1.5
        )
    document.reported["requests_over_the_bound_where_it_is_at_least_10"] = (
        ratios or "no served departure that is found has a bound of 10 or more"
    )


def bound_by_size(a: Answered) -> float:
    """log(1000) over the least Kullback-Leibler divergence from the served sizes to a moved honest stack's, both taken as normal."""
    x = a.features.log_scales
    mean, sd = float(x.mean()), float(x.std())
    if mean <= a.null.mean:
        return float("inf")
    honest = a.null.log_scales
    means, sds = np.nanmean(honest, axis=1), np.maximum(np.nanstd(honest, axis=1), 0.05)
    divergence = np.log(sds / sd) + (sd**2 + (mean - means) ** 2) / (2 * sds**2) - 0.5
    return float(np.log(1000) / divergence.min())


def eight_bit_caches(
    document: Document,
    bundle: Bundle,
    answered: list[Answered],
    policy: Policy,
    draws: int,
    generator: np.random.Generator,
) -> None:
    """8-bit integer KV caches: recorded on the same engine, on other arithmetic, by another quantiser, and against an honest twin."""
    stacks = bundle.manifest.stacks
    cases: dict[str, tuple[str, Bundle, Policy]] = {}
    for name, recorded in (("llamacpp-kv-q8_0", "llamacpp-kv-q8_0"), ("transformers-kv-int8", "kv-int8")):
        label = "same engine" if name.startswith("llamacpp") else "other arithmetic"
        cases[f"{label}: {name}"] = (name, bundle, policy)
        others = {s.id for s in stacks if s.id != recorded}
        cases[f"other quantiser: {name}"] = (name, keeping(bundle, others), policy)
    # The twin is the reference, and its own engine's honest stacks are all that it may differ from.
    for name, twin, family in (
        ("llamacpp-kv-q8_0", "llamacpp-f16", "llama.cpp/float16"),
        ("transformers-kv-int8", "hf-bfloat16-batch-1", "transformers/bfloat16"),
    ):
        on_grid = family == "transformers/bfloat16"
        own = {
            s.id
            for s in stacks
            if s.departure is None
            and s.family == family
            and not (on_grid and s.precision.logits != "bfloat16")
            and not s.id.startswith("emulated")
        }
        twins = keeping(bundle, own | {s.id for s in stacks if s.departure is not None and s.is_judged})
        twins = dataclasses.replace(twins, manifest=twins.manifest.model_copy(update={"reference_stack": twin}))
        cases[f"honest twin {twin}: {name}"] = (name, twins, policy.model_copy(update={"null_scale_floor_nats": 1e-3}))
    rows = {}
    for label, (name, kept, under) in cases.items():
        found = next((a for a in answered if a.served.name == name), None)
        if found is None:
            continue
        library = build_library(kept, under, 20)
        aligned = line_up(library, found.observations)
        null = library.null_for(grid_step(aligned.endpoint_nats))
        if null is None:
            continue
        reached = answers_to_differ(library, null, drawn(features_of(aligned), draws, generator), under)
        median, p90 = quantiles(reached)
        rows[label] = {"median": median, "p90": p90, "limit_nats": null.limit_nats, "noise_nats": float(np.exp(features_of(aligned).log_scales.mean())), "power": {str(n): float((reached <= n).mean()) for n in BUDGETS}}  # fmt: skip
    document.reported["eight_bit_kv_cache"] = rows
    for label, row in rows.items():
        if label.startswith("honest twin"):
            median = float(str(row["median"]))
            engine = label.rsplit(" ", 1)[1].split("-")[0]
            name = f"kv_cache_8_bit_against_twin_{engine}_median"
            document.figures[name] = Figure(median, f"requests; {label}", "<= 150", median <= 150)


def naming(
    document: Document,
    bundle: Bundle,
    answered: list[Answered],
    library: Library,
    policy: Policy,
    draws: int,
    generator: np.random.Generator,
) -> None:
    """Who is named at 25 answers, and, with the served departure taken out of the bank, at 50."""
    right: dict[str, list[bool]] = defaultdict(list)
    family: dict[str, list[bool]] = defaultdict(list)
    present: dict[str, list[bool]] = defaultdict(list)
    absent: dict[str, list[str]] = defaultdict(list)
    classes = {name_of(v): v.departure_class for v in library.variants}
    for a in (a for a in answered if a.served.variant is not None and a.served.variant in classes):
        variant = str(a.served.variant)
        moves = any(travels(v) for v in library.variants if name_of(v) == variant)
        without = build_library(
            keeping(bundle, {s.id for s in bundle.manifest.stacks if s.variant != variant}), policy, 20
        )
        for _ in range(draws):
            order = [a.observations[i] for i in generator.permutation(len(a.observations))]
            evidence = weigh(library, line_up(library, order[:25]), policy)
            assert evidence is not None
            best, exact, _ = nearest(evidence, library, policy)
            if moves:
                right[a.served.name].append(name_of(library.variants[best]) == variant)
                present[a.served.name].append(exact and name_of(library.variants[best]) == variant)
            else:
                family[a.served.name].append(library.variants[best].departure_class == classes[variant])
            left = weigh(without, line_up(without, order[:50]), policy)
            assert left is not None
            other, named, _ = nearest(left, without, policy)
            if named and left.log_total.max() >= np.log(policy.differs_e_value):
                absent[a.served.name].append(name_of(without.variants[other]))
            else:
                absent[a.served.name].append("")
    first = np.concatenate([np.array(v) for v in right.values()]) if right else np.zeros(0)
    document.figures["exact_variant_first_at_25"] = Figure(
        float(first.mean()),
        f"share of audits of {len(right)} served weight variants",
        ">= 0.98",
        bool(first.mean() >= 0.98),
    )
    kept = np.concatenate([np.array(v) for v in present.values()])
    document.figures["present_weight_variant_named_at_25"] = Figure(
        float(kept.mean()), "share of audits", ">= 0.95", bool(kept.mean() >= 0.95)
    )
    never = np.concatenate([np.array(v) == "" for v in absent.values()])
    document.figures["left_out_variant_never_another_exact_name_at_50"] = Figure(
        float(never.mean()),
        f"share of audits of {len(absent)} served departures",
        ">= 0.98",
        bool(never.mean() >= 0.98),
    )
    document.reported["named_right_by_variant"] = {
        k: float(np.mean(v)) for k, v in {**right, **{f"{k} (family)": v for k, v in family.items()}}.items()
    }
    document.reported["exactly_named_by_variant"] = {k: float(np.mean(v)) for k, v in present.items()}
    document.reported["false_exact_names"] = {k: sorted({n for n in v if n}) for k, v in absent.items() if any(v)}
    variants = {name_of(v) for v in library.variants}
    pairs = [p for p in SIBLINGS if set(p) <= variants]
    document.reported["bank"] = f"{len(variants)} variants, sibling pairs {', '.join('/'.join(p) for p in pairs)}"


def false_consistent(
    document: Document,
    bundle: Bundle,
    answered: list[Answered],
    policy: Policy,
    draws: int,
    generator: np.random.Generator,
) -> None:
    """How often a served departure that the bank lacks is called consistent within 40 answers."""
    shares = {}
    for a in (a for a in answered if a.served.variant is not None):
        without = build_library(
            keeping(bundle, {s.id for s in bundle.manifest.stacks if s.variant != a.served.variant}), policy, 20
        )
        found = line_up(without, a.observations)
        null = without.null_for(grid_step(found.endpoint_nats))
        assert null is not None
        features = drawn(features_of(found), draws, generator)
        consistent = answers_to_consistent(without, null, features, policy)
        differs = answers_to_differ(without, null, features, policy)
        shares[a.served.name] = float(((consistent <= 40) & (differs > consistent)).mean())
    document.reported["false_consistent_when_not_recorded"] = {k: v for k, v in shares.items() if v > 0} or "none"


# -- the field -------------------------------------------------------------------------------------------------


def distributions(library: Library, variant: int | None, stack: int) -> Floats:
    """Probabilities of the reference's 128 tokens and of all others, for a departure on an honest stack."""
    bundle = library.bundle
    values = bundle.logprobs_nats[bundle.stack_index[library.honest[stack].id]].astype(np.float64)[library.rows]
    if variant is not None:
        moves = travels(library.variants[variant])
        values = (values if moves else library.reference_nats) + library.differences_nats[variant]
    p = np.exp(np.nan_to_num(values, nan=-30.0))
    p = p / np.maximum(p.sum(axis=1, keepdims=True), 1.0)
    return np.concatenate([p, np.maximum(1e-6, 1 - p.sum(axis=1, keepdims=True))], axis=1)


def beside_the_field(
    document: Document,
    library: Library,
    policy: Policy,
    audits: int,
    generator: np.random.Generator,
) -> dict[str, dict[str, dict[int, float]]]:
    """Power against requests, every method at an error rate of 1/1000, on the same departures and probes."""
    ids = [v.id for v in library.variants]
    engine = next(i for i, s in enumerate(library.honest) if s.id == "hf-bfloat16")
    reference = np.concatenate(
        [
            np.exp(library.reference_nats),
            np.maximum(1e-6, 1 - np.exp(library.reference_nats).sum(axis=1, keepdims=True)),
        ],
        axis=1,
    )
    curves: dict[str, dict[str, dict[int, float]]] = {}
    tokens: dict[str, dict[str, float | None]] = {}
    per_request = float(
        np.mean([library.bundle.prompt_tokens[0, library.bundle.probe_index[p]] for p in library.probe_ids])
    )
    for name in ("honest", *PLOTTED):
        variant = None if name == "honest" else ids.index(name)
        served = distributions(library, variant, engine)
        ours = (
            features_of(line_up(library, recorded_answers(library.bundle, library.honest[engine])))
            if variant is None
            else put_on(library, variant, engine)
        )
        null = library.null_for(0.125)
        assert null is not None
        reached = answers_to_differ(library, null, drawn(ours, audits, generator), policy)
        rows: dict[str, dict[int, float]] = {"ours, L3": {n: float((reached <= n).mean()) for n in BUDGETS}}
        reference_nats = np.log(reference[:, :-1])
        answers = served[:, :-1].argmax(axis=1)
        margins = peers.greedy_margin(reference_nats, answers)
        honest_margins = [
            peers.greedy_margin(reference_nats, distributions(library, None, i)[:, :-1].argmax(axis=1))
            for i in range(len(library.honest))
        ]
        for method in ("Token-DiFR margin", "MET", "G-test", "RUT"):
            rows[method] = {}
        for n in (*BUDGETS, 250, 1000, 4000):
            if n <= 100:
                orders = np.argsort(generator.random((audits, len(margins))), axis=1)[:, :n]
                threshold = max(
                    float(np.quantile(h[orders].mean(axis=1), 1 - ALPHA, method="higher")) for h in honest_margins
                )
                rows["Token-DiFR margin"][n] = float((margins[orders].mean(axis=1) > threshold).mean())
            if n < 25:
                continue
            # Their protocol: 25 prompts, the rest of the budget in repeated samples at temperature 1.
            chosen = generator.permutation(len(served))[:25]
            each = n // 25
            if each > 1:
                rows["MET"][n] = peers.model_equality_testing(
                    reference[chosen], served[chosen], each, audits, ALPHA, generator
                )
            rows["G-test"][n] = peers.g_test(reference[chosen], served[chosen], each, audits, ALPHA, generator)
            if n <= 1000:
                # One sample a prompt; beyond the pool a prompt may come again.
                own = (
                    generator.permutation(len(served))[:n]
                    if n <= len(served)
                    else generator.integers(len(served), size=n)
                )
                rows["RUT"][n] = peers.rank_uniformity(reference[own], served[own], 50, ALPHA, generator)
        curves[name] = rows
        exact = (served * np.log(served / reference)).sum(axis=1).mean()
        document.reported[f"text bound {name}"] = (
            f"{np.log(1000) / max(exact, 1e-12):.0f} sampled tokens for the exact likelihood ratio at temperature 1"
        )
        if variant is not None:
            tokens[name] = {
                m: next((n * (per_request + 1) for n in sorted(c) if c[n] >= 0.9), None) for m, c in rows.items()
            }
    document.reported["power_by_requests"] = curves
    document.reported["tokens_to_power_0.9_at_0.001"] = tokens
    for name, row in tokens.items():
        own_tokens = row["ours, L3"]
        if own_tokens is None:
            continue
        for method in ("MET", "RUT"):
            other = row[method]
            most = max(curves[name][method]) * (per_request + 1)
            document.reported[f"tokens {method} over ours, {name}"] = (
                f"{other / own_tokens:.0f}"
                if other
                else f"more than {most / own_tokens:.0f} (power {curves[name][method][max(curves[name][method])]:.2f} at {max(curves[name][method])} requests)"
            )
    return curves


def validate_peers(document: Document, generator: np.random.Generator) -> None:
    """Our form of MET's statistic against the authors' package; the tracker's test on honest hosts that do not change."""
    try:
        import torch
        from model_equality_testing.distribution import CompletionSample
        from model_equality_testing.tests import mmd_hamming
    except ImportError:
        document.reported["MET validated against its package"] = "no: install the extra bench"
    else:
        worst = 0.0
        for _ in range(5):
            p = generator.dirichlet(np.full(6, 0.5), 4)
            one, other = peers.sample(p, 1, 7, generator), peers.sample(p, 1, 7, generator)
            prompts = np.repeat(np.arange(4), 7)
            theirs = [
                CompletionSample(torch.tensor(prompts), torch.tensor(s[0].reshape(-1, 1)), m=4) for s in (one, other)
            ]
            worst = max(worst, abs(float(mmd_hamming(*theirs)) - float(peers.hamming_mmd(one, other, 6)[0])))
        document.figures["met_statistic_difference_from_package"] = Figure(
            worst, "largest of 5 samples", "<= 1e-9", worst <= 1e-9
        )


def tracker(document: Document, library: Library, generator: np.random.Generator) -> None:
    """The log-probability tracker, used against a reference instead of an endpoint's own past: ten requests of one prompt."""
    bundle = library.bundle
    rejected = []
    for stack in library.honest:
        values = bundle.logprobs_nats[bundle.stack_index[stack.id]].astype(np.float64)[library.rows[0]][None, :20]
        windows = np.repeat(values, 10, axis=0), np.repeat(library.reference_nats[0][None, :20], 10, axis=0)
        rejected.append(peers.tracking_p_value(*windows, 2000, generator) < ALPHA)
    document.reported["LT with a permutation test, against the reference"] = (
        f"rejects {sum(rejected)} of {len(rejected)} honest stacks at 1/1000 with 10 requests a window: deterministic servers repeat themselves, so any difference of engine counts; it is made for an endpoint's own past"
    )  # fmt: skip


# -- speed, memory, levels -------------------------------------------------------------------------------------


def judging(document: Document, bundle: Bundle, policy: Policy) -> None:
    """Time and memory of judging 10,000 recorded exchanges: so many whole audits of the pool."""
    library = build_library(bundle, policy, 20)
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True
    )
    observations = recorded_answers(bundle, next(s for s in bundle.manifest.stacks if s.id == "hf-bfloat16"))
    plan = make_plan(
        Endpoint(name="recorded", base_url="http://127.0.0.1:1/v1", model="recorded"), policy, bundle, seed="x"
    )
    whole = -(-10_000 // len(observations))

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            case = open_case(plan, capability, observations, library)
            judge(
                case,
                requests_sent=len(observations),
                stopped_because="decided",
                all_observations=observations,
                observations_sha256="0" * 64,
            )
        return time.perf_counter() - started

    run(1)
    half = run(whole // 2)
    after_half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    second = run(whole - whole // 2)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - after_half
    document.figures["judging_10000_exchanges"] = Figure(
        half + second, f"s, {whole} audits of {len(observations)}", "< 2", half + second < 2
    )
    document.figures["judging_memory_growth"] = Figure(
        grown / 1024, "MiB from 5,000 to 10,000 exchanges", "<= 64", grown <= 64 * 1024
    )


def levels(
    document: Document, bundle: Bundle, chosen: list[Served], policy: Policy, draws: int, generator: np.random.Generator
) -> None:
    """Requests to e ≥ 1000 at the levels L1 and L2, from answers over HTTP."""
    rows: dict[str, dict[str, str]] = {}
    for level in ("L1", "L2"):
        library = build_library(bundle, policy, 20, level)
        known = {name_of(v) for v in library.variants} | {None}
        for s in chosen:
            if (level == "L1" and s.engine != "transformers") or s.variant not in known:
                continue
            a = lined_up(s, bundle, library, level)
            features = drawn(a.features, draws, generator)
            reached = answers_to_differ(library, a.null, features, policy)
            median, p90 = quantiles(reached)
            consistent = answers_to_consistent(
                library, a.null, features, policy_for_pool(policy, len(library.probe_ids))
            )
            rows.setdefault(s.name, {})[level] = (
                f"differs in {np.isfinite(reached).mean():.2f} of draws, median {median:g}, 90 % {p90:g} of {len(library.probe_ids)} texts; noise {np.exp(a.features.log_scales.mean()):.3f} nats; excludes all in {np.isfinite(consistent).mean():.2f}"
            )
    document.reported["levels"] = rows


def policy_for_pool(policy: Policy, pool: int) -> Policy:
    """A policy whose least number of answers fits a small pool, as the judge takes it."""
    return policy.model_copy(update={"min_answers_consistent": min(policy.min_answers_consistent, pool)})


def plot(curves: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Power against requests, one picture for each departure."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Picture

    with mpl.rc_context(
        {
            "svg.hashsalt": "weighbridge",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        picture = Picture(figsize=(9, 6.2), layout="constrained")
        axes = picture.subplots(2, 2, sharex=True, sharey=True).ravel()
        styles = {
            "ours, L3": ("#9b2d1f", "-", "o"),
            "Token-DiFR margin": ("#1d2733", "--", "s"),
            "MET": ("#3b6ea5", "-.", "^"),
            "G-test": ("#66717e", ":", "v"),
            "RUT": ("#5e8c4a", (0, (5, 1)), "x"),
        }
        for axis, name in zip(axes, PLOTTED, strict=True):
            for method, curve in curves[name].items():
                if not curve:
                    continue
                colour, line, marker = styles[method]
                n = sorted(curve)
                axis.plot(
                    n, [curve[i] for i in n], color=colour, linestyle=line, marker=marker, markersize=4, label=method
                )
            axis.set_xscale("log")
            axis.set_title(f"{name}, on bfloat16 arithmetic", loc="left")
            axis.set_ylim(-0.02, 1.02)
        for axis in axes[2:]:
            axis.set_xlabel("one-token requests")
        for axis in (axes[0], axes[2]):
            axis.set_ylabel("power at an error rate of 1/1000")
        axes[0].legend(frameon=False, loc="center right", fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(
            path, format=path.suffix.lstrip("."), metadata={"Date": None} if path.suffix == ".svg" else None
        )


def table(document: Document, curves: dict[str, dict[str, dict[int, float]]]) -> str:
    """The figures, the requests and the field's powers as Markdown."""
    lines = [
        "# benchmarks/power.py",
        "",
        f"Commit {document.as_json()['commit'][:12]}. Bundle smollm2-135m-instruct.",
        "",
        "| | figure | value | target |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {'holds' if f.holds else '**missed**'} | {name.replace('_', ' ')} ({f.unit}) | {f.value:.4g} | {f.target} |"
        for name, f in document.figures.items()
    ]
    lines += [
        "",
        "Requests to e ≥ 1000, over HTTP:",
        "",
        "| served | noise, nats | limit | median | 90 % |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['noise_nats']:.3f} | {row['limit_nats']:.3f} | {row['median']:g} | {row['p90']:g} |"
        for name, row in document.reported["requests_to_1000"].items()
    ]
    for name, methods in curves.items():
        budgets = sorted({n for curve in methods.values() for n in curve})
        lines += [
            "",
            f"Power at an error rate of 1/1000 by one-token requests: {name}, on bfloat16 arithmetic",
            "",
            "| method | " + " | ".join(map(str, budgets)) + " |",
            "|---|" + "---|" * len(budgets),
        ]
        lines += [
            f"| {m} | " + " | ".join(f"{c[n]:.2f}" if n in c else "" for n in budgets) + " |"
            for m, c in methods.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write power.json, power.md and power.svg into this folder")
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    bundle, policy = load_bundle("smollm2-135m-instruct"), load_policy("strict")
    library = build_library(bundle, policy, 20)
    document = Document("power")
    draws = 100 if arguments.quick else 200
    names = [s for s in DEPARTURES if not arguments.quick or s.name in QUICK]
    answered = [lined_up(s, bundle, library) for s in names]
    say("honest stacks")
    left_out_families(document, bundle, policy, draws if arguments.quick else 300, generator)
    honest = [lined_up(s, bundle, library) for s in HONEST if not arguments.quick or s.engine == "llamacpp"]
    for a in honest:
        reached = answers_to_differ(library, a.null, drawn(a.features, draws, generator), policy)
        document.reported[f"served {a.served.name}"] = f"differs in {int(np.isfinite(reached).sum())} of {draws}"
    say("departures")
    requests(document, answered, library, policy, draws, generator)
    naming(document, bundle, answered, library, policy, 3 if arguments.quick else 20, generator)
    false_consistent(document, bundle, answered, policy, draws, generator)
    eight_bit_caches(document, bundle, answered, policy, draws, generator)
    say("the field")
    validate_peers(document, generator)
    tracker(document, library, generator)
    curves = beside_the_field(document, library, policy, 100 if arguments.quick else 300, generator)
    if not arguments.quick:
        say("levels")
        levels(
            document, bundle, [s for s in (*HONEST, *DEPARTURES) if s.name in AT_ALL_LEVELS], policy, draws, generator
        )
    judging(document, bundle, policy)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot(curves, arguments.out / "power.svg")
        (arguments.out / "power.json").write_text(
            json.dumps(document.as_json(), indent=1, sort_keys=True) + "\n", "utf-8"
        )
        (arguments.out / "power.md").write_text(table(document, curves), "utf-8")
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
