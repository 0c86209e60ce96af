"""Deep supervision and multi-token prediction as a recipe asks for them. Imports no torch."""

from pydantic import Field, field_validator, model_validator

from oriole.config import Config
from oriole.errors import ConfigError
from oriole.model.config import ModelConfig

__all__ = ["DeepConfig", "one_block"]


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
        one = one_block(shape)
        module = one.num_params() - one.embedding_params + 2 * shape.dim * shape.dim + 2 * shape.dim
        return len(self.depths) * shape.dim + self.modules * module


def one_block(shape: ModelConfig) -> ModelConfig:
    """The model with one block, such as its last one is, without experts: what a module of a further token adds."""
    return shape.model_copy(update={"num_layers": 1, "pattern": shape.words[-1].replace("e", "")})
