"""The run folder: atomic files, a lock, the status record, and the environment it was made in."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict  # pydantic takes the standard library's from Python 3.12 on only

from suffix_analysis.environment import peak_gib
from suffix_analysis.errors import UsageError, UserError
from suffix_analysis.records import SCHEMA_VERSION, Suffix

RecordT = TypeVar("RecordT")


class StageState(TypedDict):
    """A stage in status.json: ``done`` or ``interrupted``, and the seconds that all attempts took."""

    state: str
    seconds: float


class Status(TypedDict):
    """status.json."""

    schema_version: int
    state: str
    stages: dict[str, StageState]
    peak_gib: float


# what a stage is not done without, so that a file that was deleted is made again
FILES = {
    "prompts": ("prompts.jsonl",),
    "attack": ("suffixes.jsonl",),
    "campaign": ("suffixes.jsonl", "findings/campaign.parquet"),
    "replies": ("findings/replies.parquet", "findings/refusal.parquet"),
    "direction": ("direction.safetensors", "findings/candidates.parquet", "findings/interventions.parquet"),
    "analysis": ("findings/top_heads.parquet", "findings/summary.json", "findings/checks.json"),
}
# settings of where a run is worked on, which may change from one part of it to the next
ELSEWHERE = ("executor", "address", "attack_cpus", "attack_gpus", "device")


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
    """Let ``fill`` write a temporary file beside ``path``, then move it there."""
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
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run the stage again.") from error


def read_as(path: Path, kind: Any) -> Any:
    """Read JSON that must be a ``kind``, any type that pydantic knows.

    Raises:
        UserError: missing, damaged, or something else.
    """
    return _as(kind, read_json(path), str(path))


def _as(kind: Any, value: Any, where: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
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
    """Add one line to a journal; it is on the disk when this returns."""
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
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if journal and number == len(lines):  # no newline after it: the write was cut off
                break
            how = "remove it and run again" if journal else "delete the file and run again"
            raise UserError(f"{path}: line {number} is damaged ({error.msg}); {how}.") from error
        _as(like, row, f"{path}: line {number}")
        rows.append(row)
    return rows


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as parquet."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    replace_with(path, lambda scratch: pyarrow.parquet.write_table(table, scratch))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read parquet as rows.

    Raises:
        UserError: missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run the stage again.") from error


def write_suffixes(path: Path, suffixes: Sequence[Suffix]) -> None:
    """Write suffix records as JSONL."""
    write_jsonl(path, [asdict(suffix) for suffix in suffixes])


def read_suffixes(path: Path) -> list[Suffix]:
    """Read suffix records.

    Raises:
        UserError: missing, damaged, or of another layout.
    """
    return read_records(path, Suffix)


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Read records of a dataclass from JSONL.

    Raises:
        UserError: missing, damaged, or of another layout.
    """
    return [_as(kind, row, f"{path}: line {n}") for n, row in enumerate(read_jsonl(path), 1)]


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a run folder was made with.

    Raises:
        UsageError: it is no run folder, or its settings are damaged.
    """
    try:
        return tomllib.loads((folder / "config.toml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{folder} is no run folder (its config.toml cannot be read: {error}).") from error


@contextlib.contextmanager
def open_run(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a run folder: make it, or check that it was made by the same settings, and lock out other processes.

    Raises:
        UsageError: the folder belongs to other settings or is no run folder.
        UserError: another process works in it, or it cannot be written.
    """
    import tomli_w

    # TOML knows neither None nor tuples
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if v is not None}
    config = folder / "config.toml"
    if config.exists():
        there = read_config(folder)
        keys = (there.keys() | settings.keys()) - set(ELSEWHERE)
        changed = sorted(key for key in keys if there.get(key) != settings.get(key))
        if changed:
            key = changed[0]
            raise UsageError(
                f"{folder} was made with {key} = {there.get(key)!r}, not {settings.get(key)!r}; use those settings or "
                "another folder (--out)."
            )
    elif folder.exists() and (not folder.is_dir() or any(not _begun(path) for path in folder.iterdir())):
        raise UsageError(f"{folder} exists and is not a run folder; choose another with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as handle:
            _lock(handle, folder)
            if not config.exists():
                write_atomic(config, tomli_w.dumps(settings))
            yield
    except ConnectionError:  # a closed pipe behind progress or results, among others: not the folder's fault
        raise
    except OSError as error:
        told = error.strerror or error
        if error.filename is not None and not Path(error.filename).absolute().is_relative_to(folder.absolute()):
            raise UserError(f"{error.filename} cannot be used: {told}.") from error
        raise UserError(f"{folder} cannot be used: {told}; choose another with --out.") from error


def _begun(path: Path) -> bool:
    """Whether a file is what a process leaves that was stopped before it had written the settings."""
    return path.name.startswith((".lock", ".config.toml"))


def _lock(handle: Any, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no fcntl; two processes are then the user's own care
        return
    except BlockingIOError as error:
        raise UserError(f"Another process is working in {folder}; wait for it or choose another --out.") from error


def status(folder: Path) -> Status:
    """The status record; an empty one for a new folder."""
    path = folder / "status.json"
    if path.exists():
        found: Any = read_json(path)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version is not None and version != SCHEMA_VERSION:
            raise UserError(
                f"{folder} was written with schema_version {version}, this is {SCHEMA_VERSION}; "
                "run it again in a new folder."
            )
        known: Status = _as(Status, found, str(path))
        return known
    return {"schema_version": SCHEMA_VERSION, "state": "running", "stages": {}, "peak_gib": 0.0}


def add_seconds(folder: Path, name: str, seconds: float, state: str = "interrupted") -> None:
    """Record a stage's state, ``done`` when its files are complete. Seconds of interrupted attempts add up."""
    now = status(folder)
    before = now["stages"][name]["seconds"] if name in now["stages"] else 0.0
    now["stages"][name] = {"state": state, "seconds": round(before + seconds, 2)}
    now["peak_gib"] = max(now["peak_gib"], round(peak_gib(), 2))
    write_json(folder / "status.json", dict(now))


def set_state(folder: Path, state: str) -> None:
    """Record the run's state: running, partly done or done."""
    now = status(folder)
    now["state"] = state
    write_json(folder / "status.json", dict(now))


def is_done(folder: Path, name: str) -> bool:
    """Whether a stage has finished in this folder and its files are still there."""
    stages = status(folder)["stages"]
    return (
        name in stages
        and stages[name]["state"] == "done"
        and all((folder / own).exists() for own in FILES.get(name, ()))
    )
