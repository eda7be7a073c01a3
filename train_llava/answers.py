"""Answers to questions about pictures: batched, spread over the ranks, with the pictures from disk
or from features that are known already."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from encoding import encode_prompt, row_of, without_pictures
from features import PictureSource
from model import tokens_per_picture
from sight import Normaliser, see
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common import cli
from common.data.progress import Progress
from common.runs.generate import answer_text, end_token_ids, expected_answer
from common.runs.metrics import answer_match
from common.runs.report import parameters

Pictures = Callable[[list], tuple[torch.Tensor, dict]]


@torch.no_grad()
def generate_answers(
    model,
    processor,
    prompts: list[dict],
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    pictures: Pictures | None = None,
    **settings,
) -> list[str]:
    """Answers in the order of `prompts`, greedy unless `settings` (of generate) say otherwise. All
    ranks call it and get all answers.

    prompts: {"input_ids": [T] with every picture's tokens, "pictures": [...]}.
    pictures: the elements of the lists "pictures" -> (uint8 pixels or features, faults); unset,
        they are Places, paths, bytes or Pillow images, and one that cannot be used is a
        PictureError.
    batch_size: default 32, of models above a billion parameters 8.
    """
    if batch_size is None:
        batch_size = 32 if parameters(model)["total"] < 1e9 else 8
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    mine = list(range(rank, len(prompts), world))
    # equal work: ZeRO-3 needs all ranks in every forward
    mine += [len(prompts) - 1] * (-(-len(prompts) // world) - len(mine))
    mine.sort(key=lambda i: len(prompts[i]["input_ids"]))

    was_training = model.training
    model.eval()
    found: dict[int, str] = {}
    with Progress("generate", total=len(mine), unit="answers") as progress:
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            some = [prompts[i] for i in chosen]
            ids = generate(model, processor, some, max_new_tokens, pictures, **settings)
            texts = [answer_text(processor.tokenizer, row) for row in ids]
            found |= dict(zip(chosen, texts, strict=True))
            progress.update(len(chosen))
    model.train(was_training)

    if world > 1:
        cli.wait_for_all("it generates answers")
        shares: list = [None] * world
        dist.all_gather_object(shares, found)
        found = {number: text for share in shares for number, text in share.items()}
    return [found[i] for i in range(len(prompts))]


def generate(
    model,
    processor,
    prompts: list[dict],
    max_new_tokens: int,
    pictures: Pictures | None = None,
    **settings,
) -> torch.Tensor:
    """B prompts -> new token ids [B, N]; padded on the left."""
    tokenizer = processor.tokenizer
    width = max(len(prompt["input_ids"]) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = torch.tensor(prompt["input_ids"])
        ids[row, width - len(own) :] = own
        mask[row, width - len(own) :] = 1
    where = model.device if model.device.type != "meta" else torch.device("cpu")
    shown = [picture for prompt in prompts for picture in prompt["pictures"]]
    seen = {}
    normaliser = Normaliser(processor.image_processor)
    if shown:
        found = show(shown, processor, pictures).to(where)
        seen["mm_encoder_outputs"] = see(model, found, normaliser)
    elif is_deepspeed_zero3_enabled():  # others gather the weights of tower and projector now
        see(model, normaliser.blank(where), normaliser)
    if not settings:
        settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    out = model.generate(
        input_ids=ids.to(where),
        attention_mask=mask.to(where),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=end_token_ids(model, tokenizer),
        synced_gpus=is_deepspeed_zero3_enabled(),
        num_beams=1,
        use_cache=True,  # off in the config while it trains
        **seen,
        **settings,
    )
    return out[:, width:]


def show(shown: list, processor, pictures: Pictures | None) -> torch.Tensor:
    """-> uint8 pixels [P, 3, height, width], or features [P, N, H]."""
    if pictures is not None:
        return pictures(shown)[0]
    source = PictureSource(shown, processor.image_processor)
    return torch.stack([source.open(number) for number in range(len(shown))])


# ---- held-out rows -------------------------------------------------------------------------------


def ask_held_out(
    model,
    processor,
    rows: list[str],
    pictures: Pictures,
    max_new_tokens: int,
) -> tuple[dict, list]:
    """({"exact_match", "rouge_l", "blind_exact_match"}, samples) of held-out rows: the last answer
    of each that shows a picture, and (blind) what is answered when it is not shown. What
    RecipeTrainer's `measure` wants.

    rows: as pick_eval_rows gives them; those with a picture that cannot be used are not asked.
    """
    tokenizer = processor.tokenizer
    loaded = can_be_shown([row_of(row) for row in rows], pictures)
    if not loaded:
        return {}, []

    def answers_to(asked: list[dict]) -> list[str]:
        known = (tokenizer, processor.image_token_id, tokens_per_picture(processor))
        prompts = [encode_prompt(row, *known) for row in asked]
        return generate_answers(model, processor, prompts, max_new_tokens, pictures=pictures)

    wanted = [expected_answer(tokenizer, row) for row in loaded]
    said = answers_to(loaded)
    samples = [
        {"prompt": question_of(row), "reference": reference, "answer": answer}
        for row, reference, answer in zip(loaded, wanted, said, strict=True)
    ]
    # what is asked in words alone is answered blindly as well
    shown = [place for place, row in enumerate(loaded) if row["pictures"]]
    if not shown:
        return answer_match(said, wanted), samples
    wanted = [wanted[place] for place in shown]
    guessed = answers_to([without_pictures(loaded[place]) for place in shown])
    blind = answer_match(guessed, wanted)["exact_match"]
    found = answer_match([said[place] for place in shown], wanted)
    return found | {"blind_exact_match": blind}, samples


def can_be_shown(rows: list[dict], pictures: Pictures) -> list[dict]:
    """Those of the rows whose pictures can all be used; how many are left out is said."""
    usable = []
    lost = []
    for row in rows:
        faults = pictures(row["pictures"])[1] if row["pictures"] else {}
        if faults:
            lost.append(next(iter(faults.values()))[1])
        else:
            usable.append(row)
    if lost:
        cli.say(
            f"{len(lost):,} of {len(rows):,} held-out questions are not asked: their picture "
            f"cannot be used, e.g. {lost[0]}"
        )
    return usable


def question_of(row: dict) -> str:
    """The last question of a row in words, for the report."""
    asked = [message for message in row["messages"] if message["role"] == "user"]
    content = asked[-1]["content"] if asked else ""
    if isinstance(content, str):
        return content
    words = [part["text"] if part["type"] == "text" else "<image>" for part in content]
    return "".join(words)
