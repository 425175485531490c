"""Every error that a user can meet, each with its hint and its exit code.

A message says what failed, in which file, layer or expert, and the values wanted and found; the
hint says what to type next. Exit codes: 0 ok, 1 our bug (traceback), 2 usage, 3 bad input, 4 does
not fit, 130 interrupted.
"""


class MoeToolError(Exception):
    """A condition outside the program's control, worded for the person who has to fix it."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(MoeToolError):
    """An invalid argument, or two that contradict each other."""

    exit_code = 2


class NotFoundError(MoeToolError):
    """A model, file or data set that was not found; also: no network."""


class DataSourceError(MoeToolError):
    """Text that cannot be read or is too short."""


class CorruptArtifactError(MoeToolError):
    """A file that is truncated, damaged or not of the tool's formats."""


class ArtifactVersionError(MoeToolError):
    """A file of another schema version."""


class WrongModelError(MoeToolError):
    """An artifact that was made from another model."""


class UnsupportedModelError(MoeToolError):
    """An architecture or a weight format that the tool does not know."""


class BudgetError(MoeToolError):
    """A memory budget that the work does not fit into."""

    exit_code = 4


class StorageError(MoeToolError):
    """A disk that is full or fails."""


class DiskFullError(StorageError):
    """Too little free disk space for what is to be written."""

    exit_code = 4
