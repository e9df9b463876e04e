"""The main job, again and again: right verdict and right cause on all six endpoints, and how long it takes.

Runs the installed command as a user would, each time with another seed.

    python benchmarks/demo.py [--quick] [--seed 1] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from figures import Document, Figure, say


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one seed instead of ten")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seeds = [arguments.seed] if arguments.quick else list(range(arguments.seed, arguments.seed + 10))
    seconds, right, most_requests, loads, wrong = [], 0, 0, [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            loads.append(os.getloadavg()[0])
            started = time.monotonic()
            command = [
                sys.executable,
                "-c",
                "from weighbridge.cli import main; main()",
                "demo",
                "--json",
                "--seed",
                f"bench-{seed}",
                "--out",
                folder,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
            seconds.append(time.monotonic() - started)
            results = json.loads(done.stdout)["results"]
            good = [
                r
                for r in results
                if r["cause"] == r["expected_cause"]
                and r["verdict"] == ("consistent" if r["expected_cause"] is None else "differs")
            ]
            wrong += [{"seed": seed, **r} for r in results if r not in good]
            right += len(good) == 6 and done.returncode == 0
            most_requests = max(most_requests, *(r["requests"] for r in results))
            say(f"seed {seed}: {len(good)} of {len(results)} right, {seconds[-1]:.0f} s, load before {loads[-1]:.1f}")
    document = Document("demo")
    document.figures["seeds_all_right"] = Figure(right, f"of {len(seeds)} seeds", f"{len(seeds)}", right == len(seeds))
    document.figures["longest_s"] = Figure(round(max(seconds), 1), "s", "< 360", max(seconds) < 360)
    document.figures["most_requests"] = Figure(most_requests, "requests for one endpoint", "<= 40", most_requests <= 40)
    document.reported |= {
        "median_s": round(float(np.median(seconds)), 1),
        "load_before_each": [round(x, 2) for x in loads],
        "wrong": wrong,
    }
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
