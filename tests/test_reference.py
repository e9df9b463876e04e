"""Building, showing and verifying a reference bundle, with a real model; and what the embedded one holds."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from weighbridge.cli import cli
from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.judge.library import build_library
from weighbridge.judge.policy import load_policy
from weighbridge.lab.variants import OFFICIAL_TEMPLATE, VARIANTS
from weighbridge.lab.weights import matrix_bits
from weighbridge.paths import cache_folder, data_path
from weighbridge.records import read_toml
from weighbridge.reference.build import build_bundle
from weighbridge.reference.bundle import EMBEDDED, Bundle, Manifest, StackRecord, load_bundle, unfit_to_judge
from weighbridge.reference.engine import Prompt, Rows, Wanted
from weighbridge.reference.servers import TrustedServer
from weighbridge.reference.spec import Spec

EMBEDDED_NAME = "smollm2-135m-instruct"

SPEC = """
schema = "weighbridge/reference-spec/3"
id = "small"
version = 1
model = "SmolLM2-135M-Instruct"
model_names = ["SmolLM2-135M-Instruct"]
keeper = "a test"
top_k = 64
shard = 2
[weights]
source = "the lab"
precision = "16 bit"
lab = true
files = {{ "model.safetensors" = "{sha256}" }}
[licence]
identifier = "Example-1"
file = "licence.txt"
source = "a test"
[[licence.asks]]
kind = "notice"
quote = "You must retain the notice in all copies"
[[pool]]
name = "small-pool"
[[pool]]
name = "small-forced"
only_on = ["f32", "f16"]
[[pool]]
name = "small-pool"
renderings = ["no-generation-prompt"]
first = 2
only_on = ["f32", "q4_0"]
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
lab_variant = "no-generation-prompt"
"""
# Of the lab's model.safetensors: bfloat16 holds the lab's originals exactly.
SHA256 = "269d1636aaa7cae59018d0ca4eeaedf362d28446d89faff51d2e6ad265a7077f"
PROBES, FORCED = 3, 1  # of each pool
RENDERED = 2  # probes that are recorded under another rendering


def copy_pool(name: str, folder: Path, every: int) -> None:
    """Every so-many-th probe of a pool that the package carries, as a pool beside the spec."""
    embedded = data_path(f"probes/{name}")
    folder.mkdir()
    text = (embedded / "pool.toml").read_text().replace(f'id = "{name}"', f'id = "{folder.name}"')
    text = text.replace("score_every = 8", "score_every = 40")
    (folder / "pool.toml").write_text(text)
    lines = (embedded / "probes.jsonl").read_text().splitlines(keepends=True)
    (folder / "probes.jsonl").write_text("".join(lines[::every]))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.delenv("WEIGHBRIDGE_HOME", raising=False)
    real = cache_folder()
    (home / "cache").symlink_to(real, target_is_directory=True)
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))
    copy_pool("chat-one-token", tmp_path / "small-pool", 100)
    copy_pool("forced-text", tmp_path / "small-forced", 8)
    (tmp_path / "licence.txt").write_text("1. Use\n\nYou must retain the notice in all copies.\n")
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.format(sha256=SHA256))
    return path


def build_it(spec: Path, out: Path, steps: list[tuple[str, int, int]] | None = None) -> Manifest:
    def step(stack: str, done: int, of: int) -> None:
        if steps is not None:
            steps.append((stack, done, of))

    return build_bundle(read_toml(Spec, spec), spec.parent, out, lambda _: None, step)


@pytest.mark.lab
def test_a_build_goes_on_where_it_was_interrupted(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp is the engine and tokenises: no torch is needed."""
    asked: list[tuple[str, ...]] = []
    honest_score = TrustedServer.score

    def failing(self: TrustedServer, prompts: Sequence[Prompt], wanted: Sequence[Wanted], top_k: int) -> list[Rows]:
        asked.append(tuple(prompt.probe_id for prompt in prompts))
        if len(asked) == 5:
            raise BundleError("the power failed", "Run the build again")
        return honest_score(self, prompts, wanted, top_k)

    monkeypatch.setattr(TrustedServer, "score", failing)
    out, partial = tmp_path / "bundle", tmp_path / "bundle.partial"
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(BundleError, match="the power failed"):
        build_it(spec, out, steps)
    assert not (out / "manifest.json").exists()
    # Three shards of the reference (two probes each), and one of the second stack: nothing of them is lost.
    assert steps == [("f32", 2, 6), ("f32", 4, 6), ("f32", 6, 6), ("f16", 2, 4)]
    left = shutil.copytree(partial, tmp_path / "left")
    failed = asked[-1]
    again = len(asked)
    # A shard that a crash cut short is computed again, and no other.
    torn = partial / "f32" / "00001.npz"
    torn.write_bytes(torn.read_bytes()[:100])
    monkeypatch.setattr(TrustedServer, "tokenize", lambda *_: pytest.fail("a probe was tokenised twice"))
    build_it(spec, out)
    second = asked[again:]
    assert second[:2] == [asked[1], failed]
    # What stands under another rendering comes last; the forced text is not asked of every stack.
    rendered = tuple(f"{probe_id}@no-generation-prompt" for probe_id in asked[0])
    assert asked[2] == rendered
    assert second[2:] == [asked[0], (asked[1][0], rendered[0]), rendered[1:]]
    assert not partial.exists(), "what is in the bundle is not kept twice"
    monkeypatch.setattr(TrustedServer, "score", honest_score)

    bundle = load_bundle(str(out))
    rows = len(bundle.row_probe)
    assert bundle.manifest.probe_ids == [*asked[0], *asked[1], *rendered]
    assert len(bundle.manifest.probe_ids) == PROBES + FORCED + RENDERED
    assert rows > PROBES + FORCED + RENDERED
    assert bundle.logprobs_nats.shape == (3, rows, 64)
    assert (bundle.prompt_tokens[0] - bundle.prompt_tokens[1] == 4).all()
    assert np.nanmax(np.abs(bundle.logprobs_nats[1] - bundle.logprobs_nats[0])) < 0.2
    # A probe under another rendering is a prompt of its own, with rows of its own.
    for probe_id, other in zip(asked[0], rendered, strict=True):
        assert bundle.prompt_of(other) == bundle.prompt_of(probe_id)[:-4]
        assert (bundle.token_ids[bundle.row_index[other]] != bundle.token_ids[bundle.row_index[probe_id]]).any()
    # Only the pools that a stack was asked are filled, and the ends of the rows are tokens of their prompts.
    official, forced, other_rendering = (np.isin(bundle.row_probe, pool.probes) for pool in bundle.manifest.pools)
    for filled, empty in ((official | forced, other_rendering), (official | other_rendering, forced)):
        values = bundle.logprobs_nats[1 if empty is other_rendering else 2]
        assert np.isfinite(values[filled, 0]).all()
        assert np.isnan(values[empty]).all()
    assert np.isfinite(bundle.logprobs_nats[0, :, 0]).all()
    assert bundle.usable_probe_ids == list(bundle.manifest.probe_ids[:PROBES])
    rendered_pool = bundle.pool_at("L3", "no-generation-prompt")
    assert rendered_pool is not None
    assert bundle.usable_probes(rendered_pool) == list(rendered)
    assert (np.diff(bundle.logprobs_nats[0], axis=1) <= 0).all()
    stacks = bundle.manifest.stacks
    assert [s.departure for s in stacks] == [None, None, "precision"]
    assert [s.variant for s in stacks] == [None, None, "q4_0"]
    assert [s.family for s in stacks] == ["llama.cpp/float32", *["llama.cpp/float16"] * 2]
    noise = [s.noise_nats or 0.0 for s in stacks]
    assert noise[0] < noise[1] < 0.02 < noise[2]
    key = "small-pool@no-generation-prompt"
    assert [pool.key for pool in bundle.manifest.pools] == ["small-pool", "small-forced", key]
    assert [s.pools for s in stacks] == [
        ["small-pool", "small-forced", key], ["small-pool", "small-forced"], ["small-pool", key],
    ]  # fmt: skip
    assert bundle.manifest.licence is not None
    assert bundle.manifest.weights.files["model.safetensors"] == SHA256
    with pytest.raises(BundleError, match="already holds a bundle"):
        build_it(spec, out)

    shown = CliRunner().invoke(cli, ["reference", "show", str(out), "--json"], standalone_mode=False)
    document = json.loads(shown.stdout)
    assert [s["id"] for s in document["stacks"]] == ["f32", "f16"]
    assert [s["id"] for s in document["variants"]] == ["q4_0"]
    assert document["incomplete"] is None
    assert CliRunner().invoke(cli, ["reference", "verify", str(out)], standalone_mode=False).return_value == 0

    # What was computed before the failure is in the bundle as it was, and what was computed again is the same.
    for stack, name in (("f32", "00000"), ("f32", "00001"), ("f32", "00002"), ("f16", "00000")):
        with np.load(left / stack / f"{name}.npz") as shard:
            values = bundle.logprobs_nats[bundle.stack_index[stack], shard["rows"]]
            np.testing.assert_array_equal(values, shard["logprobs_nats"])
    # Another spec does not go on with what is left of this one.
    shutil.copytree(left, tmp_path / "other.partial")
    spec.write_text(spec.read_text().replace("top_k = 64", "top_k = 65"))
    with pytest.raises(ConfigurationError, match="the beginning of another build"):
        build_it(spec, tmp_path / "other")
    assert {f.name for f in (tmp_path / "other.partial").iterdir()} == {f.name for f in left.iterdir()}


def test_a_part_may_be_built_but_nothing_is_judged_against_it(spec: Path) -> None:
    """A bundle may be merged from parts, so the build does not ask for what judging needs: the judge does."""
    text = spec.read_text()
    start = text.index('[[stack]]\nid = "q4_0"')
    text = text[:start] + text[text.index("[[hypothesis]]") :]
    spec.write_text(text.replace('["f32", "q4_0"]', '["f32", "f16"]'))
    assert [stack.id for stack in read_toml(Spec, spec).stack] == ["f32", "f16"]
    whole = load_bundle(EMBEDDED_NAME)
    honest = [stack for stack in whole.manifest.stacks if stack.departure is None]
    rows = [whole.stack_index[stack.id] for stack in honest]
    part = replace(
        whole, manifest=whole.manifest.model_copy(update={"stacks": honest}), logprobs_nats=whole.logprobs_nats[rows]
    )
    with pytest.raises(BundleError, match="cannot be judged against: a departure is needed"):
        build_library(part, load_policy("strict"), 20)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lab = true", 'lab = true\nfolder = "x"', "name one of folder, repo"),
        ("lab = true", "", "name one of folder, repo"),
        ('lab_variant = "q4_0"', 'lab_variant = "q9"', "the lab has no variant 'q9'"),
        ('lab_variant = "no-gen', 'lab_variant = "q9-', "the lab has no template variant 'q9-eration-prompt'"),
        ('lab_variant = "q4_0"', 'lab_variant = "no-template"', "a template is a hypothesis, not a stack: name it in a pool's `renderings`"),
        ('renderings = ["no-generation-prompt"]', 'renderings = ["none"]', "there is no hypothesis 'none'"),
        ('renderings = ["no-generation-prompt"]', 'renderings = ["official"]', "a pool stands twice"),
        ('renderings = ["no-generation-prompt"]', "renderings = []", "pool.2.renderings"),
        ('name = "small-pool"\n[[', 'name = "small-pool"\nfirst = 2\n[[', "the official rendering is recorded whole"),
        ('name = "small-forced"', 'name = "small-forced"\nrenderings = ["no-generation-prompt"]', "it is not recorded under the official rendering"),
        ('id = "f16"', 'id = "f32"', "a stack stands twice"),
        ('id = "f16"', 'id = "../f16"', "stack.1.id"),
        ('only_on = ["f32", "f16"]', 'only_on = ["f16"]', "the reference 'f32' is missing"),
        ('only_on = ["f32", "f16"]', 'only_on = ["f32", "x"]', "there is no stack 'x'"),
        ('[[stack]]\nid = "f32"\nlab_variant = "f32"', '[[stack]]\nid = "f32"\nlab_variant = "q8_0"', "the first stack is the reference"),
        ('lab_variant = "f16"', 'description = "x"\nlocal = { weights = "int8" }', "depart from the original: name the departure"),
        ("top_k = 64", "top_k = 5", "top_k"),
        ("reference-spec/3", "reference-spec/1", "schema"),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_built_is_refused_before_any_work(spec: Path, old: str, new: str, says: str) -> None:
    assert old in spec.read_text()
    spec.write_text(spec.read_text().replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=re.escape(says)) as raised:
        read_toml(Spec, spec)
    assert str(spec) in str(raised.value)


@pytest.mark.lab
def test_weights_that_are_not_the_named_ones_are_refused_before_any_work(spec: Path, tmp_path: Path) -> None:
    spec.write_text(spec.read_text().replace(SHA256, "0" * 64))
    with pytest.raises(ConfigurationError, match="does not have the hash that the spec names"):
        build_it(spec, tmp_path / "bundle")
    assert not (tmp_path / "bundle.partial").exists()


# -- the embedded bundle ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return load_bundle(EMBEDDED_NAME)


def test_the_embedded_bundle_is_the_pinned_one_and_small(embedded: Bundle) -> None:
    assert embedded.identity.digest == EMBEDDED[EMBEDDED_NAME]
    assert sum(f.stat().st_size for f in embedded.path.rglob("*") if f.is_file()) < 25_000_000
    assert len(embedded.usable_probe_ids) == 240
    lengths = embedded.prompt_tokens[0, [embedded.probe_index[probe] for probe in embedded.usable_probe_ids]]
    assert lengths.min() >= 20
    assert lengths.max() <= 200
    assert lengths.mean() <= 90


def test_the_embedded_bundle_is_what_its_spec_says(embedded: Bundle) -> None:
    spec = read_toml(Spec, data_path("reference_outputs/specs/smollm2-135m-instruct.toml"))
    manifest = embedded.manifest
    assert [s.id for s in manifest.stacks] == [s.id for s in spec.stack]
    assert [s.departure for s in manifest.stacks] == [s.departs for s in spec.stack]
    assert [h.id for h in manifest.hypotheses] == ["official", *(h.id for h in spec.hypothesis)]
    for stack in manifest.stacks:
        asked = [p for p in spec.pool if p.only_on is None or stack.id in p.only_on]
        official = [p.name for p in asked if p.is_official]
        assert stack.pools == official + [f"{p.name}@{r}" for p in asked if not p.is_official for r in p.renderings]
    for table in spec.pool:
        for rendering in table.renderings:
            pool = next(p for p in manifest.pools if (p.id, p.rendering) == (table.name, rendering))
            assert table.first in (None, len(pool.probes))
    assert (manifest.id, manifest.version, manifest.top_k) == (spec.id, spec.version, spec.top_k)
    assert manifest.weights.files["model.safetensors"] == spec.weights.files["model.safetensors"]
    assert manifest.licence is not None
    assert [ask.quote for ask in manifest.licence.asks] == [
        ask.quote for ask in (spec.licence.asks if spec.licence else [])
    ]


def test_every_rendering_is_recorded_for_the_prompt_and_for_the_weights(embedded: Bundle) -> None:
    """So that whatever is served under it can be judged: the reference, two honest grids, and what is most often served."""
    hypotheses = [h.id for h in embedded.manifest.hypotheses]
    assert len(hypotheses) >= 17
    for rendering in hypotheses[1:]:
        prompts, weights = embedded.pool_at("prompt", rendering), embedded.pool_at("L3", rendering)
        assert prompts is not None
        assert weights is not None
        assert (len(prompts.probes), len(weights.probes)) == (10, 64)
        recorded = {s.id for s in embedded.manifest.stacks if weights.key in s.pools}
        assert {"hf-float32", "hf-bfloat16", "int8", "fp8-e4m3", "int4-g64", "nf4-g64", "llamacpp-q4_0"} <= recorded
        assert unfit_to_judge(embedded, "L3", rendering) is None


def test_honest_stacks_are_many_and_of_several_families(embedded: Bundle) -> None:
    honest = [s for s in embedded.manifest.stacks if s.departure is None]
    assert len(honest) >= 12
    assert len({s.family for s in honest}) >= 5
    assert {"llama.cpp", "transformers", "vllm"} == {s.engine_name for s in honest}
    assert {"llamacpp-f32", "llamacpp-f16", "llamacpp-bf16"} <= {s.id for s in honest}


def test_the_noisiest_numeric_class_is_well_known(embedded: Bundle) -> None:
    """At least six honest stacks keep something in bfloat16, and each has one beside it of another engine or rounding."""
    honest = [s for s in embedded.manifest.stacks if s.departure is None]
    noise = {s.id: s.noise_nats or 0.0 for s in honest}
    noisiest = [s for s in honest if noise[s.id] >= max(noise.values()) / 2]
    assert len(noisiest) >= 6

    def scheme(stack: StackRecord) -> tuple[str, object, object]:
        return stack.engine_name, stack.engine.get("module_outputs"), stack.engine.get("logits")

    for stack in noisiest:
        ratios = [noise[s.id] / noise[stack.id] for s in noisiest if scheme(s) != scheme(stack)]
        assert any(1 / 1.25 <= ratio <= 1.25 for ratio in ratios), stack.id


def test_departures_are_many_and_some_are_recorded_twice(embedded: Bundle) -> None:
    departures = [s for s in embedded.manifest.stacks if s.departure is not None]
    names = Counter(s.variant for s in departures)
    assert len(names) >= 20
    assert sum(times > 1 for times in names.values()) >= 4
    families: dict[str | None, set[str]] = {}
    for stack in departures:
        families.setdefault(stack.variant, set()).add(stack.family)
    assert all(len(families[name]) == times for name, times in names.items()), "of another engine or compute type"
    assert not any("q4_1" in s.id for s in departures)


def test_what_is_smaller_than_honest_noise_is_not_counted(embedded: Bundle) -> None:
    largest = max(s.noise_nats or 0.0 for s in embedded.manifest.stacks if s.departure is None)
    for stack in embedded.manifest.stacks:
        assert stack.noise_nats is not None
        assert stack.indistinguishable == (stack.departure is not None and stack.noise_nats < largest)
    counted = {s.variant for s in embedded.manifest.stacks if s.departure is not None and not s.indistinguishable}
    assert len(counted) >= 20
    assert {"q8_0", "q4_0", "int8", "fp8-e4m3", "depth-24"} <= counted


def test_bits_are_computed_from_what_is_stored(embedded: Bundle) -> None:
    bits = {s.id: s.bits_held for s in embedded.manifest.stacks}
    assert bits["llamacpp-q8_0"] == 8.5
    assert bits["llamacpp-q4_0"] == matrix_bits("q4_0")
    for stack in embedded.manifest.stacks:
        if stack.departure == "precision":
            assert stack.bits_held is not None
            assert stack.bits_held < 16
        elif stack.departure is None:
            assert stack.bits_held is None or stack.bits_held >= 16


def test_the_lab_departs_only_where_it_says() -> None:
    assert VARIANTS["f16"].template is None
    assert all(v.template != OFFICIAL_TEMPLATE for v in VARIANTS.values() if v.template is not None)
    assert all(v.departure is not None for v in VARIANTS.values() if v.template is not None)
