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
