"""Policies: which stacks count as honest, and every threshold."""

from pathlib import Path

from weighbridge.errors import ConfigurationError
from weighbridge.paths import data_path
from weighbridge.records import Policy, read_toml


def load_policy(name_or_file: str) -> Policy:
    """Load a policy that the package carries, by name, or one from a file.

    Raises
    ------
    ConfigurationError
        If there is no such policy or a field of it is wrong.
    """
    if name_or_file.endswith(".toml"):
        return read_toml(Policy, Path(name_or_file))
    folder = data_path("policies")
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name_or_file not in known:
        raise ConfigurationError(
            f"there is no policy {name_or_file!r}", f"Choose one of {', '.join(known)}, or name a .toml file"
        )
    return read_toml(Policy, folder / f"{name_or_file}.toml")
