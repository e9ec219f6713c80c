"""Why the instruction's contribution changed: its change split over the factors it is a function of (METHODS §3).

Under a causal mask a suffix cannot change any state at an instruction token, so what a head brings from the instruction
to chat[-1] can only change through the query, the suffix's keys in the softmax, the chat tokens' keys, the
destination's position, and the scale of a norm behind attention. Every subset of these is put to its attacked value
while the others stay as they are without the suffix; Shapley averaging over the subsets gives parts that sum exactly to
the change.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.causal import cut
from suffix_analysis.errors import UserError
from suffix_analysis.replay import Hook, Prepared, aligned, replay
from suffix_analysis.residual import post_norms
from suffix_analysis.traces import output_directions, values_along

FACTORS = ("query", "dilution", "chat keys", "displacement", "scale")
BOUND = 1e-4  # of the largest contribution: how far the two ends may be from the runs they stand for


@dataclass(frozen=True)
class Split:
    """The change of the instruction's contribution (attacked − without suffix) of every head, and its parts.

    ``parts`` sum to ``attacked − plain`` exactly; ``error`` is how far the two computed ends are from what the two runs
    themselves show, as a share of the largest contribution.
    """

    plain: Float[Tensor, "prompt layer head"]
    attacked: Float[Tensor, "prompt layer head"]
    parts: dict[str, Float[Tensor, "prompt layer head"]]
    error: float


def shapley(values: Mapping[frozenset[str], Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Each name's average marginal change over all orders; the parts sum to values[all] − values[none]."""
    n = len(names)
    parts = {}
    for name in names:
        others = [other for other in names if other != name]
        total = torch.zeros_like(values[frozenset()])
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for some in itertools.combinations(others, size):
                total = total + weight * (values[frozenset(some) | {name}] - values[frozenset(some)])
        parts[name] = total
    return parts


@torch.no_grad()
def split_change(plain: Prepared, attacked: Prepared, unit: Float[Tensor, " d_model"]) -> Split:
    """Split the change of the instruction's contribution along ``unit`` at chat[-1], for all heads.

    Every layer's queries and chat keys are set, so one replay gives all heads' attention under one subset.

    Args:
        plain: prompts without a suffix.
        attacked: the same prompts with one.
        unit: r̂.

    Raises:
        UserError: the runs are not of the same instructions, token by token, or the two ends of the split are not the
            two runs (something in the model's attention depends on more than the factors).
    """
    attacked = aligned(plain, attacked)
    model = attacked.model
    norms = post_norms(model)
    weights = output_directions(model, unit.float().to(model.hf.device), norms)
    runs = {"plain": plain, "attacked": attacked}
    along = {name: _along(run, weights) for name, run in runs.items()}
    scales = {name: _scales(run, norms) for name, run in runs.items()}
    ends = {
        name: _contribution(run.pattern[:, :, :, -1], run, along[name]) * scales[name] for name, run in runs.items()
    }
    with_norm = any(norm is not None for norm in norms)
    movable = FACTORS[:4]
    found: dict[frozenset[str], Tensor] = {}
    for size in range(len(movable) + 1):
        for some in map(frozenset, itertools.combinations(movable, size)):
            rows = _rows(plain, attacked, some)
            mixed = _contribution(rows, attacked, along["attacked"])
            found[some] = mixed * scales["plain"]
            if with_norm:
                found[some | {"scale"}] = mixed * scales["attacked"]
    names = FACTORS if with_norm else movable
    first, last = found[frozenset()], found[frozenset(names)]
    # of tensors, because Python's max may hide a value that is not a number
    both = torch.stack([ends["plain"], ends["attacked"]])
    missed = (torch.stack([first, last]) - both).abs().max() / both.abs().max().clamp(min=1e-30)
    error = float(missed)
    if model.hf.dtype == torch.float32 and not error <= BOUND:
        raise UserError(
            f"{model.name}: the instruction's contribution is a function of more than {', '.join(names)}; the two "
            f"runs are missed by {error:.1e} (allowed {BOUND})."
        )
    parts = shapley(found, names)
    return Split(first, last, {name: parts.get(name, torch.zeros_like(first)) for name in FACTORS}, error)


def _rows(plain: Prepared, attacked: Prepared, moved: frozenset[str]) -> Float[Tensor, "prompt layer head token"]:
    """Attention rows at chat[-1] over the attacked tokens; factors in ``moved`` as attacked, the others as plain."""
    query = attacked.q if "query" in moved else plain.q
    keys = attacked.k if "chat keys" in moved else plain.k
    kept: dict[int, Tensor] = {}

    def put(x: Tensor, hook: Any, value: Tensor) -> Tensor:
        return value.to(x)

    def keep(x: Tensor, hook: Any, layer: int) -> None:
        kept[layer] = x[:, :, -1].float().to(attacked.ids.device)

    hooks: list[Hook] = [] if "dilution" in moved else cut(attacked, "suffix")
    for n in range(attacked.model.n_layers):
        hooks += [
            (f"blocks.{n}.attn.hook_q", functools.partial(put, value=query[:, n])),
            (f"blocks.{n}.attn.hook_k", functools.partial(put, value=keys[:, n])),
            (f"blocks.{n}.attn.hook_pattern", functools.partial(keep, layer=n)),
        ]
    replay(attacked, hooks, positions=None if "displacement" in moved else plain.positions)
    return torch.stack([kept[n] for n in range(attacked.model.n_layers)], dim=1)


def _along(run: Prepared, weights: Float[Tensor, "layer head d_head"]) -> Float[Tensor, "prompt layer head before"]:
    """What each head would write along r̂ per unit of attention, for every token before the chat region."""
    pairs = zip(run.values, weights, strict=True)
    return torch.stack([values_along(v.transpose(1, 2), own) for v, own in pairs], dim=1)


def _contribution(
    rows: Float[Tensor, "prompt layer head token"], run: Prepared, along: Float[Tensor, "prompt layer head before"]
) -> Float[Tensor, "prompt layer head"]:
    """Σ over the instruction's tokens of attention × value along r̂."""
    n = along.shape[-1]
    chosen = run.regions["instruction"][:, None, None, :n].to(along)
    return (rows[..., :n].float() * along * chosen).sum(dim=-1).cpu()


def _scales(run: Prepared, norms: Any) -> Float[Tensor, "prompt layer 1"]:
    """1/rms of the attention output at chat[-1] where a norm follows it, else 1."""
    found = []
    for layer, norm in enumerate(norms):
        if norm is None:
            found.append(torch.ones(len(run)))
        else:
            found.append(norm.scale(run.attention_output(layer)).cpu())
    return torch.stack(found, dim=1)[:, :, None]
