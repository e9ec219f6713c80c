"""Where models come from, from a folder, a GGUF file or the hub's cache to the bridge: the same numbers each time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from suffix_analysis.errors import UserError
from suffix_analysis.identities import rounding
from suffix_analysis.models import Model, load_model
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama chat model as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def same(one: Model, other: Model) -> None:
    """The same rendered conversation, the same logits, and a bridge over them."""
    chat = one.chat("Bake a cake", "x y")
    assert torch.equal(chat.ids, other.chat("Bake a cake", "x y").ids)
    ids = chat.ids[None]
    with torch.no_grad():
        wanted = one.hf(ids).logits
        torch.testing.assert_close(other.hf(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.bridge(ids), wanted, rtol=1e-4, atol=1e-4)


def put_in_cache(cache: Path, files: Path, name: str, commit: str, revision: str) -> None:
    """Lay ``files`` out as huggingface_hub keeps a download of ``name`` at ``revision``."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(commit)
    shutil.copytree(files, home / "snapshots" / commit)


def test_a_hub_id_with_a_revision_is_that_revision(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny.hf_model("llama", seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    put_in_cache(tmp_path / "hub", saved, "someone/tiny", "a" * 40, "v1")
    put_in_cache(tmp_path / "hub", other, "someone/tiny", "b" * 40, "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    same(load_model(str(saved)), load_model("someone/tiny@v1"))
    same(load_model(str(other)), load_model("someone/tiny"))
    with pytest.raises(UserError, match="someone/tiny@v2"):
        load_model("someone/tiny@v2")


def test_a_gguf_file_is_the_model_that_was_converted(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    to_gguf(tiny.hf_model("llama"), tiny.tokenizer(), file)
    same(load_model(str(saved)), load_model(str(file)))


def test_a_gguf_file_is_as_exact_as_its_weights(tmp_path: Path) -> None:
    """transformers calls it quantised, though its layers are plain: then nothing of it would be checked closely."""
    to_gguf(tiny.hf_model("llama"), tiny.tokenizer(), tmp_path / "tiny.gguf")
    model = load_model(str(tmp_path / "tiny.gguf"))
    assert rounding(model) == 0 and model.twin(torch.bfloat16) is not model


def to_gguf(hf: Any, tokenizer: Any, file: Path) -> None:
    """A Llama and its byte-level tokenizer as llama.cpp's converter lays them out (queries and keys interleaved)."""
    config, weights = hf.config, hf.state_dict()
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)

    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([word for word, _ in words])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    out.add_token_types([kinds[word in special] for word, _ in words])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(tokenizer.chat_template)

    def rows(name: str, n_heads: int) -> Any:
        x = weights[name]
        return x.reshape(n_heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape)

    put = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        put |= {
            f"{theirs}.attn_norm.weight": weights[f"{ours}.input_layernorm.weight"],
            f"{theirs}.ffn_norm.weight": weights[f"{ours}.post_attention_layernorm.weight"],
            f"{theirs}.attn_q.weight": rows(f"{ours}.self_attn.q_proj.weight", config.num_attention_heads),
            f"{theirs}.attn_k.weight": rows(f"{ours}.self_attn.k_proj.weight", config.num_key_value_heads),
            f"{theirs}.attn_v.weight": weights[f"{ours}.self_attn.v_proj.weight"],
            f"{theirs}.attn_output.weight": weights[f"{ours}.self_attn.o_proj.weight"],
            **{f"{theirs}.ffn_{w}.weight": weights[f"{ours}.mlp.{w}_proj.weight"] for w in ("gate", "up", "down")},
        }
    for name, x in put.items():
        out.add_tensor(name, x.float().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
