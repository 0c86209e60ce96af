"""The shape of a model, and the presets. Imports no torch: what a model costs (model.costs) is numbers only."""

import difflib
import itertools
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import Field, field_validator, model_validator

from oriole.config import Config, validate
from oriole.errors import ConfigError

__all__ = [
    "LORA_TARGETS", "PRESETS", "Layer", "LoraConfig", "LoraTarget", "ModelConfig", "MoeConfig", "ReasoningConfig",
    "preset", "preset_named",
]  # fmt: skip

T = TypeVar("T", bound=Config)

KEPT = 1024
"""Longest rows whose attention weights a CPU keeps for the backward pass (`grouped` in model.attention); of longer ones
they are computed again, since they would be most of a step's memory."""


def query_block(length: int, window: int | None = None) -> int:
    """Queries of a row that a CPU attends with at once (model.attention): blocks of them meet fewer keys, which pays
    from 256 tokens on (at 128 they cost what they save).

    An eighth of the row, at least 64, and at most 1,024, so that their scores fit into memory at any length. Where a
    window bounds the keys, no more than half of it: the cost is linear, a block meets one and a half windows of keys.
    """
    if length < 256:
        return length
    most = 1024 if window is None else min(1024, max(256, window // 2))
    return max(64, min(-(-length // 8), most))


class Layer(NamedTuple):
    """What one block is made of; one word of `ModelConfig.pattern`."""

    window: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    gate: Literal["none", "head", "channel"] = "none"
    """Sigmoid gate on the output of attention, one number a head or one a channel."""
    temperature: Literal["none", "query", "length"] = "none"
    """What the scores are multiplied by: a number made of the query, or of the number of keys."""
    residual: Literal["none", "scale", "zero"] = "none"
    """Learned factor of what a branch adds to the residual stream: a number a channel, or one that starts at 0."""
    experts: bool = False
    """A mixture of experts instead of the MLP."""


_WORD = re.compile(r"[LG][a-z]*")
_LETTERS: dict[str, tuple[str, Any]] = {
    "g": ("gate", "head"), "c": ("gate", "channel"), "t": ("temperature", "query"), "s": ("temperature", "length"),
    "r": ("residual", "scale"), "z": ("residual", "zero"), "e": ("experts", True),
}  # fmt: skip


def _layers(pattern: str, window: int) -> tuple[Layer, ...]:
    """The words of a pattern; `ValueError` names what is none."""
    if not pattern or _WORD.sub("", pattern):
        raise ValueError(
            f"pattern={pattern!r}: a layer is G (sees everything) or L (sees `window` tokens) and then any of "
            f"{' '.join(_LETTERS)}; LLLG and Gg are patterns"
        )
    out = []
    for word in _WORD.findall(pattern):
        chosen: dict[str, Any] = {"window": window if word[0] == "L" else None}
        for letter in word[1:]:
            if letter not in _LETTERS:
                raise ValueError(f"pattern={pattern!r}: no option '{letter}'; there are {' '.join(_LETTERS)}")
            name, value = _LETTERS[letter]
            if name in chosen:
                raise ValueError(f"pattern={pattern!r}: {word} chooses its {name} twice")
            chosen[name] = value
        out.append(Layer(**chosen))
    return tuple(out)


class MoeConfig(Config):
    """The experts of the layers with an `e` in the pattern (Shazeer et al. 2017; as Qwen3-MoE)."""

    experts: int = Field(8, ge=2)
    """Experts of a layer (E)."""
    active: int = Field(2, ge=1)
    """Experts that a token goes through (k)."""
    ffn_dim: int = Field(0, ge=0)
    """Hidden width of one expert; 0: the model's ffn_dim / active, so that a token meets as many weights as in a dense
    layer."""
    shared_ffn_dim: int = Field(0, ge=0)
    """Hidden width of an expert that every token goes through as well (Dai et al. 2024); 0: none."""
    balance: Literal["loss", "bias"] = "loss"
    """How tokens are spread evenly: by a loss (Fedus et al. 2021, eq. 4) or by biases that move only the choice (Wang
    et al. 2024)."""
    balance_weight: float = Field(0.1, ge=0)
    """Weight of the loss, which is the layers' mean: with 0.01 the load was not even after 500 steps, with 0.1 it was
    (docs/results.md). Or how far a bias moves at each step, by default 0.001: probabilities of experts differ by
    hundredths, and a longer step makes the load swing."""

    @model_validator(mode="before")
    @classmethod
    def _default_weight(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("balance") == "bias":
            return {"balance_weight": 0.001} | table
        return table

    @model_validator(mode="after")
    def _some(self) -> "MoeConfig":
        if self.active > self.experts:
            raise ValueError(f"active={self.active} of experts={self.experts}: a token cannot go through more than all")
        return self


class ReasoningConfig(Config):
    """The block behind the last one that is applied several times (model.reasoning)."""

    steps: int = Field(4, ge=1)
    """Iterations while training, and at most in use unless a call says otherwise."""
    layers: int = Field(1, ge=1)
    """Layers of the block; all iterations share their weights."""
    threshold: float = Field(0.95, gt=0, le=1)
    """A token halts in use when its confidence is above it; 1: never before the last step."""
    cross: bool = False
    """The layers also look at a context that is given beside the tokens: retrieved passages, earlier turns. No stage of
    a recipe gives one, so that such a model is trained in Python (`LM.context_of`)."""
    step_embedding: bool = False
    """A learnt vector for each iteration, as in the Universal Transformer."""
    confidence_weight: float = Field(0.1, gt=0)
    """Weight of the confidence head's loss. The head itself learns the same whatever it is, as far as the optimizer is
    indifferent to the size of gradients; it says how much of the model works for the head."""


class ModelConfig(Config):
    """Shape of a decoder that is exactly Qwen3 (dense), or Llama when `qk_norm` is off; `pattern` switches on more."""

    vocab_size: int = Field(ge=1)
    """Rows of the embedding (V)."""
    dim: int = Field(ge=1)
    """Width of the residual stream (D)."""
    num_layers: int = Field(ge=1)
    """Blocks of attention and MLP (L)."""
    num_heads: int = Field(ge=1)
    """Query heads (H)."""
    num_kv_heads: int = Field(ge=1)
    """Key and value heads (Hkv), each shared by H / Hkv query heads."""
    head_dim: int = Field(ge=2)
    """Width of one head (hd); H * hd need not equal D."""
    ffn_dim: int = Field(ge=1)
    """Hidden width of the SwiGLU (F)."""
    context: int = Field(2048, ge=1)
    """Longest sequence the model is meant for."""
    rope_theta: float = Field(100_000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021, eq. 15)."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = True
    """The logits head shares the embedding's weights."""
    qk_norm: bool = True
    """RMSNorm of each query and key head before the rotation (Qwen3); off is Llama."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 L)."""
    pattern: str = "G"
    """What each layer is, repeated to the number of layers: G sees everything, L the last `window` tokens. Letters
    after it are options: g a gate on attention per head, c per channel; t a temperature from the query, s from the
    length; r a learned residual scale, z one that starts at zero; e experts. LLLG: every fourth layer sees all."""
    window: int = Field(512, ge=1)
    """Tokens that an L layer sees, the query's own included."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """How rotary positions are stretched for a longer context than the model was trained with (model.rope)."""
    rope_factor: float = Field(1.0, ge=1)
    """How many times longer: context / rope_factor is what the model was trained with."""
    rope_original: int = Field(0, ge=0)
    """yarn: the context that the model was trained with, where it is not context / rope_factor."""
    moe: MoeConfig = MoeConfig()
    """The experts, where the pattern has any."""
    reasoning: ReasoningConfig | None = None
    """A latent block that is applied several times before a token is said; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, table: Any) -> Any:
        """`preset = NAME` in a table stands for that preset's values, which the table's own go before."""
        if isinstance(table, dict) and "preset" in table:
            rest = {key: value for key, value in table.items() if key != "preset"}
            return preset(str(table["preset"])).model_dump() | rest
        return table

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, because RoPE rotates pairs")
        _layers(self.pattern, self.window)
        if (self.rope_scaling == "none") != (self.rope_factor == 1):
            raise ValueError(
                f"rope_scaling={self.rope_scaling} with rope_factor={self.rope_factor:g}: a longer context needs both, "
                "one of linear, ntk, yarn and how many times longer it is"
            )
        if self.rope_scaling == "ntk" and self.head_dim == 2:
            raise ValueError("rope_scaling=ntk has no pair to stretch with head_dim=2; choose linear")
        if any(layer.experts for layer in self.layers):
            self._experts_fit()
        return self

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The keys that need not be given, with what they are then, for JSON."""
        fields = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: value.model_dump(mode="json") if isinstance(value, Config) else value
            for name, value in fields.items()
        }

    def _experts_fit(self) -> None:
        """Grouped products want rows of whole 16 bytes, in bf16 too."""
        own = f"moe.ffn_dim={self.moe.ffn_dim}" if self.moe.ffn_dim else f"ffn_dim={self.ffn_dim} / {self.moe.active}"
        for name, width in (("dim", self.dim), (f"the experts' width, {own},", self.expert_dim)):
            if width % 8 or not width:
                raise ValueError(f"{name} is {width}, with experts it must be a multiple of 8; set moe.ffn_dim or dim")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What each of the L layers is."""
        return tuple(itertools.islice(itertools.cycle(_layers(self.pattern, self.window)), self.num_layers))

    @property
    def scaled_theta(self) -> float:
        """The base that the rotary frequencies are computed from: ntk's is larger (bloc97 2023)."""
        if self.rope_scaling != "ntk":
            return self.rope_theta
        return float(self.rope_theta * self.rope_factor ** (self.head_dim / (self.head_dim - 2)))

    @property
    def trained_context(self) -> int:
        """The context before it was stretched."""
        return self.rope_original or round(self.context / self.rope_factor)

    def stretched(self, scaling: Literal["linear", "ntk", "yarn"], factor: float) -> "ModelConfig":
        """The shape for a context `factor` times that of the model as it was trained: a stretched one is stretched
        anew, not twice. `ConfigError` for a factor that is not above 1."""
        changes = {"rope_scaling": scaling, "rope_factor": factor, "rope_original": 0}
        longer = {"context": round(self.trained_context * factor)}
        return validate(ModelConfig, self.model_dump() | changes | longer, "a longer context")

    @property
    def words(self) -> tuple[str, ...]:
        """The pattern's word for each of the L layers."""
        return tuple(itertools.islice(itertools.cycle(_WORD.findall(self.pattern)), self.num_layers))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """What each layer that has keys and values sees: the L blocks, then a latent block's, whose iterations share
        theirs and which sees everything."""
        latent = 0 if self.reasoning is None else self.reasoning.layers
        return tuple(layer.window for layer in self.layers) + (None,) * latent

    @property
    def query_dim(self) -> int:
        """Width of all query heads together (H hd)."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads (Hkv hd)."""
        return self.num_kv_heads * self.head_dim

    @property
    def expert_dim(self) -> int:
        """Hidden width of one expert."""
        return self.moe.ffn_dim or self.ffn_dim // self.moe.active

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return sum(layer.experts for layer in self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options by which the model is no Qwen3, by their names here; empty for the standard model."""
        out: dict[str, Any] = {}
        local = any(layer.window is not None for layer in self.layers)
        experts = self.expert_layers > 0
        own = any(layer._replace(window=None, experts=False) != Layer() for layer in self.layers)
        # Qwen3 has sliding windows, Llama and Qwen3-MoE have none; nor has Llama experts.
        own = own or (local and (experts or not self.qk_norm)) or (experts and not self.qk_norm)
        own = own or (self.reasoning is not None and (local or experts))
        if own or (experts and (self.moe.shared_ffn_dim > 0 or self.moe.balance == "bias")):
            out["pattern"] = self.pattern
            if local:
                out["window"] = self.window
            if experts:
                out["moe"] = self.moe.model_dump()
        if self.reasoning is not None:
            out["reasoning"] = self.reasoning.model_dump()
        return out

    def num_params(self, *, active: bool = False) -> int:
        """Parameters in all; a tied head counts once. `active`: without the experts that a token does not meet."""
        blocks = sum(self.block_params(layer, active=active) for layer in self.layers)
        return self.embedding_params + blocks + self.dim + self._reasoning_params()

    def block_params(self, layer: Layer, *, active: bool = False) -> int:
        """Parameters of one block; `active` as of `num_params`."""
        mlp = self._mixture_params(active) if layer.experts else 3 * self.dim * self.ffn_dim
        return self.attention_params + self.dim + mlp + self._added_params(layer)

    @property
    def embedding_params(self) -> int:
        """Parameters of embedding and head, which are one where they are tied."""
        return self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    @property
    def attention_params(self) -> int:
        """Parameters of one attention, its norms included."""
        norms = self.dim + (2 * self.head_dim if self.qk_norm else 0)
        return self.dim * 2 * (self.query_dim + self.kv_dim) + norms

    def _added_params(self, layer: Layer) -> int:
        """Parameters of a layer's gate, temperature and residual scales (model.gates)."""
        gate = {"none": 0, "head": self.num_heads * self.dim, "channel": self.query_dim * self.dim}
        temperature = {"none": 0, "query": self.num_heads * self.dim, "length": self.num_heads}
        residual = {"none": 0, "scale": 2 * self.dim, "zero": 2}
        return gate[layer.gate] + temperature[layer.temperature] + residual[layer.residual]

    def _mixture_params(self, active: bool) -> int:
        """Parameters of a layer's router and experts."""
        moe = self.moe
        used = (moe.active if active else moe.experts) * self.expert_dim + moe.shared_ffn_dim
        router = moe.experts * (self.dim + (1 if moe.balance == "bias" else 0))
        return 3 * self.dim * used + router

    def _reasoning_params(self) -> int:
        """Parameters of the latent block, the factor of its state, its step embedding and its confidence head."""
        r = self.reasoning
        if r is None:
            return 0
        layer = self.attention_params * (2 if r.cross else 1) + 3 * self.dim * self.ffn_dim + self.dim
        return r.layers * layer + (r.steps * self.dim if r.step_embedding else 0) + 2 * self.dim + 1


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)
"""Every linear layer of a block, by its Hugging Face name."""


class LoraConfig(Config):
    """Train small adapters instead of the model (LoRA, Hu et al. 2021)."""

    rank: int = Field(16, ge=1)
    """Columns of B and rows of A (r): what an adapter can learn, and what it costs."""
    alpha: float = Field(32.0, gt=0)
    """An adapter is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = LORA_TARGETS
    """The linear layers that get an adapter, by their Hugging Face names; by default all."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapters' input while training."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[LoraTarget, ...]) -> tuple[LoraTarget, ...]:
        if not targets:
            raise ValueError(f"name at least one of {', '.join(LORA_TARGETS)}")
        return tuple(name for name in LORA_TARGETS if name in targets)  # one order, nothing twice

    def num_params(self, shape: ModelConfig) -> int:
        """Parameters of the adapters of a model of that shape."""
        dim, query, kv, ffn = shape.dim, shape.query_dim, shape.kv_dim, shape.ffn_dim
        sizes = {
            "q_proj": dim + query, "k_proj": dim + kv, "v_proj": dim + kv, "o_proj": query + dim,
            "gate_proj": dim + ffn, "up_proj": dim + ffn, "down_proj": ffn + dim,
        }  # fmt: skip
        return shape.num_layers * self.rank * sum(sizes[name] for name in self.targets)


def _shape(vocab: int, dim: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> ModelConfig:
    shape = {"vocab_size": vocab, "dim": dim, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv}
    return ModelConfig.model_validate(shape | {"head_dim": dim // heads, "ffn_dim": ffn} | more)


PRESETS: dict[str, ModelConfig] = {
    "demo": _shape(4_096, 256, 6, 4, 2, 704, context=512),
    "26m": _shape(6_400, 512, 8, 8, 2, 1_408),
    "64m": _shape(6_400, 768, 8, 8, 4, 2_432),
    "110m": _shape(16_384, 768, 12, 12, 4, 2_816),
    "120m": _shape(16_384, 1_024, 8, 8, 8, 2_816),
    "200m": _shape(32_768, 960, 16, 15, 5, 2_560),
    "1b": _shape(100_000, 1_536, 24, 24, 4, 6_912),
}
"""The shapes of DESIGN section 4; a recipe's tokenizer decides the vocabulary in the end."""


def preset(name: str, vocab_size: int | None = None, context: int | None = None) -> ModelConfig:
    """The preset of that name, with another vocabulary or context if given; `ConfigError` with the nearest name."""
    shape = preset_named(PRESETS, name, "model preset")
    changes = {k: v for k, v in (("vocab_size", vocab_size), ("context", context)) if v is not None}
    return validate(ModelConfig, shape.model_dump() | changes, f"preset {name}")


def preset_named(presets: Mapping[str, T], name: str, what: str) -> T:
    """The preset of that name; `ConfigError` with the nearest name."""
    if name not in presets:
        near = difflib.get_close_matches(name.lower(), presets, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(presets)}"
        raise ConfigError(f"no {what} '{name}'; {hint}")
    return presets[name]
