"""chinese_clip_ddp's models: two towers of any kind, what a folder keeps, what moves and what does not, adapters,
patches that are left out."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from harness import own_modules
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

NAMES = (
    "model",
    "towers",
    "assemble",
    "modeling_two_towers",
    "tiny_base",
    "contrastive",
)
model, towers, assemble, modeling, tiny_base, contrastive = own_modules("chinese_clip_ddp", *NAMES)  # fmt: skip

TOWER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = dict(**TOWER, image_size=32, patch_size=8)
TEXTS = ["一只红色的猫", "两条鱼在水里", "猫"]
VISION_KINDS = ("ViT", "Dinov2", "SiglipVision", "CLIPVision", "ChineseCLIPVision")
TEXT_KINDS = ("Bert", "Qwen3")


def tokenizer():
    return tiny_base.make_tokenizer(TEXTS)


def processor():
    size = {"height": 32, "width": 32}
    return transformers.CLIPImageProcessorPil(size=size, do_center_crop=False)


def text_config(kind="Bert", **more):
    more |= {"num_key_value_heads": 1, "head_dim": 16} if kind == "Qwen3" else {}
    size = dict(vocab_size=120, max_position_embeddings=64)
    return getattr(transformers, f"{kind}Config")(**TOWER, **size, **more)


def two_towers(text="Bert", vision="ViT", **settings):
    torch.manual_seed(0)
    config = modeling.TwoTowersConfig(
        text_config(text), getattr(transformers, f"{vision}Config")(**VISION), projection_dim=24, **settings
    )  # fmt: skip
    return modeling.TwoTowers(config).eval()


def native(kind="ChineseCLIP"):
    torch.manual_seed(0)
    text = dict(**TOWER, vocab_size=120, max_position_embeddings=64)
    config = getattr(transformers, f"{kind}Config")
    if kind != "Siglip":
        config = config(text_config=text, vision_config=VISION, projection_dim=24)
    else:
        config = config(text_config=text, vision_config=VISION)
    return getattr(transformers, f"{kind}Model")(config).eval()


def saved(one, folder):
    one.save_pretrained(folder)
    model.Preparation(tokenizer(), processor()).save_pretrained(folder)
    return folder


def batch_of(one):
    prepared = model.Preparation(tokenizer(), processor(), 16)
    batch = prepared.tokens(TEXTS)
    batch["pixel_values"] = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return batch


def picture(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


# ---- two towers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", VISION_KINDS)
@pytest.mark.parametrize("text", TEXT_KINDS)
def test_any_text_encoder_with_any_vision_tower_and_back(tmp_path, text, vision):
    one = two_towers(text, vision, pooling="last" if text == "Qwen3" else "cls")
    batch = batch_of(one)
    expected = model.text_features(one, batch), model.image_features(one, batch)
    saved(one, tmp_path)
    again = model.open_model(str(tmp_path), dtype=torch.float32).eval()
    found = model.text_features(again, batch), model.image_features(again, batch)
    assert type(again).__name__ == "TwoTowers"
    assert all((a - b).abs().max() == 0 for a, b in zip(found, expected, strict=True))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(one.state_dict()), "a checkpoint is read back by the names in memory"


def test_features_are_those_of_the_towers_by_hand():
    one = two_towers("Bert", "ViT", pooling="mean", projection="mlp")
    batch = batch_of(one)
    hidden = one.text_model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    rows = []
    for i, mask in enumerate(batch["attention_mask"]):
        vector = hidden[i, : int(mask.sum())].mean(0)
        first, _, second = one.text_projection
        rows.append(F.normalize(second(F.gelu(first(vector))), dim=0))
    assert (torch.stack(rows) - model.text_features(one, batch)).abs().max() < 1e-6
    hidden = one.vision_model(batch["pixel_values"]).last_hidden_state[:, 0]
    first, _, second = one.visual_projection
    expected = F.normalize(second(F.gelu(first(hidden))), dim=1)
    assert (expected - model.image_features(one, batch)).abs().max() < 1e-6


@pytest.mark.parametrize("how", modeling.POOLINGS)
def test_pooling_asks_the_mask_and_not_a_place(how):
    """Padding on either side, of whatever length, changes nothing."""
    hidden = torch.randn(5, 8)
    expected = {"cls": hidden[0], "last": hidden[4], "mean": hidden.mean(0)}[how]
    right = torch.cat([hidden, torch.full((3, 8), 9.0)])[None], torch.tensor([[1] * 5 + [0] * 3])
    left = torch.cat([torch.full((3, 8), 9.0), hidden])[None], torch.tensor([[0] * 3 + [1] * 5])
    assert torch.allclose(modeling.pool(right[0], how, right[1])[0], expected, atol=1e-6)
    if how != "cls":
        assert torch.allclose(modeling.pool(left[0], how, left[1])[0], expected, atol=1e-6)


def test_a_sigmoid_tower_pools_as_it_was_trained():
    one = two_towers("Bert", "SiglipVision", projection="none")
    batch = batch_of(one)
    own = one.vision_model(batch["pixel_values"]).pooler_output
    assert torch.equal(F.normalize(own, dim=1), model.image_features(one, batch))


# ---- put together ------------------------------------------------------------------------------------------------


def flags(text, image, **more):
    settings = dict(pooling="cls", image_pooling="own", projection="linear", projection_dim=24)
    settings |= {"loss": "softmax"} | more
    return SimpleNamespace(text_model_name_or_path=str(text), image_model_name_or_path=str(image), **settings)  # fmt: skip


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Folders of a text encoder with a pooler and of a whole CLIP, of which the image tower is meant."""
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1)
    transformers.BertModel(text_config()).save_pretrained(tmp_path / "text")
    tokenizer().save_pretrained(tmp_path / "text")
    saved(native("CLIP"), tmp_path / "clip")
    return tmp_path / "text", tmp_path / "clip"


def test_two_folders_become_one(parts):
    args, training = flags(*parts), SimpleNamespace(seed=5, hf_deepspeed_config=None)
    folder = assemble.assemble(args, training, assemble.plan(args))
    assert folder == assemble.assemble(args, training, assemble.plan(args)), "made once"
    made = load_file(f"{folder}/model.safetensors")
    text, clip = (load_file(part / "model.safetensors") for part in parts)
    for name, tensor in text.items():
        if not name.startswith("pooler"):
            assert torch.equal(made[f"text_model.{name}"], tensor), name
    towers_of_clip = [name for name in clip if name.startswith("vision_model.")]
    assert towers_of_clip and all(torch.equal(made[name], clip[name]) for name in towers_of_clip)
    embedder = model.load(folder)
    assert embedder.size == 24 and embedder.embed_text(TEXTS).shape == (3, 24)


def test_another_processor_or_tokenizer_of_a_tower_makes_another_folder(parts):
    args, training = flags(*parts), SimpleNamespace(seed=5, hf_deepspeed_config=None)
    first = assemble.assemble(args, training, assemble.plan(args))
    edited(parts[1], "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    second = assemble.assemble(args, training, assemble.plan(args))
    assert second != first
    assert list(model.load(second).image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_widths_that_differ_need_a_projection(parts, tmp_path):
    narrow = dict(VISION, hidden_size=16)
    transformers.ViTModel(transformers.ViTConfig(**narrow)).save_pretrained(tmp_path / "narrow")
    args = flags(parts[0], tmp_path / "narrow", projection="none")
    with pytest.raises(SystemExit, match="32 numbers, the image tower's 16"):
        assemble.plan(args)
    assert assemble.plan(flags(parts[0], parts[1], projection="none")).projection_dim == 32


def test_towers_that_cannot_be_are_one_line(parts, tmp_path):
    (tmp_path / "naflex").mkdir()
    config = transformers.Siglip2VisionConfig(**TOWER, patch_size=8, num_patches=16)
    config.save_pretrained(tmp_path / "naflex")
    with pytest.raises(SystemExit, match="NaFlex SigLIP2.*fixed size"):
        assemble.plan(flags(parts[0], tmp_path / "naflex"))
    with pytest.raises(SystemExit, match="no vision tower"):
        assemble.plan(flags(parts[0], parts[0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="not a model that can be loaded"):
        assemble.plan(flags(tmp_path / "empty", parts[1]))


# ---- a folder, reopened ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ChineseCLIP", "CLIP", "Siglip", "two towers"])
def test_a_folder_gives_the_vectors_it_had(tmp_path, kind):
    one = two_towers() if kind == "two towers" else native(kind)
    saved(one, tmp_path)
    embedder = model.load(tmp_path, device="cpu")
    prepared = embedder.preparation
    batch = prepared.tokens(TEXTS)
    assert torch.equal(embedder.embed_text(TEXTS), model.text_features(one, batch))
    pixels = torch.stack([prepared.pixels(picture(i)) for i in range(3)])
    expected = model.image_features(one, {"pixel_values": pixels})
    assert torch.equal(embedder.embed_images([picture(i) for i in range(3)]), expected)
    assert ("attention_mask" in batch) == (kind != "Siglip")
    assert prepared.max_length == {"ChineseCLIP": 52, "Siglip": 64}.get(kind, 64)
    norms = embedder.embed_text(TEXTS, batch_size=2).norm(dim=1)
    assert torch.allclose(norms, torch.ones(3)) and embedder.embed_text([]).shape == (0, embedder.size)  # fmt: skip
    assert len(embedder.fingerprint) == 64


def test_quotes_are_those_of_chinese_clips_training():
    prepared = model.Preparation(tokenizer(), processor(), 16, quotes=True)
    plain = prepared.tokens(['"猫"'])["input_ids"]
    assert torch.equal(prepared.tokens(["“猫”"])["input_ids"], plain)


def edited(folder, name: str, **settings) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_the_fingerprint_is_of_weights_config_and_processor(tmp_path):
    """Vectors of two folders may be compared where it is equal, and nowhere else."""
    one = two_towers(pooling="cls")
    saved(one, tmp_path)
    first = model.load(tmp_path).fingerprint
    edited(tmp_path, "config.json", transformers_version="0", dtype="bfloat16", caption_length=9)
    assert model.load(tmp_path).fingerprint == first, "saved anew, nothing changed"
    edited(tmp_path, "config.json", pooling="mean")
    pooled = model.load(tmp_path).fingerprint
    edited(tmp_path, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    normalised = model.load(tmp_path).fingerprint
    with torch.no_grad():
        one.visual_projection.weight[12, 3] += 1
    one.save_pretrained(tmp_path)
    projected = model.load(tmp_path).fingerprint
    assert len({first, pooled, normalised, projected}) == 4


def test_a_weight_between_the_samples_of_a_large_file_is_seen(tmp_path, monkeypatch):
    """As projections are that moved alone."""
    monkeypatch.setattr(model.adapter, "SAMPLE_BYTES", 1)
    monkeypatch.setattr(model.adapter, "SAMPLES", 1)
    one = two_towers()
    one.save_pretrained(tmp_path)
    before = model.of_weights(str(tmp_path))
    for name in ("text_projection", "visual_projection"):
        with torch.no_grad():
            getattr(one, name).weight.add_(0.1)
        one.save_pretrained(tmp_path)
        after = model.of_weights(str(tmp_path))
        assert after != before, name
        before = after


@pytest.mark.parametrize("kind", ["ChineseCLIP", "CLIP", "Siglip", "two towers"])
def test_the_window_of_captions_is_kept_with_the_model(tmp_path, kind):
    one = two_towers() if kind == "two towers" else native(kind)
    one.config.caption_length = 9
    saved(one, tmp_path)
    embedder = model.load(tmp_path)
    assert embedder.preparation.max_length == (64 if kind == "Siglip" else 9)
    long = "红" * 30
    same = embedder.embed_text([long, long + "猫"])
    assert torch.equal(same[0], same[1]) == (kind != "Siglip"), "what is beyond it is not seen"
    config = model.models.model_config(str(tmp_path))
    other = model.load_preparation(str(tmp_path), config, 12).max_length
    assert other == (64 if kind == "Siglip" else 12), "a flag goes first"


def test_what_is_no_text_image_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no trained model here"):
        model.load(tmp_path)
    transformers.BertModel(text_config()).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="bert is no text-image model"):
        model.load(tmp_path)


# ---- what moves --------------------------------------------------------------------------------------------------


def moving(one) -> set[str]:
    return {name.split(".")[0] for name, p in one.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("train", towers.TRAINED)
def test_what_is_not_to_move_has_no_gradient_and_no_dropout(train):
    one = two_towers()
    towers.choose_trained(one, train, (), "softmax")
    assert moving(one) == {*towers.TRAINED[train], "logit_scale"}
    one.train()
    for part, name in towers.TOWERS.items():
        tower = getattr(one, name)
        assert tower.training == (name in towers.TRAINED[train]) == (part not in towers.frozen_towers(one))  # fmt: skip
        assert all(module.training == tower.training for module in tower.modules())
    towers.choose_trained(one, train, (), "sigmoid")
    assert "logit_bias" in moving(one)


def test_parameters_that_nothing_depends_on_are_found():
    one = two_towers("Bert", "Dinov2", image_pooling="cls")
    towers.choose_trained(one, "both", (), "softmax")
    unused = towers.freeze_unused(one, model.Preparation(tokenizer(), processor(), 16))
    assert unused == ["vision_model.embeddings.mask_token"]
    batch = batch_of(one)
    found = towers.for_training(one)(**batch)
    loss = contrastive.contrastive_loss(
        contrastive.Embeddings(found["image_embeds"], found["text_embeds"], found["scale"])
    )
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in one.parameters())


def test_groups_have_their_rates_and_only_matrices_decay():
    one = two_towers()
    towers.choose_trained(one, "both", (), "sigmoid")
    rates = {"text": 1e-5, "image": 1e-4, "projection": 1e-3, "scale": 1e-2}
    groups = towers.parameter_groups(one, rates, 0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in one.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == rates[towers.part_of(name)], name
        is_matrix = parameter.dim() > 1
        assert group["weight_decay"] == (0.1 if is_matrix else 0.0), name
        assert not (is_matrix and ("norm" in name.lower() or name.endswith("bias"))), name


def test_a_fresh_sigmoid_model_starts_at_ten_and_minus_ten(tmp_path):
    one = native("Siglip")
    towers.settle_scale(one, "sigmoid", is_fresh=True)
    assert math.isclose(one.logit_scale.exp().item(), 10, rel_tol=1e-6)
    assert one.logit_bias.item() == -10
    other = native("ChineseCLIP")
    towers.settle_scale(other, "sigmoid", is_fresh=False)
    with torch.no_grad():
        other.logit_bias.fill_(-7.5)
    saved(towers.for_training(other), tmp_path)
    assert model.load(tmp_path).logit_bias == -7.5, "a bias that the class has no place for is kept"
    trained = native("Siglip")
    with torch.no_grad():
        trained.logit_scale.fill_(4.0)
    towers.settle_scale(trained, "sigmoid", is_fresh=False)
    assert trained.logit_scale.item() == 4, "what was trained stays"


def test_the_scale_stays_within_its_bounds_and_finds_back():
    one = two_towers()
    with torch.no_grad():
        one.logit_scale.fill_(9.0)
    found = towers.for_training(one)(**batch_of(one))
    assert math.isclose(found["scale"].item(), 100, rel_tol=1e-6)
    found["scale"].backward()
    assert one.logit_scale.grad.item() > 0


# ---- adapters ----------------------------------------------------------------------------------------------------


def adapted(which: str, names="all-linear"):
    one = two_towers()
    args = SimpleNamespace(lora_towers=which, lora_r=4, lora_alpha=12, lora_dropout=0.0, target_modules=names)  # fmt: skip
    towers.add_lora(one, args)
    towers.choose_trained(one, "both", tuple(which.split(",")), "softmax")
    return one


def adapters_of(one) -> dict[str, int]:
    names = [name for name, _ in one.named_parameters() if ".lora_A." in name]
    return {part: sum(name.startswith(tower) for name in names) for part, tower in towers.TOWERS.items()}  # fmt: skip


def test_adapters_are_where_they_were_asked_for_and_nowhere_else():
    """A layer of either tower has 6 linear layers, the towers 2 layers each."""
    assert adapters_of(adapted("text")) == {"text": 12, "image": 0}
    assert adapters_of(adapted("image")) == {"text": 0, "image": 12}
    assert adapters_of(adapted("text,image")) == {"text": 12, "image": 12}
    assert adapters_of(adapted("text", "query,value")) == {"text": 4, "image": 0}
    with pytest.raises(SystemExit, match="no layer of text_model is called so.*query"):
        adapted("text", "q_proj")
    one = adapted("text")
    text = [n for n, p in one.text_model.named_parameters() if p.requires_grad]
    assert text and all(".lora_" in name for name in text), "of that tower nothing else moves"
    image = [p.requires_grad for p in one.vision_model.parameters()]
    assert all(image) and moving(one) >= {"text_projection", "visual_projection", "logit_scale"}


def test_adapters_end_in_plain_weights(tmp_path):
    one = adapted("text,image")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1, generator=generator)
    one.eval()
    batch = batch_of(one)
    expected = model.text_features(one, batch), model.image_features(one, batch)
    one = towers.for_training(one)
    saved(one, tmp_path)
    towers.make_plain(tmp_path, one.numbers, factor=3.0)
    again = model.open_model(str(tmp_path), dtype=torch.float32).eval()
    found = model.text_features(again, batch), model.image_features(again, batch)
    assert set(load_file(tmp_path / "model.safetensors")) == set(two_towers().state_dict())
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=True))
    plain = model.text_features(two_towers(), batch)
    assert (found[0] - plain).abs().max() > 1e-3


# ---- patches that are left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", VISION_KINDS)
def test_half_of_the_patches_are_left_out_in_training_only(vision):
    one = two_towers("Bert", vision)
    pixels = batch_of(one)["pixel_values"]
    expected = model.image_features(one, {"pixel_values": pixels})
    seen = []
    assert towers.can_drop_patches(one.config.vision_config)
    towers.drop_patches(one.vision_model, 0.5)
    one.vision_model.embeddings.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(model.image_features(one, {"pixel_values": pixels}), expected)
    one.train()
    torch.manual_seed(0)
    first = model.image_features(one, {"pixel_values": pixels})
    whole, dropped = seen
    others = whole.shape[1] - 16  # CLS, where there is one
    assert dropped.shape[1] == others + 8 and first.shape == expected.shape
    assert torch.equal(dropped[:, :others], whole[:, :others])
    patches = whole[:, others:]
    for row, kept in zip(patches, dropped[:, others:], strict=True):
        places = [int((row == token).all(1).nonzero()[0]) for token in kept]
        assert len(set(places)) == 8, "each once, from the same picture"
    torch.manual_seed(1)
    assert not torch.equal(model.image_features(one, {"pixel_values": pixels}), first)


def test_towers_with_positions_inside_are_not_cut():
    assert not towers.can_drop_patches(transformers.DINOv3ViTConfig())


# ---- the built-in model ------------------------------------------------------------------------------------------


def test_the_built_in_model_is_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DANPU_CACHE", str(tmp_path))
    folder = tiny_base.tiny_model(TEXTS)
    assert folder == tiny_base.tiny_model(TEXTS) and folder != tiny_base.tiny_model(TEXTS[:1])
    config = json.loads((tmp_path / "tiny" / folder.split("/")[-1] / "config.json").read_text())
    assert config["model_type"] == "chinese_clip"
    embedder = model.load(folder)
    parameters = sum(p.numel() for p in embedder.model.parameters())
    assert 0.5e6 < parameters < 1.5e6
    ids = embedder.tokenizer(TEXTS[0])["input_ids"]
    assert embedder.tokenizer.unk_token_id not in ids and len(ids) == len(TEXTS[0]) + 2
