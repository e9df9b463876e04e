"""The plan: everything that is decided before the first request is sent."""

import json
import secrets
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from weighbridge import __version__
from weighbridge.canonical import canonical_bytes, sha256_hex
from weighbridge.capability import TEXT, WHOLE, capability_requests
from weighbridge.dialects import DIALECTS
from weighbridge.dialects.routes import route_requests
from weighbridge.errors import BundleError, ConfigurationError, RunFolderError
from weighbridge.probes import Level, Pool, draw, load_pool
from weighbridge.records import (
    BundleIdentity,
    Draw,
    Endpoint,
    Estimate,
    LogprobLevel,
    Plan,
    PlannedRequest,
    Policy,
    PoolIdentity,
    Probe,
)
from weighbridge.reference.bundle import EMBEDDED, Bundle, PoolRecord, rendered_id, unfit_to_judge
from weighbridge.reference.contexts import LEVELS as CONTEXT_LEVELS
from weighbridge.reference.contexts import cold_probes, contexts_of
from weighbridge.reference.paths import MOST_REPEATS, paths_of
from weighbridge.sampling import sampling_requests

MOST_CAPABILITY_REQUESTS = 4
# Of K endpoints that are judged together, one is named only from e ≥ K / 0.01 (e-BH: Wang and Ramdas 2022, JRSS B 84).
FLEET_FALSE_DISCOVERY_RATE = 0.01
# What a template adds to a message at most, in tokens; a token is at least one byte.
TEMPLATE_TOKENS_PER_MESSAGE = 64


def worst_case_tokens(request: PlannedRequest) -> tuple[int, int]:
    """An upper limit of a request's prompt tokens, for any tokenizer that works on bytes, and its completion tokens."""
    messages = request.probe.messages
    prompt = sum(len(m.content.encode()) + TEMPLATE_TOKENS_PER_MESSAGE for m in messages) + TEMPLATE_TOKENS_PER_MESSAGE
    prompt += len(json.dumps(request.probe.tools)) if request.probe.tools is not None else 0
    return prompt, request.max_tokens * int(request.settings.get("n", 1))


def worst_case_usd(plan: Plan) -> float | None:
    """An upper limit of what a plan can cost, whichever of its requests are sent; None without a price."""
    price = plan.endpoint.price
    if price is None:
        return None
    costs = sorted((price.cost_usd(*worst_case_tokens(request)) for request in plan.requests), reverse=True)
    return sum(costs[: plan.endpoint.limits.max_requests])


@lru_cache(maxsize=4)
def pool_of(bundle: Bundle, level: Level = "L3") -> Pool:
    """The pool that a bundle was recorded on for a level of evidence; the same probes in all plans of a fleet.

    Raises
    ------
    BundleError
        If it has none, or the pool at hand is not the one that the bundle names.
    """
    recorded = bundle.pool_at(level)
    if recorded is None:
        raise BundleError(f"the bundle {bundle.manifest.id} holds no pool for level {level}", "Record it with one")
    return pool_at_hand(bundle, recorded)


def pool_at_hand(bundle: Bundle, recorded: PoolRecord) -> Pool:
    """A pool of a bundle: the one that the bundle carries, else the package's.

    Raises
    ------
    BundleError
        If it is not at hand, is not the one that the bundle names, or lacks one of its probes.
    """
    carried = bundle.path / "pools" / recorded.id
    try:
        pool = load_pool(str(carried) if carried.is_dir() else recorded.id)
    except ConfigurationError as error:
        raise BundleError(error.what, f"Put the pool into the bundle's folder as pools/{recorded.id}") from None
    if pool.identity != PoolIdentity(id=recorded.id, version=recorded.version, sha256=recorded.sha256):
        raise BundleError(
            f"the pool {recorded.id} at hand is not the one that the bundle {bundle.manifest.id} was recorded on",
            f"Use the version of Weighbridge that carries that pool, or put the pool into the bundle's folder as pools/{recorded.id}",
        )
    known = {rendered_id(probe.id, recorded.rendering) for probe in pool.probes}
    unknown = {bundle.manifest.probe_ids[i] for i in recorded.probes} - known
    if unknown:
        raise BundleError(
            f"the bundle {bundle.manifest.id} names the probe {min(unknown)}, which its pool lacks",
            "Record the bundle again",
        )
    return pool


def make_plan(
    endpoint: Endpoint,
    policy: Policy,
    bundle: Bundle | None,
    *,
    level: LogprobLevel = "L3",
    fleet_size: int = 1,
    seed: str | None = None,
    run_id: str | None = None,
    created_at: str | None = None,
) -> Plan:
    """Decide what an audit will send.

    Parameters
    ----------
    endpoint : Endpoint
        What is audited; its limits bound the plan.
    policy : Policy
        What counts as honest.
    bundle : Bundle or None
        The reference; without one only the capability calls are planned.
    level : str
        Which kind of evidence is collected.
    fleet_size : int
        How many endpoints are judged together: the more, the stronger the evidence that names one.
    seed : str, optional
        The seed of the draw; a fresh one of 128 bits by default.
    run_id : str, optional
        Also the text that no cache can have seen; a fresh one by default.
    created_at : str, optional
        UTC time, now by default.

    Raises
    ------
    BundleError
        If the bundle's pool is not at hand, or it lacks what judging needs: that is said before anything is paid for.
    """
    seed = seed if seed is not None else secrets.token_hex(16)
    policy = policy.model_copy(
        update={"differs_e_value": max(policy.differs_e_value, fleet_size / FLEET_FALSE_DISCOVERY_RATE)}
    )
    prompts: list[PlannedRequest] = []
    probes: list[PlannedRequest] = []
    texts: list[PlannedRequest] = []
    whole: list[PlannedRequest] = []
    identity: PoolIdentity | None = None
    sealed = False
    if bundle is not None:
        problem = unfit_to_judge(bundle, level)
        if problem is not None:
            raise BundleError(
                f"the bundle {bundle.manifest.id} cannot be judged against: {problem}",
                "Record or merge what is missing",
            )
        pool = pool_of(bundle, level)
        identity, sealed = pool.identity, pool.description.visibility == "sealed"
        by_id = {probe.id: probe for probe in pool.probes}
        # The whole pool in the order of the draw: the budget, not the plan, says how far an audit goes.
        probes = [
            _request(bundle, level, f"probe-{n:04d}", by_id[probe_id])
            for n, probe_id in enumerate(_drawn(bundle, level, seed), start=1)
        ]
        prompts = _prompt_requests(bundle)
        texts = _text_requests(bundle, seed)
        whole = _whole_requests(bundle)
    run_id = run_id or secrets.token_hex(8)
    sampling = _sampling_requests(endpoint, bundle, run_id)
    capability = capability_requests()
    route = route_requests(endpoint)
    return Plan(
        weighbridge_version=__version__,
        run_id=run_id,
        created_at=created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        endpoint=endpoint,
        policy=policy,
        reference=bundle.identity if bundle else None,
        reference_path=_path_to_remember(bundle),
        pool=identity,
        sealed=sealed,
        level=level,
        fleet_size=fleet_size,
        draw=Draw(seed=seed, commitment=_commitment(seed, identity, bundle.identity if bundle else None, policy)),
        route_requests=route,
        capability_requests=capability,
        prompt_requests=prompts,
        probe_requests=probes,
        sampling_requests=sampling,
        text_requests=texts,
        whole_requests=whole,
        estimate=_estimate(endpoint, bundle, len(route), [*capability, *prompts, *sampling], probes, texts, whole),
    )


def check_draw(plan: Plan, bundle: Bundle) -> None:
    """Check that a plan's probes are the ones that its seed draws: every error rate rests on that.

    Raises
    ------
    RunFolderError
        If they are not, or the commitment is another.
    """
    drawn = _drawn(bundle, plan.level, plan.draw.seed)
    committed = _commitment(plan.draw.seed, plan.pool, plan.reference, plan.policy, plan.weighbridge_version)
    fixed = (plan.prompt_requests, plan.sampling_requests) == (
        _prompt_requests(bundle),
        _sampling_requests(plan.endpoint, bundle, plan.run_id),
    )
    # A plan without probes, as a doctor's, says nothing of the weights.
    as_drawn = not plan.probe_requests or [r.probe.id for r in plan.probe_requests] == drawn
    # Plans that were made before texts were compared have none.
    as_drawn = as_drawn and (not plan.text_requests or plan.text_requests == _text_requests(bundle, plan.draw.seed))
    as_drawn = as_drawn and (not plan.whole_requests or plan.whole_requests == _whole_requests(bundle))
    if not as_drawn or plan.draw.commitment != committed or not fixed:
        raise RunFolderError(
            "the plan's probes are not the draw of its seed", "A run whose plan was changed cannot be judged"
        )
    if plan.sealed and pool_of(bundle, plan.level).description.visibility != "sealed":
        raise RunFolderError("the plan calls a public pool sealed", "A run whose plan was changed cannot be judged")


def _drawn(bundle: Bundle, level: LogprobLevel, seed: str) -> list[str]:
    pool = bundle.pool_at(level)
    return [] if pool is None else draw(bundle.usable_probes(pool), seed)


def _sampling_requests(endpoint: Endpoint, bundle: Bundle | None, run_id: str) -> list[PlannedRequest]:
    """Those that the endpoint's kind of API can be asked."""
    dialect = DIALECTS[endpoint.dialect]
    return [request for request in sampling_requests(bundle, run_id) if dialect.asks(request)]


def _text_requests(bundle: Bundle, seed: str) -> list[PlannedRequest]:
    """What is asked at temperature 0 where no logprobs are returned, in the order of the draw."""
    contexts = contexts_of(bundle)
    if contexts is None:
        return []
    pools = [pool_of(bundle, level) for level in CONTEXT_LEVELS if bundle.pool_at(level) is not None]
    by_id = {probe.id: probe for pool in pools for probe in pool.probes}
    drawn = draw(cold_probes(contexts), seed)
    return [
        PlannedRequest(request_id=f"{TEXT}{n:04d}", probe=by_id[probe_id]) for n, probe_id in enumerate(drawn, start=1)
    ]


def _whole_requests(bundle: Bundle) -> list[PlannedRequest]:
    """What is asked for a whole answer where no logprobs are returned, in the pool's order: what tells most comes first.

    What an honest stack may do is known of each answer by itself, so nothing has to be drawn.
    """
    recorded = bundle.pool_at("whole")
    if recorded is None or paths_of(bundle) is None:
        return []
    usable = set(bundle.usable_probes(recorded))
    probes = [probe for probe in pool_at_hand(bundle, recorded).probes if probe.id in usable]
    return [_answered(bundle, f"{WHOLE}{n:04d}", probe) for n, probe in enumerate(probes, start=1)]


def _prompt_requests(bundle: Bundle) -> list[PlannedRequest]:
    recorded = bundle.pool_at("prompt")
    if recorded is None:
        return []
    pool = pool_at_hand(bundle, recorded)
    return [PlannedRequest(request_id=f"prompt-{n:02d}", probe=probe) for n, probe in enumerate(pool.probes, start=1)]


def _request(bundle: Bundle, level: LogprobLevel, request_id: str, probe: Probe) -> PlannedRequest:
    """How a probe is asked at a level: an answer that is to be generated is not sent with the question."""
    if level == "L2":
        return _answered(bundle, request_id, probe)
    return PlannedRequest(request_id=request_id, probe=probe, forced=level == "L1")


def _answered(bundle: Bundle, request_id: str, probe: Probe) -> PlannedRequest:
    """The question of a probe that holds the reference's answer, to be answered as far as that was recorded."""
    question = probe.model_copy(update={"messages": probe.messages[:-1]})
    return PlannedRequest(request_id=request_id, probe=question, max_tokens=bundle.scored_tokens(probe.id))


def _commitment(
    seed: str, pool: PoolIdentity | None, reference: BundleIdentity | None, policy: Policy, version: str = __version__
) -> str:
    """The SHA-256 over everything that a draw is bound to."""
    return sha256_hex(
        canonical_bytes({
            "seed": seed, "pool": pool.sha256 if pool else None, "weighbridge": version,
            "reference": reference.digest if reference else None, "policy": policy.model_dump(mode="json", by_alias=True),
        })
    )  # fmt: skip


def _path_to_remember(bundle: Bundle | None) -> str | None:
    """Where a later `resume` or `replay` looks for the bundle; an embedded one is found by its name."""
    if bundle is None or EMBEDDED.get(bundle.manifest.id) == bundle.identity.digest:
        return None
    return str(Path(bundle.path).resolve())


def _estimate(
    endpoint: Endpoint,
    bundle: Bundle | None,
    free: int,
    fixed: list[PlannedRequest],
    probes: list[PlannedRequest],
    texts: list[PlannedRequest],
    whole: list[PlannedRequest],
) -> Estimate:
    """The most that can be sent: so many that cost no tokens, what is always asked, and then probes until the limit.

    These are the probes with logprobs, or those of text, with their repeats and whole answers, whichever are dearer.
    """
    both = [probes, [*whole, *whole[:MOST_REPEATS], *(twin for request in texts for twin in (request, request))]]
    requests = min(endpoint.limits.max_requests, free + len(fixed) + max(len(one) for one in both))
    first = fixed[: max(0, requests - free)]
    tokens = sum(worst_case_tokens(request)[0] for request in first)
    completion = sum(worst_case_tokens(request)[1] for request in first)
    if bundle is not None:
        left = max(0, requests - free - len(first))
        prompts = [
            sorted((int(bundle.prompt_tokens[0, bundle.probe_index[r.probe.id]]) for r in one), reverse=True)
            for one in both
        ]
        tokens += max(sum(one[:left]) for one in prompts)
        completion += max(sum(r.max_tokens for r in one[:left]) for one in both)
    cost = endpoint.price.cost_usd(tokens, completion) if endpoint.price else None
    source = "the endpoint's [price], retries not counted" if endpoint.price else "no price was given"
    return Estimate(
        requests=requests, prompt_tokens=tokens, completion_tokens=completion, cost_usd=cost, price_source=source
    )
