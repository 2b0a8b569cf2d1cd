"""The catalogue of failure modes: how each looks in a vLLM log or in the rows of a run, what it means, what to do.

Data only; `modes.py` looks for them, `docs/failure-modes.md` is generated from it. Every signature is a line that was
seen: provoked here on vLLM 0.32.0 (CPU), or taken from vLLM's source or from a public thread, which `sources` names.

A signature is a regular expression that must match at the *beginning* of a message, without the process's prefix and
the level, with or without the name of the exception. So a line that only mentions an error, a warning that quotes one
(`Found ulimit ... errors like OSError: [Errno 24]`) and the source lines of a traceback are no signs of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

When = Literal["load", "service", "any"]
"""load: it keeps the server from coming up, so a start that came up has survived it. service: only once it is up.
any: wherever it stands."""

STORM = 0.05
"""Preemptions a request from which they are a storm: p95 is the slowest 5 % of the requests, so from here on p95 is
the latency of a request that was thrown out and computed again."""
STORM_IN_LOG = 10
"""Preemptions in one line of the engine's statistics, which comes every 10 s: one a second."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way in which serving fails. `means` and `remedy` are clauses: no capital letter, no full stop."""

    id: str
    title: str
    when: When
    seen_in: tuple[str, ...]
    """Signatures; empty: it shows in the rows alone."""
    means: str
    remedy: str
    sources: tuple[str, ...]
    """Where it was seen: an excerpt in tests/logs, a file of vLLM 0.32.0, a public thread."""
    rows: str = ""
    """How it shows in points.csv, in words; empty: not at all."""
    unless: tuple[str, ...] = ()
    """Modes that explain it: it is not told where one of them was met."""


_VLLM = "https://github.com/vllm-project/vllm"

_KNOWN: tuple[Mode, ...] = (
    # --- memory, before the first answer -----------------------------------------------------------------------------
    Mode(
        "out_of_memory_at_load",
        "Out of GPU memory at load",
        "load",
        (
            r"CUDA out of memory\. Tried ",
            r"CUDA out of memory occurred when warming up",
            r"Failed to load model - not enough GPU memory",
            r"CUDA error: out of memory",
            r"Worker failed with error 'CUDA out of memory",
        ),
        "the model does not fit: weights, graphs and the first full batch need more than the card has",
        "take a quantized precision or a smaller model, lower max_num_seqs or max_model_len, or end what else uses the "
        "card",
        (
            f"{_VLLM}/issues/12529",
            f"{_VLLM}/issues/17939",
            "vllm/v1/worker/gpu_model_runner.py",
            f"{_VLLM}/issues/188",
        ),
    ),
    Mode(
        "out_of_host_memory",
        "Out of host memory",
        "any",
        (
            r"\[enforce fail at alloc_cpu\.cpp",
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
            r"MemoryError(?::|$)",
            r"\[Errno 12\] Cannot allocate memory",
            r"unable to mmap \d+ bytes",
        ),
        "the machine's own memory does not suffice: on a CPU it holds weights and KV cache, before a GPU it passes the "
        "weights on",
        "take less KV cache (kv_cache_gib) or a smaller model, end other programs, or lift the limit (ulimit -v, the "
        "container's memory)",
        ("tests/logs/out_of_host_memory.log", "tests/logs/out_of_host_memory-kv.log"),
    ),
    Mode(
        "killed_by_kernel",
        "Killed from outside, mostly by the kernel for its memory",
        "any",
        (
            r"Worker proc \S+ died unexpectedly \(exit code: -9\)",
            r".*(?:Memory cgroup out of memory|Out of memory): Kill(?:ed)? process \d+",
            r".*A process of this unit has been killed by the OOM killer",
        ),
        "a process of the engine got SIGKILL, and the kernel sends that to whoever uses most when memory runs out; the "
        "engine's own log then ends without a reason",
        "see `dmesg` for «Out of memory»; then take less KV cache, give the container more memory, or load fewer "
        "models at once",
        (
            "tests/logs/killed_by_kernel.log",
            "https://github.com/docker/for-linux/issues/1001",
            "https://github.com/ollama/ollama/issues/9322",
        ),
    ),
    Mode(
        "memory_in_use",
        "Memory held by somebody else",
        "load",
        (
            r"Free memory on device .* on startup is less than desired",
            r"Available memory on node \d+ .* is less than (?:desired|requested)",
            r"Error in memory profiling\. Initial free memory",
        ),
        "vLLM wants its share of the memory at once, and another process has some of it",
        "free memory that other processes hold (nvidia-smi), or ask for less of it (--gpu-memory-utilization)",
        (
            "tests/data/vllm_dies_util.log",
            "tests/logs/memory_in_use.log",
            "https://github.com/ovg-project/kvcached/issues/29",
            f"{_VLLM}/issues/20305",
            "vllm/v1/worker/gpu_worker.py",
        ),
    ),
    Mode(
        "kv_cache_too_small",
        "KV cache too small for max_model_len",
        "load",
        (
            r"No available memory for the cache blocks",
            r"To serve at least one request with the model's max seq len .* larger than the available KV cache memory",
            r"The model's max seq len \(\d+\) is larger than the maximum number of tokens that can be stored",
        ),
        "the KV cache is too small for one request of full length",
        "lower max_model_len (the log tells what would fit), or give it more memory (GPU: --gpu-memory-utilization; "
        "CPU: kv_cache_gib)",
        ("tests/logs/kv_cache_too_small.log", "tests/data/vllm_dies_kvsmall.log"),
    ),
    # --- what is asked for does not exist ----------------------------------------------------------------------------
    Mode(
        "context_too_long",
        "max_model_len beyond the model's own",
        "load",
        (r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len",),
        "a longer context is asked for than the model was trained for",
        "ask for a context no longer than the model was trained for",
        ("tests/data/vllm_dies_maxlen.log",),
    ),
    Mode(
        "unsupported_dtype",
        "Dtype that card, model or format does not take",
        "load",
        (
            r"Bfloat16 is only supported on GPUs with compute capability of at least",
            r"torch\.\w+ is not supported for quantization method",
            r"The model type '\w+' does not support float16",
            r"bfloat16 KV cache is not supported",
        ),
        "this card has no bfloat16 (before compute capability 8.0), or the model or its format wants another dtype",
        "serve with dtype float16, or the one that the message names; both precisions with the same",
        (
            "tests/logs/unsupported_dtype.log",
            "https://github.com/hiyouga/LlamaFactory/issues/4960",
            "vllm/platforms/cuda.py",
            "vllm/config/vllm.py",
        ),
    ),
    Mode(
        "unsupported_quantization",
        "Quantization that the engine cannot serve",
        "load",
        (
            r"Unknown quantization method",
            r"Unsupported num_bits",
            r"Unsupported quantization config: bits=",
            r"Marlin does not support (?:group_size|weight_bits)",
            r"Failed to find a kernel that can implement",
            r"Cannot find the config file for ",
            r"The (?:input|output) size is not aligned with the quantized weight shape",
        ),
        "method, bits or group size are none that this engine has a kernel for, on this card",
        "serve a format that engine and card support: awq or gptq with 4 bits and a group size of 128 runs widely",
        (
            "tests/data/vllm_dies_badquant.log",
            "tests/logs/unsupported_quantization-bits.log",
            "tests/logs/unsupported_quantization-gptq.log",
            "tests/logs/unsupported_quantization-group.log",
            "tests/logs/unsupported_quantization-nvfp4.log",
            "tests/logs/unsupported_quantization-gguf.log",
        ),
    ),
    Mode(
        "card_too_old",
        "Card too old for the quantization",
        "load",
        (
            r"The quantization method \S+ is not supported for the current GPU\. Minimum capability",
            r"\(?'?Quantization scheme is not supported for ",
            r"FP8 KV cache is not supported by the Triton attention backend",
        ),
        "the format needs a newer generation of cards",
        "take another format (bf16, or 4-bit gptq on older cards), or a card of at least the capability that it names",
        (f"{_VLLM}/issues/4327", f"{_VLLM}/issues/14040", "vllm/config/vllm.py"),
    ),
    Mode(
        "quantization_mismatch",
        "Checkpoint and --quantization disagree",
        "load",
        (r"Quantization method specified in the model config \(\S+\) does not match",),
        "the checkpoint says another format than the command line",
        "leave --quantization out: the checkpoint's own config.json says it",
        ("tests/logs/quantization_mismatch.log",),
    ),
    Mode(
        "unknown_architecture",
        "Architecture unknown to the engine",
        "load",
        (
            r"The checkpoint you are trying to load has model type",
            r"Model architectures \[.*\] (?:are not supported|failed to be inspected)",
        ),
        "this vLLM does not know the architecture",
        "take a model that it supports, or a newer vLLM (--engine-python)",
        ("tests/data/vllm_dies_badarch.log", f"{_VLLM}/blob/main/docs/usage/troubleshooting.md"),
    ),
    Mode(
        "remote_code",
        "The model brings code of its own",
        "load",
        (
            r"The repository .* contains custom code which must be executed",
            r"Failed to load the model config\. If the model is a custom model",
        ),
        "the model's configuration is Python code in its repository, and vLLM does not run that unasked",
        "read that code; then start with --trust-remote-code, or take a model that needs none",
        ("tests/logs/remote_code.log",),
    ),
    # --- files of the model ------------------------------------------------------------------------------------------
    Mode(
        "weights_missing",
        "No weights",
        "load",
        (r"Cannot find any model weights with",),
        "the directory holds no weights",
        "finish the download or the quantization",
        ("tests/data/vllm_dies_noweights.log",),
    ),
    Mode(
        "weights_torn",
        "Torn weights",
        "load",
        (
            r"Error while deserializing header",
            r"in parse_safetensors_file_metadata: MemoryError",
        ),
        "a weight file is cut off or is none: a broken download, a full disk, a Git LFS pointer",
        "compare sizes with the hub, delete that file and fetch it again (git lfs pull)",
        ("tests/logs/weights_torn.log", "tests/logs/weights_torn-pointer.log"),
    ),
    Mode(
        "weights_of_another_model",
        "Weights and config.json disagree",
        "load",
        (
            r"Following weights were not initialized from checkpoint",
            r"There is no module or parameter named",
            r"in (?:load_weights|weight_loader): .*exceeds dimension size",
        ),
        "a tensor is missing, is too many or has another shape than config.json says",
        "fetch config.json and weights from one revision; after a quantization of your own: `bench inspect`",
        (
            "tests/logs/weights_of_another_model-shape.log",
            "tests/logs/weights_of_another_model-extra.log",
            "vllm/model_executor/model_loader/default_loader.py",
        ),
    ),
    Mode(
        "config_unreadable",
        "config.json missing or torn",
        "load",
        (
            r"It looks like the config file at .* is not a valid JSON file",
            r"Invalid repository ID or local directory specified",
        ),
        "there is no model at this path, or its config.json cannot be read",
        "check the model's name or path: the directory must hold a whole config.json",
        ("tests/logs/config_unreadable-torn.log", "tests/logs/config_unreadable-missing.log"),
    ),
    Mode(
        "hub_offline",
        "The hub cannot be reached",
        "load",
        (
            r"We couldn't connect to '\S+' to load the files",
            r"An error happened while trying to locate the files? on the Hub",
            r"Cannot find an appropriate cached snapshot folder",
            r"\S+ is not a local folder and is not a valid model identifier",
            r"Cannot send a request to .*: offline mode is enabled",
        ),
        "the model is not on this machine and cannot be fetched: no network, offline mode, or a misspelt name",
        "check the model's name or path; fetch it beforehand and give the directory",
        ("tests/logs/hub_offline.log",),
    ),
    Mode(
        "gated",
        "The model wants a login",
        "load",
        (
            r"You are trying to access a gated repo",
            r"40[13] Client Error",
            r"Cannot access gated repo",
            r"Access to model \S+ is restricted",
        ),
        "this model wants a login: its owner lets in whom he has accepted",
        "ask for access on its page, then set HF_TOKEN in the environment",
        ("https://github.com/sgl-project/sglang/pull/14644", "https://github.com/McGill-NLP/llm2vec/issues/130"),
    ),
    Mode(
        "tokenizer_unreadable",
        "Tokenizer that cannot be read",
        "load",
        (
            r"Couldn't instantiate the backend tokenizer",
            r"Can't load tokenizer for",
            r"in (?:get_tokenizer|convert_to_native_format): json\.decoder\.JSONDecodeError",
        ),
        "the tokenizer's files are incomplete or torn",
        "copy the tokenizer files of the original model beside the weights",
        ("tests/logs/tokenizer_unreadable.log",),
    ),
    Mode(
        "no_chat_template",
        "No chat template",
        "any",
        (r"As of transformers v4\.44, default chat template is no longer allowed",),
        "the tokenizer says nothing about chats: completions work, every chat request is refused",
        "ask through completions, or give --chat-template with the template of the original model",
        ("https://github.com/Center-for-AI-Innovation/LLMFlux/issues/85", f"{_VLLM}/issues/39279"),
    ),
    # --- the machine -------------------------------------------------------------------------------------------------
    Mode(
        "driver_too_old",
        "Driver older than this CUDA",
        "load",
        (
            r"The NVIDIA driver on your system is too old",
            r".*UserWarning: CUDA initialization: The NVIDIA driver on your system is too old",
            r"CUDA error: the provided PTX was compiled with an unsupported toolchain",
            r"CUDA driver version is insufficient for CUDA runtime version",
            r".*system has unsupported display driver / cuda driver combination",
        ),
        "torch was built for a newer CUDA than the driver knows",
        "update the NVIDIA driver, or install the engine for the driver's CUDA (`nvidia-smi` tells it)",
        (
            f"{_VLLM}/issues/31700",
            "https://github.com/lllyasviel/Omost/issues/120",
            "https://github.com/verl-project/verl-omni/issues/133",
        ),
    ),
    Mode(
        "no_kernel_image",
        "Built for other cards than this one",
        "load",
        (r"CUDA error: no kernel image is available for execution on the device",),
        "the engine holds no machine code for this card: it is newer or older than the build",
        "take a build for this card (the RTX 50 series needs CUDA 12.8 and later), or a card that it was built for",
        (f"{_VLLM}/issues/14452", f"{_VLLM}/issues/19906"),
    ),
    Mode(
        "no_gpu",
        "No GPU to be seen",
        "load",
        (
            r"Failed to infer device type",
            r"No CUDA GPUs are available",
            r"Found no NVIDIA driver on your system",
        ),
        "this environment needs an NVIDIA GPU, and none is to be seen",
        "use the CPU one; in a container: --gpus all and the NVIDIA container toolkit",
        (f"{_VLLM}/pull/14200", f"{_VLLM}/issues/13230"),
    ),
    Mode(
        "port_in_use",
        "Port in use",
        "load",
        (r"\[Errno 98\].*[Aa]ddress already in use",),
        "somebody listens on this port, perhaps the server before",
        "leave the port out and a free one is taken; or end who holds it (ss -ltnp)",
        ("tests/data/vllm_dies_port.log",),
    ),
    Mode(
        "too_many_files",
        "Too many open files",
        "any",
        (r"\[Errno 24\] Too many open files", r".*socket: Too many open files$"),
        "each connection and each weight file is an open file, and the limit is reached",
        "raise it before the start: ulimit -n 65536",
        ("tests/logs/too_many_files.log",),
    ),
    Mode(
        "disk_full",
        "Disk or shared memory full",
        "any",
        (r"\[Errno 28\] No space left on device",),
        "no room for the download, the compile cache, or in a container's /dev/shm",
        "free disk space (df -h); in a container: --ipc=host or --shm-size=1g",
        ("https://github.com/OptimalScale/LMFlow/issues/160",),
    ),
    Mode(
        "broken_installation",
        "Broken installation",
        "load",
        (
            r"ModuleNotFoundError: No module named",
            r"ImportError: ",
            r"OSError: \S+: cannot open shared object",
            r"_C::\w+\(\) expected at most 0 argument",
        ),
        "a library of the engine's environment is missing or of another version, or it was built without this operator",
        "reinstall it: bench engine install cpu|cuda",
        ("tests/logs/broken_installation.log", "https://github.com/zai-org/GLM-4/issues/510"),
    ),
    Mode(
        "wrong_flag",
        "Flag that the engine does not take",
        "load",
        (
            r"\S+: error: (?:unrecognized arguments|argument |expected one argument|ambiguous option)",
            r"max_num_batched_tokens \(\d+\) is smaller than",
        ),
        "this vLLM does not know a flag or its value, or two of them contradict each other",
        "check the extra arguments against `--help` of this version",
        (
            "tests/logs/wrong_flag.log",
            "tests/logs/wrong_flag-value.log",
            "tests/logs/wrong_flag-contradiction.log",
        ),
    ),
    # --- in service --------------------------------------------------------------------------------------------------
    Mode(
        "out_of_memory_in_service",
        "Out of GPU memory in service",
        "service",
        (
            r"CUDA out of memory\. Tried ",
            r"CUDA error: out of memory",
            r"Worker failed with error 'CUDA out of memory",
        ),
        "what is served does not fit: a batch needed more than was measured when the engine started, or another "
        "process took memory since; the engine is down",
        "lower --gpu-memory-utilization by 0.05, or max_num_seqs and max_num_batched_tokens, and leave nothing else on "
        "the card",
        (
            "https://github.com/noonghunna/club-3090/issues/58",
            f"{_VLLM}/issues/7073",
            f"{_VLLM}/issues/11251",
        ),
    ),
    Mode(
        "native_crash",
        "Crash in native code",
        "any",
        (
            r"Fatal Python error: (?:Segmentation fault|Illegal instruction|Bus error|Floating-point|Aborted)",
            r"!+ Segfault encountered !+",
            r"Worker proc \S+ died unexpectedly \(exit code: -(?:4|6|7|8|11)\)",
        ),
        "the engine's native code crashed: a kernel, an instruction that this processor lacks, or (bus error) a full "
        "/dev/shm",
        "try another precision or a newer engine, and report it with this log",
        ("tests/data/vllm_dies_illegal.log", "tests/logs/native_crash.log"),
    ),
    Mode(
        "cuda_error",
        "CUDA error in a kernel",
        "any",
        (
            r"CUDA error: an illegal memory access was encountered",
            r"CUDA error: (?:unspecified launch failure|device-side assert triggered|misaligned address)",
            r"Error in model execution: CUDA error: an illegal memory access",
            r".*NVRM: Xid \([^)]*\): (?:13|31|43|45)\b",
        ),
        "a kernel read or wrote where it must not; the card's context is lost and the engine goes down",
        "start it again; if it comes back: another attention backend or kernel, --enforce-eager, a newer engine",
        (
            "https://github.com/SystemPanic/vllm-windows/issues/72",
            f"{_VLLM}/issues/6976",
            f"{_VLLM}/issues/11366",
        ),
    ),
    Mode(
        "card_lost",
        "The card is gone",
        "any",
        (
            r".*NVRM: Xid \([^)]*\): 79\b",
            r".*GPU has fallen off the bus",
            r"CUDA error: unknown error",
            r".*GPU is lost",
        ),
        "the driver no longer reaches the card: heat, power supply, riser or slot",
        "reboot; then check power and cooling, and lower the power limit (nvidia-smi -pl) before serving again",
        (
            "https://github.com/NVIDIA/NVSentinel/issues/155",
            "https://github.com/NVIDIA/open-gpu-kernel-modules/issues/507",
        ),
    ),
    Mode(
        "engine_hung",
        "The engine hangs",
        "service",
        (
            r"RPC call to \w+ timed out",
            r"No available shared memory broadcast block found in \d+ seconds?",
        ),
        "a worker does not answer: a kernel that never ends, a machine that swaps, a stopped process; after "
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS the engine gives up",
        "see what the worker does (py-spy, nvidia-smi, vmstat), keep the machine from swapping, start it again",
        ("tests/logs/engine_hung.log", f"{_VLLM}/issues/37250"),
    ),
    Mode(
        "engine_died",
        "The engine died in service",
        "service",
        (
            r"\[shutdown\] MPClient: engine core exited unexpectedly",
            r"EngineCore encountered a fatal error",
            r"Worker proc \S+ died unexpectedly",
            r"MQLLMEngine is already dead",
            r"Engine core proc \S+ died unexpectedly",
        ),
        "the engine's core ended while it served, and every request in it failed; its log does not say why",
        "read the lines above and the kernel's log (`dmesg`); start it again under a supervisor",
        (
            "tests/logs/engine_died.log",
            "https://github.com/intel/llm-scaler/issues/154",
            f"{_VLLM}/issues/12233",
        ),
        rows="a reason `engine_died` or `engine_restarted`",
        unless=(
            "out_of_memory_in_service",
            "out_of_host_memory",
            "killed_by_kernel",
            "native_crash",
            "cuda_error",
            "card_lost",
            "engine_hung",
            "too_many_files",
            "disk_full",
        ),
    ),
    Mode(
        "preemption_storm",
        "Preemption storm",
        "any",
        (
            r"Engine \d+: .*Preemptions: (?P<preemptions>\d+),",
            r"Sequence group \S+ is preempted by .* total_num_cumulative_preemption=(?P<preemptions>\d+)",
        ),
        "the KV cache is full, requests are thrown out and computed again: latency jumps, it does not rise",
        "fewer users at once (max_num_seqs), shorter contexts, or more KV cache: a quantized precision leaves more",
        (
            "vllm/v1/metrics/loggers.py",
            f"{_VLLM}/pull/6102",
            "https://github.com/GAIR-NLP/LIMO/issues/29",
        ),
        rows=f"`preemptions` is at least {100 * STORM:.0f} % of `requests`",
    ),
    Mode(
        "kv_cache_full",
        "KV cache full",
        "service",
        (r"Engine \d+: .*Waiting: [1-9]\d* reqs.* KV cache usage: (?:9[5-9]|100)\.\d%",),
        "the next sequence has to wait until another ends, or to evict one",
        "stay below this load; fewer users at once, shorter contexts, or more KV cache",
        ("tests/logs/kv_cache_full.log", "vllm/v1/metrics/loggers.py"),
        rows="`kv_usage_peak` is 95 % or more, or some request was preempted",
        unless=("preemption_storm",),
    ),
    Mode(
        "queueing",
        "More waiting than served",
        "service",
        (r"Engine \d+: .*Running: (?P<running>\d+) reqs, Waiting: (?P<waiting>\d+) reqs",),
        "as many requests wait as are served, so a new one waits as long as it is then served",
        "this is past the knee: fewer users, more cards, or (if the KV cache has room) a higher max_num_seqs",
        ("tests/logs/queueing.log", f"{_VLLM}/pull/37307"),
        rows="`waiting_peak` is at least `running_peak`",
        unless=("preemption_storm", "kv_cache_full"),
    ),
    Mode(
        "corrupted",
        "NaN in the logits",
        "service",
        (r"Engine \d+: .*Corrupted: [1-9]\d* reqs",),
        "the model computed NaN, and what it answers is noise: an overflow in float16, broken scales, bad memory",
        "serve in bfloat16; measure the checkpoint with `bench quality`; quantize it again",
        ("vllm/v1/metrics/loggers.py",),
    ),
    Mode(
        "slow_kernel",
        "Slow kernel",
        "any",
        (
            r"Layer '\S*' is not supported by \w*AWQMarlin\. Falling back to unoptimized AWQ kernels",
            r"Your GPU does not have native support for FP[48] computation but FP[48] quantization is being used",
            r"\w+ quantization is not fully optimized yet\. The speed can be slower",
            r"Currently, the 4-bit gptq_gemm kernel for GPTQ is buggy",
        ),
        "a quantized layer runs without the fast kernel of its format: it saves memory and may be slower than BF16",
        "take a format with a fast kernel on this card (4 bits, group size 128, widths that are multiples of 128)",
        (
            f"{_VLLM}/pull/13119",
            f"{_VLLM}/issues/31387",
            f"{_VLLM}/issues/4359",
            "vllm/model_executor/layers/quantization/auto_awq.py",
        ),
        rows="a reason `slow_kernel`",
    ),
    Mode(
        "throttled",
        "Throttled card",
        "service",
        (),
        "the card slows itself down for heat or for its power supply: what it did cold it does not keep up",
        "cool it, clean it, give it air or a better power supply, then measure again",
        ("docs.nvidia.com/deploy/nvml-api: nvmlClocksEventReasons",),
        rows="a reason `throttled`: `throttled_share` above 5 % of the samples",
    ),
    Mode(
        "requests_failed",
        "Requests failed",
        "service",
        (),
        "requests ended without an answer: time-outs, refusals or broken connections",
        "see `error` in requests.csv and the engine's log at that time",
        ("harness/records.py, RequestRecord.error",),
        rows="a reason `errors`",
    ),
)

MODES: tuple[Mode, ...] = (
    *_KNOWN,
    Mode(
        "start_failed",
        "The start failed without a known reason",
        "load",
        (
            r"Engine core initialization failed",
            r"WorkerProc initialization failed due to an exception in a background process",
        ),
        "a process of the engine ended while it started; where no other exception stands above, it was killed, and the "
        "kernel kills for memory",
        "read the first exception above this line; without one see `dmesg` for «Out of memory»",
        ("tests/logs/start_failed.log",),
        unless=tuple(mode.id for mode in _KNOWN if mode.when != "service"),
    ),
)

SILENT: tuple[tuple[str, str, str], ...] = (
    (
        "Preemptions",
        "vLLM 0.32.0 sets its count back to zero before it writes its line of statistics (`_update_stats`, "
        "vllm/v1/metrics/loggers.py). 48 users of 960 tokens in a KV cache of 0.012 GiB: 115 preemptions by "
        "`/metrics`, none in the log, and a cache that reads 81 to 90 % full, for its blocks are large",
        "from the engine's counters, in every cell",
    ),
    (
        "NaN in every logit",
        "answered with status 200 and an empty text; with VLLM_COMPUTE_NANS_IN_LOGITS=1 the log still says "
        "«Corrupted: 0 reqs», for the same reason",
        "by `bench failures`, which reads the answers",
    ),
    (
        "A tensor missing in the checkpoint",
        "`model.layers.1.mlp.down_proj.weight` was taken out: the server came up and answered with what happened to be "
        "in memory",
        "by `bench quality` against the model that it comes from",
    ),
    (
        "No tokenizer",
        "without tokenizer.json and its configuration the server came up; every answer had status 200 and no text",
        "by `bench failures`, which reads the answers",
    ),
    (
        "No chat template",
        "each chat request is refused with status 400; older versions log it, 0.32.0 does not",
        "as `requests_failed`: requests.csv names the error",
    ),
)
"""Failures that vLLM 0.32.0 does not log, provoked here: (what, what was seen, how it is found all the same)."""
