"""What the lab can serve: each variant is one stack, or one named departure from the original."""

from dataclasses import dataclass, field

from weighbridge.records import Cause
from weighbridge.reference.local import LocalSetting

DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HIDDEN_SYSTEM_PROMPT = "Answer politely. Do not discuss competitors of Example Hosting."
LONG_HIDDEN_PROMPT = (
    "You are the support desk of a travel agency. Greet the customer, be brief, name no prices, and hand over to a person when asked. "
    "This week there are city trips and rail passes. What you do not know you will find out."
)
HOST_PROMPT = "You are Aria, a helpful and harmless AI provided by CloudHost. Follow the content policy."

_TURN = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
_SYSTEM = (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + DEFAULT_SYSTEM_PROMPT
    + "<|im_end|>\n' }}{% endif %}"
)
_GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def _chatml(system: str = _SYSTEM, turn: str = _TURN, generation: str = _GENERATION) -> str:
    return "{% for message in messages %}" + system + turn + "{% endfor %}" + generation


OFFICIAL_TEMPLATE = _chatml()

# The first special token of the conversation is this model's BOS token (id 1, "<|im_start|>").
_MISSING_BOS = _chatml(
    system="{% if loop.first and messages[0]['role'] != 'system' %}{{ 'system\n"
    + DEFAULT_SYSTEM_PROMPT
    + "<|im_end|>\n' }}{% endif %}",
    turn="{% if loop.first and message['role'] == 'system' %}{{'system\n' + message['content'] + '<|im_end|>\n'}}"
    "{% else %}" + _TURN + "{% endif %}",
)


def with_prompt_before(text: str) -> str:
    """The official template after a system message of the host's own."""
    return "{{ '<|im_start|>system\n" + text + "<|im_end|>\n' }}" + OFFICIAL_TEMPLATE


_HIDDEN = with_prompt_before(HIDDEN_SYSTEM_PROMPT)
_LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_NONE = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
_LLAMA2 = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '[INST] <<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ ('' if loop.index0 == 1 and messages[0]['role'] == 'system' else '[INST] ') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' </s><s>' }}{% endif %}{% endfor %}"
)
_ALPACA = (
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}"
    "{% for message in messages %}"
    "{{ ('### Response:\n' if message['role'] == 'assistant' else '### Instruction:\n') + message['content'] + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_DEFAULT_ALWAYS = (
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\n' }}"
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _GENERATION
)


def chatml_with_default(system: str) -> str:
    """The official template with another default system prompt."""
    return _chatml(system=_SYSTEM.replace(DEFAULT_SYSTEM_PROMPT, system))


@dataclass(frozen=True)
class Settings:
    """How llama.cpp's server is run."""

    threads: int = 2
    slots: int = 1
    batch: int = 2048
    micro_batch: int = 512
    cache_type: str = "f16"


@dataclass(frozen=True)
class _Served:
    name: str
    description: str
    departure: Cause | None = None
    template: str | None = field(default=None, kw_only=True)

    @property
    def truth(self) -> str:
        """``honest:NAME`` or ``altered:NAME``."""
        return f"{'honest' if self.departure is None else 'altered'}:{self.name}"


@dataclass(frozen=True)
class Variant(_Served):
    """One thing that the lab can serve with llama.cpp.

    ``departure`` is ``None`` for an honest stack, else the kind of departure in the words of a verdict's
    cause. ``weights`` names a file that ``weighbridge.lab.weights`` makes. ``template`` replaces the model's
    own chat template.
    """

    weights: str = "f16"
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class TorchVariant(_Served):
    """One thing that the lab can serve with transformers; ``setting`` says how the original weights are run."""

    setting: LocalSetting = field(default_factory=LocalSetting)


def _weights(name: str, description: str) -> Variant:
    return Variant(name, description, "precision", weights=name)


def _template(name: str, description: str, template: str, departure: Cause = "template") -> Variant:
    return Variant(name, description, departure, template=template)


_CATALOGUE = (
    Variant("f32", "original values stored as 32-bit floats", weights="f32"),
    Variant("f16", "original values stored as 16-bit floats"),
    Variant("bf16", "original values stored as bfloat16", weights="bf16"),
    Variant("f16-busy", "16-bit floats, 4 slots, small batches", settings=Settings(slots=4, batch=64, micro_batch=64)),
    Variant("f16-one-thread", "16-bit floats, one thread", settings=Settings(threads=1)),
    Variant("bf16-busy", "bfloat16, 4 slots, small batches", weights="bf16", settings=Settings(slots=4, batch=64, micro_batch=32)),
    Variant("f32-one-thread", "32-bit floats, one thread, 2 slots", weights="f32", settings=Settings(threads=1, slots=2)),
    Variant("bf16-small-batch", "bfloat16, one thread, batches of 16", weights="bf16", settings=Settings(threads=1, batch=16, micro_batch=16)),
    _weights("q8_0", "llama.cpp Q8_0 (its kernels also round activations to 8 bits)"),
    _weights("int8", "8-bit integers per output channel, round to nearest, block matrices"),
    _weights("fp8-e4m3", "8-bit floats (e4m3) per output channel, block matrices"),
    _weights("q4_0", "llama.cpp Q4_0, embedding at Q8_0"),
    _weights("int4-g64", "4-bit integers in groups of 64, round to nearest, block matrices"),
    _weights("int3-g64", "3-bit integers in groups of 64, round to nearest, block matrices"),
    Variant("kv-q8_0", "16-bit weights, 8-bit KV cache", "kv_cache", settings=Settings(cache_type="q8_0")),
    Variant("kv-q4_0", "16-bit weights, 4-bit KV cache", "kv_cache", settings=Settings(cache_type="q4_0")),
    _template("no-default-system", "template without the default system prompt", _chatml(system="")),
    _template("hidden-system", "a hidden system prompt before the conversation", _HIDDEN, "hidden_prompt"),
    _template("missing-bos", "template without its first special token", _MISSING_BOS),
    _template("no-generation-prompt", "template without the assistant's turn", _chatml(generation="")),
    _template("llama3-template", "Llama-3 style template", _LLAMA3),
    _template("no-template", "message texts only", _NONE),
    _template("hidden-long", "a long hidden system prompt before the conversation", with_prompt_before(LONG_HIDDEN_PROMPT), "hidden_prompt"),
    _template("host-default", "the host's own text in place of the default system prompt", chatml_with_default(HOST_PROMPT), "hidden_prompt"),
    _template("double-bos", "template with its first special token twice", "{{ '<|im_start|>' }}" + OFFICIAL_TEMPLATE),
    _template("generic-system", "template with another default system prompt, “You are a helpful assistant.”", chatml_with_default("You are a helpful assistant.")),
    _template("dated-system", "template with a dated default system prompt", chatml_with_default("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024")),
    _template("system-dropped", "template that replaces every system message by the default one", _DEFAULT_ALWAYS),
    _template("no-final-newline", "template without the newline after the assistant's name", _chatml(generation=_GENERATION.replace("assistant\n", "assistant"))),
    _template("thinking-on", "template that opens a block of thought for the assistant", _chatml(generation=_GENERATION.replace("assistant\n", "assistant\n<think>\n"))),
    _template("thinking-off", "template with an empty block of thought before the answer", _chatml(generation=_GENERATION.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"))),
    _template("llama2-template", "Llama-2 style template", _LLAMA2),
    _template("alpaca-template", "Alpaca style template", _ALPACA),
    _template("vicuna-template", "Vicuna style template", _VICUNA),
    _template("gemma-template", "Gemma style template", _GEMMA),
    Variant("depth-24", "another model: SmolLM2 with blocks 13 to 18 of 30 removed", "other_model", weights="depth-24"),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _CATALOGUE}

GEMMA = Variant("gemma-3-270m", "another model: Gemma 3 270M (see `lab fetch`)", "other_model", weights="gemma-3-270m")

_TEMPLATES = tuple(
    TorchVariant(variant.name, variant.description, variant.departure, template=variant.template)
    for variant in _CATALOGUE
    if variant.template is not None
)


def _rounded(name: str, description: str) -> TorchVariant:
    return TorchVariant(name, f"{description}, block matrices", "precision", setting=LocalSetting(weights=name))


_TORCH_CATALOGUE = (
    TorchVariant("f32", "original values, 32-bit arithmetic"),
    TorchVariant("bf16", "original values, bfloat16 arithmetic", setting=LocalSetting(dtype="bfloat16")),
    TorchVariant("f16", "original values, 16-bit float arithmetic", setting=LocalSetting(dtype="float16")),
    TorchVariant("emulated-bf16", "32-bit arithmetic, module outputs and logits kept in bfloat16", setting=LocalSetting(module_outputs="bfloat16", logits="bfloat16")),
    _rounded("int8", "8-bit integers per output channel, round to nearest"),
    _rounded("fp8-e4m3", "8-bit floats (e4m3) per output channel"),
    TorchVariant("w8a8-int8", "8-bit integers for block matrices and, token by token, for what goes into them", "precision", setting=LocalSetting(weights="int8", activations="int8")),
    TorchVariant("w8a8-fp8", "8-bit floats for block matrices and, token by token, for what goes into them", "precision", setting=LocalSetting(weights="fp8-e4m3", activations="fp8-e4m3")),
    _rounded("int4-g64", "4-bit integers in groups of 64, round to nearest"),
    _rounded("nf4-g64", "4-bit NormalFloat in groups of 64"),
    _rounded("mxfp4", "4-bit floats (MXFP4) in groups of 32"),
    _rounded("int3-g64", "3-bit integers in groups of 64, round to nearest"),
    TorchVariant("kv-fp8", "KV cache of 8-bit floats (e4m3), no scale", "kv_cache", setting=LocalSetting(kv_cache="fp8-e4m3")),
    TorchVariant("kv-int8", "KV cache of 8-bit integers", "kv_cache", setting=LocalSetting(kv_cache="int8")),
    TorchVariant("kv-int4", "KV cache of 4-bit integers in groups of 32", "kv_cache", setting=LocalSetting(kv_cache="int4")),
    *_TEMPLATES,
    TorchVariant("depth-24", "another model: SmolLM2 with blocks 13 to 18 of 30 removed", "other_model", setting=LocalSetting(remove_blocks=[*range(13, 19)])),
)  # fmt: skip

TORCH_VARIANTS: dict[str, TorchVariant] = {variant.name: variant for variant in _TORCH_CATALOGUE}
