"""What the tests share: the reference, a command line in this process, and a folder of its own for each test."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
import pytest

import weighbridge.audit
import weighbridge.plan
from weighbridge.cli import main
from weighbridge.reference.bundle import Bundle

REFERENCE = "smollm2-135m-instruct"


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


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trust file and a run secret for each test, and none of the machine's own keys."""
    home = tmp_path / "home"
    monkeypatch.setenv("WEIGHBRIDGE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def already_known() -> dict[Any, Any]:
    return {}


@pytest.fixture
def faster(already_known: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for every test is computed once, and nobody waits for a disk."""

    def once(module: Any, name: str) -> None:
        compute = getattr(module, name)

        def known(bundle: Bundle, *rest: Any, **more: Any) -> Any:
            key = (name, str(bundle.path), bundle.identity.digest, *map(repr, rest), repr(more))
            if key not in already_known:
                already_known[key] = compute(bundle, *rest, **more)
            return already_known[key]

        monkeypatch.setattr(module, name, known)

    def page(**options: Any) -> jinja2.Environment:
        key = ("page", str(options["loader"].searchpath), str(options["autoescape"]))
        if key not in already_known:
            already_known[key] = environment(**options)
        return cast(jinja2.Environment, already_known[key])

    once(weighbridge.audit, "build_library")
    once(weighbridge.plan, "pool_of")
    environment = jinja2.Environment
    monkeypatch.setattr(jinja2, "Environment", page)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that ask nothing but what is exposed and the probes of the weights, for tests that need no other request."""
    monkeypatch.setattr(weighbridge.plan, "route_requests", lambda *_: [])
    monkeypatch.setattr(weighbridge.plan, "_prompt_requests", lambda *_: [])
    monkeypatch.setattr(weighbridge.plan, "sampling_requests", lambda *_: [])


@pytest.fixture
def weighbridge_cli(own_home: Path, faster: None, monkeypatch: pytest.MonkeyPatch) -> Weighbridge:
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
