"""The shape of an encoder-decoder. Imports no torch: a recipe needs numbers only."""

from typing import Any, Literal

from pydantic import Field, model_validator

from oriole.config import Config, validate
from oriole.model.config import preset_named

__all__ = ["SEQ2SEQ_PRESETS", "Seq2SeqConfig", "seq2seq_shape"]


class Seq2SeqConfig(Config):
    """Shape of an encoder-decoder with one embedding for source, target and head (Vaswani et al. 2017).

    The defaults are the modern form; the preset `classic` and its like are the form of the paper.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    """What tells such a model from a decoder alone, in recipes and in config.json."""
    vocab_size: int = Field(ge=1)
    """Rows of the embedding (V)."""
    dim: int = Field(ge=2)
    """Width of the residual stream (D)."""
    encoder_layers: int = Field(ge=1)
    """Blocks of the encoder: attention and MLP."""
    decoder_layers: int = Field(ge=1)
    """Blocks of the decoder: attention, cross-attention and MLP."""
    num_heads: int = Field(ge=1)
    """Heads of every attention (H), each D / H wide."""
    ffn_dim: int = Field(ge=1)
    """Hidden width of the MLP (F)."""
    context: int = Field(512, ge=2)
    """Longest source, longest target, and most that a question and its answer may have together."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with its bias."""
    norm_at: Literal["pre", "post"] = "pre"
    """Before each branch, with one more norm at the end of each stack, or after each sum, as in the paper."""
    positions: Literal["rope", "relative", "sinusoid"] = "rope"
    """How self-attention knows places: rotary (Su et al. 2021), a learned bias of the distance for each head (Raffel et
    al. 2020), or sines added to the embeddings, which are then multiplied by sqrt(D) (Vaswani et al. 2017, 3.4)."""
    activation: Literal["swiglu", "relu"] = "swiglu"
    """Of the MLP."""
    biases: bool = False
    """Whether the linear layers have a bias."""
    qk_norm: bool = True
    """RMSNorm of each query and key head, as in the decoder-only models."""
    rope_theta: float = Field(100_000.0, gt=0)
    """Base of the rotary frequencies."""
    buckets: int = Field(32, ge=4)
    """`relative` only: how many distances are told apart."""
    farthest: int = Field(128, ge=8)
    """`relative` only: the distance from which all are the same."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every norm."""
    init_std: float = Field(0.02, gt=0)
    """`pre` only: standard deviation of the initial weights; what writes into a residual stream gets less."""
    source: Literal["chat", "question"] = "chat"
    """What the encoder is given: the conversation in the chat template, or the last question as plain text."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, table: Any) -> Any:
        """`preset = NAME` in a table stands for that preset's values, which the table's own go before."""
        if isinstance(table, dict) and "preset" in table:
            rest = {key: value for key, value in table.items() if key != "preset"}
            return _preset(str(table["preset"])).model_dump() | rest
        return table

    @model_validator(mode="after")
    def _consistent(self) -> "Seq2SeqConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"dim / num_heads = {self.head_dim} must be even, because RoPE rotates pairs")
        if self.positions == "sinusoid" and self.dim % 2:
            raise ValueError(f"dim={self.dim} must be even: each frequency has a sine and a cosine")
        if self.buckets % 4 or self.farthest <= self.buckets // 2:
            raise ValueError(
                f"buckets={self.buckets} must be a multiple of 4 and less than twice farthest={self.farthest}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one head (hd)."""
        return self.dim // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: every query head has its own."""
        return self.num_heads

    @property
    def windows(self) -> tuple[None, ...]:
        """What each of the decoder's layers sees of what is written: everything."""
        return (None,) * self.decoder_layers

    def num_params(self) -> int:
        """Parameters in all; the shared embedding counts once."""
        return self.embedding_params + self.encoder_params + self.decoder_params

    @property
    def embedding_params(self) -> int:
        """Parameters of the one embedding."""
        return self.vocab_size * self.dim

    @property
    def encoder_params(self) -> int:
        """Parameters of the encoder's blocks, of its last norm and of its bias of distances."""
        return self._stack(self.encoder_layers, 1)

    @property
    def decoder_params(self) -> int:
        """The same of the decoder."""
        return self._stack(self.decoder_layers, 2)

    def _stack(self, layers: int, attentions: int) -> int:
        attention = 4 * self.dim * self.dim + 4 * self.dim * self.biases + 2 * self.head_dim * self.qk_norm
        wide = 2 if self.activation == "swiglu" else 1
        mlp = (wide + 1) * self.dim * self.ffn_dim + (wide * self.ffn_dim + self.dim) * self.biases
        norm = self.dim * (2 if self.norm == "layer" else 1)
        ends = norm * (self.norm_at == "pre") + self.buckets * self.num_heads * (self.positions == "relative")
        return layers * (attentions * (attention + norm) + mlp + norm) + ends


_CLASSIC = {
    "norm": "layer", "norm_at": "post", "positions": "sinusoid", "activation": "relu", "biases": True, "qk_norm": False,
    "norm_eps": 1e-5,
}  # fmt: skip


def _shape(vocab: int, dim: int, layers: int, heads: int, ffn: int, **more: Any) -> Seq2SeqConfig:
    shape = {"vocab_size": vocab, "dim": dim, "encoder_layers": layers, "decoder_layers": layers}
    return Seq2SeqConfig.model_validate(shape | {"num_heads": heads, "ffn_dim": ffn} | more)


SEQ2SEQ_PRESETS: dict[str, Seq2SeqConfig] = {
    "demo": _shape(4_096, 256, 3, 4, 704),
    "classic": _shape(4_096, 256, 3, 4, 1_024, **_CLASSIC),
    "tfchat": _shape(6_400, 512, 2, 8, 2_048, context=260, source="question", **_CLASSIC),
    "base": _shape(32_768, 512, 6, 8, 2_048, **_CLASSIC),
}
"""demo: the modern form for a CPU. classic: the paper's form at that size. tfchat: TFChat's second model. base: the
paper's base model. The vocabulary is in the end that of the run's tokenizer."""


def _preset(name: str) -> Seq2SeqConfig:
    return preset_named(SEQ2SEQ_PRESETS, name, "encoder-decoder preset")


def seq2seq_shape(model: Any) -> Seq2SeqConfig:
    """What `model` in a recipe of stage seq2seq means: a preset's name, a table, or a shape as it is."""
    if isinstance(model, Seq2SeqConfig):
        return model
    return _preset(model) if isinstance(model, str) else validate(Seq2SeqConfig, model, "model")
