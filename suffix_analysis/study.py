"""The stages in order. Each is a pure function elsewhere; here it reads and writes the run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt

from suffix_analysis import files, pool, provenance, replies, runs
from suffix_analysis.analysis import analyze, as_long, n_forwards
from suffix_analysis.causal_tests import shortfalls
from suffix_analysis.chat import Chat
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Narrator
from suffix_analysis.direction_file import load_direction, summary_of
from suffix_analysis.direction_stage import check_counts, direction_tables
from suffix_analysis.directions import Direction, NoDirection
from suffix_analysis.environment import environment
from suffix_analysis.errors import PartlyDone, UserError
from suffix_analysis.inputs import fast_dtype, study_model, study_prompts, study_text
from suffix_analysis.judges import Judge, judge_named
from suffix_analysis.mechanism import measure_mechanism
from suffix_analysis.models import Model
from suffix_analysis.paper_table import text_pairs
from suffix_analysis.prompts import Prompt, count_prompts, prompts_of, to_jsonl
from suffix_analysis.records import Suffix, of_each_text
from suffix_analysis.refusal import discover_refusal_tokens, known_tokens, require_refusals
from suffix_analysis.traces import Job, Traces, trace
from suffix_analysis.traces_file import traces_of

# replies come before the direction, whose interventions wrap the fast model and slow it down
STAGES = ("prompts", "attack", "replies", "direction", "analysis", "mechanism")


@dataclass
class Study:
    """One run: its folder, settings and narrator, and the model once it is needed."""

    folder: Path
    config: StudyConfig
    narrator: Narrator
    _model: Model | None = None

    @property
    def model(self) -> Model:
        """The model, loaded on first use together with its fast twin (which must exist before the bridge)."""
        if self._model is None:
            self._model = study_model(self._begun())
            if (self.folder / "config.toml").exists():
                provenance.require_same_model(self.folder, self._model, runs.has_begun(self.folder))
                runs.keep_model(self.folder, asdict(self.config))
            name = str(fast_dtype(self._begun(), self._model)).removeprefix("torch.")
            if name != "float16" and self.folder.is_dir():  # a float16 model is never cast
                files.write_json(self.folder / "fast_dtype.json", name)
        return self._model

    def _begun(self) -> StudyConfig:
        """The settings with the precision of searches and replies that the run began with, once that is known.

        What "auto" measures may come out differently when a run goes on, perhaps on another machine.
        """
        path = self.folder / "fast_dtype.json"
        if not path.exists():
            return self.config
        return replace(self.config, score_dtype=files.read_as(path, Literal["float32", "bfloat16"]))

    @property
    def precise(self) -> StudyConfig:
        """The settings with the precision of searches and replies measured."""
        assert self.model is not None  # which measures it
        return self._begun()

    @property
    def fast_dtype(self) -> torch.dtype:
        """Precision of searches and replies."""
        return fast_dtype(self.precise, self.model)

    @property
    def fast(self) -> Model:
        """The model in the fast precision."""
        return self.model.twin(self.fast_dtype)

    def run(self, stages: Sequence[str] = STAGES) -> None:
        """Run the stages that are not done yet.

        Raises:
            UserError: any user's mistake, in one sentence; what was finished stays.
        """
        steps: dict[str, Callable[[], None]] = {
            "prompts": self._prompts,
            "attack": self._attack,
            "campaign": self._campaign,
            "direction": self._direction,
            "replies": self._replies,
            "analysis": self._analysis,
            "mechanism": self._mechanism,
        }
        with runs.open_run(self.folder, asdict(self.config)):
            runs.set_state(self.folder, "running")
            try:
                for name in stages:
                    with self._stage(name) as needed:
                        if needed:
                            steps[name]()
            except BaseException:
                runs.set_state(self.folder, "partly done")
                raise
            runs.set_state(self.folder, "done")

    @contextmanager
    def _stage(self, name: str) -> Iterator[bool]:
        done = runs.is_done(self.folder, name)
        self.narrator.stage(name, done)
        if not done:
            runs.begin(self.folder, name)
        started, before = time.perf_counter(), runs.findings_now(self.folder)
        try:
            yield not done
        except BaseException:
            with suppress(UserError):  # a full disk, perhaps, which has been said
                runs.add_seconds(self.folder, name, time.perf_counter() - started, findings=self._written(before))
            raise
        if not done:
            runs.add_seconds(self.folder, name, time.perf_counter() - started, "done", self._written(before))

    def _written(self, before: dict[str, tuple[int, int]]) -> list[str]:
        """The findings that are others than before, but for those that several stages write."""
        now = runs.findings_now(self.folder)
        return sorted(f for f in now if now[f] != before.get(f) and f"findings/{f}" not in runs.SHARED)

    # --- stages ---------------------------------------------------------------------------------------------------

    def _prompts(self) -> None:
        prompts = study_prompts(self.config)
        # say now, and not after the attack, what cannot be read
        text = study_text(self.config)
        if text is not None:
            text_pairs(self.model, text)
        judge_named(self.config.judge)
        short = check_counts(prompts, self.config)
        for prompt in prompts:
            self.model.chat(prompt.text)  # or that a prompt is too long
        files.write_atomic(self.folder / "prompts.jsonl", to_jsonl(prompts))
        files.write_json(self.folder / "env.json", environment())
        provenance.remember(self.folder, provenance.input_digests(asdict(self.config)))
        for sentence in short:
            self.skip(sentence)

    def prompts(self) -> list[Prompt]:
        """The run's prompts."""
        return files.read_records(self.folder / "prompts.jsonl", Prompt)

    def _attack(self) -> None:
        runs.write_suffixes(self.folder / "suffixes.jsonl", pool.study_suffixes(self))

    def _campaign(self) -> None:
        from suffix_analysis.campaign import campaign

        suffixes, rows, failed = campaign(self)
        if rows:
            runs.write_suffixes(self.folder / "suffixes.jsonl", suffixes)
            files.write_table(self.folder / "findings" / "campaign.parquet", rows)
        if failed:
            raise PartlyDone(
                f"{len(failed)} of {len(failed) + len(rows)} attacks failed, the others are in {self.folder}: "
                + " ".join(failed)
            )

    def refusal_tokens(self) -> list[int]:
        """The tokens that open refusals; discovered once on the select split and kept for every later stage.

        Raises:
            UserError: they are none, or not tokens of the model, or hardly a reply to harmful prompts opens with them.
        """
        path = self.folder / "refusal_tokens.json"
        if path.exists():
            return known_tokens(self.model, files.read_as(path, list[NonNegativeInt]), str(path))
        if self.config.refusal_tokens is not None:
            tokens = known_tokens(self.model, self.config.refusal_tokens)
            if self.config.keep_by_score:  # else no prompt has to be refused
                require_refusals(self.fast, self._chats("harmful"), tokens)
        else:
            tokens = discover_refusal_tokens(self.fast, self._chats("harmful"), self._chats("harmless"))
        files.write_json(path, tokens)
        return tokens

    def _chats(self, kind: str) -> list[Chat]:
        """The select split's prompts of a kind as conversations."""
        return [self.model.chat(p.text) for p in self.prompts() if (p.kind, p.split) == (kind, "select")]

    def _direction(self) -> None:
        try:
            tables = direction_tables(self)
        except NoDirection:  # a report shows the candidates all the same
            self._summarise(summary_of(self.model, None))
            raise
        for name, rows in tables.items():
            files.write_table(self.folder / "findings" / f"{name}.parquet", rows)
        self._summarise(summary_of(self.model, self.direction()))

    def direction(self) -> Direction:
        """The run's direction.

        Raises:
            UserError: it has not been found yet, or its files are damaged.
        """
        if not (self.folder / "direction.safetensors").exists():
            raise UserError(f"{self.folder} has no direction yet; run `suffix-analysis direction --out {self.folder}`.")
        rows = files.read_table(self.folder / "findings" / "candidates.parquet")
        return load_direction(self.folder / "direction.safetensors", rows)

    @property
    def judge(self) -> Judge:
        """Who gives the verdicts on replies."""
        return judge_named(self.config.judge)

    def answered(self, suffixes: Sequence[Suffix]) -> list[dict[str, Any]]:
        """Replies without a suffix and with each of these; what an earlier stage has made is read."""
        prompts, length = self.prompts(), self.config.reply_tokens
        tokens = self.refusal_tokens()

        def answer(cells: list[replies.Cell]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
            if self.config.executor == "ray" and cells:
                from suffix_analysis import workers

                yield from workers.answer(cells, tokens, length, self.precise, provenance.weights_of(self.folder))
                return
            for i, (arm, suffix, some) in enumerate(cells):
                yield i, replies.reply_rows(self.fast, some, suffix, arm, tokens, length, self.judge)

        return replies.measure_replies(
            prompts, suffixes, answer, self.folder / "replies.jsonl",
            lambda done, total: self.narrator.progress(done, total, "arms × suffixes answered"),
        )  # fmt: skip

    def _replies(self) -> None:
        suffixes = runs.read_suffixes(self.folder / "suffixes.jsonl")
        rows = self.answered(suffixes)
        findings = self.folder / "findings"
        files.write_table(findings / "replies.parquet", rows)
        files.write_table(findings / "refusal.parquet", replies.refusal_table(rows, suffixes))

    def _analysis(self) -> None:
        suffixes = runs.read_suffixes(self.folder / "suffixes.jsonl")
        direction, prompts, config = self.direction(), self.prompts(), self.config
        traced = pool.traced_of(suffixes, config)
        total = n_forwards(prompts, traced, config.n_traced)
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            self.narrator.progress(min(done, total), total, "prompts traced")

        def make(jobs: Sequence[Job]) -> Iterator[tuple[int, Traces]]:
            if config.executor == "ray" and jobs:
                from suffix_analysis import workers

                weights = provenance.weights_of(self.folder)
                for i, traces in workers.trace_all(jobs, direction, self.precise, weights):
                    count(len(jobs[i][0]))
                    yield i, traces
                return
            for i, (some, text) in enumerate(jobs):
                yield i, trace(self.model, some, direction, suffix=text, on_batch=count)

        kept = self.folder / "traces"  # until all of them are there
        found = analyze(
            self.model, direction, prompts, traced,
            n_top=config.n_top_heads, max_prompts=config.n_traced,
            trace_all=lambda jobs: traces_of(kept, jobs, self.model, direction, make, count),
        )  # fmt: skip
        folder = self.folder / "findings"
        rows = files.read_table(folder / "replies.parquet", list(replies.ReplyRow.__annotations__))
        comparable = {row["against"] for row in found.tables["head_differences"]}  # equally long, if they have suffixes
        refusal = replies.refusal_contrasts(rows, comparable, suffixes)
        edits = files.read_table(folder / "intervention_replies.parquet")
        contrasts = refusal + replies.success_contrasts(rows, edits, suffixes) + found.tables["contrasts"]
        for name, table in (found.tables | {"contrasts": contrasts}).items():
            files.write_table(folder / f"{name}.parquet", table)
        files.write_json(folder / "patterns.json", found.patterns)
        files.write_json(folder / "checks.json", self._with_checks(found.checks))
        self._summarise(found.summary)
        shutil.rmtree(kept, ignore_errors=True)

    def _mechanism(self) -> None:
        prompts, config, findings = self.prompts(), self.config, self.folder / "findings"
        everything = runs.read_suffixes(self.folder / "suffixes.jsonl")
        suffixes = of_each_text([s for s in everything if s.arm == "adversarial"])
        if not suffixes:
            self.skip("No attack of the pool flipped enough of the select split, so there is no mechanism to test.")
            return
        report, select, harmless = (
            prompts_of(prompts, kind, split, config.n_causal)
            for kind, split in (("harmful", "report"), ("harmful", "select"), ("harmless", "select"))
        )
        heads = [
            (row["layer"], row["head"]) for row in files.read_table(findings / "top_heads.parquet", ("layer", "head"))
        ]
        controls, unequal = as_long(suffixes, of_each_text(pool.traced_of(everything, config)))
        model, direction = self.model, self.direction()  # what is wrong with these ends the run
        try:
            tables = measure_mechanism(
                model, direction, report, select, harmless, suffixes, heads,
                controls=controls, reply_tokens=config.reply_tokens, judge=self.judge, seed=config.seed,
                on_step=lambda done, total: self.narrator.progress(done, total, "groups of prompts tested causally"),
            )  # fmt: skip
        except UserError as error:  # everything before it is worth a report
            self.skip(f"The causal tests were left out: {error}")
            return
        files.write_json(findings / "checks.json", self._with_checks(tables.pop("checks")))
        for sentence in [*unequal, *shortfalls(tables["causal"], len(heads))]:
            self.skip(sentence)
        for name, rows in tables.items():
            files.write_table(findings / f"{name}.parquet", rows)

    def _with_checks(self, own: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A stage's checks with those of other stages."""
        path, names = self.folder / "findings" / "checks.json", {row["name"] for row in own}
        there = files.read_as(path, list[dict[str, Any]]) if path.exists() else []
        return [*(row for row in there if row.get("name") not in names), *own]

    def _summarise(self, found: dict[str, Any]) -> None:
        """Write the summary, of which an earlier stage may have known less."""
        path, told = self.folder / "suffixes.jsonl", self.folder / "findings" / "summary.json"
        suffixes = runs.read_suffixes(path) if path.exists() else []
        skipped = self.folder / "skipped.json"
        before = files.read_as(told, dict[str, Any]) if told.exists() else {}
        own = {
            "target": self.config.target,
            "suffix_id": next((s.id for s in suffixes if s.arm == "adversarial"), None),
            "n_prompts": count_prompts(self.prompts()),
            "reply_dtype": str(self.fast_dtype).removeprefix("torch."),
            "skipped": files.read_as(skipped, list[str]) if skipped.exists() else [],
        }
        files.write_json(told, before | found | own)

    def skip(self, sentence: str) -> None:
        """Remember what fell short, for the report, and say it."""
        path, summary = self.folder / "skipped.json", self.folder / "findings" / "summary.json"
        told = files.read_as(path, list[str]) if path.exists() else []
        sentences = list(dict.fromkeys([*told, sentence]))  # an interrupted stage says it again
        files.write_json(path, sentences)
        if summary.exists():  # an earlier stage has written it
            files.write_json(summary, files.read_as(summary, dict[str, Any]) | {"skipped": sentences})
        self.narrator.say(sentence)
