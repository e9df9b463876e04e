"""The wheel carries all it needs: built, installed in a new environment, and run from outside the checkout."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from weighbridge.lab.front import Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.lab
def test_audit_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    [wheel] = (tmp_path / "dist").glob("*.whl")
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
            "--reference", "smollm2-135m-instruct", "--max-requests", "40", "--seed", "wheel", "--json",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"]["verdict"] == "differs"
    assert report["verdict"]["exact_variant"] == "q4_0"
    assert (elsewhere / report["folder"] / "report.html").exists()
    where = subprocess.run(
        [python, "-c", "import weighbridge; print(weighbridge.__file__)"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in where.stdout
