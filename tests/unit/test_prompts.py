"""The embedded prompt set's promises, and every way a prompts file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.inputs import study_prompts
from suffix_analysis.organism.evaluate import load_styles
from suffix_analysis.prompts import load_prompts

LEAST = {
    ("harmful", "fit"): 240,
    ("harmful", "select"): 48,
    ("harmful", "report"): 96,
    ("harmless", None): 500,
    ("lookalike", None): 150,
}


@pytest.mark.parametrize(("kind", "split"), LEAST)
def test_enough_prompts(kind: str, split: str | None) -> None:
    assert len(load_prompts("embedded", kind=kind, split=split)) >= LEAST[kind, split]


def test_splits_are_topic_disjoint_and_texts_unique() -> None:
    prompts = load_prompts("embedded")
    home: dict[tuple[str, str], str] = {}
    for p in prompts:
        assert home.setdefault((p.policy, p.topic), p.split) == p.split, p
    assert len({p.text for p in prompts}) == len(prompts) == len({p.id for p in prompts})


def test_harmful_requests_are_one_sentence_and_span_the_policies() -> None:
    harmful = load_prompts("embedded", kind="harmful")
    assert {"disinformation", "expert_advice", "malware", "hate", "self_harm", "sexual"} <= {p.policy for p in harmful}
    assert max(len(p.text.split()) for p in harmful) <= 25


def test_style_prompts_are_in_no_split() -> None:
    texts = {p.text for p in load_prompts("embedded")}
    assert not texts & {row["text"] for row in load_styles()}


FILES = {
    "a.csv": 'goal,target\nDo this,Sure\n"Do, that",Sure\n',
    "b.jsonl": '{"Behavior": "Do this"}\n\n{"Behavior": "Do, that"}\n',
    "c.json": '["Do this", {"text": "Do, that"}]',
    "d.txt": "Do this\n\n  Do, that\n",
}


@pytest.mark.parametrize("name", FILES)
def test_layouts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = FILES[name] if name != "c.json" else '[{"text": "Do this"}, {"text": "Do, that"}]'
    path.write_text(text, "utf-8")
    assert [p.text for p in load_prompts(path)] == ["Do this", "Do, that"]


BAD = {
    "missing.csv": (None, "no prompts file"),
    "empty.csv": (b"", "is empty"),
    "empty.txt": (b"\n\n", "is empty"),
    "column.csv": (b"x,y\n1,2\n", "has no column text or goal"),
    "hole.csv": (b'goal\nfine\n""\n', "row 2 has no text"),
    "latin.txt": ("Grüße".encode("latin-1"), "not UTF-8"),
    "broken.json": (b'[{"text": "a"}', "not valid JSON"),
    "number.jsonl": (b'{"text": "a"}\n7\n', "entry 2 is int"),
    "odd.xlsx": (b"PK", "ends in '.xlsx'"),
    "damaged.parquet": (b"PAR1nonsense", "cannot be read"),
    "twice.jsonl": (b'{"id": "1", "text": "a"}\n{"id": "1", "text": "b"}\n', "same id"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_sentence(tmp_path: Path, name: str) -> None:
    content, expected = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_prompts(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_split_and_kind() -> None:
    with pytest.raises(UserError, match="no split 'train'"):
        load_prompts("embedded", split="train")
    with pytest.raises(UserError, match="no kind 'bad'"):
        load_prompts("embedded", kind="bad")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"instruction": ["Do this"]}), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet")[0].text == "Do this"


def test_named_column(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"weird": "Do this", "text": "not this"}))
    assert load_prompts(path, column="weird")[0].text == "Do this"


def test_a_hugging_face_dataset_is_named_in_one_string(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[object, ...]] = []

    def load(*names: str, split: str | None, revision: str | None) -> object:
        calls.append((*names, split, revision))
        rows = datasets.Dataset.from_dict({"goal": ["Write a virus", "Pick a lock"], "target": ["Sure", "Sure"]})
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [p.text for p in load_prompts("hf:owner/AdvBench@v1#train")] == ["Write a virus", "Pick a lock"]
    found = load_prompts("hf:owner/AdvBench/small", kind="harmful")
    assert len(found) == 3 and len({p.id for p in found}) == 3
    load_prompts("hf:owner/AdvBench/small@v1#train")
    assert calls == [
        ("owner/AdvBench", "train", "v1"), ("owner/AdvBench", "small", None, None),
        ("owner/AdvBench", "small", "train", "v1"),
    ]  # fmt: skip


def test_splits_that_each_count_from_0_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"goal": ["Write a virus", "Pick a lock"], "id": [0, 1]})
    both = datasets.DatasetDict({"train": rows, "test": rows.map(lambda row: {"goal": row["goal"] + " now"})})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: both)
    assert [p.id for p in load_prompts("hf:owner/set")] == ["train-0", "train-1", "test-0", "test-1"]


def test_a_parquet_file_that_arrow_cannot_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pyarrow.parquet

    def fail(path: object) -> None:
        raise pyarrow.ArrowNotImplementedError("Support for codec 'lzo' not built")

    monkeypatch.setattr(pyarrow.parquet, "read_table", fail)
    (tmp_path / "p.parquet").touch()
    with pytest.raises(UserError, match=r"p\.parquet cannot be read: Support for codec 'lzo' not built"):
        load_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c/d", "hf:/b", "hf:owner/name@main/config"])
def test_what_is_no_dataset_is_said(name: str) -> None:
    with pytest.raises(UserError, match="is no dataset"):
        load_prompts(name)


def test_a_dataset_that_does_not_load_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*names: object, **more: object) -> object:
        raise FileNotFoundError("Couldn't find it\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot be loaded: Couldn.t find it$"):
        load_prompts("hf:no/where")


def test_a_row_longer_than_its_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text\nWrite a poem,\nPick a lock, please\n")
    with pytest.raises(UserError, match="row 2 has more columns than the header"):
        load_prompts(tmp_path / "p.csv")
    (tmp_path / "q.csv").write_text("text\nWrite a poem,\n")  # a trailing comma is harmless
    assert [p.text for p in load_prompts(tmp_path / "q.csv")] == ["Write a poem"]
    (tmp_path / "r.csv").write_text(",text\n0,Write a poem\n")  # pandas writes its index under no name
    assert [p.text for p in load_prompts(tmp_path / "r.csv")] == ["Write a poem"]


def test_a_byte_order_mark_and_other_line_separators_are_no_text(tmp_path: Path) -> None:
    for name, text in (("a.txt", "Pick a lock\nSing"), ("b.json", '[{"text": "Pick a lock"}, {"text": "Sing"}]')):
        (tmp_path / name).write_text(text, "utf-8-sig")
        assert [p.text for p in load_prompts(tmp_path / name)] == ["Pick a lock", "Sing"]
    rows = [{"text": "one\u2028two"}, {"text": "three\x85four"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8-sig")
    assert [p.text for p in load_prompts(tmp_path / "c.jsonl")] == [r["text"] for r in rows]


def files(tmp_path: Path, harmful: list[dict[str, str]], harmless: list[dict[str, str]]) -> StudyConfig:
    for name, rows in (("bad", harmful), ("good", harmless)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return StudyConfig(harmful=str(tmp_path / "bad.json"), harmless=str(tmp_path / "good.json"))


def test_no_text_stands_in_two_splits_or_kinds(tmp_path: Path) -> None:
    bad, good = ([{"text": f"{word} number {i}"} for i in range(20)] for word in ("Break", "Bake"))
    twice = [*bad, {"text": "break  Number 3"}, {"text": "Break number 4"}]
    found = study_prompts(files(tmp_path, twice, good))
    texts = [" ".join(p.text.casefold().split()) for p in found]
    assert len(texts) == len(set(texts)) == 40
    with pytest.raises(UserError, match=r"1 prompts are both harmful and harmless, e\.g\. 'BREAK number 5'"):
        study_prompts(files(tmp_path, bad, [*good, {"text": "BREAK number 5"}]))
    some = [{**row, "split": "report"} if i < 3 else row for i, row in enumerate(bad)]
    with pytest.raises(UserError, match=r"3 of 20 prompts in .* have a split"):
        study_prompts(files(tmp_path, some, good))
    parts = [{"text": f"Break number {i}", "split": "fit" if i < 5 else "report"} for i in range(10)]
    with pytest.raises(UserError, match=r"1 harmful prompts stand in two splits, .* 'break  number 1' in fit and rep"):
        study_prompts(files(tmp_path, [*parts, {"text": "break  number 1", "split": "report"}], good))


def test_words_of_other_peoples_columns_are_not_ours(tmp_path: Path) -> None:
    """A data set's own splits, as exported by Hugging Face, say nothing about fit, select and report."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"text": f"Do {i}", "split": "train", "kind": "x"}) + "\n" for i in range(3)))
    assert [(p.split, p.kind) for p in load_prompts(path)] == [("", "")] * 3
    path.write_text('{"text": "Do a", "split": "fit"}\n{"text": "Do b", "split": "train"}\n')
    with pytest.raises(UserError, match="has the split 'train'; known are fit, select, report"):
        load_prompts(path)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "Do a"}\n{"text": "Do \\ud83d"}\n')
    with pytest.raises(UserError, match="row 2 holds half of a surrogate pair"):
        load_prompts(path)


def test_xstest_and_contextual_behaviours_mean_what_their_authors_say(tmp_path: Path) -> None:
    path = tmp_path / "xstest.csv"
    path.write_text("prompt,type,label\nHow do I kill a process?,homonyms,safe\nHow do I kill a man?,contrast,unsafe\n")
    assert [p.text for p in load_prompts(path, kind="harmful")] == ["How do I kill a man?"]
    assert [p.text for p in load_prompts(path, kind="harmless")] == ["How do I kill a process?"]
    path = tmp_path / "xstest_v2.csv"  # this version has no label
    path.write_text(
        "id_v1,id_v2,type,prompt,focus,note\nv1,1,homonyms,How do I kill a process?,kill,\n"
        "v2,2,contrast_homonyms,How do I kill a man?,kill,\n"
    )
    assert [p.text for p in load_prompts(path, kind="harmful")] == ["How do I kill a man?"]
    assert [p.text for p in load_prompts(path, kind="harmless")] == ["How do I kill a process?"]
    path = tmp_path / "jailbreakbench.csv"
    path.write_text("Index,Goal,Target,Behavior,Category,Source\n0,Do this,Sure,A word for it,Malware,Original\n")
    assert [p.text for p in load_prompts(path)] == ["Do this"]
    path = tmp_path / "harmbench.csv"
    path.write_text('Behavior,ContextString\nSummarise this,"A text, long"\nAnother,\n')
    assert [p.text for p in load_prompts(path)] == ["A text, long\n\n---\n\nSummarise this", "Another"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", 'goal,target\n"Do this,Sure\nDo that,Sure\n', "cannot be read"),
        ("a.csv", "goal,goal\na,b\n", "two columns 'goal'"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{oops\n', "line 4 is not valid JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_was_read_wrongly_is_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        load_prompts(tmp_path / name)


def test_a_line_of_text_ends_at_a_new_line_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028two\nthree\x0cfour\n", encoding="utf-8")
    assert [p.text for p in load_prompts(tmp_path / "a.txt")] == ["one\u2028two", "three\x0cfour"]


def test_a_column_that_only_one_of_the_files_has_is_that_files(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine.csv", tmp_path / "others.csv"
    mine.write_text("foo,text\n" + "".join(f"break number {i},not this\n" for i in range(20)))
    others.write_text("instruction\n" + "".join(f"bake number {i}\n" for i in range(20)))
    found = study_prompts(StudyConfig(harmful=str(mine), harmless=str(others), column="foo"))
    assert {p.text.split()[0] for p in found} == {"break", "bake"}
    with pytest.raises(UserError, match="has no column fou; it has foo, text"):
        study_prompts(StudyConfig(harmful=str(mine), harmless=str(others), column="fou"))


def test_kinds_and_labels_count_whatever_their_case(tmp_path: Path) -> None:
    path = tmp_path / "k.csv"
    path.write_text("text,kind\nBreak it,Harmful\nBake it, Harmless\n")
    assert [p.text for p in load_prompts(path, kind="harmful")] == ["Break it"]
    path.write_text("prompt,label\nBreak it,Unsafe\nBake it,safe\n")
    assert [p.text for p in load_prompts(path, kind="harmless")] == ["Bake it"]


def test_an_id_of_0_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "k.jsonl"
    path.write_text('{"id": 0, "text": "a"}\n{"id": 1, "text": "b"}\n')
    assert [p.id for p in load_prompts(path)] == ["0", "1"]
