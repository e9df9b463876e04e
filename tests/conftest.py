"""What the tests share: the reference, a command line in this process, and a folder of its own for each test."""

import contextlib
import io
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import weighbridge.audit
from weighbridge.cli import main
from weighbridge.judge.library import Library

REFERENCE = "/tmp/ft/pb"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Everything that was printed, with the terminal's line breaks taken out."""
        return " ".join(f"{self.out}\n{self.err}".split())


Weighbridge = Callable[..., Ended]


@pytest.fixture
def reference() -> str:
    return REFERENCE


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trust file and a run secret for each test, and none of the machine's own keys."""
    home = tmp_path / "home"
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def libraries() -> dict[Any, Library]:
    return {}


@pytest.fixture(autouse=True)
def library_built_once(libraries: dict[Any, Library], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is a pure function of bundle, policy and k; tests that ask for the same one share it."""
    build = weighbridge.audit.build_library

    def built_once(bundle: Any, policy: Any, top_k: int) -> Library:
        key = (bundle.identity.digest, policy.model_dump_json(), top_k)
        if key not in libraries:
            libraries[key] = build(bundle, policy, top_k)
        return libraries[key]

    monkeypatch.setattr(weighbridge.audit, "build_library", built_once)


@pytest.fixture
def weighbridge_cli(monkeypatch: pytest.MonkeyPatch) -> Weighbridge:
    """The installed command in this process: the same entry point, exit codes and streams."""

    def run(*arguments: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", ["weighbridge", *map(str, arguments)])
        code: object = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code
            except Exception:  # noqa: BLE001 - a traceback and exit code 1 is what a user would get
                traceback.print_exc()
                code = 1
        return Ended(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())

    return run
