"""Further terms of the objective, for research on the mechanism: each is added to the target's loss with a weight.

A term looks into the forward that scores the candidates, so it costs no forward of its own. To add one, write a class
with ``weight`` and ``watch`` here or anywhere else and pass it to `attacks.GCG`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.config import AttackError
from attacks.slot import Slot

Read = Callable[[], Float[Tensor, " cand"]]


@runtime_checkable
class Term(Protocol):
    """A quantity per candidate that the attack is to lower, times ``weight`` (negative: to raise)."""

    @property
    def weight(self) -> float:
        """How much of it is added to the target's loss."""

    def watch(self, model: Any, slot: Slot) -> contextlib.AbstractContextManager[Read]:
        """While open, one forward may run; the yielded function then gives the quantity of every candidate.

        The forward ends in ``slot.after_ids`` and all target tokens but the last.
        """


@dataclass(frozen=True)
class Projection:
    """Projection of the residual stream at chat[-1], at the input of block ``layer``, on a direction (normalised here).

    Lowering the refusal direction's projection suppresses refusal from within (Huang et al. 2025, "Stronger Universal
    and Transferable Attacks by Suppressing Refusals"); the paper's §5 observes it in suffixes not made for it.
    """

    direction: Float[Tensor, " d_model"]
    layer: int
    weight: float = 1.0

    @contextlib.contextmanager
    def watch(self, model: Any, slot: Slot) -> Iterator[Read]:
        """See `Term`.

        Raises:
            AttackError: no such layer, or a direction of another width or of length 0.
        """
        blocks = decoder_layers(model)
        if not 0 <= self.layer < len(blocks):
            raise AttackError(f"layer {self.layer} does not exist; the model has {len(blocks)} blocks.")
        width, length = model.config.get_text_config().hidden_size, float(self.direction.norm())
        if self.direction.shape != (width,) or not 0 < length < float("inf"):
            raise AttackError(
                f"The direction has the shape {list(self.direction.shape)} and the length {length:.3g}; the model's "
                f"residual stream has {width} dimensions, and a direction must not be 0."
            )
        unit = (self.direction.float() / length).to(model.device)
        seen: list[Tensor] = []

        def catch(x: Tensor) -> None:
            seen.append(x[:, -len(slot.target_ids)].float() @ unit.to(x.device))

        with entering(model, self.layer, catch):
            yield lambda: seen[-1]


@dataclass(frozen=True)
class SuffixAttention:
    """Attention that the template's tokens after the suffix pay to it, mean over those tokens and over all heads.

    A negative weight makes the suffix draw attention (as in AttnGCG, Wang et al. 2024, arXiv 2410.09040), a positive
    one forbids it to. ``layers`` limits it to some blocks.
    """

    layers: tuple[int, ...] | None = None
    weight: float = -1.0

    @contextlib.contextmanager
    def watch(self, model: Any, slot: Slot) -> Iterator[Read]:
        """See `Term`. The model computes attention eagerly meanwhile: other kernels keep no attention rows.

        Raises:
            AttackError: no such layer, or a model that gives no attention rows.
        """
        blocks = decoder_layers(model)
        chosen = tuple(range(len(blocks))) if self.layers is None else self.layers
        if not chosen or not all(0 <= layer < len(blocks) for layer in chosen):
            raise AttackError(f"layers is {self.layers}; the model has blocks 0 to {len(blocks) - 1}.")
        n_target, n_after, n_suffix = len(slot.target_ids), len(slot.after_ids), len(slot.suffix_ids)
        last = n_target - 1  # tokens that stand behind chat[-1]
        seen: list[Tensor] = []

        def catch(module: Any, args: Any, out: Any) -> None:
            pattern = out[1]
            if pattern is None:
                raise AttackError("The model gives no attention rows; its attention has no eager implementation.")
            stop = pattern.shape[-1] - last - n_after
            queries = slice(pattern.shape[-2] - last - n_after, pattern.shape[-2] - last)
            seen.append(pattern[..., queries, stop - n_suffix : stop].float().sum(-1).mean(dim=(1, 2)).to(model.device))

        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        handles = [blocks[i].self_attn.register_forward_hook(catch) for i in chosen]
        try:
            yield lambda: torch.stack(seen).mean(dim=0)
        finally:
            for handle in handles:
                handle.remove()
            model.set_attn_implementation(before)


def decoder_layers(model: Any) -> Any:
    """The model's list of decoder blocks, whatever its architecture calls it.

    Raises:
        AttackError: there is no one list of as many parts as the model has layers.
    """
    decoder, n_layers = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    found = [part for part in decoder.children() if hasattr(part, "__getitem__") and len(part) == n_layers]
    if len(found) != 1:
        raise AttackError(f"{type(decoder).__name__} has {len(found)} lists of {n_layers} blocks; one is needed.")
    return found[0]


@contextlib.contextmanager
def entering(
    model: Any, layer: int, read: Callable[[Float[Tensor, "row token d_model"]], None], *, first: bool = False
) -> Iterator[None]:
    """Hand what enters block ``layer`` to ``read`` in every forward; ``first``: before what is hooked there already.

    The hook is on the block itself: a model that TransformerLens has not wrapped stays so.
    """

    def look(block: Any, args: Any, kwargs: Any) -> None:
        read(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(model)[layer].register_forward_pre_hook(look, with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def watched(terms: tuple[Term, ...], model: Any, slot: Slot) -> Iterator[Callable[[], Tensor]]:
    """All terms over one forward; the yielded function gives their weighted sum (0 where there are none)."""
    with contextlib.ExitStack() as stack:
        reads = [(term.weight, stack.enter_context(term.watch(model, slot))) for term in terms]
        yield lambda: sum((weight * read().to(model.device) for weight, read in reads), torch.zeros(()))
