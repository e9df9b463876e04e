"""Where things are: the data files that the package carries, and the user's own folders."""

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent


def data_path(relative: str) -> Path:
    """Find a data file or folder of the package.

    In a checkout ``probes/`` and ``reference_outputs/`` stand at the top level; a wheel carries the same
    folders under ``weighbridge/data``.

    Parameters
    ----------
    relative : str
        For example ``"probes/chat-one-token"`` or ``"reference_outputs"``.

    Returns
    -------
    pathlib.Path
        An existing path.

    Raises
    ------
    FileNotFoundError
        If neither place holds it.
    """
    checkout = _PACKAGE.parent.parent
    roots = [checkout] if (checkout / "pyproject.toml").is_file() else []
    roots += [_PACKAGE / "data", _PACKAGE]
    for root in roots:
        if (root / relative).exists():
            return root / relative
    raise FileNotFoundError(f"the installation of weighbridge lacks {relative}")


def cache_folder() -> Path:
    """The folder for what can be made again (model files): ``WEIGHBRIDGE_HOME``/cache or the system's."""
    home = os.environ.get("WEIGHBRIDGE_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path("weighbridge")


def state_folder() -> Path:
    """The folder for what is the user's own (trust file, run secret): ``WEIGHBRIDGE_HOME``/state or the system's."""
    home = os.environ.get("WEIGHBRIDGE_HOME")
    return Path(home) / "state" if home else platformdirs.user_state_path("weighbridge")
