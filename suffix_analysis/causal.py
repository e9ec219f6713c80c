"""Causal tests (METHODS §4): change something at the chat tokens, and see what becomes of refusal and projection.

Interventions are lists of hooks for `suffix_analysis.replay.replay`. Their destinations are the chat tokens only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.refusal import refusal_score
from suffix_analysis.replay import Hook, Prepared, replay

Head = tuple[int, int]  # (layer, head)


@dataclass(frozen=True)
class Readout:
    """What is measured: the refusal score, and the projection on ``unit`` at the input of ``layer`` at chat[-1]."""

    unit: Float[Tensor, " d_model"]
    layer: int
    tokens: tuple[int, ...]

    @staticmethod
    def of(direction: Direction) -> Readout:
        """The direction's own layer and refusal tokens."""
        return Readout(direction.unit.float(), direction.layer, direction.refusal_tokens)


@dataclass(frozen=True)
class Outcome:
    """Refusal score (log-odds) and projection (units of the residual stream) of every row."""

    score: Float[Tensor, " *row"]
    projection: Float[Tensor, " *row"]

    def minus(self, other: Outcome) -> Outcome:
        """The effect against ``other``."""
        return Outcome(self.score - other.score, self.projection - other.projection)


def base(prepared: Prepared, readout: Readout) -> Outcome:
    """The outcome without an intervention."""
    state = prepared.resid[:, readout.layer, -1].float()
    return Outcome(refusal_score(prepared.logits, readout.tokens).cpu(), (state @ readout.unit.to(state.device)).cpu())


@torch.no_grad()
def measure(prepared: Prepared, hooks: Sequence[Hook], readout: Readout, *, copies: int = 1) -> Outcome:
    """The outcome under ``hooks`` (see `replay`); rows of the first prompt come first.

    Blocks before the first that is changed are not run again.
    """
    start = min((int(name.split(".")[1]) for name, _ in hooks), default=0)
    unit = readout.unit.to(prepared.ids.device)
    seen: list[Tensor] = []

    def look(x: Tensor, hook: Any) -> None:
        seen.append((x[:, -1].float().to(unit.device) @ unit).cpu())

    point = _point(prepared, readout)
    # then nothing that the projection depends on has changed
    below = start > readout.layer or (start == readout.layer and all(name != point for name, _ in hooks))
    more = [] if below else [(point, look)]
    logits = replay(prepared, [*hooks, *more], copies=copies, start=start)
    score = refusal_score(logits, readout.tokens).cpu()
    plain = base(prepared, readout).projection.repeat_interleave(copies)
    return Outcome(score, plain if below else seen[0])


def _point(prepared: Prepared, readout: Readout) -> str:
    """The hook at which the readout's states pass."""
    if readout.layer == prepared.model.n_layers:
        return f"blocks.{readout.layer - 1}.hook_resid_post"
    return f"blocks.{readout.layer}.hook_resid_pre"


# --- interventions -----------------------------------------------------------------------------------------------


def _by_layer(heads: Iterable[Head]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


def replaced(heads: Iterable[Head], values: Float[Tensor, "*prompt layer chat head d_head"]) -> list[Hook]:
    """Heads' mixed values (before W_O) at all chat tokens become ``values``: of each prompt, or one for all."""

    def put(z: Tensor, hook: Any, own: Tensor, which: list[int]) -> Tensor:
        z = z.clone()
        z[:, :, which] = own[..., which, :].to(z)
        return z

    return [
        (f"blocks.{n}.attn.hook_z", functools.partial(put, own=values[..., n, :, :, :], which=which))
        for n, which in _by_layer(heads).items()
    ]


def cut(
    prepared: Prepared,
    region: str,
    heads: Iterable[Head] | None = None,
    *,
    renormalise: bool = True,
    at: int | None = None,
) -> list[Hook]:
    """Edge knock-out: no chat token attends to ``region``, in ``heads`` or all heads; or chat token ``at`` alone.

    With ``renormalise`` the edges are cut before the softmax, and the other sources share the mass; without it they are
    cut after the softmax, and the mass is gone. These are different interventions.
    """
    source = prepared.regions[region]
    if heads is None:
        heads = [(n, h) for n in range(prepared.model.n_layers) for h in range(prepared.z.shape[3])]

    def forbid(scores: Tensor, hook: Any, which: list[int]) -> Tensor:
        return _masked(scores, source, which, torch.finfo(scores.dtype).min, at)

    def destroy(pattern: Tensor, hook: Any, which: list[int]) -> Tensor:
        return _masked(pattern, source, which, 0.0, at)

    name, change = ("hook_attn_scores", forbid) if renormalise else ("hook_pattern", destroy)
    return [(f"blocks.{n}.attn.{name}", functools.partial(change, which=w)) for n, w in _by_layer(heads).items()]


def _masked(x: Tensor, source: Bool[Tensor, "prompt token"], which: list[int], value: float, at: int | None) -> Tensor:
    """Rows of heads ``which`` with ``value`` at the source tokens; of all chat tokens, or of ``at`` only."""
    mask = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    mask[which] = True
    copies = len(x) // len(source)
    rows = torch.ones(x.shape[2], dtype=torch.bool, device=x.device)
    if at is not None:
        rows[:] = False
        rows[at] = True
    source = source.to(x.device).repeat_interleave(copies, dim=0)
    chosen = source[:, None, None] & mask[None, :, None, None] & rows[:, None]
    return x.masked_fill(chosen, value)


def transplanted(prepared: Prepared, control: Prepared, heads: Iterable[Head]) -> list[Hook]:
    """Heads attend as in ``control``, to the values of the attacked run.

    Raises:
        UserError: the two runs are not token by token of equal length.
    """
    if prepared.mask.shape != control.mask.shape or not torch.equal(prepared.mask, control.mask):
        ours, theirs = (sorted({len(chat.ids) for chat in p.chats}) for p in (prepared, control))
        raise UserError(
            f"Only prompts of equal token counts can exchange attention rows; these have {ours} and {theirs}."
        )

    def put(pattern: Tensor, hook: Any, layer: int, which: list[int]) -> Tensor:
        pattern = pattern.clone()
        pattern[:, which] = control.pattern[:, layer, which].to(pattern)
        return pattern

    return [
        (f"blocks.{n}.attn.hook_pattern", functools.partial(put, layer=n, which=w)) for n, w in _by_layer(heads).items()
    ]


def shifted(readout: Readout, levels: Float[Tensor, " prompt"] | float, dose: float = 1.0, at: int = -1) -> list[Hook]:
    """Direction restore: the projection of chat token ``at`` moves ``dose`` of the way to ``levels``."""

    def move(x: Tensor, hook: Any) -> Tensor:
        unit = readout.unit.to(x)
        goal = torch.as_tensor(levels).to(x)
        x = x.clone()
        x[:, at] = x[:, at] + dose * (goal - x[:, at] @ unit).unsqueeze(-1) * unit
        return x

    return [(f"blocks.{readout.layer}.hook_resid_pre", move)]


# --- sweeps --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def head_sweep(
    prepared: Prepared, values: Float[Tensor, "*prompt layer chat head d_head"], readout: Readout
) -> Outcome:
    """Effects of replacing each head alone by ``values``: outcomes [prompt layer head] against the unchanged run.

    One layer's heads run together, from that layer on.
    """
    n_prompts, n_layers, n_chat, n_heads, _ = prepared.z.shape
    plain = base(prepared, readout)
    scores, projections = [], []
    each = torch.arange(n_heads)
    for layer in range(n_layers):
        own = values[..., layer, :, :, :]

        def put(z: Tensor, hook: Any, own: Tensor = own) -> Tensor:
            rows = z.unflatten(0, (n_prompts, n_heads)).clone()
            # copy i of a prompt has head i replaced
            rows[:, each, :, each] = own.to(z).expand(n_prompts, n_chat, n_heads, -1).permute(2, 0, 1, 3)
            return rows.flatten(0, 1)

        hooks: list[Hook] = [(f"blocks.{layer}.attn.hook_z", put)]
        found = measure(prepared, hooks, readout, copies=n_heads)
        scores.append(found.score.view(n_prompts, n_heads))
        projections.append(found.projection.view(n_prompts, n_heads))
    whole = Outcome(torch.stack(scores, dim=1), torch.stack(projections, dim=1))
    return whole.minus(Outcome(plain.score[:, None, None], plain.projection[:, None, None]))


def attribution(
    prepared: Prepared, values: Float[Tensor, "*prompt layer chat head d_head"], readout: Readout
) -> Outcome:
    """First-order estimates of `head_sweep` from one forward and two backwards; for ranking only.

    Gradient of the outcome with respect to each head's mixed values, times the change that the sweep makes.
    """
    leaves: dict[int, Tensor] = {}
    seen: list[Tensor] = []
    unit = readout.unit.to(prepared.ids.device)

    def watch(z: Tensor, hook: Any, layer: int) -> Tensor:
        leaves[layer] = torch.zeros_like(z, requires_grad=True)
        return z + leaves[layer]

    def look(x: Tensor, hook: Any) -> None:
        seen.append(x[:, -1].float().to(unit.device) @ unit)

    n_layers = prepared.model.n_layers
    hooks: list[Hook] = [(f"blocks.{n}.attn.hook_z", functools.partial(watch, layer=n)) for n in range(n_layers)]
    with torch.enable_grad():
        logits = replay(prepared, [*hooks, (_point(prepared, readout), look)])
        score = refusal_score(logits, readout.tokens).sum()
        parts = [leaves[n] for n in range(n_layers)]
        of_score = torch.autograd.grad(score, parts, retain_graph=True)
        of_projection = torch.autograd.grad(seen[0].sum(), parts, allow_unused=True)
    change = values.to(prepared.z) - prepared.z

    def estimate(gradients: Sequence[Tensor | None]) -> Tensor:
        rows = [torch.zeros_like(change[:, n]) if g is None else g.to(change.device) for n, g in enumerate(gradients)]
        return (torch.stack(rows, dim=1) * change).sum(dim=(2, 4)).float().cpu()

    return Outcome(estimate(of_score), estimate(of_projection))
