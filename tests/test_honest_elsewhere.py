"""Honest stacks that the library does not hold: nothing that only another engine does may be called a difference.

The answers are made from the reference, with the noise and the 1/8 grid that bfloat16 logits have on other engines
and with the ways in which other servers spell their tokens. This shows no detection; it guards against accusations.
"""

import json
from typing import Any

import numpy as np
import pytest

from weighbridge.dialects.openai_chat import OpenAIChat
from weighbridge.judge.library import Library, build_library
from weighbridge.judge.opening import open_case
from weighbridge.judge.policy import load_policy
from weighbridge.judge.verdict import judge
from weighbridge.plan import make_plan
from weighbridge.records import Capability, Endpoint, Exchange, Observation, Plan, Received, Sent
from weighbridge.reference.bundle import Bundle, load_bundle

ANSWERS = 100


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def library(bundle: Bundle) -> Library:
    return build_library(bundle, load_policy("strict"), 20)


def as_it_is(raw: bytes) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}


def shown_text(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8", "replace") or "<|im_end|>"
    return {"token": text, "bytes": list(text.encode())}


def text_alone(raw: bytes) -> dict[str, Any]:
    return {"token": raw.decode("utf-8", "replace") or "<|im_end|>", "bytes": None}


def inner_alphabet(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8", "replace").replace(" ", "Ġ").replace("\n", "Ċ")
    return {"token": text, "bytes": list(text.encode())}


def numbers(raw: bytes) -> dict[str, Any]:
    return {"token": f"token_id:{int.from_bytes(raw[:3], 'big')}", "bytes": None}


def answers(bundle: Bundle, plan: Plan, spelling: Any, rng: np.random.Generator) -> list[Observation]:
    reference = bundle.logprobs_nats[bundle.stack_index[bundle.manifest.reference_stack]].astype(np.float64)
    observations = []
    for request in plan.probe_requests[:ANSWERS]:
        row = bundle.row_index[request.probe.id]
        values = np.round((reference[row] + rng.normal(0, 0.045, reference.shape[1])) * 8) / 8
        values -= np.log(np.exp(values).sum() / np.exp(reference[row]).sum())
        order = np.argsort(-values)[:20]
        entries = [
            {**spelling(bundle.vocabulary[bundle.token_ids[row, c]]), "logprob": min(float(values[c]), 0.0)}
            for c in order
        ]
        body = {
            "model": "SmolLM2-135M-Instruct",
            "usage": {
                "prompt_tokens": int(bundle.prompt_tokens[0, bundle.probe_index[request.probe.id]]),
                "completion_tokens": 1,
            },
            "choices": [
                {
                    "finish_reason": "length",
                    "message": {"content": "x"},
                    "logprobs": {"content": [{"top_logprobs": entries}]},
                }
            ],
        }
        sent = Sent(
            request_id=request.request_id, attempt=1, sent_at="2026-11-22T00:00:00+00:00", body={"messages": []}
        )
        received = Received(
            request_id=request.request_id, attempt=1, status=200, headers={}, body_text=json.dumps(body), latency_s=0.1
        )
        observations.append(OpenAIChat().observe(request.probe.id, [Exchange(sent=sent, received=received)]))
    return observations


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spelling", [as_it_is, shown_text, text_alone, inner_alphabet, numbers])
def test_no_spelling_and_no_grid_is_called_a_difference(
    spelling: Any, seed: int, bundle: Bundle, library: Library
) -> None:
    endpoint = Endpoint(name="elsewhere", base_url="https://a.example/v1", model="SmolLM2-135M-Instruct")
    plan = make_plan(endpoint, load_policy("strict"), bundle, seed=f"elsewhere-{seed}")
    seen = answers(bundle, plan, spelling, np.random.default_rng(seed))
    capability = Capability(
        reachable=True, top_logprobs=20, temperature_regime="before_temperature", usage_reported=True
    )
    case = open_case(plan, capability, seen, library)
    findings, verdict = judge(
        case, requests_sent=ANSWERS, stopped_because="decided", all_observations=seen, observations_sha256="0" * 64
    )
    assert verdict.verdict != "differs"
    assert not any(finding.outcome == "inconsistent" for finding in findings.findings)
    if spelling is as_it_is:
        assert case.evidence is not None
        assert 0.03 < np.exp(case.evidence.features.log_scales.mean()) < 0.07
        assert verdict.verdict == "consistent"
