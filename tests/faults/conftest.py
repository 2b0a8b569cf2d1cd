"""Fixtures that several of the fault tests share."""

from __future__ import annotations

from tests.faults.test_engine_process import engine
from tests.test_resume import begin

__all__ = ["begin", "engine"]
