"""Departures really served over HTTP on other engines than the one that they were recorded on, and their answers.

120 probes of the one-token pool are sent once to each, in the order of one draw, and the short answers of level L2 and, where the engine
gives prompt logprobs, the forced texts of level L1; the exchanges are kept under .benchmarks-cache/served/ and audits are drawn
from them again and again. Two engines serve: llama.cpp (16-bit floats, no grid in its logprobs) and transformers in bfloat16 (whose
logits lie on a grid). The departures of the bundle were recorded with transformers in float32.
"""

from dataclasses import dataclass

from figures import CACHE, say
from weighbridge.audit import collect_run
from weighbridge.capability import read_capability
from weighbridge.judge.policy import load_policy
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS, TorchVariant, Variant
from weighbridge.observe import observe
from weighbridge.plan import make_plan
from weighbridge.records import Capability, Endpoint, Limits, LogprobLevel, Observation
from weighbridge.reference.bundle import Bundle
from weighbridge.reference.local import LocalSetting
from weighbridge.reference.roundings import WEIGHT_ROUNDINGS
from weighbridge.store import RunFolder

PROBES = 120  # of the one-token pool's 240
CAPABILITY_CALLS = 2  # of an endpoint that returns 20 logprobs


@dataclass(frozen=True)
class Served:
    """One thing that was served: on which engine, and which recorded departure it is, if it is one."""

    engine: str
    variant: str | None
    what: Variant | TorchVariant

    @property
    def name(self) -> str:
        """Engine and variant; also the folder in the cache."""
        return f"{self.engine}-{self.what.name}"


def _transformers(name: str, variant: str | None, **setting: object) -> Served:
    local = LocalSetting.model_validate({"dtype": "bfloat16", **setting})
    return Served(
        "transformers", variant, TorchVariant(name, name, None if variant is None else "precision", setting=local)
    )


def _llamacpp(name: str, variant: str | None) -> Served:
    known = VARIANTS.get(name) or Variant(name, name, None if variant is None else "precision", weights=name)
    return Served("llamacpp", variant, known)


WEIGHTS = tuple(WEIGHT_ROUNDINGS)
# Group sizes differ on one engine alone: each file takes a minute to make and to ask.
ONE_ENGINE = ("int4-g32", "int4-g128", "int4-asym-g32", "int4-asym-g128", "nf4-g32", "nf4-g128")
HONEST = (_llamacpp("f16", None), _transformers("bf16", None))
DEPARTURES = (
    *(_llamacpp(name, name) for name in WEIGHTS if name not in ONE_ENGINE),
    *(_llamacpp(name, name) for name in ("q8_0", "q4_0", "kv-q8_0", "kv-q4_0", "depth-24")),
    *(_transformers(name, name, weights=name) for name in WEIGHTS),
    _transformers("w8a8-int8", "w8a8-int8", weights="int8", activations="int8"),
    _transformers("w8a8-fp8", "w8a8-fp8", weights="fp8-e4m3", activations="fp8-e4m3"),
    _transformers("kv-fp8", "kv-fp8", kv_cache="fp8-e4m3"),
    _transformers("kv-int8", "kv-int8", kv_cache="int8"),
    _transformers("kv-int4", "kv-int4", kv_cache="int4"),
    _transformers("depth-24", "depth-24", remove_blocks=[*range(13, 19)]),
)
# What is asked at the levels L1 (where the engine gives a prompt's logprobs) and L2 as well.
AT_ALL_LEVELS = ("llamacpp-f16", "llamacpp-int8", "llamacpp-q8_0", "transformers-bf16", "transformers-int8", "transformers-fp8-e4m3", "transformers-int4-g64", "transformers-kv-fp8")  # fmt: skip


def answers_of(served: Served, bundle: Bundle, level: LogprobLevel = "L3") -> tuple[Capability, list[Observation]]:
    """What it answered to the probes of a level; asked now, or read from the cache."""
    pool = bundle.pool_at(level)
    assert pool is not None
    folder = RunFolder(CACHE / "served" / pool.sha256[:12] / served.name)
    if not (folder.path / "plan.json").exists():
        endpoint = Endpoint(
            name=served.name, base_url="http://127.0.0.1:1/v1", model=MODEL_NAME,
            limits=Limits(max_requests=PROBES + CAPABILITY_CALLS, timeout_s=600),
        )  # fmt: skip
        never = load_policy("strict").model_copy(update={"differs_e_value": 1e300, "consistent_e_value": 1e300})
        RunFolder.create(folder.path, make_plan(endpoint, never, bundle, level=level, seed="collect"))
    plan = folder.plan()
    if folder.exchanges()[1] is None:
        with lab_endpoint(served.what, Lies(), say) as front:
            say(f"collecting {served.name}, level {level}")
            endpoint = plan.endpoint.model_copy(update={"base_url": front.base_url})
            collect_run(folder, plan, endpoint, bundle, None, lambda _: None)
    observations = observe(plan, folder.exchanges()[0])
    capability = read_capability({k: v for k, v in observations.items() if k.startswith("capability")})
    return capability, [o for k, o in observations.items() if not k.startswith("capability")]
