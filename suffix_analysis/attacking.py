"""The study's attack: one universal suffix trained on a few select prompts, chosen on the others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

import attacks
from suffix_analysis.chat import render_chat
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.files import append_jsonl, read_json, read_jsonl, write_json, write_jsonl
from suffix_analysis.judges import is_refusal
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Arm, Suffix
from suffix_analysis.refusal import opens_refusal
from suffix_analysis.runs import read_suffixes, write_suffixes

EVAL_EVERY = (10, 5)  # steps between two looks at the held-out prompts, in the first and the second half of them
FILLERS = ("x", "!", "a", "the", ".")  # words that a suffix may begin as, repeated; the first is nanoGCG's


class StepRow(TypedDict):
    """What is read of a line of steps.jsonl: an `attacks.Step` with what the look at the prompts found."""

    step: int
    loss: float
    string: str
    ids: list[int]
    seconds: float
    flops: float
    flipped: NotRequired[int | None]
    select_refusal: NotRequired[float | None]


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


@dataclass(frozen=True)
class Plan:
    """One attack to be made.

    Attributes:
        name: what it is called when it fails, as the beginning of a sentence.
        config: its settings, with a seed of its own.
        train: instructions that the suffix is trained on.
        held_out: other select prompts, on which its steps are measured.
        folder: where it keeps its files.
        alone: a single attack, which may stop early and is the adversarial arm whatever it reached.
        each: an attack on one instruction for its own sake, judged by whether that one is answered.
    """

    name: str
    config: StudyConfig
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    folder: Path
    alone: bool = False
    each: bool = False

    @property
    def result(self) -> Path:
        """The file of its suffix, which is there once it is finished."""
        return self.folder / "suffix.jsonl"


def conversation(model: Model, instruction: str) -> list[dict[str, str]]:
    """The turns that `Model.chat` renders, with the suffix's place marked."""
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


def initial_suffix(model: Model, n: int, target: str) -> tuple[str, int]:
    """A repeated word that has ``n`` tokens behind an instruction, or the nearest to it below; and its token count.

    A text of another count than was asked for is left to tokenizers that write none of `FILLERS` as one token.
    """
    found = ("x", 0)
    talk: Any = conversation(model, "Sing")
    for word in FILLERS:
        for count in range(n, 0, -1):
            text = " ".join([word] * count)
            size = len(attacks.build_slot(model.tokenizer, talk, target, text).suffix_ids)
            if size <= n:
                break
        if found[1] < size <= n:
            found = (text, size)
        if found[1] == n:
            break
    return found


def gcg_config(model: Model, config: StudyConfig) -> attacks.GCGConfig:
    """The attack's settings; the initial suffix has ``suffix_tokens`` tokens (see `initial_suffix`).

    Schedules, momentum and patience are left off: none of them was seen to help (benchmarks/README.md).
    """
    init, _ = initial_suffix(model, config.suffix_tokens, config.target)
    return attacks.GCGConfig(
        num_steps=config.steps,
        optim_str_init=init,
        search_width=config.search_width,
        topk=config.topk,
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
    n_tokens = len(attack.slots[0].suffix_ids)
    if n_tokens != config.suffix_tokens:
        told.append(f"The suffix has {n_tokens} tokens, not {config.suffix_tokens}: no repeated word has so many here.")
    if refused < len(train) / 2:
        told.append(
            "Most of them are answered without any suffix: choose other prompts or another model to learn much."
        )
    return attack, [*told, *found.warnings]


def run_attack(attack: attacks.GCG, model: Model, plan: Plan, refusal_tokens: Sequence[int]) -> Iterator[Progress]:
    """Attack step by step; steps.jsonl and checkpoint.json in the plan's folder make it resumable after any step.

    Every few steps the suffix is tried on the held-out select prompts; ``best_suffix`` later takes the step that
    left the fewest of them refused. An attack that is made alone stops early when ``stop_below`` is reached.

    Raises:
        UserError: the checkpoint is damaged or of another attack.
    """
    steps_file, checkpoint = plan.folder / "steps.jsonl", plan.folder / "checkpoint.json"
    texts = [p.text for p in (*plan.train, *plan.held_out)]
    n, config = len(plan.train), plan.config
    if checkpoint.exists():
        try:
            attack.restore(read_json(checkpoint))
        except attacks.AttackError as error:
            raise UserError(f"{checkpoint}: {error}") from error
        # a step whose checkpoint was not written is run again, with the same draws
        kept = [row for row in steps_of(plan) if row["step"] <= attack.step]
        write_jsonl(steps_file, kept)
        if any(_enough(row.get("select_refusal"), plan) for row in kept):
            return
    else:
        steps_file.unlink(missing_ok=True)
    fast = attack.search.model
    watcher = Model(model.name, fast, model.tokenizer, model.system, model.path)
    for step in attack.steps():
        flipped = refused = None
        late = step.step > config.steps // 2
        if step.step % EVAL_EVERY[late] == 0 or step.step == config.steps:
            rows = [render_chat(model.tokenizer, text, step.string, model.system).ids for text in texts]
            still = opens_refusal(watcher, rows, refusal_tokens)
            flipped, refused = int((~still[:n]).sum()), float(still[n:].float().mean())
        append_jsonl(steps_file, asdict(step) | {"select_refusal": refused, "flipped": flipped})
        write_json(checkpoint, attack.state())
        yield Progress(step, flipped, refused)
        if _enough(refused, plan):
            return


def _enough(refused: float | None, plan: Plan) -> bool:
    """Whether an attack may stop early: not where several are to have equal budgets."""
    return plan.alone and refused is not None and refused <= plan.config.stop_below


def best_step(rows: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The measured step that leaves the fewest held-out select prompts refused; the lower loss among equals.

    Of an attack for one instruction's sake first of all a step that flips it.

    Raises:
        UserError: there is no step.
    """
    if not rows:
        raise UserError(
            f"{plan.folder / 'steps.jsonl'} holds no step; delete the suffix.jsonl beside it and run again."
        )
    measured = [row for row in rows if row.get("select_refusal") is not None] or rows
    return min(measured, key=lambda r: (plan.each and not r.get("flipped"), r.get("select_refusal") or 0.0, r["loss"]))


def has_failed(row: dict[str, Any], plan: Plan) -> bool:
    """Whether the suffix of a step is of the failed arm.

    A single attack never is: the numbers say what it reached. Of several, a universal one has failed where more than
    ``flip_below`` of the held-out prompts are refused, one for one instruction's sake where that is refused.
    """
    if plan.alone:
        return False
    if plan.each:
        return not row.get("flipped")
    return (row.get("select_refusal") or 0.0) > plan.config.flip_below


def best_suffix(rows: Sequence[dict[str, Any]], plan: Plan) -> Suffix:
    """The suffix of the best step; see `best_step`. The study numbers the suffixes of an arm."""
    row = best_step(rows, plan)
    arm: Arm = "failed" if has_failed(row, plan) else "adversarial"
    return Suffix(
        id=f"{arm}-1",
        arm=arm,
        text=row["string"],
        ids=tuple(row["ids"]),
        n_tokens=len(row["ids"]),
        trained_on=tuple(p.id for p in plan.train),
        loss=float(row["loss"]),
        seed=plan.config.seed,
    )


def make_attack(
    model: Model,
    plan: Plan,
    tokens: Sequence[int],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Suffix:
    """Make a planned attack; what its folder holds of it is not done again."""
    if plan.result.exists():
        return finished(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    attack, told = build_attack(model, plan.train, plan.config)
    for sentence in told:
        say(sentence)
    for progress in run_attack(attack, model, plan, tokens):
        on_progress(progress)
    suffix = best_suffix(steps_of(plan), plan)
    write_suffixes(plan.result, [suffix])
    return suffix


def finished(plan: Plan) -> Suffix:
    """The suffix of a finished attack.

    Raises:
        UserError: its file is damaged.
    """
    found = read_suffixes(plan.result)
    if not found:
        raise UserError(f"{plan.result} is empty; delete it and run again.")
    return found[0]


def steps_of(plan: Plan) -> list[dict[str, Any]]:
    """The steps that an attack has made."""
    return read_jsonl(plan.folder / "steps.jsonl", journal=True, like=StepRow)


def numbered(suffixes: Sequence[Suffix]) -> list[Suffix]:
    """The suffixes of a pool with ids that count within their arms."""
    counts: Counter[str] = Counter()
    found = []
    for suffix in suffixes:
        counts[suffix.arm] += 1
        found.append(replace(suffix, id=f"{suffix.arm}-{counts[suffix.arm]}"))
    return found
