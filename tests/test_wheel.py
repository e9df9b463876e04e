"""The wheel carries all it needs: built, installed in a new environment, and run from outside the checkout."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from weighbridge.lab.front import Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent


def files_below(*folders: str) -> set[str]:
    """Files of the checkout that a wheel has to carry, by their path there."""
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


# Pools, bundles, specs and licence texts as data; templates, policies, schemas and fragments beside the code.
DATA = {f"weighbridge/data/{name}" for name in files_below("probes", "reference_outputs")} | {
    name.removeprefix("src/") for name in files_below("src/weighbridge")
}


def test_what_a_wheel_has_to_carry_is_in_the_checkout() -> None:
    assert {f"weighbridge/probes/fragments/{name}.toml" for name in ("en", "de", "pl", "code", "long")} <= DATA
    assert {"weighbridge/schemas/bundle-3.json", "weighbridge/schemas/report-1.json"} <= DATA
    bundle = "weighbridge/data/reference_outputs/smollm2-135m-instruct"
    assert {f"{bundle}/{name}" for name in ("manifest.json", "arrays.npz", "licence.txt")} <= DATA
    assert "weighbridge/data/reference_outputs/specs/licences/apache-2.0.txt" in DATA
    carried = ("chat-one-token", "banded-one-token", "short-answer", "forced-text", "long-context", "prompt-structure")
    for pool in carried:
        assert {f"weighbridge/data/probes/{pool}/{name}" for name in ("pool.toml", "probes.jsonl")} <= DATA


@pytest.mark.lab
def test_audit_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = (tmp_path / "dist").glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    assert sorted(DATA - carried) == []
    assert wheel.stat().st_size < 25_000_000
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "requirements-test.txt", wheel],
        check=True,
        capture_output=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "WEIGHBRIDGE_HOME": str(tmp_path / "home")
    }
    with lab_endpoint(VARIANTS["q4_0"], Lies(), lambda _: None) as front:
        command = [
            str(tmp_path / "fresh" / "bin" / "weighbridge"), "audit", "--base-url", front.base_url, "--model", "SmolLM2-135M-Instruct",
            "--reference", "smollm2-135m-instruct", "--max-requests", "60", "--seed", "wheel", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"]["verdict"] == "differs"
    assert report["verdict"]["exact_variant"] == "q4_0"
    assert (elsewhere / report["folder"] / "report.html").exists()
    # The generator's material and the licence's text came along, and none of it needs torch.
    key = tmp_path / "key"
    for arguments, named in (
        (["reference", "verify", "smollm2-135m-instruct"], "whole"),
        (["reference", "show", "smollm2-135m-instruct"], "Apache-2.0"),
        (["pool", "keygen", str(key)], "key written"),
        (["pool", "generate", "--key-file", str(key), "--count", "3", "--id", "mine", "--out", "mine"], "3 probes"),
    ):
        installed = str(tmp_path / "fresh" / "bin" / "weighbridge")
        ended = subprocess.run(
            [installed, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert named in ended.stdout
    torch = subprocess.run([python, "-c", "import torch"], cwd=elsewhere, capture_output=True, check=False)
    assert torch.returncode != 0
    where = subprocess.run(
        [python, "-c", "import weighbridge; print(weighbridge.__file__)"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in where.stdout
