"""A report that can be shared: suffixes, targets and replies become lengths and hashes, wherever they stand."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import tomli_w

from reports.data import RunData
from reports.schema import Pattern, Suffix


def stand_in(text: str) -> str:
    """Return what is shown instead of a text: its length and the beginning of its SHA-256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"[redacted: {len(text)} characters, sha256 {digest}…]"


def redact(data: RunData) -> RunData:
    """Return the run without any suffix, target or reply; prompts, numbers and settings stay.

    Equal texts have equal stand-ins, so that what was the same can still be seen to be the same. Suffix tokens go from
    the prompts' token strips and attention views too, and token ids with them.
    """
    target = data.summary.target
    secrets = sorted({s.text for s in data.suffixes if s.text.strip()} | ({target} if target else set()), key=len)[::-1]

    def without(text: str) -> str:
        for secret in secrets:
            for form in {secret, secret.strip(), _quoted(secret)}:
                if form:
                    text = text.replace(form, stand_in(secret))
        return text

    summary = data.summary.model_copy(
        update={
            "target": None if target is None else stand_in(target),
            "skipped": [without(sentence) for sentence in data.summary.skipped],
        }
    )
    tables = {name: [_row(row) for row in rows] if name == "replies" else rows for name, rows in data.tables.items()}
    return replace(
        data,
        summary=summary,
        config=without(data.config),
        suffixes=tuple(_suffix(suffix) for suffix in data.suffixes),
        tables=tables,
        patterns=tuple(_pattern(pattern) for pattern in data.patterns),
    )


def _quoted(text: str) -> str:
    """The text as a TOML string holds it."""
    return tomli_w.dumps({"x": text}).strip()[len('x = "') : -1]


def _suffix(suffix: Suffix) -> Suffix:
    return suffix.model_copy(update={"text": stand_in(suffix.text), "ids": []})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return row if row["reply"] is None else {**row, "reply": stand_in(row["reply"])}


def _pattern(pattern: Pattern) -> Pattern:
    tokens = [
        f"[{i + 1}]" if region == "suffix" else token
        for i, (token, region) in enumerate(zip(pattern.tokens, pattern.regions, strict=True))
    ]
    return pattern.model_copy(update={"tokens": tokens})
