"""`bench sweep`: parse, call, print; nothing else. Heavy imports stand inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import completing, decide, options, sweepfile
from harness.errors import InputError

if TYPE_CHECKING:
    from harness.job import SweepRequest
    from harness.search import Search
    from harness.slo import Slo


def sweep(
    context: typer.Context,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A .toml file of options, as `bench init` writes one.", is_eager=True, callback=sweepfile.read
        ),
    ] = None,
    model: options.Model = "demo",
    precisions: Annotated[
        str | None,
        typer.Option(
            help="bf16, rtn, awq, gptq, awq+gptq, smoothquant, or NAME=PATH|HUB-ID; NAME@kneebench: with our kernels. "
            "[bf16,awq]",
            autocompletion=completing.precisions,
        ),
    ] = None,
    conc: options.Concurrency = None,
    scenario: options.Scenario = "chat",
    arrivals: options.Arrivals = None,
    rate: options.Rate = None,
    input_tokens: options.InputTokens = None,
    output_tokens: options.OutputTokens = None,
    requests: options.Requests = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Measure until the interval of p95 is within ± this share of it, as 5%; with --until: the interval "
            "of max safe concurrency. [10%]"
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Grow and bisect the concurrency until it is known how many users keep this SLO.")
    ] = None,
    max_cells: Annotated[int | None, typer.Option(min=1, help="Budget of --until, all precisions. [12 each]")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.1, help="Budget of --until, from the start. [60]")] = None,
    max_conc: Annotated[int | None, typer.Option(min=1, max=4096, help="Most users that --until tries. [256]")] = None,
    max_window: Annotated[str | None, typer.Option(help="Longest window of a cell, as 120s.")] = None,
    slo: options.ServiceLevel = None,
    slo_p95: Annotated[str | None, typer.Option(help="Short for --slo p95=..., as 3s or 800ms.")] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of the card.")] = None,
    utilisation: options.Utilisation = None,
    seed: Annotated[int | None, typer.Option(help="Seed of prompts and lengths.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Server sessions for each precision, interleaved ABBA.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Run directory. [results/<date>-<model>-<scenario>]")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Carry on with an interrupted run; everything else is read from it.",
            autocompletion=completing.unfinished,
        ),
    ] = None,
    assume: options.Assume = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Measure a server that runs already; key from KNEEBENCH_API_KEY.")
    ] = None,
    api_key_file: options.ApiKeyFile = None,
    api: Annotated[str | None, typer.Option(help="completions or chat; overrides the scenario.")] = None,
    calibration: options.Calibration = None,
    engine_python: options.EnginePython = None,
    port: options.Port = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    kv_cache_gib: options.KvCache = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    max_model_len: options.MaxModelLen = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    vary: options.Vary = None,
    engine_arg: options.EngineArg = None,
    client_processes: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes that make the load. [one for each 512 users]")
    ] = None,
    engine: Annotated[str, typer.Option(help="vllm, or simulated: predicted for --gpu, nothing is started.")] = "vllm",
    gpu: Annotated[
        str | None,
        typer.Option(help="The card to predict for, as l4. [bench gpus --list]", autocompletion=completing.gpus),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="With --engine simulated: what `bench calibrate` found of your card.")
    ] = None,
    cluster: options.Cluster = None,
    card: options.Card = None,
    load: options.Load = "beside",
    plan_only: options.Plan = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Quantize what is missing, serve each precision, drive it with load, write CSVs and the report."""
    from harness.engines.address import Address
    from harness.progress import Progress, course_of
    from harness.scenario import load_scenario
    from harness.slo import parse_duration, parse_share
    from harness.sweep import parse_concurrencies, parse_rates
    from harness.variants import parse_vary, settings

    console = decide.console(stderr=as_json, quiet=quiet)
    if resume is not None:
        _check_alone(context, "resume", "quiet", "as_json")
        from harness import job

        with Progress(console, course_of(job.recalled(resume))) as progress:
            run_dir = job.resume(resume, progress, argv=sys.argv[1:])
        decide.finish_sweep(console, run_dir, quiet=quiet, as_json=as_json)
        return

    level = decide.slo_of(slo, slo_p95) if until is None else _until(until, slo, slo_p95)
    plan = load_scenario(
        scenario,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests,
        slo=level,
        usd_per_hour=usd_per_hour,
        utilisation=utilisation,
        max_model_len=max_model_len,
        seed=seed,
        api=options.one_of(api, "--api", ("completions", "chat")),
        arrivals=options.one_of(arrivals, "--arrivals", ("closed", "constant", "poisson", "gamma", "trace")),
        precision=None if precision is None or until else parse_share(precision, "--precision"),
        max_window_s=None if max_window is None else parse_duration(max_window, "--max-window"),
    )
    if conc is not None and plan.arrivals != "closed":
        raise InputError(
            f"--conc with arrivals = {plan.arrivals}: an open loop has no number of users",
            allowed="--rate",
            remedy="say how many requests come a second: --rate 0.5,1,2",
        )
    concurrencies = tuple(parse_concurrencies(conc or ("1" if until else "1,8,16,32")))
    rates = tuple(parse_rates(rate)) if rate is not None else ()
    if endpoint is not None:
        Address.parse(endpoint)
        if model == "demo":
            raise InputError(
                "--endpoint without --model",
                allowed="the name that the server knows the model by",
                remedy="add --model NAME",
            )
    elif api_key_file is not None:
        raise InputError("--api-key-file without --endpoint", allowed="both: a server that we start gets a key of ours")

    options.one_of(engine, "--engine", ("vllm", "simulated"))
    if engine == "vllm" and (gpu or profile):
        raise InputError("--gpu and --profile are for a card that is predicted", allowed="--engine simulated with them")
    if engine == "simulated":
        from harness.predict import run

        plan = plan if usd_per_hour is not None else run.priced(plan, gpu)

    from harness import job

    wanted = decide.listed(precisions, "--precisions") if precisions else ("served",) if endpoint else ("bf16", "awq")
    varied = parse_vary(vary or ())
    cards = decide.listed(card, "--card") if card else ()
    options.one_of(load, "--load", ("beside", "away"))
    if cluster is not None and engine == "simulated":
        raise InputError("--cluster with --engine simulated, which starts nothing", allowed="one of the two")
    if cluster is None and (cards or load == "away"):
        raise InputError(
            f"{'--card' if cards else '--load away'} without --cluster",
            allowed="on a cluster",
            remedy="add --cluster auto",
        )
    request = job.SweepRequest(
        scenario=plan,
        concurrencies=concurrencies,
        model=model,
        precisions=wanted,
        repeats=repeats,
        out=out,
        endpoint=endpoint,
        api_key_file=api_key_file,
        engine_python=engine_python,
        calibration=calibration,
        port=port,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
        kv_cache_dtype=kv_cache_dtype,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        vary=varied,
        engine_args=tuple(engine_arg or ()),
        rates=rates,
        client_processes=client_processes,
        assume=None if assume is None else decide.assumptions_text(assume),
        search=_search(
            level if until else None,
            precision,
            concurrencies,
            max_conc,
            max_cells,
            max_minutes,
            len(wanted) * len(settings(varied)) * max(1, len(cards)),
        ),
        engine="simulated" if engine == "simulated" else "vllm",
        gpu=gpu,
        profile=profile,
        cluster=cluster,
        card_types=tuple(dict.fromkeys(cards)),
        load="away" if load == "away" else "beside",
        price_by_card=bool(cards) and usd_per_hour is None,
        from_file=sweepfile.from_file(context),
    )
    if plan_only:
        _show_plan(request, assume)
        return
    with Progress(console, course_of(request)) as progress:
        run_dir = job.sweep(request, progress, argv=sys.argv[1:])
    decide.finish_sweep(console, run_dir, quiet=quiet, as_json=as_json)


def _show_plan(request: SweepRequest, assume: Path | None) -> None:
    from harness import outlook
    from harness.assumptions import load_assumptions

    found, card = outlook.look(request, None if assume is None else load_assumptions(assume))
    for word, said in outlook.lines(found, card):
        print(f"{word:<13} {said}")


def _until(until: str, slo: str | None, slo_p95: str | None) -> Slo:
    from harness.slo import parse_slo

    if slo is not None or slo_p95 is not None:
        raise InputError(
            "--until together with --slo", allowed="--until alone: what is looked for is the service level"
        )
    return parse_slo(until, "--until")


def _search(
    until: Slo | None,
    precision: str | None,
    first: tuple[int, ...],
    max_conc: int | None,
    max_cells: int | None,
    max_minutes: float | None,
    precisions: int,
) -> Search | None:
    from harness.search import Search
    from harness.slo import parse_share

    budget = {"--max-cells": max_cells, "--max-minutes": max_minutes, "--max-conc": max_conc}
    if until is None:
        for option, value in budget.items():
            if value is not None:
                raise InputError(f"{option} without --until", remedy="say what is looked for: --until p95=3s")
        return None
    share = 0.1 if precision is None else parse_share(precision, "--precision")
    if not 0 < share < 1:
        raise InputError(f"--precision {precision!r}", allowed="more than 0, below 100%")
    most = max_conc or 256
    if max(first) > most:
        raise InputError(f"--conc {max(first)} is above --max-conc {most}", remedy="raise --max-conc")
    return Search(until, share, first, most, max_cells or 12 * precisions, max_minutes or 60.0)


def _check_alone(context: typer.Context, option: str, *but: str) -> None:
    """Raise InputError when another option was typed beside one that stands for all of them, `but` for those."""
    typed = options.typed(context, but=(option, *but))
    if typed:
        raise InputError(
            f"--{option} together with {', '.join(typed)}",
            allowed=f"--{option} alone: a run is finished as it was begun",
            remedy="leave the others out, or begin another run",
        )
