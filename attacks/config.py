"""The attack's settings and records."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

ScoreDtype = Literal["auto", "float32", "bfloat16"]


class AttackError(ValueError):
    """Something about the attack's input is wrong; the message says what, which value, and what to do."""


@dataclass(frozen=True)
class GCGConfig:
    """Settings of one attack, named as nanoGCG's so that its users find their way.

    ``score_dtype`` is the precision of the search over candidates, never wider than the model's: ``"auto"`` measures at
    start-up whether bfloat16 is the faster one here, and the ``rescore`` best candidates are scored again in the
    model's own precision, which alone decides. ``verbosity`` is nanoGCG's and changes nothing, because this package
    prints nothing. ``compat`` switches to nanoGCG 0.2.3's behaviour in every detail that moves the trajectory; build it
    with `nanogcg`.

    What nanoGCG does not have: ``progressive_goals`` begins a universal attack with one conversation and takes in the
    next whenever all present targets are met (as llm-attacks does). ``momentum`` adds that share of the last steps'
    gradients to the present one. ``n_replace_start`` and ``search_width_start`` replace more tokens and score more (or
    fewer) candidates in the first steps, going in a straight line to ``n_replace`` and ``search_width`` at half of
    ``num_steps``. ``even_positions`` spreads the candidates over the positions instead of drawing positions at random.
    ``halving`` scores the candidates of a universal attack on one conversation after another, each time going on with
    the better half only. ``merge`` lets the changes of the best 2, 3, … ``merge`` candidates compete together (Jia et
    al. 2024, arXiv 2405.21018); 0 and 1 turn it off. ``patience`` steps without a new best send the search back to the
    best suffix.
    """

    num_steps: int = 250
    optim_str_init: str | tuple[str, ...] | list[str] = "x x x x x x x x x x x x x x x x x x x x"
    search_width: int = 512
    batch_size: int | None = None
    topk: int = 256
    n_replace: int = 1
    buffer_size: int = 0
    use_mellowmax: bool = False
    mellowmax_alpha: float = 1.0
    early_stop: bool = False
    use_prefix_cache: bool = True
    allow_non_ascii: bool = False
    filter_ids: bool = True
    add_space_before_target: bool = False
    seed: int | None = None
    verbosity: str = "INFO"
    score_dtype: ScoreDtype = "auto"
    rescore: int = 8
    progressive_goals: bool = False
    momentum: float = 0.0
    n_replace_start: int | None = None
    search_width_start: int | None = None
    even_positions: bool = False
    halving: bool = True
    merge: int = 8
    patience: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.optim_str_init, str):
            object.__setattr__(self, "optim_str_init", tuple(self.optim_str_init))
        if not self.optim_str_init:
            raise AttackError(f"optim_str_init is {self.optim_str_init!r}; give an initial suffix, or several.")
        for field in fields(self):
            kind, value = str(field.type), getattr(self, field.name)
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if kind in ("int", "int | None") and not (whole or (value is None and kind != "int")):
                raise AttackError(f"{field.name} is {value!r}; it must be a whole number.")
        if not self.mellowmax_alpha > 0:
            raise AttackError(f"mellowmax_alpha is {self.mellowmax_alpha}; it must be above 0.")
        for name in ("num_steps", "search_width", "topk", "n_replace", "rescore"):
            if getattr(self, name) < 1:
                raise AttackError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("buffer_size", "merge"):
            if getattr(self, name) < 0:
                raise AttackError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.batch_size is not None and self.batch_size < 1:
            raise AttackError(f"batch_size is {self.batch_size}; leave it out or give at least 1.")
        if not 0 <= self.momentum < 1:
            raise AttackError(f"momentum is {self.momentum}; it must be at least 0 and below 1.")
        for name in ("n_replace_start", "search_width_start", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AttackError(f"{name} is {value}; leave it out or give at least 1.")
        if self.score_dtype not in ("auto", "float32", "bfloat16"):
            raise AttackError(f"score_dtype is {self.score_dtype!r}; choose auto, float32 or bfloat16.")

    @classmethod
    def nanogcg(cls, *, score_dtype: ScoreDtype = "float32", **keywords: Any) -> GCGConfig:
        """nanoGCG 0.2.3's behaviour from this engine: the same keywords, the same sampling order, the same faults.

        ``score_dtype="bfloat16"`` searches in bfloat16 and lets float32 rescoring decide. On a GPU nanoGCG draws from
        the GPU's generator and this engine from its own on the CPU, so trajectories are equal on a CPU only.

        Raises:
            AttackError: a setting that nanoGCG does not have.
        """
        foreign = [name for name in keywords if name in NANOGCG or name in ("rescore", "compat")]
        if foreign:
            raise AttackError(f"nanoGCG has no {foreign[0]}; leave it out, or use GCGConfig(...) for it.")
        return cls(**{**NANOGCG, **keywords}, compat=True, score_dtype=score_dtype)


# what this engine has and nanoGCG has not, switched off
NANOGCG: dict[str, Any] = {
    "progressive_goals": False,
    "momentum": 0.0,
    "n_replace_start": None,
    "search_width_start": None,
    "even_positions": False,
    "halving": False,
    "merge": 0,
    "patience": None,
}


@dataclass(frozen=True)
class Step:
    """One step of the attack, as yielded while it runs.

    ``loss`` is the chosen candidate's mean loss (nats per target token), ``per_goal`` the same for each conversation
    that takes part so far, ``flops`` what the step's forwards and backwards cost (2 per weight and token, 6 with a
    gradient); ``best_loss``, ``best_string`` and ``best_ids`` are the lowest so far. ``n_candidates`` distinct
    candidates were scored, and ``n_rejected`` drawn or combined ones did not survive re-tokenisation in context.
    ``matched``: greedy decoding would produce every target.
    """

    step: int
    loss: float
    best_loss: float
    ids: tuple[int, ...]
    string: str
    best_string: str
    best_ids: tuple[int, ...]
    per_goal: tuple[float, ...]
    n_candidates: int
    n_rejected: int
    seconds: float
    flops: float
    matched: bool


@dataclass(frozen=True)
class GCGResult:
    """What an attack found; the first four fields are nanoGCG's."""

    best_loss: float
    best_string: str
    losses: list[float]
    strings: list[str]
    best_ids: tuple[int, ...]
    steps: tuple[Step, ...]


def resolve_dtype(name: ScoreDtype, model: torch.nn.Module) -> torch.dtype:
    """The torch dtype to search in for ``name`` on ``model``'s device."""
    from attacks.precision import fast_dtype, stays_put

    own = next(model.parameters()).dtype
    if name == "auto":
        can_be_cast = own == torch.float32 and not stays_put(model)
        return fast_dtype(next(model.parameters()).device) if can_be_cast else own
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return wanted if wanted.itemsize < own.itemsize else own
