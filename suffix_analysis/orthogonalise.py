"""Weight orthogonalisation (the paper, §4.1 and §E): the model that cannot write along a direction, in memory only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from suffix_analysis.errors import UserError
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model
from suffix_analysis.residual import has_post_norms

TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.bfloat16: 0.05,
    torch.float16: 0.01,
}  # of the largest logit
PROBE = "Write a short poem about the sea"


class NotAvailable(UserError):
    """Weight orthogonalisation cannot equal directional ablation on this model; the message says why."""


@contextlib.contextmanager
def orthogonalised(model: Model, vector: Float[Tensor, " d_model"]) -> Iterator[None]:
    """W ← W − r̂ r̂ᵀ W for every matrix and bias that writes to the residual stream; undone on exit, bit for bit.

    A tied output head keeps its own weights. On entry the edited model's logits are compared with those under
    `suffix_analysis.interventions.ablate`, which they must equal.

    Raises:
        NotAvailable: a norm stands between a matrix and the residual stream, or weights are quantised or offloaded.
    """
    if has_post_norms(model):
        raise NotAvailable(
            f"Weight orthogonalisation is not available for {model.name}: a norm stands between its matrices and the "
            "residual stream."
        )
    unit = (vector / vector.norm()).to(model.hf.device)
    sites = _writers(model)
    probe = model.chat(PROBE).ids[None].to(model.hf.device)
    with torch.no_grad(), ablate(model, vector):
        wanted = model.hf(input_ids=probe).logits.double()
    embed, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    tied = head.weight is embed.weight
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if tied:
            head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=embed.weight.requires_grad)
        for parameter, writes_rows in sites:
            saved.append((parameter, parameter.data))
            parameter.data = _without(parameter.data, unit, writes_rows)
        with torch.no_grad():
            found = model.hf(input_ids=probe).logits.double()
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE[model.hf.dtype]:
            raise NotAvailable(
                f"Weight orthogonalisation is not available for {model.name}: its logits differ from ablation's by "
                f"{error:.1e} of the largest, because a norm or another module stands behind the edited matrices."
            )
        yield
    finally:
        for parameter, data in saved:
            parameter.data = data
        if tied:
            head.weight = embed.weight


def _without(weight: Tensor, unit: Tensor, writes_rows: bool) -> Tensor:
    """The weight with the direction taken out of its output side: rows (embeddings, Conv1D) or columns (Linear)."""
    high = weight.to(torch.promote_types(weight.dtype, torch.float32))
    r = unit.to(high)
    if high.dim() == 1:
        out = high - (high @ r) * r
    elif writes_rows:
        out = high - (high @ r)[:, None] * r
    else:
        out = high - r[:, None] * (r @ high)
    return out.to(weight.dtype)


def _writers(model: Model) -> list[tuple[nn.Parameter, bool]]:
    """Every parameter that writes to the residual stream, and whether its rows (not columns) are what is written."""
    bridge, size = model.bridge, model.d_model
    modules: list[tuple[str, Any]] = [("the embedding", model.hf.get_input_embeddings())]
    for index, block in enumerate(bridge.blocks):
        for part, name in (("attn", "o"), ("mlp", "out")):
            owner = getattr(block, part, None)
            found = getattr(owner, name, None) if owner is not None else None
            if found is None:
                raise NotAvailable(
                    f"Weight orthogonalisation is not available for {model.name}: block {index} has no single matrix "
                    f"that its {part} writes with."
                )
            modules.append((f"block {index}'s {part}", found))
    sites: list[tuple[nn.Parameter, bool]] = []
    for label, module in modules:
        inner = getattr(module, "original_component", module)
        weight = getattr(inner, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.device.type == "meta":
            raise NotAvailable(
                f"Weight orthogonalisation is not available for {model.name}: {label} is quantised or offloaded."
            )
        # torch's Linear keeps [out, in]; embeddings and Conv1D keep [in, out]
        sites.append((weight, not isinstance(inner, nn.Linear)))
        bias = getattr(inner, "bias", None)
        if isinstance(bias, nn.Parameter) and bias.shape == (size,):
            sites.append((bias, True))
    return sites
