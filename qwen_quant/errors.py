"""The errors a user can cause. The command line prints one as a single line and exits with its code."""

from __future__ import annotations


class QwenQuantError(Exception):
    """Something the user can mend: the message names the file, the tensor or key, and the remedy."""

    exit_code = 1


class UsageError(QwenQuantError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class ConfigError(QwenQuantError):
    """A `config.json` (or GGUF metadata) that describes a model we cannot build exactly."""


class CheckpointError(QwenQuantError):
    """Weights that are missing, cut, of the wrong type or shape, or not finite."""


class FormatError(QwenQuantError):
    """A file that breaks its own format, or a format that cannot hold what was asked of it."""


class CalibrationError(QwenQuantError):
    """Calibration data that is empty, unreadable or too short, or activations that are not finite."""


class OutputError(QwenQuantError):
    """A destination that cannot be written."""


class ResourceError(QwenQuantError):
    """A run that needs more memory than it was allowed."""
