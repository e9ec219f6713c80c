"""A report that can be shared: suffixes, targets and replies become lengths and hashes, and folders go."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import tomli_w

from reports.data import RunData
from reports.errors import ReportError
from reports.schema import Pattern, Suffix

LONG = 8  # characters: shorter texts stand in prompts by chance


def stand_in(text: str) -> str:
    """Return what is shown instead of a text: its length and the beginning of its SHA-256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"[redacted: {len(text)} characters, sha256 {digest}…]"


def redact(data: RunData) -> RunData:
    """Return the run without any suffix, target, reply or folder; prompts, numbers and other settings stay.

    A prompt or an id that holds a suffix or the target (of eight characters or more) loses it too. Equal texts have
    equal stand-ins, so that what was the same can still be seen to be the same. Suffix tokens go from the prompts'
    token strips and attention views too, and token ids with them. Of local paths the last part stays.

    Raises ReportError where suffixes.jsonl cannot be read, or is missing though an attack has begun: what is to be
    taken out is then unknown.
    """
    if "suffixes" in data.unusable:
        raise ReportError(f"No page can be redacted without suffixes.jsonl, which is {data.unusable['suffixes']}")
    begun = {"attack", "campaign"} if data.status is None else data.status.stages.keys()
    if "suffixes" in data.missing and {"attack", "campaign"} & {*begun}:
        raise ReportError("No page can be redacted without suffixes.jsonl, which is missing: restore it.")
    without, long = _removal(data), _removal(data, LONG)
    target = data.summary.target
    summary = data.summary.model_copy(
        update={
            "model": without(data.summary.model),
            "target": None if target is None else stand_in(target),
            "suffix_id": None if data.summary.suffix_id is None else long(str(data.summary.suffix_id)),
            "skipped": [without(sentence) for sentence in data.summary.skipped],
        }
    )
    tables = {name: [_row(row, without, long) for row in rows] for name, rows in data.tables.items()}
    checks = [
        check.model_copy(update={key: without(value) for key, value in check if isinstance(value, str)})
        for check in data.checks
    ]
    return replace(
        data,
        place=data.name,
        summary=summary,
        config=without(data.config),
        suffixes=tuple(_suffix(suffix, long) for suffix in data.suffixes),
        prompts=tuple(_texts(prompt, long) for prompt in data.prompts),
        env={key: without(value) if isinstance(value, str) else value for key, value in data.env.items()},
        tables=tables,
        patterns=tuple(_pattern(pattern, long) for pattern in data.patterns),
        checks=tuple(checks),
        unusable=dict.fromkeys(data.unusable, "not used, or not all of it: it is damaged."),
    )


def _removal(data: RunData, least: int = 1) -> Callable[[str], str]:
    """Return what takes suffixes, target (of ``least`` characters) and folders out of a text: the longest first."""
    texts = [suffix.text for suffix in data.suffixes] + [data.summary.target or ""]
    texts = [text for text in texts if len(text.strip()) >= least]
    instead = {
        form: stand_in(text)
        for text in sorted(texts, key=lambda text: (len(text), text))
        for form in (_quoted(text), text.strip(), text)
        if form.strip()
    }
    for key, value in (*_settings(data.settings()), ("model", data.summary.model)):
        if is_local(key, value):
            last = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
            instead |= {value: last, _quoted(value): _quoted(last)}
    if not instead:
        return lambda text: text
    found = re.compile("|".join(re.escape(form) for form in sorted(instead, key=lambda form: (-len(form), form))))
    return lambda text: found.sub(lambda match: instead[match[0]], text)


def _settings(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every text among the settings with its name."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _settings(value)
        elif isinstance(value, str):
            yield key, value


def is_local(key: str, value: str) -> bool:
    """Whether a setting is a path on the machine of the run, and not text, a name, a hub id or an address."""
    if key == "target" or value.startswith("hf:") or "://" in value:
        return False
    if re.match(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]", value) or "\\" in value:
        return True
    hub = key in ("model", "adapter", "name") and re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", value)
    return "/" in value and not hub


def _quoted(text: str) -> str:
    """The text as a TOML string holds it."""
    return tomli_w.dumps({"x": text}).strip()[len('x = "') : -1]


def _suffix(suffix: Suffix, without: Callable[[str], str]) -> Suffix:
    return suffix.model_copy(update={"id": without(str(suffix.id)), "text": stand_in(suffix.text), "ids": []})


def _texts(record: Any, without: Callable[[str], str]) -> Any:
    own = ("id", "text", "topic", "policy")
    return record.model_copy(update={k: without(v) for k, v in record if k in own and isinstance(v, str)})


def _row(row: dict[str, Any], without: Callable[[str], str], long: Callable[[str], str]) -> dict[str, Any]:
    own: dict[str, Callable[[str], str]] = {"reply": stand_in, "note": without, "suffix_id": long, "prompt_id": long}
    return row | {key: change(row[key]) for key, change in own.items() if isinstance(row.get(key), str)}


def _pattern(pattern: Pattern, without: Callable[[str], str]) -> Pattern:
    tokens = [
        f"[{i + 1}]" if region == "suffix" else token
        for i, (token, region) in enumerate(zip(pattern.tokens, pattern.regions, strict=True))
    ]
    names = {key: value for key in ("prompt_id", "suffix_id") if isinstance(value := getattr(pattern, key, None), str)}
    return pattern.model_copy(update={"tokens": tokens} | {key: without(value) for key, value in names.items()})
