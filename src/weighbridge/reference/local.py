"""The engine that runs weights in this process, through PyTorch and transformers (extra ``hf``)."""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from weighbridge.errors import BundleError, ConfigurationError
from weighbridge.records import Record
from weighbridge.reference.checkpoint import Checkpoint
from weighbridge.reference.engine import Prompt, Rows, Wanted
from weighbridge.reference.roundings import E4M3_LARGEST, WEIGHT_ROUNDINGS

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
Activations = Literal["int8", "fp8-e4m3"]
KVCache = Literal["fp8-e4m3", "int8", "int4"]
INT4_KV_GROUP = 32
_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")  # that older checkpoints carry and nobody needs


class LocalSetting(Record):
    """How local weights are run, and what is rounded on the way.

    ``weights`` names a rounding of the matrices inside the model's blocks; ``activations`` rounds what goes into
    them, token by token; ``kv_cache`` rounds keys and values as they are stored. ``module_outputs`` and ``logits``
    emulate an engine that keeps these in 16 bits while the arithmetic inside is wider; ``logits = "float32"`` runs
    the output head in 32 bits behind blocks of a narrower type, as some engines do.
    """

    dtype: Dtype = "float32"
    weights: str | None = None
    activations: Activations | None = None
    kv_cache: KVCache | None = None
    module_outputs: Literal["bfloat16"] | None = None
    logits: Literal["bfloat16", "float32"] | None = None
    remove_blocks: list[int] = Field(default_factory=list, description="blocks left out, counted from 0: another model")
    batch: int = Field(default=16, ge=1, le=4096, description="prompts of one forward pass")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; all by default")
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: str = Field(default="cpu", description="cpu, cuda, cuda:0, or auto to spread over all GPUs")

    @model_validator(mode="after")
    def _known_rounding(self) -> "LocalSetting":
        if self.weights is not None and self.weights not in WEIGHT_ROUNDINGS:
            raise ValueError(f"weights: there is no rounding {self.weights!r}; known are {', '.join(WEIGHT_ROUNDINGS)}")
        return self


def require_extra() -> None:
    """Raise ConfigurationError unless the packages of the ``hf`` extra can be imported."""
    # Threads that wait actively for each other take many times as long where anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"the local-weights engine needs {error.name}",
            "Install Weighbridge with its hf extra: pip install 'weighbridge[hf]'",
        ) from None


class LocalWeights:
    """A causal language model in this process.

    Parameters
    ----------
    checkpoint : Checkpoint
        Safetensors only; no code of the model's own is run.
    setting : LocalSetting

    Raises
    ------
    ConfigurationError
        If the extra is missing or transformers does not know the model.
    BundleError
        If the memory does not suffice.
    """

    def __init__(self, checkpoint: Checkpoint, setting: LocalSetting) -> None:
        require_extra()
        import torch
        from tokenizers import Tokenizer

        self._checkpoint, self._setting = checkpoint, setting
        torch.set_num_threads(setting.threads or os.cpu_count() or 1)
        _make_deterministic()
        with _in_memory(setting):
            self.model = _load(checkpoint, setting)
            _depart(self.model, setting)
        self.device = self.model.get_input_embeddings().weight.device
        self.context_tokens = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        self.tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bits_held = bits_held(self.model, setting)

    def facts(self) -> dict[str, Any]:
        """Versions, device and the settings that make a run repeatable."""
        import torch

        return {
            "engine": f"transformers {version('transformers')}, torch {torch.__version__}",
            "hardware": _hardware(self.device),
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "deterministic_algorithms": True,
            "tf32": False,
            **self._setting.model_dump(mode="json", exclude={"threads"}, exclude_none=True, exclude_defaults=True),
            "dtype": self._setting.dtype,
            "batch": self._setting.batch,
            "attention": self._setting.attention,
            "bits_held": self.bits_held,
            "context_tokens": self.context_tokens,
        }

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids by the model's tokenizer.json."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def new_cache(self) -> Any:
        """An empty KV cache that rounds what the setting says."""
        return _cache(self.model.config, self._setting.kv_cache)

    def score(self, prompts: Sequence[Prompt], wanted: Sequence[Wanted], top_k: int) -> list[Rows]:
        """Logprobs at the prompts' positions; prompts of like length go through the model together."""
        out: dict[int, Rows] = {}
        for chosen in in_batches([len(p.token_ids) for p in prompts], self._setting.batch):
            with _in_memory(self._setting):
                rows = self._forward([prompts[i] for i in chosen], [wanted[i] for i in chosen], top_k)
            out.update(zip(chosen, rows, strict=True))
        return [out[i] for i in range(len(prompts))]

    def _forward(self, prompts: list[Prompt], wanted: list[Wanted], top_k: int) -> list[Rows]:
        import torch

        width = max(len(p.token_ids) for p in prompts)
        # Padding stands on the right, where a causal model cannot see it; so no mask is needed.
        ids = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt.token_ids)] = torch.tensor(prompt.token_ids)
        counts = [len(p.positions) for p in prompts]
        row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
        position = torch.tensor([i for p in prompts for i in p.positions])
        cache = self.new_cache() if self._setting.kv_cache is not None else None
        # The head is the larger part of a small model: it sees the wanted positions and no others.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: (given[0][row.to(given[0].device), position.to(given[0].device)][None], *given[1:])
        )
        try:
            with torch.inference_mode():
                logits = self.model(ids.to(self.device), past_key_values=cache, use_cache=cache is not None).logits[0]
        finally:
            hook.remove()
        with torch.inference_mode():
            rows = []
            for own, asked in zip(logits.split(counts), wanted, strict=True):
                logprobs = torch.log_softmax(own.float(), dim=-1)
                if asked is None:
                    values, tokens = torch.topk(logprobs, min(top_k, logprobs.shape[-1]), dim=-1)
                else:
                    tokens = torch.from_numpy(asked.astype(np.int64)).to(logprobs.device)
                    values = torch.gather(logprobs, 1, tokens)
                rows.append(Rows(tokens.cpu().numpy().astype(np.int32), values.cpu().numpy()))
        return rows


def in_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of like length: at most so many, and none more than twice as long as the shortest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and len(batches[-1]) < size and lengths[i] <= 2 * lengths[batches[-1][0]]:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def bits_held(model: Any, setting: LocalSetting) -> float:
    """Bits that a weight of the model's matrices holds on average, scales and the unrounded matrices included."""
    whole = {"float32": 16.0, "bfloat16": 16.0, "float16": 16.0}[setting.dtype]  # the released precision, stored wider
    rounding = WEIGHT_ROUNDINGS[setting.weights] if setting.weights is not None else None
    inside = {id(module.weight) for module in _matrices(model)} if rounding else set()
    bits = weights = 0.0
    for parameter in model.parameters():
        if parameter.ndim < 2:
            continue
        each = rounding.bits_per_weight(parameter.shape[-1]) if rounding and id(parameter) in inside else whole
        bits += each * parameter.numel()
        weights += parameter.numel()
    return round(bits / weights, 2)


def _make_deterministic() -> None:
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False


def _load(checkpoint: Checkpoint, setting: LocalSetting) -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    placed = {"device_map": setting.device} if setting.device != "cpu" else {}
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        model, info = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=_tensors(checkpoint), dtype=getattr(torch, setting.dtype),
            attn_implementation=setting.attention, output_loading_info=True, **placed,
        )  # fmt: skip
        for kind in (
            "missing_keys",
            "unexpected_keys",
        ):  # transformers would go on with random numbers, or without them
            names = sorted(name for name in info[kind] if not name.endswith(_BUFFERS))
            if names:
                raise ValueError(f"{len(names)} {kind.replace('_', ' ')}, {names[0]} first")
    except Exception as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"transformers cannot load {checkpoint.folder} ({reason})",
            "Use a transformers release that knows this model, or serve it and record the server",
        ) from None
    return model.eval()


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every tensor of the model's files, not read yet.

    Files are read, not mapped: pages of a mapped file stay in memory beside the weights that were made from them.
    """
    from safetensors import safe_open

    names = {name for name in checkpoint.files if name.endswith(".safetensors")}
    index = checkpoint.read_json("model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):  # a folder may hold the same weights a second time, under other names
        names &= set(index.values())
    out: dict[str, Any] = {}
    for name in sorted(names):
        file: Any = safe_open(checkpoint.folder / name, framework="pt", device="cpu", backend="pread")
        out |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return out


def _blocks(model: Any) -> Any:
    """The list of a decoder's blocks."""
    blocks = getattr(model.get_decoder(), "layers", None)
    if blocks is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no list of blocks that Weighbridge knows", "Record its variants from a server"
        )
    return blocks


def _matrices(model: Any) -> list[Any]:
    """The modules whose weights and inputs quantizers round: the linear ones inside the blocks.

    Raises
    ------
    ConfigurationError
        If blocks hold matrices of another kind, such as stacked experts: their layout differs from model to model.
    """
    import torch

    linear = [m for m in _blocks(model).modules() if isinstance(m, torch.nn.Linear)]
    known = {id(module.weight) for module in linear}
    for name, parameter in _blocks(model).named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known:
            raise ConfigurationError(
                f"{type(model).__name__} keeps {name} outside of linear modules, so its departures cannot be emulated",
                "Serve the departure with an engine that knows this model and record the server",
            )
    return linear


def _depart(model: Any, setting: LocalSetting) -> None:
    """Make the model depart from the original as the setting says, in place."""
    import torch

    if setting.remove_blocks:
        count = len(_blocks(model))
        if not set(setting.remove_blocks) < set(range(count)):
            raise ConfigurationError(
                f"remove_blocks names {setting.remove_blocks}, and the model has the blocks 0 to {count - 1}",
                "Name some of them, and not all",
            )
        kept = [b for i, b in enumerate(_blocks(model)) if i not in setting.remove_blocks]
        for i, block in enumerate(kept):
            block.self_attn.layer_idx = i
        model.get_decoder().layers = torch.nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
    if setting.weights is not None:
        rounding = WEIGHT_ROUNDINGS[setting.weights]
        with torch.no_grad():
            for module in _matrices(model):
                module.weight.copy_(torch.from_numpy(rounding.apply(module.weight.float().cpu().numpy())))
    if setting.activations is not None:
        rounded = _int8_tokens if setting.activations == "int8" else _e4m3_tokens
        for module in _matrices(model):
            module.register_forward_pre_hook(lambda _, given: (rounded(given[0]), *given[1:]))
    if setting.module_outputs is not None:
        for module in model.modules():
            leaf = not any(True for _ in module.children()) and any(True for _ in module.parameters())
            if leaf and module is not model.get_output_embeddings():
                module.register_forward_hook(lambda _, __, out: _bfloat16(out))
    if setting.logits == "bfloat16":
        model.get_output_embeddings().register_forward_hook(lambda _, __, out: _bfloat16(out))
    elif setting.logits == "float32":
        narrow = model.get_output_embeddings()
        wide = torch.nn.Linear(narrow.in_features, narrow.out_features, bias=narrow.bias is not None, device="meta")
        wide.to_empty(device=narrow.weight.device)
        wide.load_state_dict(narrow.state_dict())
        wide.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
        model.set_output_embeddings(wide)


def _bfloat16(values: "torch.Tensor") -> "torch.Tensor":
    import torch

    return values.to(torch.bfloat16).to(values.dtype)


def _int8_tokens(values: "torch.Tensor", levels: int = 127) -> "torch.Tensor":
    """Symmetric integers with one scale for each token (the last axis)."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / levels
    return (values / scale).round() * scale


def _e4m3_tokens(values: "torch.Tensor") -> "torch.Tensor":
    """8-bit floats with one scale for each token (the last axis)."""
    import torch

    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / E4M3_LARGEST
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def _rounded_state(values: "torch.Tensor", kind: KVCache) -> "torch.Tensor":
    """Keys or values as a cache of this kind holds them; shape (batch, heads, tokens, head width)."""
    import torch

    if kind == "fp8-e4m3":  # without a scale, as servers cast by default
        return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(values.dtype)
    if kind == "int8":
        return _int8_tokens(values)
    grouped = values.unflatten(-1, (-1, INT4_KV_GROUP))
    return _int8_tokens(grouped, levels=7).flatten(-2)


def _cache(config: Any, kind: KVCache | None) -> Any:
    from transformers import DynamicCache

    class RoundedCache(DynamicCache):  # type: ignore[misc,unused-ignore]
        def update(self, key_states: Any, value_states: Any, *rest: Any, **more: Any) -> Any:
            if kind is not None:
                key_states, value_states = _rounded_state(key_states, kind), _rounded_state(value_states, kind)
            return super().update(key_states, value_states, *rest, **more)

    return RoundedCache(config=config)


@contextmanager
def _in_memory(setting: LocalSetting) -> Iterator[None]:
    """Say in one line that the memory does not suffice."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error).lower():
            raise
    else:
        return
    raise BundleError(
        f"the memory of {setting.device} does not suffice for batches of {setting.batch}",
        "Set a smaller batch or another device in the stack's [stack.local]; what was recorded is kept",
    )


def _hardware(device: Any) -> str:
    import torch

    if device.type == "cuda":
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return f"{', '.join(names)} × {torch.cuda.device_count()}, CUDA {torch.version.cuda}, driver {_driver()}"
    return f"CPU {_processor()}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    """The processor's model, as the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "of unknown model"


def _driver() -> str:
    """The NVIDIA driver's version, as the kernel module names it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text("utf-8").split()
        return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    except OSError:
        return "unknown"
