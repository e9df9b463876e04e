"""What the harness costs: its request rate against a bare loop over the same server, and its memory.

Both loops send the same bodies to the same lab endpoint at the same concurrency, in turn, and the ratio is taken
pair by pair. The endpoint runs in a process of its own.

    python benchmarks/harness.py [--quick] [--seed 1] [--json]
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np

from figures import Document, Figure, say
from weighbridge.audit import collect_run
from weighbridge.judge.policy import load_policy
from weighbridge.plan import make_plan
from weighbridge.records import Endpoint, Limits, Plan
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.store import RunFolder

REFERENCE = "smollm2-135m-instruct"
CLI = [sys.executable, "-c", "from weighbridge.cli import main; main()"]


def harness_rate(plan: Plan, bundle: Bundle) -> tuple[float, list[dict[str, object]]]:
    """Requests a second of a whole collection, and the bodies that were sent."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.create(Path(scratch) / "run", plan)
        started = time.perf_counter()
        collect_run(folder, plan, plan.endpoint, bundle, None, lambda _: None)
        took = time.perf_counter() - started
        exchanges, _ = folder.exchanges()
    return len(exchanges) / took, [e.sent.body for e in exchanges]


def bare_rate(url: str, bodies: list[dict[str, object]], concurrency: int) -> float:
    """Requests a second of a loop that does nothing but send and read."""

    async def loop() -> float:
        queue = list(bodies)
        async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:

            async def worker() -> None:
                while queue:
                    (await client.post(f"{url}/chat/completions", json=queue.pop())).json()

            started = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            return len(bodies) / (time.perf_counter() - started)

    return asyncio.run(loop())


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pairs, requests = (2, 30) if arguments.quick else (5, 80)
    bundle = load_bundle(REFERENCE)
    never = load_policy("strict").model_copy(update={"differs_e_value": 1e300, "consistent_e_value": 1e300})
    document = Document("harness")
    lab = subprocess.Popen(
        [*CLI, "lab", "serve", "--variant", "f16-busy"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert lab.stdout is not None
        url = lab.stdout.readline().rsplit(" ", 1)[1].strip()
        for concurrency in (1, 4):
            ratios = []
            for pair in range(pairs):
                endpoint = Endpoint(
                    name="lab",
                    base_url=url,
                    model="SmolLM2-135M-Instruct",
                    limits=Limits(max_requests=requests, concurrency=concurrency),
                )
                harness, bodies = harness_rate(
                    make_plan(endpoint, never, bundle, seed=f"{arguments.seed}-{pair}"), bundle
                )
                bare = bare_rate(url, bodies, concurrency)
                ratios.append(harness / bare)
                say(f"concurrency {concurrency}: harness {harness:.2f}, bare {bare:.2f} requests a second")
            ratio = float(np.median(ratios))
            document.figures[f"rate_ratio_at_concurrency_{concurrency}"] = Figure(
                round(ratio, 3), "harness / bare", ">= 0.9", ratio >= 0.9, (min(ratios), max(ratios))
            )
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                *CLI,
                "audit",
                "--base-url",
                url,
                "--model",
                "SmolLM2-135M-Instruct",
                "--reference",
                REFERENCE,
                "--out",
                f"{scratch}/run",
                "--json",
            ]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "WEIGHBRIDGE_HOME": scratch},
            )
            assert process.stdout is not None
            verdict = json.loads(process.stdout.read())["verdict"]["verdict"]
            # os.wait4 gives this child's own peak, where RUSAGE_CHILDREN would give the largest of all children.
            usage: resource.struct_rusage = os.wait4(process.pid, 0)[2]
        peak = usage.ru_maxrss / 1024
        document.figures["audit_peak_memory"] = Figure(round(peak, 1), "MiB", "< 300 MB", peak * 1.048576 < 300)
        document.reported["audit_verdict"] = verdict
    finally:
        lab.terminate()
        lab.wait()
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
