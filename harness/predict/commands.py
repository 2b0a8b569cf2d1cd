"""The commands about cards that are not here: parse, call, print. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness import completing, decide, options
from harness.errors import InputError

app = typer.Typer()

Gpu = Annotated[
    str | None,
    typer.Option(
        help="The card, as l4, rtx-4080 or rtx-2000-ada, or a .toml file. [bench gpus --list]",
        autocompletion=completing.gpus,
    ),
]
Model = Annotated[str, typer.Option(help="A shape (qwen2.5-7b, llama-3-8b ...), a config.json, a directory, or demo.")]
Profile = Annotated[Path | None, typer.Option(help="What `bench calibrate` found of your own card, a .toml file.")]


@app.command(short_help="A sweep on a card that is not here.")
def predict(
    gpu: Gpu = None,
    model: Model = "qwen2.5-1.5b",
    precisions: Annotated[
        str, typer.Option(help="bf16, awq, gptq, rtn, awq+gptq, w8a16, w8a8, fp8; NAME@KERNEL for another kernel.")
    ] = "bf16,awq",
    conc: options.Concurrency = None,
    scenario: options.Scenario = "chat",
    arrivals: options.Arrivals = None,
    rate: options.Rate = None,
    input_tokens: options.InputTokens = None,
    output_tokens: options.OutputTokens = None,
    requests: options.Requests = None,
    slo: options.ServiceLevel = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="Price of the card. [its rent in the catalogue]")] = None,
    utilisation: options.Utilisation = None,
    seed: Annotated[int | None, typer.Option(help="Seed of lengths and arrivals.")] = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    kv_cache_gib: Annotated[float | None, typer.Option(min=0.1, help="KV cache of a given size.")] = None,
    max_model_len: options.MaxModelLen = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Predict each precision with each value of max_num_seqs, max_num_batched_tokens, max_model_len or "
            "gpu_memory_utilization, as max_num_seqs=64,128; repeated: all combinations."
        ),
    ] = None,
    profile: Profile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory to write, with its papers. [only the terminal]")
    ] = None,
    assume: options.Assume = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="How wrong predictions are, by what was published; nothing else is read.")
    ] = False,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="With --validate: fit all folds anew and write catalogue and docs (minutes)."),
    ] = False,
) -> None:
    """Predict a sweep on a card that is not here: the same tables and papers, each number with its error band."""
    if refit and not validate:
        raise InputError("--refit without --validate", allowed="both, or --validate alone")
    if validate:
        from harness.predict import validation

        validation.run(decide.console(), refit=refit, out=out)
        return
    if gpu is None and profile is None:
        raise InputError(
            "bench predict without --gpu",
            allowed="a card of `bench gpus --list`, or a .toml file",
            remedy="add --gpu l4",
        )
    from harness.job import SweepRequest
    from harness.predict import run
    from harness.progress import Progress
    from harness.scenario import load_scenario
    from harness.sweep import parse_concurrencies, parse_rates
    from harness.variants import parse_vary

    plan = load_scenario(
        scenario,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        requests=requests,
        slo=decide.slo_of(slo, None),
        usd_per_hour=usd_per_hour,
        utilisation=utilisation,
        max_model_len=max_model_len,
        seed=seed,
        arrivals=arrivals,
    )
    request = SweepRequest(
        scenario=plan if usd_per_hour is not None else run.priced(plan, gpu),
        concurrencies=tuple(parse_concurrencies(conc or "1,8,16,32")) if plan.arrivals == "closed" else (),
        rates=tuple(parse_rates(rate)) if rate is not None else (),
        model=model,
        precisions=decide.listed(precisions, "--precisions"),
        out=out,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
        vary=parse_vary(vary or ()),
        assume=None if assume is None else decide.assumptions_text(assume),
        engine="simulated",
        gpu=gpu,
        profile=profile,
    )
    console = decide.console()
    if out is not None:
        from harness import job

        with Progress(console) as progress:
            run_dir = job.sweep(request, progress, argv=sys.argv[1:])
        decide.finish_sweep(console, run_dir)
        return
    run.show(console, request)


@app.command(short_help="Rank cards for a model and its traffic.")
def gpus(
    model: Annotated[
        str | None, typer.Option(help="A shape (qwen2.5-7b ...), a config.json, a directory, or demo.")
    ] = None,
    precisions: Annotated[str, typer.Option(help="As of bench predict; of equals the first wins.")] = "bf16,awq,gptq",
    users: Annotated[int | None, typer.Option(help="Concurrent users at the peak.")] = None,
    requests_per_day: Annotated[float | None, typer.Option(help="Expected traffic.")] = None,
    peak_factor: Annotated[float | None, typer.Option(help="Rate at the peak over the day's mean. [3]")] = None,
    scenario: options.Scenario = "chat",
    input_tokens: options.InputTokens = None,
    output_tokens: options.OutputTokens = None,
    slo: options.ServiceLevel = None,
    cards: Annotated[str | None, typer.Option(help="l4,rtx-4080,... or .toml files. [the whole catalogue]")] = None,
    prices: Annotated[Path | None, typer.Option(help="Your own prices, a .toml file like the catalogue.")] = None,
    headroom: Annotated[str | None, typer.Option(help="Share of a card that is kept free. [20%]")] = None,
    failover: Annotated[int | None, typer.Option(help="Cards that may be lost. [1]")] = None,
    own: Annotated[bool, typer.Option("--own", help="Buy the cards instead of renting them.")] = False,
    electricity: Annotated[
        str | None, typer.Option(help="With --own: a region's electricity of the catalogue.")
    ] = None,
    max_users: Annotated[int, typer.Option(min=1, max=4096, help="The most users that are tried on a card.")] = 256,
    assume: options.Assume = None,
    top: Annotated[int | None, typer.Option(min=1, help="Show the cheapest so many. [all]")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every row as well: a .csv or a .md file.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="The catalogue of cards, and nothing else.")] = False,
    as_json: options.Json = False,
) -> None:
    """Rank cards for a model, its traffic and a service level by predicted $ a month."""
    from rich.progress import track

    from harness.assumptions import load_assumptions
    from harness.predict import cards as catalogue
    from harness.predict import rank
    from harness.predict.shapes import shape
    from harness.prices import load_prices
    from harness.report import ranking
    from harness.report.document import document
    from harness.scenario import load_scenario
    from harness.slo import parse_share

    chosen = catalogue.cards() if cards is None else tuple(map(catalogue.card, decide.listed(cards, "--cards")))
    console, known = decide.console(stderr=as_json), load_prices(prices)
    if show_list and as_json:
        ids = {card.id for card in chosen}
        print(document("cards", cards=chosen, rents=[rent for rent in known.rents if rent.card in ids]))
        return
    if show_list:
        ranking.show_catalogue(console, chosen, known)
        return
    if model is None:
        raise InputError(
            "bench gpus without --model",
            allowed="a model to rank cards for, or --list",
            remedy="add --model qwen2.5-7b --users 50",
        )
    if electricity is not None and not own:
        raise InputError("--electricity without --own", allowed="both: who rents pays for electricity in the rent")
    wanted = rank.Wanted(
        model=shape(model),
        scenario=load_scenario(
            scenario, input_tokens=input_tokens, output_tokens=output_tokens, slo=decide.slo_of(slo, None)
        ),
        assumptions=load_assumptions(
            assume,
            users=users,
            requests_per_day=requests_per_day,
            peak_factor=peak_factor,
            headroom=None if headroom is None else parse_share(headroom, "--headroom"),
            failover=failover,
        ),
        precisions=decide.listed(precisions, "--precisions"),
        cards=tuple({card.id: card for card in chosen}.values()),
        own=own,
        usd_per_kwh=0.0 if electricity is None else known.electricity(electricity).usd_per_kwh,
        most_users=max_users,
    )
    rank.check(wanted)
    if out is not None:
        ranking.check_out(out)
    watched = track(wanted.cards, "predicting", console=console, transient=True, disable=not console.is_terminal)
    found = rank.ranked(row for card in watched for row in rank.judged(wanted, card, prices=known))
    if as_json:
        print(ranking.to_json(found, wanted))
    else:
        ranking.show(console, found, wanted, top)
    if out is not None:
        ranking.write(found, wanted, out)
        console.print(f"rows    {out}", markup=False, highlight=False)


@app.command(short_help="Fit predictions to your own card.")
def calibrate(
    run: Annotated[Path, typer.Argument(help="A measured run, results/<run>.", autocompletion=completing.runs)],
    use: Annotated[
        str | None, typer.Option(help="Points to fit to, as bf16:1,bf16:8,awq:4. [spread over the loads]")
    ] = None,
    points: Annotated[int, typer.Option(help="How many to choose without --use, 3 to 6.")] = 3,
    gpu: Gpu = None,
    model: Annotated[str | None, typer.Option(help="A shape or config.json in place of the run's model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Profile to write, a .toml file.")] = None,
) -> None:
    """Fit few factors of your own card to 3 to 6 measured points, predict the rest, say what to measure next."""
    from harness.predict import calibration

    calibration.run(decide.console(), run, use=use, count=points, gpu=gpu, model=model, out=out)


@app.command("serve-simulated", short_help="An OpenAI server with predicted timing.")
def serve_simulated(
    gpu: Annotated[
        str,
        typer.Option(
            help="The card, as l4 or rtx-4080, or a .toml file. [bench gpus --list]", autocompletion=completing.gpus
        ),
    ],
    model: Model = "qwen2.5-1.5b",
    precision: Annotated[str, typer.Option(help="One: bf16, awq, gptq ...")] = "bf16",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    max_model_len: Annotated[int | None, typer.Option(min=16, help="Context. [the model's own, 8192 at most]")] = None,
    max_num_seqs: options.MaxNumSeqs = 256,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    kv_cache_gib: Annotated[float | None, typer.Option(min=0.1, help="KV cache of a given size.")] = None,
    speed: Annotated[float, typer.Option(min=0.01, max=1000.0, help="So many times faster than predicted.")] = 1.0,
) -> None:
    """Speak the OpenAI API with the predicted timing: demos, dashboards and load tests without a card."""
    from harness.predict.server import serve
    from harness.predict.serving import prepared

    serving = prepared(
        gpu,
        model,
        precision,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_gib=kv_cache_gib,
    )
    serve(serving, host=host, port=port, speed=speed, say=lambda text: print(text, flush=True))
