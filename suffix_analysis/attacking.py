"""The study's attack: one universal suffix trained on a few select prompts, chosen on the others, with its controls."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import attacks
from suffix_analysis.chat import render_chat
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.judges import is_refusal
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.refusal import opens_refusal
from suffix_analysis.runs import (
    append_jsonl,
    read_json,
    read_jsonl,
    read_suffixes,
    write_json,
    write_jsonl,
    write_suffixes,
)

CONTROLS = ("random", "shuffled", "benign")
EVAL_EVERY = (10, 5)  # steps between two looks at the held-out prompts, in the first and the second half of them


@dataclass(frozen=True)
class Progress:
    """What the progress line shows after a step."""

    step: attacks.Step
    flipped: int | None
    select_refusal: float | None

    def line(self, n_instructions: int) -> str:
        """Losses, and what the last look at the prompts found."""
        text = f"loss {self.step.loss:.3f}, best {self.step.best_loss:.3f}"
        if self.flipped is not None and self.select_refusal is not None:
            text += f", flipped {self.flipped}/{n_instructions}, others refused {self.select_refusal:.0%}"
        return text


def conversation(model: Model, instruction: str) -> list[dict[str, str]]:
    """The turns that :meth:`Model.chat` renders, with the suffix's place marked."""
    first = [] if model.system is None else [{"role": "system", "content": model.system}]
    return [*first, {"role": "user", "content": f"{instruction} {attacks.PLACEHOLDER}"}]


def split_for_attack(
    prompts: Sequence[Prompt], n: int, seed: int, refused: Sequence[bool] | None = None
) -> tuple[list[Prompt], list[Prompt]]:
    """Training instructions and held-out ones, both from the select split, drawn with the seed.

    With ``refused`` (whether the model refuses each prompt without a suffix), those that it answers anyway train the
    attack only where there are not enough others: nothing can be learnt from them.

    Raises:
        UserError: too few prompts.
    """
    pool = list(zip(prompts, [True] * len(prompts) if refused is None else refused, strict=True))
    if len(pool) < n + 2:
        raise UserError(f"The select split has {len(pool)} harmful prompts; {n} for training need at least {n + 2}.")
    random.Random(seed).shuffle(pool)
    pool.sort(key=lambda pair: not pair[1])  # stable: the drawn order stays among equals
    train = [prompt for prompt, _ in pool[:n]]
    chosen = {id(prompt) for prompt in train}
    return train, [prompt for prompt in prompts if id(prompt) not in chosen]


def gcg_config(model: Model, config: StudyConfig) -> attacks.GCGConfig:
    """The attack's settings; the initial suffix has exactly ``suffix_tokens`` tokens.

    The schedule (more replaced tokens and fewer candidates at first, momentum, and a way back from steps without a new
    best) takes the embedded model's select prompts to the same refusal rate in fewer steps: benchmarks/README.md.
    """
    init = " ".join(["x"] * config.suffix_tokens)
    return attacks.GCGConfig(
        num_steps=config.steps,
        optim_str_init=init,
        search_width=config.search_width,
        topk=config.topk,
        even_positions=True,
        search_width_start=max(1, config.search_width // 2),
        n_replace_start=min(3, config.suffix_tokens),
        momentum=0.6,
        patience=12,
        seed=config.seed,
        score_dtype=config.score_dtype,  # type: ignore[arg-type]
    )


def build_attack(model: Model, train: Sequence[Prompt], config: StudyConfig) -> tuple[attacks.GCG, list[str]]:
    """The attack on the training instructions, and what its self-test found, in sentences."""
    talks: Any = [conversation(model, p.text) for p in train]
    attack = attacks.GCG(model.hf, model.tokenizer, talks, config.target, gcg_config(model, config))
    found = attacks.self_test(attack)
    refused = sum(map(is_refusal, found.replies))
    minutes = config.steps * found.seconds_per_step / 60
    told = [
        f"Without a suffix {refused} of {len(train)} training instructions are refused; the target costs "
        f"{sum(found.losses) / len(found.losses):.2f} nats a token; {config.steps} steps take about {minutes:.0f} min "
        f"and {found.gib:.1f} GiB."
    ]
    if refused < len(train) / 2:
        told.append(
            "Most of them are answered without any suffix: choose other prompts or another model to learn much."
        )
    return attack, [*told, *found.warnings]


def run_attack(
    attack: attacks.GCG,
    model: Model,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    config: StudyConfig,
    folder: Path,
) -> Iterator[Progress]:
    """Attack step by step; steps.jsonl and checkpoint.json in ``folder`` make it resumable after any step.

    Every few steps the suffix is tried on the held-out select prompts; ``best_suffix`` later takes the step that
    left the fewest of them refused. Stops early when ``stop_below`` is reached.
    """
    steps_file, checkpoint = folder / "steps.jsonl", folder / "checkpoint.json"
    if checkpoint.exists():
        state = read_json(checkpoint)
        attack.restore(state)
        # a step whose checkpoint was not written is run again, with the same draws
        write_jsonl(steps_file, [row for row in read_jsonl(steps_file, journal=True) if row["step"] <= state["step"]])
        if attack.step and _reached(read_jsonl(steps_file, journal=True), config):
            return
    else:
        steps_file.unlink(missing_ok=True)
    fast = attack.search.model
    watcher = Model(model.name, fast, model.tokenizer, model.system, model.path)
    for step in attack.steps():
        flipped = refused = None
        late = step.step > config.steps // 2
        if step.step % EVAL_EVERY[late] == 0 or step.step == config.steps:
            rows = [render_chat(model.tokenizer, p.text, step.string, model.system).ids for p in [*train, *held_out]]
            kept = opens_refusal(watcher, rows, refusal_tokens)
            flipped = int((~kept[: len(train)]).sum())
            refused = float(kept[len(train) :].float().mean())
        append_jsonl(steps_file, asdict(step) | {"select_refusal": refused, "flipped": flipped})
        write_json(checkpoint, attack.state())
        yield Progress(step, flipped, refused)
        if refused is not None and _enough(refused, config):
            return


def _enough(refused: float, config: StudyConfig) -> bool:
    """Whether an attack may stop early: not where several are to have equal budgets."""
    return config.n_attacks == 1 and refused <= config.stop_below


def _reached(rows: Sequence[dict[str, Any]], config: StudyConfig) -> bool:
    return any(row["select_refusal"] is not None and _enough(row["select_refusal"], config) for row in rows)


def best_suffix(rows: Sequence[dict[str, Any]], train: Sequence[Prompt], seed: int, flip_below: float = 1.0) -> Suffix:
    """The measured step that leaves the fewest held-out select prompts refused; the lower loss among equals.

    Its arm is ``failed`` where more than ``flip_below`` of them are. The study numbers the suffixes of an arm.
    """
    measured = [row for row in rows if row.get("select_refusal") is not None]
    row = min(measured or rows, key=lambda r: (r.get("select_refusal") or 0.0, r["loss"]))
    arm = "failed" if (row.get("select_refusal") or 0.0) > flip_below else "adversarial"
    return Suffix(
        id=f"{arm}-1",
        arm=arm,
        text=row["string"],
        ids=tuple(row["ids"]),
        n_tokens=len(row["ids"]),
        trained_on=tuple(p.id for p in train),
        loss=row["loss"],
        seed=seed,
    )


def one_attack(
    model: Model,
    number: int,
    train: Sequence[Prompt],
    held_out: Sequence[Prompt],
    tokens: Sequence[int],
    config: StudyConfig,
    folder: Path,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Suffix:
    """Attack ``number`` of a pool (from 0), with a seed of its own; what ``folder`` holds of it is not done again."""
    done = folder / "suffix.jsonl"
    if done.exists():
        return read_suffixes(done)[0]
    own = replace(config, seed=config.seed + number)
    folder.mkdir(parents=True, exist_ok=True)
    attack, told = build_attack(model, train, own)
    for sentence in told:
        say(sentence)
    for progress in run_attack(attack, model, train, held_out, tokens, own, folder):
        on_progress(progress)
    # a single attack is the adversarial arm whatever it reached; the numbers say what that is
    flip_below = config.flip_below if config.n_attacks > 1 else 1.0
    suffix = best_suffix(read_jsonl(folder / "steps.jsonl", journal=True), train, own.seed, flip_below)
    write_suffixes(done, [suffix])
    return suffix


def pool_folder(run: Path, number: int) -> Path:
    """Where an attack of the pool keeps its files; the first one's stand in the run folder itself."""
    return run if number == 0 else run / "attacks" / str(number + 1)


def numbered(suffixes: Sequence[Suffix]) -> list[Suffix]:
    """The suffixes of a pool with ids that count within their arms."""
    counts: Counter[str] = Counter()
    found = []
    for suffix in suffixes:
        counts[suffix.arm] += 1
        found.append(replace(suffix, id=f"{suffix.arm}-{counts[suffix.arm]}"))
    return found


def make_controls(
    model: Model,
    suffixes: Sequence[Suffix],
    prompts: Sequence[Prompt],
    config: StudyConfig,
    note: Callable[[str], None],
    arms: Sequence[str] = CONTROLS,
) -> list[Suffix]:
    """Random, shuffled and benign suffixes with the first suffix's token count; ``note`` is told what fell short.

    Shuffled are all of the suffixes, as evenly as the count allows.
    """
    slots = [attacks.build_slot(model.tokenizer, conversation(model, p.text), config.target, "x") for p in prompts[:4]]
    length, count = suffixes[0].n_tokens, config.n_controls

    def random_ones() -> list[tuple[str, tuple[int, ...]]]:
        n_rows = model.hf.get_input_embeddings().weight.shape[0]
        return attacks.random_suffixes(model.tokenizer, slots, count, length, config.seed + 1, n_rows)

    def shuffled() -> list[tuple[str, tuple[int, ...]]]:
        shares = [count // len(suffixes) + (i < count % len(suffixes)) for i in range(len(suffixes))]
        return [
            pair
            for suffix, share in zip(suffixes, shares, strict=True)
            if share
            for pair in attacks.shuffled_suffixes(
                model.tokenizer, slots, torch.tensor(suffix.ids), share, config.seed + 2
            )
        ]

    def benign() -> list[tuple[str, tuple[int, ...]]]:
        return attacks.benign_suffixes(model.tokenizer, slots, count, length)

    made = {arm: make() for arm, make in zip(CONTROLS, (random_ones, shuffled, benign), strict=True) if arm in arms}
    for arm, found in made.items():
        if len(found) < count:
            note(f"Only {len(found)} of {count} {arm} suffixes survive re-tokenisation.")
    return [
        Suffix(id=f"{arm}-{i}", arm=arm, text=text, ids=ids, n_tokens=len(ids), seed=config.seed)
        for arm, found in made.items()
        for i, (text, ids) in enumerate(found, 1)
    ]
