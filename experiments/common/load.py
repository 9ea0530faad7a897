"""An open-loop load of conversations on a server of this machine: how long until the first token, and between tokens.

    scripts/serve.sh --keep none                                        # evicts after every round
    python -m experiments.common.load --url http://127.0.0.1:8000 --rate 0.5 --rounds 40 --think 2

Sessions arrive by a Poisson process, whether or not the server keeps up; the rounds of a session wait for the previous
answer and the time to think. What is asked is recorded before anything is sent: lengths, arrivals and token ids follow
from the seed alone, so every method answers the same. Histories that are older than the run are asked for once before
the clock starts, so that a server has them saved (or resident, if it keeps them); then a few requests warm it up.

Time to first token counts from when a round was due, not from when this process got round to sending it. A round that
failed or was not over at the limit misses the objective.

Other generators, by their documentation in November 2026: aiperf starts conversations by a Poisson process, waits
between turns (`--request-rate --arrival-pattern poisson --conversation-turn-delay-mean`) and counts goodput, but it
sends texts, or recorded bodies that cannot hold what the server answers in this run; guidellm has turns and Poisson
rates, at which every turn counts as a request, and its guide names no time between turns. Neither keeps a reply's
`hcache`, which says where a prompt's tokens came from, and neither can have histories of exact lengths that exist
before the clock starts. That is why this one exists. Both run against our server as against any of OpenAI's form (we
have not run them):

    aiperf profile --url http://127.0.0.1:8000 --endpoint-type chat --streaming --model NAME --tokenizer FOLDER \\
        --num-conversations 20 --conversation-turn-mean 4 --conversation-turn-delay-mean 2000 --request-rate 0.5
    guidellm run --backend kind=openai_http,target=http://127.0.0.1:8000,model=NAME \\
        --profile kind=poisson,rate=0.5 --data kind=synthetic_text,prompt_tokens=64,output_tokens=64,turns=4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import httpx

from experiments.common.load_client import Answer, Client
from experiments.common.load_summary import Asked, Objective, Summary, summary_of
from experiments.common.workloads import Session, midway_sessions, scaled

FIRST_ID, VOCABULARY = 6, 2000
"""Random prompts take ids from here up to there: no special tokens, and every model has so many."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, and when."""

    sessions: tuple[Session, ...]
    think_s: float
    """From the end of an answer to the next round of its session."""
    seed: int = 0
    name: str = ""
    """Loads of different names never share saved state, except for histories of the same `seed`."""
    limit_s: float = 600.0
    """After the first arrival. What is still going on then is given up."""

    def ids(self, session_idx: int, part: str, count: int) -> list[int]:
        """Random token ids that the seed decides. `part`: `history`, or the number of a round."""
        name = "" if part == "history" else self.name
        return random.Random(f"{self.seed}/{name}/{session_idx}/{part}").choices(range(FIRST_ID, VOCABULARY), k=count)

    def history(self, session_idx: int) -> list[int]:
        """What a session had said before the run."""
        rounds = self.sessions[session_idx].rounds
        return self.ids(session_idx, "history", rounds[0].history_tokens) if rounds else []

    @property
    def num_rounds(self) -> int:
        """Of all sessions."""
        return sum(len(session.rounds) for session in self.sessions)

    @property
    def offered_rounds_per_s(self) -> float:
        """Sessions per second while they arrive, times rounds of a session."""
        last_s = max((session.start_s for session in self.sessions), default=0.0)
        return self.num_rounds / last_s if last_s else 0.0


async def prepare(client: Client, load: Load) -> None:
    """Every history that is older than the run, once, one after the other. Raises RuntimeError."""
    for session_idx in range(len(load.sessions)):
        history = load.history(session_idx)
        if history:
            _checked(await client.ask(history, 1))
    await client.until_saved()


async def warm_up(client: Client, load: Load, times: int = 2) -> None:
    """A conversation of its own, of typical lengths, whose second round brings the first one back. Raises
    RuntimeError."""
    rounds = sorted((one for session in load.sessions for one in session.rounds), key=lambda one: one.history_tokens)
    if not rounds:
        return
    typical = rounds[len(rounds) // 2]
    rng = random.Random(f"{load.seed}/warm-up/{time.monotonic_ns()}")
    ids = rng.choices(range(FIRST_ID, VOCABULARY), k=max(64, typical.history_tokens))
    for _ in range(1 + times):
        answer = _checked(await client.ask(ids, min(8, typical.output_tokens), salt="warm-up"))
        ids = [*ids, *answer.token_ids, *rng.choices(range(FIRST_ID, VOCABULARY), k=typical.prompt_tokens)]
        await client.until_saved()


def _checked(answer: Answer) -> Answer:
    if answer.error:
        raise RuntimeError(f"the server did not answer while it was prepared: {answer.error}")
    return answer


async def drive(client: Client, load: Load) -> list[Asked]:
    """Every round that was due, those of a session in order. Bounded by the load's limit."""
    rounds: list[Asked] = []
    begin_s = time.perf_counter()

    async def talk(session_idx: int, session: Session) -> None:
        ids, due_s = load.history(session_idx), session.start_s
        for round_idx, one in enumerate(session.rounds):
            await asyncio.sleep(max(0.0, begin_s + due_s - time.perf_counter()))
            ids += load.ids(session_idx, str(round_idx), one.prompt_tokens)
            asked = Asked(session_idx=session_idx, round_idx=round_idx, round=one, due_s=due_s)
            place = len(rounds)
            rounds.append(asked)  # so that it is known when the limit comes first
            answer = await client.ask(ids, one.output_tokens)
            finished_s = answer.finished_s - begin_s
            rounds[place] = replace(
                asked,
                sent_s=answer.sent_s - begin_s,
                finished_s=None if answer.error else finished_s,
                token_times_s=tuple(at_s - begin_s for at_s in answer.token_times_s),
                hcache=dict(answer.hcache),
                error=answer.error,
            )
            if answer.error:
                return
            ids += answer.token_ids
            due_s = finished_s + load.think_s

    tasks = [asyncio.create_task(talk(idx, session)) for idx, session in enumerate(load.sessions)]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=load.limit_s)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result
    return rounds


async def ask_all(url: str, load: Load, *, is_prepared: bool = False) -> list[Asked]:
    """Prepare the server unless it is, warm it up, then the load. Raises RuntimeError, TimeoutError, or what httpx
    raises when there is no server."""
    async with Client(url) as client:
        if not is_prepared:
            await prepare(client, load)
        await warm_up(client, load)
        done = await drive(client, load)
        await client.until_saved()
        return done


def run_load(url: str, load: Load, *, is_prepared: bool = False) -> list[Asked]:
    """`ask_all` from code that is not asynchronous."""
    return asyncio.run(ask_all(url, load, is_prepared=is_prepared))


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 when a round failed, 2 when nothing could be asked."""
    options = _parser().parse_args(argv)
    sessions = midway_sessions(options.rounds, options.rate, rounds_each=options.rounds_each, seed=options.seed)
    load = Load(
        sessions=tuple(scaled(sessions, tokens=options.lengths)),
        think_s=options.think,
        seed=options.seed,
        name=options.name,
        limit_s=options.limit,
    )
    if not options.json:
        means = [sum(getattr(one, name) for session in load.sessions for one in session.rounds) for name in _LENGTHS]
        history, prompt, output = (total / load.num_rounds for total in means)
        print(
            f"{load.num_rounds} rounds in {len(load.sessions)} sessions at {load.offered_rounds_per_s:.2f} rounds/s; "
            f"on average {history:.0f} tokens of history, {prompt:.0f} new ones, {output:.0f} to answer",
            flush=True,
        )
    try:
        rounds = run_load(options.url, load)
    except (RuntimeError, TimeoutError, ValueError, httpx.HTTPError) as reason:
        print(f"{_PROGRAM}: {reason}", file=sys.stderr)
        return 2
    objective = Objective(ttft_s=options.slo_ttft, tbt_s=options.slo_tbt)
    summary = summary_of(rounds, load.offered_rounds_per_s, objective, warm_up=options.warm_up)
    if options.json:
        print(json.dumps({"summary": asdict(summary), "rounds": [asdict(one) for one in rounds]}))
    else:
        print(_text(summary))
    return 1 if summary.num_failed else 0


_PROGRAM = "python -m experiments.common.load"
_LENGTHS = ("history_tokens", "prompt_tokens", "output_tokens")


def _text(summary: Summary) -> str:
    def line(name: str, spread: tuple[float, float, float]) -> str:
        return f"{name}  mean {1e3 * spread[0]:.1f} ms, p50 {1e3 * spread[1]:.1f}, p99 {1e3 * spread[2]:.1f}"

    objective = summary.objective
    ways = ", ".join(f"{way} {count}" for way, count in summary.ways.items())
    return "\n".join(
        (
            line("first token   ", (summary.ttft_mean_s, summary.ttft_p50_s, summary.ttft_p99_s)),
            line("between tokens", (summary.tbt_mean_s, summary.tbt_p50_s, summary.tbt_p99_s)),
            f"goodput         {summary.goodput:.0%} of rounds: first token within {objective.ttft_s:g} s, "
            f"at most {objective.tbt_s:g} s between tokens on average",
            f"rates           {summary.offered_rounds_per_s:.3f} rounds/s offered, "
            f"{summary.achieved_rounds_per_s:.3f} achieved" + (": SATURATED" if summary.is_saturated else ""),
            f"counted         {summary.num_counted} rounds, {summary.num_failed} failed, "
            f"{summary.num_unfinished} not over at the end; histories came by: {ways}",
        )
    )


def _parser() -> argparse.ArgumentParser:
    what, _, others = (__doc__ or "").partition("\nOther generators")
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=what,
        epilog="Other generators" + others,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def number(name: str, default: float | None, words: str, metavar: str = "S") -> None:
        shown = words if default is None else f"{words} (default: {default:g})"
        kind = int if metavar == "N" else float
        parser.add_argument(name, type=kind, default=default, required=default is None, metavar=metavar, help=shown)

    parser.add_argument("--url", required=True, help="of a server on this machine, such as http://127.0.0.1:8000")
    number("--rate", None, "rounds per second, of all sessions together", "R")
    number("--rounds", 40, "rounds to ask in all", "N")
    number("--rounds-each", 3, "most rounds of a session", "N")
    number("--think", 2.0, "seconds between an answer and the next round; the paper has 30")
    number("--lengths", 0.125, "factor on the paper's lengths: 4,000 tokens of history, 67 new, 359 to answer", "F")
    number("--seed", 0, "decides lengths, arrivals and tokens", "N")
    parser.add_argument("--name", default="", help="another name asks for other tokens behind the same histories")
    number("--warm-up", 0.2, "share of the time in which sessions arrive; rounds due before do not count", "SHARE")
    number("--limit", 600.0, "give up what still goes on after so many seconds")
    number("--slo-ttft", 1.0, "objective: the first token within so many seconds")
    number("--slo-tbt", 0.1, "objective: at most so many seconds between tokens, on average")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: the summary, and every round with its tokens' times and the server's report",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
