"""What each file of a run folder must hold (docs/run-folder.md), as pydantic models and column lists."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
"""The run-folder layout this package reads."""

REGIONS = ("bos", "system", "instruction", "suffix", "chat")
ARMS = (
    "none",
    "adversarial",
    "random",
    "shuffled",
    "failed",
    "benign",
    "harmless",
    "harmless+adversarial",
    "lookalike",
)
"""Arms in the order in which the page shows them; others follow in alphabetical order."""

Id = str | int


class Record(BaseModel):
    """A record from a file: unknown keys are ignored, known keys must have the right type."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class DirectionInfo(Record):
    """The chosen refusal direction: token position (−1 = chat[-1]), layer whose input it is read at, norm."""

    position: int
    layer: int
    token: str = ""
    norm: float | None = None
    top10_share: float | None = None


class RefusalToken(Record):
    """One next token that opens refusals."""

    id: int
    text: str


class Summary(Record):
    """findings/summary.json."""

    schema_version: int
    model: str
    embedded: bool = False
    n_layers: Annotated[int, Field(gt=0)]
    n_heads: Annotated[int, Field(gt=0)]
    d_model: Annotated[int, Field(gt=0)]
    target: str | None = None
    suffix_id: Id | None = None
    direction: DirectionInfo | None = None
    refusal_tokens: list[RefusalToken] = []
    n_prompts: dict[str, dict[str, int]] = {}
    retokenised: int | None = None
    skipped: list[str] = []


class Prompt(Record):
    """One line of prompts.jsonl."""

    id: Id
    kind: str
    split: str
    policy: str | None = None
    topic: str | None = None
    text: str


class Suffix(Record):
    """One line of suffixes.jsonl; loss in nats per target token."""

    id: Id
    arm: str
    ids: list[int] = []
    text: str
    n_tokens: int
    trained_on: list[Id] | None = None
    loss: float | None = None
    seed: int | None = None


class Step(Record):
    """One line of steps.jsonl."""

    step: int
    loss: float | None = None
    best_loss: float | None = None
    n_candidates: int | None = None
    n_rejected: int | None = None
    seconds: float | None = None
    select_refusal: float | None = None


class Pattern(Record):
    """Attention of the top heads on one prompt in one arm: ``attention[head][dest][src]``."""

    prompt_id: Id
    arm: str
    suffix_id: Id | None = None
    tokens: list[str]
    regions: list[str]
    heads: list[tuple[int, int]]
    attention: list[list[list[float]]]
    contribution: list[list[float | None]] = []


class Check(Record):
    """One identity or control: a measured value against its bound."""

    name: str
    value: float | bool | str | None = None
    bound: float | str | None = None
    passed: bool | None
    sentence: str = ""


class StageStatus(Record):
    """How one stage of the run ended; seconds of wall time."""

    state: str
    seconds: float | None = None


class Status(Record):
    """status.json."""

    state: Literal["running", "partly done", "done", "failed"]
    stages: dict[str, StageStatus] = {}
    schema_version: int | None = None
    peak_gib: float | None = None


COLUMNS: dict[str, tuple[str, ...]] = {
    "replies": ("arm", "split", "kind", "prompt_id", "suffix_id", "refused", "verdict", "refusal_score", "reply"),
    "refusal": ("arm", "split", "n_prompts", "n_suffixes", "refusal_rate", "refusal_lo", "refusal_hi"),
    "contrasts": ("measure", "arm", "against", "estimate", "lo", "hi", "n_prompts", "n_suffixes"),
    "interventions": (
        "intervention",
        "kind",
        "split",
        "alpha",
        "n_prompts",
        "refusal_rate",
        "refusal_lo",
        "refusal_hi",
    ),
    "candidates": ("position", "token", "layer", "refusal_score", "steering_score", "kl_div_score", "norm", "status"),
    "terms": ("arm", "layer", "term", "mean", "lo", "hi", "n_prompts"),
    "profile": ("arm", "layer", "measure", "mean", "lo", "hi", "n_prompts"),
    "heads": ("arm", "split", "layer", "head", "contribution"),
    "head_differences": ("arm", "against", "layer", "head", "contribution", "lo", "hi", "p"),
    "ranking": ("run", "measure", "n_heads", "k", "rank_correlation", "found"),
    "top_heads": ("rank", "layer", "head", "select_contribution"),
    "abilities": ("task", "metric", "intervention", "value", "change", "lo", "hi", "n"),
    "stability": ("measure", "value", "lo", "hi"),
    "cascade": ("rank", "auroc", "lo", "hi"),
    "two_directions": (
        "direction",
        "control",
        "cosine_with_refusal",
        "ablated_change",
        "ablated_lo",
        "ablated_hi",
        "added_change",
        "added_lo",
        "added_hi",
    ),
    "cost": ("material", "n_tokens", "none", "change"),
    "intervention_replies": ("intervention", "kind", "prompt_id", "refused", "verdict", "reply"),
    "carried": ("arm", "term", "value", "lo", "hi", "share", "share_lo", "share_hi"),
    "factors": ("arm", "layer", "head", "factor", "value", "lo", "hi", "share", "share_lo", "share_hi"),
    "separation": ("layer", "position", "auroc"),
    "mechanism_contrasts": ("kind", "measure", "arm", "against", "estimate", "lo", "hi", "n_prompts", "n_suffixes"),
    "causal": (
        "test",
        "heads",
        "on",
        "score_before",
        "score_after",
        "projection_recovered",
        "score_recovered",
        "n_prompts",
    ),
    "detectors": (
        "detector",
        "against",
        "auroc",
        "lo",
        "hi",
        "caught_1",
        "caught_5",
        "n_prompts",
        "n_suffixes",
        "n_others",
    ),
    "adaptive": ("defence", "step", "loss", "best_loss", "target_loss", "not_refused", "n_prompts", "n_train", "seed"),
    "adaptive_budget": ("defence", "steps_to_half", "steps_to_loss", "bar", "n_steps"),
    "mitigations": (
        "defence",
        "success",
        "success_lo",
        "success_hi",
        "refused",
        "lookalike",
        "lookalike_lo",
        "lookalike_hi",
        "cost",
        "slower",
        "n_prompts",
        "n_suffixes",
    ),
    "lens": ("arm", "layer", "mean", "lo", "hi", "n_prompts"),
    "logits": ("arm", "layer", "term", "head", "mean", "lo", "hi", "n_prompts"),
    "sweep": ("run", "layer", "head", "projection_effect", "projection_p"),
    "circuit": (
        "arm",
        "kind",
        "source_layer",
        "source_head",
        "position",
        "region",
        "target_layer",
        "target_head",
        "weight",
    ),
    "shift": ("arm", "layer", "head", "region", "attention", "attention_lo", "attention_hi", "contribution"),
}
"""Columns that each findings table must have; further ones are used where present."""

KEYS: dict[str, tuple[str, ...]] = {
    "replies": ("arm", "kind", "prompt_id"),
    "refusal": ("arm", "split", "n_prompts"),
    "contrasts": ("measure", "arm", "against", "n_prompts"),
    "interventions": ("intervention", "kind", "split"),
    "candidates": ("position", "layer", "status"),
    "terms": ("arm", "layer", "term"),
    "profile": ("arm", "layer", "measure"),
    "heads": ("arm", "split", "layer", "head"),
    "top_heads": ("rank", "layer", "head"),
    "abilities": ("task", "metric", "intervention"),
    "stability": ("measure",),
    "cascade": ("rank",),
    "two_directions": ("direction",),
    "cost": ("material",),
    "intervention_replies": ("intervention", "kind", "prompt_id"),
    "carried": ("arm", "term", "value"),
    "factors": ("arm", "layer", "head", "factor", "value"),
    "separation": ("layer", "position"),
    "mechanism_contrasts": ("kind", "measure", "arm", "against", "n_prompts"),
    "head_differences": ("against", "layer", "head", "contribution"),
    "ranking": ("run", "measure", "n_heads", "k"),
    "causal": ("test", "heads", "on", "n_prompts"),
    "detectors": ("detector", "against"),
    "adaptive": ("defence", "step", "n_prompts", "n_train"),
    "adaptive_budget": ("defence", "n_steps"),
    "mitigations": ("defence", "n_prompts", "n_suffixes"),
    "lens": ("arm", "layer", "n_prompts"),
    "logits": ("arm", "layer", "term", "head"),
    "sweep": ("run", "layer", "head"),
    "circuit": ("arm", "kind"),
    "shift": ("arm", "layer", "head", "region"),
}
"""Columns of each table that no row may leave empty; others may lack a value."""

_TARGET = ("target_layer", "target_head")
CIRCUIT_ENDS: dict[str, tuple[str, ...]] = {
    "region → head": ("region", *_TARGET),
    "region → early": ("region", "position", *_TARGET),
    "early → head": ("source_layer", "source_head", "position", *_TARGET),
    "mlp → head": ("source_layer", "position", *_TARGET),
    "embedding → head": ("position", *_TARGET),
    "head → direction": ("source_layer", "source_head"),
    "mlp → direction": ("source_layer",),
}
"""Kinds of edges of the circuit, and the columns that say where each begins and ends."""
