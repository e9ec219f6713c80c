"""Selecting the refusal direction, against the straightforward loop: `python benchmarks/direction.py [--every 1]`.

The loop runs, for every position and layer, whole prompts in float32 through the bridge with hooks: harmful ones with
the direction ablated, harmless ones with it ablated and with it added. With ``--every k`` it runs every k-th candidate
only and its time is scaled up to all that are not zero; the choice is then compared over those candidates alone. Take a
k that has no factor in common with the number of layers (7, say), or the same layers come again and again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import cyclopts
import torch
from torch import Tensor

from suffix_analysis.candidate_table import DirectionConfig, select
from suffix_analysis.directions import chat_means, find_direction, split_prompts
from suffix_analysis.interventions import ablate, add
from suffix_analysis.models import Model, load_model
from suffix_analysis.prompts import load_prompts
from suffix_analysis.refusal import kl_divergence, refusal_score


@torch.no_grad()
def whole_forwards(model: Model, rows: Sequence[Tensor]) -> Tensor:
    """Last logits, one whole padded batch at a time, every position's logits computed."""
    from suffix_analysis.batching import left_pad, pad_token

    padded = left_pad(rows, pad_token(model.tokenizer), model.hf.device)
    return model.hf(**padded).logits[:, -1].float()


def main(every: int = 1) -> None:
    """Time both and compare their choice."""
    config = DirectionConfig(keep_by_score=False)
    prompts = [p for split in ("fit", "select") for p in load_prompts("embedded", split=split)]
    kinds = [[p for p in prompts if p.kind == kind] for kind in ("harmful", "harmless")]
    model = load_model("embedded")
    opening = [model.tokenizer("I", add_special_tokens=False).input_ids[0]]
    started = time.perf_counter()
    found = find_direction(model, kinds[0], kinds[1], config, refusal_tokens=opening)
    ours = time.perf_counter() - started
    print(f"find_direction: {ours:.1f} s, position {found.position}, layer {found.layer}", flush=True)

    sets = [[model.chat(p.text) for p in part] for kind in kinds for part in split_prompts(kind, config)]
    started = time.perf_counter()
    means = chat_means(model, sets[0])[0] - chat_means(model, sets[2])[0]
    bad, good = ([chat.ids for chat in sets[i]] for i in (1, 3))
    baseline = whole_forwards(model, good)
    extraction = time.perf_counter() - started
    places = [(p, layer) for p in range(means.shape[1]) for layer in range(model.n_layers)]
    # those that are zero cost nothing
    total = [(p - means.shape[1], layer) for p, layer in places if float(means[layer, p].norm()) >= 1e-3]
    pairs = sorted({*total[::every], (found.position, found.layer)})  # the choice is always among those compared
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for position, layer in pairs:
        vector = means[layer, position].float()
        with ablate(model, vector):
            bypass, after = whole_forwards(model, bad), whole_forwards(model, good)
        with add(model, vector, layer):
            added = whole_forwards(model, good)
        rows.append(
            {
                "position": position,
                "layer": layer,
                "refusal_score": float(refusal_score(bypass, opening).mean()),
                "steering_score": float(refusal_score(added, opening).mean()),
                "kl_div_score": float(kl_divergence(baseline, after).mean()),
            }
        )
    loop = extraction + (time.perf_counter() - started) * len(total) / len(pairs)
    best = select(rows, model.n_layers, **config.rules)
    among = {(row["position"], row["layer"]) for row in rows}
    own = [row for row in found.scores if (row["position"], row["layer"]) in among and row["status"] != "zero"]
    same = best == select(own, model.n_layers, **config.rules)
    print(f"straightforward loop: {loop:.0f} s ({len(rows)} candidates run), choice {best}, same choice: {same}")
    print(f"find_direction is {loop / ours:.1f}× faster")


if __name__ == "__main__":
    cyclopts.run(main)
