"""A run folder → one validated record. The only reader of run folders in this package."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from reports.errors import ReportError, again
from reports.schema import COLUMNS, SCHEMA_VERSION, Check, Pattern, Prompt, Status, Step, Suffix, Summary
from reports.tables import check_pattern, usable_rows

Row = dict[str, Any]
RecordT = TypeVar("RecordT", bound=BaseModel)
ReadT = TypeVar("ReadT")

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
    "terms": "findings/terms.parquet – what every layer writes along the direction",
    "profile": "findings/profile.parquet – the projection by layer",
    "heads": "findings/heads.parquet – contributions of all heads",
    "top_heads": "findings/top_heads.parquet – the heads chosen on the select split",
    "shift": "findings/shift.parquet – the attention of the top heads",
    "carried": "findings/carried.parquet – what carries the fall in projection",
    "factors": "findings/factors.parquet – why the instruction counts less",
    "causal": "findings/causal.parquet – the causal tests",
    "mechanism_contrasts": "findings/mechanism_contrasts.parquet – the mechanism beside its controls",
    "lens": "findings/lens.parquet – the refusal score read along the depth",
    "logits": "findings/logits.parquet – what is written to the refusal tokens' logits",
    "sweep": "findings/sweep.parquet – the effect of ablating every head alone",
    "circuit": "findings/circuit.parquet – paths into the top heads",
    "patterns": "findings/patterns.json – attention patterns of real prompts",
    "checks": "findings/checks.json – identities and controls",
}
"""What the page lacks when a file is not there."""


def missing_lines(data: RunData) -> list[str]:
    """Return what the run lacks, a line for each file, with the reason where it is there and cannot be used."""
    names = [*data.missing, *(name for name in data.unusable if name not in data.missing)]
    lines = []
    for name in names:
        means = MISSING_MEANS.get(name, f"findings/{name}.parquet")
        path = re.escape(means.split(" – ")[0])
        reason = re.sub(f"^not used: {path}[ ,:]*", "not used: ", data.unusable.get(name, ""))
        lines.append(f"{means} – {reason}" if reason else means)
    return lines


@dataclass(frozen=True)
class RunData:
    """One run as read from its folder; tables are lists of rows, absent ones empty and named in ``missing``.

    ``unusable`` says why, where a file is there and cannot be used, or not all of it; ``place`` is the folder's path as
    it was given.
    """

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
    unusable: dict[str, str] = field(default_factory=dict)
    place: str = ""

    def settings(self) -> Row:
        """Return config.toml as it was written, or nothing where it is no TOML any more."""
        try:
            return tomllib.loads(self.config)
        except (tomllib.TOMLDecodeError, RecursionError):
            return {}

    def table(self, name: str) -> list[Row]:
        """Return the rows of a findings table, or none where the file is missing."""
        return self.tables.get(name, [])


def read_run(run: Path) -> RunData:
    """Read and validate a run folder.

    Raises ReportError where the folder, config.toml, prompts.jsonl or findings/summary.json is missing or cannot be
    used, or the run is of another schema version. Other files that are missing, truncated or foreign are named in the
    result's ``missing``, with the reason in ``unusable``.
    """
    run = Path(run)
    if not run.is_dir():
        raise ReportError(f"No run folder at {run}: give the folder that `suffix-analysis run` made.")
    findings = run / "findings"
    summary = _read_summary(findings / "summary.json")
    prompts = _read_lines(run / "prompts.jsonl", Prompt, required=True)
    config = _read_text(run / "config.toml", required=True) or ""
    unusable: dict[str, str] = {}

    def tried(name: str, read: Callable[[], ReadT]) -> ReadT | None:
        """What is read, or None and the reason: one bad file takes its own part of the report, not all of it."""
        try:
            return read()
        except ReportError as error:
            unusable[name] = f"not used: {str(error).replace(f'{run}/', '')}"
            return None

    status = tried("status", lambda: _read_record(run / "status.json", Status))
    if status is not None and status.schema_version is not None:
        _check_version(status.schema_version, run / "status.json")
    env = tried("env", lambda: _read_object(run / "env.json"))
    tables = {name: tried(name, partial(_read_table, findings / f"{name}.parquet", name)) for name in COLUMNS}
    suffixes = tried("suffixes", lambda: _read_lines(run / "suffixes.jsonl", Suffix))
    steps = tried("steps", lambda: _read_steps(run / "steps.jsonl", unusable))
    patterns = tried("patterns", lambda: _read_patterns(findings / "patterns.json"))
    checks = tried("checks", lambda: _read_list(findings / "checks.json", Check))
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
        unusable=unusable,
        place=str(run),
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
        raise ReportError(f"{path} is not UTF-8 text (byte {error.start}): {again(path)}") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): check the folder's permissions.") from None


def _parse(text: str, where: str) -> Any:
    """Return parsed JSON, or say where it broke."""
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN and Infinity are missing values here
    except (ValueError, RecursionError) as error:
        position = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ReportError(f"{where} is not complete JSON{position}: {again(where)}") from None


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
        if (path.parent / "campaign.parquet").exists():
            raise ReportError(
                f"{path.parent.parent} holds a campaign: a report is of a run (--suffixes …/suffixes.jsonl)."
            )
        raise ReportError(f"{path} is missing: run `suffix-analysis direction` or `analyze` on this folder first.")
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ReportError(f"{path} holds no JSON object: {again(path)}")
    _check_version(data.get("schema_version"), path)
    summary = _validated(Summary, data, str(path))
    if summary.direction and not 0 <= summary.direction.layer <= summary.n_layers:
        raise ReportError(
            f"{path}: direction.layer is {summary.direction.layer}, the model has layers 0 to {summary.n_layers - 1}: "
            f"{again(path)}"
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
        raise ReportError(f"{where}: {key} is wrong ({first['msg'].lower()}, found {shown}): {again(where)}") from None


def _read_record(path: Path, model: type[RecordT]) -> RecordT | None:
    data = _read_json(path)
    return None if data is None else _validated(model, data, str(path))


def _read_object(path: Path) -> Row | None:
    data = _read_json(path)
    if data is not None and not isinstance(data, dict):
        raise ReportError(f"{path} holds no JSON object: restore it, or delete it to do without.")
    return data


def _read_patterns(path: Path) -> tuple[Pattern, ...] | None:
    patterns = _read_list(path, Pattern)
    for pattern in patterns or ():
        check_pattern(pattern, str(path))
    return patterns


def _read_list(path: Path, model: type[RecordT]) -> tuple[RecordT, ...] | None:
    data = _read_json(path)
    if data is None:
        return None
    if not isinstance(data, list):
        raise ReportError(f"{path} holds no JSON list: {again(path)}")
    return tuple(_validated(model, item, f"{path}, record {number}") for number, item in enumerate(data))


def _read_lines(path: Path, model: type[RecordT], *, required: bool = False) -> tuple[RecordT, ...] | None:
    """Read a JSON-lines file; splits at newline only, since U+2028 may stand inside a string."""
    text = _read_text(path, required=required)
    return None if text is None else _records(text, path, model)


def _read_steps(path: Path, unusable: dict[str, str]) -> tuple[Step, ...] | None:
    """Read steps.jsonl, which grows while an attack runs: a last line that is half written is left out, and said."""
    text = _read_text(path)
    if text is None:
        return None
    whole, _, last = text.rpartition("\n")
    try:
        json.loads(last or "0")
    except (ValueError, RecursionError):
        unusable["steps"], text = "its last line is half written; the lines before it are shown.", whole
    return _records(text, path, Step)


def _records(text: str, path: Path, model: type[RecordT]) -> tuple[RecordT, ...]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return tuple(_validated(model, _parse(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in lines)


def _read_table(path: Path, name: str) -> list[Row] | None:
    """Return a parquet table's rows as ``usable_rows`` leaves them; None where the file is absent."""
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path)
        rows: list[Row] = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].split(f"'{path}': ")[-1][:120] if str(error) else type(error).__name__
        raise ReportError(f"{path} is not a readable parquet file ({reason}): {again(path)}") from None
    return usable_rows(name, rows, table.column_names, str(path))
