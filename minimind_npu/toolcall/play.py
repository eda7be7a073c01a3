"""Conversations with tools in the loop: the model answers, what it calls is run, it answers again.

    episodes = play(engine, tokenizer, conversations, registry, max_turns=4)
    episodes[0].messages, episodes[0].finished

All conversations that are still going are answered as one batch, then all their calls are run at
once in threads, so that the next round is the same whichever tool was the fastest. An episode keeps
the tokens as they were generated, never made again from text: `written` says which of them the
model wrote (end tokens among them) and which are observations or the template's. Training on the
first sees exactly the context that they were drawn in.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from engine.generation import Engine, Request, Sampling
from toolcall.calls import OPENED, Call, parse_calls
from toolcall.registry import Registry, error_text

from common.data.labels import encode_chat, encode_prompt
from common.data.spelling import IGNORE
from common.runs.generate import answer_text

THREADS = 8  # calls that run at once


@dataclass
class Episode:
    """A conversation that is played.

    messages: as given, then what came; tools: those it may call; seed: of what it draws.
    prompt: token ids of what was given; tokens: those after it; written: of each of them, whether
        the model wrote it.
    calls: all that it made, in order; requests: those to the engine, one an answer.
    finished: "" while it goes on, then "stop" (an answer without a call), "length" (an answer that
        was cut off), "turns" (it still calls in its last turn), "window" (no room for more),
        "refused" (by the chat template, `problem` says why).
    """

    messages: list[dict]
    tools: list[dict]
    seed: int | str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    finished: str = ""
    problem: str = ""

    @property
    def answer(self) -> str:
        """What it said last; "" where it did not get that far."""
        last = self.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""

    @property
    def log_probs(self) -> list[float]:
        """Of each of its tokens, from an engine that keeps them; 0 for those that it was given."""
        own = iter([value for request in self.requests for value in request.log_probs])
        return [next(own) if is_written else 0.0 for is_written in self.written]

    def refuse(self, error: ValueError) -> None:
        self.finished = "refused"
        self.problem = str(error)

    def add(self, tokens: list[int], written: bool) -> None:
        self.tokens += tokens
        self.written += [written] * len(tokens)


def play(
    engine: Engine,
    tokenizer,
    conversations: list[dict],
    registry: Registry,
    max_turns: int = 4,
    sampling: Sampling | None = None,
    **template,
) -> list[Episode]:
    """Each conversation {"messages", "tools"?, "seed"?} to its end, in order; tools: by default all
    of the registry. A call of a tool that was not shown is answered with an error, like any wrong
    call.

    max_turns: answers of one conversation. sampling: of an answer. Answer t of a conversation draws
    from "SEED:t" with its own seed, by default that of `sampling` and its number, so it is the same
    beside any others. template: for the chat template; where it refuses the messages, or rewrites
    answers when they become history, that episode ends and the others go on.
    """
    sampling = sampling or Sampling()
    episodes = []
    for number, one in enumerate(conversations):
        seed = one.get("seed", f"{sampling.seed}:{number}")
        episodes.append(begun(tokenizer, one, seed, registry, template))
    going = {n: episode for n, episode in enumerate(episodes) if not episode.finished}
    with ThreadPoolExecutor(THREADS) as pool:
        for turn in range(max_turns):
            answer_all(engine, going, turn, sampling)
            made = {}
            for number, episode in going.items():
                made[number] = heard(tokenizer, episode, is_last=turn + 1 == max_turns)
            going = {n: episode for n, episode in going.items() if not episode.finished}
            # one after the other in a conversation: a call may build on the one before
            jobs = {
                n: pool.submit(run_calls, episode, made[n], registry)
                for n, episode in going.items()
            }
            for number, episode in going.items():
                observe(tokenizer, episode, jobs[number].result(), template)
            going = {n: episode for n, episode in going.items() if not episode.finished}
    return episodes


def begun(tokenizer, conversation: dict, seed, registry: Registry, template: dict) -> Episode:
    tools = conversation.get("tools") or registry.schemas
    episode = Episode(list(conversation["messages"]), tools, seed, prompt=[])
    try:
        episode.prompt = encode_prompt(tokenizer, episode.messages, tools, **template)
    except ValueError as error:
        episode.refuse(error)
    return episode


# ---- the model's part ----------------------------------------------------------------------------


def answer_all(engine: Engine, going: dict[int, Episode], turn: int, sampling: Sampling) -> None:
    """One answer of each, as one batch; where there is no room for one the episode is finished."""
    asked = []
    for episode in going.values():
        how = replace(sampling, seed=f"{episode.seed}:{turn}")
        try:
            request = engine.submit(episode.prompt + episode.tokens, how)
        except ValueError:
            episode.finished = "window"
            continue
        episode.requests.append(request)
        asked.append(request)
    try:
        while any(not request.finished for request in asked):
            engine.step()
    finally:  # an interruption leaves nothing behind in the engine
        for request in asked:
            request.cancel()


def heard(tokenizer, episode: Episode, is_last: bool) -> list[Call]:
    """Take the newest answer into the episode; -> the calls that it makes."""
    if episode.finished:
        return []
    request = episode.requests[-1]
    before = tokenizer.decode((episode.prompt + episode.tokens)[-8:])
    opened = "<think>" if before.rstrip().endswith("<think>") else ""
    text = opened + answer_text(tokenizer, request.tokens)
    episode.add(request.tokens, written=True)
    calls = parse_calls(text)
    episode.messages.append(message_of(text, calls))
    episode.calls += calls
    if request.finished != "stop":
        episode.finished = "length"
    elif not calls:
        episode.finished = "stop"
    elif is_last:
        episode.finished = "turns"
    return calls


def message_of(text: str, calls: list[Call]) -> dict:
    """An answer as a message; a call that is none stays text."""
    message = {"role": "assistant", "content": text.strip()}
    if calls and not any(call.problem for call in calls):
        message["content"] = text.partition(OPENED)[0].strip()
        message["tool_calls"] = []
        for call in calls:
            function = {"name": call.name, "arguments": call.arguments}
            message["tool_calls"].append({"type": "function", "function": function})
    return message


# ---- the tools' part -----------------------------------------------------------------------------


def run_calls(episode: Episode, calls: list[Call], registry: Registry) -> list[str]:
    shown = [tool.get("function", tool).get("name") for tool in episode.tools]
    results = []
    for call in calls:
        if call.problem or call.name in shown:
            results.append(registry.answer(call))
        else:
            results.append(error_text(f"no tool {call.name[:40]}; there are: {', '.join(shown)}"))
    return results


def observe(tokenizer, episode: Episode, results: list[str], template: dict) -> None:
    messages = [{"role": "tool", "content": result} for result in results]
    episode.messages += messages
    try:
        episode.add(observation_ids(tokenizer, messages, template), written=False)
    except ValueError as error:
        episode.refuse(error)


def observation_ids(tokenizer, messages: list[dict], template: dict) -> list[int]:
    """Results of tools -> the ids between the end token of the answer that called and the next
    answer. What a tool gives is spelled as text: no tag or special token of it is one."""
    function = {"name": "f", "arguments": {}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }
    talk = [{"role": "user", "content": "?"}, call]
    row = encode_chat(tokenizer, talk, 10**6, **template)
    end = max(i for i, label in enumerate(row["labels"]) if label != IGNORE) + 1
    ids = encode_prompt(tokenizer, [*talk, *messages], **template)
    if ids[:end] != row["input_ids"][:end]:
        raise ValueError("the chat template rewrites an answer when results of tools follow it")
    return ids[end:]
