"""What predicts more than the last layer does, in training only: earlier depths, and tokens beyond the next.

A depth has a norm of its own and shares the model's head, as in Schuster et al. 2022 (CALM) and Elhoushi et al. 2024
(LayerSkip): a head of its own would be V x D more weights that are thrown away, and what it learnt would not help the
body to speak the head's language. The norm is not shared, as it would have to fit residual streams of several scales.

Further tokens are predicted one after the other (DeepSeek-V3, section 2.2), not side by side (Gloeckle et al. 2024):
each module sees the true token before the one that it predicts, which is what a draft of self-speculative decoding sees
too, and the model's own blocks stay as many as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oriole.model.config import ModelConfig
from oriole.model.deepconfig import DeepConfig
from oriole.model.layers import Block, RMSNorm, Sight

__all__ = ["Ahead", "Deep"]


class Ahead(nn.Module):
    """One further token: h_k = block(M [norm(h_{k-1}); norm(emb(t_{i+k}))]) (DeepSeek-V3, equations 21 and 22)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.state_norm = RMSNorm(config.dim, config.norm_eps)
        self.token_norm = RMSNorm(config.dim, config.norm_eps)
        self.join = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, config.layers[-1]._replace(experts=False))
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, token: Tensor, sight: Sight) -> Tensor:
        """Residual stream x (B, T, D) and embeddings `token` (B, T, D) -> the next module's x (B, T, D)."""
        joined = self.join(torch.cat((self.state_norm(x), self.token_norm(token)), dim=-1))
        out: tuple[Tensor, None] = self.block(joined, sight)
        return out[0]


class Deep(nn.Module):
    """The norms of the supervised depths and the modules of the further tokens; what they give goes to the head."""

    def __init__(self, config: ModelConfig, table: DeepConfig) -> None:
        """`ConfigError` where a depth is not one of the model's."""
        super().__init__()
        table.check(config)
        self.table = table
        self.norms = nn.ModuleList(RMSNorm(config.dim, config.norm_eps) for _ in table.depths)
        self.ahead = nn.ModuleList(Ahead(config) for _ in range(table.modules))

    def forward(
        self, kept: Sequence[Tensor], x: Tensor, embedded: Tensor, sight: Sight, recompute: bool
    ) -> tuple[Tensor, ...]:
        """States (B, T, D) for the head: one a depth, then one a further token.

        `kept`: residual streams (B, T, D) after the depths' blocks; x (B, T, D) that after the last block; `embedded`
        (B, T, D) the tokens' embeddings; `sight` is that of the last block.
        """
        out = [norm(state) for norm, state in zip(self.norms, kept, strict=True)]
        for k, module in enumerate(self.ahead, start=1):
            assert isinstance(module, Ahead)
            # Beyond a document's end, the token is what follows it there.
            given = x, embedded.roll(-k, 1), sight
            x = checkpoint(module, *given, use_reentrant=False) if recompute else module(*given)
            out.append(module.norm(x))
        return tuple(out)

    def like(self, last: nn.Module) -> None:
        """Give the modules' blocks the dropouts of the model's last block."""
        for module in self.ahead:
            assert isinstance(module, Ahead) and isinstance(last, Block)
            module.block.dropout = last.dropout
            module.block.attention.head_dropout = last.attention.head_dropout

    def names(self) -> list[str]:
        """What each state is called in records: depth_2, ahead_2 (the second token from here) and so on."""
        depths = [f"depth_{depth}" for depth in self.table.depths]
        return depths + [f"ahead_{k + 1}" for k in range(1, self.table.tokens_ahead)]
