"""The README's main job: six endpoints of a real model, honest and not, and what is said of each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Weighbridge
from weighbridge.demo import BUNDLE, DEMO_VARIANTS
from weighbridge.judge.checks.weights import name_of
from weighbridge.judge.library import build_library
from weighbridge.judge.policy import load_policy
from weighbridge.paths import cache_folder
from weighbridge.reference.bundle import load_bundle

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("demo")
    home = folder / "home"
    home.mkdir()
    cache_folder().mkdir(parents=True, exist_ok=True)
    (home / "cache").symlink_to(cache_folder(), target_is_directory=True)
    command = [sys.executable, "-c", "from weighbridge.cli import main; main()", "demo", "--json", "--seed", "tests"]
    done = subprocess.run(
        [*command, "--out", str(folder / "runs")],
        env={**os.environ, "WEIGHBRIDGE_HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6" in done.stderr
    return json.loads(done.stdout), folder / "runs"


def verdict_of(runs: Path, name: str) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads((runs / name / "verdict.json").read_bytes())
    return verdict


def test_every_verdict_and_every_cause_is_right(demo: tuple[dict[str, Any], Path]) -> None:
    document, _ = demo
    assert document["schema"] == "weighbridge/demo/1"
    said = {row["truth"]: (row["verdict"], row["cause"]) for row in document["results"]}
    assert said == {
        "honest:f16": ("consistent", None),
        "honest:bf16-busy": ("consistent", None),
        "altered:q8_0": ("differs", "precision"),
        "altered:q4_0": ("differs", "precision"),
        "altered:hidden-system": ("differs", "hidden_prompt"),
        "altered:depth-24": ("differs", "other_model"),
    }
    assert all(row["requests"] <= 80 and row["cause"] == row["expected_cause"] for row in document["results"])


@pytest.mark.parametrize("name", ["f16", "bf16-busy"])
def test_an_honest_verdict_says_what_it_does_not_exclude(demo: tuple[dict[str, Any], Path], name: str) -> None:
    verdict = verdict_of(demo[1], name)
    assert verdict["axes"]["weights"] == verdict["axes"]["prompt"] == "consistent"
    assert {"q8_0", "int8", "fp8-e4m3", "q4_0"} <= set(verdict["excluded"])
    assert "kv-q8_0" in verdict["not_excluded"]
    assert "kv-q8_0" in verdict["sentence"]
    # What is left is what size cannot tell from honest noise on some engine; every recorded departure is in one list.
    library = build_library(load_bundle(BUNDLE), load_policy("strict"), 20)
    assert set(verdict["excluded"]) | set(verdict["not_excluded"]) == {name_of(stack) for stack in library.variants}
    smallest: dict[str, float] = {}
    for stack in library.variants:
        assert stack.noise_nats is not None
        smallest[name_of(stack)] = min(stack.noise_nats, smallest.get(name_of(stack), stack.noise_nats))
    limit = max(null.limit_nats for null in library.nulls)
    assert all(smallest[variant] < limit for variant in verdict["not_excluded"])


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "depth-24"])
def test_a_recorded_departure_is_named_exactly(demo: tuple[dict[str, Any], Path], name: str) -> None:
    verdict = verdict_of(demo[1], name)
    assert verdict["exact_variant"] == name
    assert verdict["axes"]["weights"] == "inconsistent"
    assert verdict["axes"]["prompt"] == "consistent"


def test_honest_weights_behind_a_recorded_hidden_prompt_are_judged_under_it(demo: tuple[dict[str, Any], Path]) -> None:
    """The library recorded this prompt, so the weights can be judged under it, and they are honest."""
    verdict = verdict_of(demo[1], "hidden-system")
    assert verdict["axes"]["prompt"] == "inconsistent"
    assert verdict["axes"]["weights"] == "consistent"


@pytest.mark.parametrize("name", DEMO_VARIANTS)
def test_every_run_has_its_reports(demo: tuple[dict[str, Any], Path], name: str) -> None:
    for file in ("report.html", "report.json", "junit.xml", "exchanges.jsonl", "plan.json"):
        assert (demo[1] / name / file).stat().st_size > 0


def test_the_demo_is_published_and_a_stranger_judges_it_again_to_the_same_bytes(
    demo: tuple[dict[str, Any], Path], weighbridge_cli: Weighbridge, tmp_path: Path
) -> None:
    """The third use on real evidence: a signed site, checked by somebody who has nothing but the site and the public key."""
    key, site = tmp_path / "signer", tmp_path / "site"
    assert weighbridge_cli("reference", "keygen", key).code == 0
    published = weighbridge_cli("publish", "--runs", demo[1], "--out", site, "--key", key, "--notice-days", 0, "--json")
    assert published.code == 0, published.err
    said = {report["endpoint"]: report["verdict"] for report in json.loads(published.out)["reports"]}
    expected = {f"lab {row['truth'].split(':')[1]}": row["verdict"] for row in demo[0]["results"]}
    assert said == expected
    assert weighbridge_cli("verify", site, "--trusted-key", f"{key}.pub").code == 0
    folders = sorted(site.glob("reports/*/*"))
    assert len(folders) == len(expected)
    for folder in folders:
        verified = weighbridge_cli("verify", folder, "--trusted-key", f"{key}.pub", "--json")
        assert verified.code == 0, verified.err
        assert json.loads(verified.out)["judged_again"] == "same"
