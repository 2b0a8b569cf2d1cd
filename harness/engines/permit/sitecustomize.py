"""Runs in every Python process of the engine (this folder stands on its PYTHONPATH): asks for the AMX tile registers.

Linux gives a process the tiles of Intel AMX only after it has asked for them, once; touching them before is SIGILL.
vLLM 0.32's own kernels for CPUs (INT4 matmul, attention) use tiles wherever the processor has them and never ask. They
work by luck when oneDNN asked earlier for a matrix of its own; otherwise the first request kills the worker without a
word (seen with the demo model in AWQ and in BF16; larger models had asked through oneDNN). The permission does not
survive exec, so each of vLLM's processes has to ask: hence here and not in the starter.

arch_prctl(2): ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18; kernel documentation, arch/x86/xstate.
"""

import ctypes
import platform
import sys

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

if sys.platform == "linux" and platform.machine() == "x86_64":
    # Without AMX, or on an older kernel, this is an error code that nobody needs.
    ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
