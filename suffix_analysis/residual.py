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
class Norm:
    """A norm as a linear map with a frozen scale: weight ⊙ y · scale(y) + bias, where y loses its mean if ``centred``.

    RMS norms are not centred, layer norms are. ``weight`` is the effective one, 1 + the stored weight where the family
    adds it.
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    eps: float
    centred: bool

    def scale(self, y: Float[Tensor, "*row d_model"]) -> Float[Tensor, " *row"]:
        """1 / rms(y), frozen where a write is divided into its parts."""
        y = y.float()
        y = y - y.mean(dim=-1, keepdim=True) if self.centred else y
        return (y.square().mean(dim=-1) + self.eps).rsqrt()

    def pull(self, reading: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """What reads from y, without its scale, what ``reading`` reads from the norm's output (but ``constant``)."""
        pulled = self.weight.to(reading.device) * reading
        return pulled - pulled.mean(dim=-1, keepdim=True) if self.centred else pulled

    def constant(self, reading: Float[Tensor, " d_model"]) -> float:
        """What ``reading`` reads from the norm's output whatever y is."""
        return float(self.bias.to(reading.device) @ reading)


@torch.no_grad()
def post_norm(block: Any, d_model: int) -> Norm | None:
    """The norm between a block's attention and the residual stream, or None."""
    if "ln1_post" not in (block.submodules or {}):
        return None
    return as_linear(block.ln1_post.original_component, d_model)


def post_norms(model: Model) -> list[Norm | None]:
    """The norm behind attention of every block, or None."""
    return [post_norm(block, model.d_model) for block in model.bridge.blocks]


def has_post_norms(model: Model) -> bool:
    """Whether a norm stands between any block's attention or MLP and the residual stream."""
    return any(name in (block.submodules or {}) for block in model.bridge.blocks for name in ("ln1_post", "ln2_post"))


@torch.no_grad()
def as_linear(norm: Any, d_model: int) -> Norm:
    """A norm module's effective weight, bias and epsilon, read from what it makes of three vectors."""
    eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
    with in_memory(norm):
        weight = next(norm.parameters(), torch.zeros(1))  # OLMo 1's norms have none
        signs = torch.ones(d_model, device=weight.device, dtype=weight.dtype)
        signs[1::2] = -1  # no mean, and a mean square of 1
        vectors = torch.stack([torch.zeros_like(signs), signs, torch.ones_like(signs)])
        bias, signed, level = type(norm).forward(norm, vectors[None])[0].float()
    own = (signed - bias) * signs.float() * (1 + float(eps)) ** 0.5
    return Norm(own, bias, float(eps), centred=bool((level - bias).abs().max() < 1e-3 * own.abs().max()))


@torch.no_grad()
def norm_error(norm: Any, d_model: int) -> float:
    """How far a norm module is from the linear map with a frozen scale that `as_linear` takes it for."""
    linear = as_linear(norm, d_model)
    y = torch.randn(4, d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    with in_memory(norm):
        weight = next(norm.parameters(), torch.zeros(1))
        wanted = type(norm).forward(norm, y[None].to(weight))[0].float().cpu()
    y = y - y.mean(dim=-1, keepdim=True) if linear.centred else y
    found = linear.weight.cpu() * y * linear.scale(y)[:, None] + linear.bias.cpu()
    return float((found - wanted).abs().max() / wanted.abs().max())


def multiplier(model: Model) -> float:
    """What every block's writes are multiplied by on their way to the residual stream (Granite), else 1."""
    return float(getattr(model.hf.config.get_text_config(), "residual_multiplier", 1.0))
