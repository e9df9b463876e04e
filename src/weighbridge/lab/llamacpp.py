"""llama.cpp's own server in a process of its own, from the xllamacpp wheel.

Run as a module it serves until its standard input closes, so that it never outlives whoever started it.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from weighbridge.errors import LabError
from weighbridge.lab.variants import Settings

START_TIMEOUT_S = 120.0
CONTEXT_TOKENS_PER_SLOT = 2048


class LlamaServer:
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
        self._arguments = json.dumps({"model": str(model), "template": template, **asdict(settings)})
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.base_url = ""
        self.port = 0

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "weighbridge.lab.llamacpp", self._arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.startswith("serving "):
                    self.base_url = line.removeprefix("serving ").strip()
                    self.port = int(self.base_url.rsplit(":", 1)[1])
                    return self
        finally:
            watchdog.cancel()
        self.__exit__(None, None, None)
        raise LabError("llama.cpp's server did not start", f"Its messages are in {self._log}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


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
