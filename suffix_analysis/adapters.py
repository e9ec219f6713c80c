"""LoRA adapters, merged into the weights of the model that they were trained on."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from attacks.precision import stays_put
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.models import BROKEN, quiet


def with_adapter(hf: Any, adapter: str) -> Any:
    """The model with a LoRA adapter merged into its weights.

    Args:
        hf: a transformers model with whole weights.
        adapter: a folder as PEFT's save_pretrained writes it, or a hub id (owner/name, with @revision if need be).

    Raises:
        UserError: there is no such adapter, it is of another kind, or it does not fit the model.
    """
    from huggingface_hub import snapshot_download

    with quiet():
        from peft import PeftModel
    if stays_put(hf):
        raise UserError(
            f"The adapter {adapter!r} cannot be merged into quantised or offloaded weights; load them whole."
        )
    names = ("adapter_config.json", "adapter_model.safetensors")
    try:
        local = Path(os.path.expanduser(adapter))  # noqa: PTH111 — Path's own raises for a ~name that is no user
        if not local.exists():  # from the hub come these two files and no pickles
            owner, _, revision = adapter.partition("@")
            local = Path(snapshot_download(owner, revision=revision or None, allow_patterns=list(names)))
        lacking = [name for name in names if not (local / name).is_file()]
        if lacking:
            raise UserError(f"{adapter!r} holds no {lacking[0]}; give a folder as PEFT's save_pretrained writes it.")
        kind = json.loads((local / names[0]).read_text("utf-8")).get("peft_type")
        if kind != "LORA":
            raise UserError(
                f"{adapter!r} is an adapter of the kind {kind}; only LoRA's can be merged into the weights."
            )
        with quiet(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tuned = PeftModel.from_pretrained(hf, str(local))
    except (*BROKEN, AttributeError) as error:  # a configuration that is a list, among others
        raise UserError(f"The adapter {adapter!r} does not go onto this model: {first_line(error)}") from error
    # LoRA begins with B = 0: where nothing was loaded, nothing is changed
    empty = [name for name, x in tuned.named_parameters() if "lora_B" in name and not x.any()]
    if empty or any("missing adapter keys" in str(warning.message) for warning in said):
        raise UserError(f"The adapter {adapter!r} lacks weights for this model, e.g. {(empty or ['some layers'])[0]}.")
    return tuned.merge_and_unload()
