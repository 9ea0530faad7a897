"""Answers to L-Eval's questions by real weights: from a context that never left, and from restored ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from experiments.common.rows import Row
from experiments.common.workloads import LEVAL_TASKS, leval_documents
from experiments.exactness.config import ITEM, RESIDENT
from experiments.exactness.contexts import WAYS, Contexts, Saved, whole_spans
from experiments.exactness.scores import SCORES
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.tokenizer import Tokenizer

RESTORED = tuple(way for way in WAYS if way.name in ("hidden", "kv"))
"""All other methods are made of these."""
_ASK = {
    "quality": "Answer with the letter of the right option and nothing else.",
    "gsm100": "Solve the last question like those before it. End with: The answer is",
    "paper_assistant": "Write what is asked for, based on the paper above.",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How much is asked."""

    num_documents: int
    num_questions: int
    """Of each document, at most."""
    context_tokens: int
    """Documents are cut there."""
    answer_tokens: int


def prompt_of(tokenizer: Tokenizer, task: str, document: str, question: str) -> list[int]:
    """The document first, as the part that questions share. The model's own chat form where it has one."""
    text = f"{document}\n\n{_ASK[task]}\n\n{question}"
    if tokenizer.has_chat_template:
        message = {"role": "user", "content": text}
        return tokenizer.encode(tokenizer.render_chat([message], add_generation_prompt=True), add_special_tokens=False)
    return tokenizer.encode(f"{text}\nAnswer:", add_special_tokens=True)


def _cut(tokenizer: Tokenizer, document: str, num_tokens: int) -> str:
    ids = tokenizer.encode(document, add_special_tokens=False)
    return document if len(ids) <= num_tokens else tokenizer.decode(ids[:num_tokens])


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Leading tokens that are equal in all, short of the last one, which must run."""
    least = min(len(prompt) for prompt in prompts) - 1
    return sum(1 for _ in takewhile(lambda at: len({prompt[at] for prompt in prompts}) == 1, range(least)))


def rows(engine: HCacheEngine, model: Path, task: str, data: Path | None, asked: Asked, machine: str) -> Iterator[Row]:
    """Panels e and f of one task. Raises MissingData."""
    tokenizer = Tokenizer(model)
    contexts = Contexts(engine)
    texts: dict[str, list[str]] = {name: [] for name in (RESIDENT, *(way.name for way in RESTORED))}
    same = {way.name: 0 for way in RESTORED}
    wanted: list[str] = []
    num_tokens = 0
    for document in leval_documents(data, task)[: asked.num_documents]:
        pairs = document.questions[: asked.num_questions]
        beside = max(len(prompt_of(tokenizer, task, "", question)) for question, _ in pairs) + asked.answer_tokens
        room = engine.max_context_tokens - beside - SPAN_TOKENS  # cut text may have a token more than was cut
        text = _cut(tokenizer, document.text, min(asked.context_tokens, room))
        prompts = [prompt_of(tokenizer, task, text, question) for question, _ in pairs]
        num_shared = _shared([*prompts, prompt_of(tokenizer, task, text, "-")])
        history = whole_spans(num_shared)
        if history < SPAN_TOKENS:
            continue
        states = [Saved(engine, way, num_shared) for way in RESTORED]
        try:
            uid = contexts.new()
            contexts.run_and_save(uid, prompts[0][:history], states)
            for prompt, (_, answer) in zip(prompts, pairs, strict=True):
                engine.truncate(uid, history)
                first = contexts.run(uid, prompt[history:])
                mine, _ = contexts.choose(uid, first, asked.answer_tokens, tokenizer.stop_token_ids)
                texts[RESIDENT].append(tokenizer.decode(mine))
                wanted.append(answer)
                num_tokens += len(prompt)
                for state in states:
                    other, first = contexts.restored(state, prompt, history)
                    its, _ = contexts.choose(other, first, asked.answer_tokens, tokenizer.stop_token_ids)
                    texts[state.way.name].append(tokenizer.decode(its))
                    same[state.way.name] += its == mine
                    engine.evict(other)
            engine.evict(uid)
        finally:
            for state in states:
                state.close()
    name = next(name for name, known in LEVAL_TASKS.items() if known == task)
    note = f"{len(wanted)} questions, {num_tokens / max(1, len(wanted)):.0f} tokens each on average, documents cut at "
    note += f"{asked.context_tokens} tokens or what the model holds, answers at {asked.answer_tokens}"

    def row(panel: str, series: str, y: float | None, unit: str) -> Row:
        return Row(
            figure=ITEM.key,
            panel=panel,
            series=series,
            x=name,
            y=y,
            unit=unit,
            how="measured",
            machine=machine,
            note=note,
        )

    for series, answers in texts.items():
        yield row("e", series, SCORES[task](answers, wanted) if wanted else None, "score")
    for series, count in same.items():
        yield row("f", series, count / len(wanted) if wanted else None, "ratio")
