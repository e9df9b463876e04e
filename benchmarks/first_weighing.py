"""How often honest stacks are believed, and how many requests a departure takes.

Every probe of the pool is really sent, once, to a lab endpoint of each variant; the exchanges are kept under
.benchmarks-cache/ and audits are drawn from them again and again, as the keyed draw of an audit would draw them.
No threshold of a verdict was chosen on these exchanges: they stand in the policy file with their sources. The rule that
names a family of departures (its whole interval, not its mean) was tightened after a first look at them.

    python benchmarks/first_weighing.py [--quick] [--seed 1] [--json]
"""

import argparse
import dataclasses
import sys

import numpy as np

from figures import CACHE, Document, Figure, say
from weighbridge.audit import collect_run
from weighbridge.capability import read_capability
from weighbridge.judge.checks.weights import differs_after
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import judge
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.probes import draw
from weighbridge.records import Capability, Endpoint, Limits, Observation, Plan
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.store import RunFolder

HONEST = ("f16", "f16-busy", "f16-one-thread", "bf16", "bf16-busy", "bf16-small-batch", "f32-one-thread")
ALTERED = (
    "q8_0",
    "q4_0",
    "int8",
    "fp8-e4m3",
    "int4-g64",
    "int3-g64",
    "kv-q8_0",
    "kv-q4_0",
    "depth-24",
    "hidden-system",
    "missing-bos",
    "no-default-system",
)
QUICK = ("f16", "bf16-busy", "q8_0", "q4_0")
QUICK_PROBES = 150
AUDIT_REQUESTS = 100  # the default of `weighbridge audit`


def collected(name: str, bundle: Bundle, probes: int) -> tuple[Plan, Capability, list[Observation]]:
    """Every probe's answer from one variant, collected now or before."""
    policy = load_policy("strict").model_copy(update={"differs_e_value": 1e300, "consistent_e_value": 1e300})
    folder = RunFolder(CACHE / "first-weighing" / bundle.identity.digest[:12] / f"{name}-{probes}")
    if not (folder.path / "plan.json").exists():
        endpoint = Endpoint(
            name=name,
            base_url="http://127.0.0.1:1/v1",
            model=MODEL_NAME,
            limits=Limits(max_requests=probes + 2, concurrency=VARIANTS[name].settings.slots),
        )
        RunFolder.create(folder.path, make_plan(endpoint, policy, bundle, seed="collect"))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        with lab_endpoint(VARIANTS[name], Lies(), say) as front:
            say(f"collecting {name}: {len(plan.probe_requests)} probes")
            endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
            collect_run(folder, plan, endpoint, bundle, None, lambda _: None)
    observations = observe(plan, folder.exchanges()[0])
    capability = read_capability({k: v for k, v in observations.items() if k.startswith("capability")})
    return plan, capability, [o for k, o in observations.items() if not k.startswith("capability")]


def audit_again(
    plan: Plan, capability: Capability, answers: list[Observation], library: Library, seed: str
) -> tuple[str, str | None, str | None, int | None, str]:
    """One audit from recorded answers: verdict, cause, exact variant, answers until `differs`, outcome on weights."""
    by_probe = {o.probe_id: o for o in answers}
    order = [by_probe[p] for p in draw(sorted(by_probe), seed)][:AUDIT_REQUESTS]
    again = plan.model_copy(update={"policy": load_policy("strict")})
    case = open_case(again, capability, order, library)
    assert case.evidence is not None
    reached = differs_after(case.evidence, again.policy)
    if reached is not None:
        # Answers without logprobs were asked for all the same.
        with_logprobs = np.cumsum([o.top is not None for o in order])
        reached = int(np.searchsorted(with_logprobs, reached)) + 1
        case = open_case(again, capability, order[: max(reached, again.policy.min_counted)], library)
    _, verdict = judge(
        case, requests_sent=len(order), stopped_because="decided", all_observations=order, observations_sha256="0" * 64
    )
    return verdict.verdict, verdict.cause, verdict.exact_variant, reached, verdict.axes["weights"]


def keeping(bundle: Bundle, stack_ids: set[str]) -> Bundle:
    """The bundle as if only these stacks had been recorded."""
    keep = [i for i, s in enumerate(bundle.manifest.stacks) if s.id in stack_ids]
    manifest = bundle.manifest.model_copy(update={"stacks": [bundle.manifest.stacks[i] for i in keep]})
    return dataclasses.replace(bundle, manifest=manifest, logprobs_nats=bundle.logprobs_nats[keep])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bundle = load_bundle("smollm2-135m-instruct")
    probes = QUICK_PROBES if arguments.quick else len(bundle.usable_probe_ids)
    policy = load_policy("strict")
    library = build_library(bundle, policy, 20)
    document = Document("first-weighing")
    document.reported["probes_collected_per_variant"] = probes
    honest_rows = []
    for name in (n for n in HONEST if not arguments.quick or n in QUICK):
        recorded = collected(name, bundle, probes)
        rows = [audit_again(*recorded, library, f"{arguments.seed}-{name}-{d}") for d in range(10)]
        honest_rows += rows
        document.reported[f"honest {name}"] = (
            f"{sum(r[0] == 'consistent' for r in rows)} of {len(rows)} consistent, {sum(r[0] == 'differs' for r in rows)} differ"
        )
    false = sum(row[0] == "differs" for row in honest_rows)
    believed = sum(row[0] == "consistent" for row in honest_rows) / len(honest_rows)
    document.figures["honest_differs"] = Figure(false, f"of {len(honest_rows)} audits", "0", false == 0)
    document.figures["honest_consistent_share"] = Figure(believed, "share", ">= 0.9", believed >= 0.9)
    for name in (n for n in ALTERED if not arguments.quick or n in QUICK):
        recorded = collected(name, bundle, probes)
        rows = [audit_again(*recorded, library, f"{arguments.seed}-{name}-{d}") for d in range(20)]
        needed = np.array([np.inf if r[3] is None else r[3] for r in rows])
        right = sum(r[0] == "differs" and r[1] == VARIANTS[name].departure for r in rows)
        median, p90 = float(np.median(needed)), float(np.quantile(needed, 0.9, method="higher"))
        blamed = sum(r[4] == "inconsistent" for r in rows)
        document.reported[f"altered {name}"] = (
            f"median {median:g}, 90 % {p90:g} answers; cause right in {right} of 20; weights blamed in {blamed}"
        )
        for target_name, limit in (("q8_0", 25), ("q4_0", 5)):
            if name == target_name:
                document.figures[f"{name}_median_answers"] = Figure(
                    median,
                    "one-token answers",
                    f"<= {limit}",
                    median <= limit,
                    (float(needed.min()), float(needed.max())),
                )
        if name in {s.variant for s in bundle.manifest.stacks}:
            unknown = build_library(
                keeping(bundle, {s.id for s in bundle.manifest.stacks if s.variant != name}), policy, 20
            )
            rows = [audit_again(*recorded, unknown, f"{arguments.seed}-{name}-{d}") for d in range(20)]
            causes = sorted({f"{r[0]}, {r[1]}" for r in rows})
            names = sum(r[2] is not None for r in rows)
            document.reported[f"altered {name}, not recorded"] = (
                f"{'; '.join(causes)}; exactly named (falsely) in {names} of 20"
            )
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
