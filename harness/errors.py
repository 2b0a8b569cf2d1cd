"""The exception tree. Every message says what was given, what is allowed, and what to do.

KneebenchError
├── InputError          the user's input cannot be used              exit code 2
│   ├── ScenarioError   a scenario file: names the file and the key
│   ├── ModelError      a model that cannot be read or served
│   └── MissingTool     something is not installed: names the command that brings it
└── RunError            the input was good, the run failed           exit code 1
    ├── EngineError     the engine did not start, died, or stopped answering
    └── RecordError     a file of results cannot be read or written
"""

from __future__ import annotations


class KneebenchError(Exception):
    """Base of all errors that a user may see; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(KneebenchError):
    """The user's input cannot be used. Nothing was started and nothing was lost."""

    exit_code = 2

    def __init__(self, problem: str, *, allowed: str = "", remedy: str = "") -> None:
        parts = [problem]
        if allowed:
            parts.append(f"Allowed: {allowed}.")
        if remedy:
            parts.append(f"To mend it: {remedy}.")
        super().__init__("\n".join(parts))


class ScenarioError(InputError):
    """A scenario file that cannot be used; the message names the file and the key."""


class ModelError(InputError):
    """A model, checkpoint or shape that cannot be read, or that does not fit the machine."""


class MissingTool(InputError):
    """Something that the command needs is not installed."""


class RunError(KneebenchError):
    """The input was good and the run failed; rows that were finished are on disk."""

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(f"{problem}\nTo mend it: {remedy}." if remedy else problem)


class EngineError(RunError):
    """The engine did not start, died, or stopped answering; the message ends with its own last error lines."""


class RecordError(RunError):
    """A results file that cannot be read back or written."""
