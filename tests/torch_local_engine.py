"""The local-weights engine: its numbers are the model's own, its roundings do what they say, its errors are one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from weighbridge.errors import BundleError, ConfigurationError, WeighbridgeError
from weighbridge.lab.checkpoint import lab_checkpoint
from weighbridge.probes import load_pool
from weighbridge.reference.checkpoint import Checkpoint, fetch_checkpoint, open_checkpoint
from weighbridge.reference.engine import Prompt, Rows
from weighbridge.reference.local import LocalSetting, LocalWeights
from weighbridge.reference.roundings import WEIGHT_ROUNDINGS
from weighbridge.reference.templates import render_conversations
from weighbridge.stats.residuals import centred_difference, log_scale, own_top

TOP_K = 64
SHORT = 5  # prompts that every rounding is tried on

Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(lab_checkpoint(lambda _: None), {})


@pytest.fixture(scope="module")
def original(checkpoint: Checkpoint) -> LocalWeights:
    return LocalWeights(checkpoint, LocalSetting())


@pytest.fixture(scope="module")
def prompts(original: LocalWeights, checkpoint: Checkpoint) -> list[Prompt]:
    """The 40 shortest probes of chat-one-token."""
    probes = load_pool("chat-one-token").probes
    texts = render_conversations(
        checkpoint.template, [p.messages for p in probes], special_tokens=checkpoint.special_tokens, name="official"
    )
    found = [Prompt(p.id, tuple(ids), (len(ids) - 1,)) for p, ids in zip(probes, original.tokenize(texts), strict=True)]
    return sorted(found, key=lambda prompt: len(prompt.token_ids))[:40]


@pytest.fixture(scope="module")
def base(original: LocalWeights, prompts: list[Prompt]) -> list[Rows]:
    return original.score(prompts, [None] * len(prompts), TOP_K)


@pytest.fixture(scope="module")
def noise_of(checkpoint: Checkpoint, prompts: list[Prompt], base: list[Rows]) -> Callable[..., float]:
    """ŝ of a setting against the original in float32, over its own 20 likeliest tokens of the reference's list."""
    known: dict[str, float] = {}

    def noise(count: int = SHORT, **setting: Any) -> float:
        key = f"{count} {setting}"
        if key not in known:
            engine = LocalWeights(checkpoint, LocalSetting(**setting))
            known[key] = effective_noise(engine, prompts[:count], base[:count])
        return known[key]

    return noise


def effective_noise(engine: LocalWeights, prompts: list[Prompt], base: list[Rows]) -> float:
    rows = engine.score(prompts, [row.token_ids for row in base], TOP_K)
    values = np.concatenate([row.logprobs_nats for row in rows]).astype(np.float64)
    reference = np.concatenate([row.logprobs_nats for row in base]).astype(np.float64)
    columns, own = own_top(values, 20)
    scales = log_scale(centred_difference(own, np.take_along_axis(reference, columns, axis=1)))
    assert np.isfinite(scales).all()
    return float(np.exp(scales.mean()))


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The model's folder with small files of its own; the weights are the original's."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.folder.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def tiny(copied: Path) -> Path:
    """A model of the same kind that is small enough to be damaged at leisure."""
    (copied / "model.safetensors").unlink()
    edit(
        copied / "config.json",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(copied)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(copied)
    return copied


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def one_line(error: pytest.ExceptionInfo[WeighbridgeError]) -> str:
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 600
    assert error.value.next_step
    return said


# -- the numbers are the model's -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Any:
    """The model as transformers loads it by itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def test_scores_are_those_of_a_plain_forward_pass(original: LocalWeights, plain: Any, prompts: list[Prompt]) -> None:
    """Prompts of different lengths go through the model together; here they are filled up with another token."""
    long = prompts[39].token_ids
    mixed = [
        Prompt("several", long, (3, 10, len(long) - 1)),
        prompts[0],
        Prompt("inside", long[: len(long) // 2 + 1], (0, 7)),
        prompts[20],
    ]
    filled = torch.full((len(mixed), len(long)), 7)
    for i, prompt in enumerate(mixed):
        filled[i, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
    with torch.no_grad():
        expected = torch.log_softmax(plain(filled).logits, dim=-1).numpy()
    rows = original.score(mixed, [None] * len(mixed), TOP_K)
    assert len(rows) == len(mixed)
    for i, (prompt, row) in enumerate(zip(mixed, rows, strict=True)):
        whole = expected[i, list(prompt.positions)]
        assert row.token_ids.shape == row.logprobs_nats.shape == (len(prompt.positions), TOP_K)
        assert [str(row.token_ids.dtype), str(row.logprobs_nats.dtype)] == ["int32", "float32"]
        there = np.take_along_axis(whole, row.token_ids.astype(np.int64), axis=1)
        # The head is a smaller product here, which sums in another order.
        np.testing.assert_allclose(row.logprobs_nats, there, rtol=0, atol=5e-5)
        assert np.abs(row.logprobs_nats - there).mean() < 1e-5
        # Most likely first, and nothing outside of the list is more likely than what is in it.
        assert (np.diff(row.logprobs_nats, axis=1) <= 0).all()
        outside = whole.copy()
        np.put_along_axis(outside, row.token_ids.astype(np.int64), -np.inf, axis=1)
        assert (outside.max(axis=1) <= row.logprobs_nats[:, -1] + 5e-5).all()


def test_a_prompt_that_goes_alone_has_the_same_scores_up_to_rounding(
    original: LocalWeights, plain: Any, prompts: list[Prompt]
) -> None:
    long = prompts[39].token_ids
    mixed = [Prompt("one-token", long[:1], (0,)), Prompt("several", long, (0, 5, len(long) - 1)), prompts[3]]
    for prompt, row in zip(mixed, original.score(mixed, [None] * 3, TOP_K), strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt.token_ids])).logits[0, list(prompt.positions)]
        expected = torch.log_softmax(logits.double(), dim=-1).numpy()
        there = np.take_along_axis(expected, row.token_ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(row.logprobs_nats, there, rtol=0, atol=2e-4)


def test_wanted_tokens_are_gathered_in_the_order_asked(original: LocalWeights, prompts: list[Prompt]) -> None:
    rng = np.random.default_rng(2)
    some = [Prompt("a", prompts[0].token_ids, (5, len(prompts[0].token_ids) - 1)), prompts[1]]
    whole = original.score(some, [None, None], 49152)
    wanted = [rng.integers(0, 49152, (len(p.positions), 100)).astype(np.int32) for p in some]
    for all_of, asked, row in zip(whole, wanted, original.score(some, wanted, 7), strict=True):
        assert np.array_equal(row.token_ids, asked)
        for i in range(len(asked)):
            table = np.empty(49152, np.float32)
            table[all_of.token_ids[i]] = all_of.logprobs_nats[i]
            assert np.exp(table.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
            assert np.array_equal(row.logprobs_nats[i], table[asked[i]])


def test_batch_and_order_change_a_value_by_rounding_only(
    checkpoint: Checkpoint, prompts: list[Prompt], base: list[Rows]
) -> None:
    """In batches of 1 nothing is padded, so padding is seen by no token."""
    some = prompts[30:40][::-1]
    single = LocalWeights(checkpoint, LocalSetting(batch=1)).score(
        some, [r.token_ids for r in base[30:40][::-1]], TOP_K
    )
    for alone, together in zip(single, base[30:40][::-1], strict=True):
        np.testing.assert_allclose(alone.logprobs_nats, together.logprobs_nats, rtol=0, atol=2e-4)


def test_token_ids_go_into_the_model_untouched(original: LocalWeights, prompts: list[Prompt]) -> None:
    """Even those that no tokenizer would give: special ones in the middle, and "hi" in two pieces."""
    seen: list[torch.Tensor] = []
    hook = original.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: seen.append(given[0].clone())
    )
    odd = Prompt("odd", (88, 89, 2, 1, 1, 0, 49151, 2, 88, 89), (9,))
    try:
        original.score([prompts[0], odd], [None, None], 5)
    finally:
        hook.remove()
    rows = {tuple(row.tolist()) for batch in seen for row in batch}
    for prompt in (prompts[0], odd):
        assert any(row[: len(prompt.token_ids)] == prompt.token_ids for row in rows)


def test_texts_are_tokenised_whole_with_special_tokens_read_and_none_added(original: LocalWeights, tiny: Path) -> None:
    text = "<|im_start|>user\nhi<|im_end|>\n"
    assert original.tokenize([text, ""]) == [[1, 4093, 198, 6004, 2, 198], []]
    # A tokenizer.json may say that texts are cut and filled up; a probe must be neither.
    edit(
        tiny / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0, "pad_token": "<|im_end|>"},
    )  # fmt: skip
    engine = LocalWeights(open_checkpoint(tiny, {}), LocalSetting())
    assert engine.tokenize([text, ""]) == [[1, 4093, 198, 6004, 2, 198], []]


def test_two_runs_give_the_same_bytes(checkpoint: Checkpoint, prompts: list[Prompt], base: list[Rows]) -> None:
    again = LocalWeights(checkpoint, LocalSetting()).score(prompts, [None] * len(prompts), TOP_K)
    assert _bytes(again) == _bytes(base)


def _bytes(rows: list[Rows]) -> bytes:
    return b"".join(row.token_ids.tobytes() + row.logprobs_nats.tobytes() for row in rows)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 0.03, 0.09), ("float16", 0.002, 0.02)])
def test_sixteen_bit_arithmetic_has_the_noise_of_its_type(
    dtype: str, least: float, most: float, noise_of: Callable[..., float]
) -> None:
    found = noise_of(40, dtype=dtype)
    print(f"noise of {dtype}: {found:.4f} nats")  # noqa: T201
    assert least < found < most


def test_emulated_rounding_points_are_as_noisy_as_what_they_emulate(noise_of: Callable[..., float]) -> None:
    outputs = noise_of(module_outputs="bfloat16")
    logits = noise_of(logits="bfloat16")
    real = noise_of(dtype="bfloat16")
    assert 0.4 * real < outputs < 1.5 * real
    assert 0.002 < logits < noise_of(module_outputs="bfloat16", logits="bfloat16")


# -- roundings -------------------------------------------------------------------------------------------------------


def test_a_rounded_variant_leaves_nothing_behind(
    checkpoint: Checkpoint, original: LocalWeights, prompts: list[Prompt], base: list[Rows]
) -> None:
    before = checkpoint.folder.joinpath("model.safetensors").stat().st_mtime_ns
    some, known = prompts[:SHORT], base[:SHORT]
    fresh = LocalWeights(checkpoint, LocalSetting(dtype="bfloat16")).model.state_dict()
    variant = LocalWeights(
        checkpoint, LocalSetting(dtype="bfloat16", weights="int4-g64", activations="int8", kv_cache="int4", module_outputs="bfloat16", remove_blocks=[3])
    )  # fmt: skip
    variant.score(some, [None] * SHORT, TOP_K)
    assert effective_noise(variant, some, known) > 0.1
    again = LocalWeights(checkpoint, LocalSetting(dtype="bfloat16")).model.state_dict()
    assert fresh.keys() == again.keys()
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    # The engine that was loaded before the variant, and the file, are as they were.
    assert effective_noise(original, some, known) <= 2e-4
    stored = load_file(checkpoint.folder / "model.safetensors")
    held = original.model.state_dict()
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in stored.items())
    assert checkpoint.folder.joinpath("model.safetensors").stat().st_mtime_ns == before


def test_every_named_rounding_gives_another_result(noise_of: Callable[..., float]) -> None:
    found = {name: noise_of(weights=name) for name in WEIGHT_ROUNDINGS}
    print({name: round(value, 4) for name, value in found.items()})  # noqa: T201
    assert len(set(found.values())) == len(found)
    assert found["int8"] < found["int4-g64"] < found["int3-g64"] < found["int2-asym-g64"]
    assert found["int8"] < found["fp8-e4m3"] < found["nf4-g64"] < found["int3-g64"]
    for kind in ("int4-g", "nf4-g"):
        assert found[f"{kind}32"] < found[f"{kind}128"]


def test_exactly_the_matrices_inside_the_blocks_are_rounded(checkpoint: Checkpoint, original: LocalWeights) -> None:
    rounded = LocalWeights(checkpoint, LocalSetting(weights="int3-g64")).model.state_dict()
    changed = {name for name, tensor in original.model.state_dict().items() if not torch.equal(tensor, rounded[name])}
    kinds = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert changed == {f"model.layers.{block}.{kind}.weight" for block in range(30) for kind in kinds}
    name = "model.layers.4.mlp.down_proj.weight"
    expected = WEIGHT_ROUNDINGS["int3-g64"].apply(original.model.state_dict()[name].numpy())
    assert np.array_equal(rounded[name].numpy(), expected)


def test_fp8_weights_are_what_torchs_own_cast_gives(original: LocalWeights) -> None:
    weight = original.model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    found = WEIGHT_ROUNDINGS["fp8-e4m3"].apply(weight.numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_a_coarser_kv_cache_is_noisier(noise_of: Callable[..., float]) -> None:
    found = {kind: noise_of(kv_cache=kind) for kind in ("int8", "fp8-e4m3", "int4")}
    print({name: round(value, 4) for name, value in found.items()})  # noqa: T201
    assert 1e-3 < found["int8"] < found["fp8-e4m3"] < found["int4"]


def test_rounded_activations_add_to_rounded_weights(noise_of: Callable[..., float]) -> None:
    found = {kind: noise_of(activations=kind) for kind in ("int8", "fp8-e4m3")}
    print({name: round(value, 4) for name, value in found.items()})  # noqa: T201
    assert min(found.values()) > 0.01
    assert found["int8"] != found["fp8-e4m3"]
    both = noise_of(weights="fp8-e4m3", activations="fp8-e4m3")
    assert both > noise_of(weights="fp8-e4m3")
    assert both > 0.9 * found["fp8-e4m3"]


def test_blocks_are_removed_by_number(checkpoint: Checkpoint, noise_of: Callable[..., float], tiny: Path) -> None:
    engine = LocalWeights(checkpoint, LocalSetting(remove_blocks=[*range(13, 19)]))
    assert len(engine.model.model.layers) == 24
    stored = load_file(checkpoint.folder / "model.safetensors")
    held = engine.model.state_dict()
    for now, then in ((0, 0), (12, 12), (13, 19), (23, 29)):
        name = "self_attn.q_proj.weight"
        assert torch.equal(held[f"model.layers.{now}.{name}"], stored[f"model.layers.{then}.{name}"].float())
    assert noise_of(remove_blocks=[*range(13, 19)]) > 5 * noise_of(weights="int8")
    small = open_checkpoint(tiny, {})
    for removed in ([3], [0, 1, 2], [-1]):
        with pytest.raises(ConfigurationError, match="remove_blocks") as error:
            LocalWeights(small, LocalSetting(remove_blocks=removed))
        one_line(error)
    cached = LocalWeights(small, LocalSetting(remove_blocks=[1], kv_cache="int8"))
    assert np.isfinite(cached.score([Prompt("p", (1, 2, 3), (2,))], [None], 5)[0].logprobs_nats).all()


def test_bits_are_computed_from_the_shapes(checkpoint: Checkpoint) -> None:
    shapes = {name: tensor.shape for name, tensor in load_file(checkpoint.folder / "model.safetensors").items()}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    total = sum(rows * columns for rows, columns in matrices.values())

    def expected(code: float, shared: float, group: int | None) -> float:
        bits = 0.0
        for name, (rows, columns) in matrices.items():
            scales = rows * (1 if group is None else -(-columns // group))
            bits += code * rows * columns + shared * scales if ".layers." in name else 16 * rows * columns
        return float(bits / total)

    def held(**setting: Any) -> float:
        bits: float = LocalWeights(checkpoint, LocalSetting(**setting)).bits_held
        return bits

    assert expected(8, 16, None) == pytest.approx(9.7, abs=0.05)
    assert held(weights="int8") == pytest.approx(expected(8, 16, None), abs=0.005)
    assert held(weights="int4-asym-g64", dtype="bfloat16") == pytest.approx(expected(4, 20, 64), abs=0.005)
    assert held() == held(kv_cache="int8") == 16


def test_facts_record_what_the_numbers_depend_on(checkpoint: Checkpoint) -> None:
    engine = LocalWeights(checkpoint, LocalSetting(dtype="bfloat16", kv_cache="int8", batch=3, threads=1))
    facts = engine.facts()
    assert facts["dtype"] == "bfloat16"
    assert facts["engine"] == f"transformers {transformers.__version__}, torch {torch.__version__}"
    assert facts["deterministic_algorithms"] is torch.are_deterministic_algorithms_enabled() is True
    assert (facts["threads"], facts["batch"], facts["kv_cache"], facts.get("device", "cpu")) == (1, 3, "int8", "cpu")  # fmt: skip
    assert torch.get_num_threads() == 1
    assert facts["hardware"].startswith("CPU ")
    assert json.loads(json.dumps(facts)) == facts
    LocalWeights(checkpoint, LocalSetting())  # as many threads as before, for the tests that follow


# -- what cannot be used ---------------------------------------------------------------------------------------------


def test_the_context_is_the_models_own(tiny: Path, original: LocalWeights) -> None:
    edit(tiny / "config.json", max_position_embeddings=16)
    assert LocalWeights(open_checkpoint(tiny, {}), LocalSetting()).facts()["context_tokens"] == 16
    assert original.facts()["context_tokens"] == 8192


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    torch.save({}, tiny / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"pickled \(pytorch_model.bin\)") as error:
        open_checkpoint(tiny, {})
    assert "safetensors" in one_line(error)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_models_own_is_refused(tiny: Path, name: str) -> None:
    edit(tiny / name, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (tiny / "modeling.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigurationError, match="auto_map") as error:
        open_checkpoint(tiny, {})
    assert name in one_line(error)


def test_weights_with_another_hash_are_refused_before_they_are_loaded(tiny: Path) -> None:
    good = open_checkpoint(tiny, {}).files
    assert set(good) >= {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"}
    assert open_checkpoint(tiny, good).files == good
    data = bytearray((tiny / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors does not have the hash") as error:
        open_checkpoint(tiny, good)
    assert "revision" in one_line(error)
    with pytest.raises(ConfigurationError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(tiny, {"model-2.safetensors": "0" * 64})


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123", "A" * 40, "0" * 41])
def test_a_revision_that_is_not_a_commit_is_refused_before_anything_is_fetched(
    revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> str:
        raise AssertionError("fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    with pytest.raises(ConfigurationError, match="does not pin HuggingFaceTB/SmolLM2-135M-Instruct") as error:
        fetch_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", revision, {})
    assert "40" in one_line(error)
    with pytest.raises(AssertionError, match="fetched"):  # the patch would have been called
        fetched()


def test_a_folder_without_config_or_weights_is_named(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no config\.json") as error:
        open_checkpoint(tmp_path / "nothing", {})
    one_line(error)
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="holds no weights") as error:
        open_checkpoint(tiny, {})
    one_line(error)


def test_a_tokenizer_without_template_is_refused_at_rendering(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    checkpoint = open_checkpoint(tiny, {})
    messages = load_pool("chat-one-token").probes[0].messages
    with pytest.raises(ConfigurationError, match="no chat template") as error:
        render_conversations(checkpoint.template, [messages], special_tokens=checkpoint.special_tokens, name="tiny")
    assert "tokenizer" in one_line(error)


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, :32].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        _drop, _cut, _reshape,
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 500),
        lambda folder: edit(folder / "config.json", model_type="no-such-model"),
        lambda folder: (folder / "config.json").write_text("{"),
    ],
    ids=["tensor-missing", "cut", "other-shape", "garbage", "unknown-kind", "config-not-json"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_not_filled_with_chance(tiny: Path, damage: Callable[[Path], None]) -> None:
    damage(tiny)
    with pytest.raises(ConfigurationError) as error:
        LocalWeights(open_checkpoint(tiny, {}), LocalSetting())
    assert str(tiny) in one_line(error)


def test_the_same_weights_in_shards_beside_a_second_copy_are_read_once(tiny: Path) -> None:
    whole = LocalWeights(open_checkpoint(tiny, {}), LocalSetting())
    tensors = load_file(tiny / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tiny / file, metadata={"format": "pt"})
    # A second copy under the name that another program reads; its numbers are wrong here, so that a use would show.
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, tiny / "consolidated.safetensors")
    (tiny / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = LocalWeights(open_checkpoint(tiny, {}), LocalSetting())
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in sharded.model.state_dict().items())


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "python"],
)  # fmt: skip
def test_too_little_memory_is_one_line_and_the_engine_goes_on(
    tiny: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalWeights(open_checkpoint(tiny, {}), LocalSetting(batch=7))
    prompt = Prompt("p", (1, 2, 3), (2,))
    with monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            raise failure

        patch.setattr(type(engine.model), "forward", fails)
        with pytest.raises(BundleError, match="memory of cpu does not suffice for batches of 7") as error:
            engine.score([prompt], [None], 5)
    assert "batch" in one_line(error)
    assert len(engine.score([prompt], [None], 5)) == 1


def test_another_failure_of_the_model_is_not_taken_for_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalWeights(open_checkpoint(tiny, {}), LocalSetting())

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(type(engine.model), "forward", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.score([Prompt("p", (1, 2, 3), (2,))], [None], 5)


def test_without_the_extra_the_remedy_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny, {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigurationError, match="needs transformers") as error:
        LocalWeights(checkpoint, LocalSetting())
    assert "weighbridge[hf]" in one_line(error)


def test_a_rounding_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no rounding 'int5'"):
        LocalSetting(weights="int5")


# -- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import json, sys
from pathlib import Path
import torch, transformers, tokenizers, safetensors.torch
from transformers import LlamaForCausalLM
from weighbridge.reference.checkpoint import open_checkpoint
from weighbridge.reference.engine import Prompt
from weighbridge.reference.local import LocalSetting, LocalWeights

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
engine = LocalWeights(open_checkpoint(Path(sys.argv[1]), {}), LocalSetting(**json.loads(sys.argv[2])))
loaded = peak()
prompts = [Prompt(f"p{i}", tuple(range(5, 85)), (79,)) for i in range(16)]
engine.score(prompts, [None] * 16, 128)
print(json.dumps({"before": before, "loaded": loaded - before, "scored": peak() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say how much was held")
@pytest.mark.parametrize("setting", [{}, {"weights": "int4-g64"}], ids=["float32", "int4"])
def test_peak_memory_is_within_a_fifth_of_the_weights_and_one_batch(
    checkpoint: Checkpoint, setting: dict[str, Any]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(checkpoint.folder), json.dumps(setting)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    config = json.loads((checkpoint.folder / "config.json").read_text())
    shapes = [tensor.shape for tensor in load_file(checkpoint.folder / "model.safetensors").values()]
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes)
    tokens, width, inner = 16 * 80, config["hidden_size"], config["intermediate_size"]
    # One block at a time: what comes in, normed, queries, attended, put out; keys and values; gate, up, product.
    activations = tokens * (5 * width + 2 * width // 3 + 3 * inner) * 4
    logits = 16 * config["vocab_size"] * (4 + 4)
    allowed = 1.2 * weights + activations + logits
    mib = {name: round(value / 2**20) for name, value in [*found.items(), ("weights", weights), ("batch", activations + logits), ("allowed", int(allowed))]}  # fmt: skip
    print(f"{setting}: {mib} MiB")  # noqa: T201
    assert found["scored"] <= allowed
    assert found["loaded"] <= 1.2 * weights
