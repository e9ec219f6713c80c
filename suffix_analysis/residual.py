"""What stands between a block's attention output and the residual stream: a norm, a multiplier, or nothing.

This is all that differs in mathematics between the model families here; softcaps and embedding scales act elsewhere
and are part of the forward that is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.models import Model
from suffix_analysis.placement import in_memory


@dataclass(frozen=True)
class PostNorm:
    """An RMS norm after attention (Gemma 2 and 3, OLMo 2 and 3): write = weight ⊙ y / √(mean y² + eps).

    ``weight`` is the effective one, 1 + the stored weight where the family adds it.
    """

    weight: Float[Tensor, " d_model"]
    eps: float

    def scale(self, y: Float[Tensor, "*row d_model"]) -> Float[Tensor, " *row"]:
        """1 / rms(y), frozen where a write is divided into its parts."""
        return (y.float().square().mean(dim=-1) + self.eps).rsqrt()


@torch.no_grad()
def post_norm(block: Any, d_model: int) -> PostNorm | None:
    """The norm between a block's attention and the residual stream, or None."""
    if "ln1_post" not in (block.submodules or {}):
        return None
    return rms_norm(block.ln1_post.original_component, d_model)


def post_norms(model: Model) -> list[PostNorm | None]:
    """The norm behind attention of every block, or None."""
    return [post_norm(block, model.d_model) for block in model.bridge.blocks]


def has_post_norms(model: Model) -> bool:
    """Whether a norm stands between any block's attention or MLP and the residual stream."""
    return any(name in (block.submodules or {}) for block in model.bridge.blocks for name in ("ln1_post", "ln2_post"))


@torch.no_grad()
def rms_norm(norm: Any, d_model: int) -> PostNorm:
    """An RMS norm module's effective weight and epsilon."""
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
    with in_memory(norm):
        weight = next(norm.parameters())
        # an RMS norm returns its effective weight for a vector of ones
        ones = torch.ones(1, 1, d_model, device=weight.device, dtype=weight.dtype)
        return PostNorm(type(norm).forward(norm, ones)[0, 0].float(), float(eps))


def multiplier(model: Model) -> float:
    """What every block's writes are multiplied by on their way to the residual stream (Granite), else 1."""
    return float(getattr(model.hf.config.get_text_config(), "residual_multiplier", 1.0))
