"""What export.py writes, converted by llama.cpp's own converter and answered by llama.cpp."""

import re
import shutil
import sys

import llama_cpp_build
import numpy as np
import pytest
import torch
from harness import ROOT, own_modules
from transformers import AutoTokenizer

RECIPE = ROOT / "minimind_npu"
models, export = own_modules(RECIPE.name, "model", "export")
SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FLOAT32 = {"type_k": 0, "type_v": 0}  # of the cache, else half precision
TEXTS = [
    "<|im_start|>user\n西班牙的首都是哪里？<|im_end|>\n<|im_start|>assistant\n",
    "12加345等于几？ 三百五十七。\n\n  Spain's capital, 2024!\t<think>\n想一想…\n</think>\n🙂",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(exported folder, name) -> llama.cpp's model of it."""
    built = llama_cpp_build.build()
    shutil.copytree(
        built / "converter", folder := tmp_path_factory.mktemp("converter") / "llama.cpp"
    )
    base = folder / "conversion/base.py"
    text = base.read_text(encoding="utf-8")
    # README: a vocabulary that it has not seen
    text, count = re.subn(r"(?m)^        res = None$", '        res = "deepseek-coder"', text)
    assert count == 1
    base.write_text(text, encoding="utf-8")
    paths = [str(built / "python"), str(folder)]
    sys.path[:0] = paths
    import convert_hf_to_gguf
    from llama_cpp import Llama

    def opened(exported, outtype="f32"):
        file = exported / f"{outtype}.gguf"
        sys.argv, before = (
            ["convert", str(exported), "--outfile", str(file), "--outtype", outtype],
            sys.argv,
        )
        try:
            convert_hf_to_gguf.main()
        finally:
            sys.argv = before
        return Llama(str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=1, **FLOAT32)

    yield opened
    for path in paths:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer")


def exported(folder, tokenizer, size, **changes):
    torch.manual_seed(0)
    model = models.build(size, len(tokenizer), **SIZE | changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.ndim > 1 else p.copy_(torch.rand_like(p) + 0.5)
    export.write_native(model, tokenizer, folder)
    return model


def answers_of_both(model, llama, ids, count=24):
    """Greedy answers of `count` tokens of this recipe's model and of llama.cpp, which reads its own, and the largest
    difference of a logit, as a share of the largest one."""
    theirs = list(ids)
    for _ in range(count):
        llama.eval(theirs[llama.n_tokens :])
        theirs.append(int(llama.scores[len(theirs) - 1].argmax()))
    with torch.no_grad():
        expected = model(torch.tensor([theirs[:-1]])).logits[0].numpy()
    found = np.array(llama.scores[: len(theirs) - 1])
    ours = expected[len(ids) - 1 :].argmax(-1).tolist()
    return ours, theirs[len(ids) :], float(np.abs(found - expected).max() / np.abs(expected).max())


AGREE = {
    "generation 2": ("tiny", {"generation": 2}),
    "generation 2, YaRN": ("tiny", {"generation": 2, "inference_rope_scaling": True}),
    "generation 3": ("tiny", {}),
    "generation 3, YaRN": ("tiny", {"inference_rope_scaling": True, "tie_word_embeddings": False, "head_dim": 20}),
    "generation 2, experts": ("tiny-moe", {"generation": 2, "norm_topk_prob": False}),
    "generation 2, experts, two shared": ("tiny-moe", {"generation": 2, "norm_topk_prob": False, "n_shared_experts": 2}),
    "generation 2, one of the experts": ("tiny-moe", {"generation": 2, "num_experts_per_tok": 1, "n_shared_experts": 0}),
    "generation 3, experts": ("tiny-moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}),
    "generation 3, one of the experts": ("tiny-moe", {"norm_topk_prob": True}),
}  # fmt: skip
DIFFER = {
    "generation 2, experts": ("tiny-moe", {"generation": 2}),
    "generation 3, experts": ("tiny-moe", {"num_experts_per_tok": 2}),
    "generation 3, one of the experts": ("tiny-moe", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AGREE)
def test_llama_cpp_answers_as_this_recipe_does(case, llama, tokenizer, tmp_path):
    size, changes = AGREE[case]
    model = exported(tmp_path / "out", tokenizer, size, **changes)
    assert export.note_for_llama_cpp(export.native_config(model.config)) is None
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    ours, theirs, apart = answers_of_both(model, llama(tmp_path / "out"), ids)
    assert ours == theirs and apart < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", DIFFER)
def test_where_llama_cpp_answers_otherwise_the_export_says_so(case, llama, tokenizer, tmp_path):
    size, changes = DIFFER[case]
    model = exported(tmp_path / "out", tokenizer, size, **changes)
    note = export.note_for_llama_cpp(export.native_config(model.config))
    assert "norm_topk_prob" in note and "\n" not in note
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    *_, apart = answers_of_both(model, llama(tmp_path / "out"), ids, 1)
    assert 1e-3 < apart < 10, "it computes something, and something else"


@pytest.mark.slow
def test_what_llama_cpp_does_not_load_is_said(llama, tokenizer, tmp_path):
    model = exported(tmp_path / "out", tokenizer, "tiny-moe", generation=2, head_dim=20)
    assert "will not load it" in export.note_for_llama_cpp(export.native_config(model.config))
    with pytest.raises(ValueError, match="Failed to load"):
        llama(tmp_path / "out")


@pytest.mark.slow
def test_llama_cpp_reads_texts_as_the_tokenizer_does(llama, tokenizer, tmp_path):
    exported(tmp_path / "out", tokenizer, "tiny")
    reader = llama(tmp_path / "out", "bf16")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert reader.tokenize(text.encode(), add_bos=True, special=True) == ids, "no second one"
    assert reader.token_eos() == tokenizer.eos_token_id
    assert reader.metadata["tokenizer.chat_template"] == tokenizer.chat_template
