"""One whole generation by a server that we started: a prompt of exact length, an answer of exact length, its times.

The same prompts, client and clock as in a sweep; and the two endpoints of vLLM that open and close its profiler.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import httpx

from harness import models
from harness.analysis.metrics import output_tokens
from harness.engines.address import Address
from harness.engines.control import connect
from harness.engines.vllm import VllmServer
from harness.errors import EngineError, RunError
from harness.load.client import Connection, Exchange, fill
from harness.load.dialect import of_model
from harness.load.workload import make_ask
from harness.records import Cell, RequestRecord, Scenario

START_TIMEOUT_S, STOP_TIMEOUT_S = 120.0, 3600.0
"""/stop_profile answers when the trace is written: ten seconds for a small model, ten minutes for a large one by vLLM's
documentation."""
_TIMEOUT_S = 3600.0


def generator(
    engine: VllmServer, model: models.Model, scenario: Scenario, precision: str
) -> Callable[[int], RequestRecord]:
    """generate(number): the generation of that number, each with a prompt of its own, the same for each precision.

    It raises EngineError when the server fails, and RunError when what came is not as long as was asked.
    """
    dialect = of_model(model, engine.target)
    salt = secrets.token_hex(4)  # the prefix cache finds nothing
    cell = Cell("trace", 1)  # the precision may hold what no cache salt may: awq@kneebench

    def generate(number: int) -> RequestRecord:
        wanted = make_ask(scenario, cell, 0, number, dialect, engine.target.model, salt=salt)
        asked = RequestRecord(cell.key, 0, number, "measured", 0, output_tokens_asked=wanted.output_tokens)
        answered = fill(asked, asyncio.run(_exchanged(engine, dialect.path, wanted.body)))
        if answered.error is not None:
            engine.check()
            raise EngineError(f"{precision}: a generation failed ({answered.error}: {answered.error_detail})")
        if output_tokens(answered) != wanted.output_tokens or answered.prompt_tokens not in (None, wanted.input_tokens):
            raise RunError(
                f"{precision}: {answered.prompt_tokens} tokens were read and {output_tokens(answered)} generated; "
                f"{wanted.input_tokens} and {wanted.output_tokens} were asked for",
                remedy="ask for no more than the model's context holds: --prompt-tokens, --tokens",
            )
        return answered

    return generate


def start_profile(engine: VllmServer) -> None:
    """Open the profiler. Raises EngineError when the engine has died, or has none."""
    _post(engine, "/start_profile", START_TIMEOUT_S)


def stop_profile(engine: VllmServer) -> None:
    """Close it; torch's has written its trace then. Raises EngineError."""
    _post(engine, "/stop_profile", STOP_TIMEOUT_S)


async def _exchanged(engine: VllmServer, path: str, body: bytes) -> Exchange:
    connection = Connection(Address.parse(engine.target.base_url), engine.target.api_key)
    try:
        return await connection.exchange(path, body, timeout_s=_TIMEOUT_S, token_timeout_s=_TIMEOUT_S)
    finally:
        connection.close()


def _post(engine: VllmServer, path: str, timeout_s: float) -> None:
    with connect(engine.target.base_url, engine.target.api_key, timeout_s) as client:
        try:
            reply = client.post(path)
        except httpx.HTTPError as error:
            engine.check()
            raise EngineError(f"{path}: vLLM does not answer ({type(error).__name__})") from error
    if reply.status_code != 200:
        engine.check()
        raise EngineError(
            f"{path}: vLLM answers {reply.status_code}",
            remedy="trace with vLLM 0.13 or newer: older ones have no --profiler-config",
        )
