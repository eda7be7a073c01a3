"""The estimate of memory before a run: held to what runs take, and what is done where it will not do."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, expect, finish, own_modules, start
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from common import device, tiny, voice
from common.convert import models
from common.fast import losses, softmax
from common.runs import engine, memory_check, memory_plan
from common.runs.memory_plan import GIB, Setup

LIVE_BYTES = ROOT / "tests/support/live_bytes.py"
A2 = "Ascend910B2"


# ---- estimates against what is measured ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A model small enough for a test whose memory goes to activations. Rows are short and heads few: the
    simulated NPU's attention, unlike a real one, keeps a table of scores for each document and head."""
    folder = tmp_path_factory.mktemp("sizes")
    words = "一二三四五六七八九十百千万"
    tokenizer = tiny.make_tokenizer(
        [words] * 20,
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(ROOT / "train_qwen/chat_template.jinja").read_text(encoding="utf-8"),
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
    )
    model = tiny.save_tiny(config, tokenizer, folder / "cache")
    rows = ["".join(words[i * k % 13] for k in range(1, 41)) for i in range(400)]
    chats = [{"question": f"第{i}", "answer": row} for i, row in enumerate(rows)]
    pairs = [
        {"prompt": f"第{i}", "chosen": row[:16], "rejected": row[-16:]}
        for i, row in enumerate(rows)
    ]
    for name, kind in {"chats": chats, "pairs": pairs}.items():
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in kind)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return SimpleNamespace(model=model, chats=folder / "chats.jsonl", pairs=folder / "pairs.jsonl")


RUNS = {  # recipe, and flags that make it this kind of run
    "full": ("train_qwen", []),
    "LoRA": ("train_qwen", ["--use_lora", "true"]),
    "DPO": ("baichuan2_dpo", ["--per_device_train_batch_size", 24]),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "npu"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_estimate_is_what_a_run_takes(sizes, npu, tmp_path, kind, place):
    recipe, flags = RUNS[kind]
    data = sizes.pairs if kind == "DPO" else sizes.chats
    script = ROOT / recipe / "train.py"
    common = ["--model_name_or_path", sizes.model, "--data_path", data, "--output_dir", tmp_path]
    common += ["--model_max_length", 512, "--max_steps", 2, "--eval_generate", 0]
    common += [
        "--max_eval_samples",
        4,
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--gradient_accumulation_steps",
        2,
    ]
    env = npu(A2, 2) if place == "npu" else {}
    done = expect(finish(start(["python", LIVE_BYTES, script, *common, *flags], **env)))
    told = re.search(r"memory: about (\d+) MiB in each", done.stdout)
    estimate = int(told[1]) * 2**20
    measured = json.loads(done.stdout.rpartition("PEAK ")[2])["bytes"]
    assert measured > 40 * 2**20, "too little to mean anything"
    assert abs(estimate / measured - 1) < 0.2, f"{estimate:,} estimated, {measured:,} taken"


def saved_bytes(model, ids, half: bool) -> int:
    """What autograd keeps in one forward, weights and autocast's copies of them left out."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {weight.shape for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


KEPT = {  # how a model is trained: the dtype of its weights, autocast, Setup
    "masters": (torch.float32, True, {}),
    "recomputed": (torch.float32, True, {"recompute": True}),
    "float32": (torch.float32, False, {"half": False}),
    "adapter": (torch.bfloat16, True, {"adapter": 1}),
    "ZeRO": (torch.bfloat16, False, {"engine": "zero-2"}),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_layers_keep_is_what_torch_keeps(sizes, case):
    dtype, autocast, changes = KEPT[case]
    model = AutoModelForCausalLM.from_pretrained(sizes.model, dtype=dtype).train()
    losses.use_chunked_loss(model)
    if "recompute" in changes:
        model.gradient_checkpointing_enable()
    facts = memory_plan.config_facts(model.config)
    facts |= memory_plan.weight_facts({n: p.shape for n, p in model.named_parameters()}, True)
    if "adapter" in changes:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        model = get_peft_model(model, adapter)
        changes = {**changes, "adapter_ranks": 8 * 7 * 6}
    counted = saved_bytes(model, torch.randint(0, 50, (2, 200)), autocast)
    how = Setup(tokens=400, **changes)
    estimate = memory_plan.kept(facts, how)
    # the last norm and the head keep something too
    assert abs(estimate - counted) < 0.05 * counted + 400 * 128 * 16, (estimate, counted)


def test_the_constants_are_those_of_the_losses():
    assert memory_plan.LOGITS == losses.ACCELERATOR_LOGITS
    for name in ("CPU_ROWS", "FEWEST_ROWS", "MOST_ROWS"):
        assert getattr(memory_plan, name) == getattr(losses, name)
    assert memory_plan.CPU_SOFTMAX == softmax.CACHE_ELEMENTS
    assert memory_plan.COMPILED_VOCABULARY == softmax.COMPILED_VOCABULARY


def test_a_compiled_softmax_needs_no_float32_buffer():
    """A chunk of logits in bfloat16, and where it is not compiled its float32 copy."""
    facts = {"vocab_size": 151_936}
    plain = memory_plan.head_work(facts, Setup(tokens=4096))
    compiled = memory_plan.head_work(facts, Setup(tokens=4096, compiles=True))
    assert plain == 3 * compiled and 0.9 * 2**28 < compiled <= 2**28
    toy = {"vocab_size": 500}
    assert memory_plan.head_work(toy, Setup(tokens=10, compiles=True)) == 6 * 10 * 500


def test_states_by_hand():
    """7e9 parameters: bytes of each as the recipes hold them."""
    facts = {"parameters": 7e9, "sides": 1e7, "matrices": 6e9, "vocab_size": 1, "hidden_size": 1}

    def of(**how):
        parts = memory_plan.states(facts, Setup(tokens=1, **how))
        return [parts[name] for name in ("weights", "gradients", "optimizer")]

    assert of(engine="ddp", cards=8) == [28e9, 28e9, 56e9]
    assert of(engine="zero-2", cards=8) == [14e9, 14e9 / 8, 84e9 / 8]
    assert of(engine="zero-3", cards=8) == [14e9 / 8, 14e9 / 8, 84e9 / 8]
    assert of(adapter=16 * 10**7) == [14e9 + 64e7, 64e7, 128e7]
    four_bit = of(adapter=16 * 10**7, four_bit=True)[0]
    assert four_bit == pytest.approx(6e9 * 0.516 + 2e9 + 64e7)
    shapeless = facts | dict.fromkeys(memory_plan.NAMES)
    offload = Setup(tokens=1, engine="zero-3", offload=frozenset({"optimizer", "weights"}))
    need = memory_plan.estimate(shapeless, offload)
    assert need.host == 16 * 7e9 and need.weights == need.optimizer == 0
    assert need.peak == 2 * memory_plan.LIVE, "what is gathered at a time"


# ---- before the first step ----------------------------------------------------------------------------------

EIGHT_B = Qwen3Config(  # Qwen3-8B
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)


def flags_of(**changes):
    """(args, training) of a run in bf16."""
    args = {
        "use_lora": False,
        "target_modules": "all-linear",
        "lora_r": 16,
        "model_max_length": 2048,
        "no_memory_check": False,
    }
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "fp16": False}
    training |= {"bf16": True, "gradient_checkpointing": False, "optim": "adamw_torch_fused"}
    training |= {"world_size": 1, "hf_deepspeed_config": None}
    mine = {name: changes.pop(name) for name in [*changes] if name in args or "4bit" in name}
    return SimpleNamespace(**args | mine), SimpleNamespace(**training | changes)


def test_a_run_that_does_not_fit_ends_with_three_changes(monkeypatch, capsys):
    monkeypatch.setattr(memory_check.memory, "host_bytes", lambda: 80 * GIB)
    state = torch.get_rng_state()
    with pytest.raises(SystemExit) as stopped:
        memory_check.check_tokens(*flags_of(use_lora=True, lora_r=200), EIGHT_B, 8192)
    assert torch.equal(state, torch.get_rng_state()), "the run draws the same numbers"
    line = str(stopped.value)
    assert "\n" not in line and "needed, 80.0 GiB free on" in line
    changes = line.partition("Cheapest changes: ")[2].split("; ")
    assert changes[0].startswith("--gradient_checkpointing true (")
    assert changes[1].startswith(
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 8 ("
    )
    assert "--no_memory_check true" in changes[2] and len(changes) == 3

    # what suffices comes before what does not: all weights never fit into 80 GiB
    with pytest.raises(SystemExit, match="Cheapest changes: --use_lora true"):
        memory_check.check_tokens(*flags_of(gradient_checkpointing=True), EIGHT_B, 4096)
    memory_check.check_tokens(*flags_of(no_memory_check=True), EIGHT_B, 4096)
    assert "warning: the run would not fit: about " in capsys.readouterr().out
    memory_check.check_tokens(*flags_of(use_lora=True, gradient_checkpointing=True), EIGHT_B, 4096)
    said = capsys.readouterr().out
    assert re.fullmatch(r"memory: about \d\d\.\d GiB in each process \(weights 15\.4 .*\n", said)
    memory_check.check_tokens(
        *flags_of(), LlamaConfig(quantization_config={"quant_method": "x"}), 1
    )
    assert "no estimate" in capsys.readouterr().out


def test_ranks_share_the_memory_of_a_cpu_and_of_what_is_offloaded(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for name in ("host_bytes", "free_bytes"):
        monkeypatch.setattr(memory_check.memory, name, lambda: 100 * GIB)
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    zero = {"hf_deepspeed_config": SimpleNamespace(config=config), "world_size": 8}
    with pytest.raises(SystemExit, match=r"about \d\d\d\.\d GiB needed for 8 processes"):
        memory_check.check_tokens(*flags_of(**zero), EIGHT_B, 4096)
    monkeypatch.setattr(device, "kind", lambda: "npu")
    monkeypatch.setattr(device, "name", lambda: "a card")
    # 14 bytes a parameter
    with pytest.raises(SystemExit, match=r"about 106\.\d GiB of host memory needed"):
        memory_check.check_tokens(*flags_of(**zero), EIGHT_B, 1024)


@pytest.mark.parametrize(
    "kind, given, four_bit, layers, on",
    [
        ("npu", set(), False, 36, True),
        ("npu", set(), False, 4, False),
        ("npu", set(), True, 4, True),
        ("npu", {"gradient_checkpointing"}, True, 36, False),
        ("npu", {"activation_checkpointing"}, False, 36, False),
        ("cpu", set(), False, 36, False),
    ],
)
def test_large_models_recompute_on_accelerators(monkeypatch, kind, given, four_bit, layers, on):
    monkeypatch.setattr(device, "kind", lambda: kind)
    monkeypatch.setattr(voice, "given", given)
    args, training = flags_of(load_in_4bit=four_bit)
    config = Qwen3Config(**EIGHT_B.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    memory_check.recompute_large(args, training, config)
    assert training.gradient_checkpointing is on


# ---- the dtype at load --------------------------------------------------------------------------------------

ZERO_2 = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
LOADER = """
import json, re, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = [{root!r}, {root!r} + "/train_qwen"]
from common import device
import train
from transformers import AutoModelForCausalLM

def private():
    found = re.search(r"Private_Dirty: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024

config = SimpleNamespace(config={{"zero_optimization": {{"stage": 2}}}})
training = SimpleNamespace(bf16=True, fp16=False, world_size=2)
training.hf_deepspeed_config = config if sys.argv[1] == "zero" else None
args = SimpleNamespace(use_lora=False, load_in_4bit=False, freeze_layers=0)
args.model_name_or_path = sys.argv[2]
before = private()
model = train.load_model(args, training, sys.argv[2])
print(json.dumps((private() - before) / model.num_parameters()))
"""


def test_private_memory_of_ranks_that_load(tmp_path):
    """Under DeepSpeed the weights stay the mapped file, one for all ranks; masters of their own are float32."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts pages as Linux does")
    config = LlamaConfig(
        vocab_size=40_000,
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    shapes = memory_check.shapes_of(config)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert 180e6 < (tmp_path / "model.safetensors").stat().st_size < 220e6
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    script = tmp_path / "load.py"
    script.write_text(LOADER.format(root=str(ROOT)), encoding="utf-8")
    ranks = [start(["python", script, how, tmp_path]) for how in ("zero", "zero", "ddp")]
    sizes = [json.loads(expect(finish(rank)).stdout.splitlines()[-1]) for rank in ranks]
    assert sizes[0] < 0.5 and sizes[1] < 0.5 and 3.5 < sizes[2] < 5, sizes


@pytest.mark.parametrize("recipe", ["train_qwen", "chinese_bloom", "chatglm_lora", "baichuan2_dpo"])
def test_every_recipe_loads_what_its_engine_trains(monkeypatch, recipe):
    """float32 where these weights are the masters, the half dtype where DeepSpeed makes some."""
    seen = []

    def loaded(kind, path, *rest, dtype, **settings):
        seen.append(dtype)
        raise KeyboardInterrupt

    train = own_modules(recipe, "train")[0]
    monkeypatch.setattr(models, "load", loaded)
    args = SimpleNamespace(use_lora=False, load_in_4bit=False, from_config="", packing=True)
    args.reference_model = ""
    more = {"chinese_bloom": [None], "chatglm_lora": [LlamaConfig()], "baichuan2_dpo": [True]}
    for changes in ({}, {"hf_deepspeed_config": ZERO_2}, {"world_size": 2}, {"bf16": False}):
        zero = {"hf_deepspeed_config": ZERO_2} if changes == {"bf16": False} else {}
        training = flags_of(**changes, **zero)[1]
        with pytest.raises(KeyboardInterrupt):
            train.load_model(args, training, "x", *more.get(recipe, []))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_dtypes_of_frozen_weights():
    assert engine.load_dtype(flags_of()[1], trains_all=False) is torch.bfloat16
    fp16 = flags_of(bf16=False, fp16=True, hf_deepspeed_config=ZERO_2)[1]
    assert engine.load_dtype(fp16, trains_all=True) is torch.float16


# ---- 4 bit --------------------------------------------------------------------------------------------------


def test_a_base_in_4_bit_is_frozen_as_it_is(monkeypatch, sizes):
    """peft's helper for it casts embedding, head and norms to float32."""
    train = own_modules("train_qwen", "train")[0]
    quantised = []

    def loaded(kind, path, *rest, quantization_config, **settings):
        quantised.append(quantization_config)
        return kind.from_pretrained(path, dtype=settings["dtype"])

    monkeypatch.setattr(models, "load", loaded)
    monkeypatch.setattr(device, "module", lambda: torch.cuda)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    lora = {"lora_r": 4, "lora_alpha": None, "lora_dropout": 0.0, "target_modules": "all-linear"}
    lora |= {"use_dora": False, "use_rslora": False}
    args = SimpleNamespace(use_lora=True, load_in_4bit=True, freeze_layers=0, **lora)
    stage_3 = SimpleNamespace(config={"zero_optimization": {"stage": 3}})
    for config, storage in ((None, torch.uint8), (stage_3, torch.bfloat16)):
        training = flags_of(hf_deepspeed_config=config, gradient_checkpointing=True)[1]
        model = train.load_model(args, training, sizes.model)
        assert quantised[-1].bnb_4bit_quant_storage is storage
        assert quantised[-1].bnb_4bit_compute_dtype is torch.bfloat16
    frozen = {p.dtype for n, p in model.named_parameters() if "lora_" not in n}
    assert frozen == {torch.bfloat16}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    model.gradient_checkpointing_enable()
    ids = torch.arange(16)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
