"""Invented tables of the mechanism stage for ``fake_run``: what carries the fall, why, causal tests, sweep, circuit."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.fake_findings import HEADS, LAYERS


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
    parts = {"top heads": 0.58, "other heads": 0.17, "MLPs": 0.25, "embedding": 0.0}
    return [row for arm in ("adversarial", "random") for row in in_arm(arm, shares("term", parts, {"arm": arm}))]


def in_arm(arm: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, of a quarter of the size where the arm is a control."""
    size = 1 if arm == "adversarial" else 0.25
    return [row | {key: size * row[key] for key in ("value", "lo", "hi")} for row in rows]


def factors(top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    parts = {"query": 0.62, "dilution": 0.31, "chat keys": 0.04, "displacement": 0.03, "scale": 0.0}
    found = [
        row
        for arm in ("adversarial", "random")
        for layer, head in [*top, (-1, -1)]
        for row in in_arm(arm, shares("factor", parts, {"arm": arm, "layer": layer, "head": head}))
    ]
    return [row | {"value": -row["value"], "lo": -row["hi"], "hi": -row["lo"]} for row in found]


def mechanism_contrasts() -> list[dict[str, Any]]:
    rows = [
        ("carried", "top heads", "adversarial", "random", 12.0), ("factors", "query", "adversarial", "random", -8.0),
        ("causal projection", "projection restored", "projection restored", "random direction moved as far", 16.0),
    ]  # fmt: skip
    return [
        {"kind": kind, "measure": measure, "arm": arm, "against": against, "estimate": value, "lo": value - 1,
         "hi": value + 1, "n_prompts": 32, "n_suffixes": 1, "descriptive": True, "verdict": "descriptive",
         "equivalent": 1.6}
        for kind, measure, arm, against, value in rows
    ]  # fmt: skip


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


def lens() -> list[dict[str, Any]]:
    return [
        {"arm": arm, "layer": layer, "mean": size * layer / LAYERS - 4, "lo": size * layer / LAYERS - 5,
         "hi": size * layer / LAYERS - 3, "n_prompts": 32}
        for arm, size in (("none", 12.0), ("adversarial", 3.0))
        for layer in range(LAYERS + 1)
    ]  # fmt: skip


def terms() -> list[dict[str, Any]]:
    return [
        {"arm": arm, "layer": layer, "term": term, "mean": size * layer / LAYERS, "lo": size * layer / LAYERS - 0.2,
         "hi": size * layer / LAYERS + 0.2, "n_prompts": 32, "n_suffixes": int(arm != "none")}
        for arm, scale in (("none", 1.0), ("adversarial", 0.4))
        for term, size in (("attention", 2 * scale), ("MLP", scale))
        for layer in range(LAYERS)
    ]  # fmt: skip


def logits() -> list[dict[str, Any]]:
    return [
        {"arm": arm, "layer": layer, "term": term, "head": -1, "mean": size * layer / LAYERS,
         "lo": size * layer / LAYERS - 0.2, "hi": size * layer / LAYERS + 0.2, "n_prompts": 32}
        for arm, scale in (("none", 1.0), ("adversarial", 0.4))
        for term, size in (("attention", scale), ("MLP", 3 * scale))
        for layer in range(LAYERS)
    ]  # fmt: skip


def detectors() -> list[dict[str, Any]]:
    return [
        {"detector": name, "likelihood": name == "windowed perplexity", "against": against, "n_prompts": 32,
         "n_suffixes": 4, "n_others": 128, "auroc": value, "lo": value - 0.03, "hi": min(1.0, value + 0.03),
         "n_marks": 60, "caught_1": None if "benign" in against else value / 2, "caught_5": value / 1.5,
         "false_positives_1": None if "benign" in against else 0.01, "descriptive": True}
        for name, value in (("token count", 0.5), ("windowed perplexity", 0.97), ("harmfulness − refusal", 0.96))
        for against in ("harmless + benign text", "all of these")
    ]  # fmt: skip


def mitigations() -> list[dict[str, Any]]:
    lines = (
        ("none", False, 0.7, 0.08, 0.0, 0.0), ("edges of the top heads damped by 50%", False, 0.3, 0.1, 0.01, 0.02),
        ("edges of other heads damped by 50%", True, 0.68, 0.08, 0.0, 0.02),
        ("perplexity filter", False, 0.1, 0.08, None, 0.3),
    )  # fmt: skip
    return [
        {"defence": name, "control": control, "n_prompts": 32, "n_suffixes": 4, "success": success,
         "success_lo": success - 0.05, "success_hi": success + 0.05, "refused": 1 - success,
         "lookalike": over, "lookalike_lo": over - 0.04,
         "lookalike_hi": over + 0.04, "harmless": 0.01, "cost": cost, "slower": slower, "descriptive": True,
         "mass": 0.4 if "edges" in name else None, "taken": 0.2 if "edges" in name else None, "seconds": 0.05,
         "n_timed": 8, "wrapped": False, "fires_attacked": None, "fires_lookalike": None, "fires_harmless": None}
        for name, control, success, over, cost, slower in lines
    ]  # fmt: skip


def adaptive() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attacks of ten steps on the undefended and on the damped model, and what the defence costs them."""
    names = ("none", "edges of the top heads damped by 50%")
    rows = [
        {"defence": name, "step": step, "loss": 2.0 - step / 10 if step else None, "best_loss": 1.9 - step / 10,
         "target_loss": 1.8 - step / 10 + slow if step % 5 == 0 else None,
         "not_refused": min(1.0, 0.3 - slow + step / 15) if step % 5 == 0 else None, "n_prompts": 30, "n_train": 4,
         "seed": 0, "n_final": 32, "success": 0.7 - slow if step == 10 else None,
         "success_lo": 0.5 - slow if step == 10 else None, "success_hi": 0.85 - slow if step == 10 else None}
        for name, slow in zip(names, (0.0, 0.3), strict=True)
        for step in range(11)
    ]  # fmt: skip
    prices = [
        {"defence": name, "steps_to_half": half, "steps_to_loss": loss, "bar": 0.8, "n_steps": 10}
        for name, half, loss in zip(names, (5, 10), (10, None), strict=True)
    ]
    return rows, prices


def sweep(rng: np.random.Generator, top: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "run": run, "layer": layer, "head": head, "n_prompts": 32,
            "projection_p": None if run == "adversarial" else 0.001 if hit else 0.6,
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
        for arm, keep in (("none", 1.0), ("adversarial", 0.35), ("random", 0.9)):
            rows.append(
                {"arm": arm, "kind": kind, **blank, **where, "weight": weight * keep, "lo": weight * keep - 0.1,
                 "hi": weight * keep + 0.1, "n_prompts": 32, "n_suffixes": int(arm != "none")}
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


def direction_tables(prompts: list[dict[str, Any]], bad: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What the direction stage writes beside interventions and candidates."""
    names = ["chosen", "refusal", "harmfulness", *(f"random {i}" for i in range(1, 5))]
    effects = [(-9.1, 8.7), (-9.0, 8.5), (-2.0, 0.4), *((0.1 * i, -0.2 * i) for i in range(4))]
    return {
        "stability": [
            {"measure": "split-half cosine", "value": 0.97, "lo": 0.95, "hi": 0.98},
            {"measure": "effective rank", "value": 1.12, "lo": 1.05, "hi": 1.31},
        ],
        "separation": [
            {"layer": layer, "position": position, "auroc": 1 - 0.4 / (1 + layer + abs(position))}
            for layer in range(LAYERS)
            for position in range(-6, 0)
        ],
        "cascade": [{"rank": float(k + 1), "auroc": 1 - 0.06 * k, "lo": 0.5, "hi": 1.0} for k in range(8)],
        "two_directions": [
            {"direction": name, "control": name.startswith("random"),
             "cosine_with_refusal": 1 / (i + 1), "harmful": 5.0, "harmful_ablated": 5.0 + ablated,
             "harmless": -6.0, "harmless_added": -6.0 + added, "ablated_change": ablated, "ablated_lo": ablated - 0.5,
             "ablated_hi": ablated + 0.5, "added_change": added, "added_lo": added - 0.5, "added_hi": added + 0.5}
            for i, (name, (ablated, added)) in enumerate(zip(names, effects, strict=True))
        ],
        "cost": [{"material": "the model's own replies to harmless prompts", "n_tokens": 1500, "none": 0.4,
                  "ablated": 0.42, "change": 0.02, "lo": 0.01, "hi": 0.03, "orthogonalised_change": 0.021,
                  "orthogonalised_lo": 0.011, "orthogonalised_hi": 0.031}],
        "intervention_replies": [
            {"intervention": name, "kind": kind, "control": None, "prompt_id": p["id"], "refused": name == "none",
             "verdict": "refused" if name == "none" else "complied",
             "reply": bad[i % len(bad)] or f"Here is reply {i}."}
            for kind, name in (("harmful", "none"), ("harmful", "ablated"), ("harmless", "none"), ("harmless", "added"))
            for i, p in enumerate(p for p in prompts if p["split"] == "report" and p["kind"] == kind)
        ],
    }  # fmt: skip
