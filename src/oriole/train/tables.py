"""Tables of recipes that single stages read, one for each; without torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from oriole.config import Config

__all__ = ["DistillTable", "RewardTable"]


class RewardTable(Config):
    """Stage reward: the loss of a pair (train/reward.py)."""

    centre: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around zero (Eisenstein et al. 2023); 0: none."""


class DistillTable(Config):
    """From whom and how a model learns beside the data (stage `distill`)."""

    teacher: Path
    """The folder of a larger model of the same tokenizer."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), the student covers all that the teacher may say (Hinton et al. 2015). reverse:
    KL(student || teacher), it keeps to what the teacher says most (Gu et al. 2024)."""
    temperature: float = Field(1.0, gt=0)
    """Above 1 both distributions are flattened, so that unlikely tokens count for more."""
    lm_weight: float = Field(0.5, ge=0, le=1)
    """Share of the usual loss on the data's own tokens; the divergence has the rest."""
    top_k: int = Field(0, ge=0)
    """0: the teacher is asked in every step about all tokens. Above: it is asked once, before the first step, and its
    so many likeliest tokens are kept on disk, with what all others have together: several epochs, or several students,
    then cost the teacher nothing. 32 usually holds nearly all of the probability."""
