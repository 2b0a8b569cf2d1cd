"""`python -m quantize.kernels`, which `bench kernels` is too: bench.py."""

import sys

from quantize.kernels.bench import main

if __name__ == "__main__":
    sys.exit(main())
