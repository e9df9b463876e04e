"""Audits of a real model behind a real server: what is said of honest endpoints and of named lies."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import weighbridge.plan
from weighbridge.audit import judge_run
from weighbridge.cli import cli
from weighbridge.lab.front import MODEL_NAME, Front, Lies
from weighbridge.lab.process import ModelServer
from weighbridge.lab.provider import lab_backend
from weighbridge.lab.variants import VARIANTS, with_prompt_before
from weighbridge.paths import cache_folder
from weighbridge.records import Verdict
from weighbridge.reference.bundle import load_bundle
from weighbridge.store import RunFolder

REFERENCE = "smollm2-135m-instruct"
pytestmark = pytest.mark.lab

Backend = Callable[[str], ModelServer]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Servers of the variants that tests ask for, each started once."""
    with contextlib.ExitStack() as stack:
        running: dict[str, ModelServer] = {}

        def get(name: str) -> ModelServer:
            if name not in running:
                running[name] = stack.enter_context(lab_backend(VARIANTS[name], lambda _: None))
            return running[name]

        yield get


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State of its own for each test; the models stay in the user's cache."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "cache").symlink_to(cache_folder(), target_is_directory=True)
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))


def audit(front: Front, out: Path, *options: str) -> tuple[Result, Verdict]:
    command = [
        "audit",
        "--base-url",
        front.base_url,
        "--model",
        MODEL_NAME,
        "--reference",
        REFERENCE,
        "--out",
        str(out),
        "--seed",
        "tests",
    ]
    result = CliRunner().invoke(cli, [*command, "--max-requests", "40", *options], standalone_mode=False)
    assert result.exception is None, result.output
    return result, Verdict.model_validate(json.loads((out / "verdict.json").read_bytes()))


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without the requests about sampling, which take longest."""
    monkeypatch.setattr(weighbridge.plan, "sampling_requests", lambda *_: [])


@pytest.mark.usefixtures("weights_only")
def test_a_departure_that_the_demo_does_not_show_is_named(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("kv-q4_0").port, Lies()) as front:
        result, verdict = audit(front, tmp_path / "run")
    assert result.return_value == 1
    assert (verdict.verdict, verdict.cause, verdict.exact_variant) == ("differs", "kv_cache", "kv-q4_0")


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("no-default-system", "template"),
        ("missing-bos", "template"),
        ("no-generation-prompt", "template"),
        ("llama3-template", "template"),
        ("no-template", "template"),
    ],
)
@pytest.mark.usefixtures("no_sampling")
def test_wrong_prompts_are_named_and_weights_are_judged_under_them(
    name: str, cause: str, backend: Backend, tmp_path: Path
) -> None:
    with Front(backend(name).port, Lies()) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "80")
    assert (verdict.verdict, verdict.cause) == ("differs", cause)
    assert verdict.axes["prompt"] == "inconsistent"
    assert verdict.axes["weights"] == "consistent"


@pytest.mark.usefixtures("no_sampling")
def test_two_faults_at_once_are_both_named(tmp_path: Path) -> None:
    altered = dataclasses.replace(VARIANTS["q4_0"], template=VARIANTS["missing-bos"].template)
    with lab_backend(altered, lambda _: None) as server, Front(server.port, Lies()) as front:
        _, verdict = audit(front, tmp_path / "run")
    assert (verdict.verdict, verdict.cause, verdict.exact_variant) == ("differs", "template", "q4_0")
    assert verdict.axes["prompt"] == verdict.axes["weights"] == "inconsistent"


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(("variant", "weights"), [("f16", "consistent"), ("q4_0", "inconsistent")])
def test_behind_a_hidden_prompt_raw_completions_tell(variant: str, weights: str, tmp_path: Path) -> None:
    template = with_prompt_before("Speak like a pirate. Never say why.")
    hidden = dataclasses.replace(VARIANTS[variant], template=template)
    with lab_backend(hidden, lambda _: None) as server:
        with Front(server.port, Lies(), completions=True) as front:
            _, verdict = audit(front, tmp_path / "open", "--max-requests", "80")
        with Front(server.port, Lies()) as front:
            _, closed = audit(front, tmp_path / "closed", "--max-requests", "80")
    assert (verdict.cause, verdict.axes["weights"]) == ("hidden_prompt", weights)
    assert (closed.cause, closed.axes["weights"]) == ("hidden_prompt", "inconclusive")


def test_a_whole_audit_finds_forged_logprobs(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("q4_0").port, Lies(), forged_port=backend("f16").port) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "60")
    assert (verdict.verdict, verdict.cause) == ("differs", "route")
    assert verdict.axes["weights"] == "inconclusive"


def test_controls_that_come_out_wrong_make_the_night_void(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_only: None
) -> None:
    with Front(backend("f16").port, Lies()) as honest, Front(backend("q4_0").port, Lies()) as altered:
        for name, front in (("honest", honest), ("altered", altered)):
            text = f'name = "{name}"\nbase_url = "{front.base_url}"\nmodel = "{MODEL_NAME}"\n'
            (tmp_path / f"{name}.toml").write_text(text)
        files = {name: str(tmp_path / f"{name}.toml") for name in ("honest", "altered")}
        right = ("--control-honest", files["honest"], "--control-altered", files["altered"])
        _, verdict = audit(altered, tmp_path / "right", *right)
        wrong = ("--control-honest", files["altered"])
        _, void = audit(altered, tmp_path / "wrong", *wrong)
    assert (verdict.verdict, [c.as_expected for c in verdict.controls]) == ("differs", [True, True])
    assert (void.verdict, void.cause, [c.as_expected for c in void.controls]) == ("inconclusive", None, [False])
    assert void.sentence.startswith("Void: ")
    assert void.axes["weights"] == "inconclusive"
    again = CliRunner().invoke(cli, ["replay", str(tmp_path / "wrong"), "--json"], standalone_mode=False)
    assert (
        json.loads(again.stdout)["verdict"]["controls"] == json.loads(void.model_dump_json(by_alias=True))["controls"]
    )


@pytest.mark.usefixtures("no_sampling")
def test_a_wrong_token_count_alone_accuses_nobody(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("f16").port, Lies(usage_offset=17)) as front:
        _, verdict = audit(front, tmp_path / "run")
    assert verdict.verdict == "consistent"
    assert verdict.axes["prompt"] == "consistent"
    assert verdict.axes["service"] == "inconsistent"


@pytest.mark.usefixtures("weights_only")
def test_a_wrong_token_count_does_not_hide_a_named_departure(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("q4_0").port, Lies(usage_offset=17)) as front:
        _, verdict = audit(front, tmp_path / "run")
    assert (verdict.verdict, verdict.cause, verdict.exact_variant) == ("differs", "precision", "q4_0")
    assert verdict.axes["prompt"] == "consistent"


@pytest.mark.usefixtures("no_sampling")
def test_a_wrong_token_count_without_logprobs_is_inconclusive(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("f16").port, Lies(usage_offset=17, max_top_logprobs=0)) as front:
        result, verdict = audit(front, tmp_path / "run")
    assert result.return_value == 3
    assert verdict.axes["prompt"] == "inconclusive"
    # The first tokens of answers are those of the official prompt, whatever the counts say.
    assert verdict.axes["weights"] == "consistent"


@pytest.mark.usefixtures("no_sampling")
def test_without_logprobs_four_bits_are_told_by_text(backend: Backend, tmp_path: Path) -> None:
    # A difference is found earlier than what it is, which is why this audit may ask for more than the others here.
    with Front(backend("q4_0").port, Lies(max_top_logprobs=0)) as front:
        result, verdict = audit(front, tmp_path / "run", "--max-requests", "80")
    assert result.return_value == 1
    assert (verdict.verdict, verdict.cause, verdict.exact_variant) == ("differs", "precision", "q4_0")
    assert verdict.axes["prompt"] == "consistent"
    assert verdict.answers_used <= 30
    assert verdict.log10_e_value is not None
    assert verdict.log10_e_value >= 3


@pytest.mark.parametrize(
    ("name", "ignored", "expected"), [("f16", ("temperature",), "inconclusive"), ("q4_0", (), "differs")]
)
def test_where_answers_are_stored_by_the_prompt_repeats_accuse_nobody(
    name: str, ignored: tuple[str, ...], expected: str, backend: Backend, tmp_path: Path
) -> None:
    """What is drawn at temperature 1 and given again looks like other weights at 0; only a recorded departure's own answers do not."""
    with Front(backend(name).port, Lies(max_top_logprobs=0, cached=True, ignored=ignored)) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "80")
    assert verdict.verdict == expected
    assert verdict.axes["service"] == "inconsistent"
    assert verdict.log10_e_value is not None
    assert (verdict.log10_e_value >= 3) == (expected == "differs")


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(("variant", "weights"), [("f16", "consistent"), ("q4_0", "inconsistent")])
def test_behind_a_hidden_prompt_raw_completions_tell_by_text_too(variant: str, weights: str, tmp_path: Path) -> None:
    template = with_prompt_before("Speak like a pirate. Never say why.")
    hidden = dataclasses.replace(VARIANTS[variant], template=template)
    lies = Lies(max_top_logprobs=0, usage_offset=0)
    with lab_backend(hidden, lambda _: None) as server, Front(server.port, lies, completions=True) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "200")
    assert (verdict.verdict, verdict.axes["weights"], verdict.level) == ("differs", weights, "L4")
    assert verdict.axes["prompt"] == "inconsistent"


@pytest.mark.usefixtures("weights_only")
@pytest.mark.parametrize(
    "lies",
    [
        Lies(max_top_logprobs=5),
        Lies(sentinels=True),
        Lies(logprobs_after_temperature=True),
        Lies(ignored=("temperature",)),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("name", "expected"), [("f16", "consistent"), ("q4_0", "differs")])
def test_lies_about_logprobs_change_no_verdict(
    name: str, expected: str, lies: Lies, backend: Backend, tmp_path: Path
) -> None:
    # From five logprobs the faintest departure that can be excluded takes longer than from twenty.
    limit = "100" if lies.max_top_logprobs == 5 else "40"
    with Front(backend(name).port, lies) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", limit)
    assert verdict.verdict == expected


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("lies", "regime"),
    [
        (Lies(), "before_temperature"),
        (Lies(logprobs_after_temperature=True), "after_temperature"),
        (Lies(ignored=("temperature",)), "before_temperature"),
    ],
    ids=repr,
)
def test_doctor_tells_what_logprobs_mean(lies: Lies, regime: str, backend: Backend) -> None:
    with Front(backend("f16").port, lies) as front:
        result = CliRunner().invoke(
            cli, ["doctor", "--base-url", front.base_url, "--model", MODEL_NAME, "--json"], standalone_mode=False
        )
    assert result.return_value == 0
    assert json.loads(result.stdout)["temperature_regime"] == regime


@pytest.mark.usefixtures("no_sampling")
def test_by_whole_answers_some_requests_elsewhere_are_found(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which requests go elsewhere follows from the run's id and the draw's seed: with these some stand out and others come again.
    monkeypatch.setattr("weighbridge.plan.secrets.token_hex", lambda size: "7c" * size)
    lies = Lies(max_top_logprobs=0, divert_share=0.1, divert_each=True)
    with Front(backend("f16").port, lies, diverted_port=backend("q4_0").port) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "240")
    assert (verdict.verdict, verdict.cause) == ("differs", "partial_routing")
    assert verdict.axes["share"] == "inconsistent"
    share = next(
        e
        for f in json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
        if f["check"] == "share"
        for e in f["effects"]
    )
    assert share["low"] > 0
    assert share["low"] <= 0.1 <= share["high"]
    # The same files give the same words.
    replayed = CliRunner().invoke(cli, ["replay", str(tmp_path / "run")], standalone_mode=False)
    assert replayed.exception is None
    assert Verdict.model_validate_json((tmp_path / "run" / "verdict.json").read_bytes()) == verdict


@pytest.mark.usefixtures("weights_only")
def test_some_requests_elsewhere_is_not_called_consistent(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("f16").port, Lies(divert_share=0.5), diverted_port=backend("q4_0").port) as front:
        _, verdict = audit(front, tmp_path / "run", "--max-requests", "100")
    assert (verdict.verdict, verdict.cause) == ("differs", "partial_routing")
    assert verdict.axes["share"] == "inconsistent"


@pytest.mark.usefixtures("weights_only")
def test_a_spent_budget_can_be_raised(backend: Backend, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "endpoint.toml"
    with Front(backend("q4_0").port, Lies()) as front:
        file.write_text(
            f'name = "lab"\nbase_url = "{front.base_url}"\nmodel = "{MODEL_NAME}"\nreference = "{REFERENCE}"\n'
            "[price]\nprompt_usd_per_million_tokens = 1\ncompletion_usd_per_million_tokens = 1\n"
        )
        command = ["audit", str(file), "--out", str(run), "--max-cost", "0.0004"]
        first = CliRunner().invoke(cli, command, standalone_mode=False)
        spent = json.loads((run / "verdict.json").read_bytes())["cost_usd"]
        second = CliRunner().invoke(cli, ["resume", str(run), "--max-cost", "0.01"], standalone_mode=False)
    assert first.return_value == 5, first.output
    assert 0 < spent <= 0.0004
    assert second.return_value == 1, second.output
    assert json.loads((run / "verdict.json").read_bytes())["exact_variant"] == "q4_0"


@pytest.mark.usefixtures("weights_only")
def test_without_a_reference_the_weights_are_not_supported(backend: Backend, tmp_path: Path) -> None:
    with Front(backend("f16").port, Lies()) as front:
        command = ["audit", "--base-url", front.base_url, "--model", MODEL_NAME, "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(cli, command, standalone_mode=False)
    assert result.return_value == 3
    assert "weighbridge reference build" in result.output.replace("\n", " ")


@pytest.mark.usefixtures("no_sampling")
def test_replay_gives_the_same_bytes_without_network_or_key(backend: Backend, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Front(backend("q4_0").port, Lies()) as front:
        audit(front, run)
    names = (
        "observations.jsonl",
        "findings.json",
        "verdict.json",
        "report.json",
        "report.html",
        "junit.xml",
        "requests.csv",
    )
    before = {name: (run / name).read_bytes() for name in names}
    for name in names:
        (run / name).unlink()
    # The front is gone: nothing could be asked even if something tried.
    result = CliRunner().invoke(cli, ["replay", str(run)], standalone_mode=False)
    assert result.return_value == 1
    assert {name: (run / name).read_bytes() for name in names} == before


@pytest.mark.usefixtures("weights_only")
def test_a_later_policy_can_judge_the_same_evidence(backend: Backend, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Front(backend("q8_0").port, Lies()) as front:
        audit(front, run, "--policy", "int8-ok")
    _, _, verdict = judge_run(RunFolder(run), load_bundle(REFERENCE))
    assert verdict.policy == "int8-ok"
    assert verdict.verdict != "differs"
