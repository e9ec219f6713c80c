"""The instrumented forward: projections by layer, attention rows and exact head contributions at chat[-1].

Runs through the TransformerBridge over the weights the attack used. Only the destination's row of every pattern is
kept, so what is held does not grow with the square of the prompt; while it runs, one block's whole pattern is there
(behind what all prompts begin with), because the bridge computes attention eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.caches import prefix_cache
from attacks.precision import or_float32
from suffix_analysis.batching import Batch, prefix_batches
from suffix_analysis.chat import REGIONS, Chat
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.forward import run_batch
from suffix_analysis.models import Model
from suffix_analysis.placement import in_memory
from suffix_analysis.prompts import Prompt, to_prompts
from suffix_analysis.residual import Norm, multiplier, post_norms

Job = tuple[Sequence[Prompt], str]  # prompts to trace, with a suffix or an empty one
CANCELS = 0.1  # share of the contributions' absolute values that a write is held to at least: float32 sums keep 1e-6
IDENTITY_BOUND = 1e-5  # of the write's length (METHODS §3)
CLOSURE_BOUND = 1e-4  # of the final residual stream's length: a sum over all layers


@dataclass(frozen=True)
class Traces:
    """What one forward per prompt showed at chat[-1] (or another chat token), in units of r̂.

    ``projection`` and ``norm``: of the residual stream at every block's input and, last, after the last block (depth is
    layer + 1).
    ``attention`` and ``contribution``: summed over each region of ``REGIONS``; ``sink`` is the attention to the very
    first token, where heads that have nothing to read look, whatever it holds. Contributions are exact shares of the
    attention write, not effects of deleting the source. ``attention_bias``, ``attention_out``, ``mlp_out`` and
    ``embedding`` (block 0's input) are the other terms. ``rows`` (where kept): per prompt, attention and contribution
    by token. ``dominance`` is each region's share of the attention output Y before bias and norm, ⟨Σ Y_k, Y⟩/‖Y‖² over
    all heads: signed, and 1 over all regions; the suffix's is its hijacking strength (Ben-Tov et al. 2025).
    ``identity`` is the largest error of Σ contributions + bias against the write, as a share of the write's length
    (or of ``CANCELS`` times the sum of the contributions' absolute values, where they leave little but rounding);
    ``closure`` that of embedding + Σ writes against the final residual, as a share of its length.
    """

    chats: tuple[Chat, ...]
    projection: Float[Tensor, "prompt depth"]
    norm: Float[Tensor, "prompt depth"]
    attention: Float[Tensor, "prompt layer head region"]
    contribution: Float[Tensor, "prompt layer head region"]
    sink: Float[Tensor, "prompt layer head"]
    attention_out: Float[Tensor, "prompt layer"]
    mlp_out: Float[Tensor, "prompt layer"]
    embedding: Float[Tensor, " prompt"]
    attention_bias: Float[Tensor, " layer"]
    dominance: Float[Tensor, "prompt layer region"]
    n_tokens: Float[Tensor, "prompt region"]
    rows: tuple[tuple[Float[Tensor, "layer head _"], Float[Tensor, "layer head _"]], ...]
    identity: float
    closure: float

    @property
    def head_contribution(self) -> Float[Tensor, "prompt layer head"]:
        """Σ over source tokens: what each head writes along r̂."""
        return self.contribution.sum(dim=-1)


def output_directions(
    model: Model, unit: Float[Tensor, " d_model"], norms: Sequence[Norm | None]
) -> Float[Tensor, "layer head d_head"]:
    """W_O r̂ of every head: the dot product of a head's value with it is its write along r̂.

    With a multiplier m it is m W_O r̂; with a post-norm of weight w, W_O (w ⊙ r̂), and its scale 1/rms is still to be
    applied (METHODS §3).
    """
    found = []
    for block, norm in zip(model.bridge.blocks, norms, strict=True):
        with in_memory(block.attn):
            weight = block.attn.W_O.detach().float()
            target = (unit if norm is None else unit * norm.weight.to(unit.device)).to(weight.device)
            found.append((weight @ target).to(unit.device))
    return multiplier(model) * torch.stack(found)


def values_along(
    v: Float[Tensor, "prompt token kv_head d_head"], heads: Float[Tensor, "head d_head"]
) -> Float[Tensor, "prompt head token"]:
    """What each head of a block would write along r̂ per unit of attention (see `output_directions`)."""
    # query head h reads key-value head h // (H/G)
    grouped = heads.unflatten(0, (v.shape[2], -1)).to(v.device)
    return torch.einsum("btgd,ghd->bght", v.float(), grouped).flatten(1, 2)


def trace(
    model: Model,
    prompts: Sequence[Prompt | str | Chat],
    direction: Direction | Float[Tensor, " d_model"],
    *,
    suffix: str = "",
    position: int = -1,
    keep_rows: bool = False,
    check: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> Traces:
    """Run every prompt once and record what happens at chat[-1] along the direction.

    Args:
        model: the model; its bridge is used.
        prompts: instructions (``suffix`` is appended to each) or chats that are already rendered.
        direction: a direction, or a vector.
        suffix: text after every instruction.
        position: the destination, a chat token: −1 is chat[-1].
        keep_rows: keep attention and contribution by source token, not only by region.
        check: refuse traces whose identities fail; ``identity`` and ``closure`` are there either way.
        on_batch: called with the number of prompts done after each batch.

    Raises:
        UserError: a direction of another width or without a length, a value is not finite, attention rows are missing,
            or the sum of the contributions is not the attention write (the model then has a norm or a multiplier
            between them that is not known here).
    """
    chats = [p if isinstance(p, Chat) else model.chat(p.text, suffix) for p in _as_prompts(prompts)]
    if not chats:
        raise UserError("There are no prompts to trace; give at least one.")
    shortest = min(chat.n_chat for chat in chats)
    if not -shortest <= position <= -1:
        raise UserError(f"position is {position}; the prompts have {shortest} chat tokens, so −{shortest} to −1.")
    vector = direction.vector if isinstance(direction, Direction) else direction
    length = float(vector.norm())
    if vector.shape != (model.d_model,) or not 0 < length < float("inf"):
        raise UserError(
            f"The direction has {len(vector)} coordinates and length {length:g}; {model.name} needs {model.d_model} "
            "and a length above 0."
        )
    unit = (vector / vector.norm()).float().to(model.hf.device)
    norms = post_norms(model)
    heads = output_directions(model, unit, norms)
    kept: dict[int, dict[str, Any]] = {}
    ids = [chat.ids for chat in chats]
    n_prefix, groups = prefix_batches(model.hf, model.tokenizer, ids, leave=shortest)
    prefix = prefix_cache(model.hf, ids[0][:n_prefix])
    for batch in groups:
        some = [chats[i] for i in batch.members]
        records = _batch(model, some, batch, prefix, unit, heads, norms, position, keep_rows)
        kept.update(zip(batch.members, records, strict=True))
        if on_batch is not None:
            on_batch(len(some))
    traces = _collect(model, chats, [kept[i] for i in range(len(chats))], unit)
    if check:
        _check(traces, model)
    return traces


def _as_prompts(prompts: Sequence[Prompt | str | Chat]) -> list[Any]:
    if isinstance(prompts, str):
        return to_prompts(prompts)  # which refuses it
    return [p if isinstance(p, Chat) else to_prompts([p])[0] for p in prompts]


@torch.no_grad()
def _batch(
    model: Model,
    chats: list[Chat],
    batch: Batch,
    prefix: Any,
    unit: Tensor,
    heads: Tensor,
    norms: Sequence[Norm | None],
    at: int,
    keep_rows: bool,
) -> list[dict[str, Any]]:
    """One padded forward behind the shared prefix; returns a record per prompt."""
    n_layers = model.n_layers
    seen: dict[tuple[str, int], Tensor] = {}

    def at_end(kind: str, layer: int) -> Callable[[Tensor, Any], None]:
        def take(x: Tensor, hook: Any) -> None:
            last = x[:, at].float().to(unit.device)
            seen[kind, layer] = last @ unit
            seen[kind + "_norm", layer] = last.norm(dim=-1)

        return take

    def before_norm(layer: int, norm: Norm) -> Callable[[Tensor, Any], None]:
        def take(y: Tensor, hook: Any) -> None:
            seen["scale", layer] = norm.scale(y[:, at])

        return take

    def values(layer: int) -> Callable[[Tensor, Any], None]:
        def take(v: Tensor, hook: Any) -> None:
            if prefix is not None:  # its values were computed before, once for all
                before = prefix.layers[layer].values.transpose(1, 2).to(v)
                v = torch.cat([before.expand(len(v), -1, -1, -1), v], dim=1)
            seen["v", layer] = v.float()
            seen["along", layer] = values_along(v, heads[layer]).cpu()

        return take

    def pattern(layer: int) -> Callable[[Tensor, Any], None]:
        def take(a: Tensor, hook: Any) -> None:
            row = a[:, :, at].float()
            seen["row", layer] = row.cpu()
            with in_memory(model.bridge.blocks[layer].attn):
                weight = model.bridge.blocks[layer].attn.W_O.detach().float()
            if ("v", layer) in seen:  # or it is among the missing ones, which are named
                seen["share", layer] = _shares(row, seen.pop(("v", layer)), weight).cpu()

        return take

    hooks: list[tuple[str, Any]] = []
    for layer in range(n_layers):
        hooks += [
            (f"blocks.{layer}.hook_resid_pre", at_end("resid", layer)),
            (f"blocks.{layer}.hook_attn_out", at_end("attn", layer)),
            (f"blocks.{layer}.hook_mlp_out", at_end("mlp", layer)),
            (f"blocks.{layer}.attn.hook_v", values(layer)),
            (f"blocks.{layer}.attn.hook_pattern", pattern(layer)),
        ]
        if (norm := norms[layer]) is not None:
            hooks.append((f"blocks.{layer}.attn.hook_out", before_norm(layer, norm)))
    hooks.append((f"blocks.{n_layers - 1}.hook_resid_post", at_end("resid", n_layers)))
    with model.bridge.hooks(fwd_hooks=hooks):
        run_batch(model.hf, batch, prefix)
    missing = [layer for layer in range(n_layers) if ("row", layer) not in seen or ("along", layer) not in seen]
    if missing:
        raise UserError(f"No attention rows came from layers {missing}; the model's attention cannot be traced.")
    rows = torch.stack([seen["row", layer] for layer in range(n_layers)], dim=1).cpu()
    by_token = torch.stack([seen["share", layer] for layer in range(n_layers)], dim=1).cpu()
    shares = rows * torch.stack([seen["along", layer] for layer in range(n_layers)], dim=1).cpu()
    for layer, norm in enumerate(norms):
        if norm is not None:
            shares[:, layer] *= seen["scale", layer].cpu()[:, None, None]
    stacked = {
        key: torch.stack([seen[key, layer] for layer in range(n_layers + (key.startswith("resid")))], dim=1).cpu()
        for key in ("resid", "resid_norm", "attn", "attn_norm", "mlp")
    }
    records = []
    for i, chat in enumerate(chats):
        real = batch.arguments["attention_mask"][i].bool().cpu()  # padding stands between the prefix and the rest
        record: dict[str, Any] = {key: value[i] for key, value in stacked.items()}
        record["attention"], record["contribution"] = (
            torch.stack([x[i][..., real][..., chat.regions[name]].sum(-1) for name in REGIONS], dim=-1)
            for x in (rows, shares)
        )
        record["dominance"] = torch.stack(
            [by_token[i][:, real][:, chat.regions[name]].sum(-1) for name in REGIONS], dim=-1
        )
        record["sums"], record["sink"] = shares[i].sum(-1), rows[i][..., real][..., 0]
        record["terms"] = shares[i].abs().sum(dim=(-2, -1))
        record["rows"] = (rows[i][..., real], shares[i][..., real]) if keep_rows else None
        records.append(record)
    return records


def _shares(
    row: Float[Tensor, "prompt head token"], v: Float[Tensor, "prompt token kv_head d_head"], weight: Tensor
) -> Float[Tensor, "prompt token"]:
    """Every source token's share of the attention output: ⟨Y_k, Y⟩/‖Y‖² with Y = Σ_k Y_k over all heads."""
    grouped = row.unflatten(1, (v.shape[2], -1))
    mixed = torch.einsum("bght,btgd->bghd", grouped, v).flatten(1, 2)
    whole = torch.einsum("bhd,hde->be", mixed, weight)
    back = torch.einsum("be,hde->bhd", whole, weight).unflatten(1, (v.shape[2], -1))
    along = torch.einsum("btgd,bghd->bght", v, back)
    return (grouped * along).sum(dim=(1, 2)) / whole.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)


def _collect(model: Model, chats: list[Chat], records: list[dict[str, Any]], unit: Tensor) -> Traces:
    def stack(key: str) -> Tensor:
        return torch.stack([record[key] for record in records])

    biases = [_bias(block) for block in model.bridge.blocks]
    bias = multiplier(model) * torch.tensor([0.0 if b is None else float(b @ unit.cpu()) for b in biases])
    written = stack("attn")
    least = (CANCELS * stack("terms")).clamp(min=1e-30)
    error = (stack("sums").sum(dim=-1) + bias - written).abs() / torch.maximum(stack("attn_norm"), least)
    final, length = stack("resid")[:, -1], stack("resid_norm")[:, -1]
    start = stack("resid")[:, 0]
    rebuilt = start + written.sum(dim=1) + stack("mlp").sum(dim=1)
    return Traces(
        chats=tuple(chats),
        projection=stack("resid"),
        norm=stack("resid_norm"),
        attention=stack("attention"),
        contribution=stack("contribution"),
        sink=stack("sink"),
        attention_out=written,
        mlp_out=stack("mlp"),
        embedding=start,
        attention_bias=bias,
        dominance=stack("dominance"),
        n_tokens=torch.stack([torch.stack([chat.regions[name].sum() for name in REGIONS]) for chat in chats]).float(),
        rows=tuple(record["rows"] for record in records if record["rows"] is not None),
        identity=float(error.max()),
        closure=float(((rebuilt - final).abs() / length).max()),
    )


def _bias(block: Any) -> Tensor | None:
    with in_memory(block.attn):
        bias = getattr(block.attn, "b_O", None)
        return bias.detach().float().cpu() if bias is not None else None


def _check(traces: Traces, model: Model) -> None:
    if not bool(torch.isfinite(traces.projection).all()) or not bool(torch.isfinite(traces.contribution).all()):
        layer = int((~torch.isfinite(traces.projection)).any(dim=0).float().argmax())
        raise UserError(f"The trace is not finite, first at layer {layer} in {model.hf.dtype}; {or_float32(model.hf)}.")
    # float32 sums of thousands of terms stay below the bounds; lower precisions round each write themselves
    if model.hf.dtype != torch.float32 or getattr(model.hf, "is_quantized", False):
        return
    for found, bound, sentence in (
        (traces.identity, IDENTITY_BOUND, "head contributions miss the attention write"),
        (traces.closure, CLOSURE_BOUND, "the embedding and all writes miss the final residual stream"),
    ):
        if not found <= bound:
            raise UserError(
                f"{model.name}: {sentence} by {found:.1e} of its length (allowed {bound}); something that is "
                "not known here (or an intervention) stands between its blocks and the residual stream."
            )
