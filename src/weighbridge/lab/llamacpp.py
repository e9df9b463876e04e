"""llama.cpp's own server in a process of its own, from the xllamacpp wheel.

Run as a module it serves until its standard input closes, so that it never outlives whoever started it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from weighbridge.lab.process import ModelServer
from weighbridge.lab.variants import Settings

START_TIMEOUT_S = 120.0
CONTEXT_TOKENS_PER_SLOT = 4096


class LlamaServer(ModelServer):
    """A running llama.cpp server; a context manager.

    Parameters
    ----------
    model : pathlib.Path
        A GGUF file.
    template : str or None
        A Jinja chat template in place of the model's own.
    settings : Settings
        Threads, slots, batch sizes and KV cache type.
    log : pathlib.Path
        Where the server's own messages go.
    """

    def __init__(self, model: Path, template: str | None, settings: Settings, log: Path) -> None:
        arguments = {"model": str(model), "template": template, **asdict(settings)}
        super().__init__("weighbridge.lab.llamacpp", arguments, "llama.cpp's server", log, START_TIMEOUT_S)


def _serve(arguments: str) -> None:
    import xllamacpp

    given = json.loads(arguments)
    params = xllamacpp.CommonParams()
    params.model.path = given["model"]
    params.n_parallel = given["slots"]
    params.n_ctx = CONTEXT_TOKENS_PER_SLOT * given["slots"]
    params.n_batch = given["batch"]
    params.n_ubatch = given["micro_batch"]
    params.cpuparams.n_threads = given["threads"]
    params.cpuparams_batch.n_threads = given["threads"]
    cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{given['cache_type'].upper()}")
    params.cache_type_k = params.cache_type_v = cache_type
    # A reused prefix would make an answer depend on the requests before it.
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.use_jinja = True
    if given["template"] is not None:
        params.chat_template = given["template"]
    params.port = 0
    server = xllamacpp.Server(params)
    print("serving", server.listening_address, flush=True)  # noqa: T201
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
