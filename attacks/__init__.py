"""Making adversarial suffixes: GCG (Zou et al. 2023), its nanoGCG twin and the control suffixes.

Works on any Hugging Face causal language model with its tokenizer; knows nothing of refusal directions, run folders
or HTML. The usual call is ``attacks.run(model, tokenizer, messages, target, attacks.GCGConfig(...))``.
"""

from attacks.config import AttackError, GCGConfig, GCGResult, Step
from attacks.controls import benign_suffixes, random_suffixes, shuffled_suffixes
from attacks.gcg import GCG, run
from attacks.nanogcg import run_nanogcg
from attacks.precision import fast_dtype
from attacks.selftest import SelfTest, self_test
from attacks.slot import PLACEHOLDER, Slot, build_slot
from attacks.terms import Projection, SuffixAttention, Term

__all__ = [
    "GCG",
    "PLACEHOLDER",
    "AttackError",
    "GCGConfig",
    "GCGResult",
    "Projection",
    "SelfTest",
    "Slot",
    "Step",
    "SuffixAttention",
    "Term",
    "benign_suffixes",
    "build_slot",
    "fast_dtype",
    "random_suffixes",
    "run",
    "run_nanogcg",
    "self_test",
    "shuffled_suffixes",
]
