"""The lab's model as a folder in the Hugging Face layout, made once from the same file as everything else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from weighbridge.lab.variants import OFFICIAL_TEMPLATE
from weighbridge.lab.weights import lab_folder, weight_file

# llama.cpp's name of each tensor of a block, and transformers'.
_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_CONTROL_TOKEN = 3  # GGUF's tokenizer.ggml.token_type


def lab_checkpoint(say: Callable[[str], None]) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, making it the first time (270 MB).

    Its weights are the lab's original ones as bfloat16, which holds them exactly.

    Raises
    ------
    LabError
        If the ``lab`` extra is missing or the model cannot be fetched.
    """
    folder = lab_folder() / "smollm2-135m-instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(folder) + ".lock"):
        if not (folder / "config.json").exists():
            source = weight_file("f32", say)
            say("making the Hugging Face folder of the lab's model")
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _write(source, part)
            shutil.rmtree(folder, ignore_errors=True)
            part.replace(folder)
    return folder


def _write(source: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    field = {key: value.contents() for key, value in reader.fields.items()}
    heads = {"attn_q": field["llama.attention.head_count"], "attn_k": field["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        values = np.array(tensor.data, np.float32)
        if not tensor.name.startswith("blk."):
            name = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[tensor.name]
        else:
            _, block, kind, _ = tensor.name.split(".")
            name = f"layers.{block}.{_NAMES[kind]}.weight"
            if kind in heads:  # llama.cpp interleaves the halves that a rotary embedding pairs
                values = values.reshape(heads[kind], -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        tensors[f"model.{name}"] = values
    _write_safetensors(folder / "model.safetensors", tensors)
    _write_json(folder / "tokenizer.json", _tokenizer(field))
    text = {name: field["tokenizer.ggml.tokens"][field[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    tokens = {"bos_token": text["bos"], "eos_token": text["eos"], "pad_token": text["eos"]}
    _write_json(folder / "tokenizer_config.json", tokens | {"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(OFFICIAL_TEMPLATE)
    _write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": field["llama.embedding_length"], "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"], "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"], "rope_theta": field["llama.rope.freq_base"],
        "max_position_embeddings": field["llama.context_length"], "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"], "eos_token_id": field["tokenizer.ggml.eos_token_id"],
    })  # fmt: skip


def _tokenizer(field: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE tokenizer in the layout of tokenizer.json; digits stand alone, as in SmolLM2's."""
    tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if kinds[i] == _CONTROL_TOKEN],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [m.split(" ", 1) for m in field["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


def _write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write float32 arrays that bfloat16 holds exactly as bfloat16: a JSON header, then the bytes."""
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [end, end + 2 * values.size]}
        end += 2 * values.size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write((np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes())


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
