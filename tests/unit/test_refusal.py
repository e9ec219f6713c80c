"""The refusal metric's arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suffix_analysis import refusal
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.models import Model
from suffix_analysis.refusal import FLOOR, discover_refusal_tokens, kl_divergence, refusal_score
from tests import tiny


def test_score_is_the_log_odds_of_the_tokens_together() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.2]]))
    assert float(refusal_score(logits, [1, 2])) == pytest.approx(math.log(0.3 / 0.7))


def test_a_token_that_is_given_twice_counts_once() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.6]]))
    assert float(refusal_score(logits, [1, 1])) == pytest.approx(math.log(0.6 / 0.4))
    assert StudyConfig(refusal_tokens=[5, 7, 5]).refusal_tokens == (5, 7)


def test_score_is_floored_not_infinite() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    low, high = -math.log(FLOOR), math.log(FLOOR)
    assert refusal_score(logits, [0]).tolist() == pytest.approx([low, high])


def test_kl_is_zero_for_equal_and_exact_for_known_distributions() -> None:
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.5]])
    assert float(kl_divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-9)
    exact = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(exact, abs=1e-5)


def test_replies_that_all_open_alike_are_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 2's do: with a space of its own, and the word only after it."""
    tokenizer = tiny.metaspace_tokenizer()
    model = Model("m", SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: None)), tokenizer)
    space = tokenizer.convert_tokens_to_ids("▁")
    said = iter((["I cannot help with that."] * 4, ["Here it is."] * 4))

    def answers(hf: Any, tokenizer: Any, rows: Any, length: int) -> tuple[list[str], torch.Tensor]:
        return next(said), torch.nn.functional.one_hot(torch.full((4,), space), 700).float()

    monkeypatch.setattr(refusal, "answers", answers)
    chats = [model.chat(text) for text in "abcd"]
    with pytest.raises(UserError, match=r"open with the same token, ' ' .*reply_prefix = \" \" in a --config"):
        discover_refusal_tokens(model, chats, chats)
