"""The refusal metric's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from suffix_analysis.refusal import FLOOR, kl_divergence, refusal_score


def test_score_is_the_log_odds_of_the_tokens_together() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.2]]))
    assert float(refusal_score(logits, [1, 2])) == pytest.approx(math.log(0.3 / 0.7))


def test_score_is_floored_not_infinite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    low, high = -math.log(FLOOR), math.log(FLOOR)
    assert refusal_score(logits, [0]).tolist() == pytest.approx([low, high])


def test_kl_is_zero_for_equal_and_exact_for_known_distributions() -> None:
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.5]])
    assert float(kl_divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-9)
    exact = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(exact, abs=1e-5)
