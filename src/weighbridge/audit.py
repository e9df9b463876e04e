"""One audit, from plan to verdict: collect until the question is answered, then judge what was collected."""

import asyncio
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from weighbridge.canonical import sha256_hex
from weighbridge.capability import asks_for_text, next_capability_request, read_capability, sampling_of
from weighbridge.collect import Budget, Collector, WaitTooLongError, is_transient
from weighbridge.dialects import DIALECTS
from weighbridge.dialects.routes import LISTING, RECORDS, listing_path, record_path
from weighbridge.errors import BundleError
from weighbridge.judge.case import Case
from weighbridge.judge.checks.reasoning import reasons
from weighbridge.judge.checks.sampling import gives_copies
from weighbridge.judge.library import MIN_TOP_LOGPROBS, Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.texts import TextLibrary, build_text_library
from weighbridge.judge.verdict import (
    control_of,
    is_decided,
    is_decided_raw,
    is_diversion_decided,
    is_diversion_owed,
    judge,
    may_be_diverted,
    useful_probes,
)
from weighbridge.judge.whole import build_whole_library, wanted_repeats
from weighbridge.keys import Key
from weighbridge.observe import observe
from weighbridge.plan import check_draw, worst_case_tokens
from weighbridge.records import (
    AGAIN,
    Capability,
    ControlKind,
    Endpoint,
    Exchange,
    Findings,
    Observation,
    Plan,
    PlannedRequest,
    Verdict,
    again_twin,
    drawn_twin,
    raw_twin,
)
from weighbridge.reference.bundle import OFFICIAL, Bundle, load_bundle
from weighbridge.sampling import EFFORTS
from weighbridge.store import RunFolder, Stopped
from weighbridge.transport import Transport

COUNTED_WITHOUT_LOGPROBS = 10  # probes that are sent for their token counts alone, where nothing else is
NOT_COLD = "not_cold"
MOST_FAILURES_IN_A_ROW = 3
RECORD_WAIT_S = 2.5  # a router writes its record of an answer some seconds after the answer
_REFUSALS = frozenset({"http_401", "http_402", "http_403", "http_404", "redirect", "unknown_host", "tls"})
# One probe may be forbidden or lost by itself; these concern all of them.
_REFUSES_EVERYTHING = frozenset({"http_401", "http_402", "redirect", "unknown_host", "tls"})
Seen = dict[str, Observation]
Result = TypeVar("Result")
FINAL_REASONS = frozenset({"decided", "probes_used_up", "level_not_supported"})


# As many as there are processors, whatever the number of audits: more would only hold more arrays at once. The event loop's own threads
# look up names, and a host without one may keep them for long.
_DECIDING = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="deciding")


@dataclass(frozen=True)
class Progress:
    """What an onlooker may want to know after each request."""

    stage: str
    requests: int
    planned: int
    log10_e_value: float | None
    noise_nats: float | None


def _of_the_whole(because: str | None) -> str | None:
    """Why an audit ends whose raw completions ended so: that a host does not answer these, or not now, is no more than that."""
    return None if because in ("refused", "unreachable", "rate_limited") else because


class Auditor:
    """Collects one run. Holds what has come back so far; the run folder holds the same on disk."""

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        endpoint: Endpoint,
        bundle: Bundle | None,
        key: Key | None,
        onlooker: Callable[[Progress], None],
    ) -> None:
        self._plan = plan
        self._endpoint = endpoint
        self._bundle = bundle
        self._key = key
        self._onlooker = onlooker
        self._folder = folder
        self._dialect = DIALECTS[endpoint.dialect]
        self._library: Library | None = None
        self._texts: TextLibrary | None = None
        # Nothing is decided on the answers about sampling while they are collected.
        self._not_weighed = {request.request_id for request in plan.sampling_requests}
        self._useful: set[str] | None = None  # probes that can still tell something, where that is not all
        exchanges, self._stopped = folder.exchanges()
        self._attempts: dict[str, list[Exchange]] = {}
        for exchange in exchanges:
            self._attempts.setdefault(exchange.sent.request_id, []).append(exchange)
        self._seen: dict[str, Observation] = {}
        self._budget = Budget(endpoint.limits, endpoint.price)
        for name in plan.route_requests:
            for _ in self._attempts.get(name, []):
                self._budget.reserve(0, 0)
        for request in plan.requests:
            attempts = self._attempts.get(request.request_id, [])
            for _ in attempts:
                self._budget.reserve(*worst_case_tokens(request))
            # What was not answered, or was cut off by a crash, is asked again; what was answered never is.
            if attempts and self._dialect.observe(request.probe.id, attempts).answered:
                self._note(request, attempts)

    async def run(self) -> str:
        """Collect until decided; returns why it stopped."""
        if self._stopped is not None and self._stopped.because in FINAL_REASONS:
            return self._stopped.because
        with self._folder.log() as log:
            async with Transport(self._endpoint, self._key) as transport:
                collector = Collector(transport, log, self._budget, self._key)
                try:
                    because = await self._all(collector)
                except WaitTooLongError:
                    because = "rate_limited"
            log.append(Stopped(because=because))
        return because

    async def _all(self, collector: Collector) -> str:
        """Who is listed, what is exposed, what becomes of the prompt, the weights, and what becomes of sampling parameters."""
        if self._plan.endpoint.on_openrouter:
            await self._listing(collector)
        because = await self._capability(collector)
        if because is not None:
            return because
        await self._listing(collector)
        because = await self._each(collector, self._plan.prompt_requests)
        if because is not None:
            return because
        because = await self._probes(collector)
        if because in FINAL_REASONS:
            await self._records(collector)
            because = _of_the_whole(await self._raw_probes(collector)) or because
            because = await self._sampling(collector) or because
            if because in FINAL_REASONS and self._texts is not None and gives_copies(self._case(self._seen)):
                # Then repeats told nothing, and what seemed decided is not.
                because = await self._probes(collector)
            if because in FINAL_REASONS:
                because = await self._whole_answers(collector) or because
        return because

    async def _listing(self, collector: Collector) -> None:
        """Ask for the listing, once: a router before anything else, another host as soon as it has answered anything."""
        if LISTING in self._plan.route_requests:
            await self._look_up(collector, LISTING, listing_path(self._plan.endpoint), tries=1)

    async def _records(self, collector: Collector) -> None:
        """Ask a router for its records of a few answers; the last ones are too young to have any."""
        plan = self._plan
        before = [
            r.request_id
            for r in (*plan.capability_requests, *plan.prompt_requests, *plan.probe_requests, *plan.text_requests)
        ]
        seen = [self._seen[name] for name in before if name in self._seen]
        ids = list(dict.fromkeys(o.answer_id for o in seen if o.answer_id is not None))
        chosen = dict.fromkeys(ids[n * len(ids) // len(RECORDS)] for n in range(len(RECORDS))) if ids else {}
        for name, answer_id in zip(RECORDS, chosen, strict=False):
            if name not in plan.route_requests:
                return
            status = await self._look_up(collector, name, record_path(answer_id), tries=2, missing_wait_s=RECORD_WAIT_S)
            if status != 200:
                return

    async def _look_up(
        self, collector: Collector, request_id: str, path: str, *, tries: int, missing_wait_s: float | None = None
    ) -> int | None:
        """Ask the host about itself and return the status; whatever comes back is data, stops nothing and is not asked again."""
        attempts = self._attempts.get(request_id, [])
        if all(attempt.received.failure == "interrupted" for attempt in attempts):
            try:
                attempts, _ = await collector.send(
                    request_id, path, None, (0, 0), attempts, tries=tries, missing_wait_s=missing_wait_s
                )
            except WaitTooLongError:
                return None
            self._attempts[request_id] = attempts
        return attempts[-1].received.status if attempts else None

    async def _each(self, collector: Collector, requests: list[PlannedRequest]) -> str | None:
        """Send all of some requests; returns why that was not possible."""
        return await self._send_until(collector, requests, lambda _: None)

    async def _raw_probes(self, collector: Collector) -> str | None:
        """Ask the weights with the reference's own tokens, where the chat's prompt is not known; one refusal is an answer."""
        case = await _in_thread(self._case, dict(self._seen))
        if case.served is not None or self._bundle is None:
            return None
        by_text = case.texts is not None
        planned = self._plan.text_requests if by_text else self._plan.probe_requests
        requests = [r for p in planned if self._dialect.asks(r := raw_twin(p))]
        if not requests:
            return None
        refusal, first = None, self._seen.get(requests[0].request_id)
        if first is None:
            refusal, first = await self._send(collector, requests[0], read_capability(self._seen))
        if refusal is not None or first is None or not first.answered or (first.text if by_text else first.top) is None:
            return refusal
        if by_text:
            requests = [twin for request in requests for twin in (request, again_twin(request))]
        because = await self._send_until(
            collector, requests, lambda seen: "decided" if is_decided_raw(self._case(seen)) else None
        )
        return None if because in (None, "decided") else because

    async def _whole_answers(self, collector: Collector) -> str | None:
        """Where there is text alone, spend what is left on whole answers, which tell whether some requests go elsewhere.

        Where some stand out they are asked for again, and so are some others, which tells whether temperature 0 is served. How the first ones end
        is no reason for anything; what keeps the repeats from being asked is.
        """
        case = await _in_thread(self._case, dict(self._seen))
        known = build_whole_library(self._bundle, self._plan.policy) if self._bundle is not None else None
        if known is None or not may_be_diverted(case):
            return None
        asked = self._plan.whole_requests
        because, tried = None, set[str]()
        # Whenever one more stands out, so that no honest stack at temperature 0 is left, until repeats settle it or all have been asked.
        while because is None:
            await self._send_until(collector, asked, self._until(is_diversion_owed))
            case = await _in_thread(self._case, dict(self._seen))
            if case.whole is None or not is_diversion_owed(case):
                break
            again = [twin for twin in wanted_repeats(case.whole, asked) if twin.request_id not in tried]
            if not again:
                break
            because = await self._send_until(collector, again, self._until(is_diversion_decided))
            tried |= {twin.request_id for twin in again}
        return because

    def _until(self, settled: Callable[[Case], bool]) -> Callable[[Seen], str | None]:
        return lambda seen: "decided" if settled(self._case(seen)) else None

    async def _sampling(self, collector: Collector) -> str | None:
        efforts = {f"sampling-{name}" for name in EFFORTS}
        requests = [
            r for r in self._plan.sampling_requests if r.request_id not in efforts or reasons([*self._seen.values()])
        ]
        return await self._each(collector, requests)

    async def _capability(self, collector: Collector) -> str | None:
        requests = {request.request_id: request for request in self._plan.capability_requests}
        while (request_id := next_capability_request(self._seen, logprobs=self._dialect.gives_logprobs)) is not None:
            request = requests[request_id]
            refusal, _ = await self._send(collector, request, read_capability(self._seen))
            if refusal is not None:
                return refusal
        capability = read_capability(self._seen)
        if not capability.reachable:
            return "refused" if (capability.refused or "").split(":")[0] in _REFUSALS else "unreachable"
        return None

    async def _probes(self, collector: Collector) -> str:
        capability = read_capability(self._seen)
        enough_logprobs = capability.top_logprobs >= MIN_TOP_LOGPROBS
        if self._bundle is not None and enough_logprobs and self._library is None:
            self._library = _library(self._bundle, self._plan, capability)
        if not enough_logprobs and self._bundle is not None and self._plan.text_requests:
            return await self._text_probes(collector, self._bundle, capability)
        counted = 0 if self._plan.prompt_requests else COUNTED_WITHOUT_LOGPROBS
        requests = self._plan.probe_requests if enough_logprobs else self._plan.probe_requests[:counted]
        because = await self._send_until(collector, requests, self._decided)
        return because or ("probes_used_up" if enough_logprobs else "level_not_supported")

    async def _text_probes(self, collector: Collector, bundle: Bundle, capability: Capability) -> str:
        """Ask for first tokens at temperature 0, and for each that is not the reference's once more; at 1 where 0 is not served."""
        self._library = self._library or _library(bundle, self._plan, capability)
        self._texts = build_text_library(bundle, self._plan.policy)
        pairs = [(request, again_twin(request)) for request in self._plan.text_requests]
        because = await self._send_until(collector, [r for pair in pairs for r in pair], self._decided_or_not_cold)
        if because == NOT_COLD or (because == "unreachable" and self._refuses_cold()):
            drawn = [
                drawn_twin(r) for r in self._plan.probe_requests if self._texts and self._texts.is_drawn(r.probe.id)
            ]
            because = await self._send_until(collector, drawn, self._decided)
        return because or "probes_used_up"

    def _refuses_cold(self) -> bool:
        """Whether temperature 0 was refused, where other requests are answered."""
        asked = [self._seen[r.request_id] for r in self._plan.text_requests if r.request_id in self._seen]
        return bool(asked) and all(o.fault in ("http_400", "http_422", "error_object") for o in asked)

    def _decided_or_not_cold(self, seen: Seen) -> str | None:
        because = self._decided(seen)
        texts = self._case(seen).texts if because is None else None
        return NOT_COLD if texts is not None and not texts.is_cold else because

    async def _send_until(
        self, collector: Collector, requests: list[PlannedRequest], decided: Callable[[Seen], str | None]
    ) -> str | None:
        """Send requests until that is decided, refused or forbidden; returns why it stopped, None where all were sent.

        It is decided in a thread of its own, on what has come back by then: many audits may be under way, and none is to wait for the
        arithmetic of another one.
        """
        capability = read_capability(self._seen)
        waiting = [r for r in requests if r.request_id not in self._seen]
        # What was refused before goes last, so that one forbidden probe does not stop every `resume`.
        waiting.sort(key=lambda r: self._was_refused(r.request_id))
        running: set[asyncio.Task[tuple[str | None, Observation | None]]] = set()
        because = await _in_thread(decided, dict(self._seen))
        failures = 0
        try:
            while True:
                while because is None and len(running) < self._endpoint.limits.concurrency:
                    request = self._next(waiting)
                    if request is None:
                        break
                    running.add(asyncio.create_task(self._send(collector, request, capability)))
                if not running:
                    return because
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    refusal, observation = self._outcome(task)
                    because = because or refusal
                    if observation is not None:
                        failures = 0 if observation.answered else failures + 1
                        if observation.fault in _REFUSES_EVERYTHING:
                            because = because or "refused"
                if failures >= MOST_FAILURES_IN_A_ROW and because is None:
                    because = "unreachable"
                because = because or await _in_thread(decided, dict(self._seen))
        finally:
            for task in running:
                task.cancel()

    def _next(self, waiting: list[PlannedRequest]) -> PlannedRequest | None:
        """Take the next request that can tell something: under another rendering not every probe was recorded."""
        useful = self._useful
        for i, request in enumerate(waiting):
            if asks_for_text(request.request_id) and request.request_id.endswith(AGAIN):
                first = self._seen.get(request.request_id.removesuffix(AGAIN))
                if first is None or self._texts is None or not self._texts.is_in_doubt(first):
                    continue
                return waiting.pop(i)
            if useful is None or request.raw or request not in self._plan.probe_requests or request.probe.id in useful:
                return waiting.pop(i)
        return None

    def _was_refused(self, request_id: str) -> bool:
        attempts = self._attempts.get(request_id)
        return attempts is not None and not is_transient(attempts[-1].received)

    @staticmethod
    def _outcome(task: "asyncio.Task[tuple[str | None, Observation | None]]") -> tuple[str | None, Observation | None]:
        """What a request came to; a wait that is too long stops the collection, and what is under way is awaited."""
        try:
            return task.result()
        except WaitTooLongError:
            return "rate_limited", None

    async def _send(
        self, collector: Collector, request: PlannedRequest, capability: Capability
    ) -> tuple[str | None, Observation | None]:
        temperature, top_logprobs = sampling_of(request, capability)
        # Not made from the draw's seed, which the endpoint must not learn; and another one for every request: under one seed a server
        # takes the same random number each time, and what it draws from different lists is no longer independent.
        seed = int(sha256_hex(f"{self._plan.run_id} {request.request_id}".encode())[:7], 16)
        body: dict[str, Any] = self._dialect.body(
            self._endpoint, request, temperature=temperature, top_logprobs=top_logprobs, seed=seed,
            prompt_ids=self._bundle.prompt_of(request.probe.id) if request.raw and self._bundle is not None else [],
        )  # fmt: skip
        earlier = self._attempts.get(request.request_id, [])
        attempts, refusal = await collector.send(
            request.request_id, self._dialect.path(request), body, worst_case_tokens(request), earlier
        )
        if attempts:
            self._note(request, attempts)
        return refusal, self._seen.get(request.request_id)

    def _note(self, request: PlannedRequest, attempts: list[Exchange]) -> None:
        """Keep what was read from an answer. Its bytes lie in the run folder; a process that holds hundreds of audits does not hold them."""
        observation = self._dialect.observe(request.probe.id, attempts)
        if request.request_id in self._not_weighed:
            observation = observation.model_copy(update={"top": None, "positions": None})
        self._seen[request.request_id] = observation
        self._attempts[request.request_id] = [_without_body(attempt) for attempt in attempts]
        if observation.prompt_tokens is not None:
            self._budget.settle(
                worst_case_tokens(request), observation.prompt_tokens, observation.completion_tokens or 1
            )

    def _case(self, seen: Seen) -> Case:
        return open_case(self._plan, read_capability(seen), seen.values(), self._library)

    def _decided(self, seen: Seen) -> str | None:
        """Why no more of the weights' probes are needed, or None."""
        case = self._case(seen)
        self._useful = useful_probes(case)
        self._tell(case)
        if is_decided(case):
            return "decided"
        # Enough answers came back, and none with logprobs that can be compared.
        fruitless = case.evidence is None and case.served == OFFICIAL and len(case.answers) >= COUNTED_WITHOUT_LOGPROBS
        return "level_not_supported" if fruitless else None

    def _tell(self, case: Case) -> None:
        evidence, texts = case.evidence, case.texts
        log_e = evidence.log_total[-1] if evidence is not None else texts.log_total[-1] if texts is not None else None
        self._onlooker(
            Progress(
                stage="probes" if case.answers or case.text_answers else "capability",
                requests=self._budget.requests,
                planned=self._plan.estimate.requests,
                log10_e_value=None if log_e is None else float(log_e) / math.log(10),
                noise_nats=None if evidence is None else math.exp(evidence.features.log_scales.mean()),
            )
        )


async def _in_thread(compute: Callable[[Seen], Result], seen: Seen) -> Result:
    return await asyncio.get_running_loop().run_in_executor(_DECIDING, compute, seen)


def _without_body(exchange: Exchange) -> Exchange:
    slim = exchange.received.model_copy(update={"body_text": None, "body_base64": None})
    return exchange.model_copy(update={"received": slim})


def judge_run(folder: RunFolder, bundle: Bundle | None) -> tuple[Plan, Findings, Verdict]:
    """Observe and judge what a run folder holds, and write observations, findings and verdict.

    Reads only the folder and the bundle; the same files give the same bytes.
    """
    plan = folder.plan()
    if bundle is not None:
        check_draw(plan, bundle)
    exchanges, stopped = folder.exchanges()
    observations = observe(plan, exchanges)
    observations_sha256 = folder.write_observations(observations.values())
    seen = {name: o for name, o in observations.items() if o.fault != "interrupted"}
    capability = read_capability(seen)
    library = _library(bundle, plan, capability) if bundle is not None else None
    case = open_case(plan, capability, seen.values(), library)
    findings, verdict = judge(
        case,
        requests_sent=len(exchanges),
        stopped_because=stopped.because if stopped is not None else "interrupted",
        all_observations=list(observations.values()),
        observations_sha256=observations_sha256,
        controls=[
            control_of(kind, control.plan().endpoint.name, judge_run(control, bundle)[2])
            for kind, control in controls_of(folder)
        ],
    )
    folder.write_judgement(findings, verdict)
    return plan, findings, verdict


def controls_of(folder: RunFolder) -> list[tuple[ControlKind, RunFolder]]:
    """The runs of endpoints whose truth is known, which lie in a run's own folder."""
    kinds: tuple[ControlKind, ...] = ("honest", "altered")
    return [
        (kind, RunFolder(folder.path / "controls" / kind))
        for kind in kinds
        if (folder.path / "controls" / kind).is_dir()
    ]


def _library(bundle: Bundle, plan: Plan, capability: Capability) -> Library:
    """What was recorded, in the form in which this endpoint gives its logprobs."""
    top_k = max(capability.top_logprobs, MIN_TOP_LOGPROBS)
    return build_library(bundle, plan.policy, top_k, plan.level, bfloat16_logprobs=capability.logprobs_in_bfloat16)


def bundle_of(plan: Plan, given: str | None = None, load: Callable[[str], Bundle] = load_bundle) -> Bundle | None:
    """Load the bundle that a plan names and check that it is the one.

    Parameters
    ----------
    plan : Plan
    given : str, optional
        Where it is now.
    load : callable
        What loads it; for a fleet, whose endpoints share bundles, something that remembers.

    Raises
    ------
    BundleError
        If it is not at hand or has another digest.
    """
    if plan.reference is None:
        return None
    bundle = load(given or plan.reference_path or plan.reference.id)
    if bundle.identity != plan.reference:
        raise BundleError(
            f"the bundle {bundle.manifest.id} at hand is not the one that this run was planned with ({plan.reference.digest[:12]}…)",
            "Name the right one with --reference",
        )
    return bundle


def collect_run(
    folder: RunFolder,
    plan: Plan,
    endpoint: Endpoint,
    bundle: Bundle | None,
    key: Key | None,
    onlooker: Callable[[Progress], None],
) -> str:
    """Collect a run, or the rest of one; returns why it stopped."""
    return asyncio.run(Auditor(folder, plan, endpoint, bundle, key, onlooker).run())


def exit_code(verdict: Verdict, fail_on: str) -> int:
    """The process's exit code for a verdict: see the README's table."""
    if verdict.verdict == "consistent":
        return 0
    if verdict.verdict in ("differs", "differs_replicated"):
        return 0 if fail_on == "never" else 1
    if verdict.endpoint_refused or verdict.stopped_because in ("refused", "unreachable", "rate_limited"):
        return 4
    if verdict.stopped_because in ("budget_requests", "budget_cost"):
        return 5
    return {"never": 0, "inconclusive": 1}.get(fail_on, 3)
