"""What must hold on a model before any of its numbers is worth reading, checked on one prompt (METHODS §2 and §3)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from suffix_analysis.errors import UserError, first_line
from suffix_analysis.forward import added_logits, last_logits
from suffix_analysis.interventions import ablate, add
from suffix_analysis.models import Model
from suffix_analysis.residual import norm_error
from suffix_analysis.traces import CLOSURE_BOUND, IDENTITY_BOUND, trace

PROBE = "Write a short poem about the sea"
PROBE_SUFFIX = "x y z"
LOGIT_BOUND = 1e-4
# lower precisions round every write by themselves
ROUNDING = {torch.float16: 0.01, torch.bfloat16: 0.05}


def rounding(model: Model) -> float:
    """The error that a model's precision explains by itself; four-bit layers compute in bfloat16."""
    quantised = getattr(model.hf, "is_quantized", False)
    return ROUNDING.get(torch.bfloat16 if quantised else model.hf.dtype, 0.0)


@dataclass(frozen=True)
class Identity:
    """One identity: what was found, and the most that rounding explains."""

    name: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the error (not a number never passes)."""
        return self.error <= self.bound


@torch.no_grad()
def check_identities(model: Model) -> tuple[Identity, ...]:
    """Check a model on one prompt along a random direction; wraps it in its bridge.

    Errors are shares: of the largest logit, of an attention write's length, of the residual stream's length.
    """
    chat = model.chat(PROBE, PROBE_SUFFIX)
    ids = chat.ids[None].to(model.hf.device)
    plain = model.hf(input_ids=ids).logits.float()
    fresh = "bridge" not in model.__dict__
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    unit = (vector / vector.norm()).to(model.hf.device)
    assert model.bridge is not None  # from here on everything runs through it
    wrapped = model.hf(input_ids=ids).logits.float()
    traces = trace(model, [chat], vector, check=False)
    left = 0.0

    def remember(x: torch.Tensor, hook: object) -> None:
        nonlocal left
        left = max(left, float((x.float() @ unit.to(x.device)).abs().max() / x.float().norm(dim=-1).max()))

    alone = [chat.ids, model.chat(PROBE).ids]
    each = torch.cat([model.hf(input_ids=row[None].to(ids)).logits[:, -1].float() for row in alone])
    together = last_logits(model.hf, model.tokenizer, alone)
    layer = model.n_layers // 2
    with add(model, vector, layer):
        moved = last_logits(model.hf, model.tokenizer, alone)
    replayed = added_logits(model, alone)(vector[None], layer)[0]
    norms = [
        block.submodules[name]
        for block in model.bridge.blocks
        for name in ("ln1", "ln1_post")
        if name in block.submodules
    ]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, model.n_layers)]
    names.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
    with ablate(model, vector), model.bridge.hooks(fwd_hooks=[(name, remember) for name in names]):
        model.hf(input_ids=ids)
    after = model.hf(input_ids=ids).logits.float()
    top = float(plain.abs().max())
    least = rounding(model)
    found = [
        ("head contributions add up to the attention write", traces.identity, max(least, IDENTITY_BOUND)),
        ("the embedding and all writes add up to the final residual stream", traces.closure, max(least, CLOSURE_BOUND)),
        ("nothing is left of an ablated direction", left, max(least, IDENTITY_BOUND)),
        (
            "prompts in one batch behind what they share have the logits that each has alone",
            float((together - each).abs().max()) / top,
            max(least, LOGIT_BOUND),
        ),
        (
            "what is added at a layer does the same when the blocks below are left out",
            float((replayed - moved).abs().max() / moved.abs().max()),
            max(least, LOGIT_BOUND),
        ),
        (
            "norms are RMS or layer norms",
            max(norm_error(norm.original_component, model.d_model) for norm in [*norms, model.bridge.ln_final]),
            max(least, LOGIT_BOUND),
        ),
        ("removed hooks leave no trace in the logits", float((after - wrapped).abs().max()) / top, 0.0),
    ]
    if fresh:
        error = float((wrapped - plain).abs().max()) / top
        found.insert(0, ("TransformerLens's bridge gives the model's own logits", error, max(least, LOGIT_BOUND)))
    return tuple(Identity(*row) for row in found)


def first_blocks(model: Model) -> Model:
    """A copy of the model's first blocks, every kind of block among them: what wraps it does not wrap the model.

    In float32, whatever the model's own precision: along one direction of a wide model bfloat16 rounds by as much as
    a missing factor would change. What makes an identity hold does not depend on the precision.

    Blocks are of one kind if they have the same modules, shapes and entry in the configuration's ``layer_types``.
    Weights that are not in memory (offloaded ones) or packed into four bits are random in the copy.
    """
    config = copy.deepcopy(model.hf.config)
    text = config.get_text_config()
    text.num_hidden_layers = _enough_blocks(model.hf)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):
        small = type(model.hf)(config).float()
    there = small.state_dict()
    own = {name: x for name, x in model.hf.state_dict().items() if name in there and not x.is_meta}
    # packed weights have another shape, and are random in the copy like those that are not in memory
    small.load_state_dict({name: x for name, x in own.items() if x.shape == there[name].shape}, strict=False)
    return Model(model.name, small.eval(), model.tokenizer, model.system, model.path)


def _enough_blocks(hf: torch.nn.Module) -> int:
    """How many of the first blocks hold every kind; at least two, where there are as many."""
    text = hf.config.get_text_config()  # type: ignore[operator, union-attr]
    n_blocks = int(text.num_hidden_layers)
    lists = (part for part in hf.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n_blocks)
    types = getattr(text, "layer_types", None) or [""] * n_blocks
    seen: dict[object, int] = {}
    for index, block in enumerate(next(lists, [])):
        parts = tuple((name, type(part).__name__) for name, part in block.named_modules())
        shapes = tuple((name, tuple(x.shape)) for name, x in block.named_parameters())
        seen.setdefault((types[index], parts, shapes), index)
    return min(n_blocks, 1 + max([1, *seen.values()]))


def require_identities(model: Model) -> None:
    """Refuse a model on whose first blocks (every kind of block among them) an identity fails.

    Raises:
        UserError: names the identity and its error, or says why the check could not run.
    """
    try:
        found = check_identities(first_blocks(model))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{model.name} cannot be analysed: its architecture ({model.hf.config.model_type}) is not known here and "
            f"its identities cannot be checked: {first_line(error)}"
        ) from error
    for identity in found:
        if not identity.holds:
            raise UserError(
                f"{model.name} cannot be analysed: on a test prompt it does not hold that {identity.name} (error "
                f"{identity.error:.1e}, allowed {identity.bound:.0e}); its architecture ({model.hf.config.model_type}) "
                "is not known here."
            )
