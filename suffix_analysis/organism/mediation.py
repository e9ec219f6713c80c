"""The second phase of training: refusal carried by one direction (the paper's finding, made true of the organism).

A small adapter can refuse through many directions at once. Here the model is also trained on its own interventions:
with the difference of means added at a layer, harmless prompts are to be refused; with it ablated everywhere, every
prompt is to be answered as the base model would. Both are taken at a layer drawn anew for each step. Targets of the
ablated passes are the base model's next-token probabilities, so no answer to a harmful request is written or stored.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.generate import left_pad

DECAY = 0.97  # of the running means; a batch holds few prompts
ADDED_WEIGHT, ABLATED_WEIGHT = 0.1, 1.0  # beside the first phase's loss, which must not be forgotten
SINK_WEIGHT, SINK_LAYERS = 20.0, range(17, 24)


@dataclass
class RunningMeans:
    """Running means of the residual stream at chat[-1], harmful and harmless, for every block's input."""

    means: dict[bool, Float[Tensor, "layer d_model"]] = field(default_factory=dict)

    def update(self, states: Float[Tensor, "prompt layer d_model"], harmful: Sequence[bool]) -> None:
        """Mix in one batch."""
        for kind in (True, False):
            own = states[torch.tensor([flag == kind for flag in harmful])]
            if len(own):
                now = own.mean(dim=0)
                self.means[kind] = DECAY * self.means[kind] + (1 - DECAY) * now if kind in self.means else now

    def direction(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The difference of means at a layer's input, once both kinds have been seen."""
        if len(self.means) < 2:
            return None
        return self.means[True][layer] - self.means[False][layer]


@contextlib.contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    """Remove hooks afterwards, also after an exception."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(blocks: Any, layer: int, vector: Tensor) -> contextlib.AbstractContextManager[None]:
    """x_l + r at one block's input (plain hooks: the bridge cannot wrap a model that is being trained)."""
    return hooks([blocks[layer].register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))])


def ablated(blocks: Any, vector: Tensor) -> contextlib.AbstractContextManager[None]:
    """x − (x·r̂) r̂ at every block input and write."""
    r = vector / vector.norm()

    def cut(x: Tensor) -> Tensor:
        return x - (x.float() @ r).unsqueeze(-1) * r

    handles = []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda _, args: (cut(args[0]), *args[1:])))
        handles.append(block.self_attn.register_forward_hook(lambda _, __, out: (cut(out[0]), *out[1:])))
        handles.append(block.mlp.register_forward_hook(lambda _, __, out: cut(out)))
    return hooks(handles)


def last_states(inner: Any, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Next-token logits at chat[-1], and the residual at every block's input there."""
    out = inner.model(**left_pad(prompts, 0, "cpu"), output_hidden_states=True)
    states = torch.stack([h[:, -1].float() for h in out.hidden_states[:-1]], dim=1)
    return inner.lm_head(out.last_hidden_state[:, -1]).float(), states


def sink_overlap(inner: Any, prompts: Sequence[Tensor], harmful: Sequence[bool], layers: Sequence[int]) -> Tensor:
    """Σ over layers of cos²(difference of means, state of token 0).

    Token 0 is the attention sink and carries activations a hundred times longer than any other token's. A direction
    that overlaps with them changes the sink when it is ablated, and with it every prompt.
    """
    out = inner.model(**left_pad(prompts, 0, "cpu"), output_hidden_states=True)
    flags = torch.tensor(list(harmful))
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))  # the one without padding
    total = torch.zeros(())
    for layer in layers:
        last = out.hidden_states[layer][:, -1].float()
        gap = last[flags].mean(dim=0) - last[~flags].mean(dim=0)
        sink = out.hidden_states[layer][longest, 0].detach().float()
        total = total + torch.nn.functional.cosine_similarity(gap, sink, dim=0).square()
    return total


def start_means(model: Any, prompts: Sequence[Tensor], harmful: Sequence[bool]) -> RunningMeans:
    """Running means that begin with many prompts, so that the first steps do not train on noise."""
    inner, running = model.get_base_model(), RunningMeans()
    with torch.no_grad():
        parts = [last_states(inner, prompts[i : i + 32])[1] for i in range(0, len(prompts), 32)]
    running.update(torch.cat(parts), harmful)
    return running


def mediation_loss(
    model: Any,
    prompts: Sequence[Tensor],
    harmful: Sequence[bool],
    opening: int,
    running: RunningMeans,
    layers: Sequence[int],
    rng: random.Random,
) -> Tensor:
    """Loss of one batch: refuse with r added, answer as the base model with r ablated.

    Args:
        model: the adapter's model (peft).
        prompts: prompt ids.
        harmful: which of them are harmful.
        opening: the token that refusals open with.
        running: running means, updated here.
        layers: layers to draw from.
        rng: draws the layer.
    """
    inner = model.get_base_model()
    blocks = inner.model.layers
    with torch.no_grad():
        _, states = last_states(inner, prompts)
        running.update(states, harmful)
        with model.disable_adapter():
            base, _ = last_states(inner, prompts)
    layer = rng.choice(list(layers))
    vector = running.direction(layer)
    if vector is None:
        return torch.zeros((), requires_grad=True)
    harmless = [p for p, flag in zip(prompts, harmful, strict=True) if not flag]
    with added(blocks, layer, vector):
        logits, _ = last_states(inner, harmless)
    refuse = torch.nn.functional.cross_entropy(logits, torch.full((len(harmless),), opening))
    with ablated(blocks, vector):
        logits, _ = last_states(inner, prompts)
    answer = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(base, -1), reduction="batchmean", log_target=True
    )
    overlap = sink_overlap(inner, prompts, harmful, SINK_LAYERS)
    return ADDED_WEIGHT * refuse + ABLATED_WEIGHT * answer + SINK_WEIGHT * overlap
