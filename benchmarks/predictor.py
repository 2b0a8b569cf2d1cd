"""How fast a sweep is predicted: a grid of 64 cells of 1,000 requests, on one core; and Vidur beside its scheduler.

python benchmarks/predictor.py [--profile] [--repeats N] [--kv-cache-gib N]

A cell is what `bench predict` makes of it, from drawn lengths to the figures of its row: a closed loop of 1 to 64
users, 256 tokens in and 256 out, each ± 25 %; 16 loads, 4 precisions of Qwen2.5 1.5B on an RTX 2000 Ada. The target is
5 s for the grid and 500 MiB.

Vidur (Agrawal et al., MLSys 2024, https://github.com/microsoft/vidur) is compared where this Python can import it: give
it an environment of its own (`pip install vidur`; it brings wandb and streamlit) and run this script there. Both then
serve the same 1,000 requests as an open loop, and every step takes the same constant time in both: what is compared is
the simulation alone, not how step times are found (Vidur's profiles are large files that its package does not have).
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.metadata
import importlib.util
import multiprocessing
import pstats
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.predict.scheduler import Asked, Limits, Served, Simulation, simulate  # noqa: E402

LOADS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64)
REQUESTS = 1000
TOKENS = 256
PRECISIONS = ("bf16", "awq", "w8a16", "fp8")
LIMITS = Limits(kv_blocks=4000)
"""Of the comparison with Vidur: 64,000 tokens."""


@dataclass(frozen=True)
class Constant:
    """Every step takes the same."""

    step_s: float

    def decode(self, sequences: int) -> tuple[float, float]:
        return self.step_s, 0.0

    def mixed(self, sequences: int, context: int, prompt: int, pairs: int, finishing: int) -> float:
        return self.step_s


@dataclass
class Open:
    """Poisson arrivals of fixed lengths: what Vidur's synthetic generator makes."""

    rate: float

    def first(self) -> Iterable[Asked]:
        rng, at = random.Random(0), 0.0
        for number in range(REQUESTS):
            at += rng.expovariate(self.rate)
            yield Asked(at, TOKENS, TOKENS, number)

    def after(self, served: Served) -> Asked | None:
        return None


def grid(kv_cache_gib: float | None) -> list[Simulation]:
    """All cells, each with the figures of its row."""
    from harness.predict import cards, cell, coefficients, shapes
    from harness.records import Cell, Scenario

    scenario = Scenario(
        "grid", input_tokens=TOKENS, output_tokens=TOKENS, requests=REQUESTS, min_window_s=0.0, max_window_s=86_400.0
    )
    card, shape = cards.card("rtx-2000-ada"), shapes.shape("qwen2.5-1.5b").architecture
    found = []
    for precision in PRECISIONS:
        what = cell.served(card, shape, precision, scenario, coefficients.fitted(), kv_cache_gib=kv_cache_gib)
        for users in LOADS:
            load, simulation = cell.predict(scenario, Cell(precision, users), what)
            assert cell.figures(scenario, load, simulation)["requests"] >= REQUESTS
            found.append(simulation)
    return found


def vidur_run(rate: float, step_s: float) -> tuple[float, float]:
    """CPU seconds of Vidur's vLLM scheduler (that of the engine before V1) on one replica for the load of `Open`, and
    the virtual time at which its last request ended. None of its metrics are stored."""
    import vidur.config as config  # type: ignore[import-not-found]
    from vidur._native.entities import ExecutionTime  # type: ignore[import-not-found]
    from vidur.execution_time_predictor import ExecutionTimePredictorRegistry  # type: ignore[import-not-found]
    from vidur.simulator import Simulator  # type: ignore[import-not-found]

    class Predictor:
        def get_execution_time(self, batch: object, pipeline_stage: int) -> object:
            return ExecutionTime(1, step_s * 1e3, *[0.0] * 13)

    ExecutionTimePredictorRegistry.get = lambda *args, **kwargs: Predictor()
    # Its own names for what Limits and Open say; one card, so that nothing is split.
    replica = config.ReplicaConfig(
        model_name="meta-llama/Llama-2-7b-hf",
        num_pipeline_stages=1,
        tensor_parallel_size=1,
        device="a100",
        network_device="a100_dgx",
    )
    requests = config.SyntheticRequestGeneratorConfig(
        num_requests=REQUESTS,
        length_generator_config=config.FixedRequestLengthGeneratorConfig(prefill_tokens=TOKENS, decode_tokens=TOKENS),
        interval_generator_config=config.PoissonRequestIntervalGeneratorConfig(qps=rate),
    )
    with tempfile.TemporaryDirectory() as directory:
        simulator = Simulator(
            config.SimulationConfig(
                log_level="error",
                cluster_config=config.ClusterConfig(
                    replica_config=replica,
                    cache_config=config.CacheConfig(num_blocks=LIMITS.kv_blocks),
                    replica_scheduler_config=config.VllmSchedulerConfig(batch_size_cap=LIMITS.max_num_seqs),
                ),
                request_generator_config=requests,
                metrics_config=config.MetricsConfig(
                    write_metrics=False, enable_chrome_trace=False, store_plots=False, output_dir=directory
                ),
            )
        )
        simulator._write_output = lambda: None
        began = time.process_time()
        simulator.run()
        return time.process_time() - began, simulator._time


def compare_with_vidur(repeats: int) -> None:
    if importlib.util.find_spec("vidur") is None:
        print("Vidur: not installed in this Python, so there is nothing to compare with (see the docstring)")
        return
    rate, step_s = 4.0, 0.0125
    # It numbers its replicas from 0 once a process, so each run gets a process of its own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as process:
        theirs = [process.submit(vidur_run, rate, step_s).result() for _ in range(repeats)]
    ours: list[float] = []
    for _ in range(repeats):
        began = time.process_time()
        simulation = simulate(
            Open(rate), replace(LIMITS, chunked_prefill=False, request_s=0, token_s=0), Constant(step_s)
        )
        ours.append(time.process_time() - began)
    print(
        f"Vidur {importlib.metadata.version('vidur')}: {statistics.median(cpu_s for cpu_s, _ in theirs):.2f} s of CPU, "
        f"this scheduler {statistics.median(ours):.4f} s (medians of {repeats}): {REQUESTS:,} requests of {TOKENS} + "
        f"{TOKENS} tokens, {rate:g} a second (Poisson), {step_s * 1e3:g} ms a step\n"
        f"  (the last one ends at {theirs[-1][1]:.0f} s of virtual time there, {simulation.end_s:.0f} s here)"
    )


def time_grid(repeats: int, kv_cache_gib: float | None) -> None:
    cpu_s: list[float] = []
    wall_s: list[float] = []
    for _ in range(repeats):
        simulations: list[Simulation] = []  # let go of the last ones before the next
        wall, cpu = time.perf_counter(), time.process_time()
        simulations = grid(kv_cache_gib)
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.process_time() - cpu)
    print(f"{len(simulations)} cells of {REQUESTS:,} requests and more, {TOKENS} + {TOKENS} tokens, figures and all")
    print(f"  {statistics.median(cpu_s):.2f} s of CPU ({min(cpu_s):.2f} to {max(cpu_s):.2f})")
    print(f"  {statistics.median(wall_s):.2f} s by the clock (medians of {repeats}, one process, one thread)")
    print(
        f"  {sum(s.steps for s in simulations):,} steps in {sum(len(s.stretches) for s in simulations):,} stretches, "
        f"{sum(len(s.served) for s in simulations):,} requests, {sum(s.preemptions for s in simulations):,} preemptions"
    )
    print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, all simulations kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by cProfile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, help="0.2 makes it preempt")
    given = parser.parse_args()
    if importlib.util.find_spec("pydantic") is None:
        print("kneebench's own libraries are not here: only the scheduler is compared")
    else:
        time_grid(given.repeats, given.kv_cache_gib)
    compare_with_vidur(given.repeats)
    if given.profile:
        with cProfile.Profile() as profile:
            grid(given.kv_cache_gib)
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
