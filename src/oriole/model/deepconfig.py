"""Deep supervision and multi-token prediction as a recipe asks for them, and what they cost. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from oriole.config import Config
from oriole.errors import ConfigError
from oriole.model.config import ModelConfig

__all__ = ["DeepConfig", "flops_per_token", "num_params", "training_memory"]


class DeepConfig(Config):
    """Losses beside that of the last layer, in training only: what they need is never saved with the model.

    loss = lm + weight * mean of the depths' losses + ahead_weight * mean of the further tokens' losses
    """

    depths: tuple[int, ...] = ()
    """After so many blocks the hidden state, too, predicts the next token (deep supervision, Lee et al. 2015; in
    language models Al-Rfou et al. 2019), by a norm of its own and the model's own head."""
    weight: float = Field(0.3, gt=0)
    """Weight of the mean of the depths' losses."""
    tokens_ahead: int = Field(1, ge=1, le=8)
    """Tokens that every position predicts: 1 the next alone, 2 the one after it too, by a module of one block for each
    further token (DeepSeek-V3, section 2.2)."""
    ahead_weight: float = Field(0.3, gt=0)
    """Weight of the mean of the further tokens' losses (DeepSeek-V3: 0.3, and 0.1 towards the end)."""

    @field_validator("depths")
    @classmethod
    def _in_order(cls, depths: tuple[int, ...]) -> tuple[int, ...]:
        if any(depth < 1 for depth in depths):
            raise ValueError("a depth is a number of blocks, 1 or more")
        return tuple(sorted(set(depths)))

    @model_validator(mode="after")
    def _has_an_effect(self) -> "DeepConfig":
        if not self.depths and self.tokens_ahead == 1:
            raise ValueError("nothing to supervise: give depths = [2, 4], or tokens_ahead = 2, or leave the table out")
        return self

    @property
    def modules(self) -> int:
        """Modules that predict further tokens."""
        return self.tokens_ahead - 1

    def check(self, shape: ModelConfig) -> None:
        """`ConfigError` where a depth is not one of the model's."""
        if self.depths and self.depths[-1] >= shape.num_layers:
            raise ConfigError(
                f"deep.depths has {self.depths[-1]}, but of the model's {shape.num_layers} blocks the last is what the "
                f"usual loss is about; give depths from 1 to {shape.num_layers - 1}"
            )

    def num_params(self, shape: ModelConfig) -> int:
        """Parameters that train beside the model's: a norm for each depth; for each further token a block, three norms
        and a matrix (D, 2 D)."""
        return len(self.depths) * shape.dim + self.modules * self._module_params(shape)

    def _module_params(self, shape: ModelConfig) -> int:
        embeddings = shape.vocab_size * shape.dim * (1 if shape.tie_embeddings else 2)
        block_and_norm = _one_block(shape).num_params() - embeddings
        return block_and_norm + 2 * shape.dim * shape.dim + 2 * shape.dim

    def flops_per_token(self, shape: ModelConfig, length: int) -> float:
        """Training FLOPs per token beside the model's own, by the same rules as `ModelConfig.flops_per_token`: a head
        for each depth; for each further token a model of one block and the matrix before it."""
        head = 6.0 * (shape.vocab_size + 1) * shape.dim
        module = _one_block(shape).flops_per_token(length) + 6.0 * (2 * shape.dim * shape.dim + 2 * shape.dim)
        return len(self.depths) * head + self.modules * module

    def training_memory(
        self,
        shape: ModelConfig,
        batch: int,
        length: int,
        bytes_per_value: int = 2,
        *,
        optimizer: Literal["adamw", "muon", "normuon", "adafactor"] = "adamw",
        recompute: bool = False,
        whole_scores: bool = False,
        compiled: bool = True,
    ) -> dict[str, int]:
        """Estimated bytes of a training step beside those of `ModelConfig.training_memory`, with its keys.

        Every supervised state has its gradient, and a gradient of the head's matrix that waits for the backward pass;
        a module has a block's activations, or its inputs with `recompute`, and the joined states.
        """
        one, rows, params = _one_block(shape), batch * length, self.num_params(shape)
        how: dict[str, Any] = {"whole_scores": whole_scores, "compiled": compiled}
        block = one.training_memory(batch, length, bytes_per_value, **how)["activations"]
        kept = 2 * rows * shape.dim * 4 if recompute else block + 4 * rows * shape.dim * 4
        states = len(self.depths) + self.modules
        moments = {"adamw": 8, "muon": 4, "normuon": 4, "adafactor": 0}[optimizer]  # nearly all are matrices
        return {
            "weights": 4 * params,
            "gradients": 4 * params,
            "optimizer": moments * params,
            "casts": 0 if bytes_per_value == 4 else bytes_per_value * params,
            "activations": self.modules * kept,
            "logits": states * (4 * shape.vocab_size * shape.dim + rows * shape.dim * 12),
        }


def _one_block(shape: ModelConfig) -> ModelConfig:
    """The model with one block, such as its last one is, without experts."""
    return shape.model_copy(update={"num_layers": 1, "pattern": shape.words[-1].replace("e", "")})


# --- a model and what is trained beside it ---------------------------------------------------------------------------


def num_params(shape: ModelConfig, deep: DeepConfig | None) -> int:
    """All that trains."""
    return shape.num_params() + (0 if deep is None else deep.num_params(shape))


def flops_per_token(shape: ModelConfig, deep: DeepConfig | None, length: int, *, logits: bool = True) -> float:
    """Training FLOPs per token at sequence length T of both."""
    own = shape.flops_per_token(length, logits=logits)
    return own if deep is None else own + deep.flops_per_token(shape, length)


def training_memory(
    shape: ModelConfig, deep: DeepConfig | None, batch: int, length: int, bytes_per_value: int = 2, **how: Any
) -> dict[str, int]:
    """Estimated bytes of a training step of both, by part; `how` as in `ModelConfig.training_memory`."""
    parts = shape.training_memory(batch, length, bytes_per_value, **how)
    more = {} if deep is None else deep.training_memory(shape, batch, length, bytes_per_value, **how)
    return {name: size + more.get(name, 0) for name, size in parts.items()}
