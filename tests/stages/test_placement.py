"""Models that are spread over memory and disk give the same numbers as whole ones; what cannot fit is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attacks
from attacks import precision
from attacks.caches import croppable, prefix_cache
from suffix_analysis import sizes
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Console
from suffix_analysis.directions import find_direction
from suffix_analysis.errors import UserError
from suffix_analysis.forward import added_logits, last_logits
from suffix_analysis.generate import generate
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model, load_model
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from suffix_analysis.placement import in_memory
from suffix_analysis.study import Study
from suffix_analysis.traces import trace
from tests import tiny
from tests.stages.test_families import ANY

SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
TEXTS = ["Sing", "Write a poem about the rain", "Bake a cake"]


@pytest.fixture(params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A saved model; Gemma 2 has norms behind attention."""
    tiny.hf_model(request.param).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def numbers(model: Model) -> dict[str, Any]:
    """What the line computes, from plain forwards to traces; the attack first, as the bridge wraps the model."""
    rows = [model.chat(text).ids for text in TEXTS]
    config = attacks.GCGConfig(
        num_steps=2, search_width=6, topk=16, optim_str_init="x x x x", seed=0, score_dtype="float32"
    )
    found: dict[str, Any] = {"suffix": attacks.run(model.hf, model.tokenizer, "Sing", "Sure", config).strings}
    found["logits"] = last_logits(model.hf, model.tokenizer, rows)
    texts = [
        f"{verb} {thing}" for verb in ("Draw", "Name", "Find", "Buy") for thing in ("a tree", "a boat", "it", "us")
    ]
    direction = find_direction(model, [*texts[:8], "a", "b"], [t + " now" for t in texts[:10]], ANY, refusal_tokens=[5])
    found["direction"] = direction.vector
    with ablate(model, direction.vector):
        found["ablated"] = last_logits(model.hf, model.tokenizer, rows)
        found["replies"] = generate(model.hf, model.tokenizer, rows, 5)
    traces = trace(model, TEXTS, direction)
    found |= {"contribution": traces.contribution, "projection": traces.projection, "identity": traces.identity}
    return found


def test_a_model_split_over_memory_and_disk_gives_the_same_numbers(folder: str) -> None:
    split, whole = load_model(folder, device=SPLIT), load_model(folder)
    assert {p.device.type for p in split.hf.parameters()} == {"cpu", "meta"}
    assert split.twin(torch.bfloat16) is split
    found, wanted = numbers(split), numbers(whole)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
        elif name == "identity":
            assert found[name] < 1e-5
        else:
            assert found[name] == value, name
    with pytest.raises(NotAvailable, match=r"offloaded|a norm stands"), orthogonalised(split, wanted["direction"]):
        pass


def test_an_embedding_that_is_not_in_memory_is_refused(folder: str) -> None:
    """Inputs go to where the model says that it is, and that would be nowhere."""
    with pytest.raises(UserError, match=r"The embedding of .* is not in memory; give a device map"):
        load_model(folder, device={**SPLIT, "model.embed_tokens": "disk", "lm_head": "disk"})


def test_weights_larger_than_the_free_memory_are_refused_before_they_are_read(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"does not fit: its weights in float32 take .* --device auto"):
        load_model(folder)
    assert load_model(folder, device=SPLIT).n_layers == 3, "what is spread is accelerate's to place"


def test_auto_and_four_bits(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(folder, device="auto").chat("Sing").n_chat
    monkeypatch.setattr("suffix_analysis.placement.find_spec", lambda name: None)
    with pytest.raises(UserError, match="embedded model is small"):
        load_model("embedded", four_bit=True)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_model(folder, four_bit=True)


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    tok.chat_template = None
    tok.save_pretrained(tmp_path)
    tiny.hf_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_model(str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).chat("Hello").n_chat == 4


def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.hf_model("llama").save_pretrained(tmp_path / "model")
    config, folder = StudyConfig(model=str(tmp_path / "model")), tmp_path / "run"
    folder.mkdir()
    for measured in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(precision, "fast_dtype", lambda device, found=measured: found)
        study = Study(folder, config, Console())
        assert study.precise.score_dtype == "bfloat16", "as measured when it began"
        assert study.fast.hf.dtype == torch.bfloat16


def test_a_cache_that_would_slide_is_not_cropped() -> None:
    model = tiny.hf_model("gemma2", sliding_window=16)
    cache = prefix_cache(model, torch.arange(5, 17))
    assert croppable(cache) and croppable(cache, 3) and not croppable(cache, 4)


def test_blocks_that_were_skipped_keep_what_accelerate_put_on_them(tmp_path: Path) -> None:
    """On several GPUs its own forward moves a block's inputs to the block's device."""
    tiny.hf_model("llama").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device=SPLIT)
    blocks = [block.original_component for block in model.bridge.blocks]
    before = [vars(block).get("forward") for block in blocks]
    assert any(before)
    rows = [model.chat(text).ids for text in TEXTS]
    added_logits(model, rows)(torch.ones(1, model.d_model), 2)
    assert [vars(block).get("forward") for block in blocks] == before


def test_four_bits_are_traced_with_the_matrices_that_they_stand_for(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra four-bit) is not installed")
    tok = tiny.tokenizer()
    config = LlamaConfig(  # blocks of 64 weights share a scale, so no width may be smaller
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = LlamaForCausalLM(config)
    whole.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), four_bit=True)
    found = trace(model, ["Write a poem"], torch.eye(128)[0], suffix="x y z")
    assert found.identity < 0.01 and found.closure < 0.01, "bfloat16's rounding"
    block = model.bridge.blocks[1]
    with in_memory(block.attn):
        weight = block.attn.W_O.detach().float()
    own = whole.model.layers[1].self_attn.o_proj.weight.detach().T.reshape(weight.shape)
    assert float((weight - own).norm() / own.norm()) < 0.2
    assert model.hf.model.layers[1].self_attn.o_proj.weight.dtype == torch.uint8, "and are put back"
