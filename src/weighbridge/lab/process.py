"""A model server in a process of its own, which never outlives whoever started it."""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weighbridge.errors import LabError


class ModelServer:
    """A running model server; a context manager.

    The module prints ``serving URL`` once it can be asked, and ends when its standard input closes.

    Parameters
    ----------
    module : str
        What is run, with one argument.
    arguments : mapping
        That argument, as JSON.
    name : str
        What messages call the server.
    log : pathlib.Path
        Where the server's own messages go.
    start_timeout_s : float
        After so many seconds it is ended.
    """

    def __init__(self, module: str, arguments: Mapping[str, Any], name: str, log: Path, start_timeout_s: float) -> None:
        self._command = [sys.executable, "-m", module, json.dumps(arguments)]
        self._name = name
        self._log = log
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self.base_url = ""
        self.port = 0

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._start_timeout_s, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.startswith("serving "):
                    self.base_url = line.removeprefix("serving ").strip().rstrip("/")
                    self.port = int(self.base_url.rsplit(":", 1)[1])
                    return self
        finally:
            watchdog.cancel()
        self.__exit__(None, None, None)
        raise LabError(f"{self._name} did not start", f"Its messages are in {self._log}")

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
