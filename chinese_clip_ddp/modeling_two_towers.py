"""Any text encoder beside any vision tower: one model, one folder, opened by AutoModel.

For pairs that transformers has no class for (bge or Qwen3-Embedding with DINOv2 or SigLIP, ...).
The parts have CLIPModel's names: text_model, vision_model, text_projection, visual_projection,
logit_scale; logit_bias as in SiglipModel.

B texts or pictures, T tokens, H width of a tower, E width of the embeddings.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

POOLINGS = ("cls", "mean", "last")
IMAGE_POOLINGS = ("own", "cls", "mean")
PROJECTIONS = ("none", "linear", "mlp")


class TwoTowersConfig(PreTrainedConfig):
    """text_config, vision_config: of the towers, as config or dict.

    pooling: of the text tower's last layer: cls (first token), mean or last (real tokens only).
    image_pooling: own (the tower's pooler, as it was pre-trained; its first token where it has
        none), cls or mean.
    projection: none, linear (no bias, as CLIP) or mlp (two layers, GELU between).
    projection_dim: E; without a projection the towers' own width.
    """

    model_type = "two_towers"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        pooling: str = "cls",
        image_pooling: str = "own",
        projection: str = "linear",
        projection_dim: int = 512,
        logit_scale_init_value: float = 2.6592,
        logit_bias_init_value: float = -10.0,
        **kwargs,
    ):
        self.text_config = _as_config(text_config)
        self.vision_config = _as_config(vision_config)
        self.pooling = pooling
        self.image_pooling = image_pooling
        self.projection = projection
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        super().__init__(**kwargs)


def _as_config(config):
    """A tower's config as a dict, as JSON has it, becomes one of its own class."""
    if not isinstance(config, dict):
        return config
    fields = dict(config)
    return CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)


@dataclass
class TwoTowersOutput(ModelOutput):
    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


def tower(config) -> nn.Module:
    """The model of a config with random weights, without a pooler that nothing would use."""
    kind = MODEL_MAPPING[type(config)]
    config.use_cache = False  # nothing is generated
    takes = inspect.signature(kind.__init__).parameters
    more = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    return AutoModel.from_config(config, **more)


def projection(kind: str, width: int, size: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, size, bias=False)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, size, bias=False))


def pool(hidden: Tensor, how: str, mask: Tensor | None = None) -> Tensor:
    """[B, T, H] -> [B, H]. mask [B, T]: 1 for real tokens, on whichever side the padding is."""
    if how == "cls":
        return hidden[:, 0]
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
    if how == "last":
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = (mask.long() * places).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class TwoTowers(PreTrainedModel):
    """get_text_features and get_image_features give `pooler_output` [B, E], projected and not yet
    normalised, as the models of transformers do."""

    config_class = TwoTowersConfig
    base_model_prefix = "two_towers"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: TwoTowersConfig):
        super().__init__(config)
        self.text_model = tower(config.text_config)
        self.vision_model = tower(config.vision_config)
        widths = (config.text_config.hidden_size, config.vision_config.hidden_size)
        sizes = [config.projection_dim] * 2
        self.text_projection = projection(config.projection, widths[0], sizes[0])
        self.visual_projection = projection(config.projection, widths[1], sizes[1])
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value)))
        self.post_init()

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """input_ids, attention_mask: [B, T]."""
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        pooled = pool(hidden, self.config.pooling, attention_mask)
        return BaseModelOutputWithPooling(hidden, self.text_projection(pooled))

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """pixel_values: [B, 3, height, width]."""
        found = self.vision_model(pixel_values=pixel_values, **kwargs)
        hidden = found.last_hidden_state
        own = getattr(found, "pooler_output", None)
        if self.config.image_pooling == "own" and own is not None:
            pooled = own
        else:
            pooled = pool(hidden, self.config.image_pooling.replace("own", "cls"))
        return BaseModelOutputWithPooling(hidden, self.visual_projection(pooled))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
    ) -> TwoTowersOutput:
        """As CLIPModel: normalised embeddings, logits [B, B], and the softmax loss where asked."""
        texts = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        images = F.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        logits = texts @ images.T * self.logit_scale.exp()
        loss = None
        if return_loss:
            own = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return TwoTowersOutput(loss, logits.T, logits, texts, images)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """The names of the weights are those in memory: a checkpoint is read back by them."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


AutoConfig.register(TwoTowersConfig.model_type, TwoTowersConfig, exist_ok=True)
AutoModel.register(TwoTowersConfig, TwoTowers, exist_ok=True)
