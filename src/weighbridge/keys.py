"""Keys: read from the environment by name, bound to one origin, and kept out of everything that is written."""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import filelock

from weighbridge.canonical import write_atomically
from weighbridge.errors import ConfigurationError, KeyRefusedError
from weighbridge.paths import state_folder

_KEY_NAME = re.compile(r"^[A-Z][A-Z0-9_]*_(API_KEY|AUTH_TOKEN)$")
REDACTED = "[redacted key]"


@dataclass(frozen=True)
class Key:
    """A key in memory. It has no representation, and nothing that holds one can be written as JSON.

    ``bearer`` says that its name calls it a token, which is sent as one whatever an API's own header for keys is.
    """

    value: str = field(repr=False)
    bearer: bool = False

    def redact(self, text: str) -> str:
        """Replace the key, and its usual encodings, wherever they stand in a text."""
        return self._pattern.sub(REDACTED, text)

    def stands_in(self, text: str) -> bool:
        """Whether the key or one of its usual encodings stands in a text."""
        return self._pattern.search(text) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        raw = self.value.encode()
        # Each character as it is, percent-encoded, or as JSON may escape it.
        written = "".join(rf"(?:\\?{re.escape(c)}|%(?i:{ord(c):02x})|\\u00(?i:{ord(c):02x}))" for c in self.value)
        forms = [written, rf"(?i:{raw.hex()})"]
        # Base64 of a longer text that holds the key: three alignments, less the characters that its neighbours share.
        for before, skip in ((0, 0), (1, 2), (2, 3)):
            whole = (before + len(raw)) * 8 // 6
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                forms.append(re.escape(encode(bytes(before) + raw).decode()[skip:whole]))
        return re.compile("|".join(forms))


def trust_file() -> Path:
    """The user's own file that binds key names to origins."""
    return state_folder() / "trust.json"


def key_for(name: str | None, origin: str) -> Key | None:
    """Read the key that `name` names, for use at `origin` only.

    On first use the name is bound to the origin in the user's trust file, so that a file from a stranger
    cannot pair the user's key with its own URL.

    Raises
    ------
    KeyRefusedError
        If the name does not look like a key's, the variable is empty, or the name is bound to another origin.
    """
    if name is None:
        return None
    if not _KEY_NAME.fullmatch(name):
        raise KeyRefusedError(
            f"api_key_env {name!r} does not look like a key's name", "Use a variable named *_API_KEY or *_AUTH_TOKEN"
        )
    value = os.environ.get(name, "").strip()
    if not value:
        raise KeyRefusedError(f"the environment variable {name} is not set", f"Set it: export {name}=…")
    if not value.isascii() or not value.isprintable() or len(value) < 8:
        raise KeyRefusedError(
            f"the value of {name} does not look like a key", "Use printable ASCII of at least 8 characters"
        )
    _bind(name, origin)
    return Key(value, bearer=name.endswith("_AUTH_TOKEN"))


def _bind(name: str, origin: str) -> None:
    path = trust_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(path) + ".lock"):
        try:
            known: dict[str, str] = _origins(path) if path.exists() else {}
        except (ValueError, KeyError, TypeError, OSError):
            raise ConfigurationError(f"{path} cannot be read", "Repair or remove it") from None
        bound = known.get(name)
        if bound == origin:
            return
        # A local server takes a new port each time it starts: loopback is one place.
        if bound is not None and not (_is_loopback(bound) and _is_loopback(origin)):
            raise KeyRefusedError(
                f"{name} is bound to {bound} and would be sent to {origin}",
                f"If that is meant, change origin_of_key in {path}",
            )
        document = {"schema": "weighbridge/trust/1", "origin_of_key": {**known, name: origin}}
        write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())
        path.chmod(0o600)


def _origins(path: Path) -> dict[str, str]:
    known = json.loads(path.read_text("utf-8"))["origin_of_key"]
    if not isinstance(known, dict) or not all(isinstance(v, str) for v in known.values()):
        raise ValueError
    return known


def _is_loopback(origin: str) -> bool:
    return urlsplit(origin).hostname in ("127.0.0.1", "localhost", "::1")


def owner_mark(data: bytes) -> str:
    """A mark that only this user's Weighbridge can make, to recognise the runs that this user started."""
    path = state_folder() / "run_secret"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(path) + ".lock"):
        if not path.exists():
            write_atomically(path, secrets.token_bytes(32))
            path.chmod(0o600)
        secret = path.read_bytes()
    return hmac.new(secret, data, hashlib.sha256).hexdigest()
