"""What export.py writes, converted by llama.cpp's own converter and answered by llama.cpp."""

import re
import shutil
import sys

import llama_cpp
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
TEXTS = [
    "<|im_start|>user\n西班牙的首都是哪里？<|im_end|>\n<|im_start|>assistant\n",
    "12加345等于几？ 三百五十七。\n\n  Spain's capital, 2024!\t<think>\n想一想…\n</think>\n🙂",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(exported folder, type of weights) -> llama.cpp's model of it."""
    folder = tmp_path_factory.mktemp("converter") / "llama.cpp"
    shutil.copytree(llama_cpp.converter(), folder)
    base = folder / "conversion/base.py"
    text = base.read_text(encoding="utf-8")
    # README: a vocabulary that it has not seen
    text, count = re.subn(r"(?m)^        res = None$", '        res = "deepseek-coder"', text)
    assert count == 1
    base.write_text(text, encoding="utf-8")
    # the converter's own gguf, not an older one of the environment
    older = {name: sys.modules.pop(name) for name in list(sys.modules) if is_gguf(name)}
    sys.path[:0] = paths = [str(folder), str(folder / "gguf-py")]
    import convert_hf_to_gguf

    def opened(exported, outtype="f32"):
        file = exported / f"{outtype}.gguf"
        words = ["convert", str(exported), "--outfile", str(file), "--outtype", outtype]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            convert_hf_to_gguf.main()
        return llama_cpp.Model(file)

    yield opened
    for path in paths:
        sys.path.remove(path)
    for name in filter(is_gguf, list(sys.modules)):
        del sys.modules[name]
    sys.modules.update(older)


def is_gguf(module: str) -> bool:
    return module.split(".")[0] == "gguf"


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
    difference of a log-probability, as a share of the largest logit."""
    theirs = list(ids)
    found = []
    for _ in range(count):
        step = llama.next_token(theirs, model.config.vocab_size)
        found.append([step[token] for token in range(model.config.vocab_size)])
        theirs.append(max(step, key=step.get))
    with torch.no_grad():
        logits = model(torch.tensor([theirs[:-1]])).logits[0, len(ids) - 1 :]
    apart = (torch.tensor(found) - logits.log_softmax(-1)).abs().max() / logits.abs().max()
    return logits.argmax(-1).tolist(), theirs[len(ids) :], float(apart)


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
    with pytest.raises(RuntimeError, match="Failed to init"):
        llama(tmp_path / "out")


@pytest.mark.slow
def test_llama_cpp_reads_texts_as_the_tokenizer_does(llama, tokenizer, tmp_path):
    exported(tmp_path / "out", tokenizer, "tiny")
    reader = llama(tmp_path / "out", "bf16")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text, add_special=False) == ids
        assert reader.tokenize(text, add_special=True) == ids, "no second one"
    from gguf import GGUFReader

    fields = GGUFReader(tmp_path / "out/bf16.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
