"""Reads Nsight Systems: what `nsys export --type sqlite` writes, directly.

Tables and columns are those of the exporter's schema reference (docs.nvidia.com, Nsight Systems, "SQLite Export Schema
Reference"); times are in ns. A table is there only when something is in it, and columns come and go with versions:

    CUPTI_ACTIVITY_KIND_KERNEL       start end streamId correlationId demangledName or shortName [globalPid]
    CUPTI_ACTIVITY_KIND_MEMCPY       start end streamId correlationId [copyKind] [globalPid]
    CUPTI_ACTIVITY_KIND_MEMSET       start end streamId correlationId [globalPid]
    CUPTI_ACTIVITY_KIND_RUNTIME      start end globalTid correlationId: the calls behind them
    NVTX_EVENTS                      start end eventType globalTid text or textId: the engine's marks
    StringIds                        id value
    CUPTI_ACTIVITY_KIND_GRAPH_TRACE  whole graphs in place of their kernels

The kernels of a CUDA graph (graphNodeId) carry the correlation of the call that launched the graph, so they need
nothing of their own; a recording that has graphs in place of their kernels is refused. Correlations count anew in each
process, so the process is part of the key where the kernels tell it (globalPid).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from harness.errors import InputError
from harness.telemetry.kernels import Range, Recording, instant, ordered, projected, timed

MAGIC = b"SQLite format 3\0"

_KERNELS, _COPIES, _FILLS = (f"CUPTI_ACTIVITY_KIND_{name}" for name in ("KERNEL", "MEMCPY", "MEMSET"))
_CALLS, _GRAPHS = "CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
_MARKS, _STRINGS = "NVTX_EVENTS", "StringIds"

_NS_IN_US = 1e3
_RANGES = (59, 60)
"""eventType: NvtxPushPopRange and NvtxStartEndRange."""
_COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}
"""CUpti_ActivityMemcpyKind, without those of CUDA arrays."""
_THREAD_BITS = 24
"""A globalTid is a globalPid with the thread in its lowest bits ("Serialized process and thread identifiers")."""

_Tables = Mapping[str, Collection[str]]
"""Each table with its columns."""
_Key = tuple[int | None, int]
"""Process and correlation."""


def read(path: Path) -> Recording:
    """The launches and marks of an export. Raises InputError naming the file and what is missing in it."""
    with _opened(path) as base:
        tables = _tables(base)
        if _KERNELS not in tables:
            raise _no_kernels(path, tables)
        if _GRAPHS in tables and base.execute(f"SELECT 1 FROM {_GRAPHS} LIMIT 1").fetchone():
            raise _unusable(path, "it holds CUDA graphs in place of their kernels", "add --cuda-graph-trace=node")
        spans: list[tuple[str, float, float]] = []
        lanes: list[str] = []
        keys: list[_Key] = []
        for name, start, end, stream, process, correlation in _launched(base, tables, path):
            spans.append((name, instant(start / _NS_IN_US), instant(end / _NS_IN_US)))
            lanes.append(f"stream {stream}")
            keys.append((process, correlation))
        calls = _calls(base, tables, path)
        ranges = list(_ranges(base, tables, path))
    launches = timed(spans, lanes)
    return Recording("gpu", "nsys", ordered(launches), projected(ranges, launches, [calls.get(key) for key in keys]))


def rewrite(source: Path, target: Path) -> None:
    """An export as it may be shown: the tables that `read` takes, and of the strings only those that they name.

    An export also holds the machine's name, and the environment and command lines of what ran, keys included.
    """
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with _opened(source) as base:
            tables = _tables(base)
            base.execute("ATTACH ? AS kept", (str(partial),))
            for name in (_KERNELS, _COPIES, _FILLS, _CALLS, _GRAPHS, _MARKS):
                if name in tables:
                    base.execute(f"CREATE TABLE kept.{name} AS SELECT * FROM main.{name}")
            if _STRINGS in tables:
                named = [
                    f"SELECT {column} FROM main.{table}"
                    for table, columns in ((_KERNELS, ("demangledName", "shortName")), (_MARKS, ("textId",)))
                    for column in columns
                    if column in tables.get(table, ())
                ]
                wanted = " UNION ".join(named) or "NULL"
                base.execute(f"CREATE TABLE kept.{_STRINGS} AS SELECT * FROM main.{_STRINGS} WHERE id IN ({wanted})")
            base.commit()
            base.execute("DETACH kept")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


# --- tables -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, read only; whatever SQLite says against it becomes an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)) as base:
            yield base
    except sqlite3.Error as error:
        raise _unusable(path, f"SQLite says: {error}", "export it again") from error
    except (TypeError, ValueError) as error:  # any column of SQLite's takes anything
        raise _unusable(path, f"a cell holds what its column should not ({error})", "export it again") from error


def _tables(base: sqlite3.Connection) -> _Tables:
    names = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    return {name: {row[1] for row in base.execute(f'PRAGMA table_info("{name}")')} for name in names}


def _launched(
    base: sqlite3.Connection, tables: _Tables, path: Path
) -> Iterator[tuple[str, int, int, int, int | None, int]]:
    """Name, start, end, stream, process and correlation of all that ran on the card."""
    for table in (_KERNELS, _COPIES, _FILLS):
        if table not in tables:
            continue
        columns = tables[table]
        _check(path, table, columns, ("start", "end", "streamId", "correlationId"))
        process = "globalPid" if "globalPid" in columns else "NULL"
        what = "''"
        if table == _KERNELS:
            named = [column for column in ("demangledName", "shortName") if column in columns]
            if not named or _STRINGS not in tables:
                raise _unusable(path, f"{table} names no kernels", "export it again")
            found = [f"(SELECT value FROM {_STRINGS} WHERE id = {column})" for column in named]
            what = f"coalesce({', '.join(found)}, '')"
        elif table == _COPIES and "copyKind" in columns:
            what = "copyKind"
        chosen = f'SELECT {what}, start, "end", streamId, {process}, correlationId FROM {table} ORDER BY start, "end"'
        for told, *rest in base.execute(chosen):
            start, end, stream, pid, correlation = rest
            yield _name(table, told), start, end, stream, None if pid is None else pid >> _THREAD_BITS, correlation


def _name(table: str, told: object) -> str:
    if table == _KERNELS:
        return str(told)
    if table == _FILLS:
        return "[CUDA memset]"
    kind = _COPY_KINDS.get(told) if isinstance(told, int) else None
    return f"[CUDA memcpy {kind}]" if kind else "[CUDA memcpy]"


def _calls(base: sqlite3.Connection, tables: _Tables, path: Path) -> dict[_Key, tuple[str, float]]:
    """Thread and time of each call. Without the table (CUDA's calls were not traced) there are no marks either."""
    if _CALLS not in tables:
        return {}
    _check(path, _CALLS, tables[_CALLS], ("start", "globalTid", "correlationId"))
    told = "globalPid" in tables[_KERNELS]
    found = {}
    for start, thread, correlation in base.execute(f"SELECT start, globalTid, correlationId FROM {_CALLS}"):
        process = thread >> _THREAD_BITS if told else None
        found[process, correlation] = (str(thread), instant(start / _NS_IN_US))
    return found


def _ranges(base: sqlite3.Connection, tables: _Tables, path: Path) -> Iterator[Range]:
    """NVTX ranges of a thread that have ended; their text stands in the row or among the strings."""
    if _MARKS not in tables:
        return
    columns = tables[_MARKS]
    _check(path, _MARKS, columns, ("start", "end", "eventType", "globalTid"))
    texts = [column for column in ("text",) if column in columns]
    if "textId" in columns and _STRINGS in tables:
        texts.append(f"(SELECT value FROM {_STRINGS} WHERE id = textId)")
    text = f"coalesce({', '.join([*texts, 'NULL', 'NULL'])})"
    chosen = f'SELECT {text}, globalTid, start, "end" FROM {_MARKS} WHERE eventType IN (?, ?) ORDER BY start'
    for name, thread, start, end in base.execute(chosen, _RANGES):
        if name is not None and end is not None and thread is not None:
            yield Range(str(name), str(thread), instant(start / _NS_IN_US), instant(end / _NS_IN_US))


# --- errors -----------------------------------------------------------------------------------------------------------


def _check(path: Path, table: str, columns: Collection[str], needed: Iterable[str]) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        raise _unusable(path, f"{table} has no {', '.join(missing)}", "export it with a current version of nsys")


def _no_kernels(path: Path, tables: _Tables) -> InputError:
    if _GRAPHS in tables:
        return _unusable(path, "it holds CUDA graphs in place of their kernels", "add --cuda-graph-trace=node")
    if _STRINGS in tables:
        return _unusable(path, "no kernel ran while it was recorded", "trace CUDA, and a generation: --trace=cuda,nvtx")
    return _unusable(path, f"it has no table {_KERNELS}", "give what `nsys export --type sqlite` wrote")


def _unusable(path: Path, problem: str, remedy: str) -> InputError:
    return InputError(f"{path}: no export of Nsight Systems that can be read: {problem}.", remedy=remedy)
