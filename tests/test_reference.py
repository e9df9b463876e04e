"""Building, showing and verifying a reference bundle, with a real model."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from weighbridge.cli import cli
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, VARIANTS
from weighbridge.lab.weights import MODEL_SHA256
from weighbridge.paths import cache_folder, data_path
from weighbridge.records import Message, read_toml
from weighbridge.reference import build
from weighbridge.reference.build import Spec, build_bundle
from weighbridge.reference.bundle import EMBEDDED, load_bundle

EMBEDDED_NAME = "smollm2-135m-instruct"

SPEC = """
schema = "weighbridge/reference-spec/1"
id = "small"
version = 1
model = "SmolLM2-135M-Instruct"
model_names = ["SmolLM2-135M-Instruct"]
keeper = "a test"
pool = "{pool}"
top_k = 64
tokenizer_sha256 = "not checked here"
template_sha256 = "not checked here"
[weights]
source = "the lab"
sha256 = "{sha256}"
licence = "Apache-2.0"
precision = "16 bit"
[[stack]]
id = "f32"
lab_variant = "f32"
[[stack]]
id = "f16"
lab_variant = "f16"
[[stack]]
id = "q4_0"
lab_variant = "q4_0"
departure_class = "int4"
[[hypothesis]]
id = "no-generation-prompt"
cause = "template"
stack = {{ id = "no-generation-prompt", lab_variant = "no-generation-prompt" }}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.delenv("WEIGHBRIDGE_HOME", raising=False)
    real = cache_folder()
    (home / "cache").symlink_to(real, target_is_directory=True)
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))
    pool = tmp_path / "pool"
    pool.mkdir()
    embedded = data_path("probes/chat-one-token")
    (pool / "pool.toml").write_text((embedded / "pool.toml").read_text().replace('"chat-one-token"', '"small-pool"'))
    lines = (embedded / "probes.jsonl").read_text().splitlines(keepends=True)
    (pool / "probes.jsonl").write_text("".join(lines[::110]))
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.format(pool=pool, sha256=MODEL_SHA256))
    return path


@pytest.mark.lab
def test_a_build_goes_on_where_it_was_interrupted(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    honest_answer = build.TrustedServer.answer

    def failing(self: build.TrustedServer, messages: list[Message], seed: int) -> build.Answer:
        asked.append(messages[-1].content + self.name)
        if len(asked) == 6:
            raise BundleError("the power failed", "Run the build again")
        return honest_answer(self, messages, seed)

    monkeypatch.setattr(build.TrustedServer, "answer", failing)
    out = tmp_path / "bundle"
    with pytest.raises(BundleError, match="the power failed"):
        build_bundle(read_toml(Spec, spec), out, lambda _: None, lambda *_: None)
    assert not (out / "manifest.json").exists()
    failed = asked[-1]
    build_bundle(read_toml(Spec, spec), out, lambda _: None, lambda *_: None)
    # Only the one that failed was asked a second time.
    assert [question for question in set(asked) if asked.count(question) > 1] == [failed]
    bundle = load_bundle(str(out))
    assert bundle.logprobs_nats.shape == (3, len(bundle.manifest.probe_ids), 64)
    assert (bundle.prompt_tokens[0] - bundle.prompt_tokens[1] == 4).all()
    assert np.nanmax(np.abs(bundle.logprobs_nats[1] - bundle.logprobs_nats[0])) < 0.2
    assert [s.departure for s in bundle.manifest.stacks] == [None, None, "precision"]
    with pytest.raises(BundleError, match="already holds a bundle"):
        build_bundle(read_toml(Spec, spec), out, lambda _: None, lambda *_: None)

    shown = CliRunner().invoke(cli, ["reference", "show", str(out), "--json"], standalone_mode=False)
    document = json.loads(shown.stdout)
    assert [s["id"] for s in document["stacks"]] == ["f32", "f16"]
    assert [s["id"] for s in document["variants"]] == ["q4_0"]
    assert CliRunner().invoke(cli, ["reference", "verify", str(out)], standalone_mode=False).return_value == 0


def test_a_spec_that_could_never_judge_is_refused_before_any_work(spec: Path, tmp_path: Path) -> None:
    text = spec.read_text()
    start = text.index('[[stack]]\nid = "q4_0"')
    spec.write_text(text[:start] + text[text.index("[[hypothesis]]") :])
    with pytest.raises(ConfigurationError, match="a departure is needed"):
        build_bundle(read_toml(Spec, spec), tmp_path / "bundle", lambda _: None, lambda *_: None)


def test_the_embedded_bundle_is_the_pinned_one_and_small() -> None:
    bundle = load_bundle(EMBEDDED_NAME)
    assert bundle.identity.digest == EMBEDDED[EMBEDDED_NAME]
    assert sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) < 5_000_000
    assert len(bundle.usable_probe_ids) >= 400
    stacks = {s.id: s for s in bundle.manifest.stacks}
    assert {"llamacpp-f32", "llamacpp-f16", "llamacpp-bf16"} <= set(stacks)
    assert bundle.prompt_tokens[0].min() >= 20
    assert bundle.prompt_tokens[0].max() <= 200
    assert bundle.prompt_tokens[0].mean() <= 90
    assert not any("q4_1" in s for s in stacks)


def test_the_lab_departs_only_where_it_says() -> None:
    assert VARIANTS["f16"].template is None
    assert all(v.template != OFFICIAL_TEMPLATE for v in VARIANTS.values() if v.template is not None)
    assert all(v.departure is not None for v in VARIANTS.values() if v.template is not None)
