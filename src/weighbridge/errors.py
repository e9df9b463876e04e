"""The exceptions of Weighbridge.

A failure of the endpoint is data and stands in the run folder; only a failure of ours, or of what the user
gave us, is an exception. Every one of them is a single line that names the thing and the next step::

    WeighbridgeError            exit code 2
    ├── ConfigurationError      a file, option or environment variable that cannot be used
    │   └── KeyRefusedError     a key that is missing, badly named or bound to another origin
    ├── BundleError             a reference bundle that is unknown, incomplete or does not match its hashes
    ├── SignatureError          a signed statement that is malformed, wrong or about something else
    ├── EvidenceError           a published report, its evidence or the log, changed or incomplete
    ├── RunFolderError          a run folder that cannot be read, resumed or judged
    └── LabError                the local provider cannot be set up or started
"""


class WeighbridgeError(Exception):
    """Something that Weighbridge cannot go on from.

    Parameters
    ----------
    what : str
        What is wrong, naming the file, field or value.
    next_step : str
        What the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(f"{what}. {next_step}")
        self.what = what
        self.next_step = next_step


class ConfigurationError(WeighbridgeError):
    """A file, option or environment variable cannot be used."""


class KeyRefusedError(ConfigurationError):
    """A key is missing, its name does not look like a key's, or it belongs to another origin."""


class BundleError(WeighbridgeError):
    """A reference bundle is unknown, incomplete, or does not match its hashes."""


class RunFolderError(WeighbridgeError):
    """A run folder cannot be read, resumed or judged."""


class SignatureError(WeighbridgeError):
    """A signed statement is malformed, wrong, or about something else."""


class EvidenceError(WeighbridgeError):
    """A published report, its evidence or the log was changed or is incomplete."""


class LabError(WeighbridgeError):
    """The local provider cannot be set up or started."""
