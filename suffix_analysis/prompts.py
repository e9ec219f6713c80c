"""Prompt sets: the embedded one, CSV, JSON, JSONL, parquet and text files, and Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from suffix_analysis.errors import UserError, first_line

Kind = Literal["harmful", "harmless", "lookalike"]
Split = Literal["fit", "select", "report"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "lookalike")
SPLITS: tuple[Split, ...] = ("fit", "select", "report")
# Column names of the public sets: AdvBench, HarmBench, JailbreakBench, refusal_direction, XSTest, and our own.
BEHIND = "\0behind"  # what a CSV row holds behind the header's last column; no column is called so
TEXT_COLUMNS = ("text", "goal", "Goal", "Behavior", "instruction", "prompt", "question")


ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Prompt:
    """One instruction. ``topic`` belongs to exactly one split of the embedded set, ``policy`` to several."""

    id: str
    text: str
    kind: str = ""
    split: str = ""
    policy: str = ""
    topic: str = ""


class NoColumn(UserError):
    """A file of prompts lacks the column that is to hold them."""


def load_prompts(
    source: str | Path = "embedded",
    *,
    split: str | None = None,
    kind: str | None = None,
    column: str | None = None,
) -> list[Prompt]:
    """Load prompts.

    Args:
        source: ``"embedded"``, a .csv, .json, .jsonl, .parquet or .txt file (one prompt a line), or a Hugging Face
            dataset as ``hf:owner/name``, with ``/config``, ``@revision`` and ``#split`` in this order where they are
            needed, e.g. ``hf:walledai/AdvBench@main#train``.
        split: fit, select or report; all if left out.
        kind: harmful, harmless or lookalike; all if left out.
        column: the column that holds the prompt; recognised by its usual names if left out.

    Raises:
        UserError: the file or dataset is missing, empty, not UTF-8, of an unknown kind, or lacks the column.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"There is no split {split!r}; choose {', '.join(SPLITS)}.")
    if kind is not None and kind not in KINDS:
        raise UserError(f"There is no kind {kind!r}; choose {', '.join(KINDS)}.")
    if source == "embedded":
        text = (resources.files("suffix_analysis.organism") / "data" / "prompts.jsonl").read_text("utf-8")
        prompts = [Prompt(**json.loads(line)) for line in text.splitlines()]
    else:
        text = str(source)
        rows = _from_hub(text.removeprefix("hf:")) if text.startswith("hf:") else read_rows(Path(source))
        prompts = _from_rows(rows, Path(text.split("#")[0]), column)
    chosen = [
        p for p in prompts if (split is None or p.split in ("", split)) and (kind is None or p.kind in ("", kind))
    ]
    if not chosen:
        raise UserError(f"{source} holds no prompts of split {split or 'any'} and kind {kind or 'any'}.")
    return chosen


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv, .json, .jsonl, .parquet or .txt file; plain strings become rows with a ``text``.

    Raises:
        UserError: no such file, not UTF-8, or damaged.
    """
    if not path.is_file():
        raise UserError(f"There is no prompts file {str(path)!r}; give 'embedded' or an existing file.")
    try:
        match path.suffix.lower():
            case ".parquet":
                import pyarrow.parquet

                try:
                    return list(pyarrow.parquet.read_table(path).to_pylist())
                except pyarrow.ArrowException as error:
                    raise UserError(f"{path} cannot be read: {first_line(error)}") from error
            case ".csv":
                with path.open(encoding="utf-8-sig", newline="") as handle:
                    table = csv.DictReader(handle, restkey=BEHIND, strict=True)
                    names = list(table.fieldnames or ())
                    twice = [name for name in names if name and names.count(name) > 1]
                    if twice:
                        raise UserError(f"{path} has two columns {twice[0]!r}; rename or remove one.")
                    return [_within_header(row, path, i) for i, row in enumerate(table, 1)]
            case ".jsonl":
                lines = path.read_text("utf-8-sig").split("\n")  # strings may hold other line separators
                return [_object(_parsed(line, path, i), path, i) for i, line in enumerate(lines, 1) if line.strip()]
            case ".json":
                data = json.loads(path.read_text("utf-8-sig"))
                rows = data if isinstance(data, list) else [data]
                return [_object(row, path, i) for i, row in enumerate(rows, 1)]
            case ".txt":
                lines = path.read_text("utf-8-sig").split("\n")
                return [{"text": line.strip()} for line in lines if line.strip()]
            case other:
                raise UserError(f"{path} ends in {other!r}; give a .csv, .json, .jsonl, .parquet or .txt file.")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}: {error.msg}); mend or remove it.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be read; give a list of objects or strings.") from error
    except (OSError, ValueError, KeyError, ArithmeticError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not valid JSON ({error.msg}); mend or remove it.") from error


def _from_hub(name: str) -> list[dict[str, Any]]:
    """Rows of a Hugging Face dataset; all splits' where none is named. No code of the dataset's own is run."""
    rest, _, split = name.partition("#")
    rest, _, revision = rest.partition("@")
    parts = rest.split("/")
    if len(parts) not in (2, 3) or not all(parts) or "/" in revision:
        raise UserError(
            f"'hf:{name}' is no dataset; write hf:owner/name/config@revision#split, all but owner/name as needed."
        )
    from datasets import load_dataset

    try:
        found = load_dataset("/".join(parts[:2]), *parts[2:], split=split or None, revision=revision or None)
    except Exception as error:  # the library raises many kinds, each with a sentence of its own
        raise UserError(f"The dataset 'hf:{name}' cannot be loaded: {first_line(error)}") from error
    tables = found if isinstance(found, dict) else {"": found}
    rows = []
    for part, table in tables.items():
        for row in table:  # its own column "split" would be taken for ours, and each of its splits may count from 0
            own = {k: v for k, v in row.items() if k != "split"}
            many = len(tables) > 1 and given_id(row)
            rows.append(own | ({"id": f"{part}-{given_id(row)}"} if many else {}))
    return rows


def _within_header(row: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    """A CSV row without what stands behind the header's columns, which must be empty."""
    if any(row.pop(BEHIND, ())):
        raise UserError(f"{path}: row {number} has more columns than the header; put text with commas into quotes.")
    return row


def _object(row: Any, path: Path, number: int) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        raise UserError(f"{path}: entry {number} is {type(row).__name__}; each must be an object or a string.")
    return row


def _from_rows(rows: list[dict[str, Any]], path: Path, column: str | None) -> list[Prompt]:
    if not rows:
        raise UserError(f"{path} is empty; give at least one prompt.")
    columns = [name for name in rows[0] if name]
    name = column or next((c for c in TEXT_COLUMNS if c in columns), None)
    if name is None or name not in columns:
        wanted = column or " or ".join(TEXT_COLUMNS)
        raise NoColumn(
            f"{path} has no column {wanted}; it has {', '.join(columns) or 'none'}. Name one with --column (in Python: "
            "column=)."
        )
    ours = ["policy", "topic"]
    for key, known in (("kind", KINDS), ("split", SPLITS)):
        for row in rows:
            if isinstance(row.get(key), str) and row[key].strip().casefold() in known:
                row[key] = row[key].strip().casefold()
        values = {str(row[key]) for row in rows if row.get(key)}
        if values & set(known):  # a column with none of our words is another's and means something else
            ours.append(key)
            if values - set(known):
                wrong = min(values - set(known))
                raise UserError(f"{path} has the {key} {wrong!r}; known are {', '.join(known)}.")
    kinds = _xstest(rows) if "kind" not in ours else None
    prompts = []
    for number, row in enumerate(rows, 1):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: row {number} has no text in column {name!r}; fill or remove it.")
        if has_half_pair(text):
            raise UserError(f"{path}: row {number} holds half of a surrogate pair, which is no character; mend it.")
        extra = {key: str(row[key]) for key in ours if row.get(key)}
        if kinds is not None:
            extra["kind"] = kinds[number - 1]
        if name == "Behavior" and row.get("ContextString"):  # HarmBench's contextual behaviours, in its own layout
            text = f"{row['ContextString']}\n\n---\n\n{text}"
        prompts.append(Prompt(id=given_id(row) or f"{path.stem}-{number:04d}", text=text.strip(), **extra))
    if len({p.id for p in prompts}) < len(prompts):
        raise UserError(f"{path} has prompts with the same id; make the ids unique or leave them out.")
    return prompts


def given_id(row: dict[str, Any]) -> str:
    """A row's own id, which may be 0; empty where it has none."""
    return "" if row.get("id") is None else str(row["id"])


def _xstest(rows: list[dict[str, Any]]) -> list[str] | None:
    """The kinds of XSTest's rows, from its label or, where a version has none, its type; None of another set's rows."""
    labels = [str(row.get("label")).strip().casefold() for row in rows]
    if {*labels} <= {"safe", "unsafe"}:
        return ["harmless" if label == "safe" else "harmful" for label in labels]
    types = [str(row.get("type") or "") for row in rows]
    if all(types) and any(name.startswith("contrast_") for name in types):
        return ["harmful" if name.startswith("contrast_") else "harmless" for name in types]
    return None


def has_half_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which is no character."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def same_words(text: str) -> str:
    """A text's words without their case and spacing: prompts that agree in these are one prompt."""
    return " ".join(text.split()).casefold()


def to_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """Prompts from prompts or plain strings (numbered).

    Raises:
        UserError: they are one string, which is no list of them.
    """
    if isinstance(prompts, str):
        raise UserError(f"The prompts are the text {prompts[:40]!r}; give a list, e.g. [prompt].")
    items = list(prompts)
    return [p if isinstance(p, Prompt) else Prompt(id=f"prompt-{i:04d}", text=p) for i, p in enumerate(items, 1)]


def to_jsonl(prompts: Sequence[Prompt]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in prompts)


def count_prompts(prompts: Iterable[Prompt]) -> dict[str, dict[str, int]]:
    """How many prompts there are of each split and, in it, of each kind."""
    counts: dict[str, dict[str, int]] = {}
    for prompt in prompts:
        of_split = counts.setdefault(prompt.split, {})
        of_split[prompt.kind] = of_split.get(prompt.kind, 0) + 1
    return counts


def prompts_of(prompts: Sequence[Prompt], kind: str, split: str, most: int | None) -> list[Prompt]:
    """Prompts of a kind and split; those without a kind are harmful, those without a split belong to every one."""
    own = [p for p in prompts if (p.kind or "harmful") == kind and (p.split or split) == split]
    return own if most is None else spread(own, most)


def spread(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """At most ``most`` of them, evenly spread, so that no topic is cut off."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
