"""What a study starts from: model, prompts with kinds and splits, and suffixes that were found elsewhere."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attacks.config import resolve_dtype
from attacks.memory import free_bytes
from suffix_analysis.chat import survives_decoding
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.models import Model, load_model
from suffix_analysis.prompts import (
    KINDS,
    SPLITS,
    NoColumn,
    Prompt,
    given_id,
    has_half_pair,
    load_prompts,
    prompts_of,
    read_rows,
    same_words,
)
from suffix_analysis.records import SUFFIX_ARMS, Suffix


def study_model(config: StudyConfig) -> Model:
    """The study's model, together with its fast twin (which must exist before the bridge).

    Raises:
        UserError: see `suffix_analysis.models.load_model`.
    """
    model = load_model(
        config.model, dtype=getattr(torch, config.dtype), device=config.device, four_bit=config.four_bit,
        adapter=config.adapter, system=config.system, reply_prefix=config.reply_prefix or "",
    )  # fmt: skip
    model.twin(fast_dtype(config, model))
    return model


def fast_dtype(config: StudyConfig, model: Model) -> torch.dtype:
    """Precision of searches and replies; where it is left to us, the model's own if a copy has no place in memory."""
    own: torch.dtype = next(model.hf.parameters()).dtype
    wanted = resolve_dtype(config.score_dtype, model.hf)  # type: ignore[arg-type]
    if config.score_dtype != "auto" or wanted == own or model.has_twin(wanted):
        return wanted
    needed = wanted.itemsize * sum(p.numel() for p in model.hf.parameters())
    return wanted if needed < free_bytes(model.hf.device) else own


def study_prompts(config: StudyConfig) -> list[Prompt]:
    """All prompts of a study with their kinds and splits.

    A text that stands there twice is taken once. Files without splits are cut with the seed: half fit, a fifth select,
    the rest report.

    Raises:
        UserError: a file cannot be read, a split comes out empty, only some prompts have one, or a text is of both
            kinds or in two splits.
    """
    prompts: list[Prompt] = []
    for kind, source, found in _loaded(config):
        found = _once([replace(p, kind=kind) for p in found], prompts)
        prompts += _with_splits(found, config.seed, source)
    if config.harmless == "embedded":
        prompts += load_prompts("embedded", kind="lookalike")
    for kind in ("harmful", "harmless"):
        for split in ("fit", "select", "report"):
            if not any(p.kind == kind and p.split == split for p in prompts):
                raise UserError(f"There are no {kind} prompts in the {split} split; give more prompts.")
    if config.prompts_per_split is not None:
        most = {"fit": None, "select": config.prompts_per_split, "report": config.prompts_per_split}
        prompts = [p for kind in KINDS for split in SPLITS for p in prompts_of(prompts, kind, split, most[split])]
    if len({p.id for p in prompts}) < len(prompts):
        prompts = [replace(p, id=f"{p.kind}:{p.id}") for p in prompts]
    return prompts


def _once(found: Sequence[Prompt], before: Sequence[Prompt]) -> list[Prompt]:
    """Every text once.

    Raises:
        UserError: a text is of both kinds, or stands in two splits.
    """
    other = {same_words(p.text) for p in before}
    both = [p.text for p in found if same_words(p.text) in other]
    if both:
        raise UserError(f"{len(both)} prompts are both harmful and harmless, e.g. {both[0]!r}; remove them.")
    once = {same_words(p.text): p for p in reversed(found)}
    split = [p for p in found if once[same_words(p.text)].split != p.split]
    if split:
        raise UserError(
            f"{len(split)} {split[0].kind} prompts stand in two splits, e.g. {split[0].text!r} in "
            f"{once[same_words(split[0].text)].split} and {split[0].split}; give each of them once."
        )
    return list(once.values())[::-1]


def _loaded(config: StudyConfig) -> list[tuple[str, str, list[Prompt]]]:
    """Kind, source and prompts: of the column that is named, and of the usual ones where only the other file has it."""
    sources = {"harmful": config.harmful, "harmless": config.harmless}
    found: dict[str, list[Prompt]] = {}
    lacking: dict[str, NoColumn] = {}
    for kind, source in sources.items():
        try:
            found[kind] = load_prompts(source, kind=kind, column=None if source == "embedded" else config.column)
        except NoColumn as error:
            lacking[kind] = error
    if lacking and len(lacking) == sum(source != "embedded" for source in sources.values()):
        raise next(iter(lacking.values()))
    found |= {kind: load_prompts(sources[kind], kind=kind) for kind in lacking}
    return [(kind, source, found[kind]) for kind, source in sources.items()]


def _with_splits(prompts: list[Prompt], seed: int, source: str) -> list[Prompt]:
    given = sum(bool(p.split) for p in prompts)
    if given == len(prompts):
        return prompts
    if given:
        raise UserError(f"{given} of {len(prompts)} prompts in {source} have a split; give all of them one, or none.")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    first, second = len(shuffled) // 2, len(shuffled) * 7 // 10
    names = ["fit" if i < first else "select" if i < second else "report" for i in range(len(shuffled))]
    return [replace(p, split=name) for p, name in zip(shuffled, names, strict=True)]


def given_suffixes(path: Path, model: Model) -> list[Suffix]:
    """Suffixes from a file in any of the layouts of prompts, as the model reads them after an instruction.

    A row holds ``text`` (or is a plain string), ``ids``, or both, which must then agree; ``arm`` is adversarial and
    ``id`` counts where they are left out.

    Raises:
        UserError: the file is missing or damaged, a row holds neither a text nor ids of the model's vocabulary, its arm
            is unknown, an id stands there twice, or a suffix does not survive re-tokenisation.
    """
    if not path.is_file():
        raise UserError(f"There is no suffixes file {str(path)!r}.")
    out: list[Suffix] = []
    rows = read_rows(path)
    named = {given_id(row) for row in rows}
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        arm = row.get("arm") or "adversarial"
        if arm not in SUFFIX_ARMS:
            raise UserError(f"{where} is of the arm {arm!r}; the arms are {', '.join(SUFFIX_ARMS)}.")
        free = (f"{arm}-{n}" for n in itertools.count(1 + sum(s.arm == arm for s in out)))
        taken = named | {s.id for s in out}
        name = given_id(row) or next(each for each in free if each not in taken)
        if name in {s.id for s in out}:
            raise UserError(f"{path} holds two suffixes with the id {name!r}; give each its own.")
        given = _ids(row.get("ids"), model, where)
        text = row.get("text")
        if not text and given:
            text = model.tokenizer.decode(given, clean_up_tokenization_spaces=False).removeprefix(" ")
        if not isinstance(text, str) or not text.strip() or has_half_pair(text):
            raise UserError(f"{where} holds no text and no ids; give one of them (text: whole characters).")
        chat = model.chat("Write a poem", text)
        ids = tuple(chat.ids[chat.regions["suffix"]].tolist())
        if not survives_decoding(model.tokenizer, chat) or (given and ids != given):
            raise UserError(
                f"Suffix {name} ({text[:40]!r}) does not survive re-tokenisation"
                + (": behind an instruction its text has other ids" if given else "")
                + "; leave it out."
            )
        out.append(
            Suffix(
                id=name, arm=arm, text=text, ids=ids, n_tokens=len(ids),
                trained_on=_names(row.get("trained_on"), where),
                loss=row["loss"] if isinstance(row.get("loss"), int | float) else None,
                seed=row["seed"] if isinstance(row.get("seed"), int) else None,
            )
        )  # fmt: skip
    if not any(s.arm == "adversarial" for s in out):
        raise UserError(f"{path} holds no suffix of the adversarial arm.")
    return out


def _names(value: Any, where: str) -> tuple[str, ...] | None:
    """The ids of the prompts that a suffix was trained on, None where the row does not say.

    Raises:
        UserError: they are no list.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):  # of a CSV file
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(value)
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} has trained_on = {value!r}; give a list of prompt ids, or leave it out.")
    return tuple(map(str, value))


def _ids(value: Any, model: Model, where: str) -> tuple[int, ...]:
    """A row's token ids, none where it has none.

    Raises:
        UserError: they are no list of the vocabulary's ids.
    """
    if value is None or value == "":  # of a CSV file an empty cell
        return ()
    if isinstance(value, str):  # likewise, "[5, 6]"
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    size = model.hf.get_input_embeddings().weight.shape[0]
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < size for i in value):
        raise UserError(f"{where} has ids that are no whole numbers from 0 to {size - 1}; mend or leave them out.")
    return tuple(value)


def study_text(config: StudyConfig) -> str | None:
    """The user's text for the cost of ablation, None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    if config.text is None:
        return None
    try:
        return Path(config.text).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The text file {config.text!r} cannot be read: {error}.") from error
