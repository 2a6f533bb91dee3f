"""What can go wrong, by whose fault. The command line turns these into exit codes in one place.

Each message is one sentence that names the thing, both values and a way out.
"""


class CompressError(Exception):
    """Base of every error that a user can cause or mend; exit code 1."""

    exit_code = 1


class ConfigError(CompressError):
    """The options or the input text do not fit the model or each other."""


class UnsupportedError(CompressError):
    """A valid request that this version cannot honour; the message names what can."""


class ArtifactError(CompressError):
    """A model folder, shard or manifest is missing, damaged or inconsistent."""


class GateFailed(CompressError):
    """The accuracy gate did not pass: `exit_code` is 3 for FAIL and 4 for INCONCLUSIVE."""

    def __init__(self, message: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code
