"""The story in sentences. A clause stands only where its data are there and the interval supports it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reports import mechanism
from reports.data import Row, RunData
from reports.escape import visible
from reports.evidence import (
    CONTROL_WORDS,
    adversarial_count,
    clearly,
    find,
    nearest,
    over,
    over_prompts,
    projection_change,
    refusal_change,
    the_suffixes,
)
from reports.numbers import NBSP, count, percent_ci, plain_ci

FEW_SUFFIXES = 8
"""Below this many suffixes in an arm its numbers are descriptive about suffixes (METHODS §5)."""


@dataclass(frozen=True)
class CheckLine:
    """One line of the Checked list; ``passed`` None means: no verdict stored."""

    passed: bool | None
    name: str
    sentence: str
    detail: str


def headline(data: RunData) -> list[str]:
    """Return the opening sentences, most important first; none where refusal rates and profile are missing."""
    parts = (
        _refusals(data), _projection(data), _attention(data), mechanism.sentences(data), _interventions(data),
        _suffix_note(data),
    )  # fmt: skip
    return [sentence for part in parts for sentence in part]


def _refusals(data: RunData) -> Iterator[str]:
    rows = [row for row in data.table("refusal") if row["split"] == "report" and row["refusal_rate"] is not None]
    none, ours = (find(rows, arm=arm) for arm in ("none", "adversarial"))
    if not none or not ours:
        return
    number, control = adversarial_count(data), nearest(rows, "refusal_rate", ours)
    before, after = (percent_ci(row["refusal_rate"], row["refusal_lo"], row["refusal_hi"]) for row in (none, ours))
    prompts = count(int(ours["n_prompts"]), f"{_seen(data)}instruction")
    sign = refusal_change(data, "none")
    if sign:
        text = f"The refusal phrase rate {'fell' if sign < 0 else 'rose'} from {before} to {after} on {prompts}"
        text += over(number)
    else:
        text = (
            f"The refusal phrase rate is {before} without and {after} with {the_suffixes(number)} on {prompts}: "
            "the interval does not tell a change"
        )
    if control:
        apart = refusal_change(data, control["arm"])
        text += f"; {CONTROL_WORDS[control['arm']]}, of the controls of the same length the nearest, "
        text += percent_ci(control["refusal_rate"], control["refusal_lo"], control["refusal_hi"])
        text += "" if apart or not sign else f" (not clearly different from {the_suffixes(number)})"
    yield text + "."


def _seen(data: RunData) -> str:
    """Return "unseen " where the stored training ids prove it, else nothing."""
    ours = [suffix for suffix in data.suffixes if suffix.arm == "adversarial"]
    if not ours or any(suffix.trained_on is None for suffix in ours):
        return ""
    report = {prompt.id for prompt in data.prompts if prompt.split == "report"}
    return "" if any(report.intersection(suffix.trained_on or ()) for suffix in ours) else f"unseen{NBSP}"


def _projection(data: RunData) -> Iterator[str]:
    direction = data.summary.direction
    if direction is None:
        return
    rows = data.table("profile")
    at = {"measure": "normalised", "layer": direction.layer}
    none, ours = (find(rows, arm=arm, **at) for arm in ("none", "adversarial"))
    if not none or not ours or none["mean"] is None or ours["mean"] is None:
        return
    sign = projection_change(data, "none")
    before, after = (plain_ci(row["mean"], row["lo"], row["hi"]) for row in (none, ours))
    where = f"At layer{NBSP}{direction.layer}, where the refusal direction is read,"
    scale = "0 = harmless mean, 1 = harmful mean"
    if sign:
        text = f"{where} the normalised projection {'fell' if sign < 0 else 'rose'} from {before} to {after} ({scale})"
        text += over(adversarial_count(data))
    else:
        text = (
            f"{where} the interval does not tell a change of the normalised projection: {before} and {after} ({scale})"
        )
    here = [row for row in rows if row["measure"] == "normalised" and row["layer"] == direction.layer]
    if control := nearest(here, "mean", ours):
        text += f"; {CONTROL_WORDS[control['arm']]}: {plain_ci(control['mean'], control['lo'], control['hi'])}"
    yield text + "."


def sum_rows(data: RunData) -> dict[tuple[str, str], Row]:
    """Return (arm, region) → the row over all top heads, its attention as a share of what one head has to give.

    The file may hold the sum over n heads or their mean; shares are scaled so that the regions of an arm add up to 1.
    """
    rows = [row for row in data.table("shift") if row["layer"] == -1 and row["attention"] is not None]
    heads = max(1, len({(r["layer"], r["head"]) for r in data.table("shift")} - {(-1, -1)}))
    scaled: dict[tuple[str, str], Row] = {}
    for arm in sorted({row["arm"] for row in rows}):
        mine = [row for row in rows if row["arm"] == arm]
        factor = 1.0 if sum(row["attention"] for row in mine) <= 1.05 else 1.0 / heads
        for row in mine:
            new = dict(row)
            for key in ("attention", "attention_lo", "attention_hi"):
                new[key] = None if row.get(key) is None else row[key] * factor
            scaled[(arm, row["region"])] = new
    return scaled


def _attention(data: RunData) -> Iterator[str]:
    rows = sum_rows(data)
    none, ours = rows.get(("none", "instruction")), rows.get(("adversarial", "instruction"))
    suffix = rows.get(("adversarial", "suffix"))
    if not none or not ours:
        return
    keys = ("attention_lo", "attention_hi")
    sign = clearly(ours, none, keys)
    if not sign:
        return
    heads = len({(r["layer"], r["head"]) for r in data.table("shift")} - {(-1, -1)})
    before, after = (percent_ci(row["attention"], row[keys[0]], row[keys[1]]) for row in (none, ours))
    text = (
        f"The {count(heads, 'head')} that write most along the direction (chosen on the select split, shown on "
        f"{over_prompts(data.table('shift'))}) gave the instruction {before} of their attention "
        f"without a suffix and {after} with {the_suffixes(adversarial_count(data))}{_beside(rows, ours)}"
    )
    if suffix:
        text += f"; the suffix tokens took {percent_ci(suffix['attention'], suffix[keys[0]], suffix[keys[1]])}"
        text += _beside(rows, suffix)
    yield text + "."


def _beside(rows: dict[tuple[str, str], Row], ours: Row) -> str:
    """Return, in brackets, the control arm whose attention to the same region comes nearest."""
    control = nearest([row for (_, region), row in rows.items() if region == ours["region"]], "attention", ours)
    if control is None:
        return ""
    taken = percent_ci(control["attention"], control["attention_lo"], control["attention_hi"])
    return f" ({CONTROL_WORDS[control['arm']]}: {taken})"


def _interventions(data: RunData) -> Iterator[str]:
    rows = [row for row in data.table("interventions") if row["refusal_rate"] is not None and row["split"] == "report"]
    clauses = []
    for name, kind, sign, words in (
        ("ablated", "harmful", -1, "ablating the direction takes refusals of harmful instructions"),
        ("added", "harmless", 1, "adding it takes refusals of harmless ones"),
    ):
        base, done = find(rows, intervention="none", kind=kind), find(rows, intervention=name, kind=kind)
        if base and done and clearly(done, base, ("refusal_lo", "refusal_hi")) == sign:
            before, after = (
                percent_ci(row["refusal_rate"], row["refusal_lo"], row["refusal_hi"]) for row in (base, done)
            )
            clauses.append(f"{words} from {before} to {after}")
    if clauses:
        yield "Without any suffix, " + "; ".join(clauses) + "."
    edited = find(rows, intervention="orthogonalised", kind="harmful") or {}
    attacked = find(data.table("refusal"), arm="adversarial", split="report") or {}
    if edited.get("complied_rate") is not None and attacked.get("complied_rate") is not None:
        yield (
            "By the verdict, weights without the direction comply with "
            f"{percent_ci(edited['complied_rate'], edited.get('complied_lo'), edited.get('complied_hi'))} of the same "
            f"instructions, {the_suffixes(adversarial_count(data))} "
            f"{'makes' if adversarial_count(data) < 2 else 'make'} the model comply with "
            f"{percent_ci(attacked['complied_rate'], attacked.get('complied_lo'), attacked.get('complied_hi'))}."
        )


def _suffix_note(data: RunData) -> Iterator[str]:
    number = adversarial_count(data)
    if number == 1:
        yield "One suffix: intervals cover prompts only, descriptive about suffixes."
    elif 1 < number < FEW_SUFFIXES:
        yield f"{count(number, 'suffix', 'suffixes')}: too few for claims about suffixes in general, descriptive."


def checked(data: RunData) -> list[CheckLine]:
    """Return the stored identities and controls, failed ones first."""
    lines = [
        CheckLine(check.passed, visible(check.name), visible(check.sentence), _detail(check.value, check.bound))
        for check in data.checks
    ]
    return sorted(lines, key=lambda line: (line.passed is True, line.passed is None))


def _detail(value: object, bound: object) -> str:
    def shown(item: object) -> str:
        return f"{item:.3g}" if isinstance(item, float) else visible(str(item))

    if value is None:
        return ""
    return f"measured {shown(value)}" + ("" if bound is None else f", bound {shown(bound)}")


def not_checked(data: RunData) -> list[str]:
    """Return what this run does not show, in sentences."""
    lines = []
    if not data.table("causal"):
        lines.append("Causal tests of heads and attention edges: what a head writes is a share, not an effect.")
    # what was evaluated; a suffix that only stands in the file shows nothing
    arms = {row["arm"] for row in data.table("refusal") or data.table("profile")}
    number = adversarial_count(data)
    if number < FEW_SUFFIXES:
        lines.append("Several independent attacks: other suffixes may work by other means.")
    if "failed" not in arms:
        lines.append("Suffixes of the same optimiser that failed: what optimisation alone does is not separated.")
    if "random" not in arms:
        lines.append("Random text of the same length: what length alone does is not separated.")
    weak = sum(row.get("verdict") == "not powered" for row in data.table("contrasts"))
    if weak:
        lines.append(f"{count(weak, 'difference')} between arms: too few prompts or suffixes to tell it from none.")
    if not data.table("adaptive"):
        lines.append("Adaptive attacks: not tested.")
    else:
        lines.append(
            "Adaptive attacks on a detector alone and on the other defences; those that were made are one each."
        )
    if data.checks == ():
        lines.append("The identities behind these numbers: no checks are stored with this run.")
    lost = data.summary.retokenised
    if lost:
        lines.append(
            f"{count(lost, 'prompt')} do not survive decoding and tokenising again; they are kept as token ids."
        )
    lines.append("Other models and other prompts: everything here is of one model, on these.")
    return lines + [visible(sentence) for sentence in data.summary.skipped]
