"""From the loss's gradient on the suffix to candidate suffixes: gradient, sampling, filters, deduplication."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.caches import cache_argument, fresh
from attacks.config import AttackError, GCGConfig
from attacks.objective import target_loss
from attacks.precision import contiguous_head, or_float32
from attacks.slot import Slot
from attacks.terms import Term, watched

MAX_REDRAWS = 20


def forbidden_ids(tokenizer: Any, n_rows: int, *, allow_non_ascii: bool, compat: bool) -> Int[Tensor, " forbidden"]:
    """Tokens that a suffix must not contain: special ones, and those that are not printable ASCII unless allowed.

    ``n_rows`` is the number of embedding rows; rows without a token are forbidden too (nanoGCG leaves them in).
    """
    size = tokenizer.vocab_size if compat else len(tokenizer)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    if not compat:
        special |= set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder) | set(range(size, n_rows))
    banned = {i for i in special if i is not None and i < n_rows}  # a tokenizer may have more tokens than the model
    if not allow_non_ascii:
        texts = tokenizer.batch_decode([[i] for i in range(min(size, n_rows))])
        banned |= {i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable())}
    elif compat:
        banned = set()
    return torch.tensor(sorted(banned), dtype=torch.long)


def token_gradient(
    model: Any,
    slots: Sequence[Slot],
    caches: Sequence[Any],
    ids: Int[Tensor, " suffix"],
    config: GCGConfig,
    terms: tuple[Term, ...] = (),
) -> Float[Tensor, "suffix vocab"]:
    """Gradient of the mean loss with respect to a one-hot choice of each suffix token.

    Taken at the embedding layer's own output, so that models which scale their embeddings (Gemma) are differentiated
    at the point they run at; the product with every token's embedding gives the one-hot gradient.

    Raises:
        AttackError: the gradient is not finite.
    """
    embed = model.get_input_embeddings()
    total: Tensor | None = None
    for slot, cache in zip(slots, caches, strict=True):
        device = model.device
        with torch.no_grad():
            tail = embed(torch.cat([slot.after_ids, slot.target_ids[:-1]]).to(device))
            leaf = embed(ids.to(device)).detach()
            head = None if cache is not None else embed(slot.before_ids.to(device))
        leaf.requires_grad_()
        parts = [leaf, tail] if head is None else [head, leaf, tail]
        with contiguous_head(model), watched(terms, model, slot) as read, torch.enable_grad():
            out = model(
                inputs_embeds=torch.cat(parts)[None],
                use_cache=cache is not None,
                logits_to_keep=len(slot.target_ids),
                **{cache_argument(model): fresh(cache, 1)},
            )
            loss = (target_loss(out.logits.float(), slot.target_ids, config) + read()).mean()
            (grad,) = torch.autograd.grad(loss, leaf)
        total = grad if total is None else total + grad
    assert total is not None
    with torch.no_grad():
        rows = embed(torch.arange(embed.weight.shape[0], device=model.device))
        gradient = (total / len(slots)) @ rows.T
    if not torch.isfinite(gradient).all():
        told = or_float32(model, "what is added to the loss")
        raise AttackError(f"The gradient on the suffix is not finite in {model.dtype}; {told}.")
    return gradient.float().cpu()


def compat_gradient(model: Any, slot: Slot, ids: Int[Tensor, " suffix"], config: GCGConfig) -> Tensor:
    """nanoGCG's gradient, operation for operation (one-hot times the embedding weight, full logits, no cache)."""
    embed = model.get_input_embeddings()
    one_hot = torch.nn.functional.one_hot(ids[None], num_classes=embed.num_embeddings)
    one_hot = one_hot.to(model.device, model.dtype).requires_grad_()
    with torch.no_grad():
        before, after, target = (embed(part[None].to(model.device)) for part in _parts(slot))
    with torch.enable_grad():
        whole = torch.cat([before, one_hot @ embed.weight, after, target], dim=1)
        shift = whole.shape[1] - len(slot.target_ids)
        logits = model(inputs_embeds=whole).logits[..., shift - 1 : -1, :].contiguous()
        loss = target_loss(logits, slot.target_ids, config).mean()
        (grad,) = torch.autograd.grad(loss, one_hot)
    return grad[0].cpu()


def _parts(slot: Slot) -> tuple[Tensor, Tensor, Tensor]:
    return slot.before_ids, slot.after_ids, slot.target_ids


def sample(
    ids: Int[Tensor, " suffix"], top_ids: Int[Tensor, "suffix topk"], config: GCGConfig, generator: torch.Generator
) -> Int[Tensor, "cand suffix"]:
    """``search_width`` copies of ``ids`` with ``n_replace`` random positions set to random top-k tokens.

    The draws come in nanoGCG's order from ``generator``, so equal seeds give equal candidates.
    """
    width, length = config.search_width, len(ids)
    noise = torch.rand((width, length), generator=generator)
    if config.even_positions:  # the first replaced position goes round; llm-attacks spreads candidates so
        noise[torch.arange(width), torch.arange(width) % length] = -1.0
    positions = torch.argsort(noise)[..., : config.n_replace]
    picks = torch.randint(0, config.topk, (width, config.n_replace, 1), generator=generator)
    values = top_ids[positions].gather(2, picks).squeeze(2)
    return ids.repeat(width, 1).scatter(1, positions, values)


def draw(
    ids: Int[Tensor, " suffix"],
    gradient: Float[Tensor, "suffix vocab"],
    forbidden: Int[Tensor, " forbidden"],
    config: GCGConfig,
    generator: torch.Generator,
    keep: Callable[[Tensor], Bool[Tensor, " cand"]] | None,
) -> tuple[Int[Tensor, "cand suffix"], int]:
    """Distinct candidates that ``keep`` accepts, and how many drawn ones it refused.

    Refused and repeated ones are drawn again, up to ``MAX_REDRAWS`` times, so the search width stays what was asked
    for. In compatibility mode they are not, as in nanoGCG, so fewer are left.

    Raises:
        AttackError: nothing survives after many draws.
    """
    gradient = gradient.clone()
    gradient[:, forbidden] = float("inf")
    top_ids = (-gradient).topk(config.topk, dim=1).indices
    if config.compat:
        drawn = sample(ids, top_ids, config, generator)
        kept = drawn if keep is None else drawn[keep(drawn)]
        if len(kept) == 0:
            raise AttackError("No candidate survives decoding and encoding; try filter_ids=False or another init.")
        # nanoGCG scores repeats again; the first of them wins either way
        return torch.tensor(list(dict.fromkeys(map(tuple, kept.tolist())))), len(drawn) - len(kept)
    seen: dict[tuple[int, ...], None] = {tuple(ids.tolist()): None}
    rejected = 0
    for _ in range(MAX_REDRAWS):
        drawn = sample(ids, top_ids, config, generator)
        new = list(dict.fromkeys(row for row in map(tuple, drawn.tolist()) if row not in seen))
        if new:
            fits = keep(torch.tensor(new)) if keep is not None else torch.ones(len(new), dtype=torch.bool)
            rejected += int((~fits).sum())
            seen.update(dict.fromkeys(row for row, fit in zip(new, fits.tolist(), strict=True) if fit))
        if len(seen) > config.search_width:
            break
    if len(seen) == 1:
        raise AttackError(
            f"None of {rejected} candidates survives re-tokenisation in context; try another optim_str_init or "
            "filter_ids=False."
        )
    return torch.tensor(list(seen)[1 : config.search_width + 1]), rejected


def combined(
    leaders: Int[Tensor, "cand suffix"], current: Int[Tensor, " suffix"], n: int
) -> Int[Tensor, "merged suffix"]:
    """The changes of the best two, three, … ``n`` of ``leaders`` put into ``current`` together.

    ``leaders`` come best first; one that changes a position which a better one has changed already is passed over.
    That several tokens can thus be replaced in one step is the multi-candidate update of Jia et al. 2024
    (arXiv 2405.21018).
    """
    row, taken = current.clone(), torch.zeros(len(current), dtype=torch.bool)
    rows: list[Tensor] = []
    for leader in leaders:
        changed = leader != current
        if bool((changed & taken).any()):
            continue
        row, taken = torch.where(changed, leader, row), taken | changed
        rows.append(row)
        if len(rows) == n:
            break
    return torch.stack(rows[1:]) if len(rows) > 1 else leaders[:0]
