"""Endpoints that return only text: what is found there, in how many requests, beside the field's methods and the bound.

*What calibrates.* The recorded honest stacks and departures of the bundle (most of them transformers in float32; what llama.cpp, vLLM
and bfloat16 gave besides) and the library's own contexts, as in every audit; every threshold is the policy's or follows from these records. How the
wealth is spread over bets (`NOISE_MULTIPLES`, `ON_SIZES`, `SCALES`) was chosen on the recorded departures too, and on nothing that was served; of the departures
that are reported on, these choices have seen the recordings.

*What is reported on.* Answers that were really served, over HTTP and without logprobs, on llama.cpp or on transformers in bfloat16: every
context that is asked at temperature 0, once more where the answer is not the reference's, and one token at temperature 1 for each of the
one-token pool's probes. They are kept under .benchmarks-cache/texts/, and audits are drawn from them again and again in random orders.
Servers ran on one thread. llama.cpp's q4_0 and q8_0 are recorded on the engine that serves them here; all other departures that llama.cpp
serves are recorded on transformers. On transformers the recorded ones are float32, but for int4-g64, nf4-g64, fp8-e4m3 and int8, which
are recorded in bfloat16 too. The pool for text was chosen with int8, fp8-e4m3, both W8A8, nf4-g64, int4-g64 and int5-g64 in float32 and with one
honest stack in sight: for those it is targeted; q4_0, q8_0, int6-g64, the KV caches and depth-24, and all that is served here, it has not seen.

*What is simulated, and says so.* Honest stacks whose family is left out, and departures of whose class the library holds none: drawn from their recorded distributions. Model Equality Testing
and the rank-based uniformity test: drawn from the served variant's recorded distribution, since they ask each prompt many times. The
intervals of the share of requests that go elsewhere.

    python benchmarks/text_only.py [--quick] [--seed 1] [--json] [--cached] [--only L4,L5,honest,evasion,share,unrecorded] [--out reports]

Needs the extras lab and hf.
"""

import argparse
import asyncio
import dataclasses
import json
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import peers
from figures import CACHE, Document, Figure, say, share
from first_weighing import keeping
from served import DEPARTURES as SERVED
from served import HONEST, Served
from text_report import plot, table
from weighbridge.audit import Auditor, collect_run, judge_run
from weighbridge.collect import Collector
from weighbridge.errors import RunFolderError
from weighbridge.judge.checks.texts import exact_variant, is_consistent_text, text_differs_after, text_explanation
from weighbridge.judge.policy import load_policy
from weighbridge.judge.texts import (
    NOT_COLD,
    NOT_COLD_SHARE,
    TextEvidence,
    TextLibrary,
    build_text_library,
    excludable,
    weigh_texts,
)
from weighbridge.judge.verdict import ENOUGH_FOR_A_PROMPT
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS, TorchVariant, Variant
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Limits, Observation, Plan, PlannedRequest, Policy, again_twin, drawn_twin
from weighbridge.reference.bundle import Bundle, StackRecord, load_bundle
from weighbridge.reference.contexts import Contexts
from weighbridge.stats.draws import at_temperature
from weighbridge.stats.evidence import first_crossing
from weighbridge.stats.mixtures import anytime_share_interval, measured_rates, share_interval
from weighbridge.stats.texts import answer_log_likelihood
from weighbridge.store import RunFolder

Floats = NDArray[np.float64]
Generator = np.random.Generator
BUNDLE = "smollm2-135m-instruct"
LOG10 = float(np.log(10))
ALPHA = 1e-3
POWER = 0.9
ORDERS = 300
# Where most orders use up the pool, which takes long, only their share is of interest.
ORDERS_OF_THE_UNREACHED = 60
ORDERS_NAMED = 60
STEPS = (8, 16, 32, 64, 128)
LIMITS = (100, 300)  # --max-requests: its default, and enough for all contexts with their repeats
ASKED = {served.name: served for served in (*HONEST, Served("llamacpp", None, VARIANTS["bf16"]), *SERVED)}
HONEST_NAMES = ("llamacpp-f16", "llamacpp-bf16", "transformers-bf16")
# In the order of the collection: what matters most comes first.
COLD = (
    "llamacpp-q4_0", "llamacpp-f16", "llamacpp-int4-g64", "llamacpp-fp8-e4m3", "transformers-w8a8-int8", "transformers-w8a8-fp8",
    "llamacpp-int8", "transformers-bf16", "transformers-fp8-e4m3", "llamacpp-int5-g64", "llamacpp-nf4-g64", "llamacpp-depth-24",
    "transformers-int4-g64", "transformers-int5-g64", "transformers-nf4-g64", "transformers-int8", "llamacpp-q8_0", "llamacpp-int6-g64",
    "transformers-depth-24", "transformers-kv-fp8", "transformers-kv-int4", "llamacpp-bf16",
)  # fmt: skip
DRAWN = (
    "llamacpp-q4_0", "llamacpp-f16", "llamacpp-int4-g64", "llamacpp-int5-g64", "transformers-int4-g64", "transformers-bf16",
    "transformers-int5-g64", "transformers-fp8-e4m3", "llamacpp-nf4-g64", "llamacpp-int8",
)  # fmt: skip
QUICK = ("llamacpp-q4_0", "llamacpp-f16", "llamacpp-int4-g64", "llamacpp-fp8-e4m3", "transformers-w8a8-int8")
QUICK_DRAWN = ("llamacpp-q4_0", "llamacpp-f16", "llamacpp-int4-g64")


# -- what was served ---------------------------------------------------------------------------------------------


class _Everything(Auditor):
    """Sends every request for text, whatever comes back: an audit stops as soon as it knows enough."""

    def __init__(self, folder: RunFolder, plan: Plan, endpoint: Endpoint, bundle: Bundle, *, drawn: bool) -> None:
        super().__init__(folder, plan, endpoint, bundle, None, lambda _: None)
        self._texts = build_text_library(bundle, plan.policy)
        self._drawn = drawn

    async def _all(self, collector: Collector) -> str:
        because = await self._capability(collector)
        if self._drawn:
            requests = [drawn_twin(request) for request in self._plan.probe_requests]
        else:
            requests = [twin for request in self._plan.text_requests for twin in (request, again_twin(request))]
        return because or await self._send_until(collector, requests, lambda _: None) or "probes_used_up"


@dataclass(frozen=True)
class Collected:
    """The answers of one endpoint, and the plan by which it was asked."""

    name: str
    plan: Plan
    observations: dict[str, Observation]

    @property
    def variant(self) -> str | None:
        """The recorded departure that was served."""
        return ASKED[self.name].variant


def _on_one_thread(what: Variant | TorchVariant) -> Variant | TorchVariant:
    """Two threads of a busy machine wait for each other."""
    if isinstance(what, TorchVariant):
        return dataclasses.replace(what, setting=what.setting.model_copy(update={"threads": 1}))
    return dataclasses.replace(what, settings=dataclasses.replace(what.settings, threads=1))


def folder_of(name: str, bundle: Bundle, *, drawn: bool) -> RunFolder:
    """Where the answers lie."""
    return RunFolder(CACHE / "texts" / bundle.identity.digest[:12] / (f"{name}-drawn" if drawn else name))


def answers_of(name: str, bundle: Bundle, *, drawn: bool = False) -> Collected:
    """What it answered at temperature 0 (each doubtful context twice), or at 1; asked now, or read from the cache."""
    folder = folder_of(name, bundle, drawn=drawn)
    if not (folder.path / "plan.json").exists():
        endpoint = _endpoint(folder.path.name, 1000)
        never = load_policy("strict").model_copy(update={"differs_e_value": 1e300, "consistent_e_value": 1e300})
        plan = make_plan(endpoint, never, bundle, seed="collect")
        nothing_else: dict[str, Any] = {"prompt_requests": [], "sampling_requests": [], "route_requests": []}
        RunFolder.create(folder.path, plan.model_copy(update=nothing_else))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        with lab_endpoint(_on_one_thread(ASKED[name].what), Lies(max_top_logprobs=0), say) as front:
            say(f"collecting {folder.path.name}")
            endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
            asyncio.run(_Everything(folder, plan, endpoint, bundle, drawn=drawn).run())
    return Collected(name, plan, observe(plan, folder.exchanges()[0]))


def _endpoint(name: str, max_requests: int) -> Endpoint:
    return Endpoint(
        name=name, base_url="http://127.0.0.1:1/v1", model=MODEL_NAME,
        limits=Limits(max_requests=max_requests, timeout_s=600),
    )  # fmt: skip


def is_collected(name: str, bundle: Bundle, *, drawn: bool) -> bool:
    """Whether the cache holds all of its answers."""
    return folder_of(name, bundle, drawn=drawn).exchanges()[1] is not None


def collect(bundle: Bundle, *, quick: bool, cached: bool) -> tuple[list[Collected], list[Collected]]:
    """Everything at temperature 0 and at 1; what the cache lacks is asked, the important ones first, or left out."""
    cold, drawn = (QUICK, QUICK_DRAWN) if quick else (COLD, DRAWN)
    found: list[list[Collected]] = [
        [answers_of(name, bundle, drawn=at_1) for name in names if not cached or is_collected(name, bundle, drawn=at_1)]
        for names, at_1 in ((cold, False), (drawn, True))
    ]
    return found[0], found[1]


# -- temperature 0 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What one random order of the contexts came to, in requests for text; infinity where it did not.

    ``answers`` are those looked at, ``consistent`` is when that is said under each of `LIMITS`.
    """

    answers: int
    differs: float
    consistent: tuple[float, ...]


def quantiles(needed: Floats) -> tuple[float, float]:
    """Median and 90th percentile; infinity where orders did not get there."""
    return float(np.quantile(needed, 0.5, method="higher")), float(np.quantile(needed, 0.9, method="higher"))


def _requests(evidence: TextEvidence, cold: list[PlannedRequest], answers: int) -> int:
    """Requests for so many answers: those in doubt are asked for again, and those that say nothing count as requests."""
    last = evidence.library.contexts.probe_ids[evidence.cold.places[answers - 1]]
    sent = [request.probe.id for request in cold].index(last) + 1
    return sent + sum(again is not None for again in evidence.cold.again[:answers])


@dataclass(frozen=True)
class Judge:
    """The library, and plans with each of `LIMITS`, all but for their probes."""

    library: TextLibrary
    policy: Policy
    plans: list[Plan]

    def weigh(self, cold: list[PlannedRequest], found: Collected) -> TextEvidence:
        """The evidence of some requests in this order."""
        plan = self.plans[0].model_copy(update={"text_requests": cold, "probe_requests": []})
        evidence = weigh_texts(self.library, plan, found.observations)
        assert evidence is not None
        return evidence

    def course(self, cold: list[PlannedRequest], found: Collected, first: int) -> Course:
        """What comes of one order; `first` answers are looked at before more are."""
        for most in (first, *(n for n in STEPS if n > first), len(cold)):
            evidence = self.weigh(cold[:most], found)
            after = text_differs_after(evidence, self.policy)
            if after is not None:
                break
        else:
            after = None
        consistent = tuple(self._consistent(plan, cold, found, evidence, after) for plan in self.plans)
        looked_at = evidence.answers if after is None else after
        return Course(looked_at, np.inf if after is None else _requests(evidence, cold, after), consistent)

    def _consistent(
        self, plan: Plan, cold: list[PlannedRequest], found: Collected, evidence: TextEvidence, differs: int | None
    ) -> float:
        """After how many requests an audit with this limit says `consistent`, if it does so before it ends otherwise."""
        wanted = excludable(self.library, plan) & np.array([
            isinstance(self.library.departure(i), StackRecord) for i in self.library.departures
        ])  # fmt: skip
        level = self.policy.consistent_e_value
        reached = [first_crossing(course, level) for course in evidence.log_exclusion[wanted]]
        if not reached or None in reached:
            return float("inf")
        after = max(self.policy.min_answers_consistent, *(n for n in reached if n is not None))
        always = (plan.route_requests, plan.capability_requests, plan.prompt_requests, plan.sampling_requests)
        left = plan.endpoint.limits.max_requests - sum(len(requests) for requests in always)
        if (
            after > evidence.answers
            or (differs is not None and differs <= after)
            or _requests(evidence, cold, after) > left
        ):
            return float("inf")
        assert is_consistent_text(self.weigh(cold[:after], found), plan)
        return _requests(evidence, cold, after)

    def named(self, cold: list[PlannedRequest], found: Collected) -> tuple[str, str | None]:
        """The class and the exact variant that an audit of this order names: it goes on a little once it differs, as audits do."""
        after = None
        for most in (*STEPS, len(cold)):
            after = text_differs_after(self.weigh(cold[:most], found), self.policy)
            if after is not None:
                break
        if after is None:
            return "does not differ", None
        for n in range(after, min(after + ENOUGH_FOR_A_PROMPT, len(cold)) + 1):
            evidence = self.weigh(cold[:n], found)
            best = text_explanation(evidence, self.policy)
            if best is not None:
                record = self.library.departure(best)
                if isinstance(record, StackRecord):
                    return str(record.departure_class), exact_variant(evidence, best, self.policy)
                return f"prompt: {record.id}", None
        return "none of these", None


GROUPS: dict[str, tuple[tuple[str, ...], int, int | None, str]] = {
    "weights_of_4_bits": (("q4_0", "int4-g64", "nf4-g64"), 5, 10, ""),
    "weights_of_about_5.5_bits": (("int5-g64",), 10, 20, ""),
    "w8a8": (("w8a8-int8", "w8a8-fp8"), 15, 35, ""),
    "fp8_weights": (("fp8-e4m3",), 25, 50, ""),
    "int8_weights": (("int8",), 100, None, ", exact variant recorded on another engine"),
    "q8_0": (("q8_0",), 100, None, ", recorded on the same engine; its noise is less than bfloat16's, and the pool holds no probes chosen for it"),
    "other_model": (("depth-24",), 10, None, ""),
}  # fmt: skip


def at_temperature_0(
    document: Document, judge: Judge, answered: list[Collected], orders: int, generator: Generator
) -> dict[str, tuple[float, float]]:
    """Requests to e ≥ 1000 and to `consistent` of everything that was served; median and 90 % by name."""
    rows: dict[str, dict[str, Any]] = {}
    reached: dict[str, tuple[float, float]] = {}
    known = {judge.library.contexts.probe_ids[place] for place in judge.library.cold}
    for found in answered:
        asked = [request for request in found.plan.text_requests if request.probe.id in known]
        courses: list[Course] = []
        for n in range(orders):
            if n >= ORDERS_OF_THE_UNREACHED and sum(np.isinf(c.differs) for c in courses) > len(courses) / 2:
                break
            # Most orders take about as many answers as the one before.
            first = min(len(asked), int(1.4 * courses[-1].answers) + 2) if courses else STEPS[0]
            courses.append(judge.course([asked[i] for i in generator.permutation(len(asked))], found, first))
        differs = np.array([c.differs for c in courses])
        consistent = np.array([c.consistent for c in courses])
        whole = judge.weigh(asked, found)
        row: dict[str, Any] = {
            "differs_median_p90": quantiles(differs), "share_of_orders_that_differ": float(np.isfinite(differs).mean()), "orders": len(courses),
            "contexts": whole.cold.count, "not_the_reference's": int(whole.flips.sum()), "did_not_come_again": whole.wavering,
            "log10_e_of_all": round(float(whole.log_total[-1] / LOG10), 1), "largest_log10_e": round(float(whole.log_total.max() / LOG10), 1),
            "consistent": {
                f"max-requests {limit}": f"{np.isfinite(needed).mean():.2f} of orders, median and 90 % {quantiles(needed)}"
                for limit, needed in zip(LIMITS, consistent.T, strict=True)
            },
        }  # fmt: skip
        row["bound_by_flips"] = round(bound_by_flips(judge.library, whole), 1)
        if np.isfinite(differs).any():
            names = [
                judge.named([asked[i] for i in generator.permutation(len(asked))], found)
                for _ in range(min(ORDERS_NAMED, orders))
            ]
            row["class_named"] = _counted([kind for kind, _ in names])
            row["exact_variant_named"] = _counted([str(exact) for _, exact in names])
        rows[found.name] = row
        reached[found.name] = quantiles(differs)
        say(f"temperature 0: {found.name}: {row}")
    document.reported["L4"] = rows
    document.reported["L4_contexts"] = (
        f"{judge.library.cold.size} contexts, of which {min(row['contexts'] for row in rows.values())} or more were asked; an honest stack may answer otherwise in {judge.library.flips_allowed:.3f} of them beyond its noise of {judge.library.limit_nats:.3f} nats"
    )
    _groups(document, answered, rows, reached)
    _consistency(document, answered, rows)
    return reached


def bound_by_flips(library: TextLibrary, whole: TextEvidence) -> float:
    """Requests, with repeats, for one who knows how often another answer comes, and not where: log 1000 over the divergence."""
    p = float(np.clip(whole.flips.mean(), 1e-9, 1 - 1e-9))
    at_most = library.flip_at_most[whole.cold.places]
    divergence = p * np.log(p / at_most) + (1 - p) * np.log((1 - p) / (1 - at_most))
    gained = float(np.where(p > at_most, divergence, 0.0).mean())
    return float(np.log(1000) / gained * (1 + p)) if gained > 0 else float("inf")


def _counted(names: list[str]) -> dict[str, float]:
    return {
        name: round(names.count(name) / len(names), 2) for name in sorted(set(names), key=names.count, reverse=True)
    }


def _groups(
    document: Document,
    answered: list[Collected],
    rows: dict[str, dict[str, Any]],
    reached: dict[str, tuple[float, float]],
) -> None:
    """The worst of each group of departures against its target."""
    for group, (variants, most_median, most_p90, remark) in GROUPS.items():
        members = [found.name for found in answered if found.variant in variants]
        if not members:
            continue
        median, p90 = (max(reached[name][i] for name in members) for i in (0, 1))
        shares = ", ".join(f"{name} {rows[name]['share_of_orders_that_differ']:.2f}" for name in members)
        what = f"one-token requests with repeats, the worst of {', '.join(members)}{remark}"
        if np.isinf(median):
            what += f"; share of orders that get there within the pool: {shares}"
        document.figures[f"L4_{group}_median"] = Figure(median, what, f"<= {most_median}", median <= most_median)
        if most_p90 is not None:
            document.figures[f"L4_{group}_p90"] = Figure(p90, "the worst of them", f"<= {most_p90}", p90 <= most_p90)


def _consistency(document: Document, answered: list[Collected], rows: dict[str, dict[str, Any]]) -> None:
    honest = [found.name for found in answered if found.variant is None]
    false = {name: rows[name]["share_of_orders_that_differ"] for name in honest}
    document.figures["L4_served_honest_differs"] = Figure(
        max(false.values(), default=0.0), f"share of orders, {', '.join(honest)}", "0", not any(false.values())
    )
    document.reported["L4_consistent_honest"] = {name: rows[name]["consistent"] for name in honest}
    document.reported["L4_consistent_though_not_honest"] = {
        found.name: rows[found.name]["consistent"]
        for found in answered
        if found.variant is not None and any(not s.startswith("0.00") for s in rows[found.name]["consistent"].values())
    } or "none"


def greedy_margins(judge: Judge, answered: list[Collected], orders: int, generator: Generator) -> dict[str, str]:
    """Token-DiFR's margin at temperature 0 on the same answers: requests for a power of 0.9 at 1/1000."""
    library, contexts = judge.library, judge.library.contexts
    reference = contexts.tokens_nats[0]
    honest = [
        peers.greedy_margin(reference[library.cold], contexts.likeliest[i, library.cold])
        for i in library.honest
        if contexts.recorded[i, library.cold].all()
    ]
    out = {}
    for found in (a for a in answered if a.variant is not None):
        evidence = judge.weigh(found.plan.text_requests, found)
        answers = np.array([columns[0] for columns in evidence.cold.columns])
        margins = peers.greedy_margin(reference[evidence.cold.places], answers)
        enough: float = np.inf
        for n in (3, 5, 10, 15, 25, 50, 75, 100, 150, len(margins)):
            draws = np.argsort(generator.random((max(orders, 300) * 10, len(margins))), axis=1)[:, :n]
            of_honest = np.argsort(generator.random((max(orders, 300) * 10, library.cold.size)), axis=1)[:, :n]
            threshold = max(float(np.quantile(h[of_honest].mean(axis=1), 1 - ALPHA, method="higher")) for h in honest)
            if (margins[draws].mean(axis=1) > threshold).mean() >= POWER:
                enough = n
                break
        out[found.name] = f"{enough:g}" if np.isfinite(enough) else f"> {len(margins)}"
    return out


# -- temperature 1 -------------------------------------------------------------------------------------------------

AT_MOST = {"q4_0": 60, "int4-g64": 60, "int5-g64": 250}
RATIO = 20
MET_TOKENS = (50, 75, 100, 150, 250, 400, 600, 1000, 1500, 2500, 4000)
RUT_TOKENS = (25, 50, 100, 150, 250, 500, 1000)
PROMPTS = 25  # of Model Equality Testing; the rest of its budget are repeated samples
PROMPT_DRAWS = 10  # over which its power is taken


def at_temperature_1(
    document: Document, judge: Judge, answered: list[Collected], orders: int, generator: Generator
) -> None:
    """Output tokens to e ≥ 1000 at temperature 1, beside the exact likelihood ratio and the field's methods."""
    library, contexts = judge.library, judge.library.contexts
    rows: dict[str, dict[str, Any]] = {}
    for found in answered:
        asked = [request for request in found.plan.probe_requests if library.is_drawn(request.probe.id)]
        needed, exact = [], []
        recorded = _recorded_as(contexts, found)
        ratios = _log_ratios(judge, found, recorded) if recorded is not None else None
        for _ in range(orders):
            order = generator.permutation(len(asked))
            needed.append(_tokens_needed(judge, [asked[i] for i in order], found))
            if ratios is not None:
                after = first_crossing(
                    ratios[generator.permutation(len(ratios))].cumsum(), judge.policy.differs_e_value
                )
                exact.append(np.inf if after is None else after)
            if len(needed) >= ORDERS_OF_THE_UNREACHED and np.isinf(needed).mean() > 0.5:
                break
        row: dict[str, Any] = {
            "tokens_median_p90": quantiles(np.array(needed)), "share_of_orders": float(np.isfinite(needed).mean()), "pool": len(asked),
        }  # fmt: skip
        if recorded is not None:
            row["exact_likelihood_ratio_median_p90"] = quantiles(np.array(exact))
            row["recorded_as"] = contexts.stacks[recorded].id
            divergence = _divergence(library, recorded, found)
            row["tokens_by_divergence"] = round(np.log(1000) / divergence)
            row.update(_field(library, recorded, found, generator))
        rows[found.name] = row
        say(f"temperature 1: {found.name}: {row}")
    document.reported["L5"] = rows
    for variant, most in AT_MOST.items():
        members = [found.name for found in answered if found.variant == variant]
        if not members:
            continue
        worst = max(rows[name]["tokens_median_p90"][0] for name in members)
        shares = ", ".join(f"{name} {rows[name]['share_of_orders']:.2f}" for name in members)
        document.figures[f"L5_{variant}_median"] = Figure(
            worst, f"output tokens at temperature 1, the worst of {', '.join(members)}; share of orders that get there within the pool: {shares}", f"<= {most}", worst <= most
        )  # fmt: skip
        # Like for like: tokens with which nine audits of ten reject at 1/1000.
        ratios_to = {name: rows[name]["MET"] / rows[name]["tokens_median_p90"][1] for name in members}
        least = min(ratios_to.values())
        given_up = [name for name in members if rows[name]["MET_given_up"]]
        bounds = [rows[n]["MET"] / rows[n]["exact_likelihood_ratio_median_p90"][1] for n in members]
        within = f"; of one who knows variant and temperature (Neyman-Pearson): {min(bounds):.1f}"
        remark = f"; MET was given up at {MET_TOKENS[-1]} for {', '.join(given_up)}: at least" if given_up else ""
        document.figures[f"L5_{variant}_over_MET"] = Figure(
            least, f"MET's tokens for a power of {POWER} over our 90 %, the least of {', '.join(members)}{within}{remark}", f">= {RATIO}", least >= RATIO
        )  # fmt: skip
    honest = {found.name: rows[found.name]["share_of_orders"] for found in answered if found.variant is None}
    document.figures["L5_served_honest_differs"] = Figure(
        max(honest.values(), default=0.0), f"share of orders, {', '.join(honest)}", "0", not any(honest.values())
    )


def _tokens_needed(judge: Judge, drawn: list[PlannedRequest], found: Collected) -> float:
    for most in (*STEPS[2:], len(drawn)):
        plan = judge.plans[0].model_copy(update={"text_requests": [], "probe_requests": drawn[:most]})
        evidence = weigh_texts(judge.library, plan, found.observations)
        assert evidence is not None
        after = text_differs_after(evidence, judge.policy)
        if after is not None:
            last = judge.library.contexts.probe_ids[evidence.drawn.places[after - 1]]
            return [request.probe.id for request in drawn].index(last) + 1
    return float("inf")


def _recorded_as(contexts: Contexts, found: Collected) -> int | None:
    """The recorded stack of what was served, in bfloat16 where it was served and recorded so."""
    same = [
        i for i, stack in enumerate(contexts.stacks) if found.variant is not None and stack.variant == found.variant
    ]
    grid = [i for i in same if "bfloat16" in contexts.stacks[i].id]
    return next(iter([*grid, *same] if found.name.startswith("transformers") else same), None)


def _log_ratios(judge: Judge, found: Collected, recorded: int) -> Floats:
    """What each served token is worth to one who knows the variant and the temperature."""
    contexts = judge.library.contexts
    plan = judge.plans[0].model_copy(update={"text_requests": [], "probe_requests": found.plan.probe_requests})
    evidence = weigh_texts(judge.library, plan, found.observations)
    assert evidence is not None
    out = []
    for place, columns in zip(evidence.drawn.places.tolist(), evidence.drawn.columns, strict=True):
        own, reference = (np.logaddexp.reduce(contexts.tokens_nats[i, place, list(columns)]) for i in (recorded, 0))
        out.append(own - reference)
    return np.array(out)


def _distributions(library: TextLibrary, stack: int, found: Collected) -> Floats:
    asked = [request.probe.id for request in found.plan.probe_requests]
    places = [library.contexts.index[probe_id] for probe_id in asked if library.is_drawn(probe_id)]
    p = np.exp(library.contexts.tokens_nats[stack, places])
    return np.asarray(np.maximum(p, 1e-9) / np.maximum(p, 1e-9).sum(axis=1, keepdims=True))


def _divergence(library: TextLibrary, recorded: int, found: Collected) -> float:
    served, reference = (_distributions(library, i, found) for i in (recorded, 0))
    return float((served * np.log(served / reference)).sum(axis=1).mean())


def _field(library: TextLibrary, recorded: int, found: Collected, generator: Generator) -> dict[str, Any]:
    """Tokens at which MET and RUT reach a power of 0.9 at 1/1000; infinity, and said so, where they were given up."""
    served, reference = (_distributions(library, i, found) for i in (recorded, 0))
    met: float = np.inf
    for n in MET_TOKENS:
        powers = []
        for _ in range(PROMPT_DRAWS):
            chosen = generator.permutation(len(served))[:PROMPTS]
            powers.append(
                peers.model_equality_testing(reference[chosen], served[chosen], n // PROMPTS, 200, ALPHA, generator)
            )
        if np.mean(powers) >= POWER:
            met = n
            break
    rut: float = np.inf
    for n in RUT_TOKENS:
        own = generator.permutation(len(served))[:n] if n <= len(served) else generator.integers(len(served), size=n)
        if peers.rank_uniformity(reference[own], served[own], 50, ALPHA, generator) >= POWER:
            rut = n
            break
    return {
        "MET": met if np.isfinite(met) else float(MET_TOKENS[-1]), "MET_given_up": bool(np.isinf(met)),
        "RUT": f"{rut:g}" if np.isfinite(rut) else f"> {RUT_TOKENS[-1]}",
    }  # fmt: skip


# -- honest stacks whose family the library lacks ------------------------------------------------------------------

TEMPERATURES_SERVED = (0.0, 0.05, 0.1, 0.3, 0.7, 1.0, 1.5)
MOST_ANSWERS = 100


@dataclass(frozen=True, eq=False)
class _Remembering(TextLibrary):
    """Keeps every answer's likelihoods: draws repeat themselves."""

    known: dict[tuple[int, tuple[int, ...]], NDArray[np.float32]] = field(default_factory=dict)

    def log_likelihood(self, place: int, columns: tuple[int, ...]) -> Any:
        """See `TextLibrary`."""
        if (place, columns) not in self.known:
            tokens = self.contexts.tokens_nats[:, place]
            members = np.zeros(tokens.shape[1], np.bool_)
            members[list(columns)] = True
            self.known[place, columns] = answer_log_likelihood(
                tokens, members, self.temperatures, outlier_share=self.outlier_share
            ).astype(np.float32)
        return self.known[place, columns]


def _remembering(library: TextLibrary) -> _Remembering:
    return _Remembering(**{f.name: getattr(library, f.name) for f in dataclasses.fields(TextLibrary)})


def left_out(document: Document, bundle: Bundle, policy: Policy, draws: int, generator: Generator) -> None:
    """Audits of every honest stack, its whole family left out of the library, at temperatures that nobody is told."""
    everything = build_text_library(bundle, policy)
    assert everything is not None
    stacks = [everything.contexts.stacks[i] for i in everything.honest]
    reference = bundle.manifest.reference_stack
    largest: dict[str, float] = {}
    by_temperature: dict[str, float] = defaultdict(lambda: -np.inf)
    differs: list[str] = []
    total = 0
    limits: dict[str, tuple[float, float]] = {}
    for family in sorted({stack.family for stack in stacks}):
        without = {
            s.id for s in bundle.manifest.stacks if s.departure is not None or s.family != family or s.id == reference
        }
        built = build_text_library(keeping(bundle, without), policy)
        assert built is not None
        library = _remembering(built)
        limits[family] = round(library.limit_nats, 4), round(library.flips_allowed, 4)
        for stack in (s for s in stacks if s.family == family):
            worst = -np.inf
            for temperature in TEMPERATURES_SERVED:
                for draw in range(draws):
                    evidence = _honest_audit(
                        library, bundle, everything, stack, temperature, generator, ignored=draw % 2 == 1
                    )
                    e = float(evidence.log_total.max() / LOG10)
                    total += 1
                    worst = max(worst, e)
                    by_temperature[str(temperature)] = max(by_temperature[str(temperature)], e)
                    if text_differs_after(evidence, policy) is not None:
                        differs.append(f"{stack.id} at {temperature}: log10 e {e:.2f}")
            largest[stack.id] = round(worst, 2)
            say(f"left out {stack.id} ({family}): largest log10 e {worst:.2f}")
    families = sorted({stack.family for stack in stacks})
    upper = share(0, total)[1][1], share(0, len(families))[1][1]
    document.figures["honest_left_out_differs"] = Figure(
        len(differs), f"of {total} simulated audits of {len(stacks)} stacks, each family left out", "0", not differs
    )
    document.reported["honest_left_out"] = {
        "differs": differs, "largest_log10_e_by_stack": largest, "largest_log10_e_by_temperature": dict(by_temperature),
        "families": f"{len(families)}: {', '.join(families)}", "limit_nats_and_flips_allowed_without": limits,
        "upper_limit_95_of_the_share": f"{1 - 0.05 ** (1 / total):.4f} of draws, {1 - 0.05 ** (1 / len(families)):.2f} of families (one-sided, where 0 differ)",
        "two_sided": upper, "temperatures": f"{TEMPERATURES_SERVED} while 0 is asked; where that wavers, drawn ones at 1 or, in every second audit, at the same one under top_p 0.9",
    }  # fmt: skip


def _is_cold(wavering: int, asked: int) -> bool:
    """As `TextEvidence.is_cold` has it."""
    return wavering < NOT_COLD or wavering <= NOT_COLD_SHARE * asked


def _honest_audit(
    library: TextLibrary,
    bundle: Bundle,
    everything: TextLibrary,
    stack: StackRecord,
    temperature: float,
    generator: Generator,
    *,
    ignored: bool,
) -> TextEvidence:
    """One audit as it would go: contexts at temperature 0 until that wavers, then the one-token pool; 100 answers at most.

    Where `ignored`, the endpoint takes no notice of the temperature that is asked for, and leaves out the last tenth of the probability.
    """
    contexts = everything.contexts
    own = [s.id for s in contexts.stacks].index(stack.id)
    observations: dict[str, Observation] = {}

    nucleus = 0.9 if ignored else 1.0

    def ask(name: str, place: int, at: float) -> str:
        text = _say(contexts, own, place, at, generator, nucleus=nucleus)
        observations[name] = _answered(name, contexts.probe_ids[place], text)
        return text

    cold: list[PlannedRequest] = []
    wavering = 0
    for place in generator.permutation(everything.contexts.recorded[own].nonzero()[0]).tolist():
        if place not in library.cold or len(cold) >= MOST_ANSWERS or not _is_cold(wavering, len(cold)):
            continue
        request = _request(f"text-{len(cold):04d}", contexts.probe_ids[place])
        cold.append(request)
        first = ask(request.request_id, place, temperature)
        if library.is_in_doubt(observations[request.request_id]):
            wavering += ask(again_twin(request).request_id, place, temperature) != first
    drawn: list[PlannedRequest] = []
    pool = bundle.pool_at("L3")
    assert pool is not None
    places = [contexts.index[probe_id] for probe_id in bundle.usable_probes(pool) if library.is_drawn(probe_id)]
    while not _is_cold(wavering, len(cold)) and len(cold) + len(drawn) < MOST_ANSWERS:
        place = int(generator.permutation(places)[0])
        places.remove(place)
        drawn.append(_request(f"probe-{len(drawn):04d}", contexts.probe_ids[place]))
        ask(drawn_twin(drawn[-1]).request_id, place, temperature if ignored else 1.0)
    plan = _plan_of(cold, drawn)
    evidence = weigh_texts(library, plan, observations)
    assert evidence is not None
    return evidence


def _answered(name: str, probe_id: str, text: str) -> Observation:
    return Observation(
        request_id=name, probe_id=probe_id, answered=True, attempts=1, latency_s=0.0, text=text, completion_tokens=1
    )


def _request(name: str, probe_id: str) -> PlannedRequest:
    message = {"role": "user", "content": "-"}
    return PlannedRequest.model_validate({
        "request_id": name, "probe": {"id": probe_id, "purpose": "drawn", "messages": [message]}
    })  # fmt: skip


def _plan_of(cold: list[PlannedRequest], drawn: list[PlannedRequest]) -> Plan:
    plan = make_plan(_endpoint("drawn", 100), load_policy("strict"), None, seed="drawn", run_id="0", created_at="-")
    return plan.model_copy(update={"text_requests": cold, "probe_requests": drawn})


def _say(
    contexts: Contexts, stack: int, place: int, temperature: float, generator: Generator, *, nucleus: float
) -> str:
    """A first token's text, drawn from a recorded distribution; what is not listed reads as nothing that is."""
    if temperature == 0:
        column = int(contexts.likeliest[stack, place])
    else:
        p = np.exp(at_temperature(contexts.tokens_nats[stack, place][None].copy(), temperature)[0])
        if nucleus < 1:
            order = np.argsort(-p)
            p[order[np.cumsum(p[order]) - p[order] >= nucleus]] = 0
        column = int(generator.choice(len(p), p=p / p.sum()))
    listed = (name for name, columns in contexts.names[place].items() if column in columns)
    return next(listed, f"\u2042 {generator.integers(10**6)}")


# -- departures of a class that nobody recorded ----------------------------------------------------------------------

UNRECORDED = ("depth-24", "int2-asym-g64", "int3-g64", "int4-g64", "llamacpp-q4_0")
UNRECORDED_TEMPERATURES = (0.5, 0.7, 1.0)


def unrecorded(document: Document, bundle: Bundle, policy: Policy, audits: int, generator: Generator) -> None:
    """Requests at an unknown temperature until a departure is told whose whole class is left out of the library.

    The served temperature is the one named, whatever is asked for; draws alone, of `LIMITS`[0] requests at most.
    """
    library = build_text_library(bundle, policy)
    pool = bundle.pool_at("L3")
    assert library is not None
    assert pool is not None
    contexts = library.contexts
    places = np.array([contexts.index[p] for p in bundle.usable_probes(pool) if library.is_drawn(p)])
    rows: dict[str, dict[str, str]] = {}
    for stack in UNRECORDED:
        own = [s.id for s in contexts.stacks].index(stack)
        kept = [i for i in library.departures if _class_of(library, i) != _class_of(library, own)]
        without = _remembering(dataclasses.replace(library, departures=kept))
        rows[stack] = {}
        for temperature in UNRECORDED_TEMPERATURES:
            needed = np.full(audits, np.inf)
            for n in range(audits):
                observations: dict[str, Observation] = {}
                requests: list[PlannedRequest] = []
                for place in generator.permutation(places[contexts.recorded[own, places]])[: LIMITS[0]].tolist():
                    requests.append(_request(f"probe-{len(requests):04d}", contexts.probe_ids[place]))
                    name = drawn_twin(requests[-1]).request_id
                    text = _say(contexts, own, place, temperature, generator, nucleus=1.0)
                    observations[name] = _answered(name, contexts.probe_ids[place], text)
                evidence = weigh_texts(without, _plan_of([], requests), observations)
                assert evidence is not None
                after = text_differs_after(evidence, policy)
                if after is not None:
                    needed[n] = after
            rows[stack][f"temperature {temperature}"] = (
                f"{np.isfinite(needed).mean():.2f} of {audits} audits, median and 90 % {quantiles(needed)}"
            )
        say(f"not recorded: {stack}: {rows[stack]}")
    document.reported["unrecorded"] = rows


def _class_of(library: TextLibrary, index: int) -> str | None:
    record = library.departure(index)
    return record.departure_class if isinstance(record, StackRecord) else record.id


# -- evasion -------------------------------------------------------------------------------------------------------

_TEXT = Lies(max_top_logprobs=0)
EVASIONS: dict[str, tuple[str, Lies]] = {
    "q4_0, the true model for published probes": ("q4_0", dataclasses.replace(_TEXT, true_for_public=True)),
    "q4_0, temperature halved": ("q4_0", dataclasses.replace(_TEXT, cool=0.5)),
    "f16, temperature halved": ("f16", dataclasses.replace(_TEXT, cool=0.5)),
    "q4_0, answers remembered": ("q4_0", dataclasses.replace(_TEXT, remember=True)),
    "f16, answers remembered": ("f16", dataclasses.replace(_TEXT, remember=True)),
    "f16, answers remembered, temperature always 1": ("f16", dataclasses.replace(_TEXT, remember=True, ignored=("temperature",))),
    "q4_0, temperature always 1": ("q4_0", dataclasses.replace(_TEXT, ignored=("temperature",))),
    "f16, temperature always 1": ("f16", dataclasses.replace(_TEXT, ignored=("temperature",))),
    "f16, stored by the prompt, temperature always 1": ("f16", dataclasses.replace(_TEXT, cached=True, ignored=("temperature",))),
    "q4_0, the true model for the first 20": ("q4_0", dataclasses.replace(_TEXT, true_first=20)),
    "q4_0, the true model for the first 200": ("q4_0", dataclasses.replace(_TEXT, true_first=200)),
}  # fmt: skip


def evasion(document: Document, bundle: Bundle, policy: Policy, *, quick: bool) -> None:
    """Whole audits over HTTP of endpoints that hide what they serve; only what honest weights come to has a target."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (weights, lies) in list(EVASIONS.items())[: 2 if quick else None]:
        rows[name] = _audit(name, bundle, policy, weights, lies)
        say(f"evasion: {name}: {rows[name]}")
    document.reported["evasion"] = rows
    honest = {name: row for name, row in rows.items() if name.startswith("f16")}
    wrong = sum(row["verdict"].startswith("differs") for row in honest.values())
    document.figures["evasive_honest_weights_differ"] = Figure(
        wrong,
        f"of {len(honest)} endpoints that serve the original weights and lie otherwise",
        "0",
        wrong == 0 and bool(honest),
    )


def _audit(name: str, bundle: Bundle, policy: Policy, weights: str, lies: Lies) -> dict[str, Any]:
    """One audit's verdict and what its findings say; collected now, or judged again from the cache."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    folder = RunFolder(CACHE / "texts" / bundle.identity.digest[:12] / "evasion" / slug)
    if folder.path.exists():
        try:
            if folder.exchanges()[1] is not None:
                return _row(folder, bundle)
        except RunFolderError:
            say(f"{name} was planned otherwise: asking again")
        shutil.rmtree(folder.path)
    # An audit of the usual size; but the true model may not be all that it meets.
    most = LIMITS[1] if lies.true_first >= LIMITS[0] else LIMITS[0]
    plan = make_plan(_endpoint(slug, most), policy, bundle, seed="evasion")
    RunFolder.create(folder.path, plan)
    with lab_endpoint(_on_one_thread(VARIANTS[weights]), lies, say) as front:
        endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
        collect_run(folder, plan, endpoint, bundle, None, lambda _: None)
    return _row(folder, bundle)


def _row(folder: RunFolder, bundle: Bundle) -> dict[str, Any]:
    _, findings, verdict = judge_run(folder, bundle)
    weights = [f for f in findings.findings if f.axis == "weights" and f.check == "weights"]
    others = [f"{f.check}: {f.summary}" for f in findings.findings if f.outcome == "inconsistent" and f not in weights]
    return {
        "verdict": verdict.verdict, "cause": verdict.cause, "exact_variant": verdict.exact_variant, "requests": verdict.requests_sent,
        "sentence": verdict.sentence, "weights": "; ".join(f"{f.outcome}: {f.summary}" for f in weights), "also_inconsistent": others,
    }  # fmt: skip


# -- the share of requests that go elsewhere -----------------------------------------------------------------------

RESPONSES = 300
SHARES = (0.0, 0.01, 0.05, 0.2)
CUT_NATS = 2.0


def partial_routing(document: Document, simulations: int, generator: Generator) -> None:
    """Widths and coverage of the intervals of a share, from simulated scores with calibrated rates.

    Honest Λ are -8 + t₄ nats and the variant's 12 + s t₄; 5,000 and 2,000 calibration draws, a cut of 2 nats that was fixed beforehand. With
    s larger a diverted response stands out less surely, which the width at large shares is made of.
    """
    rows: dict[str, dict[str, float]] = {}
    for spread in (2.0, 3.0, 4.5):

        def honest(n: int) -> Floats:
            return np.asarray(-8 + generator.standard_t(4, n))

        def variant(n: int, spread: float = spread) -> Floats:
            return np.asarray(12 + spread * generator.standard_t(4, n))

        standing_out = float((variant(1_000_000) > CUT_NATS).mean())
        for eps in SHARES:
            found = np.zeros((2, 2))
            for _ in range(simulations):
                cut, rates = measured_rates(honest(5000), variant(2000), cut_nats=CUT_NATS)
                stand_out = np.where(generator.random(RESPONSES) < eps, variant(RESPONSES), honest(RESPONSES)) > cut
                for i, interval in enumerate((share_interval, anytime_share_interval)):
                    low, high = interval(stand_out, rates)
                    found[i] += low <= eps <= high, high - low
            values = (found / simulations).ravel().tolist()
            names = ("coverage", "mean_width", "anytime_coverage_at_n", "anytime_mean_width")
            rows[f"{standing_out:.3f} of the diverted stand out, share {eps}"] = dict(zip(names, values, strict=True))
        own = {eps: rows[f"{standing_out:.3f} of the diverted stand out, share {eps}"] for eps in SHARES}
        what = f"simulated, n = {RESPONSES}, {simulations} simulations, {standing_out:.3f} of the diverted stand out"
        named = f"share_t_{standing_out:.2f}"
        for figure, value, most in (
            ("mean_width_up_to_.05", max(own[eps]["mean_width"] for eps in SHARES if eps <= 0.05), 0.06),
            ("mean_width_at_.2", own[0.2]["mean_width"], 0.10),
            ("anytime_mean_width_at_.05", own[0.05]["anytime_mean_width"], 0.10),
        ):
            document.figures[f"{named}_{figure}"] = Figure(value, what, f"<= {most:.2f}", value <= most)
        covered = min(row[key] for row in own.values() for key in ("coverage", "anytime_coverage_at_n"))
        document.figures[f"{named}_least_coverage"] = Figure(covered, what, ">= 0.95", covered >= 0.95)
    document.reported["share_intervals"] = rows


PARTS = ("L4", "L5", "honest", "evasion", "share", "unrecorded")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cached", action="store_true", help="ask nothing: leave out what was not collected yet")
    parser.add_argument(
        "--out", type=Path, help="also write text_only.json, text_only.md and text_only.svg into this folder"
    )
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts, by commas")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    bundle, policy = load_bundle(BUNDLE), load_policy("strict")
    library = build_text_library(bundle, policy)
    assert library is not None
    judge = Judge(library, policy, [make_plan(_endpoint("audit", most), policy, bundle, seed="x") for most in LIMITS])
    document = Document("text_only")
    orders = 40 if arguments.quick else ORDERS
    started = time.monotonic()

    def generator(part: str) -> Generator:
        return np.random.default_rng([arguments.seed, PARTS.index(part)])

    cold, drawn = (
        collect(bundle, quick=arguments.quick, cached=arguments.cached) if {"L4", "L5"} & set(parts) else ([], [])
    )
    if "L4" in parts:
        at_temperature_0(document, judge, cold, orders, generator("L4"))
        document.reported["Token-DiFR margin, requests for a power of 0.9 at 1/1000"] = greedy_margins(
            judge, cold, orders, generator("L4")
        )
    if "L5" in parts:
        at_temperature_1(document, judge, drawn, orders, generator("L5"))
    if "share" in parts:
        partial_routing(document, 200 if arguments.quick else 2000, generator("share"))
    if "honest" in parts:
        left_out(document, bundle, policy, 2 if arguments.quick else 8, generator("honest"))
    if "unrecorded" in parts:
        unrecorded(document, bundle, policy, 5 if arguments.quick else 40, generator("unrecorded"))
    if "evasion" in parts:
        evasion(document, bundle, policy, quick=arguments.quick)
    say(f"took {time.monotonic() - started:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot(document, arguments.out / "text_only.svg")
        (arguments.out / "text_only.json").write_text(
            json.dumps(document.as_json(), indent=1, sort_keys=True) + "\n", "utf-8"
        )
        (arguments.out / "text_only.md").write_text(table(document), "utf-8")
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
