"""The study's settings: one flat record; the command line's flags and config.toml come from it."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from cyclopts import Parameter

from suffix_analysis.errors import UsageError


def _whole(kind: Any, tokens: Sequence[Any]) -> int:
    """A flag's or file's whole number; cyclopts itself rounds 3.7 to 4."""
    text = str(tokens[0].value)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text) if text.lstrip("+-").isdigit() else int(value)


Whole = Annotated[int, Parameter(converter=_whole)]


VARIED = ("target", "suffix_tokens", "steps", "search_width", "topk")  # what an attack's settings are


MOST = 1_000_000  # of anything that is counted
TEXTS = (
    "model", "adapter", "system", "reply_prefix", "harmful", "harmless", "column", "suffixes", "target", "judge",
    "text", "score_dtype", "dtype", "device", "executor", "address",
)  # fmt: skip


def require_layer_share(layer_share: float) -> None:
    """Refuse what is no share of the layers.

    Raises:
        UsageError: names it.
    """
    if not 0 < layer_share <= 1:
        raise UsageError(f"layer_share is {layer_share}; it is a share of the layers, above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of a study.

    Attributes:
        model: "embedded", a local folder, a GGUF file or a hub id.
        adapter: a LoRA adapter on the model: a folder or a hub id.
        system: a system prompt of every conversation; the template's own if left out (the paper: none at all).
        reply_prefix: text that every conversation ends with after the template's own, where all of a model's replies
            open alike (Llama 2's with a space).
        harmful: harmful prompts: "embedded", a file, or a Hugging Face dataset (see load_prompts).
        harmless: harmless prompts, likewise.
        column: of those files, the one that holds the prompt; recognised by its usual names if left out.
        suffixes: a suffixes.jsonl to analyse instead of attacking.
        target: what the attack makes the reply begin with.
        n_instructions: instructions the universal suffix is trained on (from the select split).
        suffix_tokens: length of the suffix.
        steps: attack steps at most.
        n_attacks: attacks with the same budget and seeds of their own; 16 or more for claims about suffixes, because an
            arm needs eight.
        flip_below: of several attacks, those that leave at most this share of unseen select prompts refused are the
            adversarial arm, the others the failed one.
        search_width: candidates a step.
        topk: tokens per position that candidates are drawn from.
        stop_below: stop the attack when at most this share of unseen select prompts is still refused (first token); one
            attack alone, because several are to have equal budgets.
        n_controls: strings in each control arm (random, shuffled, benign; of benign ones there are twenty at most).
        n_traced: report prompts whose arms are traced.
        n_traced_controls: strings of each control arm that are traced.
        reply_tokens: length of the replies that are judged (the paper: 512); 24 show whether a reply opens as a
            refusal, in a twentieth of the time.
        judge: who says whether a reply complies: rules, or a function of your own as module:function, which is given
            the instruction and the reply (see docs/how-to.md).
        n_top_heads: heads shown in detail.
        n_causal: report prompts that the causal tests run on, and select prompts that they take means from.
        n_fit: prompts of each kind that the direction's means are taken over, less those answered against their kind.
        n_select: prompts of each kind that score the candidate directions, likewise.
        layer_step: candidate directions are taken at every ``layer_step``-th layer (1: at all, as in the paper).
        layer_share: directions from later layers than this share of the depth are not chosen (the paper: 0.8).
        score_excluded: score those candidates fully that are excluded already, as too late or because adding them does
            not induce refusal, as in the paper's tables; the choice is the same without.
        induce_threshold: least refusal score that adding the direction must give harmless prompts (the paper: 0).
        alpha: strength at which the direction is added (the paper: 1).
        refusal_tokens: ids of the tokens that open the model's refusals; found from its replies if left out.
        kl_threshold: most that ablating the direction may move harmless replies (the paper: 0.1).
        keep_by_score: leave out harmful prompts that are not refused and harmless ones that are, by their refusal score
            (as in the paper).
        rescore: candidates, the best by a quick precision, that are scored again in the model's own at least.
        n_control_directions: random directions that are ablated and added beside the direction, for replies.
        text: a text file on which the cost of ablating the direction is measured too.
        prompts_per_split: use only so many prompts of each kind in select and report (for a quick look).
        seed: of attacks, controls, splits and random directions and heads; bootstraps always draw alike.
        score_dtype: precision of searches and replies: auto, float32 or bfloat16; traces run in the model's own.
        dtype: the model's own precision: float32, bfloat16 or float16.
        device: cpu, cuda, or auto, which spreads a large model over GPUs, memory and disk; the GPU if there is one.
        four_bit: quantise the weights to four bits (needs bitsandbytes).
        executor: where attacks, replies and traces run: local (one after the other) or ray (side by side; extra ray).
        address: of a Ray cluster; a local one is started if left out.
        attack_cpus: processors of each task under Ray.
        attack_gpus: GPUs of each task under Ray; parts of one may be given.
    """

    model: str = "embedded"
    adapter: str | None = None
    system: str | None = None
    reply_prefix: str | None = None
    harmful: str = "embedded"
    harmless: str = "embedded"
    column: str | None = None
    suffixes: str | None = None
    target: str = "Sure, here is"
    n_instructions: Whole = 4
    suffix_tokens: Whole = 20
    steps: Whole = 100
    n_attacks: Whole = 1
    flip_below: float = 0.5
    search_width: Whole = 96
    topk: Whole = 256
    stop_below: float = 0.2
    n_controls: Whole = 8
    n_traced: Whole = 64
    n_traced_controls: Whole = 8
    reply_tokens: Whole = 512
    judge: str = "rules"
    n_top_heads: Whole = 8
    n_causal: Whole = 32
    n_fit: Whole = 128
    n_select: Whole = 32
    layer_step: Whole = 1
    kl_threshold: float = 0.1
    layer_share: float = 0.8
    score_excluded: bool = True
    induce_threshold: float = 0.0
    alpha: float = 1.0
    keep_by_score: bool = True
    rescore: Whole = 8
    n_control_directions: Whole = 1
    refusal_tokens: Sequence[Whole] | None = None
    text: str | None = None
    prompts_per_split: Whole | None = None
    seed: Whole = 0
    score_dtype: str = "auto"
    dtype: str = "float32"
    device: str | None = None
    four_bit: bool = False
    executor: str = "local"
    address: str | None = None
    attack_cpus: Whole = 1
    attack_gpus: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "n_instructions": 1, "suffix_tokens": 1, "steps": 1, "n_attacks": 1, "search_width": 1, "topk": 1,
            "n_controls": 1, "n_traced": 2, "n_causal": 2, "n_traced_controls": 1, "reply_tokens": 8, "n_top_heads": 1,
            "n_fit": 8, "n_select": 2, "layer_step": 1, "attack_cpus": 1, "seed": 0, "prompts_per_split": 2,
            "rescore": 1, "n_control_directions": 0,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is None:  # prompts_per_split, where all are used
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{name} is {value!r}; it must be a whole number.")
            if value < low:
                raise UsageError(f"{name} is {value}; it must be at least {low}.")
            if value > MOST and name != "seed":
                raise UsageError(f"{name} is {value}; it must be at most {MOST}.")
        for name in TEXTS:
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be text.")
        for name in ("kl_threshold", "induce_threshold", "alpha", "layer_share", "attack_gpus"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a finite number.")
        if self.seed >= 2**32:
            raise UsageError(f"seed is {self.seed}; it must be at least 0 and below 2**32.")
        if self.refusal_tokens is not None:
            if not self.refusal_tokens or min(self.refusal_tokens) < 0:
                raise UsageError(f"refusal_tokens is {list(self.refusal_tokens)}; give token ids, or leave it out.")
            # a list where it comes from a file
            object.__setattr__(self, "refusal_tokens", tuple(dict.fromkeys(self.refusal_tokens)))
        require_layer_share(self.layer_share)
        for name in ("stop_below", "flip_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1.")
        if self.score_dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"score_dtype is {self.score_dtype!r}; choose auto, float32 or bfloat16.")
        if self.executor not in ("local", "ray"):
            raise UsageError(f"executor is {self.executor!r}; choose local or ray.")
        if self.attack_gpus < 0 or (self.attack_gpus > 1 and self.attack_gpus % 1):
            raise UsageError(f"attack_gpus is {self.attack_gpus}; it must be a part of one GPU, or a whole number.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"dtype is {self.dtype!r}; choose float32, bfloat16 or float16.")


@dataclass(frozen=True, kw_only=True)
class CampaignConfig(StudyConfig):
    """A campaign's settings: attacks on many instructions, with ``n_attacks`` seeds each and with varied settings.

    Attributes:
        each: attack the ``n_instructions`` instructions one by one instead of all together.
        vary: settings of the attack that take several values, each as ``search_width=[64,128]``.
    """

    each: bool = False
    vary: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suffixes is not None:
            raise UsageError("A campaign makes suffixes; leave suffixes out.")
        object.__setattr__(self, "vary", tuple(self.vary))
        self.settings()  # says what is wrong before a model is loaded

    def settings(self) -> list[dict[str, Any]]:
        """All combinations of the settings that are to vary.

        Raises:
            UsageError: not written as ``name=[value, value]``, or nothing that an attack is set by.
        """
        given: dict[str, list[Any]] = {}
        for text in self.vary:
            try:
                ((name, values),) = tomllib.loads(text).items()
            except (ValueError, RecursionError) as error:
                raise UsageError(f"vary is {text!r}; write it as search_width=[64,128].") from error
            if name not in VARIED:
                raise UsageError(f"vary is {text!r}; what may vary is {', '.join(VARIED)}.")
            if not isinstance(values, list) or not values or name in given or len({*map(repr, values)}) < len(values):
                raise UsageError(
                    f"vary is {text!r}; give every setting once, with all of its values, as {name}=[…, …]."
                )
            kind = type(getattr(self, name))
            wrong = [value for value in values if type(value) is not kind]
            if wrong:
                raise UsageError(
                    f"vary is {text!r}, but {name} is never {wrong[0]!r}; its values are of type {kind.__name__}."
                )
            given[name] = values
        found = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
        for own in found if given else ():
            replace(self, vary=(), **own)  # says which value is wrong
        return found


@dataclass(frozen=True, kw_only=True)
class DemoConfig(StudyConfig):
    """The demo's settings: a study with fewer controls and tests, for two cores and a quarter of an hour."""

    n_controls: Whole = 3
    n_traced: Whole = 48
    n_traced_controls: Whole = 2
    n_causal: Whole = 12
    reply_tokens: Whole = 24
    n_select: Whole = 16
    score_excluded: bool = False
