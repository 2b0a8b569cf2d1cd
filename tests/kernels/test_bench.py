"""`bench kernels`: what it measures, computes, writes and refuses; the whole command on a CPU with a small model.

No time is asserted on. Errors are held against float64 products computed here, arithmetic against cases by hand.
"""

import csv
import json
import re
import statistics
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.kernels import bench, bench_figure, bench_layers, bench_page, bench_rows, fallback, peers
from quantize.kernels.bench_clock import CpuClock, ceiling, clock
from quantize.kernels.bench_layers import Layer, Shape
from quantize.kernels.bench_rows import HEADER, Block, Conditions, Row
from quantize.kernels.peers import Method, Unfit

CPU = torch.device("cpu")
CONDITIONS = Conditions("A card", 4, 64, "bf16", 200e9, 50e12)
SHAPE = Shape("tiny", "o_proj", 48, 128)
METHODS = ["fallback gemv", "fallback gemm", "fallback expand", "fallback linear", "16 bit", "torch int4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one block: 4 query and 2 key-value heads of 32, so that qkv is (4 + 2 + 2) 32 = 256 wide."""
    config = {
        "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny|<b>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SMALL = ["--device", "cpu", "--tokens", "1,9,65", "--runs", "2", "--group-size", "64", "--ceiling-size", "128"]


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves. Its sets are of one layer: 10 kB of integers are asked for."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "MEGABYTE", 10_000)
        assert bench.main([*SMALL, "--models", str(model), "--set-mb", "1", "--out", str(out)]) == 0
    return out


def layers(count: int = 1, bits: int = 4, group_size: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Layer]:
    least = count * SHAPE.n * SHAPE.k * bits // 8
    return list(bench_layers.rotated(SHAPE, bits, group_size, dtype, CPU, least, seed=3))


# --- the command ------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_every_finished_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth product is never timed: three rows are on disk, and a page can be made of them."""
    passes = CpuClock.passes
    timed: list[int] = []

    def interrupted(self: CpuClock, calls: Sequence[Callable[[], Tensor]], runs: int) -> list[float]:
        if len(timed) == 2 + 3:  # both ceilings, and three products
            raise KeyboardInterrupt
        timed.append(runs)
        return passes(self, calls, runs)

    monkeypatch.setattr(CpuClock, "passes", interrupted)
    monkeypatch.setattr(bench, "MEGABYTE", 10_000)
    out = tmp_path / "out"
    assert bench.main([*SMALL, "--models", str(model), "--set-mb", "1", "--out", str(out)]) == 130
    assert "every finished row" in capsys.readouterr().err
    assert len(bench_rows.read(out / "kernels.csv")) == 3
    assert bench.main(["--from", str(out / "kernels.csv")]) == 0
    assert "tiny" in (out / "kernels.md").read_text(encoding="utf-8")


def test_the_table_has_a_row_for_each_layer_method_and_number_of_tokens_it_takes(run: Path) -> None:
    with (run / "kernels.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert tuple(table[0]) == HEADER
    found = {(row["layer"], row["n"], row["k"], row["method"], row["tokens"]) for row in table}
    takes = {name: ["1", "9", "65"] for name in METHODS} | {"fallback gemv": ["1"], "fallback gemm": ["1", "9"]}
    sizes = [("qkv_proj", "256", "128"), ("o_proj", "128", "128"), ("gate_up_proj", "384", "128")]
    wanted = {(*size, name, tokens) for size in sizes for name in METHODS for tokens in takes[name]}
    # 192 inputs in groups of 64
    wanted |= {("down_proj", "128", "192", name, tokens) for name in METHODS for tokens in takes[name]}
    assert found == wanted
    assert len(table) == len(wanted)
    for row in table:
        assert float(row["latency_us_q1"]) <= float(row["latency_us"]) <= float(row["latency_us_q3"])
        assert float(row["latency_us"]) > 0
        assert row["runs"] == "2"
        assert "threads" in row["device"]


def test_the_error_column_is_against_float64(run: Path) -> None:
    """Layers and x made again from the seeds; the product in numpy's float64."""
    for row in bench_rows.read(run / "kernels.csv"):
        if row.method not in ("fallback gemv", "16 bit", "torch int4"):
            continue
        shape = Shape(row.model, row.layer, row.n, row.k)
        first = next(bench_layers.rotated(shape, 4, 64, torch.bfloat16, CPU, 10_000, seed=0))
        generator = torch.Generator().manual_seed(row.tokens)
        x = torch.randn(row.tokens, row.k, generator=generator).bfloat16()
        q, scales, zeros = (part.double().numpy() for part in (first.q, first.scales, first.zeros))
        weights = (q - np.repeat(zeros, 64, axis=1)) * np.repeat(scales, 64, axis=1)
        exact = x.double().numpy() @ weights.T
        (method,) = [one for one in peers.methods(CPU, 4) if one.name == row.method]
        result = method.make(first)(x).double().numpy()
        assert row.error == pytest.approx(np.linalg.norm(result - exact) / np.linalg.norm(exact), rel=1e-9)
        assert 0 < row.error < 0.005


def test_the_page_says_that_it_is_a_cpu_and_what_the_ceilings_are(run: Path) -> None:
    text = (run / "kernels.md").read_text()
    assert "Measured on a CPU: `fallback` is the torch code" in text
    assert "GB/s, bf16 matmul" in text
    assert "## tiny\\|\\<b\\>" in text  # the directory's name, without a meaning
    assert "- torch: 2." in text
    assert "| tokens | fallback gemv | fallback gemm |" in text
    assert text.count("**") == 2 * 3  # one quickest method for each number of tokens


def test_the_figure_is_a_picture(run: Path) -> None:
    data = (run / "kernels.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 300
    assert len(data) > 10_000


def test_the_ceiling_is_said_before_the_rows(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MEGABYTE", 10_000)
    options = ["--models", str(model), "--set-mb", "1", "--no-peers", "--out", str(tmp_path / "o")]
    assert bench.main([*SMALL, *options, "--bits", "8", "--dtype", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "copy" in lines[0] and "fp16 matmul" in lines[0]
    assert "stand in for the kernels" in lines[1]
    assert "qkv_proj 256 x 128" in lines[2]
    rows = bench_rows.read(tmp_path / "o" / "kernels.csv")
    assert {row.bits for row in rows} == {8, 16}
    assert {row.method for row in rows} == set(METHODS) - {"torch int4"}


def test_page_and_figure_are_drawn_from_the_table_alone(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "kernels.csv"
    table.write_bytes((run / "kernels.csv").read_bytes())
    assert bench.main(["--from", str(table)]) == 0
    assert (tmp_path / "kernels.png").read_bytes() == (run / "kernels.png").read_bytes()
    again = (tmp_path / "kernels.md").read_text()
    assert (run / "kernels.md").read_text().startswith(again.rstrip())  # all but what the table does not hold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no CUDA GPU here.* --device cpu times the torch functions"),
        (["--device", "cpu", "--write-dispatch", "d.toml"], "--write-dispatch with --device cpu"),
        (["--device", "cpu", "--models", "qwen9"], "--models qwen9. Allowed: a config.json, its directory, or one of "),
        (["--from", "absent.csv"], "absent.csv"),
    ],
)
def test_what_cannot_be_served_ends_with_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(options) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: ")
    assert re.search(message, said)


def test_a_directory_that_holds_a_measurement_is_not_written_over(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "kernels.csv").read_bytes()
    assert bench.main([*SMALL, "--out", str(run)]) == 2
    assert "which holds a kernels.csv" in capsys.readouterr().err
    assert (run / "kernels.csv").read_bytes() == before


@pytest.mark.parametrize("option", [["--tokens", "0,1"], ["--tokens", ""], ["--runs", "0"], ["--bits", "3"]])
def test_options_out_of_range_are_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--device", "cpu", *option])
    assert ended.value.code == 2


# --- layers -----------------------------------------------------------------------------------------------------------


def test_known_shapes_are_those_that_vllm_runs() -> None:
    """Qwen2.5 7B: hidden 3584, 28 query and 4 key-value heads of 128, intermediate 18944.
    qkv: (28 + 2 x 4) 128 = 4608; gate and up: 2 x 18944 = 37888."""
    assert bench_layers.shapes("qwen2.5-7b") == [
        Shape("qwen2.5-7b", "qkv_proj", 4608, 3584),
        Shape("qwen2.5-7b", "o_proj", 3584, 3584),
        Shape("qwen2.5-7b", "gate_up_proj", 37888, 3584),
        Shape("qwen2.5-7b", "down_proj", 3584, 18944),
    ]


def test_a_shape_may_be_called_as_elsewhere() -> None:
    assert bench_layers.shapes("shape:qwen2.5-0.5b") == bench_layers.shapes("qwen2.5-0.5b")


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(InputError, match="config.json"):
            bench_layers.shapes(str(file))


def test_a_set_is_as_large_as_asked_and_of_different_layers() -> None:
    """48 x 128 values of 4 bits are 3072 bytes: 9217 bytes take a fourth layer."""
    made = list(bench_layers.rotated(SHAPE, 4, 64, torch.bfloat16, CPU, 9217, seed=0))
    assert len(made) == 4
    assert len({layer.q.numpy().tobytes() for layer in made}) == 4
    again = list(bench_layers.rotated(SHAPE, 4, 64, torch.bfloat16, CPU, 9217, seed=0))
    assert all(torch.equal(a.q, b.q) and torch.equal(a.scales, b.scales) for a, b in zip(made, again, strict=True))
    other = next(bench_layers.rotated(SHAPE, 4, 64, torch.bfloat16, CPU, 9217, seed=1))
    assert not torch.equal(other.q, made[0].q)


def test_a_shape_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="o_proj of m, 48 x 96, in groups of 64"):
        next(bench_layers.rotated(Shape("m", "o_proj", 48, 96), 4, 64, torch.bfloat16, CPU, 1, 0))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, -1), (8, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_is_stored_as_the_weights_it_has(bits: int, group_size: int, dtype: torch.dtype) -> None:
    (layer,) = layers(1, bits, group_size, dtype)
    assert int(layer.q.max()) == 2**bits - 1 and int(layer.q.min()) == 0
    exact = layer.weights(torch.float64)
    group = 0 if group_size == -1 else 100 // group_size
    assert exact[5, 100] == (int(layer.q[5, 100]) - int(layer.zeros[5, group])) * float(layer.scales[5, group])
    assert torch.equal(layer.weights(dtype), exact.to(dtype))
    assert torch.equal(fallback.dequantize(layer.stored), exact.to(dtype))


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_method_here_multiplies_by_the_layer(dtype: torch.dtype, group_size: int) -> None:
    (layer,) = layers(1, 4, group_size, dtype)
    x = torch.randn(5, SHAPE.k, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ layer.weights(torch.float64).T
    for method in peers.methods(CPU, 4):
        assert bench.relative_error(method.make(layer)(x), exact) < (0.004 if dtype == torch.bfloat16 else 0.0005)


def test_on_a_gpu_the_names_are_the_kernels_and_the_peers_are_asked_for() -> None:
    names = [method.name for method in peers.methods(torch.device("cuda"), 4)]
    assert names[:5] == ["gemv", "gemm", "expand", "linear", "16 bit"]
    assert set(names[5:]) == {"torch int4", "vLLM Marlin", "vLLM Machete", "vLLM AWQ", "gemlite"}
    assert [method.name for method in peers.methods(torch.device("cuda"), 8)] == names[:5]


@pytest.mark.parametrize("make", [peers._marlin, peers._awq, peers._gemlite])
def test_a_peer_that_is_not_installed_says_so(make: Callable[[Layer], peers.Product]) -> None:
    with pytest.raises(Unfit, match="(vllm|gemlite) is not installed"):
        make(layers()[0])


def measured(method: Method, tokens: Sequence[int] = (1,), count: int = 1) -> bench.Found:
    found = bench.Found()
    list(bench.measure(CpuClock(), CONDITIONS, SHAPE, layers(count), method, tokens, 2, found))
    return found


def dense(layer: Layer) -> peers.Product:
    weights = layer.weights(torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weights)


def test_a_method_that_fails_is_left_out_with_its_reason_and_the_rest_goes_on() -> None:
    def refuse(layer: Layer) -> peers.Product:
        raise Unfit("only for another card")

    def burst(layer: Layer) -> peers.Product:
        def product(x: Tensor) -> Tensor:
            if len(x) == 2:
                raise RuntimeError("no kernel image\nmore lines")
            return dense(layer)(x)

        return product

    assert measured(Method("a", refuse)).left_out == {("a", "only for another card"): None}
    found = measured(Method("b", burst), (1, 2, 3))
    assert [row.tokens for row in found.rows] == [1, 3]
    assert found.left_out == {("b", "o_proj of tiny, 2 tokens: RuntimeError: no kernel image"): None}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * 1.03,
        lambda y: torch.cat((y[:, 1:], y[:, :1]), dim=1),
        lambda y: y.index_fill(1, torch.tensor([7]), torch.nan),
        lambda y: torch.zeros_like(y),
    ],
)
def test_a_method_that_is_wrong_has_no_time(spoil: Callable[[Tensor], Tensor]) -> None:
    def make(layer: Layer) -> peers.Product:
        return lambda x: spoil(dense(layer)(x))

    found = measured(Method("wrong", make))
    assert not found.rows
    ((name, reason),) = found.left_out
    assert name == "wrong" and "a relative error of" in reason


def test_each_layer_of_a_set_is_multiplied_once_a_pass() -> None:
    """Two passes and a first call to warm up; before that one call for the error."""
    called: list[int] = []

    def make(layer: Layer) -> peers.Product:
        number = len(made)
        made.append(layer)

        def product(x: Tensor) -> Tensor:
            called.append(number)
            return dense(layer)(x)

        return product

    made: list[Layer] = []
    found = measured(Method("counted", make), (4,), count=3)
    assert called == [0, 0, 0, 1, 2, 0, 1, 2]
    assert found.rows[0].layers == 3


def test_a_method_is_not_given_more_tokens_than_it_takes() -> None:
    assert [row.tokens for row in measured(Method("few", dense, most=2), (1, 2, 3)).rows] == [1, 2]


# --- the clock --------------------------------------------------------------------------------------------------------


def test_a_pass_calls_each_once_and_is_timed_each_time() -> None:
    called: list[str] = []
    times = CpuClock().passes([lambda: called.append("a"), lambda: called.append("b")], runs=3)
    assert called == ["a", *["a", "b"] * 3]
    assert len(times) == 3 and min(times) > 0


def test_the_ceilings_are_bytes_and_operations_over_time() -> None:
    """A clock that takes a quarter of a second for whatever it is given. size 64: a copy reads and writes 8 x 64^2
    numbers of 2 bytes, 128 KiB in all: 512 KiB/s; a product is 2 x 64^3 = 524288 operations, 2097152 a second."""

    class Fixed(CpuClock):
        def passes(self, calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
            for call in calls:
                call()
            return [0.5, 0.25, 0.75][:runs]

    assert ceiling(Fixed(), torch.bfloat16, size=64) == (512 * 2**10, 2097152)


def test_a_gpu_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="add --device cpu"):
        clock("cuda")
    assert clock("cpu").device == CPU


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_bytes_that_cannot_be_avoided_by_hand() -> None:
    """48 x 128 in 4 bits: 3072. Two groups of 64 a row: 96 scales of 2 bytes and zero points of half a byte: 240.
    x and y of 3 tokens: 3 x (48 + 128) x 2 = 1056. In all 4368. In 16 bits: 12288 + 1056; one group a row: 120."""
    assert bench_rows.least_bytes(SHAPE, 3, 4, 64) == 4368
    assert bench_rows.least_bytes(SHAPE, 3, 16, 64) == 13344
    assert bench_rows.least_bytes(SHAPE, 3, 4, -1) == 3072 + 120 + 1056
    assert bench_rows.least_bytes(SHAPE, 3, 8, 64) == 6144 + 96 * 3 + 1056


def test_a_row_by_hand() -> None:
    """Passes of 10, 30, 20, 40 and 50 us over two layers: median 30, so 15 us a product; quartiles 20 / 2 and 40 / 2.
    4368 bytes in 15 us: 0.2912 GB/s, of 200 GB/s 0.001456. 2 x 3 x 48 x 128 = 36864 operations: 0.0024576 TFLOP/s."""
    found = bench_rows.row(CONDITIONS, SHAPE, 3, "gemv", 4, [1e-5, 3e-5, 2e-5, 4e-5, 5e-5], 2, 0.001)
    assert (found.latency_us, found.latency_us_q1, found.latency_us_q3) == pytest.approx((15, 10, 20))
    assert (found.gb_s, found.share_of_copy, found.tflop_s) == pytest.approx((0.2912, 0.001456, 0.0024576))
    assert (found.layers, found.runs, found.copy_gb_s, found.matmul_tflop_s) == (2, 5, 200, 50)
    assert (found.device, found.model, found.tokens, found.bits) == ("A card", "tiny", 3, 4)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0], [9.0, 1.0, 7.0, 2.0, 8.0, 3.0]])
def test_quantiles_are_numpy_s(values: list[float]) -> None:
    for share in (0.25, 0.5, 0.75):
        assert bench_rows.quantile(values, share) == pytest.approx(np.quantile(values, share))
    assert bench_rows.quantile(values, 0.5) == statistics.median(values)


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [a_row("gemv", 1, 7.123456789012345), replace(a_row("gemm", 2, 1e-7), model='a,"b"\nc')]
    bench_rows.write(rows, tmp_path / "k.csv")
    assert bench_rows.read(tmp_path / "k.csv") == rows


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(HEADER) + "\n" + ",".join("x" * len(HEADER)) + "\n"])
def test_another_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.csv").write_text(text)
    with pytest.raises(InputError, match="k.csv.*Allowed: the kernels.csv of `bench kernels`"):
        bench_rows.read(tmp_path / "k.csv")


def a_row(method: str, tokens: int, latency_us: float, layer: str = "o_proj", gb_s: float = 100.0) -> Row:
    return Row(
        "A card", "tiny", layer, 48, 128, 4, 64, "bf16", tokens, method, 1, 3, latency_us, latency_us, latency_us,
        gb_s, gb_s / 200, 1.0, 0.001, 200.0, 50.0,
    )  # fmt: skip


def test_a_block_is_the_sum_of_its_layers_by_hand() -> None:
    """10 us at 100 GB/s and 30 us at 20 GB/s: 1 MB and 0.6 MB in 40 us are 40 GB/s, 0.2 of the copy's 200. A method
    that did one layer of two has no block."""
    rows = [
        a_row("gemv", 1, 10, "o_proj", 100),
        a_row("gemv", 1, 30, "down_proj", 20),
        a_row("gemm", 1, 5, "o_proj", 100),
    ]
    (block,) = bench_rows.blocks(rows)
    assert block == Block("tiny", 1, "gemv", 40, pytest.approx(0.2))


def test_the_page_by_hand() -> None:
    rows = [
        a_row("gemv", 1, 10, gb_s=150),
        a_row("16 bit", 1, 30, gb_s=190),
        a_row("16 bit", 9, 40, gb_s=120),
        replace(a_row("x|<i>", 9, 1234.5, gb_s=1), error=0.0034),
    ]
    text = bench_page.page(rows, {"torch": "2.0"}, [("vLLM *AWQ*", "not [here]")])
    assert "A card: copy 200 GB/s, bf16 matmul 50.00 TFLOP/s" in text
    assert "| tokens | gemv | 16 bit | x\\|\\<i\\> |" in text
    assert "| 1 | **10.0 (75%)** | 30.0 (95%) |  |" in text
    assert "| 9 |  | **40.0 (60%)** | 1,234.5 (0%) |" in text
    assert "| x\\|\\<i\\> | 3.4e-03 |" in text
    assert "- vLLM \\*AWQ\\*: not \\[here\\]" in text
    assert "Measured on a CPU" not in text


def test_the_figure_draws_what_the_rows_say() -> None:
    rows = [a_row("gemv", 1, 10, gb_s=150), a_row("gemv", 2, 12, gb_s=140), a_row("gemlite", 1, 11, gb_s=130)]
    figure = bench_figure.make(rows)
    left, right = figure.axes
    lines = {line.get_gid(): line for axes in (left, right) for line in axes.lines}
    assert lines["latency_us gemv"].get_xydata().tolist() == [[1, 10], [2, 12]]
    assert lines["share_of_copy gemv"].get_xydata().tolist() == [[1, 0.75], [2, 0.7]]
    assert lines["share_of_copy gemlite"].get_xydata().tolist() == [[1, 0.65]]
    assert lines["latency_us gemv"].get_linewidth() > lines["latency_us gemlite"].get_linewidth()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gemv", "gemlite"]
