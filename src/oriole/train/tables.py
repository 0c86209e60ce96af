"""Tables of recipes that single stages read, one for each; without torch."""

from pydantic import Field

from oriole.config import Config

__all__ = ["RewardTable"]


class RewardTable(Config):
    """Stage reward: the loss of a pair (train/reward.py)."""

    centre: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around zero (Eisenstein et al. 2023); 0: none."""
