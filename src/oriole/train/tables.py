"""Tables of recipes that single stages read, one for each; without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from oriole.config import Config

__all__ = [
    "DPOTable", "DistillTable", "GRPOTable", "GateTable", "PPOTable", "RewardName", "RewardTable", "RolloutTable",
    "Seq2SeqTable",
]  # fmt: skip

RewardName = Literal["arithmetic", "exact", "language", "format", "repetition", "length", "rules", "model"]


class RewardTable(Config):
    """Stage reward: the loss of a pair (train/reward.py)."""

    centre: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around zero (Eisenstein et al. 2023); 0: none."""
    sft: float = Field(0.0, ge=0)
    """Weight of an SFT term beside the loss, minus the chosen side's log-prob per token by the head that the parent
    had: the body keeps what it knows, and judges better what it has not seen (Yang et al. 2024, section 3)."""


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


class Seq2SeqTable(Config):
    """Stage seq2seq: what sources and targets are made of, and the loss (train/seq2seq.py)."""

    source_length: int = Field(0, ge=0)
    """Tokens of all sources in a row (S), beside the `train.length` of its targets; 0: in the proportion that the data
    have."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """The share of each target's probability that all tokens get alike."""
    piece: int = Field(128, ge=8)
    """Tokens of running text that are corrupted together: longer documents are cut."""
    noise: float = Field(0.15, gt=0, lt=1)
    """The share of a text that is taken out of the source and becomes the target."""
    span: float = Field(3.0, ge=1)
    """Mean length of what is taken out at one place, in tokens."""
    prefix: float = Field(0.0, ge=0, le=1)
    """The share of the texts that are cut in two instead, wherever it falls: the beginning is the source, the rest the
    target."""


class DPOTable(Config):
    """Stage dpo: the loss of a pair (train/dpo.py)."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "simpo", "orpo"] = "sigmoid"
    """sigmoid: DPO (Rafailov et al. 2023). sigmoid_norm: the same of log-ratios per token. ipo: a squared loss per
    token (Azar et al. 2023). hinge: SLiC (Zhao et al. 2023). robust: labels of which `label_smoothing` are wrong
    (Chowdhury et al. 2024). simpo: log-probs per token with a margin (Meng et al. 2024), and orpo: SFT with an odds
    ratio (Hong et al. 2024), both without a reference model."""
    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the reference; ipo's tau, orpo's lambda. Usual: 0.1; for simpo and sigmoid_norm 2 and
    more."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """`robust` only: the share of the pairs that are believed to be labelled the wrong way round."""
    gamma: float = Field(0.5, ge=0)
    """`simpo` only: by how much `beta` times the better side's log-prob per token shall exceed the worse one's."""
    sft: float = Field(0.0, ge=0)
    """Weight of an SFT term beside the loss, minus the better side's log-prob per token (Pang et al. 2024, equation 3):
    it keeps good answers from becoming unlikely along with the bad ones. orpo has one of weight 1 already."""
    reference: str = ""
    """A model folder that the reference log-probs are taken from, of the same tokenizer; by default the stage's own
    parent."""
    long: Literal["cut", "drop"] = "cut"
    """What happens to answers that do not fit into a row with the other side: their end is cut off, or the pair is left
    out."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "DPOTable":
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(f"label_smoothing has no effect on the loss '{self.loss}'; use loss = \"robust\"")
        if self.reference and self.free_of_reference:
            raise ValueError(f"the loss '{self.loss}' has no reference; leave the key out")
        return self

    @property
    def free_of_reference(self) -> bool:
        """Whether the loss knows the policy only."""
        return self.loss in ("simpo", "orpo")


class RolloutTable(Config):
    """Stages ppo and grpo: what is asked, how it is answered, and what an answer is worth."""

    prompts: int = Field(32, ge=1)
    """Prompts of one rollout: the policy answers them all, then learns from its answers."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, its end mark included. Prompts that leave no room for it in `train.length` are left out."""
    temperature: float = Field(1.0, gt=0)
    """Of the sampled answers; the logits are divided by it in training, too. Nothing else narrows the choice."""
    max_batch: int = Field(128, ge=1)
    """Answers that are written at the same time."""
    rewards: Mapping[RewardName, float] = {"rules": 1.0}
    """Weights of what is added up, each from 0 to 1 but for the model's: arithmetic (the sum is right), exact (a known
    answer), language (the question's), format (it ended, no debris), repetition (none), length (not beyond
    `long_answer`), rules (text/judge.py's score of all of these), model (the reward model). Prompts about which none
    has anything to say are left out."""
    reward_model: Path | None = None
    """Folder of the reward model; by default that of the run's stage reward."""
    long_answer: int = Field(64, ge=1)
    """Words and Chinese characters up to which the reward `length` is 1; it is 0 from twice as many on."""
    eval_prompts: int = Field(200, ge=2)
    """At most so many held-out prompts are answered, greedily, at every evaluation, and compared with the parent's."""

    @field_validator("rewards")
    @classmethod
    def _some_reward(cls, rewards: Mapping[RewardName, float]) -> Mapping[RewardName, float]:
        if not rewards or not all(rewards.values()):
            raise ValueError("needs at least one reward, each with a weight other than 0: rewards = { rules = 1.0 }")
        return rewards


class PPOTable(Config):
    """Proximal policy optimisation (Schulman et al. 2017) from rewards, as Ouyang et al. 2022."""

    epochs: int = Field(4, ge=1)
    """Passes over the answers of a rollout."""
    kl: Literal["k1", "k3"] = "k1"
    """Estimate of each token's KL to the parent, which is taken off its reward (advantages.py)."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of that KL; with `kl_target` the first one."""
    kl_target: float | None = Field(None, gt=0)
    """KL of an answer (nats, summed over its tokens) that the weight is steered to (Ziegler et al. 2019); none: the
    weight is fixed."""
    kl_horizon: float = Field(10_000, gt=0)
    """Answers in which the weight can change by about a fifth of itself."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of rewards to come."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's trade of bias (0) against variance (1)."""
    clip: float = Field(0.2, gt=0, lt=1)
    """How far from 1 the ratio of new to old probability is followed."""
    value_clip: float = Field(0.2, gt=0)
    """How far from the old value the new one is followed."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value model's loss."""
    value_init: Literal["policy", "reward"] = "policy"
    """What the value model starts from: the policy's parent with a head of zeros, or the reward model."""
    whiten_rewards: bool = False
    """Scale each token's rewards to variance 1."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the score of an answer without an end mark."""
    stop_kl: float | None = Field(None, gt=0)
    """`policy/approxkl_avg` of a step above which the rest of the rollout is left; none: never."""


class GRPOTable(Config):
    """Groups of answers that are each other's baseline: GRPO (Shao et al. 2024) and RLOO (Ahmadian et al. 2024)."""

    method: Literal["grpo", "rloo"] = "grpo"
    """grpo: less the group's mean, a ratio for each token; rloo: less the mean of the others, a ratio for the whole
    answer, the KL taken off the reward."""
    group: int = Field(8, ge=2)
    """Answers to each prompt."""
    epochs: int = Field(1, ge=1)
    """Passes over the answers of a rollout."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the parent: k3 times the ratio, with gradient (grpo); k1, as part of the reward (rloo)."""
    clip: float = Field(0.2, gt=0, lt=1)
    """How far below 1 the ratio of new to old probability is followed."""
    clip_high: float | None = Field(None, gt=0)
    """How far above 1; DAPO's "clip higher" is 0.28. None: as far as below."""
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """`method = "grpo"`: what the sum over tokens is divided by. dapo: all tokens of the step; grpo: each answer by its
    own length, then the answers; dr_grpo: the answers times `rollout.max_new_tokens`."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """`method = "grpo"`: the standard deviation that advantages are divided by; dr_grpo has none."""
    mask_truncated: bool = False
    """Learn nothing from answers that never ended (DAPO)."""


class GateTable(Config):
    """Whether a preference stage helped: its answers against its parent's, after the stage (apps/gate.py)."""

    prompts: int = Field(400, ge=0)
    """At most so many held-out prompts; 0: no gate."""
    files: list[str] = Field(default_factory=list)
    """Globs below `data` of questions that nothing was trained on, written as those of `eval.questions`, which are the
    default; or else it is the prompts that the stage's own parts hold out."""
    temperature: float = Field(0.8, ge=0)
    """Of the sampled answers; as in `oriole chat`, so are top_p (0.95) and top_k (50)."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest sampled answer, its end mark included."""
    reward_model: Path | None = None
    """The reward model that judges beside the rules; by default that of the run's stage reward, if there is one."""
    max_bpb_rise: float = Field(0.05, ge=0)
    """Bits per byte (mean over the parts) may rise by this share before the stage counts as worse."""
