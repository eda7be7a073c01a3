"""Answer a file of questions with a trained model: a run's output folder, an adapter, a model
folder or a hub id.

    python chatglm_lora/infer.py --input q.jsonl --output a.jsonl    # with what train_zero2.sh left
    python chatglm_lora/infer.py --model output/my_run --input q.csv --temperature 0.95 --top_p 0.7
    python chatglm_lora/infer.py ... --device_map auto               # one model over many devices
    python chatglm_lora/infer.py ... --device_map auto --max_memory "0:10GiB,cpu:30GiB" \\
        --offload_folder offload
    NPROC=4 bash chatglm_lora/infer.sh ...                           # a whole model on each of 4
    NPROC=2 bash chatglm_lora/infer_deepspeed.sh ...                 # every block shared by 2 ranks
    the same command again                                           # continues after a crash

Input: .jsonl .json .csv .tsv .txt (a question a line) .parquet, also .gz and folders;
{"instruction", "input"}, {"question"}, {"prompt"}, {"content"}, {"context"}, {"messages": [...]}
and the other shapes of the training data, whose answers, where there are any, are kept as
reference. Output: one JSON object for each row, in order: row, source, messages, answer, tokens,
finish_reason (stop, length), or error. While it runs, finished batches stand in OUTPUT.part-RANK,
and OUTPUT.run.json says what the run is. A row's answer does not depend on the number of processes
or on where a run was interrupted, also when drawn (--temperature): each row has random numbers of
its own.

In a notebook: `from infer import answer, load`, then
`answer(load("output/chatglm_lora"), ["你是谁？"])`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import os
import time
from collections import Counter
from dataclasses import asdict, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from answers import Settings, answer, answer_batch, check, record  # noqa: F401  (answer: notebooks)
from common.convert import adapter, models
from common.data import files
from common.data.labels import fingerprint
from common.data.progress import Progress
from common.demo.chat_model import find_model
from common.runs import heartbeat
from output_file import Output
from placement import MAPS, load, refusal
from questions import batches, read

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEFAULT = HERE.parent / "output" / HERE.name  # what train.py leaves


# ---- command line --------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.tensor_parallel == "auto":
        args.tensor_parallel = str(world)
    problem = contradiction(args, world)
    if problem:
        raise cli.usage_error(problem)
    args.tensor_parallel = int(args.tensor_parallel)
    args.output = Path(args.output).expanduser()
    if args.output.suffix != ".jsonl":
        args.output = args.output / "answers.jsonl"
    return args


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    # MODEL, DATA and OUTPUT come from infer.sh under the names that train.py has for them
    add(
        "--model",
        "--model_name_or_path",
        default=str(DEFAULT),
        help="run, adapter or model folder, or hub id",
    )
    add(
        "--input",
        "--data_path",
        default=str(HERE / "data"),
        help="files or folders; unset: the samples",
    )
    add(
        "--output",
        "--output_dir",
        default=f"{DEFAULT}_answers",
        help="a .jsonl file, or a folder for answers.jsonl",
    )
    add("--overwrite", action="store_true", help="start anew, whatever an earlier run left there")
    add(
        "--column_map",
        default="",
        help="rename columns: instruction=问题,output=回答 (ours=theirs)",
    )
    add("--num_rows", type=int, help="only so many rows")
    for one in fields(Settings):
        add(
            f"--{one.name}",
            type=type(one.default),
            default=one.default,
            help=one.metadata["help"],
        )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights; auto: half on accelerators, float32 on a CPU",
    )
    add("--device_map", choices=MAPS, help="spread the blocks over all visible devices")
    add(
        "--max_memory", help='with --device_map: room for weights, like "0:20GiB,1:20GiB,cpu:60GiB"'
    )
    add(
        "--offload_folder",
        help="with --device_map: blocks that fit nowhere else are read from here",
    )
    add(
        "--tensor_parallel",
        default="1",
        help="ranks that share every block, or auto: all there are",
    )
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    return parser


def contradiction(args, world: int) -> str | None:
    """Why these flags cannot go together in `world` processes, else None."""
    wanted = args.tensor_parallel
    if not wanted.isdigit() or int(wanted) < 1:
        return f"--tensor_parallel {wanted}: a number of ranks, or auto"
    if int(wanted) not in (1, world):
        return (
            f"--tensor_parallel {wanted} needs as many processes, not {world}: "
            f"NPROC={wanted} bash infer_deepspeed.sh"
        )
    if args.device_map and world > 1:
        return (
            "--device_map spreads one model over all devices: one process, without NPROC or "
            "--tensor_parallel"
        )
    if (args.max_memory or args.offload_folder) and not args.device_map:
        return "--max_memory and --offload_folder belong to --device_map: add --device_map auto"
    if args.num_rows is not None and args.num_rows < 1:
        return f"--num_rows {args.num_rows} makes no sense"
    return None


def settings_of(args) -> Settings:
    return Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})


# ---- the run -------------------------------------------------------------------------------------


def run(args, settings: Settings) -> None:
    """Answer what is not answered yet, on this rank's share of the batches; the first rank puts
    the file together."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    shared = args.tensor_parallel > 1  # then all ranks answer every batch, and one of them writes
    if world > 1:
        open_process_group(shared)
    output = Output(args.output)
    questions = list(read(args.input, args.column_map, args.num_rows))
    facts = on_first_rank(lambda: facts_of(args, settings))
    if not questions:
        raise SystemExit(f"--input {args.input}: no rows")
    done = on_first_rank(lambda: output.begin(facts, args.overwrite))
    unusable = [q for q in questions if q.error]
    cli.say(
        f"{len(questions):,} rows, {len(done):,} of them done before, {len(unusable):,} not usable"
    )
    if cli.is_main():
        output.write([record(q, {"error": q.error}) for q in unusable if q.row not in done])

    # whole batches, so that no row has other neighbours than in a run that was not interrupted
    todo = [
        batch
        for batch in batches(questions, settings.batch_size)
        if any(q.row not in done for q in batch)
    ]
    tokens = 0
    seconds = 0.0
    if todo:
        loaded = load_model(args)
        mine = todo if shared else todo[rank::world]
        writes = cli.is_main() or not shared
        began = time.perf_counter()
        tokens = answer_all(loaded, mine, settings, output if writes else None)
        tokens = sum_over_ranks(tokens, world, shared)
        seconds = time.perf_counter() - began
    summary = on_first_rank(lambda: sum_up(output.finish(facts, len(questions))))
    speed = tokens / seconds if seconds else 0
    cli.say(
        f"{summary}; {tokens:,} new tokens in {seconds:,.1f} s ({speed:,.0f}/s) -> {args.output}"
    )


def open_process_group(shared: bool) -> None:
    backend = device.dist_backend() if shared else "gloo"
    device.device()
    device.limit_collectives(device.DDP_TIMEOUT)
    dist.init_process_group(backend, timeout=timedelta(seconds=device.DDP_TIMEOUT))
    heartbeat.start(device.DDP_TIMEOUT)


def on_first_rank(action):
    """Run `action` on rank 0 and give every rank its result, or its end."""
    result = None
    end = None
    if cli.is_main():
        try:
            result = action()
        except SystemExit as error:
            end = 0 if error.code is None else error.code
    box = [result, end]
    # without shared blocks the ranks end at very different times
    cli.wait_for_all("it reads or writes the file")
    if dist.is_initialized():
        where = None if dist.get_backend() == "gloo" else device.device()
        dist.broadcast_object_list(box, src=0, device=where)
    result, end = box
    if end is not None:
        raise SystemExit(end)
    return result


def sum_over_ranks(tokens: int, world: int, shared: bool) -> int:
    """New tokens of all ranks; where blocks are shared, all have generated the same ones."""
    if world == 1 or shared:
        return tokens
    total = torch.tensor(tokens)
    cli.wait_for_all("it answers its share")
    dist.all_reduce(total)
    return int(total)


def facts_of(args, settings: Settings) -> dict:
    """What decides the answers, refused where it cannot work: settings, model, tokenizer, bytes of
    the input."""
    path = find_model(args.model)
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    base = adapter.check_base(path) if is_adapter else path
    config = models.load(AutoConfig, base, "--model")
    tokenizer = models.load(AutoTokenizer, path, "--model")
    problem = refusal(config, args.tensor_parallel) if args.tensor_parallel > 1 else None
    if problem:
        raise SystemExit(problem)
    check(settings, getattr(config, "max_position_embeddings", None) or 2048)
    inputs = [file for found, _ in files.entries(args.input) for file in files.data_files(found)[0]]
    if args.output.resolve() in [file.resolve() for file in inputs]:
        raise SystemExit(f"--output {args.output} is the input")
    flags = ("column_map", "num_rows", "dtype", "tensor_parallel")
    facts = asdict(settings) | {name: getattr(args, name) for name in flags}
    return facts | {
        "model": [weights_of(path, config), weights_of(base, config)],
        "tokenizer": fingerprint(tokenizer),
        "device": device.kind(),
        "input": {str(file): files.sha256(file) for file in inputs},
    }


def weights_of(model: str, config) -> str | None:
    """What tells the weights of a folder, or of a hub id, from others."""
    return adapter.base_fingerprint(model) if Path(model).is_dir() else config._commit_hash


def load_model(args):
    return load(
        args.model,
        args.device_map,
        args.max_memory,
        args.offload_folder,
        args.tensor_parallel,
        DTYPES[args.dtype],
    )


def answer_all(loaded, todo: list, settings: Settings, output: Output | None) -> int:
    """Answer batches and write them as they come; -> new tokens. The progress is that of the first
    rank's own share."""
    tokens = 0
    too_large: set = set()
    with Progress("answer", total=sum(map(len, todo)), unit="rows") as progress:
        for batch in todo:
            records = answer_batch(loaded, batch, settings, too_large)
            if output:
                output.write(records)
            tokens += sum(one.get("tokens", 0) for one in records)
            progress.update(len(batch))
    return tokens


def sum_up(records: list[dict]) -> str:
    """One line: how many rows were answered, how many end in what way, and where errors are."""
    ends = Counter(one.get("finish_reason", "error") for one in records)
    text = (
        f"{len(records):,} rows: {ends['stop']:,} answered whole, "
        f"{ends['length']:,} cut at --max_new_tokens"
    )
    shortened = sum("shortened" in one for one in records)
    if shortened:
        text += f", {shortened:,} with a shortened question"
    wrong = [one for one in records if "error" in one]
    if wrong:
        reasons = Counter(one["error"].split(" (")[0] for one in wrong)
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        text += f"; {len(wrong):,} with an error ({listed}; first: {wrong[0]['source']})"
    return text


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    try:
        run(args, settings_of(args))
    except torch.OutOfMemoryError:
        raise SystemExit(
            "the model does not fit: --device_map auto spreads it over all devices, with "
            "--offload_folder onto the disk"
        ) from None
    except SystemExit as end:
        if end.code == cli.INTERRUPTED:
            cli.say("interrupted; the same command again continues")
        raise


if __name__ == "__main__":
    cli.run(main)
