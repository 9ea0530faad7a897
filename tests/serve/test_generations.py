"""Answers on their way from the engine's thread to the event loop, and what becomes of those nobody waits for."""

import asyncio

import pytest
from serve_kit import FakeService

from mii_hcache.runtime.generation import SamplingParams
from mii_hcache.serve.generations import Finished, Generations
from mii_hcache.serve.growing import Piece, ShownPrompt, Wanted
from mii_hcache.serve.text import PromptEncoder


@pytest.fixture
def service():
    service = FakeService()
    yield service
    service.close(drain=False)


def _generations(service, tokenizer, known_texts, *, num_prompts=1, want_pieces=True, echo=False):
    encoder = PromptEncoder(tokenizer, known_texts)
    background = set()
    generations = Generations(
        request_id="r",
        service=service,
        encoder=encoder,
        tokenizer=tokenizer,
        prompts=[encoder.encode_text(f"Prompt {idx}:") for idx in range(num_prompts)],
        shown=[ShownPrompt(text="Prompt 0:", offsets=())] * num_prompts,
        sampling=[SamplingParams(max_new_tokens=200)] * num_prompts,
        wanted=Wanted(pieces=want_pieces, echo=echo),
        background=background,
    )
    return generations, background


async def _take(generations, num_pieces, service):
    """The text of the first pieces; then, when the engine is a good deal further, the consumer leaves."""
    taken = []
    events = generations.events()
    async for event in events:
        taken.append(event.text)
        if len(taken) == num_pieces:
            break
    while service.num_generated < 4 * num_pieces:
        await asyncio.sleep(0.005)
    await events.aclose()
    return "".join(taken)


def test_exactly_what_was_shown_is_remembered(service, tokenizer, known_texts):
    service.step_s = 0.001

    async def leave_early():
        generations, background = _generations(service, tokenizer, known_texts)
        generations.submit()
        shown = await _take(generations, 5, service)
        await asyncio.wait(set(background))
        return shown

    shown = asyncio.run(leave_early())
    assert len(service.finished[0].token_ids) >= 20
    ((_, text),) = known_texts.texts
    assert text.endswith("Prompt 0:" + shown)


def test_nothing_shown_nothing_remembered(service, tokenizer, known_texts):
    service.step_s = 0.001

    async def leave_at_once():
        generations, background = _generations(service, tokenizer, known_texts, want_pieces=False)
        generations.submit()
        await asyncio.sleep(0.02)
        generations.close()
        generations.close()
        assert len(background) == 1
        await asyncio.wait(set(background))

    asyncio.run(leave_at_once())
    assert service.cancelled == ["r-0"] and known_texts.texts == {}


def test_a_prompt_that_was_shown_is_not_an_answer_that_was_shown(service, tokenizer, known_texts):
    service.step_s = 0.001

    async def leave_after_the_echo():
        generations, background = _generations(service, tokenizer, known_texts, echo=True)
        generations.submit()
        shown = await _take(generations, 1, service)
        await asyncio.wait(set(background))
        return shown

    assert asyncio.run(leave_after_the_echo()) == "Prompt 0:"
    assert known_texts.texts == {}


def test_an_answer_is_remembered_before_its_end_is_told(service, tokenizer, known_texts):
    async def all_of_it():
        generations, background = _generations(service, tokenizer, known_texts, num_prompts=3)
        generations.submit()
        texts = ["", "", ""]
        async for event in generations.events():
            if isinstance(event, Piece):
                texts[event.answer_idx] += event.text
                continue
            assert isinstance(event, Finished)
            assert any(text.endswith(event.prompt.text + event.text) for _, text in known_texts.texts)
            assert texts[event.answer_idx] + event.last_piece == event.text
        assert not background

    asyncio.run(all_of_it())
    assert service.cancelled == [] and len(known_texts.texts) == 3


def test_the_end_of_the_loop_does_not_hurt_the_engine(service, tokenizer, known_texts):
    service.step_s = 0.001

    async def forget():
        generations, _ = _generations(service, tokenizer, known_texts)
        generations.submit()

    asyncio.run(forget())
    service.close()  # its thread ends in order
    assert len(service.finished) == 1
