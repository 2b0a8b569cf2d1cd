"""kneebench: BF16 or INT4, how many users, at what cost, and what breaks? ARCHITECTURE.md tells the flow."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kneebench")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
