"""What the machine and the engine say of themselves while a load runs; each source missing is None, never an error.

prometheus.py   the engine's own counters (/metrics)
gpu.py          NVML: cards, memory
host.py         processor, memory, the memory of a process tree
sampler.py      power, clocks, heat of the cards, ten times a second while a cell runs
watch.py        scrapes the engine's counters and memory in a thread while a cell runs
"""
