"""An attack's state between two steps, as plain JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict  # pydantic takes the standard library's from Python 3.12 on only

from attacks.config import AttackError

if TYPE_CHECKING:
    from attacks.gcg import GCG


class Packed(TypedDict):
    """A float32 tensor: its shape, and its bytes compressed and in base64."""

    shape: list[int]
    data: str


class State(TypedDict):
    """What an attack is made of between two steps."""

    attack: dict[str, str]
    step: NonNegativeInt
    stopped: bool
    buffer: list[tuple[float, tuple[int, ...]]]
    best: tuple[float, tuple[int, ...], str]
    generator: str
    batches: list[tuple[int | None, int]]
    active: int
    best_step: NonNegativeInt
    error: NonNegativeFloat | None
    seen_match: list[bool]
    velocity: Packed | None
    search_dtype: str


def save(attack: GCG) -> dict[str, Any]:
    """Everything that `restore` needs."""
    return {
        "attack": attack.digest,
        "step": attack.step,
        "stopped": attack.stopped,
        "buffer": [[loss, list(ids)] for loss, ids in attack.buffer],
        "best": [attack.best[0], list(attack.best[1]), attack.best[2]],
        "generator": bytes(attack.generator.get_state().tolist()).hex(),
        "batches": [[scorer.batch_size, scorer.memory] for scorer in attack._both],
        "active": attack.search.active,
        "best_step": attack.best_step,
        "error": attack.search.error,
        "seen_match": [scorer.seen_match for scorer in attack._both],
        "velocity": None if attack.velocity is None else _pack(attack.velocity),
        "search_dtype": str(attack.search.model.dtype),
    }


def restore(attack: GCG, state: Any) -> None:
    """Let ``attack`` go on from ``state``, which `save` made and JSON may have carried.

    Raises:
        AttackError: the state is damaged, of another attack, or was written while searching in another precision.
    """
    try:
        known: State = TypeAdapter(State).validate_python(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    try:
        _restore(attack, known)
    except AttackError:
        raise
    except (ValueError, RuntimeError, zlib.error) as error:  # a generator or a gradient that is cut off
        raise _damaged(str(error).partition("\n")[0]) from error


# settings that an attack may change when it goes on; all others, and what is attacked, make it another one
FREE = ("num_steps", "batch_size", "early_stop", "verbosity", "score_dtype")


def digest(attack: GCG) -> dict[str, str]:
    """What tells one attack from another, part by part."""
    config = attack.config
    scheduled = config.search_width_start is not None or config.n_replace_start is not None
    free = set(FREE) - ({"num_steps"} if scheduled else set())  # a schedule depends on the number of steps
    parts: dict[str, Any] = {
        "conversations": attack.conversations,
        "targets": [slot.target_ids.tolist() for slot in attack.slots],
        "initial suffix": attack.slots[0].suffix_ids.tolist(),
        "text that the chat template writes": [[s.before_ids.tolist(), s.after_ids.tolist()] for s in attack.slots],
        "settings": {key: value for key, value in asdict(config).items() if key not in free},
        "terms": [_told(term) for term in attack.terms],
        "model": [attack.model.config.get_text_config().model_type, *_corners(attack.model)],
    }
    told = {name: json.dumps(part, sort_keys=True, default=_told) for name, part in parts.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in told.items()}


def _corners(model: Any) -> list[str]:
    """The first number of every weight, in any precision the same: fine-tuned models differ in some of them, and
    wrapping a model changes none.
    """
    weights = (p for p in model.parameters() if p.numel() and p.device.type != "meta")
    return sorted({str(float(p.detach().flatten()[0].bfloat16())) for p in weights})


def _told(value: Any) -> Any:
    """What JSON does not know: a tensor by all its bytes, an object by what it holds; its words may leave things out,
    or hold an address.
    """
    if isinstance(value, Tensor):
        raw = value.detach().cpu().float().contiguous().numpy().tobytes()
        return [list(value.shape), hashlib.sha256(raw).hexdigest()]
    if hasattr(value, "__dict__"):
        return [type(value).__qualname__, getattr(value, "__qualname__", ""), dict(vars(value))]
    return repr(value)


def _damaged(told: str) -> AttackError:
    return AttackError(f"The attack's saved state is damaged ({told}); delete it and attack again.")


def _restore(attack: GCG, state: State) -> None:
    own = attack.digest
    other = [name for name in own if state["attack"].get(name) != own[name]]
    if other:
        raise AttackError(
            f"The saved state is of another attack: another {', another '.join(other)}; give the same, or attack anew."
        )
    known = {str(kind): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    dtype = str(attack.search.model.dtype)
    if state["search_dtype"] != dtype and attack.config.score_dtype == "auto" and state["search_dtype"] in known:
        attack._score_in(known[state["search_dtype"]])  # what was measured when it began, not what is measured now
        dtype = state["search_dtype"]
    if state["search_dtype"] != dtype:
        raise AttackError(
            f"The attack was searching in {state['search_dtype']} and would go on in {dtype}; "
            "set score_dtype to the former."
        )
    if len(state["batches"]) != len(attack._both):
        raise AttackError(
            f"The attack's model was in another precision than {attack.model.dtype}: its candidates were "
            f"{'not ' * (len(state['batches']) == 1)}scored again. Load the model as it was."
        )
    _fits(attack, state)
    attack.step, attack.stopped = state["step"], state["stopped"] and attack.config.early_stop
    attack.buffer, attack.best = state["buffer"], state["best"]
    attack.generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))
    for scorer, (batch_size, memory) in zip(attack._both, state["batches"], strict=True):
        scorer.batch_size, scorer.memory = attack.config.batch_size or batch_size, memory
    for scorer, seen in zip(attack._both, state["seen_match"], strict=True):
        scorer.seen_match = seen
    attack._activate(state["active"])
    attack.best_step, attack.search.error = state["best_step"], state["error"]
    attack.velocity = None if state["velocity"] is None else _unpack(state["velocity"])


def _fits(attack: GCG, state: State) -> None:
    """Whether a state can be one of this attack.

    Raises:
        ValueError: it cannot.
    """
    n_rows = attack.search.model.get_input_embeddings().weight.shape[0]
    rows = [ids for _, ids in state["buffer"]]
    rows += [state["best"][1]] if state["step"] else []  # before the first step there is no best
    lengths = {len(ids) for ids in rows}
    if not state["buffer"] or lengths != {len(attack.buffer[0][1])} or not 1 <= state["active"] <= len(attack.slots):
        raise ValueError(f"{state['active']} goals of {len(attack.slots)}, suffixes of {sorted(lengths)} tokens")
    if not all(0 <= i < n_rows for ids in rows for i in ids):
        raise ValueError(f"a suffix holds tokens that the model of {n_rows} has not")
    if state["velocity"] is not None and state["velocity"]["shape"] != [len(rows[0]), n_rows]:
        raise ValueError(f"a gradient of shape {state['velocity']['shape']}")
    if any(size is not None and size < 1 for size, _ in state["batches"]):
        raise ValueError("a batch of no candidate")


def _pack(x: Tensor) -> Packed:
    """A float32 tensor as JSON, without loss."""
    raw = zlib.compress(x.float().contiguous().numpy().tobytes(), 1)
    return {"shape": list(x.shape), "data": base64.b64encode(raw).decode()}


def _unpack(packed: Packed) -> Tensor:
    raw = bytearray(zlib.decompress(base64.b64decode(packed["data"])))
    return torch.frombuffer(raw, dtype=torch.float32).reshape(packed["shape"])
