"""Endpoints that return only text and send some requests elsewhere: after how many whole answers that is found.

*What calibrates.* The recorded honest stacks of the bundle, along the answers of its pool for whole answers: how far leads move. The pool was chosen
(`search_answers.py`) with hf-bfloat16, hf-bfloat16-eager, nf4-g64, int4-asym-g64, int4-g32, mxfp4, q4_0 and six grids of 4 bits that are shifted by chance in sight, on the
candidates and emulated; nothing else.

*What is reported on.* Whole answers that were really served, over HTTP and without logprobs, on llama.cpp or on transformers in bfloat16; kept under
.benchmarks-cache/whole/. Requests are then diverted by chance, each by itself, from an honest endpoint's answers to a departure's, in the order of the
pool, and judged as in an audit whose first tokens left nothing but the fifth of the wealth that is kept. int4-g64, nf4-g128, int5-g64, W8A8 and int8 the choice
has not seen.

*What is simulated, and says so.* Honest stacks at other temperatures, drawn token by token from their recorded distributions, their family left out of
what they are held against.

    python benchmarks/whole_answers.py [--quick] [--seed 1] [--json] [--cached] [--out reports]

Needs the extras lab and hf.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from figures import CACHE, Document, Figure, say, share
from served import DEPARTURES, HONEST, Served
from weighbridge.audit import Auditor
from weighbridge.collect import Collector
from weighbridge.judge.checks.share import CONFIDENCE
from weighbridge.judge.policy import load_policy
from weighbridge.judge.texts import KEPT_FOR_DRAWS
from weighbridge.judge.whole import (
    HONEST_CHANCE,
    WholeLibrary,
    build_whole_library,
    coarse,
    evidence_of,
    honest_chances,
    owed_repeats,
    read_whole,
)
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import TorchVariant, Variant
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Limits, Plan, again_twin
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.stats.draws import at_temperature
from weighbridge.stats.mixtures import Rates, anytime_share_interval, diversion_shown, share_interval, stand_out_process
from weighbridge.stats.paths import Leaving
from weighbridge.stats.residuals import share_upper_limit
from weighbridge.store import RunFolder

Generator = np.random.Generator
Flags = NDArray[np.bool_]
BUNDLE = "smollm2-135m-instruct"
AUDITS, TARGET_AUDITS = 300, 1000  # of what has a target more, since a median of 300 is known to some four answers
SHARE = 0.05
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)
SEEN = (
    "llamacpp-q4_0",
    "transformers-nf4-g64",
    "llamacpp-int4-asym-g64",
)  # emulated in float32, by the choice of the pool
TARGETS = (*SEEN, "transformers-int4-g64", "transformers-nf4-g128")
HONEST_NAMES = ("llamacpp-f16", "transformers-bf16")
FINER = ("llamacpp-int5-g64", "transformers-w8a8-int8", "llamacpp-int8")
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
KNOWN: dict[str, Served] = {served.name: served for served in (*HONEST, *DEPARTURES)}
Answered = dict[int, Leaving]  # by its place in the pool


class _Whole(Auditor):
    """Sends every request for a whole answer, and some again."""

    async def _all(self, collector: Collector) -> str:
        requests = self._plan.whole_requests
        because = await self._capability(collector)
        again = [again_twin(request) for request in requests[:REPEATED]]
        return because or await self._send_until(collector, [*requests, *again], lambda _: None) or "probes_used_up"


REPEATED = 8  # of the pool, to see that at temperature 0 an answer comes again


def _on_one_thread(what: Variant | TorchVariant) -> Variant | TorchVariant:
    """Two threads of a busy machine wait for each other."""
    if isinstance(what, TorchVariant):
        return dataclasses.replace(what, setting=what.setting.model_copy(update={"threads": 1}))
    return dataclasses.replace(what, settings=dataclasses.replace(what.settings, threads=1))


def folder_of(name: str, bundle: Bundle) -> RunFolder:
    """Where the answers lie."""
    return RunFolder(CACHE / "whole" / bundle.identity.digest[:12] / name)


def plan_for(name: str, bundle: Bundle) -> Plan:
    """A plan with nothing but whole answers."""
    endpoint = Endpoint(name=name, base_url="http://127.0.0.1:1/v1", model=MODEL_NAME, limits=Limits(max_requests=1000, timeout_s=600))  # fmt: skip
    nothing_else: dict[str, Any] = {"prompt_requests": [], "sampling_requests": [], "route_requests": [], "text_requests": [], "probe_requests": []}  # fmt: skip
    return make_plan(endpoint, load_policy("strict"), bundle, seed="collect").model_copy(update=nothing_else)


def answers_of(name: str, bundle: Bundle, library: WholeLibrary) -> tuple[Answered, int]:
    """What was served for every probe, and how many of `REPEATED` came again; asked now, or read from the cache."""
    folder = folder_of(name, bundle)
    if not (folder.path / "plan.json").exists():
        RunFolder.create(folder.path, plan_for(name, bundle))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        with lab_endpoint(_on_one_thread(KNOWN[name].what), Lies(max_top_logprobs=0), say) as front:
            say(f"collecting {name}")
            endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
            asyncio.run(_Whole(folder, plan, endpoint, bundle, None, lambda _: None).run())
    observations = observe(plan, folder.exchanges()[0])
    found: Answered = {}
    came = 0
    for request in plan.whole_requests:
        if request.request_id not in observations:
            continue
        first = observations[request.request_id]
        left = read_whole(library, first)
        if left is not None:
            found[library.paths.index[request.probe.id]] = left
        second = observations.get(again_twin(request).request_id)
        came += second is not None and second.text == first.text
    return found, came


# -- audits ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Course:
    """What one audit came to: whole answers and requests until it is said, and which answers stand out of all of the pool."""

    answers: float
    requests: float
    stand_out: Flags


# Thousands of audits of the same answers ask for the same likelihoods.
WholeLibrary.drawn = functools.cache(WholeLibrary.drawn)  # type: ignore[method-assign]


def audit(library: WholeLibrary, order: list[int], answer: Callable[[int], Leaving], e_value: float) -> Course:
    """As an audit goes: first answers until temperature 0 is rejected, then repeats; and again whenever one more stands out."""
    leavings = [answer(place) for place in order]
    out = np.array([library.is_outstanding(p, left) for p, left in zip(order, leavings, strict=True)], np.bool_)
    kept = float(np.log(KEPT_FOR_DRAWS))
    cold = kept + stand_out_process(out, false_positive=HONEST_CHANCE)
    first = diversion_shown(cold, out, e_value=e_value)
    repeats: list[tuple[int, Leaving]] = []
    for n in () if first is None else [first, *(np.flatnonzero(out[first:]) + first + 1).tolist(), len(order)]:
        if kept + stand_out_process(out[:n], false_positive=HONEST_CHANCE)[-1] < np.log(e_value):
            continue
        evidence = evidence_of(library, order[:n], leavings[:n], repeats, asked=n)
        while fresh := owed_repeats(evidence):
            repeats = [*repeats, *((i, answer(order[i])) for i, _ in fresh)]
            evidence = evidence_of(library, order[:n], leavings[:n], repeats, asked=n)
        shown = evidence.is_asked_again and kept + evidence.log_total[-1] >= np.log(e_value)
        if shown and evidence.is_some:
            return Course(n, n + len(repeats), stand_out=out)
    return Course(np.inf, np.inf, stand_out=out)


def diverted(
    library: WholeLibrary,
    honest: Answered,
    other: Answered,
    epsilon: float,
    audits: int,
    generator: Generator,
    e_value: float,
) -> list[Course]:
    """Audits of an endpoint that sends each request elsewhere by a throw of its own."""
    places = sorted(place for place in honest if place in other)
    return [
        audit(library, places, lambda p: (other if generator.random() < epsilon else honest)[p], e_value)
        for _ in range(audits)
    ]  # fmt: skip


def quantile(values: list[float], q: float) -> float:
    """Infinity where audits did not get there."""
    return float(np.quantile(values, q, method="higher"))


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, from the values in order (David and Nagaraja 2003, Order Statistics, section 7.1)."""
    ranked = sorted(values)
    low = int(binom.ppf(0.025, len(ranked), 0.5))
    return ranked[max(low - 1, 0)], ranked[len(ranked) - max(low, 1)]


def found_by(
    document: Document,
    library: WholeLibrary,
    answers: dict[str, Answered],
    audits: int,
    target_audits: int,
    generator: Generator,
    e_value: float,
) -> None:
    """After how many whole answers a share of 5 % is found, and what the interval says of other shares."""
    rows: dict[str, Any] = {}
    for honest in HONEST_NAMES:
        for other in (*TARGETS, *FINER):
            if honest not in answers or other not in answers:
                continue
            count = target_audits if other in TARGETS else audits
            courses = diverted(library, answers[honest], answers[other], SHARE, count, generator, e_value)
            told = np.mean([library.is_outstanding(p, left) for p, left in answers[other].items()])
            found = [c for c in courses if np.isfinite(c.answers)]
            rows[f"{other} behind {honest}"] = {
                "audits": len(courses), "answers_median_p90": [quantile([c.answers for c in courses], q) for q in (0.5, 0.9)],
                "answers_median_95": median_interval([c.answers for c in courses]),
                "requests_median": quantile([c.requests for c in courses], 0.5),
                "found": len(found) / len(courses),
                "stand_out": float(told), "all_requests_answers_median": quantile([c.answers for c in diverted(library, answers[honest], answers[other], 1.0, 20, generator, e_value)], 0.5),
            }  # fmt: skip
    document.reported["diverted_5_percent"] = rows
    for other in TARGETS:
        medians = [
            (row["answers_median_p90"][0], row["answers_median_95"])
            for name, row in rows.items()
            if name.startswith(other)
        ]
        if medians:
            worst, interval = max(medians)
            document.figures[f"{other}_5_percent_answers_median"] = Figure(worst, f"whole answers, worst honest engine; 95 %: {interval[0]:g} to {interval[1]:g}", "<= 50", worst <= 50, interval)  # fmt: skip
    shares: dict[str, Any] = {}
    honest, other = HONEST_NAMES[0], TARGETS[0]
    if honest in answers and other in answers:
        departures = coarse(library)
        for epsilon in SHARES:
            courses = diverted(library, answers[honest], answers[other], epsilon, audits, generator, e_value)
            n = len(courses[0].stand_out)
            rates = Rates(HONEST_CHANCE, float(library.told[departures].mean(axis=1).min()))
            for kind, interval in (("fixed", share_interval), ("anytime", anytime_share_interval)):
                ends = [interval(c.stand_out, rates, confidence=CONFIDENCE) for c in courses]
                shares[f"{epsilon} of {n}, {kind}"] = {
                    "coverage": float(np.mean([low <= epsilon <= high for low, high in ends])), "mean_width": float(np.mean([high - low for low, high in ends])),
                }  # fmt: skip
    document.reported["share_intervals_served"] = shares


def served_alone(document: Document, library: WholeLibrary, answers: dict[str, Answered]) -> None:
    """How many answers stand out of endpoints that send everything to one and the same."""
    wrong = 0
    counted = 0
    rows = {}
    for name, own in answers.items():
        out = sum(library.is_outstanding(p, left) for p, left in own.items())
        whole = sum(not left.cells for left in own.values())
        rows[name] = f"{whole} of {len(own)} the reference's own, {out} stand out"
        if name in HONEST_NAMES:
            wrong, counted = wrong + out, counted + len(own)
    document.reported["whole_answers_served"] = rows
    document.figures["honest_served_answers_standing_out"] = Figure(wrong, f"of {counted}", "0", bool(wrong == 0))


# -- honest stacks, their family left out ---------------------------------------------------------------------------


def without(library: WholeLibrary, family: str, margin: float) -> WholeLibrary:
    """The library as it would be without a family's stacks."""
    stacks = library.paths.stacks
    honest = [i for i in library.honest if i == library.honest[0] or stacks[i].family != family]
    return WholeLibrary(
        library.paths,
        honest,
        library.departures,
        library.limit_nats,
        honest_chances(library.paths, honest, library.limit_nats, margin),
    )


def drawn(library: WholeLibrary, stack: int, place: int, temperature: float, generator: Generator) -> Leaving:
    """Where an answer of a recorded stack leaves the path at a temperature; at 0 by its likeliest token."""
    rows, paths = library.paths.rows[place], library.paths
    for position, row in enumerate(range(rows.start, rows.stop)):
        cells = paths.tokens_nats[stack, row]
        if temperature == 0:
            column = int(cells[:-1].argmax())
        else:
            column = int(generator.choice(cells.size, p=np.exp(at_temperature(cells[None].copy(), temperature)[0])))
        if column != paths.own[row]:
            return Leaving(position, ((position, column),))
    return Leaving(rows.stop - rows.start)


def _drawn_again(library: WholeLibrary, stack: int, temperature: float, generator: Generator, place: int) -> Leaving:
    return drawn(library, stack, place, temperature, generator)


def left_out(
    document: Document, library: WholeLibrary, margin: float, times: int, generator: Generator, e_value: float
) -> None:
    """Every honest family against a library that lacks it: what stands out at temperature 0, and what is said at others."""
    stacks = library.paths.stacks
    families = sorted({stacks[i].family for i in library.honest[1:]})
    out = counted = wrong = audits = 0
    rows: dict[str, Any] = {}
    n = len(library.paths.probe_ids)
    for family in families:
        own = without(library, family, margin)
        members = [i for i in library.honest[1:] if stacks[i].family == family]
        flags = [
            own.is_outstanding(place, drawn(library, i, place, 0, generator)) for i in members for place in range(n)
        ]
        out, counted = out + int(sum(flags)), counted + len(flags)
        said: dict[str, int] = {}
        for temperature in TEMPERATURES:
            for _ in range(times):
                i = int(generator.choice(members))
                answer = functools.partial(_drawn_again, own, i, temperature, generator)
                course = audit(own, [*range(n)], answer, e_value)
                wrong, audits = wrong + int(np.isfinite(course.answers)), audits + 1
                said[str(temperature)] = said.get(str(temperature), 0) + int(np.isfinite(course.answers))
        rows[family] = {"stacks": len(members), "stand_out_at_0": int(sum(flags)), "said_to_differ": said}
    document.reported["honest_families_left_out"] = rows
    document.reported["honest_answers_that_stand_out"] = (
        f"{out} of {counted} at temperature 0; at most {share_upper_limit(out, counted, CONFIDENCE):.2g} (95 %), {HONEST_CHANCE} is allowed"
    )
    document.figures["honest_left_out_differs"] = Figure(wrong, f"of {audits} simulated audits, {len(families)} families, temperatures {TEMPERATURES[0]} to {TEMPERATURES[-1]}", "0", bool(wrong == 0))  # fmt: skip
    document.figures["honest_answers_standing_out"] = Figure(out, f"of {counted} recorded answers, family left out", "0", bool(out == 0), share(out, counted)[1])  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cached", action="store_true", help="ask nothing: leave out what was not collected yet")
    parser.add_argument("--out", type=Path, help="also write whole_answers.json and whole_answers.md into this folder")
    arguments = parser.parse_args()
    bundle, policy = load_bundle(BUNDLE), load_policy("strict")
    library = build_whole_library(bundle, policy)
    assert library is not None
    generator = np.random.default_rng(arguments.seed)
    document = Document("whole_answers")
    audits, target_audits = (40, 40) if arguments.quick else (AUDITS, TARGET_AUDITS)
    started = time.monotonic()
    names = (HONEST_NAMES[0], TARGETS[0]) if arguments.quick else (*HONEST_NAMES, *TARGETS, *FINER)
    answers, came = {}, 0
    for name in names:
        if not arguments.cached or (
            (folder_of(name, bundle).path / "plan.json").exists() and folder_of(name, bundle).exchanges()[1] is not None
        ):
            answers[name], again = answers_of(name, bundle, library)
            came += again
    document.reported["asked again at temperature 0"] = f"{came} of {REPEATED * len(answers)} gave the same text"
    found_by(document, library, answers, audits, target_audits, generator, policy.differs_e_value)
    served_alone(document, library, answers)
    left_out(document, library, policy.stack_margin, 2 if arguments.quick else 20, generator, policy.differs_e_value)
    say(f"took {time.monotonic() - started:.0f} s")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "whole_answers.json").write_text(
            json.dumps(document.as_json(), indent=1, sort_keys=True) + "\n", "utf-8"
        )
        (arguments.out / "whole_answers.md").write_text(table(document), "utf-8")
    return document.print(arguments.json)


def table(document: Document) -> str:
    """Everything as Markdown."""
    lines = [
        "# benchmarks/whole_answers.py", "", f"Commit {document.as_json()['commit'][:12]}. Bundle {BUNDLE}. What calibrates, and what is reported on, stands at the head of the script.", "",
        "| | figure | value | target |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {'holds' if f.holds else '**missed**'} | {name.replace('_', ' ')} ({f.unit}) | {f.value:.4g} | {f.target} |"
        for name, f in document.figures.items()
    ]
    lines += [
        "", f"{SHARE:.0%} of the requests answered by something else (audits of {len(load_bundle(BUNDLE).usable_probes(load_bundle(BUNDLE).pool_at('whole')))} prompts):", "",  # type: ignore[arg-type]
        "| served | seen by the pool's choice | audits | whole answers until it is said, median (95 %) / 90 % | with repeats, median | found within the pool | its answers that stand out | where it answers everything, median |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in document.reported["diverted_5_percent"].items():
        median, p90 = (_shown(n) for n in row["answers_median_p90"])
        low, high = (_shown(n) for n in row["answers_median_95"])
        pair = f"{median} ({low} to {high}) / {p90}"
        lines.append(f"| {name} | {'yes' if name.startswith(SEEN) else 'no'} | {row['audits']:,} | {pair} | {_shown(row['requests_median'])} | {row['found']:.0%} | {row['stand_out']:.0%} | {_shown(row['all_requests_answers_median'])} |")  # fmt: skip
    lines += ["", f"Intervals of the share after the whole pool, {TARGETS[0]} behind {HONEST_NAMES[0]}:", ""]
    lines += [
        f"- {name}: coverage {row['coverage']:.3f}, mean width {row['mean_width']:.3f}"
        for name, row in document.reported["share_intervals_served"].items()
    ]
    lines += ["", "Served, everything by one:", ""]
    lines += [f"- {name}: {words}" for name, words in document.reported["whole_answers_served"].items()]
    lines += ["", "Honest families left out of the library, simulated:", ""]
    lines += [
        f"- {name} ({row['stacks']}): {row['stand_out_at_0']} stand out at temperature 0; said to differ at {', '.join(f'{t}: {n}' for t, n in row['said_to_differ'].items())}"
        for name, row in document.reported["honest_families_left_out"].items()
    ]
    lines += ["", f"Honest answers that stand out: {document.reported['honest_answers_that_stand_out']}. Asked again: {document.reported['asked again at temperature 0']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _shown(n: float) -> str:
    return f"{n:g}" if np.isfinite(n) else "not within the pool"


if __name__ == "__main__":
    sys.exit(main())
