"""A LoRA adapter on a base model: merged on loading, and refused in one sentence where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from suffix_analysis.errors import UserError
from suffix_analysis.models import load_model
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.hf_model("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_for(folder: Path, **changes: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            tiny.hf_model("llama", **changes), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_its_base(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(tmp_path / "taught")
    plain, taught = load_model(str(base)), load_model(str(base), adapter=str(adapter))
    assert taught.name == f"{base} + taught"
    ids = plain.chat("Bake a cake").ids[None]
    with torch.no_grad():
        change = (taught.hf(input_ids=ids).logits - plain.hf(input_ids=ids).logits).abs().max()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            expected = get_peft_model(
                tiny.hf_model("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            )
        torch.testing.assert_close(
            taught.hf(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    assert float(change) > 0.01
    assert taught.bridge is not None, "and it can be wrapped"


def test_what_is_no_adapter_or_does_not_fit_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_model(str(base), adapter=str(tmp_path / "empty"))
    other = adapter_for(tmp_path / "wide", hidden_size=64)
    with pytest.raises(UserError, match="does not go onto this model"):
        load_model(str(base), adapter=str(other))
