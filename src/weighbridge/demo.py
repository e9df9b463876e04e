"""The main job on the embedded default: honest and dishonest endpoints of a real model, served here and audited."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weighbridge.audit import Progress, collect_run
from weighbridge.judge.policy import load_policy
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Findings, Limits, Plan, Verdict
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.store import RunFolder

DEMO_VARIANTS = ("f16", "bf16-busy", "q8_0", "q4_0", "hidden-system", "depth-24")
BUNDLE = "smollm2-135m-instruct"
MAX_REQUESTS = 80

JudgeAndReport = Callable[[RunFolder, Bundle | None], tuple[Plan, Findings, Verdict]]


@dataclass(frozen=True)
class DemoResult:
    """One endpoint of the demo: what it is and what was said of it."""

    truth: str
    verdict: str
    cause: str | None
    expected_cause: str | None
    requests: int
    seconds: float

    @property
    def as_expected(self) -> bool:
        """Whether verdict and cause are right."""
        expected = "consistent" if self.expected_cause is None else "differs"
        return self.verdict == expected and self.cause == self.expected_cause

    def row(self) -> dict[str, Any]:
        """The result as `demo --json` shows it."""
        return {
            "truth": self.truth, "verdict": self.verdict, "cause": self.cause, "expected_cause": self.expected_cause,
            "requests": self.requests, "seconds": round(self.seconds, 2),
        }  # fmt: skip


def run_demo(
    folder: Path,
    seed: str | None,
    max_requests: int,
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Callable[[Progress], None]]],
    judge_and_report: JudgeAndReport,
) -> Iterator[DemoResult]:
    """Serve and audit each variant in turn.

    Parameters
    ----------
    folder : pathlib.Path
        Gets a run folder for each variant.
    seed : str or None
        Seed of the draws; a fresh one by default.
    max_requests : int
        For each endpoint.
    say, progress, judge_and_report : callable
        Talk, a progress display for each endpoint, and what judges a run folder and writes its reports.
    """
    bundle = load_bundle(BUNDLE)
    policy = load_policy("strict")
    seed = seed or secrets.token_hex(8)
    for name in DEMO_VARIANTS:
        variant = VARIANTS[name]
        with lab_endpoint(variant, Lies(), say) as front:
            started = time.monotonic()
            endpoint = Endpoint(
                name=f"lab {name}", base_url=front.base_url, model=MODEL_NAME, reference=BUNDLE, claimed_precision="16 bit",
                limits=Limits(max_requests=max_requests),
            )  # fmt: skip
            plan = make_plan(endpoint, policy, bundle, seed=f"{seed}-{name}")
            run = RunFolder.create(folder / name, plan)
            with progress(endpoint.name) as onlooker:
                collect_run(run, plan, endpoint, bundle, None, onlooker)
            _, _, verdict = judge_and_report(run, bundle)
        yield DemoResult(
            variant.truth,
            verdict.verdict,
            verdict.cause,
            variant.departure,
            verdict.requests_sent,
            time.monotonic() - started,
        )
