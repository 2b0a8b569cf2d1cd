"""Options that several commands share: one name, one type and one help text each; and which of them were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="demo, a directory, a hub name, or shape:NAME (architecture alone, random weights).")
]
Concurrency = Annotated[str | None, typer.Option(help="Concurrent users, one cell each. [1,8,16,32]")]
Scenario = Annotated[str, typer.Option(help="A name (chat, batch, rag, code, agent) or a .toml file.")]
Arrivals = Annotated[
    str | None, typer.Option(help="closed, constant, poisson, gamma or trace; overrides the scenario.")
]
Rate = Annotated[str | None, typer.Option(help="Requests a second of an open loop, one cell each.")]
InputTokens = Annotated[int | None, typer.Option(help="Mean prompt length; overrides the scenario.")]
OutputTokens = Annotated[int | None, typer.Option(help="Mean answer length; overrides the scenario.")]
Requests = Annotated[int | None, typer.Option(help="Requests in each cell's window; overrides the scenario.")]
ServiceLevel = Annotated[
    str | None, typer.Option(help="Service level: p95=3s, ttft=500ms, tpot=50ms, goodput=90%, joined by commas.")
]
Utilisation = Annotated[float | None, typer.Option(help="Share of the hour under this load, 0 to 1.")]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="vLLM's limit on requests in a batch.")]
GpuMemoryUtilization = Annotated[float, typer.Option(min=0.05, max=1.0, help="vLLM's share of the card.")]
Calibration = Annotated[Path | None, typer.Option(help="Text for AWQ and GPTQ: .txt or .jsonl. [the model's own]")]
EnginePython = Annotated[Path | None, typer.Option(help="Python of an environment that has vLLM.")]
Port = Annotated[int | None, typer.Option(min=1, max=65535, help="Port for vLLM on loopback. [a free one]")]
KvCache = Annotated[float | None, typer.Option(min=0.1, help="KV cache on a CPU machine.")]
EngineArg = Annotated[list[str] | None, typer.Option(help="Passed to vLLM as it is; may be repeated.")]
Assume = Annotated[Path | None, typer.Option(help="Prices and traffic for the reports, a .toml file (docs/cost.md).")]


def typed(context: typer.Context, but: tuple[str, ...]) -> list[str]:
    """The options of this command line as they were typed, without those of `but` (by their parameter's name)."""
    return [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in but and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
