"""The model families that are known here: what differs in their mathematics, and which chat models they are.

Nothing else in this package is written per family. ``tests/stages/test_families.py`` takes every row that is marked
verified through the whole line; a model of an architecture that is not in the table is checked when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Chat models of one architecture and chat format.

    Attributes:
        name: the family's name, as its makers write it.
        models: which of its chat models.
        architecture: ``model_type`` of the Hugging Face configuration.
        mathematics: what differs from a plain Llama block, in words.
        orthogonalises: whether orthogonalised weights equal ablation (not with a norm behind attention); None: unknown.
        verified: whether a tiny random model with this architecture and chat format satisfies every identity in tests.
        note: what is known where this is not verified.
    """

    name: str
    models: str
    architecture: str
    mathematics: str = "plain"
    orthogonalises: bool | None = True
    verified: bool = True
    note: str = ""


POST = "norms after attention and MLP"
WEIGHTS = {True: "yes", False: "not available", None: "not verified"}

FAMILIES = (
    Family(
        "Qwen Chat",
        "1.8B, 7B, 14B, 72B",
        "qwen",
        "biases on queries, keys, values",
        orthogonalises=None,
        verified=False,
        note="not verified: needs remote code",
    ),
    Family("Yi Chat", "6B, 34B", "llama"),
    Family("Gemma it", "2B, 7B", "gemma", "embeddings × √d_model, norms weigh 1 + w"),
    Family("Llama 2 Chat", "7B, 13B, 70B", "llama", "plain; every reply opens with a space: `--reply-prefix ' '`"),
    Family("Llama 3 Instruct", "8B, 70B", "llama"),
    Family("Llama 3.1 Instruct", "3.1; 3.2 (text), 3.3", "llama"),
    Family("Qwen1.5, Qwen2.5", "all dense sizes", "qwen2", "biases on queries, keys, values"),
    Family("Qwen3", "all dense sizes", "qwen3", "norms on queries and keys"),
    Family("Gemma 2 it", "2B, 9B, 27B", "gemma2", f"{POST}; attention and logits capped", orthogonalises=False),
    Family("Gemma 3 it", "270M, 1B", "gemma3_text", f"{POST}, queries, keys", orthogonalises=False),
    Family(
        "Gemma 3 it",
        "4B, 12B, 27B",
        "gemma3",
        "the same, beside a part that reads images",
        orthogonalises=False,
        verified=False,
        note="checked at load; hold in a tiny one",
    ),
    Family("Mistral Instruct", "7B v0.1 to v0.3", "mistral", "sliding attention in v0.1"),
    Family("Phi-3", "mini, medium", "phi3", "queries, keys, values in one matrix"),
    Family("Phi-4", "14B", "phi3", "queries, keys, values in one matrix"),
    Family("Phi-4 mini", "3.8B", "phi3", "queries, keys, values in one matrix; a part of each head rotates"),
    Family("OLMo 2 Instruct", "1B to 32B", "olmo2", f"only {POST}", orthogonalises=False),
    Family("OLMo 3 Instruct", "7B, 32B", "olmo3", f"only {POST}; sliding attention", orthogonalises=False),
    Family("SmolLM2 Instruct", "135M to 1.7B", "llama"),
    Family("SmolLM3", "3B", "smollm3", "no rotation in every fourth layer"),
    Family("Granite Instruct", "3.x dense", "granite", "writes × a multiplier; embeddings, logits, attention scaled"),
)


def known_architectures() -> frozenset[str]:
    """Architectures whose identities are verified in tests; any other is checked when it is loaded."""
    return frozenset(family.architecture for family in FAMILIES if family.verified)


def support_table() -> str:
    """The table as Markdown; README.md shows it."""
    lines = [
        "| family | chat models | architecture | what differs | orthogonalised weights | identities |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        known, weights = f"`{family.architecture}`", WEIGHTS[family.orthogonalises]
        state = "hold" if family.verified else family.note
        cells = (family.name, family.models, known, family.mathematics, weights, state)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
