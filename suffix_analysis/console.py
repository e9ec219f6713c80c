"""Progress and complaints on stderr."""

from __future__ import annotations

import io
import sys
import time
from typing import Any, Protocol, runtime_checkable


def shown(text: str) -> str:
    """The text as a terminal may have it: what shows nothing or reorders is spelled out (see ``reports.escape``)."""
    from reports.escape import visible

    return "\n".join(visible(line) for line in text.split("\n"))


def tell(text: str) -> None:
    """A line on stderr; see `shown`."""
    print(shown(text), file=sys.stderr, flush=True)


@runtime_checkable
class Narrator(Protocol):
    """Where progress goes; the command line shows it, tests collect it."""

    def stage(self, name: str, skipped: bool) -> None:
        """A stage begins, or is skipped because it is done."""

    def say(self, text: str) -> None:
        """A line worth keeping."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` parts of the present stage."""


class Console:
    """Progress on stderr: one live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Terminal(stderr=True)
        self.live = self.console.is_terminal
        columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}")
        self.bar = Progress(
            TextColumn(columns[0]), BarColumn(), TextColumn(columns[2]), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False), console=self.console, transient=True,
        )  # fmt: skip
        self.task: Any = None
        self._reset()

    def _reset(self) -> None:
        self.started = self.last_call = time.monotonic()
        self.last, self.total, self.before = 0.0, 0, 0

    def stage(self, name: str, skipped: bool) -> None:
        self._close()
        self._reset()
        if skipped:
            tell(f"{name}: done before")
            return
        tell(f"{name} …")
        if self.live:
            self.task = self.bar.add_task(name, total=None, text="")
            self.bar.start()

    def say(self, text: str) -> None:
        tell(text)

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self.live and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if total != self.total:  # another part of the same stage begins
            self.total, self.started, self.before = total, self.last_call, done - 1
        self.last_call = now
        if done == total or now - self.last >= 10:
            self.last = now
            left = (now - self.started) / max(1, done - self.before) * (total - done)
            tell(f"  {done}/{total} {text} (about {left:.0f} s left)")

    def _close(self) -> None:
        if self.task is not None:
            self.bar.stop()
            self.bar.remove_task(self.task)
            self.task = None

    def __del__(self) -> None:
        self._close()


def any_character() -> None:
    """From now on a terminal that cannot show a character shows its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def intervention_line(row: dict[str, Any]) -> str:
    number = "" if row.get("control") in (None, 1) else f" ({row['control']})"
    name = f"{row['kind']:9} {row['intervention'] + number:24}"
    if row["refusal_rate"] is None:
        return f"{name} {row['note']}"
    return (
        f"{name} refused {row['refusal_rate']:6.1%} [{row['refusal_lo']:.1%}, {row['refusal_hi']:.1%}], complied "
        f"{row['complied_rate']:6.1%} [{row['complied_lo']:.1%}, {row['complied_hi']:.1%}], n = {row['n_prompts']}"
    )


def ability_line(row: dict[str, Any]) -> str:
    name = f"{row['task']} {row['metric']:12} {row['intervention']:15}"
    if row["value"] is None:
        return f"{name} {row['note']}"
    change = "" if row["change"] is None else f", {row['change']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
    return f"{name} {row['value']:.3f}{change}, n = {row['n']}"


def detector_line(row: dict[str, Any]) -> str:
    caught = "; ".join(
        f"{row[f'caught_{rate}']:.0%} [{row[f'caught_{rate}_lo']:.0%}, {row[f'caught_{rate}_hi']:.0%}] caught at "
        f"{rate} % false positives (came to {row[f'false_positives_{rate}']:.1%})"
        if row[f"caught_{rate}"] is not None
        else f"{row['n_marks']} conversations set no threshold for {rate} %"
        for rate in (1, 5)
    )
    return (
        f"{row['detector']:40} against {row['against']:24} AUROC {row['auroc']:.3f} "
        f"[{row['lo']:.3f}, {row['hi']:.3f}], {caught}" + (", descriptive" if row["descriptive"] else "")
    )


def mitigation_line(row: dict[str, Any]) -> str:
    cost = "–" if row["cost"] is None else f"{row['cost']:+.3f}"
    over = "–" if row["lookalike"] is None else f"{row['lookalike']:.1%} ({row['lookalike_change']:+.1%})"
    slower = f"{1000 * row['seconds']:.1f} ms a token ({row['slower']:+.0%})"
    fires = "" if row["fires_attacked"] is None else f", fires in {row['fires_attacked']:.0%} of attacked prompts"
    return (
        f"{row['defence']:56} attack success {row['success']:6.1%} [{row['success_lo']:.1%}, {row['success_hi']:.1%}], "
        f"refused {row['refused']:6.1%}, look-alikes refused {over}, harmless replies {cost} nats, {slower}{fires}"
        + (", descriptive" if row["descriptive"] else "")
    )


def adaptive_line(row: dict[str, Any]) -> str:
    fires = "" if row.get("fires") is None else f" (the detector fires in {row['fires']:.0%})"
    return (
        f"{row['defence']:56} attacked for {row['step']} steps: target loss {row['target_loss']:.3f}, "
        f"{row['not_refused']:.0%} of {row['n_prompts']} other select prompts not refused{fires}, success on "
        f"{row['n_final']} report prompts {row['success']:.0%} [{row['success_lo']:.0%}, {row['success_hi']:.0%}]"
    )


def budget_line(row: dict[str, Any]) -> str:
    def steps(name: str) -> str:
        return f"not in {row['n_steps']} steps" if row[name] is None else f"after {row[name]} steps"

    loss = "" if row["bar"] is None else f"; target loss {row['bar']:.3f}: {steps('steps_to_loss')}"
    return f"{row['defence']:56} half of the other select prompts not refused: {steps('steps_to_half')}{loss}"


def defence_lines(
    detectors: list[dict[str, Any]],
    mitigations: list[dict[str, Any]],
    adaptive: list[dict[str, Any]],
    adaptive_budget: list[dict[str, Any]],
) -> list[str]:
    """What `suffix-analysis defend` found, from its tables; which defences no adaptive attack has met is said."""
    tested = {row["defence"] for row in adaptive}
    return [
        *map(detector_line, detectors),
        *map(mitigation_line, mitigations),
        *(adaptive_line(row) for row in adaptive if row["step"] and row.get("success") is not None),
        *map(budget_line, adaptive_budget),
        "detectors alone: adaptive attack: not tested",
        *(f"{row['defence']:56} adaptive attack: not tested" for row in mitigations if row["defence"] not in tested),
    ]


def campaign_lines(result: dict[str, Any]) -> list[str]:
    """What `suffix-analysis campaign` reached: a line for every attack, then one for each combination of settings."""
    outcomes = {"suffix_id", "arm", "text", "loss", "flipped", "select_refusal", "step", "seconds", "tflop", "attack"}
    lines = []
    for row in result["attacks"]:
        own = ", ".join(f"{name} {value}" for name, value in row.items() if name not in outcomes)
        lines.append(
            f"{row['suffix_id']:15} loss {row['loss']:.3f}, {row['flipped']:.0%} of its instructions answered, "
            f"{row['select_refusal']:.0%} of the others refused (step {row['step']}, {row['seconds']:.0f} s); {own}"
        )
    measures = {"loss": ".3f", "flipped": ".0%", "select_refusal": ".0%"}
    for row in result["settings"]:
        known = {"n_attacks", *(f"{name}{end}" for name in measures for end in ("", "_lo", "_hi"))}
        own = ", ".join(f"{name} {value}" for name, value in row.items() if name not in known)
        loss, flipped, refused = (_bounded(row, name, kind) for name, kind in measures.items())
        lines.append(
            f"{own or 'all'}, {row['n_attacks']} attacks: loss {loss}, {flipped} of their instructions answered, "
            f"{refused} of the others refused (descriptive)"
        )
    lines.append(
        "Steps were chosen by what they leave refused of these same prompts: more steps have more to choose from."
    )
    return [*lines, f"suffixes: {result['suffixes']}"]


def _bounded(row: dict[str, Any], name: str, kind: str) -> str:
    lo, hi = row[f"{name}_lo"], row[f"{name}_hi"]
    return f"{row[name]:{kind}}" + ("" if lo is None else f" [{lo:{kind}}, {hi:{kind}}]")


def _candidate(row: dict[str, Any]) -> str:
    return (
        f"position {row['position']}, layer {row['layer']} (bypass {row['refusal_score']:.2f}, induce "
        f"{row['steering_score']:.2f}, KL {row['kl_div_score']:.3f})"
    )


def direction_lines(result: dict[str, Any]) -> list[str]:
    """What `suffix-analysis direction` found, from its tables."""
    counts = result["n"]
    lines = [
        f"position {result['position']}, layer {result['layer']}, norm {result['norm']:.3f}; prompts used: "
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()),
        "refusals open with " + ", ".join(f"{token['text']!r} ({token['id']})" for token in result["refusal_tokens"]),
    ]
    others = sorted(
        (row for row in result["candidates"] if row["status"] == "kept"), key=lambda row: row["refusal_score"]
    )
    lines += [f"chosen: {_candidate(row)}" for row in result["candidates"] if row["status"] == "chosen"]
    if others:
        lines.append("next best: " + "; ".join(map(_candidate, others[:3])))
    lines += [intervention_line(row) for row in result["interventions"]]
    lines.append(f"replies: {result['replies']}")
    lines += [
        f"cross-entropy on {row['material']} ({row['n_tokens']} tokens): {row['none']:.3f} nats, with the direction "
        f"ablated {row['change']:+.3f}"
        + ("" if row["lo"] is None else f" [{row['lo']:+.3f}, {row['hi']:+.3f}]")
        + (
            ""
            if row.get("orthogonalised_change") is None
            else f", taken out of the weights {row['orthogonalised_change']:+.3f}"
            + (
                ""
                if row["orthogonalised_lo"] is None
                else f" [{row['orthogonalised_lo']:+.3f}, {row['orthogonalised_hi']:+.3f}]"
            )
        )
        for row in result["cost"]
    ]
    cosine, rank = result["stability"]
    lines += [
        f"split-half cosine {cosine['value']:.3f} [{cosine['lo']:.3f}, {cosine['hi']:.3f}]",
        f"effective rank of what separates harmful from harmless {rank['value']:.2f} [{rank['lo']:.2f}, "
        f"{rank['hi']:.2f}]",
        "held-out AUROC of directions taken out one after the other: "
        + ", ".join(format(row["auroc"], ".2f") for row in result["cascade"]),
    ]
    places = {(row["position"], row["layer"]): row["auroc"] for row in result["separation"] if row["auroc"] is not None}
    if places:
        best = max(places, key=lambda place: places[place])
        chosen = places.get((result["position"], result["layer"]))
        lines.append(
            f"held-out AUROC of differences of means: {places[best]:.3f} at position {best[0]}, layer {best[1]}"
            + ("" if chosen is None else f"; {chosen:.3f} where the direction was taken")
        )
    controls = [row for row in result["two_directions"] if row["control"]]
    lines += [
        f"{row['direction']:11} cosine with the chosen {row['cosine_with_refusal']:+.2f}, with that at chat[-1] "
        f"{row.get('cosine_with_chat_end', float('nan')):+.2f}; refusal score of harmful prompts when "
        f"ablated {row['ablated_change']:+.1f} [{row['ablated_lo']:+.1f}, {row['ablated_hi']:+.1f}], of harmless ones "
        f"when added {row['added_change']:+.1f} [{row['added_lo']:+.1f}, {row['added_hi']:+.1f}]"
        for row in result["two_directions"]
        if not row["control"]
    ]
    if controls:
        most = {what: max(abs(row[f"{what}_change"]) for row in controls) for what in ("ablated", "added")}
        lines.append(
            f"{len(controls)} random and orthogonal directions of the same length change it by at most "
            f"{most['ablated']:.1f} and {most['added']:.1f}"
        )
    return lines
