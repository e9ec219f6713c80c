"""Rows of findings tables as the rest of the package may rely on them: known columns, right types, keys filled."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from reports.errors import AGAIN, ReportError
from reports.schema import CIRCUIT_ENDS, COLUMNS, KEYS, Pattern

_TEXT = {
    "arm", "split", "kind", "measure", "against", "intervention", "region", "verdict", "reply", "token", "status",
    "term", "factor", "direction", "material", "task", "metric", "test", "heads", "on", "run", "detector", "defence",
}  # fmt: skip
_FREE = {"prompt_id", "suffix_id", "refused"}
_WHOLE = {
    "layer", "head", "rank", "position", "source_layer", "source_head", "target_layer", "target_head", "n_prompts",
    "n_suffixes", "step",
}  # fmt: skip
_MORE = {
    "complied_rate", "complied_lo", "complied_hi", "refused_lo", "refused_hi", "dose", "n_heads", "lo", "hi", "lift",
    "contribution_lo", "contribution_hi", "attention_instruction", "attention_suffix", "attention_chat",
    "attention_system", "equivalent", "false_positives_1", "score_after", "n_suffixes", "cosine_with_chat_end",
    "orthogonalised_change", "orthogonalised_lo", "orthogonalised_hi", "taken", "seconds", "harmless", "fires_attacked",
    "fires_lookalike", "fires_harmless", "n_marks", "n_timed",
}  # fmt: skip
"""Numbers that some tables have beyond the columns that they must have."""


def usable_rows(
    name: str, rows: Sequence[dict[str, Any]], present: Collection[str], where: str
) -> list[dict[str, Any]]:
    """Return a findings table's rows: NaN, infinities and what is no plain value as None, whole numbers as int.

    Raises ReportError, with ``where`` in it, for a column that is lacking or of another type, or a key that is empty.
    """
    lacking = [column for column in COLUMNS[name] if column not in present]
    if lacking:
        raise ReportError(f"{where} lacks the column {lacking[0]!r}: {AGAIN}")
    clean = [{key: _plain(key, value) for key, value in row.items()} for row in rows]
    for column in (*COLUMNS[name], *sorted(_MORE.intersection(present))):
        if column not in _FREE:
            _check_type(clean, column, where)
    for number, row in enumerate(clean, 1):
        keys = KEYS[name]
        if name == "circuit":
            if row["kind"] not in CIRCUIT_ENDS:
                raise ReportError(f"{where}: column 'kind' holds {str(row['kind'])[:40]!r}, which this version lacks.")
            keys = (*keys, *CIRCUIT_ENDS[row["kind"]])
        empty = [key for key in keys if row[key] is None]
        if empty:
            raise ReportError(f"{where}: column {empty[0]!r} is empty in row {number}: {AGAIN}")
    return clean


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if key in _WHOLE and value.is_integer() else value
    return value if value is None or isinstance(value, (str, int)) else None


def _check_type(rows: Sequence[dict[str, Any]], column: str, where: str) -> None:
    """Refuse a column of another type than the schema's: text, a number or a whole one."""
    wanted: tuple[type, ...] = (str,) if column in _TEXT else (int,) if column in _WHOLE else (int, float)
    for row in rows:
        value = row.get(column)
        if value is not None and not isinstance(value, wanted):
            kind = "text" if column in _TEXT else "a whole number" if column in _WHOLE else "a number"
            raise ReportError(
                f"{where}: column {column!r} holds {str(value)[:40]!r} where {kind} was expected: {AGAIN}"
            )


def check_pattern(pattern: Pattern, where: str) -> None:
    """Refuse a pattern whose parts do not fit together: tokens, regions, heads × dest × src.

    Raises ReportError where they do not fit.
    """
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
            f"{where}: the pattern of prompt {pattern.prompt_id!r} in arm {pattern.arm!r} does not have {heads} heads "
            f"over {size} tokens throughout: {AGAIN}"
        )
