"""train.py of train_llava as a user runs it: what moves, one process like several, resume, merging,
mistakes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    own_modules,
    report,
    shell,
    start,
    weights,
    weights_sha,
)
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

RECIPE = ROOT / "train_llava"
parts, llava, answers, features, encoding, sight = own_modules(
    "train_llava", "parts", "model", "answers", "features", "encoding", "sight"
)

PICTURES = 40
COLOURS = {"红": (220, 30, 30), "绿": (30, 160, 60), "蓝": (40, 60, 220)}
SHORT = ["--logging_steps", 1, "--eval_generate", 4, "--max_new_tokens", 6, "--report_to", "none"]
SHORT += ["--bf16", "false", "--per_device_train_batch_size", 2, "--eval_ratio", 0.1]


def turn(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of drawn pictures with questions.json and captions.json; half of the rows are text
    only, so that many a batch has no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    rows = []
    captions = []
    for number in range(PICTURES):
        colour = draw.choice(sorted(COLOURS))
        left = draw.choice([6, 26])
        image = Image.new("RGB", (48, 40), "white")
        ImageDraw.Draw(image).ellipse((left, 10, left + 16, 26), fill=COLOURS[colour])
        name = f"{number}.png"
        image.save(folder / name)
        side = "左" if left < 20 else "右"
        rows.append({"image": name, "conversations": turn("<image>\n什么颜色？", f"{colour}色")})
        rows.append({"image": name, "conversations": turn("<image>\n在哪边？", f"{side}边")})
        captions.append(
            {"image": name, "conversations": turn("<image>\n描述。", f"{colour}色的圆")}
        )
        rows += [
            {"conversations": turn(f"{number}加{i}等于几？", f"{number + i}")} for i in range(2)
        ]
    pair = {"image": ["0.png", "1.png"], "conversations": turn("<image>和<image>？", "两张图")}
    (folder / "questions.json").write_text(json.dumps([*rows, pair]), encoding="utf-8")
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


def run(out: Path, data: Path, *flags, nproc=1, ds=None, code=0, file="questions.json", **env):
    command = ["python", ROOT / "common/launch.py", nproc, RECIPE / "train.py"]
    command += ["--data_path", data / file, "--output_dir", out, *SHORT]
    if ds:
        command += ["--deepspeed", RECIPE / f"ds_zero{ds}.json"]
    return expect(finish(start([*command, *flags], **env)), code)


def tiny_base(out: Path) -> Path:
    """The tiny model that a run began with."""
    return Path(json.loads((out / "run.json").read_text(encoding="utf-8"))["base"])


def part_changes(out: Path) -> dict[str, set[bool]]:
    """part -> whether its tensors differ from those of the base: {False}, {True} or both."""
    before = {parts.general_name(n): t for n, t in weights(tiny_base(out)).items()}
    after = {parts.general_name(n): t for n, t in weights(out / "final").items()}
    assert before.keys() == after.keys()
    changes: dict[str, set[bool]] = {}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        changed = not torch.equal(tensor, before[name])
        changes.setdefault(parts.part_of(name), set()).add(changed)
    return changes


# ---- the default run ------------------------------------------------------------------------------


def chance_of_held_out() -> float:
    """Share of the samples' held-out questions about pictures that a guess among a question's
    answers gets right."""
    known: dict[str, set] = {}
    asked = []
    for row in json.loads((RECIPE / "data/questions/valid.json").read_text(encoding="utf-8")):
        texts = [one["value"].replace("<image>", "").strip() for one in row["conversations"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            known.setdefault(question, set()).add(answer)
        if "image" in row:
            asked.append(texts[-2])
    assert len(asked) >= 200
    return sum(1 / len(known[question]) for question in asked) / len(asked)


@pytest.mark.slow
def test_the_default_run_answers_by_looking(tmp_path):
    """Both stages on the samples."""
    out = tmp_path / "out"
    expect(shell(RECIPE / "train_zero2.sh", "--output_dir", out, "--report_to", "none", fork=True))
    metrics = report(out)["metrics"]
    assert metrics["before"]["exact_match"] < 0.1
    assert metrics["after"]["exact_match"] >= 0.9
    # three deviations of a guess; less where the toy, never asked blindly, leaves a question's answers
    assert metrics["after"]["blind_exact_match"] < chance_of_held_out() + 0.09
    assert (out / "stage1" / "final").is_dir()


# ---- what moves -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind, nproc, ds, more", [
    ("projector", 2, None, []),
    ("freeze_vision", 2, 2, ["--bf16", "true"]),  # the engine rounds what is frozen
    ("freeze_llm", 1, None, []),
    ("full", 1, None, []),
])  # fmt: skip
def test_what_is_frozen_keeps_every_bit(tmp_path, data, kind, nproc, ds, more):
    out = tmp_path / "out"
    done = run(out, data, "--train_type", kind, "--max_steps", 4, *more, nproc=nproc, ds=ds)
    changes = part_changes(out)
    for part in ("vision tower", "projector", "language model"):
        if part not in parts.TRAINED[kind]:
            assert changes[part] == {False}, part
        else:
            assert True in changes[part], part
    moved = re.findall(
        r"^  (vision tower|projector|language model) +([\d,]+) of", done.stdout, re.M
    )
    trained = {part for part, count in moved if count != "0"}
    assert trained == set(parts.TRAINED[kind])
    assert "tower" not in trained or "the tower runs without" not in done.stdout
    model = AutoModelForImageTextToText.from_pretrained(out / "final")
    processor = AutoProcessor.from_pretrained(out / "final", backend="pil")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.image_token_id == model.config.image_token_id
    assert model.config.vision_config.num_hidden_layers == 3
    if kind == "projector":
        checkpoint = weights(next(out.glob("checkpoint-*")))
        assert len(checkpoint) == 4 and all("multi_modal_projector" in name for name in checkpoint)
    facts = report(out)
    assert facts["rows"]["pictures_unusable"] == {}
    assert {"exact_match", "blind_exact_match"} <= facts["metrics"]["after"].keys()


def small_model():
    from test_llava_packing import Made

    return Made


@pytest.mark.parametrize("kind", [*parts.TRAINED])
def test_trained_tensors_of_each_part_are_counted(tmp_path, kind):
    one = small_model()(tmp_path)
    model = one.open()
    parts.choose_trained(model, kind)
    if kind == "lora":
        model = parts.add_lora(model, lora_flags(), recompute=False)
    found = {part: row["trained_tensors"] for part, row in parts.counted(model).items()}
    # clip: embeddings 3, norm 2, two layers of 16 that are looked at; llm: 3 layers of 11, 2
    tower = 5 + 2 * 16
    llm = 3 * 11 + 2
    expected = {
        "projector": {"vision tower": 0, "projector": 4, "language model": 0},
        "freeze_vision": {"vision tower": 0, "projector": 4, "language model": llm},
        "freeze_llm": {"vision tower": tower, "projector": 4, "language model": 0},
        "full": {"vision tower": tower, "projector": 4, "language model": llm},
        "lora": {"vision tower": 0, "projector": 4, "language model": 0, "adapter": 3 * 7 * 2},
    }
    assert found == expected[kind]


def lora_flags(**more):
    from types import SimpleNamespace

    settings = dict(lora_r=4, lora_alpha=None, lora_dropout=0.0, target_modules="all-linear")
    return SimpleNamespace(**settings | {"lora_vision": False} | more)


def test_the_table_tells_the_rates_that_are_used(tmp_path):
    """Adapters in the tower have the adapters' rate, not that of a tower that trains whole."""
    from types import SimpleNamespace

    from common import voice

    llava_flags = own_modules("train_llava", "llava_flags")[0]
    assert llava_flags.spelled_out([]) == []  # python train_llava/train.py alone
    one = small_model()(tmp_path)
    model = one.open()
    parts.choose_trained(model, "lora", True)
    model = parts.add_lora(model, lora_flags(lora_vision=True), False)
    args = SimpleNamespace(
        train_type="lora", lora_vision=True, projector_learning_rate=None, vision_learning_rate=None
    )
    training = SimpleNamespace(learning_rate=1.0)
    voice.given.clear()
    llava_flags.settle_rates(args, training, False)
    rates = parts.rates(args, training)
    used = {group["lr"] for group in parts.parameter_groups(model, rates, 0.0)}
    assert used == {llava_flags.LORA_RATE, llava_flags.RATE}
    told = parts.table(model, rates)
    assert re.search(r"tower's adapter +24 of 24 .* 0\.0002", told), told
    assert re.search(r"\n  adapter +42 of 42 .* 0\.0002", told), told
    args.vision_learning_rate = 3e-5
    rates = parts.rates(args, training)
    assert re.search(r"tower's adapter .* 3e-05", parts.table(model, rates))
    assert 3e-5 in {group["lr"] for group in parts.parameter_groups(model, rates, 0.0)}


@pytest.mark.parametrize("names, asked, tower", [
    ("all-linear", False, 0), ("q_proj,v_proj", False, 0), ("q_proj,v_proj", True, 2 * 6),
])  # fmt: skip
def test_adapters_reach_the_tower_only_when_asked(tmp_path, names, asked, tower):
    """q_proj and v_proj are names of layers in CLIP too."""
    one = small_model()(tmp_path)
    model = one.open()
    parts.choose_trained(model, "lora", asked)
    model = parts.add_lora(model, lora_flags(target_modules=names, lora_vision=asked), False)
    adapted = [n for n, p in model.named_parameters() if ".lora_A" in n and p.requires_grad]
    in_tower = [name for name in adapted if "vision_tower" in name]
    assert len(in_tower) == tower and not any("multi_modal" in name for name in adapted)
    assert len(adapted) - len(in_tower) == 3 * (7 if names == "all-linear" else 2)
    with pytest.raises(SystemExit, match="no layer of the language model is called fc1"):
        parts.adapter_targets(one.open(), "fc1", False)


def test_rates_and_decay_of_each_part(tmp_path):
    from types import SimpleNamespace

    one = small_model()(tmp_path)
    model = one.open()
    parts.choose_trained(model, "full")
    flags = SimpleNamespace(vision_learning_rate=1e-6, projector_learning_rate=1e-4)
    rates = parts.rates(flags, SimpleNamespace(learning_rate=1e-5))
    groups = parts.parameter_groups(model, rates, 0.1)
    assert sorted({group["lr"] for group in groups}) == [1e-6, 1e-5, 1e-4]
    for group in groups:
        dims = {parameter.ndim > 1 for parameter in group["params"]}
        assert dims == {group["weight_decay"] > 0}
    told = parts.table(model, rates)
    assert re.search(r"projector +4 of 4 .* 0\.0001", told)
    assert re.search(r"vision tower +37 of 5\d .* 1e-06", told)


# ---- the shell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, stages", [
    ([], ["stage1", ""]),
    (["--output_dir=here"], ["stage1", ""]),
    (["--output-dir", "here"], ["stage1", ""]),
    (["--data-path", "a.json"], [""]),
    (["--data_path=a.json"], [""]),
    (["--data", "a.json"], [""]),
    (["--train-type=full"], [""]),
    (["--use_lora", "true"], [""]),
    (["--model-name-or-path", "m"], [""]),
    (["--output_dir", "done"], [""]),
    (["--output_dir", "done", "--overwrite_output_dir", "false"], [""]),
    (["--output_dir", "done", "--overwrite-output-dir"], ["stage1", ""]),
    (["--output_dir", "done", "--overwrite_output_dir=true"], ["stage1", ""]),
], ids=lambda one: " ".join(one))  # fmt: skip
def test_the_shell_trains_both_stages_of_the_samples_alone(tmp_path, words, stages):
    """Whichever way the flags are spelled; done/ has its first stage already."""
    (tmp_path / "common").mkdir()
    (tmp_path / "recipe").mkdir()
    (tmp_path / "done/stage1/final").mkdir(parents=True)
    stub = f'root={tmp_path}\nlaunch() {{ printf "%s " "$@"; echo; exit 0; }}\n'
    (tmp_path / "common/launch.sh").write_text(stub)
    shutil.copy(RECIPE / "train_zero2.sh", tmp_path / "recipe")
    env = {k: v for k, v in os.environ.items() if k not in ("MODEL", "DATA", "OUTPUT")}
    command = ["bash", tmp_path / "recipe/train_zero2.sh", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert ["stage1" if "--train_type projector" in line else "" for line in lines] == stages
    named = [folder for folder in ("done", "here") if any(folder in word for word in words)]
    stage_1 = f"{named[0] if named else f'{tmp_path}/output/recipe'}/stage1"
    if "stage1" in stages:
        assert lines[0].split()[-2:] == ["--output_dir", stage_1]
    on_samples = "stage1" in stages or "done" in words
    assert (f"--stage_1 {stage_1}/final" in lines[-1]) == on_samples


# ---- several processes ----------------------------------------------------------------------------


STEPS = ["--max_steps", 5, "--train_type", "full", "--save_strategy", "no", "--max_grad_norm", 0.5]
STEPS += ["--model_max_length", 64]
# at the built-in model's rate, 5e-8 of a gradient becomes a whole step of Adam's where it is near 0
STEPS += ["--learning_rate", 1e-4, "--adam_epsilon", 1e-3]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run(out, data, *STEPS, "--per_device_train_batch_size", 4)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "zero-2", "zero-3", "accumulation"])
def test_the_same_training_however_it_is_spread(tmp_path, data, alone, how):
    """A window of text alone on one rank, of pictures on the other, is among the steps."""
    flags = list(STEPS)
    nproc, ds = {"ddp": (2, None), "zero-2": (2, 2), "zero-3": (2, 3), "accumulation": (1, None)}[
        how
    ]
    if how == "accumulation":
        flags += ["--gradient_accumulation_steps", 2]
    run(tmp_path, data, *flags, nproc=nproc, ds=ds)
    expected, found = history(alone), history(tmp_path)
    assert len(expected) == 5 and found.keys() == expected.keys()
    for step, loss in expected.items():
        assert abs(found[step] - loss) < 1e-6 * loss, step
    assert largest_difference(weights(alone / "final"), weights(tmp_path / "final")) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["projector", "lora", "full"])
def test_a_run_goes_on_to_the_last_bit(tmp_path, data, kind):
    flags = ["--train_type", kind, "--max_steps", 6, "--save_steps", 3, "--save_total_limit", 5]
    out = tmp_path / "out"
    run(out, data, *flags)
    expected = weights_sha(out / "final")
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "final")
    told = json.loads((out / "run.json").read_text())
    del told["step"]  # it ended before its end
    (out / "run.json").write_text(json.dumps(told))
    done = run(out, data, *flags)
    assert "step 4/6" in done.stdout and "step 3/6" not in done.stdout
    assert weights_sha(out / "final") == expected


# ---- answers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, data) -> Path:
    """A run with adapters that has learned a little."""
    out = tmp_path_factory.mktemp("adapted") / "out"
    flags = ["--train_type", "lora", "--max_steps", 40, "--learning_rate", 1e-2]
    run(out, data, *flags, "--lora_r", 8, "--logging_steps", 20)
    return out


def questions_of(data: Path, tokenizer, number: int, tokens: int) -> list[dict]:
    rows = json.loads((data / "questions.json").read_text())
    prompts = []
    for row in [*rows[:6], rows[-1]]:
        shown = row.get("image", [])
        shown = [shown] if isinstance(shown, str) else shown
        content = []
        for piece in re.split("(<image>)", row["conversations"][0]["value"]):
            content.append(
                {"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
            )
        message = {"messages": [{"role": "user", "content": content}]}
        found = encoding.encode_prompt(message | {"pictures": shown}, tokenizer, number, tokens)
        prompts.append(found | {"pictures": [data / name for name in shown]})
    return prompts


@pytest.mark.slow
def test_merged_answers_are_the_adapters(tmp_path, data, adapted):
    """Also: a batch answers like single questions, kept features like pixels, and answers end."""
    merge = [sys.executable, RECIPE / "merge.py", "--adapter", adapted / "final"]
    expect(finish(start([*merge, "--output_dir", tmp_path / "merged"])))
    whole = llava.Llava(adapted)
    merged = llava.Llava(tmp_path / "merged")
    assert hasattr(whole.model, "peft_config") and not hasattr(merged.model, "peft_config")
    prompts = questions_of(data, whole.tokenizer, whole.image_token_id, whole.image_tokens)
    expected = answers.generate_answers(whole.model, whole.processor, prompts, 12)
    assert answers.generate_answers(merged.model, merged.processor, prompts, 12) == expected
    single = answers.generate_answers(merged.model, merged.processor, prompts, 12, batch_size=1)
    assert single == expected
    # plain transformers, through its own processor and template
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "\n什么颜色？"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=Image.open(data / "0.png"), return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert processor.decode(new, skip_special_tokens=True) == expected[0]
    assert 2 <= len(new) < 12  # an end token
    source = features.PictureSource([data / "0.png"], merged.image_processor)
    normaliser = sight.Normaliser(merged.image_processor)
    with torch.no_grad():
        known = sight.features_of(merged.model, source([0])[0], normaliser)
    kept = answers.generate_answers(
        merged.model, merged.processor, prompts[:1], 12, pictures=lambda shown: (known, {})
    )
    assert kept == expected[:1]


@pytest.mark.slow
def test_old_names_train_too(tmp_path, data):
    """A folder as the first LLaVA programs wrote it, its processor without patch_size, its config
    without a dtype."""
    import test_llava_build as built
    from safetensors.torch import load_file, save_file

    llm, (tower, _) = built.make_llm(tmp_path, tied=False), built.make_tower(tmp_path)
    out = built.build_model.build(llm, tower, tmp_path / "llava")
    file = out / "processor_config.json"
    settings = json.loads(file.read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        settings.pop(name)
    file.write_text(json.dumps(settings))
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (out / "config.json").write_text(json.dumps(config))
    names = load_file(out / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in names)
    save_file(names, out / "model.safetensors", {"format": "pt"})
    flags = ["--model_name_or_path", out, "--train_type", "projector", "--max_steps", 2]
    run(tmp_path / "out", data, *flags, "--model_max_length", 256, file="captions.json")
    after = weights(tmp_path / "out/final")
    changed = [name for name in names if not torch.equal(after[name], names[name])]
    assert changed and all("multi_modal_projector" in name for name in changed)


# ---- faults ---------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tmp_path, data):
    def fails(*flags, code=1, folder=data, file="questions.json") -> str:
        command = [sys.executable, RECIPE / "train.py", "--data_path", folder / file]
        command += ["--output_dir", tmp_path / "out", *SHORT, *flags]
        return error_line(finish(start(command)), code)

    assert "a picture alone takes 9 tokens" in fails("--model_max_length", 16)
    assert "--bad_picture_limit 1.5: from 0 to 1" in fails("--bad_picture_limit", 1.5, code=2)
    assert "--stage_1: of the built-in model" in fails(
        "--stage_1", tmp_path, "--model_name_or_path", tmp_path, code=2
    )
    assert "lora or not?" in fails("--train_type", "full", "--use_lora", "true", code=2)
    assert "--train_type" in fails("--train_type", "everything", code=2)
    assert "did you mean --train_type" in fails("--train_typ", "full", code=2)
    text = tmp_path / "qwen"
    text.mkdir()
    (text / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert "is no LLaVA" in fails("--model_name_or_path", text)
    (text / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    assert "a Qwen-VL" in fails("--model_name_or_path", text)
    lost = tmp_path / "lost"
    lost.mkdir()
    shutil.copy(data / "captions.json", lost)
    assert "missing" in fails(folder=lost, file="captions.json")
    assert not (tmp_path / "out/final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cache", [0, 1], ids=["live", "kept"])
def test_torn_pictures_are_counted_once_and_not_asked(tmp_path, data, cache):
    """However often they are shown: three epochs, two questions each. Live, a step is one row: some
    steps show nothing else, and the run goes on."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = json.loads((data / "questions.json").read_text())
    rows = [row for row in rows if isinstance(row.get("image"), str)]
    for name, some in (("train.json", rows[:24]), ("valid.json", rows[24:32])):
        (folder / name).write_text(json.dumps(some))
        for row in some:
            shutil.copy(data / row["image"], folder)
    for row in (rows[0], rows[24]):
        file = folder / row["image"]
        file.write_bytes(file.read_bytes()[:90])
    out = tmp_path / "out"
    flags = ["--train_type", "projector", "--num_train_epochs", 3, "--eval_generate", 8]
    flags += ["--feature_cache_gb", cache, "--save_strategy", "no"]
    if not cache:
        flags += ["--packing", "false", "--per_device_train_batch_size", 1]
    done = run(out, folder, *flags, file="", DANPU_CACHE=tmp_path / "cache")
    told = report(out)["rows"]
    assert told["pictures_unusable"] == told["held_out_pictures_unusable"] == {"torn": 1}
    assert "2 of 8 held-out questions are not asked" in done.stdout
    assert done.stdout.count("teach nothing:") == done.stdout.count("are not counted:") == 1


@pytest.mark.slow
def test_zero_3_answers_where_only_some_ranks_have_a_picture(tmp_path, data):
    """The weights do not fit one device: each rank gathers what it asks for, in one order."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(RECIPE)!r}]\n"
        "import train\n"
        "from common import cli\n"
        "from common.runs import generate\n"
        "generate.weights_fit = lambda model: False\n"
        "cli.run(train.main)\n"
    )
    script = tmp_path / "spread.py"
    script.write_text(code)
    rows = json.loads((data / "questions.json").read_text())
    (tmp_path / "data").mkdir()
    shown = [row for row in rows if isinstance(row.get("image"), str)]
    words = [row for row in rows if "image" not in row]
    long = turn("<image>\n" + "什么颜色？" * 9, "红色")
    for name, some in (
        ("train.json", shown[:20]),
        # of rank 0: 0, 2, 4; of rank 1: 1, 3
        ("valid.json", [{"image": shown[20]["image"], "conversations": long}, *words[:4]]),
    ):
        (tmp_path / "data" / name).write_text(json.dumps(some))
    for row in shown[:22]:
        shutil.copy(data / row["image"], tmp_path / "data")
    command = ["python", ROOT / "common/launch.py", 2, script, "--data_path", tmp_path / "data"]
    command += ["--output_dir", tmp_path / "out", *SHORT, "--eval_generate", 5, "--max_steps", 1]
    command += ["--train_type", "full", "--save_strategy", "no", "--ddp_timeout", 60]
    command += ["--deepspeed", RECIPE / "ds_zero3.json"]
    expect(finish(start(command)))
    assert "exact_match" in report(tmp_path / "out")["metrics"]["after"]


@pytest.mark.slow
def test_killed_while_features_are_written(tmp_path, data):
    """The next run computes what is missing, and nothing reads the half file."""
    cache = tmp_path / "cache"
    code = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}, {str(RECIPE)!r}]\n"
        "import features, train\n"
        "from common import cli\n"
        "stock = features.Segment.add\n"
        "def slow(self, *args):\n"
        "    stock(self, *args); self.values.flush(); print('half', flush=True); time.sleep(60)\n"
        "features.Segment.add = slow\n"
        "cli.run(train.main)\n"
    )
    flags = ["--data_path", data / "captions.json", "--output_dir", tmp_path / "out", *SHORT]
    flags += ["--train_type", "projector", "--max_steps", 2]
    process = start([sys.executable, "-c", code, *flags], DANPU_CACHE=cache)
    for line in process.stdout:
        if "half" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()
    time.sleep(0.1)
    left = [file.suffix for file in (cache / "pictures").rglob("*.*") if file.is_file()]
    assert sorted(left) == [".lock", ".part"]
    done = run(tmp_path / "out", data, "--train_type", "projector", "--max_steps", 2,
               file="captions.json", DANPU_CACHE=cache)  # fmt: skip
    assert re.search(r"features of 40 pictures.*: [1-9]\d* to compute", done.stdout)
    assert not list((cache / "pictures").rglob("*.part"))
    again = run(tmp_path / "more", data, "--train_type", "projector", "--max_steps", 2,
                file="captions.json", DANPU_CACHE=cache)  # fmt: skip
    assert ": 0 to compute" in again.stdout
    # bit-equal to a run that was never killed
    fresh = run(tmp_path / "fresh", data, "--train_type", "projector", "--max_steps", 2,
                file="captions.json", DANPU_CACHE=tmp_path / "other")  # fmt: skip
    assert fresh.returncode == 0
    assert weights_sha(tmp_path / "fresh/final") == weights_sha(tmp_path / "more/final")
