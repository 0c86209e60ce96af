"""The shape of a model, what it costs, and the presets. Imports no torch: a plan needs numbers only."""

import difflib
import itertools
import re
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator, model_validator

from oriole.config import Config, validate
from oriole.errors import ConfigError

__all__ = [
    "LORA_TARGETS", "PRESETS", "Layer", "LoraConfig", "LoraTarget", "ModelConfig", "MoeConfig", "ReasoningConfig",
    "preset",
]  # fmt: skip


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
    balance_weight: float = Field(0.01, ge=0)
    """Weight of the loss, or how far a bias moves at each step, by default 0.001: probabilities of experts differ by
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
    threshold: float = Field(0.9, gt=0, le=1)
    """A token halts in use when its confidence is above it; 1: never before the last step."""
    cross: bool = False
    """The layers also look at a context that is given beside the tokens: retrieved passages, earlier turns."""
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
        return tuple(layer.window for layer in self.layers) + (None,) * (self.reasoning.layers if self.reasoning else 0)

    @property
    def expert_dim(self) -> int:
        """Hidden width of one expert."""
        return self.moe.ffn_dim or self.ffn_dim // self.moe.active

    @property
    def _expert_layers(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options by which the model is no Qwen3, by their names here; empty for the standard model."""
        out: dict[str, Any] = {}
        local = any(layer.window is not None for layer in self.layers)
        experts = self._expert_layers > 0
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
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = self.dim * heads * self.head_dim + self.num_heads * self.head_dim * self.dim
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        dense = self.num_layers - self._expert_layers
        mlps = dense * 3 * self.dim * self.ffn_dim + self._expert_layers * self._mixture_params(active)
        added = sum(self._added_params(one) for one in self.layers)
        layers = self.num_layers * (attention + norms) + mlps + added
        return embeddings + layers + self.dim + self._reasoning_params()

    def _added_params(self, layer: Layer) -> int:
        """Parameters of a layer's gate, temperature and residual scales (model.gates)."""
        heads = self.num_heads
        gate = {"none": 0, "head": heads * self.dim, "channel": heads * self.head_dim * self.dim}
        temperature = {"none": 0, "query": heads * self.dim, "length": heads}
        residual = {"none": 0, "scale": 2 * self.dim, "zero": 2}
        return gate[layer.gate] + temperature[layer.temperature] + residual[layer.residual]

    def _mixture_params(self, active: bool) -> int:
        """Parameters of a layer's router and experts."""
        moe = self.moe
        used = (moe.active if active else moe.experts) * self.expert_dim + moe.shared_ffn_dim
        router = moe.experts * (self.dim + (1 if moe.balance == "bias" else 0))
        return 3 * self.dim * used + router

    def _attention_params(self) -> int:
        """Parameters of one attention of a latent layer, its norms included."""
        query, kv = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        return self.dim * (2 * query + kv) + self.dim + (2 * self.head_dim if self.qk_norm else 0)

    def _reasoning_params(self) -> int:
        """Parameters of the latent block, the factor of its state, its step embedding and its confidence head."""
        r = self.reasoning
        if r is None:
            return 0
        attention = self._attention_params()
        layer = attention * (2 if r.cross else 1) + 3 * self.dim * self.ffn_dim + self.dim
        return r.layers * layer + (r.steps * self.dim if r.step_embedding else 0) + 2 * self.dim + 1

    def flops_per_token(self, length: int, *, logits: bool = True) -> float:
        """Training FLOPs per token at sequence length T: 6 (parameters without the input embedding) + 6 L H hd T.

        A tied head counts once, as the head; of experts those count that a token goes through. The second term is
        causal attention: 12 L D T for the full square (Chowdhery et al. 2022, appendix B), halved because only half of
        it is computed; a layer with a window W < T computes W - W^2 / 2T keys a query instead of T / 2. Without
        `logits`, as in a reward model, there is no head of that size. A latent block counts as often as it is applied,
        its keys and values once, and the head, which reads every iteration, as often; what is done with a context
        beside the tokens is not counted.
        """
        embeddings = self.vocab_size * self.dim
        matrices = self.num_params(active=True)
        matrices -= (0 if self.tie_embeddings else embeddings) + (0 if logits else embeddings)
        windows = [min(length, layer.window or length) for layer in self.layers]
        keys = sum(w - w * w / (2 * max(1, length)) for w in windows)
        r = self.reasoning
        if r is not None:
            again = r.layers * (2 * self.dim * self.num_heads * self.head_dim + 3 * self.dim * self.ffn_dim)
            matrices += (r.steps - 1) * (again + (embeddings if logits else 0))
            matrices -= r.layers * (self._attention_params() if r.cross else 0)
            keys += r.steps * r.layers * length / 2
        return 6.0 * matrices + 12.0 * self.num_heads * self.head_dim * keys

    def _added_activations(self, layer: Layer) -> int:
        """Numbers a token that autograd keeps for a layer's options: what goes into the products that they add."""
        query = self.num_heads * self.head_dim
        gate = {"none": 0, "head": self.num_heads, "channel": query}
        temperature = {"none": 0, "query": query, "length": query}
        residual = {"none": 0, "scale": 2 * self.dim, "zero": 2 * self.dim}
        return gate[layer.gate] + temperature[layer.temperature] + residual[layer.residual]

    def kv_cache_bytes(self, batch: int, length: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values for `batch` sequences of `length` tokens; an L layer keeps its window only."""
        columns = sum(min(length, window or length) for window in self.windows)
        return 2 * batch * columns * self.num_kv_heads * self.head_dim * bytes_per_value

    def training_memory(
        self,
        batch: int,
        length: int,
        bytes_per_value: int = 2,
        *,
        optimizer: Literal["adamw", "muon", "normuon", "adafactor"] = "adamw",
        recompute: bool = False,
        whole_scores: bool = False,
        compiled: bool = True,
    ) -> dict[str, int]:
        """Estimated bytes of one training step by part; their sum is the highest use, without libraries and driver.

        weights, gradients: fp32. optimizer: AdamW's two moments; Muon's one for the matrices, AdamW's for the rest;
        Adafactor's rows and columns are next to nothing.
        casts: the matrices in the arithmetic's width. activations: what autograd keeps of every block (two normed
        inputs, q k v before and after the rotation, attention output, gate, up and their product) in that width, plus
        the fp32 residual stream twice; with experts the mean block, whose MLP keeps k times gate, up, their product,
        input and output; `whole_scores`: the attention's weights too, as the CPU's `grouped` backend
        keeps them; `recompute` (activation checkpointing): one such block and the fp32 inputs of the others; without
        torch.compile every small operation keeps its own inputs, which measured 2.8 times as much. logits:
        the final states, their gradients, and a chunk of 1,024 rows of logits with what is made of them.
        update: what Muon needs while it works, as far as it exceeds the activations, which are gone by then.
        """
        rows, b = batch * length, bytes_per_value
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        embeddings = self.vocab_size * self.dim
        matrices = self.num_params() - embeddings * (1 if self.tie_embeddings else 2)
        share = self._expert_layers / self.num_layers
        mixture = self.moe.active * (3 * self.expert_dim + 2 * self.dim) + 3 * self.moe.shared_ffn_dim
        mlp = int((1 - share) * 3 * self.ffn_dim + share * mixture)
        block = rows * ((2 * self.dim + 3 * query + 3 * kv + mlp) * b + 2 * self.dim * 4)
        block = block if compiled else int(2.8 * block)
        if whole_scores:
            met = 0.0  # keys that a query's block meets, summed over the layers
            for layer in self.layers:
                size = query_block(length, layer.window)
                met += min((length + size) / 2, size + (layer.window or length))
            block += int(rows * self.num_heads * met / self.num_layers * b)
        applied = self.num_layers + (self.reasoning.layers * self.reasoning.steps if self.reasoning else 0)
        blocks = block + (applied - 1) * rows * self.dim * 4 if recompute else applied * block
        added = [rows * b * self._added_activations(layer) for layer in self.layers]
        blocks += max(added) if recompute else sum(added)
        logits = min(rows, 1024) * self.vocab_size * 12 + embeddings * (4 + b) + rows * self.dim * 12
        used = blocks + logits + (0 if b == 4 else b * matrices)
        match optimizer:
            case "adamw":
                moments, working = 8 * self.num_params(), 0
            case "adafactor":
                moments, working = 0, 4 * embeddings
            case "muon" | "normuon":
                moments, working = 8 * self.num_params() - 4 * matrices, 10 * matrices
        return {
            "weights": 4 * self.num_params(),
            "gradients": 4 * self.num_params(),
            "optimizer": moments,
            "casts": 0 if b == 4 else b * matrices,
            "activations": blocks,
            "logits": logits,
            "update": max(0, working - used),
        }


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
        query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        sizes = {
            "q_proj": shape.dim + query, "k_proj": shape.dim + kv, "v_proj": shape.dim + kv,
            "o_proj": query + shape.dim, "gate_proj": shape.dim + shape.ffn_dim, "up_proj": shape.dim + shape.ffn_dim,
            "down_proj": shape.ffn_dim + shape.dim,
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
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(PRESETS)}"
        raise ConfigError(f"no model preset '{name}'; {hint}")
    changes = {k: v for k, v in (("vocab_size", vocab_size), ("context", context)) if v is not None}
    return validate(ModelConfig, PRESETS[name].model_dump() | changes, f"preset {name}")
