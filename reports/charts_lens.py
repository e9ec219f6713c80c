"""The figure of the logit lens and of direct logit attribution: where along the depth refusal is written."""

from __future__ import annotations

from reports.charts import Figure, View, finish, layer_lines
from reports.data import Row, RunData
from reports.evidence import first_of
from reports.numbers import count


def logit_lens(data: RunData) -> Figure | None:
    """Return the refusal score that the unembedding reads at every layer, and what each layer writes to it."""
    read = data.table("lens")
    written = [row for row in data.table("logits") if row["term"] in ("attention", "MLP")]
    shown = {row["arm"] for row in read} or {"none", "adversarial"}
    along = [row for row in data.table("terms") if row["arm"] in shown]
    say = "Refusal read at chat[-1] by layer, without and with the suffix, with 95 % bands."
    titles: list[tuple[str, list[Row], str]] = [("logit lens", read, "refusal score that would be read here")]
    titles += [
        (f"{term} writes", [row for row in written if row["term"] == term], f"logits of refusal that {term} adds")
        for term in ("attention", "MLP")
    ]
    titles += [
        (f"{term} along r̂", [row for row in along if row["term"] == term], f"what {term} writes along r̂")
        for term in ("attention", "MLP")
    ]
    views = [View(label, finish(layer_lines(rows, title), rows, 250, say)) for label, rows, title in titles if rows]
    if not views:
        return None
    caption = "At chat[-1]; bands: 95 % CI."
    if read or written:
        caption += (
            f" Of {count((read or written)[0]['n_prompts'], 'report prompt')}: the logit lens, what final norm and "
            "unembedding read from each layer's input (far from the last layer it need not mean what it means there), "
            "and direct logit attribution, what is written to the refusal tokens' mean logit over the vocabulary's "
            f"with the final norm's scale frozen; all terms add up to it.{first_of(data)}"
        )
    if along:
        caption += (
            " Along r̂: of all traced prompts and suffixes; with the embedding they add up to the projection after the "
            "last block."
        )
    columns = (
        ("arm", "arm"), ("layer", "layer"), ("term", "written by"), ("mean", "mean"), ("lo", "CI from"),
        ("hi", "CI to"), ("n_prompts", "prompts"),
    )  # fmt: skip
    return Figure("lens", "Refusal read along the depth", caption, say, columns, tuple(views))
