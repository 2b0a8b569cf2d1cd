"""What the machine and the engine say of themselves while a load runs; each source missing is None, never an error.

prometheus.py   the engine's own counters (/metrics)
gpu.py          NVML: cards, memory
host.py         processor, memory, the memory of a process tree
sampler.py      power, clocks, heat of the cards, ten times a second while a cell runs
watch.py        scrapes the engine's counters and memory in a thread while a cell runs

And what a profiler says of one generation (`bench trace`), where a source that is missing is an error:

kernels.py      launches, steps, and the kind of work that a name stands for; rows of kernels.csv
torch_trace.py  torch's profiler   nsys.py  Nsight Systems   steps.py  where each step begins
tracing.py      records: generation.py asks, profilers.py watch; trace_files.py reads what is kept
ceiling.py      what a processor can do at most, measured
commands.py     `bench trace`
"""
