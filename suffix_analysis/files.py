"""Files that are whole or not there: JSON, JSON lines, parquet; written atomically, checked when they are read."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from suffix_analysis.errors import UserError, first_line

RecordT = TypeVar("RecordT")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either the old one or the whole new one.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def fill(scratch: Path) -> None:
        scratch.write_bytes(data)

    replace_with(path, fill)


def replace_with(path: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a temporary file beside ``path``, then move it there.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            fill(Path(scratch))
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; free space or choose --out.") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers that are not finite become null."""
    write_atomic(path, json.dumps(_plain(value), ensure_ascii=True, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; run the stage that makes it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it and run the stage again.") from error


def read_as(path: Path, kind: Any) -> Any:
    """Read JSON that must be a ``kind``, any type that pydantic knows.

    Raises:
        UserError: missing, damaged, or something else.
    """
    return _as(kind, read_json(path), str(path))


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _as(kind: Any, value: Any, where: str, *, strict: bool = False) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        told = f"{at}: {first['msg']}" if at else first["msg"]
        raise UserError(
            f"{where} holds something else than this tool writes ({told}); delete it and run again."
        ) from error


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line, all at once."""
    write_atomic(path, "".join(json.dumps(_plain(row)) + "\n" for row in rows))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a journal; it is on the disk when this returns.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(_plain(row)) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; free space or choose --out.") from error


def read_jsonl(path: Path, *, journal: bool = False, like: Any = dict[str, Any]) -> list[dict[str, Any]]:
    """Read a finished file, or a ``journal``, whose last line a crash may have cut off; that line is left out.

    Rows come as they stand; each must hold what ``like``, any type that pydantic knows, asks for.

    Raises:
        UserError: missing, damaged (a journal: before its last line), or a row of another kind.
    """
    rows = []
    for number, row in _lines(path, journal):
        _as(like, row, f"{path}: line {number}", strict=True)
        rows.append(row)
    return rows


def open_journal(path: Path, like: Any) -> list[dict[str, Any]]:
    """What a journal holds so far, with a last line that was cut off taken out of it, so that lines can be added.

    Raises:
        UserError: see `read_jsonl`.
    """
    if not path.exists():
        return []
    rows = read_jsonl(path, journal=True, like=like)
    write_jsonl(path, rows)
    return rows


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Read records of a dataclass from JSONL.

    Raises:
        UserError: missing, damaged, or of another layout.
    """
    return [_as(kind, row, f"{path}: line {number}") for number, row in _lines(path)]


def _lines(path: Path, journal: bool = False) -> Iterator[tuple[int, Any]]:
    """What each line that is not blank holds, with its number."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if journal and number == len(lines):  # no newline after it: the write was cut off
                return
            how = "remove it and run again" if journal else "delete the file and run again"
            raise UserError(f"{path}: line {number} is damaged ({first_line(error)}); {how}.") from error
        yield number, row


def write_tensors(path: Path, tensors: dict[str, Any], meta: dict[str, str]) -> None:
    """Write tensors as safetensors.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        replace_with(path, lambda scratch: save_file(tensors, scratch, metadata=meta))
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"{path} cannot be written: {error}; free space or choose --out.") from error


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as parquet."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    replace_with(path, lambda scratch: pyarrow.parquet.write_table(table, scratch))


def read_table(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read parquet as rows.

    Raises:
        UserError: missing, damaged, or without one of the columns that it ``needs``.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: bytes that are no UTF-8
        raise UserError(f"{path} cannot be read ({error}); delete it and run the stage again.") from error
    lacking = [name for name in needs if name not in table.column_names]
    if lacking:
        raise UserError(f"{path} has no column {lacking[0]}; delete it and run the stage again.")
    return rows
