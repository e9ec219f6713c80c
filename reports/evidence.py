"""What the stored intervals allow to say: a fall, a rise, or neither; over how many suffixes."""

from __future__ import annotations

from reports.data import Row, RunData
from reports.numbers import count

_REFUSAL_MEASURES = {"refusal", "refused", "refusal_rate", "refusal phrase rate"}
_NORMALISED_MEASURES = {"normalised", "normalised_projection", "projection_normalised", "normalised projection"}


def find(rows: list[Row], **wanted: object) -> Row | None:
    """Return the first row whose columns equal the wanted values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


CONTROL_WORDS = {
    "random": "random text",
    "shuffled": "its tokens shuffled",
    "failed": "suffixes of attacks that failed",
    "benign": "benign text",
}


def nearest(rows: list[Row], measure: str, ours: Row) -> Row | None:
    """Return the control arm's row that comes nearest to the adversarial one: it makes the effect look smallest."""
    known = [row for row in rows if row["arm"] in CONTROL_WORDS and row[measure] is not None]
    return min(known, key=lambda row: abs(row[measure] - ours[measure]), default=None)


def adversarial_count(data: RunData) -> int:
    """Return the number of adversarial suffixes the rates rest on; 0 where unknown."""
    row = find(data.table("refusal"), arm="adversarial", split="report")
    if row and row["n_suffixes"] is not None:
        return int(row["n_suffixes"])
    return sum(suffix.arm == "adversarial" for suffix in data.suffixes)


def the_suffixes(number: int) -> str:
    """Return ``the suffix``, or ``the 8 suffixes`` of a pool."""
    return "the suffix" if number < 2 else f"the {count(number, 'suffix', 'suffixes')}"


def over(number: int) -> str:
    """Return ``, over 8 suffixes`` for the end of a clause; nothing where there is one."""
    return "" if number < 2 else f", over {count(number, 'suffix', 'suffixes')}"


def first_of(data: RunData) -> str:
    """Return a caption's sentence for what is measured with a pool's first suffix only; nothing where it is alone."""
    number = adversarial_count(data)
    return "" if number < 2 else f" With the first of {count(number, 'suffix', 'suffixes')}."


def clearly(ours: Row, theirs: Row, keys: tuple[str, ...]) -> int:
    """Return −1 or 1 where the intervals (columns ``keys`` = lo, hi) lie apart, 0 where they overlap or lack bounds."""
    lo, hi = keys
    values = [value for row in (ours, theirs) for key in (lo, hi) if (value := row.get(key)) is not None]
    if len(values) < 4:
        return 0
    return -1 if values[1] < values[2] else 1 if values[0] > values[3] else 0


def refusal_change(data: RunData, against: str) -> int:
    """Return −1 where the adversarial arm's refusal phrase rate lies clearly below another arm's, 1 above, else 0."""
    rows = [find(data.table("refusal"), arm=arm, split="report") for arm in ("adversarial", against)]
    return _change(data, _REFUSAL_MEASURES, against, rows, ("refusal_lo", "refusal_hi"))


def projection_change(data: RunData, against: str) -> int:
    """Return the same of the normalised projection at the direction's layer."""
    layer = None if data.summary.direction is None else data.summary.direction.layer
    rows = [find(data.table("profile"), arm=arm, measure="normalised", layer=layer) for arm in ("adversarial", against)]
    return _change(data, _NORMALISED_MEASURES, against, rows, ("lo", "hi"))


def _change(data: RunData, measures: set[str], against: str, rows: list[Row | None], keys: tuple[str, ...]) -> int:
    """A stored paired contrast decides; without one, the two arms' own intervals must not overlap."""
    for row in data.table("contrasts"):
        if row["measure"] in measures and row["arm"] == "adversarial" and row["against"] == against:
            if row.get("split", "report") != "report" or row["lo"] is None or row["hi"] is None:
                continue
            return -1 if row["hi"] < 0 else 1 if row["lo"] > 0 else 0
    ours, theirs = rows
    return clearly(ours, theirs, keys) if ours and theirs else 0


def over_prompts(rows: list[Row]) -> str:
    """Return ``48 report prompts``, those that a table's rows are means over; ``the report split`` where unknown."""
    known = max((row.get("n_prompts") or 0 for row in rows if row.get("split", "report") == "report"), default=0)
    return count(known, "report prompt") if known else "the report split"
