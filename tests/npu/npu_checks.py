"""What tests/npu/test_npu.py runs inside a process that sees simulated NPUs: `npu_checks.py NAME [arguments]`."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import device  # before torch

import torch

FLAGS = {
    "bf16": False,
    "fp16": False,
    "optim": "adamw_torch",
    "torch_compile": False,
    "deepspeed": None,
}


def show(**facts):
    print(json.dumps({k: str(v) if isinstance(v, torch.dtype) else v for k, v in facts.items()}))


def facts():
    """What the helpers answer here, and what the libraries make of it."""
    from accelerate import PartialState
    from transformers import TrainingArguments

    defaults = device.training_defaults(set())
    from deepspeed.accelerator import get_accelerator

    training = TrainingArguments(output_dir="unused", report_to=[], **defaults)
    refused = {
        name: device.unsupported_flags(SimpleNamespace(**(FLAGS | flags)))
        for name, flags in {
            "bf16": {"bf16": True},
            "fp16 fused": {"fp16": True, "optim": "adamw_torch_fused"},
            "bf16 fused": {"bf16": True, "optim": "adamw_torch_fused"},
            "npu fused": {"optim": "adamw_torch_npu_fused"},
            "compile": {"torch_compile": True},
            "defaults": {k: v for k, v in defaults.items() if k in FLAGS},
        }.items()
    }
    try:
        with device.autocast(torch.bfloat16):
            autocast = "works"
    except SystemExit as error:
        autocast = str(error)
    show(
        kind=device.kind(), count=device.device_count(), half=device.half_dtype(), backend=device.dist_backend(),
        name=device.name(), varlen=device.varlen_attention(),
        saturates=device.overflow_saturates(), autocast=autocast, refused=refused,
        loaded="torch_npu" in sys.modules and sys.modules["torch_npu"] is not None,
        trainer=str(training.device), accelerate=str(PartialState().device), deepspeed=get_accelerator()._name,
        bf16=training.bf16, fp16=training.fp16, optim=str(training.optim.value),
    )  # fmt: skip


def join():
    """This rank's device, joined to the others over hccl."""
    here = device.device()
    torch.distributed.init_process_group(device.dist_backend())
    return here, int(os.environ["RANK"])


def ranks_equal(model) -> bool:
    mine = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(every, mine)
    return all(torch.equal(every[0], other) for other in every)


def scaler(which):
    """Six fp16 steps on two ranks; in the third the first rank alone overflows. Do the ranks stay together?"""
    here, rank = join()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).to(
        here
    )
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = (
        device.grad_scaler(torch.float16) if which == "ours" else torch.amp.GradScaler(here.type)
    )
    scales = []
    for step in range(6):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(16, 8).to(here)
        with device.autocast(torch.float16):
            loss = model(x).square().mean() * (1e6 if step == 2 and rank == 0 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    equal = ranks_equal(model.module)
    if rank == 0:
        show(equal=equal, scales=scales)


def deepspeed_overflow(guarded, config):
    """Four ZeRO steps in fp16 on two ranks; in the third rank 0 overflows. Which steps did the optimizer take?"""
    from common.runs.engine import patch_overflow_check

    import deepspeed

    here, rank = device.device(), int(os.environ["RANK"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    settings = json.loads(Path(config).read_text())
    settings |= {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }
    settings["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    del settings["train_batch_size"], settings["bf16"]
    for key in [k for k, v in settings["zero_optimization"].items() if v == "auto"]:
        del settings["zero_optimization"][key]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings
    )
    if guarded == "guarded":
        patch_overflow_check(optimizer)
    skipped = []
    for step in range(4):
        for micro in range(2):
            torch.manual_seed(100 * step + 10 * micro + rank)
            x = torch.randn(4, 8).to(here, torch.float16)
            factor = 1e5 if (step, micro, rank) == (2, 0, 0) else 1
            engine.backward(engine(x).float().square().mean() * factor)
            engine.step()
        skipped.append(engine.skipped_steps)
    if rank == 0:
        show(skipped=skipped, scale=optimizer.loss_scale)


def features(folder):
    """chinese_clip_ddp: two ranks keep what a teacher, whose vectors lie on the CPU, says of seven captions."""
    _, rank = join()
    os.environ["DANPU_CACHE"] = folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chinese_clip_ddp"))
    import feature_cache

    def embed(texts):
        return torch.tensor([[len(text), 1.0] for text in texts])

    texts = ["一" * (i + 1) for i in range(7)]
    found = feature_cache.features_of({"text": texts}, "text", ["teacher"], embed, None, size=2)
    if rank == 0:
        show(values=[found.of(row).tolist() for row in range(7)])


def known_defects():
    """Faults of the released packages that `device.training_defaults` and `device.unsupported_flags` steer around: are they still there?"""
    from accelerate.utils import get_grad_scaler

    here = device.device()
    found = {}

    def losses(make, clear):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(4).to(here))
        optimizer, x = make([weight]), torch.arange(4.0).to(here)
        out = []
        for _ in range(6):
            loss = (weight * x - 1).square().sum()
            loss.backward()
            optimizer.step()
            clear(optimizer, weight)
            out.append(round(loss.item(), 5))
        return out

    def cut(optimizer, weight):  # what Trainer does: model.zero_grad()
        weight.grad = None

    from torch_npu.optim import NpuFusedAdamW

    plain = losses(lambda p: torch.optim.AdamW(p, lr=0.1), cut)
    fused = losses(lambda p: NpuFusedAdamW(p, lr=0.1), cut)
    found["npu fused trains on stale gradients"] = plain[:2] == fused[:2] and plain != fused
    scaler = get_grad_scaler()
    weight = torch.nn.Parameter(torch.ones(4).to(here))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler.scale((weight * 2).sum()).backward()
    try:
        scaler.step(optimizer)
    except TypeError as error:
        found["fused AdamW takes no grad_scaler"] = "grad_scaler" in str(error)
    show(scaler=f"{type(scaler).__module__}.{type(scaler).__name__}", found=found)


def answers(model):
    """Greedy answers of a saved model on this device in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.runs.generate import generate_answers

    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model).to(device.device()).eval()
    ask = lambda q: tokenizer.apply_chat_template(
        [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    prompts = [
        ask(q) for q in ("你是谁", "2加3再加4，一共是多少？", "请把这句话倒过来写：天上有云")
    ]
    show(
        device=str(next(net.parameters()).device),
        answers=generate_answers(net, tokenizer, prompts, 24),
    )


def note_calls(used: set, module, *names):
    """Their names come into `used` when they are called."""
    for name in names:
        stock = getattr(module, name)
        setattr(
            module,
            name,
            lambda *a, _stock=stock, _name=name, **k: (used.add(_name), _stock(*a, **k))[1],
        )


def packing():
    """Loss and gradients of one packed row and of its documents one by one, per dtype and attention path."""
    import transformers

    from common import collators
    from common.fast import attention, attention_cpu

    attention.register()
    here, generator = device.device(), torch.Generator().manual_seed(0)
    lengths = (5, 1, 37, 64, 12)
    ids = [torch.randint(97, (n,), generator=generator).tolist() for n in lengths]
    rows = [{"row_id": i, "input_ids": x, "labels": [-100] * 2 + x[2:]} for i, x in enumerate(ids)]
    rows = [row | {"labels": row["labels"][: len(row["input_ids"])]} for row in rows]
    results, used = {}, set()
    note_calls(used, attention, "_npu_varlen", "_torch_varlen")
    note_calls(used, attention_cpu, "packed_attention")
    half = device.half_dtype()
    for dtype in (torch.float32, half):
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, use_cache=False,
        )  # fmt: skip
        config._attn_implementation = "packed"
        model = transformers.Qwen2ForCausalLM(config).to(here)
        used.clear()

        def run(rows, model=model, dtype=dtype):
            batch = collators.PackedCollator()([rows])
            batch = {
                k: v.to(here) if torch.is_tensor(v) else v
                for k, v in batch.items()
                if k != "row_ids"
            }
            model.zero_grad()
            with device.autocast(dtype):
                loss = model(**batch, num_items_in_batch=1).loss
            loss.backward()
            return loss.item(), [
                p.grad.clone() if p.grad is not None else 0 * p for p in model.parameters()
            ]

        total, grads = run(rows)
        alone = [run([row]) for row in rows if any(x != -100 for x in row["labels"][1:])]
        expected = [sum(g) for g in zip(*(g for _, g in alone), strict=True)]
        worst = max(
            ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
            for a, b in zip(grads, expected, strict=True)
        )
        results[str(dtype)] = {
            "loss": abs(total - sum(x for x, _ in alone)) / total, "grads": worst, "paths": sorted(used)
        }  # fmt: skip
    show(**results)


def packing_alibi():
    """As `packing`, for Bloom: beside its documents alone here also stock Bloom on the CPU in float32."""
    import copy

    import transformers

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chinese_bloom"))
    import bloom_attention

    from common import collators
    from common.fast import alibi, attention, attention_cpu

    here, generator, used, results = device.device(), torch.Generator().manual_seed(0), set(), {}
    ids = [torch.randint(97, (n,), generator=generator).tolist() for n in (5, 37, 300, 64, 12)]
    rows = [{"row_id": i, "input_ids": x, "labels": [-100] * 2 + x[2:]} for i, x in enumerate(ids)]
    note_calls(used, attention, "_npu_varlen", "_torch_varlen")
    note_calls(used, attention_cpu, "packed_attention")
    note_calls(used, alibi, "_on_cpu", "add_columns", "document_by_document")
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=96, n_layer=2, n_head=6, initializer_range=0.1
    )
    config._attn_implementation = "eager"
    stock = transformers.BloomForCausalLM(config)
    ours = bloom_attention.use(copy.deepcopy(stock)).to(here)

    def summed(found):
        losses, grads = zip(*found, strict=True)
        return sum(losses), [sum(g) for g in zip(*grads, strict=True)]

    def backward(model, **batch):
        model.zero_grad()
        loss = model(**batch, use_cache=False, num_items_in_batch=1).loss
        loss.backward()
        return loss.item(), [p.grad.float().cpu().clone() for p in model.parameters()]

    def packed(rows, dtype):
        batch = collators.PackedCollator()([rows])
        batch = {
            k: v.to(here) if torch.is_tensor(v) else v for k, v in batch.items() if k != "row_ids"
        }
        with device.autocast(dtype):
            return backward(ours, **batch)

    def apart(found, expected):
        grads = [
            ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
            for a, b in zip(found[1], expected[1], strict=True)
        ]
        return abs(found[0] - expected[0]) / expected[0], max(grads)

    tensors = [{k: torch.tensor([row[k]]) for k in ("input_ids", "labels")} for row in rows]
    truth = summed([backward(stock, **row) for row in tensors])
    for dtype in (torch.float32, device.half_dtype()):
        used.clear()
        whole = packed(rows, dtype)
        alone = summed([packed([row], dtype) for row in rows])
        (loss, grads), (cpu_loss, cpu_grads) = apart(whole, alone), apart(whole, truth)
        results[str(dtype)] = {
            "loss": loss, "grads": grads, "of_cpu_loss": cpu_loss, "of_cpu_grads": cpu_grads, "paths": sorted(used)
        }  # fmt: skip
    show(**results)


def packing_prefix():
    """As `packing`, for ChatGLM's two-sided prefixes: beside its documents alone here also on the CPU in float32."""
    import copy

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chatglm_lora"))
    from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    from common import collators
    from common.fast import attention, attention_cpu

    here, generator, used, results = device.device(), torch.Generator().manual_seed(0), set(), {}
    rows = []
    for i, (text, answer) in enumerate([(5, 3), (37, 12), (200, 90), (3, 61), (12, 1)]):
        ids = torch.randint(80, (text + answer,), generator=generator).tolist()
        ids = [*ids[:text], 91, 94, *ids[text:], 95]
        rows.append(
            {"row_id": i, "input_ids": ids, "labels": [-100] * (text + 2) + ids[text + 2 :]}
        )
    note_calls(used, attention, "_npu_varlen", "_torch_varlen")
    note_calls(used, attention_cpu, "packed_attention")
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=97, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=96, bos_token_id=94,
        pad_token_id=3, initializer_range=0.1,
    )  # fmt: skip
    on_cpu = ChatGLMForConditionalGeneration(config).train()
    ours = copy.deepcopy(on_cpu).to(here)

    def run(model, rows, dtype, place):
        batch = collators.PackedCollator()([rows])
        kept = {k: batch[k].to(place) for k in ("input_ids", "labels", "cu_seq_lens_q")}
        model.zero_grad()
        with torch.autocast(place.type, dtype, enabled=dtype is not torch.float32):
            loss = model(**kept, use_cache=False, num_items_in_batch=1).loss
        loss.backward()
        return loss.item(), [p.grad.float().cpu().clone() for p in model.parameters()]

    def apart(found, expected):
        grads = [
            ((a - b).norm() / b.norm().clamp(min=1e-6)).item()
            for a, b in zip(found[1], expected[1], strict=True)
        ]
        return abs(found[0] - expected[0]) / expected[0], max(grads)

    truth = run(on_cpu, rows, torch.float32, torch.device("cpu"))
    for dtype in (torch.float32, device.half_dtype()):
        used.clear()
        whole = run(ours, rows, dtype, here)
        losses, grads = zip(*[run(ours, [row], dtype, here) for row in rows], strict=True)
        alone = sum(losses), [sum(g) for g in zip(*grads, strict=True)]
        (loss, worst), (cpu_loss, cpu_grads) = apart(whole, alone), apart(whole, truth)
        results[str(dtype)] = {
            "loss": loss, "grads": worst, "of_cpu_loss": cpu_loss, "of_cpu_grads": cpu_grads, "paths": sorted(used)
        }  # fmt: skip
    show(**results)


def host_reads(folder, *names):
    """Where and how often the host waits for the device in two optimizer steps, by trainer: in
    their micro-batches ("micro") and in the rest."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    from host_reads import watch

    results = {}
    for name in names:
        (Path(folder) / name).mkdir()
        trainer = globals()[f"trainer_of_{name}"](Path(folder) / name)
        steps = range(2, 4)  # what is made once is there by then
        with watch(trainer, steps) as reads:
            trainer.train()
        found = {phase: dict(reads.found.get(phase, {})) for phase in ("micro", "step")}
        results[name] = {"steps": len(steps)} | found
    show(**results)


def token_rows(count=40):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(80, (20 + i % 9,), generator=generator).tolist()
        rows.append({"row_id": i, "input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return rows


def small_trainer(kind, model, folder, data, collate, **more):
    """4 optimizer steps of two micro-batches each, with the defaults that a run on this device
    gets."""
    from transformers import TrainingArguments

    from common.fast import losses

    flags = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": [],
    } | device.training_defaults(set())
    return kind(
        model=losses.use_chunked_loss(model),
        args=TrainingArguments(output_dir=str(folder), **flags),
        train_dataset=data,
        data_collator=collate,
        **more,
    )


def qwen():
    import transformers

    from common.fast import attention

    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = attention.register()
    return transformers.Qwen2ForCausalLM(config)


def trainer_of_qwen(folder):
    from common import collators
    from common.trainer import RecipeTrainer

    data = collators.PackedDataset(token_rows(), 64)
    return small_trainer(RecipeTrainer, qwen(), folder, data, collators.PackedCollator())


def trainer_of_padded(folder):
    from common import collators
    from common.trainer import RecipeTrainer

    data = collators.NumberedRows(token_rows())
    return small_trainer(RecipeTrainer, qwen(), folder, data, collators.PaddedCollator(0))


def trainer_of_bloom(folder):
    import transformers

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chinese_bloom"))
    import bloom_attention

    from common import collators
    from common.trainer import RecipeTrainer

    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=96, n_layer=2, n_head=6, initializer_range=0.1
    )
    config.use_cache = False
    model = bloom_attention.use(transformers.BloomForCausalLM(config))
    data = collators.PackedDataset(token_rows(), 64)
    return small_trainer(RecipeTrainer, model, folder, data, collators.PackedCollator())


def trainer_of_chatglm(folder):
    from functools import partial

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chatglm_lora"))
    import train
    from modeling_chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration

    from common import collators
    from common.trainer import RecipeTrainer

    config = ChatGLMConfig(
        vocab_size=97, hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=96, bos_token_id=94,
        pad_token_id=3, initializer_range=0.1, use_cache=False, gmask_token_id=91, mask_token_id=90,
    )  # fmt: skip
    rows = token_rows()
    for row in rows:
        row["input_ids"] = [*row["input_ids"][:3], 91, 94, *row["input_ids"][3:]]
        row["labels"] = [-100, -100, *row["labels"]]
    model = ChatGLMForConditionalGeneration(config)
    data = collators.PackedDataset(rows, 64)
    collate = partial(train.with_layout, collate=collators.PackedCollator(), config=config)
    return small_trainer(RecipeTrainer, model, folder, data, collate)


def trainer_of_dpo(folder):
    import datasets

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "baichuan2_dpo"))
    import preference

    from common.fast import shared_start

    name = shared_start.register()
    model = qwen()
    model.config._attn_implementation = name
    pairs = []
    for row in token_rows():
        ids = row["input_ids"]
        rejected = [*ids[:5], *(96 - i for i in ids[5:])]
        sides = {"chosen_input_ids": ids, "chosen_labels": row["labels"]}
        sides |= {"rejected_input_ids": rejected, "rejected_labels": [-100] * 3 + rejected[3:]}
        pairs.append(sides)
    data = preference.Pairs(datasets.Dataset.from_list(pairs))
    more = {"loss": {"kind": "sigmoid"}, "reference": "model"}
    more["load_reference"] = reference_of_dpo
    return small_trainer(
        preference.PreferenceTrainer, model, folder, data, preference.PairCollator(0), **more
    )


def reference_of_dpo():
    from common.fast import losses

    model = qwen()
    model.config._attn_implementation = "packed_shared_start"
    return losses.use_chunked_loss(model)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
