# kneebench on a machine with NVIDIA cards. How to build and run it: docs/container.md.
#
# The base has nvcc, which compiles the kernels of NAME@kneebench. vLLM, gigabytes that seldom change, is a layer below
# kneebench, seconds that often do.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${CUDA_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv python3-dev g++ bubblewrap \
    && rm -rf /var/lib/apt/lists/*

# Never root. `docker run --user` may name anybody: these directories are open to all, and sticky, as /tmp is.
RUN useradd --create-home --uid 10001 bench \
    && install --directory --owner bench /opt/kneebench \
    && install --directory --owner bench --mode 1777 /cache /cache/kneebench /cache/huggingface /work /home/bench
USER bench
ENV HOME=/home/bench \
    USER=bench \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/kneebench/venv/bin:$PATH

# The engine, where `bench engine install cuda` looks for it; a test holds the version to the one that it installs.
# pip's configuration is a secret of the build: which index it names stays out of the image.
ARG VLLM=vllm==0.32.0
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 \
    python3 -m venv /cache/kneebench/engines/cuda \
    && /cache/kneebench/engines/cuda/bin/python -m pip install ${VLLM}

# kneebench, which then finds the engine there, sees that it imports, and marks it as ready.
COPY --chown=bench . /opt/kneebench/source
RUN --mount=type=secret,id=pip,target=/etc/pip.conf,mode=0444 \
    python3 -m venv /opt/kneebench/venv \
    && /opt/kneebench/venv/bin/python -m pip install "/opt/kneebench/source[quantize,tasks]" \
    && bench engine install cuda

VOLUME ["/cache/huggingface", "/work"]
WORKDIR /work
ENTRYPOINT ["bench"]
CMD ["--help"]
