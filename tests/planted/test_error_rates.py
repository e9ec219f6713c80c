"""On a model whose suffixes do nothing, no head is reported more often than the stated error rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from suffix_analysis.analysis import head_differences
from suffix_analysis.arms import ArmTraces
from suffix_analysis.max_t import sign_flip_max_t
from suffix_analysis.records import to_suffixes
from suffix_analysis.traces import Traces, trace
from tests.planted.models import D_MODEL, SUFFIX, F, instructions, planted

pytestmark = pytest.mark.long

UNIT = torch.nn.functional.one_hot(torch.tensor(F["refuse"]), D_MODEL).float()


def test_a_suffix_without_effect_is_reported_no_more_often_than_the_error_rate() -> None:
    """Heads pick up random signs that mean nothing; 400 maps of 30 prompts each, tested family-wise at 5 %."""
    model, rng = planted("nothing"), np.random.default_rng(0)
    texts = instructions(80, harmful=True)
    picks = [rng.choice(8, 4, replace=False) for _ in texts]
    plain = trace(model, texts, UNIT).head_contribution

    def differences(mirrored: bool) -> np.ndarray:
        chats = [
            model.chat(text, " ".join(SUFFIX[i ^ mirrored] for i in pick))
            for text, pick in zip(texts, picks, strict=True)
        ]
        return (trace(model, chats, UNIT).head_contribution - plain).double().numpy()

    # a suffix and its mirror image have every sign turned around: neither is likelier, which makes the null exact
    both = np.stack([differences(mirrored=False), differences(mirrored=True)])
    np.testing.assert_allclose(both[1, :, 2], -both[0, :, 2], atol=1e-6)
    assert (np.abs(both[0, :, 2]).max(axis=0) > 0.01).all(), "every head has something to be misled by"
    rejections = alone = 0
    for draw in range(400):
        some = rng.choice(len(texts), 30, replace=False)
        maps = both[rng.integers(0, 2, 30), some]
        rejections += bool((sign_flip_max_t(maps, seed=draw, draws=400).p <= 0.05).any())
        alone += bool((ttest_1samp(maps[:, 2], 0).pvalue <= 0.05).any())
    assert 5 <= rejections <= 31, rejections
    assert alone > 31, "each head tested alone would be reported more often"


def test_suffixes_without_effect_on_average_are_reported_no_more_often_than_the_error_rate() -> None:
    """Each suffix misleads the heads its own way, alike on every prompt; arms of 8 are drawn 400 times."""
    model, rng = planted("nothing"), np.random.default_rng(1)
    texts = instructions(12, harmful=True)
    picks = [rng.choice(8, 4, replace=False) for _ in range(24)]
    plain = trace(model, texts, UNIT)

    def with_suffix(pick: np.ndarray, mirrored: bool) -> Traces:
        suffix = " ".join(SUFFIX[i ^ mirrored] for i in pick)
        return trace(model, [model.chat(text, suffix) for text in texts], UNIT)

    # a suffix and its mirror image are as likely as each other, which makes the null exact
    both = [[with_suffix(pick, mirrored) for pick in picks] for mirrored in (False, True)]
    none = ArmTraces("none", (), (plain,))
    records = to_suffixes([f"suffix {i}" for i in range(8)])
    rejected = by_prompt = 0
    for draw in range(400):
        some = rng.choice(len(picks), 8, replace=False)
        arm = ArmTraces("adversarial", tuple(records), tuple(both[rng.integers(0, 2)][i] for i in some))
        rejected += any(row["p"] <= 0.05 for row in head_differences([(arm, none)]))
        cells = [one.cells(lambda t: t.head_contribution) for one in (arm, none)]
        maps = cells[0].mean(axis=1) - cells[1].mean(axis=1)
        by_prompt += bool((sign_flip_max_t(maps, seed=draw, draws=100).p <= 0.05).any())
    assert rejected <= 31, rejected
    assert by_prompt > 200, "held against prompts alone, what these suffixes share would be reported"
