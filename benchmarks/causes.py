"""Is the cause named before the weights are blamed? Wrong prompts, sampling lies and forged logprobs, on a real model.

Three kinds of endpoints are audited:

* Prompts that are served otherwise (`conditions.py`): one exchange for each probe is collected over HTTP and kept; audits are drawn
  from these in orders of their own, with token counts that are true, absent, those of the official template, or estimated.
* Sampling lies and forged logprobs: whole audits over HTTP, kept as run folders; each asks texts of its own, drawn from a seed.
* Hidden prompts whose host offers raw completions: whole audits likewise.

The rules of leaning and of two faults at once were changed after a first look at these conditions; nothing else was (docs/STATISTICS.md, Measured).
"""

import argparse
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from conditions import ALTERED, WITH_ALTERED, Condition, answers_of, conditions
from figures import CACHE, Document, Figure, say, share
from weighbridge.audit import collect_run
from weighbridge.capability import read_capability
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import is_decided, judge
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import MODEL_NAME, Front, Lies
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, VARIANTS, Variant
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.probes import load_pool
from weighbridge.records import Capability, Endpoint, Finding, Limits, Message, Observation, Plan, Verdict
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.reference.templates import render_conversations
from weighbridge.store import RunFolder

HONEST = 300
USAGES = ("true", "none", "official", "characters")
TEXTS = ("cold", "cold-night", "cold-drawer")
KINDS = ("recorded", "hidden", "template")
SAMPLING_LIES = {
    "temperature-ignored": Lies(ignored=("temperature",)),
    "temperature-at-most-1": Lies(max_temperature=1.0),
    "temperature-at-most-0.3": Lies(max_temperature=0.3),
    "top-p-ignored": Lies(ignored=("top_p",)),
}
FORGED = ("depth-24", "q4_0", "int4-g64")
FORGED_REPORTED = ("int8",)
HONEST_SAMPLING = 16  # whole audits of an honest host, beside those with raw completions
RAW = ("int4-g64", "q4_0")


@dataclass(frozen=True)
class Audited:
    """One audit: what was served, how tokens were counted, and what came out."""

    name: str
    usage: str
    verdict: Verdict
    findings: dict[str, Finding]
    answers: int

    @property
    def served(self) -> str | None:
        """The rendering that was found."""
        return self.findings["prompt"].details.get("served")


def expected(condition: Condition) -> str:
    """The cause that is the true one."""
    if condition.rendering is not None:
        return str(VARIANTS[condition.rendering].departure)
    return "hidden_prompt" if condition.kind == "hidden" else "template"


# -- audits drawn from collected exchanges ---------------------------------------------------------------------


def counted(observation: Observation, usage: str, plan: Plan, bundle: Bundle) -> Observation:
    """The same answer with its prompt tokens counted in another way."""
    if usage == "true" or observation.prompt_tokens is None:
        return observation
    tokens: int | None = None
    if usage == "official" and observation.probe_id in bundle.probe_index:
        tokens = int(bundle.prompt_tokens[0, bundle.probe_index[observation.probe_id]])
    if usage == "characters":
        probe = next((r.probe for r in plan.requests if r.probe.id == observation.probe_id), None)
        tokens = None if probe is None else sum(len(m.content) for m in probe.messages) // 4
    return observation.model_copy(update={"prompt_tokens": tokens})


def audit(condition: Condition, usage: str, seed: int, bundle: Bundle, library: Library) -> Audited:
    """Draw an audit's order, and send until it is decided."""
    plan, capability, observations = answers_of(condition, bundle)
    policy = load_policy("strict")
    order = random.Random(f"{condition.name} {usage} {seed}").sample(plan.probe_requests, len(plan.probe_requests))
    plan = plan.model_copy(update={"probe_requests": order, "policy": policy})
    told = {name: counted(o, usage, plan, bundle) for name, o in observations.items()}
    first = [told[r.request_id] for r in (*plan.capability_requests, *plan.prompt_requests) if r.request_id in told]
    sent: list[Observation] = []
    case = open_case(plan, capability, first, library)
    for request in order:
        if request.request_id not in told:
            continue
        sent.append(told[request.request_id])
        case = open_case(plan, capability, [*first, *sent], library)
        if is_decided(case):
            break
    findings, verdict = judge(
        case, requests_sent=len(first) + len(sent), stopped_because="decided", all_observations=[*first, *sent], observations_sha256="",
    )  # fmt: skip
    return Audited(condition.name, usage, verdict, {f.check: f for f in findings.findings}, len(sent))


# -- whole audits over HTTP ------------------------------------------------------------------------------------


def live(name: str, front: Front, seed: int, bundle: Bundle) -> tuple[Plan, Capability, dict[str, Observation]]:
    """One audit with texts of its own, or what the cache has of it."""
    folder = RunFolder(CACHE / "causes" / f"{name}-{seed}")
    if not (folder.path / "plan.json").exists():
        endpoint = Endpoint(name=name, base_url="http://127.0.0.1:1/v1", model=MODEL_NAME, limits=Limits(timeout_s=600))
        plan = make_plan(endpoint, load_policy("strict"), bundle, seed=f"{name} {seed}")
        RunFolder.create(folder.path, plan.model_copy(update={"sampling_requests": other_texts(plan, seed)}))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        say(f"auditing {name}, {seed}")
        endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
        collect_run(folder, plan, endpoint, bundle, None, lambda _: None)
    observations = observe(plan, folder.exchanges()[0])
    return plan, read_capability(observations), observations


def other_texts(plan: Plan, seed: int) -> list[object]:
    """The plan's requests about sampling with other questions, so that no threshold has seen them."""
    texts = [p.messages[-1].content for p in load_pool("hand-written").probes if len(p.messages) == 1]
    story, night, drawer = random.Random(seed).sample(texts, 3)
    known = {r.probe.id.removeprefix("sampling-"): r.probe.messages[0].content for r in plan.sampling_requests}
    replaced = {known["cold"]: story, known["cold-night"]: night, known["cold-drawer"]: drawer}

    def other(content: str) -> str:
        start = next((old for old in replaced if content.startswith(old)), None)
        return content if start is None else replaced[start] + content[len(start) :]

    return [
        r.model_copy(update={"probe": r.probe.model_copy(update={"messages": [Message(role="user", content=other(r.probe.messages[0].content))]})})
        for r in plan.sampling_requests
    ]  # fmt: skip


def judged(name: str, seen: tuple[Plan, Capability, dict[str, Observation]], library: Library) -> Audited:
    """Judge a whole audit."""
    plan, capability, observations = seen
    case = open_case(plan, capability, observations.values(), library if capability.top_logprobs else None)
    findings, verdict = judge(
        case, requests_sent=len(observations), stopped_because="decided", all_observations=[*observations.values()], observations_sha256="",
    )  # fmt: skip
    return Audited(name, "true", verdict, {f.check: f for f in findings.findings}, len(case.answers))


def whole_audits(bundle: Bundle, library: Library, seeds: int) -> Iterator[tuple[str, Audited, dict[str, Observation]]]:
    """Every sampling lie, every forgery, hidden prompts with raw completions, and an honest host with and without logprobs."""
    with lab_backend(VARIANTS["f16-one-thread"], say) as honest:
        plain = {"honest": Lies(), "no-logprobs": Lies(max_top_logprobs=0), **SAMPLING_LIES}
        for name, lies in plain.items():
            for seed in range(
                seeds if name in SAMPLING_LIES else HONEST_SAMPLING if name == "honest" and seeds > 1 else 1
            ):
                with Front(honest.port, lies) as front:
                    seen = live(name, front, seed, bundle)
                yield name, judged(name, seen, library), seen[2]
        for variant in (*FORGED, *FORGED_REPORTED):
            with lab_backend(VARIANTS[variant], say) as writer:
                for seed in range(min(seeds, 2)):
                    with Front(writer.port, Lies(), forged_port=honest.port) as front:
                        seen = live(f"forged-{variant}", front, seed, bundle)
                    yield f"forged-{variant}", judged(f"forged-{variant}", seen, library), seen[2]
    hidden = [c for c in conditions() if c.kind == "hidden" and c.weights == "f16"]
    for variant in ("f16", *RAW):
        for seed, condition in enumerate(random.Random(7).sample(hidden, min(seeds, 4))):
            what: Variant = dataclasses.replace(VARIANTS[variant], template=condition.template)
            with lab_backend(what, say) as server, Front(server.port, Lies(), completions=True) as front:
                seen = live(f"raw-{variant}", front, seed, bundle)
            yield f"raw-{variant}", judged(f"raw-{variant}", seen, library), seen[2]


# -- truth -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tokenizer() -> object:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(lab_checkpoint(say) / "tokenizer.json"))


def true_lengths(condition: Condition, plan: Plan) -> set[int]:
    """How many tokens longer than officially each structure of prompt is, by the tokenizer itself."""
    messages = [r.probe.messages for r in plan.prompt_requests]
    official, served = (
        render_conversations(template, messages, special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, name="x")
        for template in (OFFICIAL_TEMPLATE, condition.template)
    )  # fmt: skip

    def tokens(text: str) -> int:
        return len(_tokenizer().encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    return {tokens(b) - tokens(a) for a, b in zip(official, served, strict=True)}


# -- the figures -----------------------------------------------------------------------------------------------


def measure(document: Document, seed: int, quick: bool) -> None:
    """Everything."""
    bundle = load_bundle("smollm2-135m-instruct")
    library = build_library(bundle, load_policy("strict"), 20)
    every = conditions()
    if quick:
        every = [c for c in every if c.name in QUICK]
    draws = 1 if quick else 2
    plain = [c for c in every if c.weights == "f16"]
    rng = random.Random(seed)

    def add(name: str, found: int, of: int, target: str, holds: bool) -> None:
        value, interval = share(found, of)
        document.figures[name] = Figure(value, f"share of {of}", target, holds, interval)

    whole: dict[str, list[Audited]] = {}
    spent: dict[str, list[dict[str, Observation]]] = {}
    for name, audited, observations in whole_audits(bundle, library, 1 if quick else 5):
        whole.setdefault(name, []).append(audited)
        spent.setdefault(name, []).append(observations)
    lying = [(name, a) for name in SAMPLING_LIES for a in whole[name]]

    # Honest weights behind random prompts and lies: half of them with true counts, half with a lie about counts.
    drawn = [
        (condition, rng.choice(USAGES) if rng.random() < 0.5 else "true")
        for condition in (rng.choice(plain) for _ in range((20 if quick else HONEST) - len(lying)))
    ]
    honest = [(c, audit(c, usage, seed + i, bundle, library)) for i, (c, usage) in enumerate(drawn)]
    all_honest = [a for _, a in honest] + [a for _, a in lying]
    blamed = sum(a.findings["weights"].outcome == "inconsistent" for a in all_honest)
    add("weight-level false verdicts", blamed, len(all_honest), "0", blamed == 0)
    recorded = [a for c, a in honest if c.kind == "recorded"]
    weighed = sum(a.findings["weights"].outcome == "consistent" for a in recorded)
    add("weights judged behind a recorded rendering", weighed, len(recorded), ">= 0.90", weighed >= 0.9 * len(recorded))
    right = [(expected(c), a) for c, a in honest] + [("sampling", a) for _, a in lying]
    named = sum(a.verdict.cause == cause for cause, a in right)
    add("true cause named first", named, len(right), ">= 0.95", named >= 0.95 * len(right))
    document.reported["causes named, by what is wrong and how tokens are counted"] = {
        f"{kind}, {usage}": dict(Counter(str(a.verdict.cause) for c, a in honest if c.kind == kind and a.usage == usage))
        for kind in KINDS for usage in USAGES
    }  # fmt: skip
    document.reported["causes named under sampling lies"] = {
        name: dict(Counter(str(a.verdict.cause) for n, a in lying if n == name)) for name in SAMPLING_LIES
    }

    # Sampling that is honest, behind honest and altered weights.
    drawn_as_said = [
        a for name in ("honest", "no-logprobs", "raw-f16", *(f"raw-{v}" for v in RAW)) for a in whole[name]
    ]
    accused = sum(a.findings["sampling"].outcome == "inconsistent" for a in drawn_as_said)
    add("honest sampling called otherwise", accused, len(drawn_as_said), "0", accused == 0)

    spoken_of = [a for a in whole["honest"] if any(f.outcome == "inconsistent" for f in a.findings.values())]
    add("honest host with anything called inconsistent", len(spoken_of), len(whole["honest"]), "0", not spoken_of)

    # The length of a hidden prompt.
    exact = of = 0
    for condition in (c for c in plain if c.kind == "hidden" and c.engine == "llamacpp"):
        plan = answers_of(condition, bundle)[0]
        found = audit(condition, "true", seed, bundle, library)
        length = next((e.value for e in found.findings["prompt"].effects if e.unit == "tokens"), None)
        of += 1
        exact += length is not None and length in true_lengths(condition, plan)
    add("length of a hidden prompt exact, true counts", exact, of, "1", exact == of)
    document.reported["length of a hidden prompt by likelihood alone"] = (
        "not estimated: no method was found worth its requests"
    )

    # Two faults at once.
    both: dict[str, list[Audited]] = {"true": [], "none": []}
    for condition in (c for c in every if c.weights != "f16" and c.kind == "recorded"):
        for usage, audits in both.items():
            audits += [audit(condition, usage, seed + i, bundle, library) for i in range(draws)]
    rendering = {c.name: c.rendering for c in every}
    for usage, audits in both.items():
        hit = sum(a.served == rendering[a.name] and a.findings["weights"].cause == "precision" for a in audits)
        add(f"two faults both named, counts {usage}", hit, len(audits), ">= 0.90", hit >= 0.9 * len(audits))
        document.reported[f"two faults, counts {usage}, not both named"] = dict(
            Counter(
                a.name
                for a in audits
                if not (a.served == rendering[a.name] and a.findings["weights"].cause == "precision")
            )
        )

    # Any weights behind an unknown hidden prompt.
    unknown = [c for c in every if c.kind == "hidden"]
    behind = [audit(c, "true", seed + i, bundle, library) for c in unknown for i in range(draws)]
    kept = sum(
        a.findings["prompt"].outcome == "inconsistent" and a.findings["weights"].outcome == "inconclusive"
        for a in behind
    )
    add(
        "unknown hidden prompt: prompt differs, weights not judged",
        kept,
        len(behind),
        ">= 0.95",
        kept >= 0.95 * len(behind),
    )
    judged_raw = [a for name in RAW for a in whole[f"raw-{name}"]]
    hit = sum(
        a.findings["weights"].cause == "precision" and a.findings["prompt"].cause == "hidden_prompt" for a in judged_raw
    )
    add(
        "unknown hidden prompt, raw completions open: 4-bit weights named as well",
        hit,
        len(judged_raw),
        ">= 0.90",
        hit >= 0.9 * len(judged_raw),
    )
    document.reported["unknown hidden prompt, raw completions open, honest weights"] = dict(
        Counter(a.findings["weights"].outcome for a in whole["raw-f16"])
    )

    # The template by likelihood alone.
    templates = [
        audit(c, usage, seed + i, bundle, library)
        for c in plain if c.kind == "recorded" for usage in USAGES[1:] for i in range(draws)
    ]  # fmt: skip
    hit = sum(a.served == rendering[a.name] and a.findings["prompt"].outcome == "inconsistent" for a in templates)
    add(
        "template named among 16, counts missing or wrong", hit, len(templates), ">= 0.95", hit >= 0.95 * len(templates)
    )
    document.reported["templates not named, counts missing or wrong"] = dict(
        Counter(a.name for a in templates if a.served != rendering[a.name])
    )

    # Forged logprobs.
    caught = {
        name: [a.findings["sampling"].outcome == "inconsistent" for a in whole[f"forged-{name}"]]
        for name in (*FORGED, *FORGED_REPORTED)
    }
    of = sum(len(caught[name]) for name in FORGED)
    hit = sum(sum(caught[name]) for name in FORGED)
    add(
        "logprobs forged, text of another model or of at most 4.5 bits: caught",
        hit,
        of,
        "1 within 100 output tokens",
        hit == of,
    )
    tokens = {
        name: int(np.median([forging_tokens(o) for o in spent[f"forged-{name}"]]))
        for name in (*FORGED, *FORGED_REPORTED)
    }
    worst = max(tokens[name] for name in FORGED)
    document.figures["output tokens that catching rests on, most"] = Figure(worst, "tokens", "<= 100", worst <= 100)
    document.reported["forged, caught of audits"] = {
        name: f"{sum(hits)} of {len(hits)}" for name, hits in caught.items()
    }
    document.reported["forged, weights blamed or cleared"] = dict(
        Counter(a.findings["weights"].outcome for name in FORGED for a in whole[f"forged-{name}"])
    )

    # What it costs.
    for name in ("honest", "no-logprobs"):
        gates = sum(not r.startswith(("probe-", "raw-")) for r in spent[name][0])
        document.figures[f"requests of all gates, {name}"] = Figure(gates, "requests", "<= 40", gates <= 40)
    document.reported["honest host, every finding"] = {
        check: f.outcome for check, f in whole["honest"][0].findings.items()
    }
    document.reported["no logprobs, every finding"] = {
        check: f.outcome for check, f in whole["no-logprobs"][0].findings.items()
    }
    document.reported["counts"] = {
        "conditions": len(every),
        "altered": len(ALTERED) * len(WITH_ALTERED),
        "audits over HTTP": sum(map(len, whole.values())),
    }


def forging_tokens(observations: dict[str, Observation]) -> int:
    """Output tokens of the texts that the check of the drawn tokens reads."""
    names = ("cold", "cold-nonce", "cold-night", "cold-drawer", "red", "cold-again")
    return sum(len(o.positions or []) for o in observations.values() if o.probe_id.removeprefix("sampling-") in names)


QUICK = ("recorded-no-default-system", "recorded-missing-bos", "recorded-generic-system", "recorded-generic-system+int8", "recorded-missing-bos+q4_0", "before-2", "default-3", "before-2+int4-g64", "whitespace-blank-line")  # fmt: skip


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few conditions, one draw of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    document = Document("causes")
    measure(document, given.seed, given.quick)
    return document.print(given.json)


if __name__ == "__main__":
    raise SystemExit(main())
