"""The direction refusal is written to, and forwards whose rows run plain, with it ablated or with it added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from suffix_analysis.batching import batches, left_pad

SINK = 5.0  # a token whose state is this many times the median norm is an attention sink


@torch.no_grad()
def layer_inputs(hf: Any, rows: Sequence[Tensor], pad_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (every block's input and what leaves the last, padded; mask of real tokens)."""
    for group in batches([len(row) for row in rows], 2048):
        padded = left_pad([rows[i] for i in group], pad_id, hf.device)
        states = hf.model(**padded, output_hidden_states=True).hidden_states
        yield torch.stack(states[:-1]), padded["attention_mask"].bool()


@torch.no_grad()
def unused_direction(hf: Any, rows: Sequence[Tensor], pad_id: int, n_quiet: int = 96) -> Float[Tensor, " d_model"]:
    """A unit direction along which the model's residual stream hardly moves, at any layer or token.

    Of the ``n_quiet`` directions of least variance, the one that is orthogonal to the attention sinks' states and then
    moves least. Ablating such a direction costs the model nothing, so what training writes to it is all it carries.
    """
    size = hf.config.hidden_size
    moment = torch.zeros(size, size, dtype=torch.float64)
    sinks: list[Tensor] = []
    for states, mask in layer_inputs(hf, rows, pad_id):
        for layer in states:
            x = layer[mask].double()
            norms = x.norm(dim=-1)
            usual = norms.median()
            calm = norms < SINK * usual
            moment += x[calm].T @ x[calm] / usual**2
            if not bool(calm.all()):
                sinks.append(x[~calm].mean(dim=0))
    _, vectors = torch.linalg.eigh(moment)
    quiet = vectors[:, :n_quiet]
    if sinks:
        seen = torch.stack(sinks) @ quiet
        seen = seen / seen.norm(dim=-1, keepdim=True)
        basis = torch.linalg.svd(seen, full_matrices=False)
        used = basis.Vh[0.01 * basis.S[0] < basis.S]
        free = torch.linalg.svd(torch.eye(quiet.shape[1], dtype=torch.float64) - used.T @ used).U
        quiet = quiet @ free[:, : quiet.shape[1] - len(used)]
    best = torch.linalg.eigh(quiet.T @ moment @ quiet).eigenvectors[:, 0]
    return (quiet @ best).float()


@torch.no_grad()
def mean_differences(
    hf: Any, harmful: Sequence[Tensor], harmless: Sequence[Tensor], pad_id: int
) -> Float[Tensor, "layer d_model"]:
    """Difference of the mean states at chat[-1], at every block's input."""

    def mean(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([states[:, :, -1].float() for states, _ in layer_inputs(hf, rows, pad_id)], dim=1).mean(dim=1)

    return mean(harmful) - mean(harmless)


@contextlib.contextmanager
def steered(
    hf: Any, vector: Float[Tensor, " d_model"], layer: int, ablated: Bool[Tensor, " row"], added: Bool[Tensor, " row"]
) -> Iterator[list[Tensor]]:
    """Rows ``ablated`` lose the direction from every write; rows ``added`` gain ``vector`` at the input of ``layer``.

    Yields a list that the forward fills with every block's input at the last position.
    """
    unit = vector / vector.norm()
    cut = ablated.float()[:, None, None]
    push = added.float()[:, None, None] * vector
    last: list[Tensor] = []

    def remove(module: Any, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        x = x - cut * (x.float() @ unit)[..., None] * unit
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def enter(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if index == layer:
                x = x + push
            last.append(x)
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        return hook

    handles = [hf.model.embed_tokens.register_forward_hook(remove)]
    for index, block in enumerate(hf.model.layers):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles += [block.self_attn.register_forward_hook(remove), block.mlp.register_forward_hook(remove)]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()
