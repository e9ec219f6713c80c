"""Two-hop paths: what the strongest heads read at chat tokens, and which earlier heads put it there from which source.

With attention and the norms' scales frozen, what a head brings from a chat token to chat[-1] is linear in that token's
state, and the state is the sum of all that was written to it. So its contribution splits exactly over earlier heads
(and their sources), MLPs and the embedding (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.causal import Head
from suffix_analysis.chat import REGIONS
from suffix_analysis.placement import in_memory
from suffix_analysis.replay import Prepared
from suffix_analysis.residual import as_linear, multiplier, post_norms
from suffix_analysis.stats import interval
from suffix_analysis.traces import output_directions


@dataclass(frozen=True)
class Paths:
    """Contributions along r̂ at chat[-1] that pass through chat tokens into each of some heads (``into``).

    ``through_heads`` are paths region → head → chat token → head of ``into``; ``through_mlp`` and ``embedding`` what
    the token's MLPs and embedding give; ``bias`` all biases on the way. ``whole`` is what the heads bring from each
    chat token, and ``error`` the largest miss of the sum, as a share of the largest of ``whole``. ``direct`` is what
    the heads bring from each region in one hop (chat tokens included). ``mlps`` is what the MLPs write at chat[-1]
    themselves, before the direction is read.
    """

    into: tuple[Head, ...]
    through_heads: Float[Tensor, "prompt into chat layer head region"]
    through_mlp: Float[Tensor, "prompt into chat layer"]
    embedding: Float[Tensor, "prompt into chat"]
    bias: Float[Tensor, "prompt into chat"]
    whole: Float[Tensor, "prompt into chat"]
    direct: Float[Tensor, "prompt into region"]
    mlps: Float[Tensor, "prompt layer"]
    error: float


@torch.no_grad()
def find_paths(run: Prepared, unit: Float[Tensor, " d_model"], into: Sequence[Head], below: int | None = None) -> Paths:
    """Split what the heads ``into`` bring to chat[-1] from the chat tokens, exactly.

    Args:
        run: the prompts.
        unit: r̂.
        into: the (layer, head) pairs whose input is looked into.
        below: the layer at which the direction is read; later MLPs cannot have moved it. All count if left out.
    """
    model = run.model
    device = model.hf.device
    norms = post_norms(model)
    ends = output_directions(model, unit.float().to(device), norms)
    places = range(run.n_chat)
    scales = [
        None if norm is None else torch.stack([norm.scale(run.attention_output(n, p)) for p in places], dim=1)
        for n, norm in enumerate(norms)
    ]
    values = [_all_values(run, n) for n in range(model.n_layers)]
    masks = torch.stack([run.regions[name] for name in REGIONS], dim=-1).float()
    gathered: dict[str, list[Tensor]] = {name: [] for name in ("heads", "mlp", "embedding", "bias", "whole", "direct")}
    for layer, head in into:
        n_group = run.z.shape[3] // run.v.shape[3]
        along = values[layer][:, :, head // n_group] @ ends[layer, head]
        row = run.pattern[:, layer, head, -1].float()
        if (scale := scales[layer]) is not None:
            row = row * scale[:, -1:]
        brought = row * along
        gathered["direct"].append(torch.einsum("bt,btr->br", brought, masks))
        gathered["whole"].append(brought[:, -run.n_chat :])
        reading, constant = _reading(run, layer, head // n_group, ends[layer, head])
        reading = reading * row[:, -run.n_chat :, None]  # [prompt chat d_model]
        gathered["bias"].append(constant * row[:, -run.n_chat :])
        gathered["embedding"].append((run.resid[:, 0].float() * reading).sum(-1))
        parts, mlps = [], []
        for earlier in range(model.n_layers):
            if earlier >= layer:  # later blocks write after the head has read
                parts.append(torch.zeros(len(run), run.n_chat, run.z.shape[3], len(REGIONS), device=device))
                mlps.append(torch.zeros(len(run), run.n_chat, device=device))
                continue
            mlps.append((run.mlp_out[:, earlier].float() * reading).sum(-1))
            parts.append(_by_source(run, earlier, reading, norms[earlier], scales[earlier], values[earlier], masks))
            gathered["bias"][-1] = gathered["bias"][-1] + _bias(run, earlier, reading, norms[earlier], scales[earlier])
        gathered["heads"].append(torch.stack(parts, dim=2))
        gathered["mlp"].append(torch.stack(mlps, dim=2))
    stacked = {name: torch.stack(found, dim=1).cpu() for name, found in gathered.items()}
    total = stacked["heads"].sum(dim=(3, 4, 5)) + stacked["mlp"].sum(dim=3) + stacked["embedding"] + stacked["bias"]
    error = float((total - stacked["whole"]).abs().max() / stacked["whole"].abs().max().clamp(min=1e-30))
    own = (run.mlp_out[:, :, -1].float() @ unit.float().to(device)).cpu()
    own[:, model.n_layers if below is None else below :] = 0
    return Paths(
        tuple(into), stacked["heads"], stacked["mlp"], stacked["embedding"], stacked["bias"], stacked["whole"],
        stacked["direct"], own, error,
    )  # fmt: skip


def _all_values(run: Prepared, layer: int) -> Float[Tensor, "prompt token kv_head d_head"]:
    """Values of all tokens."""
    return torch.cat([run.values[layer].transpose(1, 2), run.v[:, layer]], dim=1).float()


def _reading(
    run: Prepared, layer: int, kv_head: int, end: Float[Tensor, " d_head"]
) -> tuple[Float[Tensor, "prompt chat d_model"], float]:
    """The vector whose product with a chat token's state is its value's write along r̂, and what is constant in it."""
    block = run.model.bridge.blocks[layer]
    with in_memory(block.attn):
        matrix = block.attn.W_V.detach().float()[kv_head].to(end.device)
        bias = getattr(block.attn, "b_V", None)
        own = None if bias is None else bias.detach().float().view(-1, matrix.shape[1])[kv_head]
        constant = 0.0 if own is None else float(own.to(end.device) @ end)
    vector = matrix @ end
    if "ln1" not in (block.submodules or {}):
        return vector.expand(len(run), run.n_chat, -1), constant
    norm = as_linear(block.ln1.original_component, run.model.d_model)
    scale = norm.scale(run.resid[:, layer])
    return scale[..., None] * norm.pull(vector), constant + norm.constant(vector)


def _target(run: Prepared, layer: int, reading: Tensor, norm: Any, scale: Tensor | None) -> Tensor:
    """``reading`` moved to the other side of what stands behind a block's attention."""
    if norm is not None:
        assert scale is not None
        reading = norm.pull(reading) * scale[..., None]
    return multiplier(run.model) * reading


def _by_source(
    run: Prepared, layer: int, reading: Tensor, norm: Any, scale: Tensor | None, values: Tensor, masks: Tensor
) -> Float[Tensor, "prompt chat head region"]:
    """What each head of ``layer`` writes to the chat tokens along ``reading``, by the region it takes it from."""
    block = run.model.bridge.blocks[layer]
    with in_memory(block.attn):
        weight = block.attn.W_O.detach().float().to(reading.device)
    back = torch.einsum("bpe,hde->bphd", _target(run, layer, reading, norm, scale), weight)
    grouped = back.unflatten(2, (values.shape[2], -1))
    along = torch.einsum("btgd,bpgjd->bpgjt", values, grouped).flatten(2, 3)
    return torch.einsum("bpht,bhpt,btr->bphr", along, run.pattern[:, layer].float(), masks)


def _bias(run: Prepared, layer: int, reading: Tensor, norm: Any, scale: Tensor | None) -> Tensor:
    """What the attention's output bias writes to the chat tokens along ``reading``."""
    block = run.model.bridge.blocks[layer]
    with in_memory(block.attn):
        bias = getattr(block.attn, "b_O", None)
        if bias is None:
            return torch.zeros(len(run), run.n_chat, device=reading.device)
        return _target(run, layer, reading, norm, scale) @ bias.detach().float().to(reading.device)


# --- the graph -------------------------------------------------------------------------------------------------------

# of all that the top heads bring, or all that MLPs write: weaker edges are left out
EDGE_SHARE = 0.02


def edge_weights(paths: Paths) -> dict[tuple[Any, ...], Float[Tensor, " prompt"]]:
    """Every possible edge's weight along r̂: (kind, source layer, source head, chat token, region, target) → by prompt.

    Kinds: ``region → head`` (one hop), ``region → early`` and ``early → head`` (the two halves of paths through an
    earlier head at a chat token; the first summed over what reads it), ``mlp → head``, ``embedding → head`` and
    ``head → direction`` and ``mlp → direction``. The token is counted from the end: −1 is chat[-1]. What does not apply
    is None.
    """
    found: dict[tuple[Any, ...], Tensor] = {}
    n_chat, n_layers, n_heads = paths.through_heads.shape[2:5]
    for layer in range(n_layers):
        found["mlp → direction", layer, None, -1, None, None] = paths.mlps[:, layer]
    for i, head in enumerate(paths.into):
        for r, region in enumerate(REGIONS):
            found["region → head", None, None, None, region, head] = paths.direct[:, i, r]
        found["head → direction", *head, None, None, None] = paths.direct[:, i].sum(dim=1)
    by_region, by_head = paths.through_heads.sum(dim=1), paths.through_heads.sum(dim=-1)
    for p in range(n_chat):
        for layer in range(n_layers):
            for early in range(n_heads):
                for r, region in enumerate(REGIONS):
                    found["region → early", None, None, p - n_chat, region, (layer, early)] = by_region[
                        :, p, layer, early, r
                    ]
                for i, head in enumerate(paths.into):
                    found["early → head", layer, early, p - n_chat, None, head] = by_head[:, i, p, layer, early]
            for i, head in enumerate(paths.into):
                found["mlp → head", layer, None, p - n_chat, None, head] = paths.through_mlp[:, i, p, layer]
        for i, head in enumerate(paths.into):
            found["embedding → head", None, None, p - n_chat, None, head] = paths.embedding[:, i, p]
    return found


def kept_edges(select: Sequence[Paths], share: float = EDGE_SHARE) -> list[tuple[Any, ...]]:
    """The edges whose mean weight reaches a share of its kind's total in one of the select split's arms.

    Totals are those of the first arm: Σ over the top heads of what each brings, and Σ over MLPs, both by size.
    """
    heads = float(select[0].direct.sum(dim=2).mean(dim=0).abs().sum())
    mlps = float(select[0].mlps.mean(dim=0).abs().sum())
    weights = [edge_weights(paths) for paths in select]

    def strong(key: tuple[Any, ...]) -> bool:
        least = share * (mlps if key[0] == "mlp → direction" else heads)
        return max(abs(float(arm[key].mean())) for arm in weights) >= least > 0

    return [key for key in weights[0] if strong(key)]


def edge_rows(arms: dict[str, Sequence[Paths]], kept: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """The graph record: kept edges with their weight in every arm (mean over prompts and suffixes, with its interval).

    ``arms`` holds the same prompts' paths with each of an arm's suffixes (one, without a suffix).
    """
    rows = []
    for arm, by_suffix in arms.items():
        # of all edges, which are many, one suffix's at a time
        weights = [[every[key] for key in kept] for every in map(edge_weights, by_suffix)]
        for number, (kind, layer, head, token, region, target) in enumerate(kept):
            cells = torch.stack([own[number] for own in weights], dim=1).double().numpy()
            found = interval(cells, suffix_arm=arm != "none")
            rows.append(
                {
                    "arm": arm, "split": "report", "chosen_on": "select", "kind": kind,
                    "source_layer": layer, "source_head": head,
                    "position": token, "region": region,
                    "target_layer": None if target is None else target[0],
                    "target_head": None if target is None else target[1],
                    "weight": found.estimate, "lo": found.lo, "hi": found.hi, "n_prompts": found.n_prompts,
                    "n_suffixes": found.n_suffixes,
                }
            )  # fmt: skip
    return rows


def joined(parts: Sequence[Paths]) -> Paths:
    """The paths of several groups of prompts as one."""
    tensors = ("through_heads", "through_mlp", "embedding", "bias", "whole", "direct", "mlps")
    return Paths(
        into=parts[0].into,
        error=float(torch.tensor([part.error for part in parts]).max()),  # NaN where one is
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors},
    )
