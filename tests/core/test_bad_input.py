"""What users get wrong: one clear line and an exit code, or counted and reported; never a traceback, never silence."""

import json

import pytest
from harness import ROOT, error_line, expect, finish, report, start

pytestmark = pytest.mark.slow
GOOD = [{"instruction": f"{n}加一等于几", "output": f"等于{n + 1}。"} for n in range(40)]
QUICK = [
    "--max_steps",
    1,
    "--eval_generate",
    0,
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--packing",
    "true",
]


def write(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def run(tmp_path, *flags, nproc=1):
    """One process: the reading of data and flags is the same on any number."""
    command = ["python", ROOT / "common/launch.py", nproc, ROOT / "train_qwen/train.py", *QUICK]
    env = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    return finish(start([*command, "--output_dir", tmp_path / "out", *flags], **env))


def test_missing_file(tmp_path):
    assert "/no/such.jsonl" in error_line(run(tmp_path, "--data_path", "/no/such.jsonl"), 1)


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    assert "a.jsonl" in error_line(run(tmp_path, "--data_path", tmp_path / "a.jsonl"), 1)


def test_unknown_columns_names_them_and_the_shapes(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"frage": "x", "antwort": "y"}] * 3)
    line = error_line(run(tmp_path, "--data_path", path), 1)
    assert (
        "frage" in line
        and "antwort" in line
        and "instruction" in line
        and "messages" in line
        and "column_map" in line
    )


def test_column_map_is_the_remedy(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [{"frage": row["instruction"], "antwort": row["output"]} for row in GOOD],
    )
    expect(run(tmp_path, "--data_path", path, "--column_map", "instruction=frage,output=antwort"))


def test_all_rows_unusable(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "x", "output": " "}] * 5)
    assert "a.jsonl" in error_line(run(tmp_path, "--data_path", path), 1)


def test_bad_rows_are_counted_shown_and_reported(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [*GOOD, {"instruction": "空", "output": ""}, {"instruction": "长" * 400, "output": "好"}],
    )
    with path.open("a", encoding="utf-8") as file:
        file.write('{"instruction": "断了", "outp\n')
    result = expect(run(tmp_path, "--data_path", path, "--model_max_length", 64))
    assert "a.jsonl:43" in result.stdout and "a.jsonl:41" in result.stdout
    rows = report(tmp_path / "out")["rows"]
    assert rows["read"] == 43 and sum(rows["dropped"].values()) == 2 and len(rows["dropped"]) == 2
    assert rows["truncated"] == 1 and rows["used"] + rows["held_out"] == 41


def test_strict_data_makes_the_first_one_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"instruction": "空", "output": ""}])
    assert "a.jsonl:41" in error_line(
        run(tmp_path, "--data_path", path, "--strict_data", "true"), 1
    )


def test_gb18030_and_folders_and_weights(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / ".hidden").write_text("x")
    (folder / "notes.md").write_text("x")
    lines = [
        "department,title,ask,answer",
        *(f"科,题{n},第{n}个问题怎么办,这样办{n}" for n in range(30)),
    ]
    (folder / "a.csv").write_bytes("\n".join(lines).encode("gb18030"))
    other = write(tmp_path / "b.jsonl", GOOD)
    result = expect(run(tmp_path, "--data_path", f"{folder}:0.5 {other}:0.5"))
    assert "gb18030" in result.stdout and "notes.md" in result.stdout
    rows = report(tmp_path / "out")["rows"]
    assert rows["used"] + rows["held_out"] == 60


def test_leaked_rows_are_left_out(tmp_path):
    path, test = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "t.jsonl", GOOD[3:7])
    expect(run(tmp_path, "--data_path", path, "--leak_check", test))
    assert report(tmp_path / "out")["rows"]["dropped"]["in test file"] >= 3


def test_unknown_flag(tmp_path):
    line = error_line(run(tmp_path, "--learning_rat", 1), 2)
    assert "--learning_rate" in line


def test_same_mistake_on_two_ranks_is_told_once(tmp_path):
    assert "/no/such.jsonl" in error_line(
        run(tmp_path, "--data_path", "/no/such.jsonl", nproc=2), 1
    )


@pytest.mark.parametrize("make", [
    lambda p: "/no/such/model",
    lambda p: str(p),
    lambda p: (p / "config.json").write_text('{"model_type": "nonsense"}') and str(p),
])  # fmt: skip
def test_model_path_that_is_no_model(tmp_path, make):
    folder = tmp_path / "model"
    folder.mkdir()
    name = make(folder)
    line = error_line(run(tmp_path, "--model_name_or_path", name), 1)
    assert name in line and "--model_name_or_path" in line


def test_four_bit_without_cuda(tmp_path):
    line = error_line(run(tmp_path, "--use_lora", "true", "--load_in_4bit", "true"), 1)
    assert "bitsandbytes" in line


def test_more_choices_train(tmp_path):
    """Flags that are not the default: frozen layers, padded batches, NEFTune, checkpointing, a scheduler, rsLoRA."""
    flags = (
        "--freeze_layers 2 --packing false --neftune_noise_alpha 5 --gradient_checkpointing true"
    )
    expect(
        run(
            tmp_path,
            *flags.split(),
            "--lr_scheduler_type",
            "constant_with_warmup",
            "--system_prompt",
            "你很认真",
        )
    )
    facts = report(tmp_path / "out")
    assert 0 < facts["parameters"]["trained"] < facts["parameters"]["total"]
    flags = "--use_lora true --use_rslora true --lora_r 4 --target_modules q_proj,v_proj --gradient_checkpointing true"
    expect(
        run(
            tmp_path, *flags.split(), "--overwrite_output_dir", "true", "--enable_thinking", "false"
        )
    )
    assert report(tmp_path / "out")["parameters"]["trained"] < 0.05 * facts["parameters"]["total"]


def test_target_modules_that_the_model_has_not(tmp_path):
    for names in ("nosuch", "q_proj, nosuch"):  # peft takes the second and trains q_proj alone
        line = error_line(run(tmp_path, "--use_lora", "true", "--target_modules", names), 1)
        assert (
            "--target_modules" in line
            and "nosuch" in line
            and "all-linear" in line
            and "down_proj" in line
        )


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    command = f"python {ROOT}/train_qwen/train.py {' '.join(map(str, QUICK))} --output_dir {tmp_path} | head -n 1"
    done = finish(start(["bash", "-c", command]))
    assert done.stdout.startswith("rows: ") and "Traceback" not in done.stderr
