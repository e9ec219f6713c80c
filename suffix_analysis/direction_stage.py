"""The study's direction stage: the refusal direction, kept as soon as it is found, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from suffix_analysis.direction_file import save_direction
from suffix_analysis.directions import (
    Direction,
    DirectionConfig,
    NoDirection,
    find_direction,
    keep_by_score,
    split_prompts,
)
from suffix_analysis.files import write_table
from suffix_analysis.inputs import study_text
from suffix_analysis.oneness import measure_oneness
from suffix_analysis.paper_table import measure_cost, measure_interventions
from suffix_analysis.prompts import Prompt, prompts_of
from suffix_analysis.replies import made_once

if TYPE_CHECKING:
    from suffix_analysis.config import StudyConfig
    from suffix_analysis.study import Study


def direction_tables(study: Study) -> dict[str, list[dict[str, Any]]]:
    """All tables of the direction but its candidates, which are written with it as soon as it is found."""
    prompts = [p for p in study.prompts() if p.split in ("fit", "select")]
    tokens = study.refusal_tokens()
    kinds = [[p for p in prompts if p.kind == kind] for kind in ("harmful", "harmless")]
    config = study.config
    settings = settings_of(config)
    direction = _kept(study) or _found(study, kinds, settings, tokens)
    plain = {row["prompt_id"]: row["reply"] for row in study.answered([])}
    table, answers = measure_interventions(
        study.fast, direction, study.prompts(), config.reply_tokens,
        alpha=config.alpha, n_controls=config.n_control_directions, seed=config.seed, plain=plain,
        made=made_once(study.folder / "interventions.jsonl"),
        judge=study.judge,
        on_line=lambda done, total: study.narrator.progress(done, total, "interventions"),
    )  # fmt: skip
    fit = [split_prompts(kind, settings)[0] for kind in kinds]
    unseen = [prompts_of(study.prompts(), kind, "report", None) for kind in ("harmful", "harmless")]
    sets = [[study.model.chat(p.text) for p in part] for part in (*fit, *unseen)]
    if settings.keep_by_score:  # stability is that of the prompts that the direction comes from
        sets[:2] = [keep_by_score(study.model, part, tokens, refused=i == 0) for i, part in enumerate(sets[:2])]
    return {
        "interventions": table,
        "intervention_replies": answers,
        "cost": measure_cost(study.fast, direction, study.prompts(), study_text(config), plain),
        **measure_oneness(study.fast, direction, (sets[0], sets[1]), (sets[2], sets[3]), config.alpha, config.seed),
    }


def settings_of(config: StudyConfig) -> DirectionConfig:
    """The direction's settings among a study's."""
    return DirectionConfig(**{field.name: getattr(config, field.name) for field in fields(DirectionConfig)})


def check_counts(prompts: Sequence[Prompt], config: StudyConfig) -> list[str]:
    """Refuse too few prompts before any time is spent, and tell where there are fewer than were asked for.

    Raises:
        UserError: too few of a kind for a direction (see `suffix_analysis.directions.split_prompts`).
    """
    told = []
    for kind in ("harmful", "harmless"):
        fit, chosen = split_prompts([p for p in prompts if p.kind == kind], settings_of(config))
        if len(fit) < config.n_fit or len(chosen) < config.n_select:
            told.append(
                f"The direction comes from {len(fit)} {kind} prompts and is chosen on {len(chosen)}; asked for were "
                f"{config.n_fit} and {config.n_select}."
            )
    return told


def _kept(study: Study) -> Direction | None:
    """The direction that an interrupted attempt has found."""
    files = (study.folder / "direction.safetensors", study.folder / "findings" / "candidates.parquet")
    return study.direction() if all(file.exists() for file in files) else None


def _found(study: Study, kinds: list[list[Prompt]], settings: DirectionConfig, tokens: Sequence[int]) -> Direction:
    table = study.folder / "findings" / "candidates.parquet"
    chat = study.model.chat(kinds[0][0].text)
    names = [study.model.tokenizer.decode([i]) for i in chat.ids[chat.regions["chat"]].tolist()]

    def write(scores: list[dict[str, Any]]) -> None:
        rows = [row | {"token": names[row["position"] + len(names)]} for row in scores]
        rows = [{k: None if v != v else v for k, v in row.items()} for row in rows]
        write_table(table, rows)

    try:
        direction = find_direction(
            study.model, kinds[0], kinds[1], settings, refusal_tokens=tokens, search_dtype=study.fast_dtype,
            on_candidate=lambda done, total: study.narrator.progress(done, total, "candidate directions"),
        )  # fmt: skip
    except NoDirection as error:
        write(error.scores)
        raise NoDirection(f"{error} All candidates are in {table}.", error.scores) from error
    write(direction.scores)
    save_direction(study.folder / "direction.safetensors", direction)
    return direction
