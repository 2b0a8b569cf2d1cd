"""The errors of this package. Each message says what was given, what is allowed, and what to do.

QuantizeError
├── InputError             the request cannot be served as it stands          exit code 2
│   ├── SchemeError        bits, group size, a weight that has no scale
│   ├── ModelError         the model's directory: absent, pickled, truncated, of a family not known
│   ├── CalibrationError   the calibration set: absent, malformed, too short
│   └── OutputError        the place to write to: occupied, damaged
└── RunError               the request was sound and the run failed           exit code 1
"""


class QuantizeError(Exception):
    """Base of all. `given` is what was met, `allowed` what would have been accepted, `remedy` what to do."""

    exit_code = 1

    def __init__(self, given: str, allowed: str, remedy: str) -> None:
        given = " ".join(given.split())  # other libraries' messages, quoted here, come in several lines
        super().__init__(f"{given}. Allowed: {allowed}. {remedy}.")
        self.given, self.allowed, self.remedy = given, allowed, remedy


class InputError(QuantizeError):
    exit_code = 2


class SchemeError(InputError):
    pass


class ModelError(InputError):
    pass


class CalibrationError(InputError):
    pass


class OutputError(InputError):
    pass


class RunError(QuantizeError):
    pass
