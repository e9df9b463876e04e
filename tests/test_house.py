"""The house rules: types, lint, format, layers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["mypy"],
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["lint-imports"],
    ],
    ids=lambda command: " ".join(command),
)
def test_house_rule_is_kept(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_address_of_a_registry_and_no_local_path_is_committed() -> None:
    for path in (ROOT / "requirements-test.txt", ROOT / "pyproject.toml"):
        text = path.read_text()
        assert "://" not in text
        assert " @ " not in text
        assert "file:" not in text
