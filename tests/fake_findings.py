"""Invented findings tables for ``fake_run``: rows as the run folder's schema has them."""

from __future__ import annotations

from typing import Any

import numpy as np

LAYERS, HEADS, WIDTH, DIRECTION_LAYER = 30, 9, 576, 17
REGIONS = ("bos", "system", "instruction", "suffix", "chat")
RATES = {"none": 0.962, "adversarial": 0.408, "random": 0.951, "shuffled": 0.893, "benign": 0.958}
KEEP = {"none": 1.0, "adversarial": 0.3, "random": 0.94, "shuffled": 0.83, "benign": 0.97}


def rate_row(arm: str, split: str, n: int, n_suffixes: int, rate: float, few: bool) -> dict[str, Any]:
    half = 1.96 * (rate * (1 - rate) / n + 1e-4) ** 0.5
    return {
        "arm": arm,
        "split": split,
        "n_prompts": n,
        "n_suffixes": n_suffixes,
        "refusal_rate": rate,
        "refusal_lo": max(0.0, rate - half),
        "refusal_hi": min(1.0, rate + half),
        "complied_rate": (1 - rate) * 0.8,
        "complied_lo": max(0.0, (1 - rate) * 0.8 - half),
        "complied_hi": min(1.0, (1 - rate) * 0.8 + half),
        "resampled": "prompts" if n_suffixes < 2 else "prompts and suffixes",
        "descriptive": few and "adversarial" in arm,
    }


def contrast(measure: str, against: str, estimate: float, half: float, n: int, few: bool) -> dict[str, Any]:
    return {
        "measure": measure,
        "arm": "adversarial",
        "against": against,
        "estimate": estimate,
        "lo": estimate - half,
        "hi": estimate + half,
        "n_prompts": n,
        "n_suffixes": 1,
        "resampled": "prompts",
        "descriptive": few,
    }


def intervention(name: str, kind: str, rate: float, n: int, alpha: float | None) -> dict[str, Any]:
    half = 1.96 * (rate * (1 - rate) / n + 1e-4) ** 0.5
    return {
        "intervention": name,
        "kind": kind,
        "split": "report",
        "alpha": alpha,
        "n_prompts": n,
        "refusal_rate": rate,
        "refusal_lo": max(0.0, rate - half),
        "refusal_hi": min(1.0, rate + half),
        "complied_rate": (1 - rate) * 0.8,
        "complied_lo": max(0.0, (1 - rate) * 0.8 - half),
        "complied_hi": min(1.0, (1 - rate) * 0.8 + half),
    }


def candidates(rng: np.random.Generator, bad: list[str]) -> list[dict[str, Any]]:
    rows = []
    tokens = ["\n" + bad[0], "assistant", "<|im_start|>", "\n", "<|im_end|>"]
    for position in range(-1, -6, -1):
        for layer in range(LAYERS):
            fit = np.exp(-(((layer - 17) / 6) ** 2)) * (1 - 0.13 * (abs(position) - 1))
            score = float(5 - 14 * fit + rng.normal(0, 0.5))
            induce = float(7 * fit - 2 + rng.normal(0, 0.4))
            kl = float(0.03 + 0.12 * layer / LAYERS * rng.random())
            status = (
                "too late"
                if layer >= 24
                else "KL too high"
                if kl > 0.1
                else "does not induce"
                if induce < 0
                else "kept"
            )
            if layer == 0:
                score, induce, kl, status = float("nan"), float("nan"), float("nan"), "zero"
            if (position, layer) == (-1, DIRECTION_LAYER):
                score, induce, kl, status = -9.42, 5.31, 0.041, "chosen"
            norm = 0.0 if layer == 0 else 2 + layer * 1.3
            rows.append(
                {
                    "position": position,
                    "token": tokens[-position - 1],
                    "layer": layer,
                    "refusal_score": score,
                    "steering_score": induce,
                    "kl_div_score": kl,
                    "norm": norm,
                    "status": status,
                }
            )
    return rows


def profile(rng: np.random.Generator, n: int) -> list[dict[str, Any]]:
    rows = []
    ends = KEEP | {"harmless": 0.0, "harmless+adversarial": -0.08}
    for arm, level in ends.items():
        for layer in range(LAYERS + 1):
            rise = 1 / (1 + np.exp(-(layer - 10) / 2.2))
            normalised = 1.0 + (level - 1.0) * rise + float(rng.normal(0, 0.015))
            spread = 0.02 + 0.05 * rise
            for measure, centre, scale in (
                ("normalised", normalised, 1.0),
                ("cosine", 0.05 + 0.4 * rise * level, 0.4),
                ("projection", (2 + 24 * level) * rise * (1 + layer / 30), 20.0),
            ):
                missing = measure == "normalised" and layer == 0
                rows.append(
                    {
                        "arm": arm,
                        "layer": layer,
                        "measure": measure,
                        "mean": None if missing else float(centre),
                        "lo": None if missing else float(centre - spread * scale),
                        "hi": None if missing else float(centre + spread * scale),
                        "n_prompts": n,
                    }
                )
    return rows


def heads(rng: np.random.Generator, top: set[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for split in ("select", "report"):
        base = rng.normal(0, 0.12, (LAYERS, HEADS))
        for arm, keep in KEEP.items():
            for layer in range(LAYERS):
                for head in range(HEADS):
                    c = float(base[layer, head] + rng.normal(0, 0.02))
                    c += (2.4 if (layer, head) in top else 0) * keep
                    c -= 0.7 if (layer, head) in {(20, 2), (22, 6)} else 0
                    instruction = 0.35 * keep if (layer, head) in top else 0.2
                    rows.append(
                        {
                            "arm": arm,
                            "split": split,
                            "layer": layer,
                            "head": head,
                            "contribution": c,
                            "lo": c - 0.1,
                            "hi": c + 0.1,
                            "attention_instruction": instruction,
                            "attention_suffix": 0.0 if arm == "none" else 0.5 * (1 - keep),
                            "attention_chat": 0.3,
                            "attention_system": 0.2,
                        }
                    )
    return rows


def shift(rng: np.random.Generator, top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for arm, keep in KEEP.items():
        total = {region: np.zeros(2) for region in REGIONS}
        for layer, head in [*top, (-1, -1)]:
            instruction = float(np.clip(0.46 * keep + rng.normal(0, 0.03), 0.01, 0.9))
            suffix = 0.0 if arm == "none" else float(0.1 + 0.35 * (1 - keep))
            chat = (1 - instruction - suffix) * 0.4
            parts = {
                "bos": 0.0,
                "system": (1 - instruction - suffix) * 0.6,
                "instruction": instruction,
                "suffix": suffix,
                "chat": chat,
            }
            for region, a in parts.items():
                c = {"instruction": 1.9 * keep, "suffix": -0.2 * (1 - keep), "chat": 0.3}.get(region, 0.02)
                if (layer, head) == (-1, -1):
                    a, c = (float(x) for x in total[region])
                else:
                    total[region] += (a, c)
                gone = region == "suffix" and arm == "none"
                rows.append(
                    {
                        "arm": arm,
                        "layer": layer,
                        "head": head,
                        "region": region,
                        "attention": a,
                        "attention_lo": max(0.0, a * 0.93 - 0.01),
                        "attention_hi": a * 1.07 + 0.01,
                        "lift": None if gone else a / 0.3,
                        "contribution": c,
                        "contribution_lo": c - 0.08,
                        "contribution_hi": c + 0.08,
                    }
                )
    return rows


def patterns(
    rng: np.random.Generator, prompts: list[dict[str, Any]], top: list[tuple[int, int]], bad: list[str]
) -> list[dict[str, Any]]:
    rows = []
    report = [p for p in prompts if p["kind"] == "harmful" and p["split"] == "report"][:4]
    for number, p in enumerate(report):
        for arm in ("none", "adversarial"):
            system = ["<|im_start|>", "system", "\n", *[f" sys{i}" for i in range(14)], "<|im_end|>", "\n"]
            system += ["<|im_start|>", "user", "\n"]
            words = [f" {w}" for w in p["text"].split(" ")[:14] if w] + ([bad[number % len(bad)]] if bad[0] else [])
            suffix = [] if arm == "none" else [f" s{i}{bad[i % len(bad)]}" for i in range(20)]
            chat = ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
            tokens = system + words + suffix + chat
            regions = (
                ["system"] * len(system)
                + ["instruction"] * len(words)
                + ["suffix"] * len(suffix)
                + ["chat"] * len(chat)
            )
            size = len(tokens)
            raw = np.tril(rng.gamma(0.3, 1.0, (len(top), size, size)) + 1e-6)
            raw[:, :, 0] += 2.0
            attention = raw / raw.sum(-1, keepdims=True)
            sign = np.array([{"instruction": 1.0, "suffix": -0.3}.get(region, 0.1) for region in regions])
            contribution = attention[:, -1] * sign * (10 if arm == "none" else 5) * rng.normal(1, 0.3, (len(top), size))
            rows.append(
                {
                    "prompt_id": p["id"],
                    "arm": arm,
                    "suffix_id": None if arm == "none" else "adversarial-0",
                    "tokens": tokens,
                    "regions": regions,
                    "heads": top,
                    "attention": np.round(attention, 3).tolist(),
                    "contribution": np.round(contribution, 4).tolist(),
                }
            )
    return rows


def checks(bad: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": "causal identity",
            "value": 0.0,
            "bound": 0.0,
            "passed": True,
            "sentence": "A suffix changes no state at an instruction position." + bad[0],
        },
        {
            "name": "contribution sum",
            "value": 3.1e-6,
            "bound": 1e-5,
            "passed": True,
            "sentence": "Head contributions and bias sum to the attention write along the direction.",
        },
        {
            "name": "splits",
            "value": 0,
            "bound": 0,
            "passed": True,
            "sentence": "No report prompt was used for fitting, choosing or training.",
        },
        {
            "name": "random direction",
            "value": 0.94,
            "bound": 0.9,
            "passed": False,
            "sentence": "Ablating a random direction of the same norm leaves refusals as they are.",
        },
    ]


def shares(name: str, parts: dict[str, float], extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``carried`` or ``factors``: parts of a change of 16 units."""
    return [
        {
            name: part, "value": 16 * share, "lo": 16 * share - 0.5, "hi": 16 * share + 0.5,
            "share": share, "share_lo": share - 0.03, "share_hi": share + 0.03, "n_prompts": 32, "n_suffixes": 1,
            **extra,
        }
        for part, share in parts.items()
    ]  # fmt: skip


def carried() -> list[dict[str, Any]]:
    return shares("term", {"top heads": 0.58, "other heads": 0.17, "MLPs": 0.25, "embedding": 0.0}, {})


def factors(top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    parts = {"query": 0.62, "dilution": 0.31, "chat keys": 0.04, "displacement": 0.03, "scale": 0.0}
    return [row for head in [*top, (-1, -1)] for row in shares("factor", parts, {"layer": head[0], "head": head[1]})]


def causal() -> list[dict[str, Any]]:
    tests = [
        ("nothing changed", "none", "attacked", None, 0.0, 0.41),
        ("nothing changed", "none", "none", None, 0.0, 0.96),
    ]
    for heads, gain in (("top", 0.5), ("random", 0.05), ("random", 0.02), ("all", 1.0)):
        refused = 0.9 if heads == "all" else None
        tests.append(("suffix edges cut, mass renormalised", heads, "attacked", None, 0.9 * gain, refused))
        tests.append(("suffix edges cut, mass destroyed", heads, "attacked", None, 0.3 * gain, None))
        tests.append(("patched from the run without suffix", heads, "attacked", None, gain, refused))
        tests.append(("mean-ablated", heads, "none", None, 0.4 * gain, None))
    tests += [
        ("projection restored", "none", "attacked", d, d, 0.93 if d == 1 else None) for d in (0.25, 0.5, 0.75, 1.0)
    ]
    tests.append(("random direction moved as far", "none", "attacked", 1.0, 0.0, 0.41))
    rows = []
    for test, heads, on, dose, gain, refused in tests:
        row: dict[str, Any] = {"test": test, "heads": heads, "on": on, "dose": dose, "n_prompts": 32, "n_suffixes": 1}
        for measure, size in (("score", 14.0), ("projection", 16.0)):
            row |= {
                f"{measure}_before": -5.0, f"{measure}_after": -5.0 + gain * size, f"{measure}_effect": gain * size,
                f"{measure}_lo": gain * size - 1, f"{measure}_hi": gain * size + 1, f"{measure}_recovered": gain,
                f"{measure}_recovered_lo": gain - 0.05, f"{measure}_recovered_hi": gain + 0.05,
            }  # fmt: skip
        around = (None, None, None) if refused is None else (refused, refused - 0.1, min(1.0, refused + 0.06))
        rows.append(row | dict(zip(("refused", "refused_lo", "refused_hi"), around, strict=True)))
    return rows


def sweep(rng: np.random.Generator, top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "run": run, "layer": layer, "head": head, "n_prompts": 32, "projection_p": 0.001 if hit else 0.6,
            "projection_effect": (-1.5 if hit else 0.0) + float(rng.normal(0, 0.05)),
            "score_effect": 0.0, "score_p": 1.0,
        }
        for run in ("none", "adversarial")
        for layer in range(LAYERS)
        for head in range(HEADS)
        for hit in ((layer, head) in top[:3],)
    ]  # fmt: skip


def circuit(top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def edge(kind: str, weight: float, **where: Any) -> None:
        blank = dict.fromkeys(("source_layer", "source_head", "position", "region", "target_layer", "target_head"))
        for arm, keep in (("none", 1.0), ("adversarial", 0.35)):
            rows.append(
                {"arm": arm, "kind": kind, **blank, **where, "weight": weight * keep, "lo": weight * keep - 0.1,
                 "hi": weight * keep + 0.1, "n_prompts": 32}
            )  # fmt: skip

    for i, (layer, head) in enumerate(top[:5]):
        target = {"target_layer": layer, "target_head": head}
        edge("region → head", 2.0 - 0.3 * i, region="instruction", **target)
        edge("head → direction", 2.4 - 0.3 * i, source_layer=layer, source_head=head)
        edge("early → head", 0.4, source_layer=layer - 4, source_head=1, position=-3, **target)
        edge("mlp → head", -0.3, source_layer=layer - 2, position=-2, **target)
    edge("region → early", 0.6, region="instruction", position=-3, target_layer=top[0][0] - 4, target_head=1)
    edge("mlp → direction", 5.0, source_layer=12, position=-1)
    edge("embedding → head", 0.2, position=-1, target_layer=top[0][0], target_head=top[0][1])
    return rows
