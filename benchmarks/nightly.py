"""Nights of a fleet: two hundred endpoints at once, killed and gone on with; a year of them; swaps found; honest hosts left alone.

    python benchmarks/nightly.py [--quick] [--seed 1] [--json]

Part one runs `weighbridge nightly` itself against a loopback server that replays real exchanges behind many names (`replayed.py`) and
live endpoints of the lab. Part two fills a year's index. Parts three and four resample years (`years.py`). Honest years are drawn from
stacks whose family the library lacks; nothing here chose a threshold.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

import years
from figures import Document, Figure, say, share
from power import clopper_pearson_zero
from replayed import behaviour
from weighbridge.canonical import sha256_hex
from weighbridge.history.changes import LOOKED_AT, changes_of, run_length
from weighbridge.history.fleetwide import judge_night
from weighbridge.history.index import INDEX, Run, opened, refresh, runs
from weighbridge.history.row import Row, write_row
from weighbridge.lab.front import MODEL_NAME
from weighbridge.lab.lies import Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS
from weighbridge.reference.bundle import Bundle, load_bundle
from weighbridge.store import RunFolder

REFERENCE = "smollm2-135m-instruct"
CLI = [sys.executable, "-c", "from weighbridge.cli import main; main()"]
LIVE: dict[str, tuple[str, str | None]] = {
    "f16": ("consistent", None), "q4_0": ("differs", "precision"), "bf16-busy": ("consistent", None), "q8_0": ("differs", "precision"),
    "hidden-system": ("differs", "hidden_prompt"), "depth-24": ("differs", "other_model"),
}  # fmt: skip
PRICE = "{ prompt_usd_per_million_tokens = 0.1, completion_usd_per_million_tokens = 0.4 }"
MEGABYTE = 2**20
# Runs a command and notes its peak memory. A process of its own: Linux counts the memory of who starts a process as that process's own.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
SWAPS = {
    "16-bit to 4-bit": (("llamacpp-f16", "llamacpp-q4_0"), ("transformers-bf16", "transformers-int4-g64")),
    "16-bit to another model": (("llamacpp-f16", "llamacpp-depth-24"), ("transformers-bf16", "transformers-depth-24")),
    "16-bit to int8": (("llamacpp-f16", "llamacpp-int8"), ("transformers-bf16", "transformers-int8")),
    "a template change": (("llamacpp-f16", "recorded-generic-system"), ("llamacpp-f16", "recorded-no-generation-prompt"), ("transformers-bf16", "bf16-recorded-alpaca-template")),
}  # fmt: skip
WITHIN_NIGHTS = {"16-bit to int8": 3}


# -- a night -----------------------------------------------------------------------------------------------------


@contextmanager
def replayed(delay_s: float) -> Iterator[str]:
    """The replaying host, in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "replayed.py"), "--delay-s", str(delay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def live(names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Lab endpoints that are asked at the same time: one thread each, for llama.cpp's threads wait for each other by spinning."""
    with ExitStack() as stack:
        fronts = {}
        for name in names:
            variant = VARIANTS[name]
            alone = replace(variant, settings=replace(variant.settings, threads=1))
            fronts[name] = stack.enter_context(lab_endpoint(alone, Lies(), say)).base_url
        yield fronts


def fleet_file(path: Path, host: str, count: int, labs: dict[str, str], *, faults: bool = True) -> None:
    """Write FLEET.toml: so many replayed names, and the live ones."""
    lines = ['name = "benchmark"', "jitter_s = 2", "max_requests_per_month = 1000000", "max_cost_usd_per_month = 50"]
    for number in range(count):
        manner = behaviour(number)
        if manner != "well" and not faults:
            continue
        url = "http://127.0.0.1:9/v1" if manner == "dead" else f"{host}/n/{number}/v1"
        lines += _endpoint(f"host {number:03d} {manner}", url, 5 if manner == "hangs" else 60)
    for name, url in labs.items():
        lines += _endpoint(f"lab {name}", url, 300)
    path.write_text("\n".join(lines) + "\n")


def _endpoint(name: str, url: str, timeout_s: int) -> list[str]:
    return [
        "[[endpoint]]", f'name = "{name}"', f'base_url = "{url}"', f'model = "{MODEL_NAME}"', f'reference = "{REFERENCE}"',
        f"price = {PRICE}", "max_cost_usd_per_month = 0.02", "max_requests_per_month = 200", f"limits = {{ timeout_s = {timeout_s} }}",
    ]  # fmt: skip


def nightly(fleet: Path, out: Path, home: Path) -> tuple[dict[str, Any], float, float]:
    """One night to its end: what it says, seconds, and peak megabytes."""
    started = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as peak:
        command = [sys.executable, "-c", MEASURED, peak.name, *CLI, "nightly", str(fleet), "--out", str(out), "--json"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=sys.stderr, env=_own(home), text=True, check=False
        )
        return json.loads(done.stdout), time.monotonic() - started, int(peak.read()) / 1024


def _own(home: Path) -> dict[str, str]:
    return {**os.environ, "WEIGHBRIDGE_HOME": str(home)}


def a_night(document: Document, count: int, live_ones: int, scratch: Path) -> None:
    """All due work is done, within budgets and memory, and nobody waits for a dead one."""
    with replayed(0.02) as host, live(tuple(LIVE)[:live_ones]) as labs:
        fleet = scratch / "fleet.toml"
        fleet_file(fleet, host, count - len(labs), labs)
        night, took_s, peak = nightly(fleet, scratch / "night", scratch / "home")
        with urllib.request.urlopen(f"{host}/stats") as answer:
            stats = json.load(answer)
        rows = {row["endpoint"]: row for row in night["endpoints"]}
        answering = [r for name, r in rows.items() if name.split()[-1] not in ("dead", "hangs", "broken")]
        done = sum(r["verdict"] is not None and r["state"] == "done" for r in rows.values())
        judged = sum(r["verdict"] in ("consistent", "differs") for r in answering)
        document.figures["endpoints whose night is done"] = Figure(done, f"of {len(rows)}", "all", done == len(rows))
        document.figures["endpoints that answer, judged"] = Figure(
            judged, f"of {len(answering)}", "all", judged == len(answering)
        )
        document.figures["peak memory"] = Figure(round(peak), "MB", "< 500", peak < 500)
        folders = {p.parent.name: RunFolder(p.parent) for p in (scratch / "night").glob("*/*/plan.json")}
        over = sum(
            len(f.exchanges()[0]) > f.plan().endpoint.limits.max_requests
            or _usd(f) > (f.plan().endpoint.limits.max_cost_usd or 0.0) for f in folders.values()
        )  # fmt: skip
        document.figures["endpoints over their budget"] = Figure(over, f"of {len(folders)}", "0", over == 0)
        sent = sum(len(f.exchanges()[0]) for name, f in folders.items() if name.startswith("host"))
        document.reported["requests"] = {
            "logged of replayed names": sent,
            "asked of the server": sum(stats["asked"].values()),
            "not known to it": stats["unknown"],
        }
        document.reported["a night takes"] = f"{took_s:.0f} s for {len(rows)} endpoints"
        said = {name: (r["verdict"], r["cause"]) for name, r in rows.items() if name.startswith("lab ")}
        document.reported["live endpoints"] = said
        hits = sum(said[f"lab {name}"] == LIVE[name] for name in labs)
        document.figures["live endpoints, verdict and cause right"] = Figure(
            hits, f"of {len(labs)}", "all", hits == len(labs)
        )
        again, _, _ = nightly(fleet, scratch / "night", scratch / "home")
        with urllib.request.urlopen(f"{host}/stats") as answer:
            later = json.load(answer)
        repeated = sum(
            later["asked"].get(n, 0) - stats["asked"].get(n, 0) for n in later["asked"] if behaviour(int(n)) in ("well", "slow", "429", "500")
        )  # fmt: skip
        document.figures["requests that a second run of the night sends to those that are done"] = Figure(
            repeated, "requests", "0", repeated == 0
        )
        assert len(again["endpoints"]) == len(rows)


def _usd(folder: RunFolder) -> float:
    row = json.loads((folder.path / "row.json").read_bytes())
    return float(row["spent_usd"])


def dead_ones(document: Document, count: int, scratch: Path) -> None:
    """The same fleet with and without those that do not answer: when the last healthy one is through."""
    with replayed(0.02) as host:
        last = {}
        for faults in (False, True):
            fleet = scratch / f"fleet-{faults}.toml"
            fleet_file(fleet, host, count, {}, faults=faults)
            nightly(fleet, scratch / f"night-{faults}", scratch / "home")
            times = [
                max(e.sent.sent_at for e in RunFolder(p.parent).exchanges()[0])
                for p in (scratch / f"night-{faults}").glob("*/*-well/plan.json")
            ]  # fmt: skip
            began = min(
                RunFolder(p.parent).exchanges()[0][0].sent.sent_at for p in (scratch / f"night-{faults}").glob("*/*-well/plan.json")
            )  # fmt: skip
            stamp = np.datetime64
            last[faults] = float((stamp(max(times)[:23]) - stamp(began[:23])) / np.timedelta64(1, "s"))
    ratio = last[True] / last[False]
    # The faulty ones that do answer add their own work to one process: at most their share of the fleet.
    share = count / sum(behaviour(n) == "well" for n in range(count))
    document.figures["time until the last healthy endpoint is through, with dead and faulty ones over without"] = (
        Figure(
            round(ratio, 2),
            "ratio",
            f"<= {1.15 * share:.2f} (their share of the work, and 15 %)",
            ratio <= 1.15 * share,
        )
    )
    document.reported["seconds until the last healthy endpoint is through"] = {
        "without": last[False],
        "with": last[True],
    }


def killed(document: Document, count: int, kills: int, seed: int, scratch: Path) -> None:
    """Killed outright at random moments, and run again: nothing that was answered is asked again, and all comes to the same."""
    rng = random.Random(seed)
    with replayed(0.05) as host:
        fleet = scratch / "fleet-killed.toml"
        fleet_file(fleet, host, count, {}, faults=False)
        whole, took_s, _ = nightly(fleet, scratch / "whole", scratch / "home")
        out = scratch / "killed"
        out.mkdir()
        shutil.copy(scratch / "whole" / "draws.key", out / "draws.key")
        for _ in range(kills):
            process = subprocess.Popen([*CLI, "nightly", str(fleet), "--out", str(out), "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_own(scratch / "home"))  # fmt: skip
            time.sleep(rng.uniform(1.0, took_s))
            process.kill()
            process.wait()
        ended, _, _ = nightly(fleet, out, scratch / "home")
    twice = lost = 0
    for path in out.glob("*/*/plan.json"):
        answered: dict[str, int] = {}
        for line in (path.parent / "exchanges.jsonl").read_bytes().splitlines():
            event = json.loads(line)
            if event["event"] == "received" and event.get("status") == 200:
                answered[event["request_id"]] = answered.get(event["request_id"], 0) + 1
        twice += sum(times > 1 for times in answered.values())
        lost += not (path.parent / "verdict.json").exists()
    said = [{row["endpoint"]: (row["verdict"], row["cause"]) for row in night["endpoints"]} for night in (whole, ended)]
    document.figures[f"answers asked for again after {kills} kills"] = Figure(twice, "requests", "0", twice == 0)
    document.figures["endpoints without a verdict after them"] = Figure(lost, f"of {len(said[1])}", "0", lost == 0)
    other = sum(said[0][name] != said[1][name] for name in said[0])
    document.figures["verdicts that are others than without kills"] = Figure(
        other, f"of {len(said[0])}", "0", other == 0
    )


# -- a year ------------------------------------------------------------------------------------------------------


def a_year_of_rows(document: Document, bundle: Bundle, endpoints: int, nights: int, scratch: Path) -> None:
    """Run folders of a whole year: the index made again, and the dearest queries."""
    root = scratch / "year"
    stacks = [s for s in bundle.manifest.stacks if s.departure is None and s.id != bundle.manifest.reference_stack]
    source = next(n for n in (years.honest_nights(bundle, s.id, 200, 500, 1) for s in stacks) if n is not None)
    rng = np.random.default_rng(1)
    for e in range(endpoints):
        for run in years.year(f"host {e:03d}", source, None, 0, nights, rng):
            folder = root / "fleet" / run["night"] / f"host-{e:03d}"
            folder.mkdir(parents=True)
            for name in ("plan.json", "verdict.json"):
                (folder / name).write_bytes(b"{}")
            write_row(folder, _row(run))
    started = time.monotonic()
    with opened(root, lambda _: None) as connection:
        refresh(connection, root, lambda _: None)
    rebuild_s = time.monotonic() - started
    document.figures["index of a year made again"] = Figure(
        round(rebuild_s, 1), f"s for {endpoints * nights} runs", "< 60", rebuild_s < 60
    )
    queries: dict[str, float] = {}
    with opened(root, lambda _: None) as connection:
        asked: dict[str, Callable[[], list[Run]]] = {
            "one endpoint": lambda: runs(connection, endpoint="host 007"),
            "one night": lambda: runs(connection, night="2026-03-03"),
            "every run, the columns of changes": lambda: runs(connection, columns=LOOKED_AT),
        }
        for name, query in asked.items():
            started = time.monotonic()
            found = query()
            queries[name] = time.monotonic() - started
        started = time.monotonic()
        changes_of([r for r in found if r["endpoint"] == "host 007"], run_length(endpoints))
        queries["changes of one endpoint"] = time.monotonic() - started
        started = time.monotonic()
        refresh(connection, root, lambda _: None)
        queries["looking for new runs"] = time.monotonic() - started
    worst = max(queries.values())
    document.figures["slowest history query"] = Figure(round(worst, 2), "s", "< 1", worst < 1)
    document.reported["history queries, seconds"] = {name: round(s, 3) for name, s in queries.items()}
    document.reported["index"] = f"{(root / INDEX).stat().st_size / MEGABYTE:.0f} MB"


def _row(run: dict[str, Any]) -> Row:
    return Row.model_validate({
        "run_id": sha256_hex(run["commitment"].encode())[:16], "endpoint": run["endpoint"], "model": MODEL_NAME, "night": run["night"],
        "created_at": run["created_at"], "weighbridge_version": "0", "policy": "strict", "reference": "r" * 64, "pool": "p" * 64,
        "commitment": run["commitment"], "sealed": False, "probes": [f"probe-{i:04d}" for i in range(20)], "verdict": run["verdict"], "cause": run["cause"],
        "exact_variant": None, "axes": {"route": "consistent", "prompt": "consistent", "sampling": "consistent", "weights": "consistent", "share": "inconclusive", "service": "consistent"},
        "log10_e_value": run["log10_e_value"], "noise_nats": run["noise_nats"], "noise_low_nats": run["noise_nats"] * 0.9,
        "noise_high_nats": run["noise_nats"] * 1.1, "stopped_because": "decided", "answers_used": 20, "requests_sent": 55, "errors": 0,
        "prompt_tokens": 4000, "completion_tokens": 300, "cost_usd": 0.0005, "spent_usd": 0.0005, "latency_s": 0.4, "first_token_s": 0.3, "tokens_per_s": 40.0,
    })  # fmt: skip


def swaps(document: Document, bundle: Bundle, runs_of_each: int, seed: int) -> None:
    """A silent swap inside a year: the night that is given, and the nights until it is."""
    rng = np.random.default_rng(seed)
    for name, pairs in SWAPS.items():
        dated = []
        for before, after in pairs:
            sources = [
                years.served_nights(bundle, which, 200, 1000, seed + i) for i, which in enumerate((before, after))
            ]
            dated += [years.swap(sources[0], sources[1], 200, 365, rng) for _ in range(runs_of_each // len(pairs))]
        within = WITHIN_NIGHTS.get(name, 0)
        right = sum(d.off_nights is not None and abs(d.off_nights) <= within for d in dated)
        dated_right, interval = share(right, len(dated))
        night = "the night" if within == 0 else f"within {within} nights"
        document.figures[f"{name}: dated to {night}"] = Figure(
            dated_right, f"share of {len(dated)}", ">= 0.95", dated_right >= 0.95, interval
        )
        delays = [d.delay_nights for d in dated if d.delay_nights is not None]
        found_in = float(np.mean([d.delay_nights is not None and d.delay_nights <= 3 for d in dated]))
        document.reported[f"{name}: nights until it is found"] = {
            "median": float(np.median(delays)), "largest": max(delays), "within 3": found_in, "alarms before it": sum(d.false_alarms for d in dated),
        }  # fmt: skip


def honest_year(document: Document, bundle: Bundle, endpoints: int, nights: int, audits: int, seed: int) -> None:
    """A year of honest endpoints, each family left out of the library that judges it: false names and false alarms."""
    rng = np.random.default_rng(seed)
    stacks = [s for s in bundle.manifest.stacks if s.departure is None and s.id != bundle.manifest.reference_stack]
    known = {s.id: years.honest_nights(bundle, s.id, endpoints, audits, seed) for s in stacks}
    by_family: dict[str, list[years.Nights]] = {}
    for stack in stacks:
        source = known[stack.id]
        if source is not None:
            by_family.setdefault(stack.family, []).append(source)
    families = sorted(by_family)
    fleet = []
    for e in range(endpoints):
        own = by_family[families[e % len(families)]]
        # An endpoint's engine is its own; which of its settings serves is drawn anew each night.
        each = [
            years.year(f"host {e:03d}", own[int(rng.integers(len(own)))], None, 0, 1, rng)[0] for _ in range(nights)
        ]
        for night, run in enumerate(each):
            day = (years.FIRST_NIGHT + timedelta(days=night)).isoformat()
            run |= {"night": day, "created_at": f"{day}T22:00:00Z", "commitment": f"{e} {day}"}
        fleet.append(each)
    named = replicated = 0
    earlier: list[dict[str, Any]] = []
    for night in range(nights):
        tonight = [own[night] for own in fleet]
        verdicts = judge_night(tonight, earlier, 0.01)
        named += sum(v.verdict == "differs" for v in verdicts)
        replicated += sum(v.verdict == "differs_replicated" for v in verdicts)
        earlier = tonight
    alarms = sum(len(changes_of(own, run_length(endpoints))) for own in fleet)
    needed = years.fleet_policy(endpoints).differs_e_value
    document.figures["false named verdicts in an honest year, replicated"] = Figure(
        replicated, f"seen among {endpoints} endpoints x {nights} nights", "0", replicated == 0
    )
    # Markov's inequality for each of two nights whose draws are apart; what it cannot bound is a stack unlike every recorded one.
    expected = endpoints * nights / needed**2
    document.figures["false named verdicts in a year that chance may bring, at most"] = Figure(
        expected, "expected", "<= 0.1", expected <= 0.1
    )
    document.figures["false named verdicts in an honest year, of one night"] = Figure(
        named, f"of {endpoints} endpoints x {nights} nights", "0", named == 0
    )
    document.figures["false alarms of a change in an honest year"] = Figure(
        alarms, "in the whole fleet", "<= 1 a year expected", alarms <= 2
    )
    largest = max(float(n.log10_e.max()) for own in by_family.values() for n in own)
    document.reported["honest year"] = {
        "stacks": sum(map(len, by_family.values())), "families": families, "audits drawn of each": audits,
        "largest log10 e-value of any": largest, "log10 needed on each of two nights": float(np.log10(needed)),
        "bound on the share of families that would be named wrongly, 95 %": round(clopper_pearson_zero(len(families)), 2) if replicated == 0 else None,
        "without a null of their grid (not judged)": [s.id for s in stacks if known[s.id] is None],
    }  # fmt: skip


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small fleet and few years")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quick = arguments.quick
    document = Document("nightly")
    started = time.monotonic()

    def through(part: str) -> None:
        say(f"{part}, after {time.monotonic() - started:.0f} s")

    bundle = load_bundle(REFERENCE)
    swaps(document, bundle, 24 if quick else 240, arguments.seed)
    through("swaps")
    honest_year(document, bundle, 40 if quick else 200, 60 if quick else 365, 100 if quick else 1000, arguments.seed)
    through("honest year")
    with tempfile.TemporaryDirectory() as scratch:
        a_year_of_rows(document, bundle, 20 if quick else 200, 365, Path(scratch))
        shutil.rmtree(Path(scratch) / "year")
        through("a year of rows")
        a_night(document, 20 if quick else 200, 2 if quick else 6, Path(scratch))
        through("a night")
        dead_ones(document, 20 if quick else 60, Path(scratch))
        through("dead ones")
        killed(document, 10 if quick else 30, 3 if quick else 20, arguments.seed, Path(scratch))
    return document.print(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
