"""A run folder → one validated record. The only reader of run folders in this package."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from reports.errors import ReportError
from reports.schema import COLUMNS, SCHEMA_VERSION, Check, Pattern, Prompt, Status, Step, Suffix, Summary

Row = dict[str, Any]
RecordT = TypeVar("RecordT", bound=BaseModel)

MISSING_MEANS = {
    "suffixes": "suffixes.jsonl – the suffixes themselves",
    "steps": "steps.jsonl – the loss curve of the attack",
    "status": "status.json – the state and timing of the stages",
    "env": "env.json – versions and hardware",
    "replies": "findings/replies.parquet – the replies and their verdicts",
    "refusal": "findings/refusal.parquet – the refusal phrase rate per arm",
    "contrasts": "findings/contrasts.parquet – paired differences between arms",
    "interventions": "findings/interventions.parquet – ablating and adding the direction",
    "candidates": "findings/candidates.parquet – the candidate directions",
    "profile": "findings/profile.parquet – the projection by layer",
    "heads": "findings/heads.parquet – contributions of all heads",
    "top_heads": "findings/top_heads.parquet – the heads chosen on the select split",
    "shift": "findings/shift.parquet – the attention of the top heads",
    "carried": "findings/carried.parquet – what carries the fall in projection",
    "factors": "findings/factors.parquet – why the instruction counts less",
    "causal": "findings/causal.parquet – the causal tests",
    "lens": "findings/lens.parquet – the refusal score read along the depth",
    "logits": "findings/logits.parquet – what is written to the refusal tokens' logits",
    "sweep": "findings/sweep.parquet – the effect of ablating every head alone",
    "circuit": "findings/circuit.parquet – paths into the top heads",
    "patterns": "findings/patterns.json – attention patterns of real prompts",
    "checks": "findings/checks.json – identities and controls",
}
"""What the page lacks when a file is not there."""


@dataclass(frozen=True)
class RunData:
    """One run as read from its folder; tables are lists of rows, absent ones empty and named in ``missing``."""

    name: str
    config: str
    summary: Summary
    prompts: tuple[Prompt, ...]
    suffixes: tuple[Suffix, ...] = ()
    steps: tuple[Step, ...] = ()
    status: Status | None = None
    env: Row = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    patterns: tuple[Pattern, ...] = ()
    checks: tuple[Check, ...] = ()
    missing: tuple[str, ...] = ()

    def table(self, name: str) -> list[Row]:
        """Return the rows of a findings table, or none where the file is missing."""
        return self.tables.get(name, [])


def read_run(run: Path) -> RunData:
    """Read and validate a run folder.

    Raises ReportError where the folder, config.toml, prompts.jsonl or findings/summary.json is missing, where any file
    is truncated, foreign or of another schema version. Other missing files are named in the result's ``missing``.
    """
    run = Path(run)
    if not run.is_dir():
        raise ReportError(f"No run folder at {run}: give the folder that `suffix-analysis run` made.")
    findings = run / "findings"
    summary = _read_summary(findings / "summary.json")
    prompts = _read_lines(run / "prompts.jsonl", Prompt, required=True)
    config = _read_text(run / "config.toml", required=True) or ""
    status = _read_record(run / "status.json", Status)
    if status is not None and status.schema_version is not None:
        _check_version(status.schema_version, run / "status.json")
    env = _read_json(run / "env.json")
    if env is not None and not isinstance(env, dict):
        raise ReportError(f"{run / 'env.json'} holds no JSON object: restore it, or delete it to do without.")
    tables = {name: _read_table(findings / f"{name}.parquet", columns) for name, columns in COLUMNS.items()}
    suffixes = _read_lines(run / "suffixes.jsonl", Suffix)
    steps = _read_lines(run / "steps.jsonl", Step)
    patterns = _read_list(findings / "patterns.json", Pattern)
    for pattern in patterns or ():
        _check_pattern(pattern, findings / "patterns.json")
    checks = _read_list(findings / "checks.json", Check)
    found: dict[str, object] = {
        "suffixes": suffixes,
        "steps": steps,
        "status": status,
        "env": env,
        **tables,
        "patterns": patterns,
        "checks": checks,
    }
    return RunData(
        name=run.resolve().name,
        config=config,
        summary=summary,
        prompts=prompts or (),
        suffixes=suffixes or (),
        steps=steps or (),
        status=status,
        env=env or {},
        tables={name: rows for name, rows in tables.items() if rows is not None},
        patterns=patterns or (),
        checks=checks or (),
        missing=tuple(name for name in MISSING_MEANS if found[name] is None),
    )


def _read_text(path: Path, *, required: bool = False) -> str | None:
    """Return a file's text, None where it is absent and may be."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise ReportError(f"{path} is missing: is this a run folder, and did its first stage finish?") from None
        return None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text (byte {error.start}): repeat the stage that wrote it.") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): check the folder's permissions.") from None


def _parse(text: str, where: str) -> Any:
    """Return parsed JSON, or say where it broke."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        position = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ReportError(f"{where} is not complete JSON{position}: repeat the stage that wrote it.") from None


def _read_json(path: Path) -> Any:
    text = _read_text(path)
    return None if text is None else _parse(text, str(path))


def _check_version(version: object, path: Path) -> None:
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema_version {version!r}, this report reads {SCHEMA_VERSION}: "
            "use the suffix-analysis version that made the run, or run it again."
        )


def _read_summary(path: Path) -> Summary:
    """Read findings/summary.json; its version is looked at before anything else in it."""
    text = _read_text(path)
    if text is None:
        raise ReportError(f"{path} is missing: run `suffix-analysis analyze` on this folder first.")
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ReportError(f"{path} holds no JSON object: repeat the analyze stage.")
    _check_version(data.get("schema_version"), path)
    summary = _validated(Summary, data, str(path))
    if summary.direction and not 0 <= summary.direction.layer <= summary.n_layers:
        raise ReportError(
            f"{path}: direction.layer is {summary.direction.layer}, the model has layers 0 to {summary.n_layers - 1}: "
            "repeat the direction stage."
        )
    return summary


def _validated(model: type[RecordT], data: Any, where: str) -> RecordT:
    """Return the record, or name the first wrong value in one sentence."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole record"
        shown = repr(first.get("input"))[:60]
        raise ReportError(
            f"{where}: {key} is wrong ({first['msg'].lower()}, found {shown}): repeat the stage that wrote it."
        ) from None


def _read_record(path: Path, model: type[RecordT]) -> RecordT | None:
    data = _read_json(path)
    return None if data is None else _validated(model, data, str(path))


def _read_list(path: Path, model: type[RecordT]) -> tuple[RecordT, ...] | None:
    data = _read_json(path)
    if data is None:
        return None
    if not isinstance(data, list):
        raise ReportError(f"{path} holds no JSON list: repeat the stage that wrote it.")
    return tuple(_validated(model, item, f"{path}, record {number}") for number, item in enumerate(data))


def _read_lines(path: Path, model: type[RecordT], *, required: bool = False) -> tuple[RecordT, ...] | None:
    """Read a JSON-lines file; splits at newline only, since U+2028 may stand inside a string."""
    text = _read_text(path, required=required)
    if text is None:
        return None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return tuple(_validated(model, _parse(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in lines)


def _read_table(path: Path, columns: Sequence[str]) -> list[Row] | None:
    """Return a parquet table's rows with NaN as None; None where the file is absent."""
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        rows: list[Row] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ReportError(f"{path} is not a readable parquet file ({reason}): repeat the analyze stage.") from None
    lacking = [column for column in columns if column not in table.column_names]
    if lacking:
        raise ReportError(f"{path} lacks the column {lacking[0]!r}: repeat the analyze stage with this version.")
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[key] = None
    _check_types(rows, columns, path)
    return rows


_TEXT = {
    "arm", "split", "kind", "measure", "against", "intervention", "region", "verdict", "reply", "token", "status",
    "term", "factor", "task", "metric", "test", "heads", "on", "run", "detector", "defence",
}  # fmt: skip
_FREE = {"prompt_id", "suffix_id", "refused"}


def _check_types(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Refuse tables whose columns have another type than the schema's: text, number, or free."""
    for column in columns:
        if column in _FREE:
            continue
        wanted: tuple[type, ...] = (str,) if column in _TEXT else (int, float)
        for row in rows:
            value = row[column]
            if value is not None and not isinstance(value, wanted):
                kind = "text" if column in _TEXT else "a number"
                raise ReportError(
                    f"{path}: column {column!r} holds {str(value)[:40]!r} where {kind} was expected: "
                    "repeat the analyze stage."
                )


def _check_pattern(pattern: Pattern, path: Path) -> None:
    """Refuse a pattern whose parts do not fit together: tokens, regions, heads × dest × src."""
    size, heads = len(pattern.tokens), len(pattern.heads)
    fits = (
        len(pattern.regions) == size
        and len(pattern.attention) == heads
        and all(len(head) == size and all(0 < len(row) <= size for row in head) for head in pattern.attention)
        and all(len(row) == size for row in pattern.contribution)
        and len(pattern.contribution) in (0, heads)
    )
    if not fits:
        raise ReportError(
            f"{path}: the pattern of prompt {pattern.prompt_id!r} in arm {pattern.arm!r} does not have {heads} heads "
            f"over {size} tokens throughout: repeat the analyze stage."
        )
