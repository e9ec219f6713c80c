"""Interventions on the residual stream as context managers on the bridge (the paper, §2.4 and §4.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.models import Model


def writes(n_layers: int) -> list[str]:
    """Hook names of the first block's input and of what attention and MLP of every block write to the residual stream.

    Every later block's input is the sum of these, so cutting them cuts it too (the tests assert that); the paper's
    third cut, at each block's input, would remove nothing but rounding.
    """
    return [
        "blocks.0.hook_resid_pre",
        *(f"blocks.{layer}.{name}" for layer in range(n_layers) for name in ("hook_attn_out", "hook_mlp_out")),
    ]


@contextlib.contextmanager
def ablate(model: Model, vector: Float[Tensor, "*row d_model"]) -> Iterator[None]:
    """Directional ablation: x ← x − (x·r̂) r̂ on the whole residual stream, at every position (see `writes`).

    ``vector`` is one for all, or one for every row of the batches that run inside the context. Also acts on tokens
    generated inside the context. What other hooks put into the stream themselves (`add`) stays there. All hooks
    are gone afterwards, also after an exception.

    Raises:
        ValueError: the vector is zero or not finite.
    """
    norm = vector.norm(dim=-1, keepdim=True)
    wrong = norm[~((norm > 0) & norm.isfinite())]
    if len(wrong):
        raise ValueError(f"a direction of norm {float(wrong[0])} cannot be ablated")
    unit = (vector / norm).to(model.hf.device)

    def remove(x: Tensor, hook: Any) -> Tensor:
        return _with_projection(x, unit, 0.0)

    with model.bridge.hooks(fwd_hooks=[(name, remove) for name in writes(model.n_layers)]):
        yield


def _with_projection(
    x: Float[Tensor, "row token d_model"], unit: Float[Tensor, "*row d_model"], level: float
) -> Float[Tensor, "row token d_model"]:
    """x + (level − x·r̂) r̂, with one r̂ for all rows or one for each."""
    r = unit.to(x)
    if r.dim() == 1:
        return x + (level - x @ r).unsqueeze(-1) * r
    return x + (level - x @ r[:, :, None]) * r[:, None]


@contextlib.contextmanager
def add(model: Model, vector: Float[Tensor, "*row d_model"], layer: int, alpha: float = 1.0) -> Iterator[None]:
    """Activation addition: x_l ← x_l + α r at the input of block ``layer`` only, at every position.

    ``vector`` is one for all, or one for every row of the batches that run inside the context.

    Raises:
        ValueError: there is no such layer.
    """
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer {layer} does not exist; the model has {model.n_layers} blocks")
    shift = (alpha * vector).to(model.hf.device)
    shift = shift if shift.dim() == 1 else shift[:, None]

    def push(x: Tensor, hook: Any) -> Tensor:
        return x + shift.to(x)

    with model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", push)]):
        yield


@contextlib.contextmanager
def set_projection(model: Model, vector: Float[Tensor, " d_model"], levels: Float[Tensor, " depth"]) -> Iterator[None]:
    """Affine restore: x_l ← x_l − (x_l·r̂) r̂ + levels_l r̂ at every block's input and after the last, at every position.

    Ablation leaves a projection of 0, which no prompt has; with the mean projection of harmless (or harmful) prompts as
    ``levels`` the stream carries what such prompts carry (Marshall et al. 2024, "Refusal in LLMs is an Affine
    Function"). Nothing inside a block writes along r̂, so attention and MLP both read its level. With levels of 0 it
    is ablation.

    Raises:
        ValueError: the vector is zero or not finite, or there are not ``n_layers + 1`` levels.
    """
    if len(levels) != model.n_layers + 1:
        raise ValueError(f"{len(levels)} levels were given for {model.n_layers} blocks; give one more than blocks")
    unit = (vector / vector.norm()).to(model.hf.device)

    def put(level: float) -> Callable[[Tensor, Any], Tensor]:
        return lambda x, hook: _with_projection(x, unit, level)

    last = model.n_layers - 1
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)] + [f"blocks.{last}.hook_resid_post"]
    hooks = [(name, put(level)) for name, level in zip(names, levels.tolist(), strict=True)]
    with ablate(model, vector), model.bridge.hooks(fwd_hooks=hooks):
        yield


def random_directions(vector: Float[Tensor, " d_model"], count: int, seed: int) -> list[Float[Tensor, " d_model"]]:
    """Random directions orthogonal to ``vector`` and as long: what any direction of that length would do."""
    generator = torch.Generator().manual_seed(seed)
    unit = vector / vector.norm()
    made = []
    for _ in range(count):
        noise = torch.randn(len(vector), generator=generator).to(vector)
        noise = noise - (noise @ unit) * unit
        made.append(noise / noise.norm() * vector.norm())
    return made
