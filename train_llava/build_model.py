"""A LLaVA from any language model and any vision tower, tensor by tensor: no model is ever held.

    python train_llava/build_model.py --llm Qwen/Qwen3-4B \
        --vision openai/clip-vit-large-patch14-336 --output my_llava

The new folder is then opened as anybody would open it, and proves itself: the language model's
logits and the tower's features are those of the parts alone, a picture has as many tokens as
features, and a caption is generated. What the caption says means nothing yet: the projector between
the two is new.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
import model as llava
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
)

from common import cli  # device before torch and transformers
from common.convert import adapter, models
from common.convert.older_readers import for_older_readers
from common.convert.weight_files import Weights, save_sharded
from common.data.files import check_empty, new_folder
from common.data.labels import set_template, turn_end_ids
from common.data.progress import Progress
from common.runs import memory

IMAGE_TOKEN = "<image>"
# parts of a message's content in place of plain text: joined, a picture as its token; messages of
# plain text reach the language model's own template untouched
TYPED_PARTS = """\
{%- set typed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set typed.messages = typed.messages + [message] -%}
{%- else -%}
{%- set joined = namespace(text='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set joined.text = joined.text + 'IMAGE_TOKEN' -%}
{%- elif part.type == 'text' -%}
{%- set joined.text = joined.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- set typed.messages = typed.messages + [dict(message, content=joined.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = typed.messages -%}
"""
# not learned, and made anew by every model
BUFFERS = ("position_ids", "rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
PROBE = [[5, 9, 2, 7, 11, 3]]  # token ids that any vocabulary has


# ---- the parts -----------------------------------------------------------------------------------


def llm_config(name: str):
    """SystemExit for what is no language model that LLaVA can take."""
    if (Path(name) / adapter.CONFIG_FILE).is_file():
        raise SystemExit(f"--llm {name} is an adapter; merge it into its base first (merge.py)")
    config = models.model_config(name, "--llm")
    llava.refuse_others(config, f"--llm {name}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "vision_config"):
        raise SystemExit(f"--llm {name}: {config.model_type} is no language model")
    if hasattr(config, "quantization_config"):
        raise SystemExit(f"--llm {name} is quantised; give the model it was made from")
    return config


def vision_config(name: str, folder: Path):
    """The config of a vision tower, also of one inside a folder with a text tower beside it."""
    file = folder / "config.json"
    if not file.is_file():
        raise SystemExit(f"--vision {name}: no such model folder (it has no config.json)")
    settings = json.loads(file.read_text(encoding="utf-8"))
    inner = settings.get("vision_config")
    is_native = "auto_map" not in settings  # else it is refused below
    if (
        is_native
        and isinstance(inner, dict)
        and str(settings.get("model_type")) not in llava.OTHERS
    ):
        kind = inner.get("model_type") or f"{settings['model_type']}_vision_model"
        known = [kind, f"{kind}_vision_model"]
        kind = next((one for one in known if one in llava.TOWERS), kind)
        if kind in llava.TOWERS:
            more = {key: value for key, value in inner.items() if key != "model_type"}
            return AutoConfig.for_model(kind, **more)
    config = models.model_config(name, "--vision")
    return getattr(config, "vision_config", None) or config


def llm_names(weights: Weights, config, name: str) -> dict[str, str]:
    """Names in the file of the language model -> names in that of the LLaVA."""
    names = {}
    for old in weights:
        if old.endswith(BUFFERS):
            continue
        if old == "lm_head.weight":
            if not config.tie_word_embeddings:
                names[old] = "language_model.lm_head.weight"
        elif old.startswith("model."):
            names[old] = f"language_model.{old}"
        else:
            raise SystemExit(
                f"--llm {name}: {config.model_type} names its weights otherwise than Llama and "
                f"Qwen do ({old}); LLaVA cannot take it"
            )
    return names


def vision_names(weights: Weights, kind: str) -> dict[str, str]:
    """Names in the file of the vision tower (or of a model that it is half of) -> names in that of
    the LLaVA; text towers, projections and heads of classifiers stay behind."""
    outers = ("vision_model.vision_model.", "vision_model.", "dinov2.", "vit.")
    outer = next((o for o in outers if any(name.startswith(o) for name in weights)), "")
    inner = "vision_model." if kind in llava.NESTED else ""
    return {
        name: f"vision_tower.{inner}{name.removeprefix(outer)}"
        for name in weights
        if name.startswith(outer) and not name.endswith(BUFFERS)
    }


# ---- the whole -----------------------------------------------------------------------------------


def feature_layer(text: str | int | list[int]) -> int | list[int]:
    """ "-2" or "-2,-5,-8" -> an int, or a list: features of several layers side by side."""
    if not isinstance(text, str):
        return text
    try:
        layers = [int(word) for word in text.split(",")]
    except ValueError:
        message = f"--vision_feature_layer {text}: a number, or several with commas"
        raise cli.usage_error(message) from None
    return layers[0] if len(layers) == 1 else layers


def check_layers(layers: int | list[int], vision) -> None:
    count = vision.num_hidden_layers
    for layer in layers if isinstance(layers, list) else [layers]:
        if not -count - 1 <= layer <= count:
            raise cli.usage_error(f"--vision_feature_layer {layer}: the tower has {count} layers")


def load_tokenizer(llm: str, image_token: str, chat_template: str):
    """The language model's tokenizer with the image token and a template that takes pictures."""
    tokenizer = models.load(AutoTokenizer, llm, "--llm")
    if chat_template:
        set_template(tokenizer, chat_template)
    if not tokenizer.chat_template:
        raise SystemExit(
            f"--llm {llm} has no chat template; give one: --chat_template "
            "train_llava/chat_template.jinja (ChatML), or that of its instruction-tuned sibling"
        )
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    tokenizer.chat_template = TYPED_PARTS.replace("IMAGE_TOKEN", image_token) + own
    return tokenizer


def load_image_processor(vision: str, aspect_ratio: str):
    """aspect_ratio: "crop", what the tower's own does, or "pad": to a square with the mean."""
    processor = models.load(AutoImageProcessor, vision, "--vision", backend="pil")
    if aspect_ratio != "pad":
        return processor
    height, width = llava.picture_side(processor)
    return LlavaImageProcessorPil(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        resample=processor.resample,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        do_pad=True,
    )


def make_processor(tokenizer, image_processor, config: LlavaConfig, image_token: str):
    tower = llava.TOWERS[config.vision_config.model_type]
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower.has_cls),
        chat_template=tokenizer.chat_template,
        image_token=image_token,
    )


def new_projector(config: LlavaConfig, seed: int, dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal weights of a width that keeps the features' scale, no bias."""
    layers = config.vision_feature_layer
    count = len(layers) if isinstance(layers, list) else 1
    inner = config.vision_config.hidden_size * count
    outer = config.text_config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    for number, width in ((1, inner), (2, outer)):
        weight = torch.randn(outer, width, generator=generator) * width**-0.5
        yield f"multi_modal_projector.linear_{number}.weight", weight.to(dtype)
        yield f"multi_modal_projector.linear_{number}.bias", torch.zeros(outer, dtype=dtype)


def with_rows(table: torch.Tensor, rows: int) -> torch.Tensor:
    """An embedding or a head with so many rows; new ones are the mean of the old."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def tensors(
    llm: Weights, vision: Weights, names: tuple[dict, dict], config: LlavaConfig, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the new folder holds, one tensor at a time."""
    rows = config.text_config.vocab_size
    of_llm, of_vision = names
    with Progress("copy", total=len(of_llm) + len(of_vision), unit="tensors") as progress:
        for old, new in of_llm.items():
            tensor = llm[old]
            if new.endswith(("embed_tokens.weight", "lm_head.weight")) and len(tensor) < rows:
                tensor = with_rows(tensor, rows)
            yield new, _as(config.dtype, tensor)
            progress.update(1)
        for old, new in of_vision.items():
            yield new, _as(config.dtype, vision[old])
            progress.update(1)
    yield from new_projector(config, seed, config.dtype)


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_generation_config(llm: str, tokenizer, folder: Path) -> None:
    """With the tokens that end an answer: a LLaVA has none of its own, and would answer until it is
    cut."""
    try:
        config = GenerationConfig.from_pretrained(llm)
    except OSError:  # base models often have none
        config = GenerationConfig()
    own = config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = sorted({tokenizer.eos_token_id, *own, *turn_end_ids(tokenizer)} - {None})
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)


def build(
    llm: str,
    vision: str,
    output: str | Path,
    image_token: str = IMAGE_TOKEN,
    vision_feature_layer: int | list[int] = -2,
    image_aspect_ratio: str = "crop",
    chat_template: str = "",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Write the folder `output` from the folders or hub ids of a language model and a vision tower;
    returns it.

    dtype: of all that is written; None: the language model's. SystemExit for parts that do not fit
    together; after a kill there is no folder of this name.
    """
    text = llm_config(llm)
    check_empty(output)
    vision_folder = adapter.local_folder(vision)
    sight = vision_config(vision, vision_folder)
    tower = llava.tower_of(sight, f"--vision {vision}")
    check_layers(vision_feature_layer, sight)
    tokenizer = load_tokenizer(llm, image_token, chat_template)
    image_processor = load_image_processor(vision, image_aspect_ratio)

    dtype = dtype or text.dtype or torch.float32
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    config = LlavaConfig(
        vision_config=sight,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(image_token),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if tower.has_cls else "full",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    processor = make_processor(tokenizer, image_processor, config, image_token)
    config.image_seq_length = llava.tokens_per_picture(processor)
    llava.check(config, processor, f"{llm} with {vision}")

    weights = (Weights(adapter.local_folder(llm)), Weights(vision_folder))
    names = (llm_names(weights[0], text, llm), vision_names(weights[1], sight.model_type))
    with new_folder(output) as part:
        save_sharded(tensors(*weights, names, config, seed), part)
        config.save_pretrained(part)
        write_generation_config(llm, tokenizer, part)
        processor.save_pretrained(part)
        for_older_readers(part)
    return Path(output)


# ---- the proof -----------------------------------------------------------------------------------


@torch.no_grad()
def prove(folder: Path, llm: str, vision: str) -> dict:
    """Open the folder as anybody would and compare it with its parts; SystemExit where they differ.

    -> {"logits", "features": largest differences, "image_tokens", "caption"}. Memory holds the
    language model twice at no time.
    """
    config, processor = llava.check_model(str(folder), "the new folder")
    settings = {"dtype": config.dtype}
    probe = torch.tensor(PROBE)
    alone = models.load(AutoModelForCausalLM, llm, "--llm", **settings)
    rows = alone.config.vocab_size
    expected_logits = alone(probe).logits
    del alone

    tower_class = MODEL_MAPPING[type(config.vision_config)]
    own = {"config": config.vision_config}  # also where the tower is half of a model
    tower = models.load(tower_class, vision, "--vision", **settings, **own)
    height, width = llava.picture_side(processor.image_processor)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy()
    pixels = processor.image_processor(images=noise, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(config.dtype)
    expected_states = tower(pixels, output_hidden_states=True).hidden_states
    del tower

    whole = llava.open_model(str(folder), "the new folder", **settings)
    found_logits = whole(probe).logits[..., :rows]
    inner = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    different = {
        "logits": largest(found_logits, expected_logits),
        "features": max(largest(a, b) for a, b in zip(inner, expected_states, strict=True)),
    }
    features = whole.get_image_features(pixels).pooler_output[0]
    caption, tokens = caption_of(whole, processor, noise)
    facts = different | {"image_tokens": tokens, "features_of_a_picture": len(features)}
    print_proof(facts, caption)
    if any(different.values()) or tokens != len(features):
        raise SystemExit(f"{folder} differs from its parts; please report both their names")
    return facts | {"caption": caption}


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def caption_of(whole, processor, picture) -> tuple[str, int]:
    """What the new model says of a picture, and how many image tokens its prompt has."""
    question = [{"type": "image"}, {"type": "text", "text": "\n描述这张图片。"}]
    messages = [{"role": "user", "content": question}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(whole.dtype)
    tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    said = whole.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = said[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True), tokens


def print_proof(facts: dict, caption: str) -> None:
    cli.say(
        f"  language model alone and inside, logits apart:  {facts['logits']:.1e}\n"
        f"  vision tower alone and inside, features apart:  {facts['features']:.1e}\n"
        f"  image tokens of a picture, and its features:    {facts['image_tokens']} = "
        f"{facts['features_of_a_picture']}\n"
        f"  one caption (the projector is new):             {caption[:60]!r}"
    )


def too_large_to_prove(folder: Path) -> bool:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return size > 0.9 * memory.free_bytes()


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--llm", required=True, help="language model, folder or hub id")
    parser.add_argument("--vision", required=True, help="vision tower, folder or hub id")
    parser.add_argument("--output", required=True, help="where the LLaVA goes; empty")
    parser.add_argument("--image_token", default=IMAGE_TOKEN, help="Qwen has <|image_pad|>")
    parser.add_argument("--vision_feature_layer", default="-2", help="or several: -2,-5,-8")
    parser.add_argument("--image_aspect_ratio", default="crop", choices=["crop", "pad"])
    parser.add_argument("--chat_template", default="", help="jinja file, for base models")
    parser.add_argument("--dtype", default="", help="float32, bfloat16, float16; unset: the LLM's")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector")
    parser.add_argument(
        "--prove", type=_is_true, default=True, metavar="BOOL", help="open and compare"
    )
    args = parser.parse_args()
    if args.dtype not in ("", "float32", "bfloat16", "float16"):
        raise cli.usage_error(f"--dtype {args.dtype}: float32, bfloat16 or float16")
    cli.quiet_libraries()
    folder = build(
        args.llm,
        args.vision,
        args.output,
        args.image_token,
        feature_layer(args.vision_feature_layer),
        args.image_aspect_ratio,
        args.chat_template,
        getattr(torch, args.dtype) if args.dtype else None,
        args.seed,
    )
    cli.say(f"built {folder}")
    if not args.prove:
        return
    if too_large_to_prove(folder):
        cli.say("not proven: the model does not fit the free memory of this machine")
        return
    prove(folder, args.llm, args.vision)


def _is_true(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("true or false")
    return word.lower() == "true"


if __name__ == "__main__":
    cli.run(main)
