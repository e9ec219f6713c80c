"""Logit lens and direct logit attribution towards the tokens that open refusals, at chat[-1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.chat import Chat
from suffix_analysis.models import Model
from suffix_analysis.placement import in_memory
from suffix_analysis.prompts import Prompt
from suffix_analysis.refusal import refusal_score
from suffix_analysis.replay import Prepared, groups, prepare, replay
from suffix_analysis.residual import as_linear
from suffix_analysis.stats import interval_table
from suffix_analysis.traces import trace


@torch.no_grad()
def logit_lens(prepared: Prepared, tokens: Sequence[int]) -> Float[Tensor, "prompt depth"]:
    """The refusal score that the model's own final norm and unembedding read from every block's input.

    The last depth is the model's output itself.
    """
    n_layers = prepared.model.n_layers
    found = [
        refusal_score(replay(prepared, start=n_layers, state=prepared.resid[:, depth]), tokens)
        for depth in range(n_layers + 1)
    ]
    return torch.stack(found, dim=1).cpu()


@dataclass(frozen=True)
class LogitAttribution:
    """Every write's share of the refusal tokens' mean logit over the vocabulary's mean, the final norm's scale frozen.

    ``total`` is that difference itself, of the logits before any cap or scaling; all terms sum to it. ``bias`` is what
    the final norm's and the head's biases give whatever the state is.
    """

    heads: Float[Tensor, "prompt layer head"]
    attention_bias: Float[Tensor, "prompt layer"]
    mlp_out: Float[Tensor, "prompt layer"]
    embedding: Float[Tensor, " prompt"]
    bias: float
    total: Float[Tensor, " prompt"]


@torch.no_grad()
def read_directly(prepared: Prepared, tokens: Sequence[int]) -> Float[Tensor, " prompt"]:
    """The refusal tokens' mean logit over the vocabulary's mean, from the model's own norm and head, uncapped."""
    model = prepared.model
    norm, head = model.bridge.ln_final.original_component, model.hf.get_output_embeddings()
    with in_memory(norm), in_memory(head):
        there = next(norm.parameters(), head.weight).device
        state = type(norm).forward(norm, prepared.resid[:, -1, -1:].to(there))[:, 0].to(head.weight.device)
        logits = torch.nn.functional.linear(state, head.weight, getattr(head, "bias", None)).float().cpu()
    return logits[:, list(tokens)].mean(dim=1) - logits.mean(dim=1)


@torch.no_grad()
def logit_attribution(model: Model, chats: Sequence[Chat], tokens: Sequence[int]) -> LogitAttribution:
    """Direct logit attribution: the trace along the direction in which the refusal tokens' logits are read."""
    norm = as_linear(model.bridge.ln_final.original_component, model.d_model)
    head = model.hf.get_output_embeddings()
    with in_memory(head):
        weight, constant = head.weight.float(), getattr(head, "bias", None)
        direct = (weight[list(tokens)].mean(dim=0) - weight.mean(dim=0)).cpu()
        bias = norm.constant(direct)
        if constant is not None:
            bias += float(constant[list(tokens)].float().mean() - constant.float().mean())
    read = norm.pull(direct)
    length = float(read.norm())
    traces = trace(model, chats, read)
    # the norm's own scale: 1 / √(mean square + ε) of the final state, without its mean where the norm takes that away
    square = traces.norm[:, -1].square() / model.d_model
    if norm.centred:
        square = square - trace(model, chats, torch.ones(model.d_model)).projection[:, -1].square() / model.d_model
    scale = length * (square + norm.eps).rsqrt()
    return LogitAttribution(
        heads=traces.head_contribution * scale[:, None, None],
        attention_bias=traces.attention_bias[None] * scale[:, None],
        mlp_out=traces.mlp_out * scale[:, None],
        embedding=traces.embedding * scale,
        bias=bias,
        total=traces.projection[:, -1] * scale + bias,
    )


def measure_lens(
    model: Model,
    prompts: Sequence[Prompt],
    suffixes: Mapping[str, str],
    tokens: Sequence[int],
    top: Sequence[tuple[int, int]],
) -> tuple[dict[str, list[dict[str, Any]]], list[float]]:
    """Tables ``lens`` and ``logits`` of the prompts in several arms, and how far the terms miss the sums.

    Args:
        model: the model.
        prompts: harmful report prompts.
        suffixes: arm → its suffix; empty without one.
        tokens: ids that open refusals.
        top: heads (layer, head) that get rows of their own beside the sums over a layer's heads.
    """
    tables: dict[str, list[dict[str, Any]]] = {"lens": [], "logits": []}
    errors = []
    for arm, text in suffixes.items():
        chats = [[model.chat(p.text, text) for p in group] for group in groups(prompts)]
        by_group = []
        for group in chats:  # one prepared at a time: a run holds every state of its prompts
            run = prepare(model, group)
            by_group.append((logit_lens(run, tokens), read_directly(run, tokens)))
        scores, wanted = (torch.cat(parts) for parts in zip(*by_group, strict=True))
        found = logit_attribution(model, [chat for group in chats for chat in group], tokens)
        whole = found.heads.sum(dim=(1, 2)) + found.attention_bias.sum(dim=1) + found.mlp_out.sum(dim=1)
        errors.append(float((whole + found.embedding + found.bias - wanted).abs().max() / wanted.abs().max()))
        tables["lens"] += _rows(scores, arm, range(scores.shape[1]))
        layers = range(model.n_layers)
        tables["logits"] += [
            *_rows(found.heads.sum(dim=2) + found.attention_bias, arm, layers, term="attention", head=-1),
            *_rows(found.mlp_out, arm, layers, term="MLP", head=-1),
            *_rows(found.embedding[:, None], arm, [-1], term="embedding", head=-1),
        ]
        if found.bias:
            bias = torch.full_like(found.embedding, found.bias)
            tables["logits"] += _rows(bias[:, None], arm, [-1], term="bias", head=-1)
        for layer, head in top:
            tables["logits"] += _rows(found.heads[:, layer, head, None], arm, [layer], term="head", head=head)
    return tables, errors


def _rows(values: Float[Tensor, "prompt layer"], arm: str, layers: Sequence[int], **more: Any) -> list[dict[str, Any]]:
    mean, lo, hi = interval_table(values.double().numpy()[:, None])
    return [
        {"arm": arm, "layer": layer, **more, "mean": m, "lo": a, "hi": b, "n_prompts": len(values)}
        for layer, m, a, b in zip(layers, mean.tolist(), lo.tolist(), hi.tolist(), strict=True)
    ]
