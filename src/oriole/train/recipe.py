"""A recipe: everything that decides one training stage, as a frozen config read from TOML plus `key=value`.

Nothing here imports torch, so that a typo in a recipe is reported at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from oriole.config import Config
from oriole.model.config import LoraConfig, ModelConfig, preset
from oriole.model.costs import OptimizerName
from oriole.model.deepconfig import DeepConfig
from oriole.model.seq2seqconfig import Seq2SeqConfig, seq2seq_shape
from oriole.train.scaling import settle
from oriole.train.schedules import Schedule, check
from oriole.train.smart import SmartConfig
from oriole.train.tables import (
    DistillTable,
    DPOTable,
    GateTable,
    GRPOTable,
    PPOTable,
    RewardTable,
    RolloutTable,
    Seq2SeqTable,
)

__all__ = ["PREFERRING", "CheckpointTable", "EvalTable", "Part", "Recipe", "StageName", "TokenizerTable", "TrainTable"]

StageName = Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "distill", "seq2seq"]
PREFERRING = ("reward", "dpo", "ppo", "grpo")
"""Stages that learn from preferences or rewards: text and chats are not trained on there."""
Format = Literal["text", "chat", "preference", "prompt", "question"]


class Part(Config):
    """One part of the training mixture, for example the Chinese text."""

    files: list[str] = Field(default_factory=list)
    """Globs below `data`, for example ["pretrain_zh_*.jsonl.xz"]."""
    shards: Path | None = None
    """Instead of `files`: a folder that `oriole data pack` has made, used as it is, with the tokenizer in it."""
    lang: str = ""
    """With `shards`: only the documents of this language, for example "zh"; by default all."""
    format: Format | None = None
    """Running text, conversations, preference pairs or prompts; by default text in pretraining, chat in SFT, preference
    in reward and dpo, prompts in ppo and grpo (of any file with chats, pairs or prompts alone). A text part in SFT is a
    replay of what pretraining read, against forgetting; a text or chat part in a stage that learns preferences is only
    measured, in bits per byte, and may have `val` alone. In seq2seq, chat by default, text is corrupted and to be
    mended, and question stands for chats of which each answer is learnt from the question before it alone, without the
    chat template."""
    weight: float = Field(1.0, gt=0)
    """This part's share of the training tokens, relative to the other parts' weights."""
    sources: dict[str, float] = Field(default_factory=dict)
    """Shares of single sources within this part, for example { smilechat = 0.25 }; the rest follow their size."""
    val: list[str] = Field(default_factory=list)
    """Globs of validation files. Empty: documents are held out of `files` by a hash of their text; with `shards` they
    are those that packing has held out."""


class TokenizerTable(Config):
    """How the tokenizer of a run is made when the run has none yet."""

    vocab_size: int = Field(16384, ge=272)
    """Ids in all, 16 reserved ones and 256 bytes among them."""
    sample_mb: float = Field(64.0, gt=0)
    """Megabytes of text to learn the merges from, shared equally by the languages: the bound on memory and time."""
    kind: Literal["bpe", "char"] = "bpe"
    """bpe: frequent pieces of words; char: every character a token, and `vocab_size` the most there may be."""
    path: Path | None = None
    """A folder with a tokenizer.json to use instead of training one."""


class TrainTable(Config):
    """How long and how to train."""

    tokens: float | None = Field(None, gt=0)
    """Training tokens (positions of the packed batches); either this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; either this or `tokens`."""
    batch_size: int = Field(16, ge=1)
    """Rows of a micro-batch."""
    length: int = Field(512, ge=8)
    """Tokens in a row (T); documents share rows but never see each other."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches summed for one optimizer step; "auto": as many as bring a step to `train.batch_tokens` tokens, by
    default what suits `train.tokens` (scaling.py)."""
    optimizer: OptimizerName = "adamw"
    """adamw or adafactor for everything; muon or normuon for the matrices between embedding and head, with adamw for
    the rest."""
    orthogonalise: Literal["polar-express", "newton-schulz"] = "polar-express"
    """`muon` and `normuon` only: how an update is made orthogonal."""
    cautious: bool = False
    """`muon` and `normuon` only: decay a weight only where the update, too, brings it nearer to zero."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW; of Adafactor, whose steps are relative to the size of a weight, 1e-2 is usual.
    "auto", here and in the next two: from model and tokens (scaling.py), for pretraining from random weights."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, on the same schedule; or "auto"."""
    warmup: float = Field(0.02, ge=0)
    """Steps of linear warmup: below 1 a share of all steps, else a number of steps (not used by `onecycle`)."""
    schedule: Schedule = "cosine"
    """Learning rate after the warmup: cosine, linear, wsd (warmup-stable-decay), sgdr (cosine with warm restarts),
    onecycle, exponential, constant, plateau (constant, with `smart.plateau` turned on), noam (falls with the root of
    the step)."""
    min_lr: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (not used by `constant`, `plateau` and `noam`)."""
    decay: float = Field(0.4, gt=0, le=1)
    """`wsd` only: the share of the steps at the end that decay linearly."""
    cycles: int = Field(3, ge=1)
    """`sgdr` only: how many cosines."""
    cycle_mult: float = Field(2.0, ge=1)
    """`sgdr` only: length of a cosine, as a multiple of the one before."""
    rise: float = Field(0.3, gt=0, lt=1)
    """`onecycle` only: the share of the steps that rise to the peak."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of the matrices (embeddings and norms are never decayed); or "auto"."""
    beta2: float = Field(0.95, gt=0, lt=1)
    """AdamW's second-moment decay (beta1 is 0.9)."""
    clip: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Global gradient norm above which gradients are scaled down; auto: the 0.9 quantile of the last 128 finite norms.
    """
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the residual branches while training."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of whole attention heads while training, drawn for each row and layer (Zhou et al. 2020)."""
    dropout_depth: Literal["constant", "linear"] = "constant"
    """constant: both dropouts are the same in every layer; linear: they grow with depth, to what is given in the last
    layer (the schedule of Huang et al. 2016)."""
    recompute: bool = False
    """Keep only what goes in and out of a block and compute the rest again in the backward pass: about a third more
    time for a fraction of the activations' memory."""
    seed: int = 1337
    """Seed of the weights, the data order and dropouts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix products; the weights stay fp32. auto: what the hardware does well."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: where a compiler is found."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes (torchrun): ddp, each holds the whole model, or fsdp, each holds a part of weights and
    optimizer; auto: ddp. `batch_size` x `accumulate` rows are those of all processes together."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint; no: afresh; or the path of a checkpoint."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of metrics.jsonl."""

    @property
    def dropouts(self) -> dict[str, Any]:
        """What `LM.set_dropout` takes."""
        return {"p": self.dropout, "heads": self.head_dropout, "depth": self.dropout_depth}

    @model_validator(mode="after")
    def _reaches_its_end(self) -> "TrainTable":
        check(self.schedule, self.min_lr)
        return self


class CheckpointTable(Config):
    """When to save the whole training state."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: about every tenth of the run."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = Field(0, ge=0)
    """How many of those with the fewest validation bits per byte (mean over the parts) stay as well; above 0, every
    evaluation is followed by a checkpoint."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of every so many steps stay for ever; 0: none."""


class EvalTable(Config):
    """Validation while training."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: about every fifth of the run."""
    tokens: int = Field(20_000, ge=256)
    """At most this many validation tokens for each part."""
    length: int = Field(0, ge=0)
    """Tokens in a window of validation text, which sees nothing before it; 0: as in training. Never more than the
    model's context."""
    holdout: float = Field(0.005, gt=0, lt=0.5)
    """Share of documents and chats held out where a part names no validation files."""
    holdout_pairs: float = Field(0.1, gt=0, lt=0.5)
    """The same for preference pairs and for prompts, of which there are fewer; all with one prompt go together."""
    pairs: int = Field(500, ge=1)
    """At most this many held-out preference pairs for each part."""
    prompts: tuple[str, ...] = ("今天天气", "从前有一个", "The weather today", "Once upon a time")
    """Prompts, two for each language, continued greedily at every evaluation (as a user's turn in chat stages)."""
    questions: str = ""
    """A file below `data` with held-out questions and accepted answers, asked once at the end of the stage."""


class Recipe(Config):
    """One stage of training."""

    stage: StageName
    """pretrain: running text, every token trained; sft: chats, only the assistant's words trained; reward: pairs, from
    which a model learns to score answers; dpo: pairs, from which it learns to give the better ones; ppo and grpo:
    prompts, which it answers itself and learns by the rewards; distill: text or chats, from a larger model too;
    seq2seq: chats and text, of which an encoder-decoder learns to write the one half having read the other."""
    run: Path = Path("runs/run")
    """The run folder; tokenizer, shards and stages of a run live in it."""
    data: str = "builtin"
    """The folder that the file globs are relative to; "builtin" is Oriole's own small bilingual world."""
    model: str | ModelConfig | Seq2SeqConfig = "demo"
    """A preset's name, a table of the model's shape, a width ("d384") or a number of parameters ("30M"), from which the
    shape is derived (first stage only; later stages take `init`'s). With a parent, `model.rope_scaling` and
    `model.rope_factor` make its context that many times longer than it was trained with (see `lengthened`). In seq2seq:
    demo, classic, tfchat, base, or a table of Seq2SeqConfig."""
    init: str = ""
    """A model folder to start from, or "random". Default: random for pretrain and seq2seq, for the others the first of
    their stages in task.PARENTS that the run has and that was not judged worse than its own parent."""
    track: Literal["none", "tensorboard", "trackio"] = "none"
    """Where the records of metrics.jsonl are shown live as well: TensorBoard's files in the stage's folder
    (`tensorboard --logdir RUN`), or a trackio project named after the run (`trackio show`). Extra: track."""
    reference: Path | None = None
    """A reference.json with the curves to expect (python -m bench.reference makes one); by default that of the built-in
    recipe, where this run is the very same."""
    skip_bad: bool = False
    """Count records that cannot be read and go on, instead of stopping at the first."""
    optional: bool = False
    """`oriole run` leaves the stage out, and says so, where `data` lacks the files of one of its trained parts."""
    parts: dict[str, Part]
    """The mixture; the names zh and en are reported as languages."""
    tokenizer: TokenizerTable = TokenizerTable()
    """How to make the run's tokenizer."""
    train: TrainTable = TrainTable()
    """How long and how to train."""
    checkpoint: CheckpointTable = CheckpointTable()
    """When to save."""
    eval: EvalTable = EvalTable()
    """When and on how much to validate."""
    lora: LoraConfig | None = None
    """Train adapters on the parent's matrices instead of the whole model; with this table in any stage. The stage's
    model has them merged in, and they lie beside it as a PEFT folder, `adapter`."""
    deep: DeepConfig | None = None
    """With this table in pretrain, sft and distill: earlier depths or further tokens are predicted too while training.
    What that takes stays in the checkpoints; the stage's model is without it."""
    reward: RewardTable = RewardTable()
    """Stage reward: the loss of a pair."""
    dpo: DPOTable = DPOTable()
    """Stage dpo: the loss of a pair."""
    distill: DistillTable | None = None
    """Stage `distill` only: the teacher, and what is learnt from it."""
    seq2seq: Seq2SeqTable = Seq2SeqTable()
    """Stage seq2seq: sources, targets, loss."""
    rollout: RolloutTable = RolloutTable()
    """Stages ppo and grpo: prompts, answers, rewards."""
    ppo: PPOTable = PPOTable()
    """Stage ppo."""
    grpo: GRPOTable = GRPOTable()
    """Stage grpo."""
    gate: GateTable = GateTable()
    """After dpo, ppo and grpo: what decides whether the stage or its parent is used from here on."""
    smart: SmartConfig = SmartConfig()
    """What the run may decide by itself; everything is off by default."""
    derived: dict[str, str] = Field(default_factory=dict)
    """Filled in by the rules of scaling.py: keys that were "auto", with their values and where they come from."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        if isinstance(shape := table.get("model"), dict) and shape.keys() <= {"rope_scaling", "rope_factor"}:
            table = {**table, "model": {"preset": cls.model_fields["model"].default, **shape}}
        if isinstance(train := table.get("train"), dict) and train.get("schedule") == "plateau":
            table = {**table, "smart": {"plateau": True, **(table.get("smart") or {})}}
        if table.get("stage") == "seq2seq":
            return {**table, "model": seq2seq_shape(table.get("model", "demo"))}
        return settle(table, {name: field.default for name, field in TrainTable.model_fields.items()})

    @field_validator("parts")
    @classmethod
    def _some_parts(cls, parts: dict[str, Part]) -> dict[str, Part]:
        if not parts:
            raise ValueError("needs at least one part, for example [parts.zh] with files = [...]")
        return parts

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        for name, part in self.parts.items():
            format = self.format_of(part)
            if format == "preference" and self.stage not in PREFERRING:
                raise ValueError(f'parts.{name} holds preference pairs, which stage = "{self.stage}" does not read')
            if format == "question" and self.stage != "seq2seq":
                raise ValueError(f'parts.{name} has the format question, which stage = "{self.stage}" does not read')
            if format == "preference" and part.shards is not None:
                raise ValueError(f"parts.{name} holds preference pairs, which are read from files, not from shards")
            only_measured = self.stage in PREFERRING and format in ("text", "chat") and part.val
            if bool(part.files) == (part.shards is not None) and not only_measured:
                raise ValueError(f"give parts.{name} either files or shards")
            if part.lang and part.shards is None:
                raise ValueError(f"parts.{name}.lang chooses among packed documents; it needs parts.{name}.shards")
            if sum(part.sources.values()) >= 1:
                raise ValueError(f"the shares in parts.{name}.sources must leave something for the other sources")
        if (self.train.tokens is None) == (self.train.epochs is None):
            raise ValueError("give exactly one of train.tokens and train.epochs")
        if (self.stage == "distill") != (self.distill is not None):
            raise ValueError("stage distill, and no other, has a table [distill]; it names the teacher = FOLDER")
        if self.deep is not None and self.stage in PREFERRING:
            raise ValueError(
                f'stage = "{self.stage}" has no [deep]: its loss is about whole answers, not the next token; leave the '
                "table out, or use it in pretrain, sft or distill"
            )
        if self.stage in ("ppo", "grpo"):
            self._rollouts_possible()
        if self.stage == "seq2seq":
            self._pairs_possible()
        elif isinstance(self.model, Seq2SeqConfig):
            raise ValueError(f'model is an encoder-decoder, which stage = "{self.stage}" does not train; use seq2seq')
        shape = preset(self.model) if isinstance(self.model, str) else self.model  # a wrong name is reported now
        new = self.init == "random" or (self.stage == "pretrain" and not self.init)
        if new and isinstance(shape, ModelConfig):  # and this, too, not after the tokenizer has been trained
            if problem := self.too_long_for(shape):
                raise ValueError(problem)
            if shape.reasoning is not None and shape.reasoning.cross:
                raise ValueError(
                    "model.reasoning.cross=true is for models trained in Python, whose latent block looks at passages "
                    "beside the tokens (LM.context_of); no stage of a recipe has such passages, so leave it out here"
                )
        return self

    def too_long_for(self, shape: ModelConfig) -> str:
        """What is wrong where a row's document may reach beyond the positions that a model of that shape knows, else
        "". In the stages that learn pairs or answers these are held to the context one by one."""
        if self.stage not in ("pretrain", "sft", "distill") or self.train.length <= shape.context:
            return ""
        return (
            f"train.length={self.train.length} is beyond the model's context of {shape.context} tokens; lower it to "
            f"that, or make the context longer: model.context={self.train.length} for a new model, model.rope_scaling "
            "and model.rope_factor for a parent's"
        )

    def window(self, shape: ModelConfig) -> int:
        """Tokens of a window of validation text."""
        return min(self.eval.length or self.train.length, shape.context)

    def _rollouts_possible(self) -> None:
        """What the stages that learn from their own answers need."""
        asked = {name: part for name, part in self.parts.items() if self.format_of(part) == "prompt"}
        if not asked:
            raise ValueError(f"{self.stage} needs a part with prompts: one without a format, or format = 'prompt'")
        for name, part in asked.items():
            if part.shards is not None or part.sources:
                raise ValueError(
                    f"{self.stage} reads the prompts of parts.{name} from files, without shards or sources"
                )
        if self.train.epochs is None:
            raise ValueError(f"{self.stage} counts in passes over its prompts: give train.epochs, not train.tokens")
        if self.train.compile is True:
            raise ValueError(
                f"{self.stage} compares the probabilities of its rollouts with those in training, both computed alike: "
                "leave train.compile at auto (not compiled) or false"
            )
        lora = 0.0 if self.lora is None else self.lora.dropout
        if self.train.dropout > 0 or self.train.head_dropout > 0 or lora > 0:
            raise ValueError(
                f"train.dropout, train.head_dropout and lora.dropout must be 0 in {self.stage}: who answered is who "
                "learns"
            )
        if isinstance(self.model, ModelConfig) and self.model.rope_scaling != "none":
            raise ValueError(f"{self.stage} takes its parent's context as it is; lengthen it in an sft stage before")
        if self.train.parallel == "fsdp":
            raise ValueError(f"{self.stage} needs the whole policy in each process; use train.parallel=ddp")

    def lengthened(self, parent: ModelConfig) -> ModelConfig:
        """The parent's shape, with its context made longer if the table `model` says so.

        The factor counts from the context that the parent was trained with, so that stages in turn may all have it.
        """
        if not isinstance(self.model, ModelConfig) or self.model.rope_scaling == "none":
            return parent
        return parent.stretched(self.model.rope_scaling, self.model.rope_factor)

    def _pairs_possible(self) -> None:
        """What the stage that learns pairs of source and target needs."""
        if self.train.head_dropout > 0 or self.train.dropout_depth != "constant":
            raise ValueError("stage seq2seq has train.dropout alone: leave train.head_dropout and dropout_depth out")
        formats = {self.format_of(part) for part in self.parts.values()}
        if formats - {"text", "chat", "question"}:
            raise ValueError("seq2seq reads parts of the formats text, chat and question")
        if {"chat", "question"} <= formats:
            raise ValueError(
                "the model is asked in the chat template or by the plain question, not both: give the parts with "
                "conversations one format, chat or question"
            )
        if self.lora is not None:
            raise ValueError("[lora] is for decoder-only models; train the whole encoder-decoder")

    def format_of(self, part: Part) -> Format:
        """How a part of this stage is read."""
        if part.format is not None:
            return part.format
        match self.stage:
            case "pretrain":
                return "text"
            case "sft" | "distill" | "seq2seq":
                return "chat"
            case "reward" | "dpo":
                return "preference"
            case "ppo" | "grpo":
                return "prompt"

    @property
    def trained(self) -> dict[str, Part]:
        """The parts that are trained on, not only measured."""
        if self.stage not in PREFERRING:
            return dict(self.parts)
        return {name: part for name, part in self.parts.items() if self.format_of(part) not in ("text", "chat")}

    @property
    def folder(self) -> Path:
        """`runs/<name>/<stage>`: where this stage keeps its files."""
        return self.run / self.stage
