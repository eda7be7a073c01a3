"""Configuration of ChatGLM-6B, with the field names of the published config.json (both
vocabularies)."""

from transformers import PreTrainedConfig

IMAGE_TOKENS = 20000  # ids in front of the text in the first published vocabulary (150528)


class ChatGLMConfig(PreTrainedConfig):
    """ChatGLM-6B: 28 blocks of width 4096, 32 heads, two positions per token.

    Ids that a config.json leaves out are inferred from bos_token_id (<sop>), as both vocabularies
    lay them out: [MASK] = <sop> - 4, [gMASK] = <sop> - 3, <eop> = <sop> + 1.

    residual_scale_layers: the L of the residual factor sqrt(2 L). The original builds every block
        with L = 28, however many blocks there are.
    ValueError for checkpoints that this class cannot compute: ChatGLM2/3, p-tuning prefixes,
    quantised weights.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    # heads lie one behind the other in query_key_value, each with its q, k and v: plain shares of
    # the rows are heads
    base_model_tp_plan = {
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    residual_scale_layers: int = 28
    position_encoding_2d: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if getattr(self, "padded_vocab_size", None) or getattr(self, "multi_query_attention", None):
            raise ValueError(
                "a ChatGLM2 or ChatGLM3 checkpoint: convert.py beside train.py makes a native "
                "model of it"
            )
        if getattr(self, "quantization_bit", 0):
            raise ValueError(
                f"{self.quantization_bit}-bit weights cannot be trained: take the unquantised "
                "checkpoint"
            )
        if getattr(self, "pre_seq_len", None) or not self.position_encoding_2d:
            raise ValueError("a p-tuning prefix and one-dimensional positions are not supported")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not split into "
                f"{self.num_attention_heads} heads of 4n"
            )
        sop = self.bos_token_id
        if self.mask_token_id is None:
            self.mask_token_id = sop - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = sop - 3
        if self.eos_token_id is None:
            self.eos_token_id = sop + 1
        if self.pad_token_id is None:
            has_images = sop == 130004 + IMAGE_TOKENS
            self.pad_token_id = 3 + IMAGE_TOKENS if has_images else 3
