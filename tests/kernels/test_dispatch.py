"""The dispatch table: what it says, what it may say, and how measurements become one."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantize.errors import InputError
from quantize.kernels import bench_dispatch, dispatch, operators
from quantize.kernels.bench_rows import Row
from quantize.kernels.dispatch import Limits

CARD = 'NVIDIA "Test" RTX\\1'


def row(method: str, tokens: int, latency_us: float, layer: str = "o_proj") -> Row:
    return Row(
        CARD, "m", layer, 64, 128, 4, 128, "bf16", tokens, method, 1, 3, latency_us, latency_us, latency_us, 1.0, 0.5,
        1.0, 0.001, 900.0, 80.0,
    )  # fmt: skip


def rows(times: dict[int, tuple[float | None, float | None, float]], layer: str = "o_proj") -> list[Row]:
    """tokens -> latencies of gemv, gemm, expand; None: not measured."""
    return [
        row(method, tokens, latency, layer)
        for tokens, three in times.items()
        for method, latency in zip(("gemv", "gemm", "expand"), three, strict=True)
        if latency is not None
    ]


@pytest.mark.parametrize(
    ("tokens", "kernel"), [(1, "gemv"), (8, "gemv"), (9, "gemm"), (64, "gemm"), (65, "expand"), (4096, "expand")]
)
def test_the_shipped_default_is_what_the_kernels_were_made_for(tokens: int, kernel: str) -> None:
    assert dispatch.choose(dispatch.read(dispatch.TABLE)["default"], tokens) == kernel


def test_the_shipped_table_says_that_nobody_measured_it() -> None:
    table = tomllib.loads(dispatch.TABLE.read_text())
    assert list(table) == ["default"]
    assert table["default"]["measured"].startswith("no")


def test_the_most_that_a_table_may_say_is_what_the_kernels_take() -> None:
    assert dispatch.MOST == {"gemv": operators.GEMV_TOKENS, "gemm": operators.GEMM_TOKENS}


@pytest.mark.parametrize(
    ("limits", "tokens", "kernel"),
    [
        (Limits(4, 48), 4, "gemv"),
        (Limits(4, 48), 5, "gemm"),
        (Limits(4, 48), 49, "expand"),
        (Limits(0, 48), 1, "gemm"),
        (Limits(8, 0), 9, "expand"),
        (Limits(0, 0), 1, "expand"),
    ],
)
def test_each_limit_is_the_last_number_of_tokens_served(limits: Limits, tokens: int, kernel: str) -> None:
    assert dispatch.choose(limits, tokens) == kernel


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table with one card, named by the environment; torch says that it is here, with capability 9.0."""
    file = tmp_path / "d.toml"
    file.write_text('[default]\ngemv = 8\ngemm = 64\n[card."Here"]\ngemv = 2\ngemm = 32\n')
    monkeypatch.setenv("KNEEBENCH_DISPATCH", str(file))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dispatch.limits.cache_clear()
    return file


def test_a_card_has_its_own_limits_or_the_default(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.limits(torch.device("cuda", 0)) == Limits(2, 32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Elsewhere")
    assert dispatch.limits(torch.device("cuda", 1)) == Limits(8, 64)
    dispatch.limits.cache_clear()


def test_a_card_without_the_instructions_has_no_gemm(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert dispatch.limits(torch.device("cuda", 0)) == Limits(2, 0)
    dispatch.limits.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[default]\ngemv = 8\n",
        "[default]\ngemv = 9\ngemm = 64\n",
        "[default]\ngemv = 8\ngemm = 65\n",
        "[default]\ngemv = -1\ngemm = 64\n",
        "[default]\ngemv = true\ngemm = 64\n",
        "[default]\ngemv = 8.0\ngemm = 64\n",
        "[default]\ngemv = 8\ngemm = 64\n[card.X]\ngemv = 1\n",
        "card = 3\n[default]\ngemv = 8\ngemm = 64\n",
        "not toml",
    ],
)
def test_a_table_with_a_fault_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "d.toml"
    file.write_text(text)
    with pytest.raises(InputError, match="the dispatch table .*d.toml.* Allowed: .default. and .card.NAME."):
        dispatch.read(file)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        dispatch.read(tmp_path / "absent.toml")


# --- from measurements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "limits"),
    [
        # gemv first to 8, gemm ahead of expand to 64
        ({1: (1, 3, 9), 8: (2, 3, 9), 16: (None, 4, 9), 64: (None, 8, 9), 128: (None, None, 9)}, Limits(8, 64)),
        # gemv loses at 4; that it wins again at 8 is no reason to take it there
        ({1: (1, 3, 9), 4: (4, 3, 9), 8: (2, 3, 9), 16: (None, 9, 8)}, Limits(1, 8)),
        # gemm loses at 16; at 64 it is not looked at
        ({1: (1, 3, 9), 16: (None, 9, 8), 64: (None, 7, 8)}, Limits(1, 0)),
        # no gemm on this card
        ({1: (1, None, 9), 8: (2, None, 9), 16: (None, None, 9)}, Limits(8, 0)),
        # expand is best throughout
        ({1: (5, 6, 4), 8: (5, 6, 4)}, Limits(0, 0)),
        # gemm from the first token
        ({1: (5, 3, 4), 32: (None, 3, 4)}, Limits(0, 32)),
        # as quick: the one that reads least
        ({1: (3, 3, 3), 16: (None, 3, 3)}, Limits(1, 16)),
    ],
)  # fmt: skip
def test_limits_by_hand(times: dict[int, tuple[float | None, float | None, float]], limits: Limits) -> None:
    assert bench_dispatch.limits(rows(times)) == limits


def test_layers_count_alike_however_large_they_are() -> None:
    """gemv takes 1 and 400 us, gemm 3 and 300 us. Their products are 400 and 900, so gemv is ahead by geometric mean,
    though its sum, 401, is beyond gemm's 303."""
    small = rows({1: (1, 3, 9)}, "o_proj")
    large = rows({1: (400, 300, 900)}, "down_proj")
    assert bench_dispatch.limits([*small, *large]) == Limits(1, 0)


def test_a_kernel_that_did_not_do_every_layer_is_not_taken() -> None:
    both = [*rows({1: (1, 3, 9)}, "o_proj"), *rows({1: (None, 3, 9)}, "down_proj")]
    assert bench_dispatch.limits(both) == Limits(0, 1)


def test_nothing_is_concluded_without_expand() -> None:
    with pytest.raises(InputError, match="no rows of expand at 1 tokens"):
        bench_dispatch.limits([row("gemv", 1, 1.0)])


def test_what_is_written_is_read_back_and_other_cards_stay(tmp_path: Path) -> None:
    file = tmp_path / "d.toml"
    measured = rows({1: (1, 3, 9), 8: (2, 3, 9), 16: (None, 4, 9), 64: (None, 10, 9)})
    assert bench_dispatch.write(measured, file) == Limits(8, 16)
    assert dispatch.read(file) == {"default": Limits(8, 64), CARD: Limits(8, 16)}
    other = [replace(one, device="Other") for one in rows({1: (5, 3, 9)})]
    bench_dispatch.write(other, file)
    assert dispatch.read(file) == {"default": Limits(8, 64), CARD: Limits(8, 16), "Other": Limits(0, 1)}
    entry = tomllib.loads(file.read_text())["card"][CARD]
    assert entry["measured"] == "m; bf16, 4 bits in groups of 128; copy 900 GB/s, matmul 80 TFLOP/s"
    before = file.read_bytes()
    bench_dispatch.write(other, file)
    assert file.read_bytes() == before
