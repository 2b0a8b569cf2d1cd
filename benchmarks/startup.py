"""How long `bench --help` takes: the whole process, median of five after one warm-up.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def seconds() -> float:
    """Wall time of one `bench --help`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "harness", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    seconds()
    runs = sorted(seconds() for _ in range(5))
    print(f"bench --help: median {statistics.median(runs):.3f} s (min {runs[0]:.3f}, max {runs[-1]:.3f}, n=5)")


if __name__ == "__main__":
    main()
