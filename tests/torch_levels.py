"""Audits at the levels L1 and L2 of a real model behind the lab's server of local weights, over HTTP."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import weighbridge.plan
from weighbridge.audit import judge_run
from weighbridge.cli import cli
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.lab.front import MODEL_NAME, Lies
from weighbridge.lab.provider import lab_endpoint
from weighbridge.lab.variants import TORCH_VARIANTS
from weighbridge.paths import cache_folder
from weighbridge.probes import load_pool
from weighbridge.reference.bundle import load_bundle
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.continuations import continue_greedily
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.store import RunFolder

REFERENCE = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").symlink_to(cache_folder(), target_is_directory=True)
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))


@pytest.mark.parametrize(("variant", "verdict", "exact"), [("bf16", "consistent", None), ("int8", "differs", "int8")])
def test_forced_texts_and_short_answers_tell_honest_from_altered(
    variant: str, verdict: str, exact: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither of the two asks what becomes of sampling parameters.
    monkeypatch.setattr(weighbridge.plan, "sampling_requests", lambda *_: [])
    with lab_endpoint(TORCH_VARIANTS[variant], Lies(), lambda _: None) as front:
        for level in ("L1", "L2"):
            out = tmp_path / level
            command = [
                "audit",
                "--base-url",
                front.base_url,
                "--model",
                MODEL_NAME,
                "--reference",
                REFERENCE,
                "--level",
                level,
            ]
            result = CliRunner().invoke(cli, [*command, "--out", str(out), "--seed", "levels"], standalone_mode=False)
            assert result.exception is None, result.output
            found = json.loads((out / "verdict.json").read_bytes())
            assert (found["verdict"], found["exact_variant"]) == (verdict, exact)
            assert found["axes"]["prompt"] == "consistent"
            # Judged again from the folder alone, to the same bytes.
            before = (out / "verdict.json").read_bytes()
            judge_run(RunFolder(out), load_bundle(REFERENCE))
            assert (out / "verdict.json").read_bytes() == before


def test_greedy_answers_are_those_of_the_original_weights() -> None:
    pool = load_pool("greedy-text")
    candidates = [
        p.model_copy(update={"id": p.id.removeprefix("greedy-"), "messages": p.messages[:-1]}) for p in pool.probes[:3]
    ]
    checkpoint = open_checkpoint(lab_checkpoint(lambda _: None), {})
    again = continue_greedily(LocalWeights(checkpoint, LocalSetting()), checkpoint, candidates, 24, 3)
    assert again == list(pool.probes[:3])
    assert len(continue_greedily(LocalWeights(checkpoint, LocalSetting()), checkpoint, candidates, 24, 1)) == 1
