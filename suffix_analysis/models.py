"""Loading models: the embedded one, a local folder, a GGUF file or a hub id; and the bridge over the same weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import re
import unittest.mock
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from attacks.precision import copied, stays_put
from suffix_analysis.chat import Chat, render_chat
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.families import known_architectures
from suffix_analysis.placement import Device, checked_name, default_device, is_spread, loading_arguments
from suffix_analysis.templates import prepared

# what loading damaged or foreign files raises
BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, SafetensorError)


@dataclass(frozen=True)
class Model:
    """A chat model with its tokenizer.

    ``hf`` is the Hugging Face model, ``bridge`` TransformerLens's view of the same weights (made on first use; it
    wraps ``hf`` in place, so save or copy before). ``system`` is the system prompt of every conversation.
    """

    name: str
    hf: Any
    tokenizer: Any
    system: str | None = None
    path: str = ""
    _twins: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def chat(self, instruction: str, suffix: str = "") -> Chat:
        """One rendered conversation: ``.ids``, ``.regions`` (name → mask) and ``.text``.

        Raises:
            UserError: it is longer than the model's context, its instruction or suffix has no token of its own, or it
                cannot be rendered (see `render_chat`).
        """
        chat = render_chat(self.tokenizer, instruction, suffix, self.system)
        for name, text in (("instruction", instruction), ("suffix", suffix)):
            if text.strip() and not chat.regions[name].any():
                raise UserError(
                    f"The {name} {text[:40]!r} has no token of its own in {self.name}'s chat format; give another."
                )
        limit = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(chat.ids) > limit:
            raise UserError(
                f"The prompt {instruction[:40]!r} has {len(chat.ids)} tokens with its template"
                f"{' and suffix' if suffix else ''}; {self.name} takes {limit}. Shorten it or leave it out."
            )
        return chat

    @functools.cached_property
    def bridge(self) -> Any:
        """TransformerBridge over ``hf``; hook names are TransformerLens's."""
        return boot_bridge(self.hf, self.tokenizer, self.path or self.name)

    @functools.cached_property
    def blocks_give_tuples(self) -> bool:
        """Whether blocks return a tuple that begins with their state (Falcon, Bloom), instead of the state alone."""
        seen: list[bool] = []

        def look(module: Any, args: Any, out: Any) -> None:
            seen.append(isinstance(out, tuple))
            raise _Seen

        block = self.bridge.blocks[0].original_component
        handle = block.register_forward_hook(look)
        try:
            with contextlib.suppress(_Seen), torch.no_grad():
                self.hf(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.hf.device))
        finally:
            handle.remove()
        return seen[0]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.hf.config.get_text_config().num_hidden_layers)

    @property
    def n_heads(self) -> int:
        """Number of query heads in a block."""
        return int(self.hf.config.get_text_config().num_attention_heads)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.hf.config.get_text_config().hidden_size)

    def has_twin(self, dtype: torch.dtype) -> bool:
        """Whether a copy in this precision has been made."""
        return dtype in self._twins

    def twin(self, dtype: torch.dtype) -> Model:
        """This model in another precision, copied once; itself where it has that precision already or cannot be copied.

        Make twins before the first use of ``bridge``: a wrapped model is not copied.
        """
        if next(self.hf.parameters()).dtype == dtype or stays_put(self.hf):
            return self
        if dtype not in self._twins:
            if "bridge" in self.__dict__:
                raise RuntimeError("Model.twin must come before Model.bridge: the bridge wraps the model in place")
            self._twins[dtype] = Model(self.name, copied(self.hf, dtype), self.tokenizer, self.system, self.path)
        twin: Model = self._twins[dtype]
        return twin


class _Seen(Exception):
    """What a forward was for has been seen; the rest of it need not run."""


def boot_bridge(hf: Any, tokenizer: Any, path: str) -> Any:
    """Wrap a model that is already in memory; works offline."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers

    hf.config.architectures = [type(hf).__name__]
    own = copy.deepcopy(tokenizer)
    own.init_kwargs["add_bos_token"] = True  # the dict only: otherwise the bridge reloads it and adds a BOS
    own.init_kwargs.setdefault("name_or_path", path)
    # TransformerLens would pip-install torchvision for models that take images too, and refuse what accelerate spreads
    # over a GPU and memory or disk, though its bridge only wraps what accelerate has placed
    with (
        quiet(),
        unittest.mock.patch.object(helpers, "_ensure_torchvision", lambda: False),
        unittest.mock.patch("transformer_lens.utilities.multi_gpu.is_mixed_offload_gpu", lambda placed: False),
    ):
        bridge = TransformerBridge.boot_transformers(os.path.abspath(path), hf_model=hf, tokenizer=own)
    bridge.cfg.default_prepend_bos = False  # a rendered chat has the template's BOS already
    for block in bridge.blocks:
        block.attn.register_forward_pre_hook(_cache_by_both_names, with_kwargs=True)
        # a partial, not a closure: a copy of the model then asks the copy's weights
        block.attn.hook_pattern.register_forward_hook(functools.partial(_in_precision_of, block.attn))
    return bridge


def _cache_by_both_names(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the bridge's attention the cache under the name it looks for.

    transformers 5.24 renamed ``past_key_values`` to ``cache``; TransformerLens 4.3.0 then ignores the cache without a
    word, and every reply after the first token is wrong.
    """
    if kwargs.get("past_key_values") is None and kwargs.get("cache") is not None:
        kwargs["past_key_values"] = kwargs["cache"]
    return args, kwargs


def _in_precision_of(attention: Any, _: Any, args: tuple[Any, ...], pattern: torch.Tensor) -> torch.Tensor:
    """The pattern in the precision of the attention's weights.

    OLMo's rotary embedding promotes to float32; TransformerLens 4.3.0 then cannot multiply 16-bit values.
    """
    dtype = next((p.dtype for p in attention.parameters() if p.is_floating_point()), pattern.dtype)
    return pattern.to(dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars and deprecation chatter of libraries; errors still come through."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    four_bits = logging.getLogger("bitsandbytes")  # warns of kernels that it can do without, whatever is loaded
    before = four_bits.level
    four_bits.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        four_bits.setLevel(before)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(
    name: str | Path = "embedded",
    *,
    dtype: torch.dtype = torch.float32,
    system: str | None = None,
    device: Device = None,
    four_bit: bool = False,
    adapter: str | None = None,
    reply_prefix: str = "",
) -> Model:
    """Load a chat model.

    Args:
        name: ``"embedded"``, a local folder, a GGUF file, or a hub id (``owner/name`` or ``owner/name@revision``).
        dtype: precision of the weights.
        system: a system prompt for every conversation; None leaves the template's own.
        device: where to put it, by default the GPU when there is one; ``"auto"`` spreads a large one over GPUs, memory
            and disk, and a mapping (module name → device or ``"disk"``) says exactly how.
        four_bit: quantise the weights (bitsandbytes).
        adapter: a LoRA adapter (a folder or a hub id, as PEFT saves them) that is merged into the weights.
        reply_prefix: text that every conversation ends with after the template's own, where all replies of a model
            open alike (Llama 2's with a space): chat[-1] is its last token.

    Raises:
        UserError: nothing of that name, no such device, no weights, too little memory, no chat template, an adapter
            that does not fit, or an architecture that is not in `suffix_analysis.families` and does not satisfy
            the identities.
    """
    name = checked_name(name, dtype, device)
    if name == "embedded":
        if four_bit:
            raise UserError("The embedded model is small and is not loaded in four bits; leave --four-bit out.")
        from suffix_analysis.organism.weights import load_embedded

        hf, tokenizer, path = load_embedded(dtype)
        device = None if is_spread(device) else device
    else:
        hf, tokenizer, path = _load_hf(name, dtype, device, four_bit)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"The tokenizer of {name!r} has no chat template; use an instruction-tuned model.")
    tokenizer.chat_template = prepared(tokenizer, reply_prefix)
    if adapter is not None:
        from suffix_analysis.adapters import with_adapter

        hf = with_adapter(hf, adapter)
    if not is_spread(device) and not stays_put(hf):
        hf = hf.to(device or default_device())
    if hf.device.type == "meta":
        raise UserError(f"The embedding of {name!r} is not in memory; give a device map that keeps it there.")
    model = Model(name if adapter is None else f"{name} + {Path(adapter).name}", hf.eval(), tokenizer, system, path)
    # a model with further parts (images, say) is another than its text model, which may be known
    if not {hf.config.model_type, hf.config.get_text_config().model_type} <= known_architectures():
        from suffix_analysis.identities import require_identities

        require_identities(model)
    return model


def source_of(name: str, weights: bool = True) -> tuple[str, dict[str, Any]]:
    """Where transformers finds ``name``, with the keywords that it needs beside; ``weights``: whether it must have any.

    Raises:
        UserError: no such folder or file, no weights in it, and not a hub id.
    """
    if name == "embedded":
        from suffix_analysis.organism.weights import base_folder

        return str(base_folder()), {}
    if not name.strip():
        raise UserError("The model's name is empty; give 'embedded', a folder, a GGUF file or a hub id.")
    local = Path(os.path.expanduser(name))  # noqa: PTH111
    try:
        is_file = local.is_file()
    except OSError as error:
        raise UserError(f"There is no model {name[:60]!r}…: {error.strerror}.") from error
    if is_file:
        if local.suffix != ".gguf":
            raise UserError(f"{name!r} is a file but not a .gguf one; give a model folder, a GGUF file or a hub id.")
        return str(local.parent), {"gguf_file": local.name}
    if local.is_dir():
        if weights and not any(local.glob("*.safetensors")):
            raise UserError(f"The folder {name!r} holds no *.safetensors weights; point to a saved model.")
        return str(local.resolve()), {}
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"There is no model {name!r}: not 'embedded', no such folder or file, and not a hub id (owner/name)."
        )
    source, _, revision = name.partition("@")
    return source, {"revision": revision} if revision else {}


def _load_hf(name: str, dtype: torch.dtype, device: Device, four_bit: bool) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, kwargs = source_of(name)
    placed = loading_arguments(name, dtype, device, four_bit)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
            hf, told = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                **kwargs, **placed,
            )  # fmt: skip
    except BROKEN as error:
        raise UserError(f"The model {name!r} cannot be loaded: {first_line(error)}") from error
    _require_whole(name, hf, told)
    if "gguf_file" in kwargs:  # unpacked when it is read: its layers are plain ones
        hf.is_quantized = False
    return hf, tokenizer, source


def _require_whole(name: str, hf: Any, told: dict[str, Any]) -> None:
    """Refuse a model whose weights are not all in its files, or whose files hold blocks that it has not."""
    n_blocks = int(hf.config.get_text_config().num_hidden_layers)
    deeper = [key for key in told["unexpected_keys"] if any(int(n) >= n_blocks for n in re.findall(r"\.(\d+)\.", key))]
    wrong = {
        "lack": sorted(told["missing_keys"]),
        "have another shape for": sorted(str(key) for key in told["mismatched_keys"]),
        f"have more than the configuration's {n_blocks} blocks, among others": sorted(deeper),
    }
    for what, keys in wrong.items():
        if keys:
            raise UserError(
                f"The model {name!r} is not whole: its weights {what} {keys[0]} ({len(keys)} of that kind); get its "
                "files again."
            )
