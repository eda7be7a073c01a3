"""Answer a file of questions with a trained model: a run's output folder, an adapter, a model
folder or a hub id.

    python chatglm_lora/infer.py --input questions.jsonl --output answers.jsonl          # what train_zero2.sh left
    python chatglm_lora/infer.py --model output/my_run --input q.csv --output a.jsonl --temperature 0.95 --top_p 0.7
    python chatglm_lora/infer.py ... --device_map auto                                   # one model over many devices
    python chatglm_lora/infer.py ... --device_map auto --max_memory "0:10GiB,cpu:30GiB" --offload_folder offload
    NPROC=4 bash chatglm_lora/infer.sh ...                                               # a whole model on each of 4
    NPROC=2 bash chatglm_lora/infer_deepspeed.sh ...                                     # every block shared by 2 ranks
    the same command again                                                               # continues after a crash

Input: .jsonl .json .csv .tsv .txt (a question a line) .parquet, also .gz and folders;
{"instruction", "input"}, {"question"}, {"prompt"}, {"content"}, {"context"}, {"messages": [...]}
and the other shapes of the training data, whose answers, where there are any, are kept as
reference. Output: one JSON object for each row, in order: row, source, messages, answer, tokens,
finish_reason (stop, length), or error. While it runs, finished batches stand in OUTPUT.part-RANK,
and OUTPUT.run.json says what the run is. A row's answer does not depend on the number of processes
or on where a run was interrupted, also when drawn (--temperature): each row has random numbers of
its own.

In a notebook: `from infer import answer, load`; `answer(load("output/chatglm_lora"), ["你是谁？"])`.
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
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from answers import Settings, answer, answer_batch, batches, check, options, read, record  # noqa: F401
from common.convert import adapter
from common.data import files
from common.demo.chat_model import find_model
from common.data.labels import fingerprint
from output_file import Output
from placement import MAPS, load, refusal

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# ---- command line -----------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, default = parser.add_argument, str(HERE.parent / "output" / HERE.name)
    add(
        "--model",
        "--model_name_or_path",
        default=default,
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
        default=f"{default}_answers",
        help="a .jsonl file, or a folder for answers.jsonl",
    )
    add("--overwrite", action="store_true", help="start anew, whatever an earlier run left there")
    add(
        "--column_map",
        default="",
        help="rename columns: instruction=问题,output=回答 (ours=theirs)",
    )
    add("--num_rows", type=int, help="only so many rows")
    for option in options():
        add(
            f"--{option.name}",
            type=type(option.default),
            default=option.default,
            help=option.metadata["help"],
        )
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights; auto: half on accelerators, float32 on a CPU",
    )
    add("--device_map", choices=MAPS, help="spread the blocks over all visible devices")
    add(
        "--max_memory",
        help='for --device_map: what weights may take, like "0:20GiB,1:20GiB,cpu:60GiB"',
    )
    add(
        "--offload_folder", help="for --device_map: blocks that fit nowhere else are read from here"
    )
    add(
        "--tensor_parallel",
        default="1",
        help="ranks that share every block, or auto: all there are",
    )
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher gives it
    args = parser.parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    args.tensor_parallel = str(world) if args.tensor_parallel == "auto" else args.tensor_parallel
    if problem := _contradiction(args, world):
        raise cli.usage_error(problem)
    args.tensor_parallel = int(args.tensor_parallel)
    args.output = Path(args.output).expanduser()
    args.output = args.output if args.output.suffix == ".jsonl" else args.output / "answers.jsonl"
    return args


def _contradiction(args, world: int) -> str | None:
    if not args.tensor_parallel.isdigit() or int(args.tensor_parallel) < 1:
        return f"--tensor_parallel {args.tensor_parallel}: a number of ranks, or auto"
    if int(args.tensor_parallel) not in (1, world):
        wanted = args.tensor_parallel
        return f"--tensor_parallel {wanted} needs as many processes, not {world}: NPROC={wanted} bash infer_deepspeed.sh"
    if args.device_map and world > 1:
        return "--device_map spreads one model over all devices: one process, without NPROC or --tensor_parallel"
    if (args.max_memory or args.offload_folder) and not args.device_map:
        return "--max_memory and --offload_folder belong to --device_map: add --device_map auto"
    if args.num_rows is not None and args.num_rows < 1:
        return f"--num_rows {args.num_rows} makes no sense"
    return None


# ---- the run ----------------------------------------------------------------------------------------------------


def facts_of(args, settings: Settings) -> dict:
    """What decides the answers, refused where it cannot work: settings, model, tokenizer, bytes of
    the input."""
    path = find_model(args.model)
    base = adapter.check_base(path) if (Path(path) / "adapter_config.json").is_file() else path
    config, tokenizer = (
        cli.load(AutoConfig, base, "--model"),
        cli.load(AutoTokenizer, path, "--model"),
    )
    if problem := args.tensor_parallel > 1 and refusal(config, args.tensor_parallel):
        raise SystemExit(problem)
    check(settings, getattr(config, "max_position_embeddings", None) or 2048)
    weights = [
        adapter.base_fingerprint(p) if Path(p).is_dir() else config._commit_hash
        for p in (path, base)
    ]
    inputs = [file for found, _ in files.entries(args.input) for file in files.data_files(found)[0]]
    if args.output.resolve() in [file.resolve() for file in inputs]:
        raise SystemExit(f"--output {args.output} is the input")
    facts = {k: getattr(args, k) for k in ("column_map", "num_rows", "dtype", "tensor_parallel")}
    return (
        asdict(settings)
        | facts
        | {
            "model": weights,
            "tokenizer": fingerprint(tokenizer),
            "device": device.kind(),
            "input": {str(file): files.sha256(file) for file in inputs},
        }
    )


def on_first_rank(action):
    """Run `action` on rank 0 and give every rank its result, or its end."""
    box = [None, None]
    if cli.is_main():
        try:
            box[0] = action()
        except SystemExit as end:
            box[1] = 0 if end.code is None else end.code
    if dist.is_initialized():
        dist.broadcast_object_list(
            box, src=0, device=device.device() if dist.get_backend() != "gloo" else None
        )
    if box[1] is not None:
        raise SystemExit(box[1])
    return box[0]


def run(args, settings: Settings) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # ranks end at very different times
        backend = device.dist_backend() if args.tensor_parallel > 1 else "gloo"
        device.device()
        dist.init_process_group(backend, timeout=timedelta(days=7))
    output, questions = Output(args.output), list(read(args.input, args.column_map, args.num_rows))
    facts = on_first_rank(lambda: facts_of(args, settings))
    if not questions:
        raise SystemExit(f"--input {args.input}: no rows")
    done = on_first_rank(lambda: output.begin(facts, args.overwrite))
    wrong = [q for q in questions if q.error and q.row not in done]
    todo = [
        batch
        for batch in batches(questions, settings.batch_size)
        if any(q.row not in done for q in batch)
    ]
    unusable = sum(q.error is not None for q in questions)
    cli.say(f"{len(questions):,} rows, {len(done):,} of them done before, {unusable:,} not usable")
    shared = args.tensor_parallel > 1
    began, tokens = time.perf_counter(), 0
    if wrong and cli.is_main():
        output.write([record(q, {"error": q.error}) for q in wrong])
    if todo:
        loaded = load(
            args.model,
            args.device_map,
            args.max_memory,
            args.offload_folder,
            args.tensor_parallel,
            DTYPES[args.dtype],
        )
        mine = todo if shared else todo[rank::world]
        began = time.perf_counter()
        tokens = answer_all(loaded, mine, settings, output if cli.is_main() or not shared else None)
    seconds = time.perf_counter() - began
    if world > 1:
        total = torch.tensor(
            0 if shared and rank else tokens, device=device.device() if shared else None
        )
        dist.all_reduce(total)
        tokens = int(total)
    summary = on_first_rank(lambda: sum_up(output.finish(facts, len(questions))))
    cli.say(
        f"{summary}; {tokens:,} new tokens in {seconds:,.1f} s ({tokens / seconds:,.0f}/s) -> {args.output}"
    )


def answer_all(loaded, todo: list, settings: Settings, output: Output | None) -> int:
    """Answer batches and write them as they come; -> new tokens. The bar is that of the first
    rank's own share."""
    from tqdm import tqdm

    began, tokens, costs = time.perf_counter(), 0, set()
    pace = 0.2 if sys.stderr.isatty() else 30  # seconds
    with tqdm(
        total=sum(map(len, todo)), unit="row", mininterval=pace, disable=not cli.is_main()
    ) as bar:
        for batch in todo:
            records = answer_batch(loaded, batch, settings, costs)
            if output:
                output.write(records)
            tokens += sum(r.get("tokens", 0) for r in records)
            bar.set_postfix_str(
                f"{tokens / (time.perf_counter() - began):,.0f} new tokens/s", refresh=False
            )
            bar.update(len(batch))
    return tokens


def sum_up(records: list[dict]) -> str:
    """One line: how many rows were answered, how many end in what way, and where errors are."""
    wrong = [r for r in records if "error" in r]
    ways = Counter(r.get("finish_reason", "error") for r in records)
    told = f"{len(records):,} rows: {ways['stop']:,} answered whole, {ways['length']:,} cut at --max_new_tokens"
    told += (
        f", {n:,} with a shortened question"
        if (n := sum("shortened" in r for r in records))
        else ""
    )
    reasons = Counter(r["error"].split(" (")[0] for r in wrong)
    listed = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common(3))
    return told + (
        f"; {len(wrong):,} with an error ({listed}; first: {wrong[0]['source']})" if wrong else ""
    )


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    try:
        run(args, Settings(**{option.name: getattr(args, option.name) for option in options()}))
    except torch.OutOfMemoryError:
        raise SystemExit(
            "the model does not fit: --device_map auto spreads it over all devices, with --offload_folder onto the disk"
        ) from None
    except SystemExit as end:
        if end.code == cli.INTERRUPTED:
            cli.say("interrupted; the same command again continues")
        raise


if __name__ == "__main__":
    cli.run(main)
