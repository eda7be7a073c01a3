"""chinese_clip_ddp's training, through train.py: the default run, engines, resume, frozen towers and their features,
adapters, a teacher, torn pictures, flags that do not go together."""

import base64
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

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
from torch.nn import functional as F
from transformers import BertConfig, Siglip2VisionConfig

from common import cli

RECIPE = ROOT / "chinese_clip_ddp"
TRAIN = RECIPE / "train.py"
model, clip_flags, contrastive, feature_cache, train, trainer = own_modules(
    RECIPE.name, "model", "clip_flags", "contrastive", "feature_cache", "train", "trainer"
)
WAYS_OF_ASKING = ("text_to_image", "image_to_text")
SHORT = ["--max_steps", 4, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none"]
SHORT += ["--bf16", "false", "--max_eval_samples", 16, "--learning_rate", 5e-4]


def run(out, *flags, nproc=1, batch=8, code=0):
    launcher = [ROOT / "common/launch.py", nproc] if nproc > 1 or "--deepspeed" in flags else []
    size = ["--per_device_train_batch_size", batch // nproc, "--per_device_eval_batch_size", 8]
    done = finish(start(["python", *launcher, TRAIN, "--output_dir", out, *SHORT, *size, *flags]))
    return expect(done, code)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that the others are compared with: one process, all weights."""
    out = tmp_path_factory.mktemp("plain")
    run(out)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The built-in model of the samples, as a folder of its own."""
    rows, tiny_base = own_modules(RECIPE.name, "rows", "tiny_base")
    texts = rows.load_pairs(str(RECIPE / "data"))[0].filter(lambda row: not row["held_out"])["text"]
    return tiny_base.tiny_model(texts)


# ---- the default run ---------------------------------------------------------------------------------------------

RECALLS = ("text_to_image_R@1", "image_to_text_R@1")


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """What the first command of the README leaves."""
    out = tmp_path_factory.mktemp("default") / "out"
    expect(shell(RECIPE / "train_zero2.sh", OUTPUT=out, fork=True))
    return out


@pytest.mark.slow
def test_the_default_run_learns_pairs_that_it_never_saw(default_run, tmp_path):
    """The held-out captions name things in colours that none of the trained ones has."""
    before, after = (report(default_run)["metrics"][when] for when in ("before", "after"))
    assert all(before[way] < 0.1 and after[way] >= 0.9 for way in RECALLS), after
    figures = tmp_path / "figures.json"
    asked = ["--model", default_run, "--output", figures]
    expect(finish(start(["python", RECIPE / "eval.py", *asked])))
    classes = json.loads(figures.read_text())["classification"]
    assert classes["classes"] == 96 and classes["top1"] >= 0.9


@pytest.mark.slow
def test_a_third_of_torn_pictures_leaves_a_model_that_learns(torn, tmp_path):
    """A third of the epochs of the default run; chance is 0.008."""
    flags = ["--data_path", torn, "--bad_picture_limit", 0.5, "--report_to", "none"]
    flags += ["--num_train_epochs", 10]
    two_ranks = ["python", ROOT / "common/launch.py", 2, TRAIN, "--output_dir", tmp_path]
    expect(finish(start([*two_ranks, *flags])))
    found = report(tmp_path)
    share = found["rows"]["pictures_replaced"]["torn"] / (128 * max(history(tmp_path)))
    assert 0.3 < share < 0.37
    assert all(found["metrics"]["after"][way] >= 0.1 for way in RECALLS), found["metrics"]["after"]


# ---- engines -----------------------------------------------------------------------------------------------------

ZERO2 = ["--deepspeed", RECIPE / "ds_zero2.json"]
ZERO3 = ["--deepspeed", RECIPE / "ds_zero3.json"]
WAYS = {  # flags, processes, how far the weights may be away
    "ddp": ([], 2, 1e-6),
    "zero-2": (ZERO2, 2, 1e-6),
    "grad cache, zero-2": (["--grad_cache_chunk", 3, *ZERO2], 2, 1e-5),
    # its checkpoints hold empty tensors of what lies on the other rank
    "grad cache, zero-3": (["--grad_cache_chunk", 3, *ZERO3, "--save_strategy", "steps", "--save_steps", 2], 2, 1e-5),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compute_a_step_is_the_same_step(plain, tmp_path, way):
    flags, nproc, bound = WAYS[way]
    run(tmp_path, *flags, nproc=nproc)
    expected, found = history(plain), history(tmp_path)
    assert all(abs(found[step] - expected[step]) < 1e-5 for step in expected) and len(found) == 4
    one, other = weights(plain / "final"), weights(tmp_path / "final")
    assert one["logit_scale"].shape == other["logit_scale"].shape == ()
    assert largest_difference(one, other) < bound
    metrics = [report(out)["metrics"]["after"] for out in (plain, tmp_path)]
    assert all(abs(metrics[0][name] - metrics[1][name]) < 1e-4 for name in metrics[0])


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(tmp_path):
    """Dropped patches, adapters in one tower, two learning rates, and a checkpoint in the middle of an epoch."""
    flags = ["--image_mask_ratio", 0.5, "--lora_towers", "text", "--lora_dropout", 0.2]
    flags += ["--image_learning_rate", 1e-3, "--save_strategy", "steps", "--save_steps", 2]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    run(whole, *flags)
    shutil.copytree(whole, halved)
    for gone in ("checkpoint-4", "final"):
        shutil.rmtree(halved / gone)
    told = json.loads((halved / "run.json").read_text())
    del told["step"]
    (halved / "run.json").write_text(json.dumps(told))
    done = run(halved, *flags)
    assert "continuing from" in done.stdout and "checkpoint-2" in done.stdout
    assert history(halved) == history(whole)
    assert weights_sha(halved / "final") == weights_sha(whole / "final")


# ---- what does not move ------------------------------------------------------------------------------------------


def changed(base, out) -> set[str]:
    before, after = weights(base), weights(out / "final")
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


MOVES = {
    "both": {"text_model", "vision_model", "text_projection", "visual_projection", "logit_scale"},
    "image": {"vision_model", "visual_projection", "logit_scale"},
    "text": {"text_model", "text_projection", "logit_scale"},
    "projection": {"text_projection", "visual_projection", "logit_scale"},
}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["text", "projection"])
def test_frozen_towers_keep_every_bit_and_their_features_are_the_live_ones(base, tmp_path, train):
    live, cached = tmp_path / "live", tmp_path / "cached"
    run(live, "--train", train, "--cache_features", "false", "--model_name_or_path", base)
    run(cached, "--train", train, "--model_name_or_path", base)
    assert changed(base, cached) == changed(base, live) == MOVES[train]
    one, other = history(live), history(cached)
    assert all(abs(one[step] - other[step]) < 1e-6 for step in one)
    assert largest_difference(weights(live / "final"), weights(cached / "final")) < 2e-6


@pytest.mark.slow
def test_features_are_computed_once_for_all_ranks_and_runs(base, tmp_path):
    flags = ["--train", "image", "--model_name_or_path", base, "--model_max_length", 40]
    kept = "captions: their features are kept"
    first = run(tmp_path / "one", *flags)
    again = run(tmp_path / "two", *flags, nproc=2)
    assert kept not in first.stdout and len(re.findall(kept, again.stdout)) == 2
    one, two = weights(tmp_path / "one/final"), weights(tmp_path / "two/final")
    assert largest_difference(one, two) < 2e-6
    assert changed(base, tmp_path / "two") == MOVES["image"]


def test_runs_that_compute_the_same_features_at_once_do_not_meet(tmp_path, monkeypatch):
    """One begins and ends while another is in the middle; what a killed one left yesterday goes."""
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path))
    rows = {"text": [str(i) for i in range(6)]}

    def embed(texts):
        return torch.tensor([[float(text)] for text in texts])

    def interrupted(texts):
        if texts[0] == "2":
            kept = features(embed)
            assert kept.values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
            for day, name in enumerate(("now", "yesterday")):
                left = tmp_path / "features" / f"{Path(kept.values.filename).stem}.{name}.part"
                left.write_bytes(b"half")
                os.utime(left, (left.stat().st_mtime - 90_000 * day,) * 2)
        return embed(texts)

    def features(way):
        return feature_cache.features_of(rows, "text", ["a model"], way, None, size=2)

    assert features(interrupted).values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    file = next((tmp_path / "features").glob("*.npy"))
    feature_cache.remove_left(file)
    assert [part.suffixes[0] for part in file.parent.glob("*.part")] == [".now"]


@pytest.mark.slow
def test_adapters_train_where_they_are_and_end_in_a_plain_folder(base, tmp_path):
    run(tmp_path, "--lora_towers", "text", "--train", "text", "--model_name_or_path", base)
    assert changed(base, tmp_path) == {"text_model", "text_projection", "logit_scale"}
    text = [name for name in weights(base) if name.startswith("text_model")]
    after, before = weights(tmp_path / "final"), weights(base)
    moved = {name for name in text if not torch.equal(before[name], after[name])}
    assert moved and all(before[name].dim() == 2 and "embeddings" not in name for name in moved)
    assert model.load(tmp_path).size == 128


@pytest.mark.slow
def test_a_teacher_changes_what_is_learned_and_is_asked_once(plain, tmp_path):
    flags = ["--teacher_name_or_path", plain, "--loss", "sigmoid"]
    heard = run(tmp_path / "heard", *flags, "--teacher_weight", 2, nproc=2)
    deaf = run(tmp_path / "deaf", *flags, "--teacher_weight", 0)
    assert len(re.findall("their features are kept", deaf.stdout)) == 2
    assert "their features are kept" not in heard.stdout
    one, other = history(tmp_path / "heard"), history(tmp_path / "deaf")
    assert all(one[step] > other[step] for step in one), "a divergence is never negative"
    bias = weights(tmp_path / "deaf/final")["logit_bias"]
    assert abs(bias + 10) < 0.1 and bias != -10, "ChineseCLIPModel has none of its own"
    assert (
        model.load(tmp_path / "heard").logit_bias == weights(tmp_path / "heard/final")["logit_bias"]
    )


# ---- pictures that cannot be used --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """The samples with every third training picture cut in half, others in each file."""
    folder = tmp_path_factory.mktemp("torn") / "data"
    shutil.copytree(RECIPE / "data", folder)
    cut_in_half(folder.glob("train*_imgs.tsv"))
    return folder


@pytest.fixture(scope="module")
def torn_everywhere(torn, tmp_path_factory):
    """The same with every third held-out picture too."""
    folder = tmp_path_factory.mktemp("everywhere") / "data"
    shutil.copytree(torn, folder)
    cut_in_half(folder.glob("valid*_imgs.tsv"))
    return folder


def cut_in_half(files):
    for first, file in enumerate(sorted(files)):
        lines = file.read_text().splitlines()
        for number in range(first, len(lines), 3):
            name, _, text = lines[number].partition("\t")
            data = base64.urlsafe_b64decode(text)
            half = base64.urlsafe_b64encode(data[: len(data) // 2]).decode()
            lines[number] = f"{name}\t{half}"
        file.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_torn_pictures_hang_nobody_and_are_counted(torn_everywhere, tmp_path):
    """Two ranks, whose batches have different numbers of torn pictures, take the steps of one."""
    flags = ["--data_path", torn_everywhere, "--bad_picture_limit", 0.5]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run(one, *flags)
    run(two, *flags, nproc=2)
    assert "picture replaced by another row" in done.stdout and "_imgs.tsv" in done.stdout
    counts = [report(out)["rows"]["pictures_replaced"] for out in (one, two)]
    assert counts[0] == counts[1] and 3 < counts[0]["torn"] < 20
    assert largest_difference(weights(one / "final"), weights(two / "final")) < 2e-6
    assert_equal_misses(one, two)
    assert "held-out picture cannot be used and is a miss" in done.stdout


def assert_equal_misses(one, two):
    """Of 16 held-out pictures those that are torn are misses, however they were computed."""
    lost = [report(out)["rows"]["held_out_pictures_unusable"]["torn"] for out in (one, two)]
    assert lost[0] == lost[1] and 1 < lost[0] < 14
    metrics = [report(out)["metrics"]["after"] for out in (one, two)]
    assert all(abs(metrics[0][name] - metrics[1][name]) < 1e-4 for name in metrics[0])
    assert all(metrics[0][f"{way}_R@10"] <= 1 - lost[0] / 16 for way in WAYS_OF_ASKING)


@pytest.mark.slow
def test_a_frozen_image_tower_says_which_pictures_it_could_not_see(torn_everywhere, tmp_path):
    flags = ["--data_path", torn_everywhere, "--bad_picture_limit", 0.5, "--train", "text"]
    live, cached = tmp_path / "live", tmp_path / "cached"
    run(live, *flags, "--cache_features", "false")
    run(cached, *flags)
    counts = [report(out)["rows"]["pictures_replaced"] for out in (live, cached)]
    assert counts[0] == counts[1] and counts[0]["torn"] > 3
    assert largest_difference(weights(live / "final"), weights(cached / "final")) < 2e-6
    assert_equal_misses(live, cached)


class HeldOut(list):
    """Rows, and themselves as the Pairs around them."""

    @property
    def pairs(self):
        return SimpleNamespace(rows=self)


def measured(rows, images, texts, is_faulty, world=1):
    """-> (metrics, trainer) of held-out pairs whose vectors these are."""
    one = object.__new__(trainer.ContrastiveTrainer)
    hashes = torch.tensor([[row["text_hash"], row["picture_hash"]] for row in rows])
    faulty = torch.tensor(is_faulty)[:, None].float()
    one.__dict__ |= dict(
        args=SimpleNamespace(world_size=world, train_batch_size=2),
        kind="softmax", mask_duplicates=True, told=set(), found=[],
        scale_and_bias=(torch.tensor(10.0), None),
        held_out=[torch.cat([images, texts, faulty, hashes.view(torch.float32)], 1)],
        held_out_faults={rows[i]["source"]: "torn" for i, wrong in enumerate(is_faulty) if wrong},
        held_out_rows=rows, eval_dataset=rows,
    )  # fmt: skip
    return one.eval_metrics([]), one


def test_held_out_pictures_that_are_torn_are_misses_and_nothing_else_stands_there(capsys):
    """Five pairs, the first two of one picture, the fourth torn: its blank lies where all look."""
    eye = torch.eye(5)
    rows = HeldOut(
        {"text": f"文{i}", "text_hash": i, "picture_hash": 7 if i < 2 else 10 + i,
         "source": f"a.csv:{i}", "place": {"path": f"{i}.png"}}
        for i in range(5)
    )  # fmt: skip
    images = torch.stack([eye[0], eye[0], eye[2], F.normalize(torch.ones(5), dim=0), eye[4]])
    texts = F.normalize(torch.stack([eye[0], eye[0] + eye[1], eye[2], eye[3], eye[4]]), dim=1)
    found, one = measured(rows, images, texts, [False, False, False, True, False])
    assert found["text_to_image_R@1"] == 4 / 5 and found["image_to_text_R@1"] == 3 / 4
    assert [(row["prompt"], row["answer"]) for row in one.found] == [
        ("文0", "0.png"), ("文1", "0.png"), ("文2", "2.png"), ("文4", "4.png")
    ]  # fmt: skip
    assert "held-out picture cannot be used and is a miss: a.csv:3" in capsys.readouterr().out
    whole, _ = measured(rows, images, texts, [False] * 5)
    assert whole["text_to_image_R@1"] == 1 and whole["loss"] != found["loss"]
    with pytest.raises(SystemExit, match="no held-out picture can be used, e.g. a.csv:0"):
        measured(rows, images, texts, [True] * 5)


@pytest.mark.slow
def test_too_many_torn_pictures_end_the_run(torn, tmp_path):
    flags = ["--data_path", torn, "--max_steps", 100]
    line = error_line(run(tmp_path, *flags, code=1), 1)
    assert "pictures cannot be used" in line and "more than 20%" in line


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {  # flags -> exit code and what the line says
    "accumulation": (["--gradient_accumulation_steps", 2], 2, "grad_cache_chunk"),
    "half a model": (["--text_model_name_or_path", "x"], 2, "one names half a model"),
    "sigmoid": (["--loss", "sigmoid", "--cross_embedding", "base"], 2, "exact exchange only"),
    "teacher": (["--teacher_name_or_path", "x", "--cross_embedding", "custom"], 2, "exact exchange"),
    "adapter": (["--lora_towers", "text", "--train", "image"], 2, "--train image moves image, not text"),
    "no tower": (["--use_lora", "true", "--train", "projection"], 2, "moves no tower"),
    "mask": (["--image_mask_ratio", 1.0], 2, "--image_mask_ratio 1.0: from 0 to below 1"),
    "batch": (["--per_device_train_batch_size", 7000], 1, "a batch of 7000 pairs is larger than the data"),
    "no model": (["--model_name_or_path", RECIPE / "data"], 1, "not a model that can be loaded"),
    "window": (["--model_max_length", 4000], 2, "128 positions"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line_before_anything_is_loaded(tmp_path, what):
    flags, code, words = REFUSED[what]
    done = finish(start(["python", TRAIN, "--output_dir", tmp_path, *SHORT, *flags]))
    assert words in error_line(done, code)
    assert "loading" not in done.stdout and not (tmp_path / "final").exists()


TWO = {"text_model_name_or_path": "t", "image_model_name_or_path": "i"}
TWO["model_name_or_path"] = clip_flags.TWO
UNFIT = {  # flags -> what the line says
    "adapters refused": ({"lora_towers": "text", "use_lora": False}, "--use_lora false"),
    "three models": (TWO | {"model_name_or_path": "x"}, "either one model or two towers"),
    "negative rate": ({"projection_learning_rate": -1.0}, "projection_learning_rate -1.0: 0 or more"),
    "endless rate": ({"text_learning_rate": float("inf")}, "text_learning_rate inf: 0 or more"),
}  # fmt: skip


def resolved(values: dict, world: int = 2):
    """Flags of a command line, as far as they need no model."""
    cli.note_given([f"--{name}" for name in values])
    args = train.Args(**values)
    clip_flags.resolve(args, SimpleNamespace(gradient_accumulation_steps=1, world_size=world))
    return args


@pytest.mark.parametrize("what", UNFIT)
def test_flags_that_do_not_go_together_are_one_line(capsys, what):
    values, words = UNFIT[what]
    with pytest.raises(SystemExit, match="2"):
        resolved(values)
    assert words in capsys.readouterr().err


def test_flags_that_change_nothing_are_named(capsys):
    resolved(TWO | {"projection": "none", "projection_dim": 8})
    assert "--projection_dim: no effect" in capsys.readouterr().out
    resolved(TWO | {"projection": "mlp", "projection_dim": 8})
    assert "no effect" not in capsys.readouterr().out
    args = resolved({"lora_towers": "text, text", "use_lora": True})
    assert args.lora_towers == "text"


def test_a_naflex_tower_is_told_as_such_whatever_lies_beside_it(tmp_path):
    """The config alone says it: a vision tower has no tokenizer."""
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    Siglip2VisionConfig(**size, patch_size=8, num_patches=16).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="NaFlex SigLIP2.*fixed size"):
        train.check_model(resolved({"model_name_or_path": str(tmp_path)}))


def test_a_teacher_that_is_no_text_image_model_is_told_before_the_data_are_read(tmp_path):
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertConfig(**size, vocab_size=20).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    for name, said in [
        ("bert", "--teacher_name_or_path .*: bert is no text-image model"),
        ("empty", "no trained model here"),
    ]:
        with pytest.raises(SystemExit, match=said):
            train.check_model(resolved({"teacher_name_or_path": str(tmp_path / name)}))


def test_projections_that_are_not_there_are_not_trained(capsys):
    args = resolved({"projection_learning_rate": 0.1, "model_name_or_path": "x"})
    config = SimpleNamespace(model_type="siglip")
    clip_flags.check_projections(args, SimpleNamespace(model_type="clip"))
    assert "no effect" not in capsys.readouterr().out
    clip_flags.check_projections(args, config)
    assert "--projection_learning_rate: no effect; x has no projections" in capsys.readouterr().out
    args.train = "projection"
    for bare in (config, SimpleNamespace(model_type="two_towers", projection="none")):
        with pytest.raises(SystemExit, match="--train projection: x has no projections"):
            clip_flags.check_projections(args, bare)


@pytest.mark.parametrize("mode", ["custom", "gather", "base"])
def test_a_mode_whose_gradient_is_another_one_says_so(capsys, mode):
    warning = f"warning: --cross_embedding {mode}: .*gradient"
    resolved({"cross_embedding": mode})
    assert len(re.findall(warning, capsys.readouterr().out)) == 1
    resolved({"cross_embedding": mode}, world=1)
    said = capsys.readouterr().out
    assert bool(re.search(warning, said)) == (mode == "gather")
    assert ("one process has the whole batch" in said) == (mode != "gather")


@pytest.mark.parametrize("mode", clip_flags.ALIKE_ALONE)
def test_in_one_process_these_modes_are_the_exact_one(mode):
    found = []
    for one in (mode, "exact"):
        x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = contrastive.Embeddings(*F.normalize(x, dim=-1), torch.tensor(5.0))
        contrastive.contrastive_loss(given, mode=one).backward()
        found.append(x.grad)
    assert torch.allclose(*found, atol=1e-6)


# ---- all modes side by side --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_modes_are_compared(plain, tmp_path):
    for mode in ("exact", "custom"):
        shutil.copytree(plain, tmp_path / mode)
    done = expect(finish(start(["python", RECIPE / "compare_modes.py", "--runs", tmp_path])))
    assert (tmp_path / "modes.png").stat().st_size > 5000
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)", done.stdout, re.M)
    assert ("exact", "1.000", "1.000", "1.000") in rows
    assert ("custom", "0.500", "1.000", "1.000") in rows
    assert "One process trained exact, custom" in done.stdout
    assert done.stdout.strip() and (tmp_path / "modes.md").read_text().count("\n|") == 4
