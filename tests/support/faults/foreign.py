"""Give every script of a recipe that takes a model, an adapter, a tokenizer or a checkpoint one that
would run code, and write down what each says and whether code ran.

    python tests/support/faults/foreign.py RECIPE FOLDER

FOLDER/said.json: {case: {"code", "said", "ran"}}. Each case is a fork of this process, and somebody
sits at its terminal who answers yes to every question.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RECIPE, FOLDER = ROOT / sys.argv[1], Path(sys.argv[2])
sys.path[:0] = [str(ROOT), str(RECIPE)]
os.environ["DANPU_KEY"] = str(FOLDER / "key")

from common import cli, device, tiny  # noqa: F401, I001  (before torch)
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.runs import checkpoint, run_folder

torch.set_num_threads(1)  # OpenMP hangs in a fork of a process that has used its threads
MARKER = FOLDER / "ran"
CODE = f"import os\nos.mkdir({str(MARKER)!r})\n\n\nclass Foreign:\n    pass\n"
TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MODELS = ("pickle", "auto_map", "tokenizer")
QUICK = "quickstart/quickstart.py"
MEASURED = ("train_qwen", "minimind_npu")  # one recipe on the Trainer for all, and the loop
# of kinds of model that transformers knows, tokenizer.json is read in place of a tokenizer's code,
# with a line that says so (tests/core/test_model_folder.py)
READ_ONLY = ("pickle", "auto_map")
OF_ADAPTERS = ("adapter", "adapter on auto_map", "adapter on pickle")
WITH_PICTURES = ("chinese_clip_ddp", "train_llava")
ADAPTERS = ("adapter", "adapter on auto_map", "adapter on pickle", "adapter's tokenizer")


class Bomb:
    """Unpickled, it leaves MARKER."""

    def __reduce__(self):
        return os.mkdir, (str(MARKER),)


def bomb(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"x": Bomb()}, path)
    return path


# ---- folders -------------------------------------------------------------------------------------


def change(file: Path, **fields) -> None:
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(known | fields), encoding="utf-8")


def make_model(tokenizer) -> Path:
    """A sound model of the recipe, very small."""
    folder = FOLDER / "sound"
    if RECIPE.name == "minimind_npu":
        import model as models

        models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=1).save_pretrained(
            folder
        )
    elif RECIPE.name in WITH_PICTURES:
        import tiny_base

        made = tiny_base.tiny_model(["一二三四五六七八九十 yes no"] * 9)
        return Path(shutil.copytree(made, folder))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_foreign(sound: Path, tokenizer) -> dict[str, Path]:
    """{kind: folder}, the kinds of MODELS and ADAPTERS."""
    made = {}
    for kind in MODELS:
        made[kind] = Path(shutil.copytree(sound, FOLDER / "models" / kind))
    (made["pickle"] / "model.safetensors").unlink()
    bomb(made["pickle"] / "pytorch_model.bin")
    auto = {name: "foreign.Foreign" for name in ("AutoConfig", "AutoModelForCausalLM")}
    change(made["auto_map"] / "config.json", model_type="foreign", auto_map=auto)
    brings_code(made["auto_map"])
    foreign_tokenizer(made["tokenizer"])

    for kind in ADAPTERS:
        base = made.get(kind.removeprefix("adapter on "), sound)
        made[kind] = make_adapter(FOLDER / "adapters" / kind, base, tokenizer)
    (made["adapter"] / "adapter_model.safetensors").unlink()
    bomb(made["adapter"] / "adapter_model.bin")
    foreign_tokenizer(made["adapter's tokenizer"])
    return made


def make_adapter(folder: Path, base: Path, tokenizer) -> Path:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def brings_code(folder: Path) -> None:
    (folder / "foreign.py").write_text(CODE, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE, encoding="utf-8")


def foreign_tokenizer(folder: Path) -> None:
    auto = {"AutoTokenizer": ["foreign.Foreign", "foreign.Foreign"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Foreign", auto_map=auto)
    brings_code(folder)


def published(**fields) -> Path:
    """A folder as a recipe's convert.py takes it."""
    file = bomb(FOLDER / "published" / "pytorch_model.bin")
    (file.parent / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return file.parent


# ---- scripts -------------------------------------------------------------------------------------


def training(script: str = "train.py") -> list:
    """Flags of a run of two steps."""
    if script.endswith("quickstart.py"):
        text = FOLDER / "text.txt"
        lines = [f"{i} yes {i} no {i}" for i in range(60)]
        text.write_text("\n".join(lines), encoding="utf-8")
        sizes = ["--max_length", 16, "--batch_size", 16, "--epochs", 1, "--warmup_steps", 0]
        return ["--data_path", text, *sizes]
    if RECIPE.name in WITH_PICTURES:
        return training_on_pictures()
    rows = FOLDER / "rows.jsonl"
    answer = "output"
    if RECIPE.name == "baichuan2_dpo":
        answer = "chosen"
    text = "".join(
        json.dumps({"instruction": f"{i}", answer: "yes", "rejected": "no"}) + "\n"
        for i in range(24)
    )
    rows.write_text(text, encoding="utf-8")
    flags = ["--data_path", rows, "--max_steps", 2, "--save_steps", 1, "--save_total_limit", 2]
    flags += ["--eval_generate", 0, "--bf16", "false", "--report_to", "none", "--logging_steps", 1]
    flags += ["--per_device_train_batch_size", 1, "--model_max_length", 32, "--packing", "false"]
    if RECIPE.name == "minimind_npu":
        return [*flags[:-2], "--stage", "sft", "--optimizer", "adamw"]
    if RECIPE.name == "chinese_bloom":
        flags += ["--template", "tokenizer"]
    return [*flags, "--gradient_accumulation_steps", 1]


def training_on_pictures() -> list:
    from PIL import Image

    rows = FOLDER / "rows.jsonl"
    lines = []
    for i in range(24):
        Image.new("RGB", (48, 48), (10 * i, 255 - 10 * i, 0)).save(FOLDER / f"{i}.png")
        row = {"text": f"{i} yes", "image": f"{i}.png"}
        if RECIPE.name == "train_llava":
            turns = [("user", f"<image>{i}?"), ("assistant", "yes")]
            messages = [{"role": role, "content": content} for role, content in turns]
            row = {"messages": messages, "images": [f"{i}.png"]}
        lines.append(json.dumps(row) + "\n")
    rows.write_text("".join(lines), encoding="utf-8")
    flags = ["--data_path", rows, "--max_steps", 2, "--save_steps", 1, "--save_total_limit", 2]
    flags += ["--bf16", "false", "--report_to", "none", "--logging_steps", 1]
    if RECIPE.name == "train_llava":
        flags += ["--image_folder", FOLDER, "--eval_generate", 0, "--model_max_length", 96]
        return [*flags, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 1]
    return [*flags, "--image_root", FOLDER, "--per_device_train_batch_size", 4]


def scripts(sound: Path) -> list[tuple]:
    """(script, its flags up to the foreign folder, kinds of it)."""
    out = ["--output_dir", FOLDER / "out"]
    train = [*training(), *out]
    if RECIPE.name == "chinese_clip_ddp":
        return scripts_of_pairs(sound, train)
    models, adapters = (
        (READ_ONLY, OF_ADAPTERS) if RECIPE.name in WITH_PICTURES else (MODELS, ADAPTERS)
    )
    found = [
        ("train.py", [*train, "--model_name_or_path"], models),
        ("app.py", ["--model"], models + adapters),
    ]
    if (RECIPE / "merge.py").is_file():
        found.append(("merge.py", [*out, "--adapter"], adapters))
    if (RECIPE / "convert.py").is_file():
        based = [*out, "--base", sound, "--model"]
        if RECIPE.name == "internlm_sft":  # which refuses a base that changes nothing
            found.append(("convert.py", based, ["adapter"]))
            found.append(("convert.py", [*out, "--model"], ["published"]))
        else:
            found.append(("convert.py", based, ["adapter", "published"]))
        plain = FOLDER / "adapters/adapter on auto_map"
        found.append(("convert.py", [*out, "--model", plain, "--base"], ["auto_map"]))
    if RECIPE.name == "chinese_bloom":
        config = [*train, "--model_name_or_path", sound, "--from_config"]
        found.append(("train.py", config, ["auto_map"]))
    if RECIPE.name == "baichuan2_dpo":
        reference = [*train, "--model_name_or_path", sound, "--reference_model"]
        found.append(("train.py", reference, ["pickle", "auto_map"]))
        compare = ["--model", sound, "--reference"]
        found.append(("app.py", compare, MODELS + ADAPTERS))
    if RECIPE.name == "chatglm_lora":
        found.append(("api.py", ["--port", 0, "--model"], MODELS + ADAPTERS))
        infer = ["--input", FOLDER / "rows.jsonl", "--output", FOLDER / "out/answers", "--model"]
        found.append(("infer.py", infer, MODELS + ADAPTERS))
        found.append(("merge.py", [*out, "--base", chatglm(), "--adapter"], ["file"]))
    if RECIPE.name == "internlm_sft":
        found.append(("evaluate.py", ["--most", 1, "--model"], models + adapters))
    if RECIPE.name == "train_llava":
        asked = ["--data_path", FOLDER / "rows.jsonl", "--image_folder", FOLDER, "--model"]
        found.append(("eval.py", asked, models + adapters))
        language, tower = tiny_parts()
        built = ["--output", FOLDER / "out/llava"]
        found.append(("build_model.py", [*built, "--vision", tower, "--llm"], ["auto_map"]))
        found.append(("build_model.py", [*built, "--llm", language, "--vision"], models))
    if RECIPE.name == "minimind_npu":
        found += scripts_of_minimind(sound, train, out)
    return found


def tiny_parts() -> tuple[str, str]:
    """The folders that a tiny LLaVA is made of."""
    import tiny_base

    return tiny_base.tiny_llm(["一二三四五六七八九十 yes no"] * 9), tiny_base.tiny_tower()


def scripts_of_pairs(sound: Path, train: list) -> list[tuple]:
    teacher = [*train, "--model_name_or_path", sound, "--teacher_name_or_path"]
    text = [*train, "--image_model_name_or_path", sound, "--text_model_name_or_path"]
    image = [*train, "--text_model_name_or_path", text_tower(sound), "--image_model_name_or_path"]
    asked = ["--data_path", FOLDER / "rows.jsonl", "--image_root", FOLDER, "--model"]
    indexed = ["--index", FOLDER / "out/index", "--add", FOLDER, "--model"]
    return [
        ("train.py", [*train, "--model_name_or_path"], READ_ONLY),
        ("train.py", teacher, READ_ONLY),
        ("train.py", text, ["auto_map"]),
        ("train.py", image, READ_ONLY),
        ("app.py", ["--model"], READ_ONLY),
        ("eval.py", asked, READ_ONLY),
        ("build_index.py", indexed, READ_ONLY),
    ]


def text_tower(sound: Path) -> Path:
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = FOLDER / "text"
    tokenizer = AutoTokenizer.from_pretrained(sound)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chatglm() -> Path:
    from configuration_chatglm import ChatGLMConfig

    folder = FOLDER / "chatglm"
    ChatGLMConfig().save_pretrained(folder)
    return folder


def scripts_of_minimind(sound: Path, train: list, out: list) -> list[tuple]:
    teacher = [*train, "--stage", "distill", "--model_name_or_path", sound, "--teacher"]
    given = [*train, "--model_name_or_path", sound, "--tokenizer"]
    imported = [*out, "--import", "--model", sound, "--tokenizer"]
    rewarded = [*out, "--data_path", FOLDER / "rows.jsonl", "--report_to", "none"]
    return [
        ("train.py", teacher, MODELS),
        ("train.py", given, ["tokenizer"]),
        (QUICK, [*training(QUICK), *out, "--model_name"], MODELS),
        ("train_rl.py", [*rewarded, "--model_name_or_path"], MODELS),
        ("chat.py", ["--model"], MODELS),
        ("chat.py", ["--adapter"], ADAPTERS),
        ("serve_openai_api.py", ["--port", 0, "--model"], MODELS + ADAPTERS),
        ("evaluation/eval.py", [*out, "--model"], MODELS + ADAPTERS),
        ("evaluation/chat_eval.py", [*out, "--model"], MODELS),
        ("evaluation/core.py", [*out, "--model"], MODELS),
        ("eval_tokenizer.py", out, ["tokenizer"]),
        ("road/scaling.py", [*out, "--tokenizer"], ["tokenizer"]),
        ("eval_toolcall.py", [*out, "--model"], MODELS + ADAPTERS),
        ("export.py", [*out, "--model"], MODELS + ADAPTERS),
        ("export.py", [*out, "--import", "--model"], ["pickle", "auto_map", "file"]),
        ("export.py", imported, ["tokenizer"]),
    ]


def module(script: str):
    """A script of the recipe, imported once."""
    name = f"script_{Path(script).stem}"  # beside packages of that name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, RECIPE / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# ---- cases ---------------------------------------------------------------------------------------


def run(script: str, flags: list, **env) -> dict:
    """What the script says last, in a fork."""
    report = FOLDER / "one.json"
    shutil.rmtree(MARKER, ignore_errors=True)
    shutil.rmtree(FOLDER / "out", ignore_errors=True)
    child = os.fork()
    if child == 0:
        os.environ.update(env)
        sys.argv = [str(RECIPE / script), *map(str, flags)]
        sys.stdin = io.StringIO("y\n" * 99)
        said = io.StringIO()
        code = "traceback"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = cli.exit_code_of(module(script).main)
            except BaseException:
                traceback.print_exc()
        report.write_text(json.dumps({"code": code, "said": said.getvalue()}), encoding="utf-8")
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(report.read_text(encoding="utf-8")) | {"ran": MARKER.exists()}


def refused_models(results: dict, sound: Path, made: dict[str, Path]) -> None:
    """Every script with every kind of folder that it takes."""
    for script, flags, kinds in scripts(sound):
        way = f"{script} --import" if "--import" in flags else script
        for kind in kinds:
            results[f"{way} {flags[-1]}: {kind}"] = run(script, [*flags, made[kind]])


# ---- checkpoints ---------------------------------------------------------------------------------


def forge(folder: Path, **facts) -> None:
    """A completion marker with right hashes, signed by somebody else."""
    own = os.environ["DANPU_KEY"]
    os.environ["DANPU_KEY"] = str(FOLDER / "another key")
    checkpoint.mark_complete(folder, weights_only=False, world_size=1, **facts)
    os.environ["DANPU_KEY"] = own


def resumed(results: dict, sound: Path) -> None:
    """A checkpoint of this recipe of which one file after the other is replaced."""
    flags = [*training(), "--model_name_or_path", sound]
    whole = FOLDER / "whole"
    results["train.py sound run"] = run("train.py", [*flags, "--output_dir", whole])
    start = checkpoint.all_checkpoints(whole)[0]
    states = [path.name for path in start.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    for state in states:
        folder = FOLDER / state / start.name
        shutil.copytree(start, folder)
        bomb(folder / state)
        forge(folder, step=checkpoint.step_of(start), engine="single")
        more = ["--output_dir", FOLDER / "out", "--resume_from_checkpoint", folder]
        results[f"train.py resumes: {state}"] = run("train.py", [*flags, *more])


def forged(results: dict, sound: Path) -> None:
    """Pickles of the engines in a folder that is whole, but of somebody else."""
    folder = Path(shutil.copytree(sound, FOLDER / "zero/checkpoint-1"))
    bomb(folder / "global_step1/mp_rank_00_model_states.pt")
    bomb(folder / "global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step1", encoding="utf-8")
    state = {"global_step": 1, "max_steps": 2, "train_batch_size": 1, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    for name in ("optimizer.pt", "scheduler.pt", "progress.pt"):
        bomb(folder / name)
    flags = [*training(), "--model_name_or_path", sound]
    resumes = ["--output_dir", FOLDER / "out", "--resume_from_checkpoint", folder]
    if RECIPE.name not in MEASURED:
        forge(folder, step=1, engine="single")
        results["train.py resumes: optimizer.pt"] = run("train.py", [*flags, *resumes])

    if RECIPE.name == "minimind_npu":
        forge(folder, step=1, engine="single")
        quick = [*training(QUICK), "--model_name", sound, *resumes]
        results[f"{QUICK} resumes: progress.pt"] = run(QUICK, quick)
        (folder / "global_step1").rename(folder / "zero")
        (folder / "latest").write_text("zero", encoding="utf-8")
        progress = {"step": 1, "epoch": 0, "at": 1, "history": [], "before": {}, "trackers": {}}
        torch.save(progress, folder / "progress.pt")

    forge(folder, step=1, engine="zero-2")
    run_folder.write_run_file(folder.parent, {"settings": {}, "before": {"metrics": {}}})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    flags += ["--deepspeed", RECIPE / "ds_zero2.json"]
    asked = [*flags, *resumes]
    results["train.py zero: another's folder"] = run("train.py", asked, **ranks)
    found = [*flags, "--output_dir", folder.parent, "--resume_from_checkpoint", "true"]
    results["train.py zero: another's output folder"] = run("train.py", found, **ranks)
    if RECIPE.name in MEASURED:
        vouched = [*asked, "--trust_checkpoint", "true"]
        results["train.py zero: vouched for"] = run("train.py", vouched, **ranks)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = {"eos_token": "<e>", "chat_template": TEMPLATE}
    tokenizer = tiny.make_tokenizer(["一二三四五六七八九十 yes no"], 400, ["<e>"], **settings)
    sound = make_model(tokenizer)
    made = make_foreign(sound, tokenizer)
    made["published"] = published(model_type="foreign", padded_vocab_size=64, vocab_size=64)
    made["file"] = bomb(FOLDER / "weights.pth")

    for script, _, _ in scripts(sound):
        module(script)  # once, for all forks
    results = {}
    assert not MARKER.exists()
    refused_models(results, sound, made)
    if RECIPE.name in MEASURED:
        resumed(results, sound)
    forged(results, sound)
    (FOLDER / "said.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
