"""Records go through CSV unchanged, and what does not fit is named."""

from __future__ import annotations

import math
import tempfile
import types
import typing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import RecordError
from harness.inert import visible
from harness.records import (
    CapacityLine,
    Cell,
    CostLine,
    Knee,
    RequestRecord,
    SweepPoint,
    TableWriter,
    header,
    read_table,
    write_table,
)

TABLES = [RequestRecord, SweepPoint, Knee, CapacityLine, CostLine, Cell]
TEXT = st.text(min_size=1, max_size=20).map(visible)
"""What has no shape is written by its number, and read as that."""


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return st.one_of(*(values(option) for option in typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        words = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
        return st.lists(words if item is str else values(item), max_size=6).map(tuple)
    return {
        str: TEXT,
        int: st.integers(-(2**63), 2**63),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


def records(kind: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})


@pytest.mark.parametrize("kind", TABLES)
def test_round_trip(kind: type[Any]) -> None:
    @given(st.lists(records(kind), max_size=3))
    @settings(max_examples=40, deadline=None)
    def check(rows: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "table.csv"
            write_table(path, rows, kind)
            assert read_table(path, kind) == rows
            with TableWriter(path, kind) as writer:
                for row in rows:
                    writer.add(row, durable=True)
            assert read_table(path, kind) == rows + rows

    check()


def test_points_begin_with_what_most_people_came_for_and_end_with_the_schema() -> None:
    names = header(SweepPoint)
    assert names[:8] == (
        "run_id", "precision", "conc", "tok_s", "p95_ms", "vram_gib", "usd_per_1m_tokens", "verdict",
    )  # fmt: skip
    assert names[-1] == "schema"


def test_missing_is_an_empty_cell(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    write_table(path, [SweepPoint("run", "awq", 8)], SweepPoint)
    row = path.read_text().splitlines()[1]
    assert row.startswith("run,awq,8,,,,,invalid,")
    assert "nan" not in row.lower() and "None" not in row


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_figure_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(RecordError, match="tok_s"):
        write_table(tmp_path / "points.csv", [SweepPoint("run", "awq", 8, tok_s=value)], SweepPoint)


def test_a_torn_last_line_is_cut_off_when_the_table_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    point = SweepPoint("run", "awq", 8, tok_s=12.5)
    write_table(path, [point], SweepPoint)
    with path.open("a") as file:
        file.write("run,awq,16,1")
    with TableWriter(path, SweepPoint) as writer:
        writer.add(replace(point, conc=32), durable=True)
    assert [row.conc for row in read_table(path, SweepPoint)] == [8, 32]


def test_a_foreign_table_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("run_id,precision,colour\na,b,c\n")
    with pytest.raises(RecordError, match="colour"):
        read_table(path, SweepPoint)


def test_a_wrong_cell_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    write_table(path, [SweepPoint("run", "awq", 8)], SweepPoint)
    path.write_text(path.read_text().replace("run,awq,8", "run,awq,eight"))
    with pytest.raises(RecordError, match="line 2: conc cannot be 'eight'"):
        read_table(path, SweepPoint)
