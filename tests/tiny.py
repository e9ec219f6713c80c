"""Tiny random chat models of several architectures, made in memory in milliseconds; nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from suffix_analysis.models import Model
from suffix_analysis.prompts import load_prompts
from suffix_analysis.templates import prepared
from tests.formats import FORMATS, Format

# a chat format of our own: a system turn, then the user's, then the reply's header
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|sys|>You are tiny.<|end|>\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}<|sys|>{% else %}<|user|>{% endif %}"
    "{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|reply|>\n{% endif %}"
)
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


WORDS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
OWN = Format(TEMPLATE, ("<|sys|>", "<|user|>", "<|reply|>", "<|end|>"), "<|end|>")


@functools.cache
def tokenizer(format_name: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 700 tokens, trained on the embedded prompts, with a chat format of ``FORMATS``."""
    chat = OWN if format_name is None else FORMATS[format_name]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if format_name is not None:  # as in most of these families, where "?" and a line's end behind it are one token
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tok.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    special = ["<|pad|>", *chat.special]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    end = "" if format_name is None else "\n"
    tok.train_from_iterator([p.text + end for p in load_prompts("embedded")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<|pad|>", eos_token=chat.eos, bos_token=chat.bos)
    fast.chat_template = chat.template
    fast.chat_template = prepared(fast)
    return fast


@functools.cache
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that marks words by a sign for the space before them and drops the first space when it decodes."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *OWN.special])
    tok.train_from_iterator([p.text for p in load_prompts("embedded")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", pad_token="<unk>", eos_token=OWN.eos)
    fast.chat_template = OWN.template
    return fast


def hf_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model; weights are drawn with the seed and do not touch the global generator."""
    sizes = {**SIZES, "vocab_size": 700, "pad_token_id": 0, "eos_token_id": 4, "bos_token_id": None, **changes}
    config = CONFIG_MAPPING[family](**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # large enough that attention is not uniform and heads matter
                if parameter.dim() > 1:
                    parameter.normal_(std=0.25)
    return model.to(dtype).eval()


def model(
    family: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    format_name: str | None = None,
    **changes: Any,
) -> Model:
    """A tiny chat model as the toolkit sees it."""
    tok = tokenizer(format_name)
    hf = hf_model(family, seed, dtype, eos_token_id=tok.eos_token_id, **changes)
    return Model(f"tiny-{family}", hf, tok)


TEXTS = (
    "Bake a cake",
    "Write a poem about the rain in spring",
    "Sing",
    "How do I mend a chair?",
    "Go home now, please",
)


def unit(n: int, seed: int = 0) -> torch.Tensor:
    """A random direction of length 3."""
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return 3 * vector / vector.norm()


def shake(hf: Any) -> None:
    """Move biases and the weights of norms, which are neutral as they are made."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def falcon() -> Model:
    """A model whose blocks return tuples."""
    config = CONFIG_MAPPING["falcon"](
        vocab_size=700,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        alibi=False,
        bos_token_id=None,
        eos_token_id=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config).eval()
    return Model("tiny-falcon", hf, tokenizer(), None)
