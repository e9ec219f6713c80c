"""What the attack minimises, from logits at the target's positions (Zou et al. 2023, eq. 3)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.config import GCGConfig


def target_loss(
    logits: Float[Tensor, "cand target vocab"], target_ids: Int[Tensor, " target"], config: GCGConfig
) -> Float[Tensor, " cand"]:
    """Mean cross-entropy of the target (nats per token), or mellowmax of its label logits when asked for.

    The logits are flattened to two dimensions first: cross-entropy over a transposed view is three times slower.
    """
    n_cand, n_target, _ = logits.shape
    labels = target_ids.to(logits.device).expand(n_cand, n_target)
    if config.use_mellowmax:
        chosen = -logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        alpha = config.mellowmax_alpha
        return (torch.logsumexp(alpha * chosen, dim=-1) - math.log(n_target)) / alpha
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(n_cand, n_target).mean(dim=-1)
