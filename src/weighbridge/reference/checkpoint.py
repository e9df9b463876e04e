"""A model's folder in the Hugging Face layout: which files it has, by hash, and that nothing in it is executed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from weighbridge.canonical import file_sha256
from weighbridge.errors import ConfigurationError

MAX_JSON_BYTES = 256 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_TOKENS = 2**21
_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file that the model's behaviour depends on, by name."""
        names = [n for n in _NAMES if (self.folder / n).is_file()]
        names += sorted(p.name for p in self.folder.glob("*.safetensors"))
        return {name: file_sha256(self.folder / name) for name in names}

    @cached_property
    def template(self) -> str:
        """The chat template; empty where there is none."""
        own = self.folder / "chat_template.jinja"
        if own.is_file():
            if own.stat().st_size > MAX_TEMPLATE_BYTES:
                raise ConfigurationError(f"{own} is too large to be read", "Fetch the model again")
            try:
                return own.read_text("utf-8")
            except UnicodeDecodeError:
                raise ConfigurationError(f"{own} is not UTF-8", "Fetch the model again") from None
        template = self.read_json("tokenizer_config.json").get("chat_template", "")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default", "")
        return template if isinstance(template, str) else ""

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens that a template may name, such as bos_token."""
        found: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            for key, value in self.read_json(name).items():
                text = value.get("content") if isinstance(value, dict) else value
                if key in _SPECIAL and isinstance(text, str):
                    found[key] = text
        return found

    def read_json(self, name: str) -> dict[str, Any]:
        """One JSON file of the folder; empty where there is none.

        Raises
        ------
        ConfigurationError
            If it is not JSON or too large.
        """
        path = self.folder / name
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigurationError(f"{path} is too large to be read", "Fetch the model again")
        try:
            value = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            raise ConfigurationError(f"{path} is not JSON", "Fetch the model again") from None
        return value if isinstance(value, dict) else {}


def open_checkpoint(folder: Path, expected: Mapping[str, str]) -> Checkpoint:
    """Open a folder and check it.

    Parameters
    ----------
    folder : pathlib.Path
    expected : mapping
        SHA-256 by file name; files that are not named are recorded, not checked.

    Raises
    ------
    ConfigurationError
        If weights are pickled or missing, code would have to be run, or a hash differs.
    """
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{folder} holds no config.json", "Name a model's folder in the Hugging Face layout")
    checkpoint = Checkpoint(folder)
    if not any(folder.glob("*.safetensors")):
        pickled = [p.name for pattern in _PICKLED for p in folder.glob(pattern)]
        what = f"{folder} has its weights pickled ({pickled[0]})" if pickled else f"{folder} holds no weights"
        raise ConfigurationError(what, "Use a revision with safetensors: a pickle runs code when it is loaded")
    for name in ("config.json", "tokenizer_config.json"):
        if checkpoint.read_json(name).get("auto_map"):
            raise ConfigurationError(
                f"{folder / name} asks for code of the model's own (auto_map)",
                "Weighbridge runs no remote code; serve the model with an engine that knows it and record that server",
            )
    for name, digest in expected.items():
        if checkpoint.files.get(name) != digest:
            found = "is missing" if name not in checkpoint.files else "does not have the hash that the spec names"
            raise ConfigurationError(
                f"{folder / name} {found}", "Fetch the pinned revision again, or correct [weights] files"
            )
    return checkpoint


def fetch_checkpoint(repo: str, revision: str | None, expected: Mapping[str, str]) -> Checkpoint:
    """Fetch a pinned revision from the hub (extra ``hf``) and open it.

    Raises
    ------
    ConfigurationError
        If the revision is not a commit, the extra is missing, or it cannot be fetched.
    """
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ConfigurationError(
            f"[weights] revision: {revision!r} does not pin {repo}", "Name the commit by its 40 hexadecimal digits"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigurationError(
            "fetching from the hub needs the extra hf",
            "Install it: pip install 'weighbridge[hf]', or name a local folder",
        ) from None
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=["*.safetensors", *_NAMES])
    except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds; all mean the same here
        raise ConfigurationError(
            f"{repo}@{revision[:12]} could not be fetched ({type(error).__name__})",
            "Check the name, the network and the licence's acceptance, or name a local folder",
        ) from None
    return open_checkpoint(Path(folder), expected)


def read_vocabulary(checkpoint: Checkpoint) -> list[bytes]:
    """The bytes of every token of the model's tokenizer, by id; empty for special tokens, which have no text.

    Raises
    ------
    ConfigurationError
        If tokenizer.json is missing or of an unknown kind.
    """
    document = checkpoint.read_json("tokenizer.json")
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [piece, score], in the order of ids
        vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary) if isinstance(piece, list) and piece}
    tokens = document.get("added_tokens")
    added = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ConfigurationError(
            f"{checkpoint.folder} holds no tokenizer.json with a vocabulary", "Add the model's tokenizer.json"
        )
    ids = [*vocabulary.values(), *(token.get("id") for token in added)]
    if not all(type(i) is int and 0 <= i < MAX_TOKENS for i in ids) or not all(isinstance(t, str) for t in vocabulary):
        raise ConfigurationError(
            f"{checkpoint.folder}/tokenizer.json names a token id that is none", "Fetch the model again"
        )
    size = max(ids) + 1
    byte_level = "ByteLevel" in json.dumps([document.get("decoder"), document.get("pre_tokenizer")])
    table = _byte_of_letter()
    out = [b""] * size
    for text, token_id in vocabulary.items():
        if byte_level:
            out[token_id] = bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            out[token_id] = bytes([int(text[3:5], 16)])
        else:
            out[token_id] = text.replace("▁", " ").encode()
    for token in added:
        out[int(token["id"])] = b"" if token.get("special") else str(token.get("content", "")).encode()
    return out


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer's inner alphabet stands for (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
