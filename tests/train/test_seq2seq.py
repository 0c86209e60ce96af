"""Sources and targets, their rows, and the stage: learns, goes on bit for bit, and is then asked like any model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_stage
from safetensors.torch import load_file

from oriole.apps.api import Oriole
from oriole.apps.inside import InsideConfig, describe
from oriole.config import validate
from oriole.errors import ConfigError, DataError, Interrupted, ModelError
from oriole.infer.engine import Engine
from oriole.infer.sample import Sampling
from oriole.model.folder import load_model
from oriole.model.seq2seq import START, Seq2Seq
from oriole.model.seq2seqconfig import Seq2SeqConfig
from oriole.text.mixture import Mixture
from oriole.text.template import Message, render
from oriole.text.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from oriole.train import seq2seq
from oriole.train.batch import IGNORE, Batch
from oriole.train.loop import Trainer
from oriole.train.recipe import Recipe
from oriole.train.seq2seqdata import SENTINELS, Pair, PairStream, Pieces, Seq2SeqPacker, answers, corrupted
from oriole.train.stage import run_stage
from oriole.train.tables import Seq2SeqTable

SHAPE: dict[str, Any] = {
    "vocab_size": 400, "dim": 32, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2, "ffn_dim": 48,
    "context": 64,
}  # fmt: skip
TABLE = Seq2SeqTable(noise=0.3, span=2.0)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_every_answer_of_a_chat_is_a_target_of_all_that_stands_before_it() -> None:
    tokenizer = Tokenizer([])
    said = [Message("user", "a?"), Message("assistant", "b."), Message("user", "c?"), Message("assistant", "d.")]
    pairs = list(answers(*render(said, tokenizer)))
    for (source, target), n, text in zip(pairs, (1, 3), ("b.", "d."), strict=True):
        assert source == render(said[:n], tokenizer, generation=True)[0]
        assert target == [*tokenizer.encode(text), IM_END]  # and nothing behind it: no spaces, no padding


def mended(source: list[int], target: list[int]) -> list[int]:
    """The text that source and target make together, the sentinels taken in their order."""
    spans: list[list[int]] = []
    for token in target[:-1]:
        if token in SENTINELS:
            assert token == SENTINELS[len(spans) % len(SENTINELS)]
            spans.append([])
        else:
            spans[-1].append(token)
    out: list[int] = []
    for token in source:
        out += spans.pop(0) if token in SENTINELS else [token]
    assert not spans
    return out


@pytest.mark.parametrize("n", [2, 3, 5, 40, 200])
@pytest.mark.parametrize("prefix", [0.0, 1.0])
def test_a_corrupted_text_can_be_mended_from_its_target(n: int, prefix: float) -> None:
    text = list(range(20, 20 + n))
    table = TABLE.model_copy(update={"prefix": prefix})
    for key in range(20):
        pair = corrupted([*text, END_OF_TEXT], key, table)
        assert pair is not None
        source, target = pair
        assert mended(source, target) == text and target[-1] == END_OF_TEXT and source[0] == text[0]
        taken = sum(token not in SENTINELS for token in target) - 1
        if prefix:
            assert sum(token in SENTINELS for token in source) == 1 and source[-1] in SENTINELS
        else:
            assert taken == min(max(1, round(0.3 * n)), n - 1)
            assert sum(token in SENTINELS for token in source) == min(max(1, round(taken / 2)), taken, n - taken)
    assert corrupted([*text, 0], 1, table) == corrupted([*text, 0], 1, table)
    assert n < 40 or corrupted([*text, 0], 1, table) != corrupted([*text, 0], 2, table)


def test_every_token_but_the_first_is_taken_out_at_times() -> None:
    text = list(range(20, 32))
    gone = set()
    for key in range(300):
        pair = corrupted(text, key, TABLE)
        assert pair is not None
        gone |= set(pair[1]) & set(text)
    assert gone == set(text[1:])
    assert corrupted([20, END_OF_TEXT], 0, TABLE) is None


class Docs:
    """Documents of a mixture: text where the mask is all ones."""

    fingerprint = "x"

    def __init__(self, docs: list[tuple[list[int], list[int]]]) -> None:
        self._docs = docs

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(ids) for ids, _ in self._docs])

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self._docs)

    def doc(self, i: int, /) -> Any:
        ids, mask = self._docs[i]
        return np.array(ids, np.uint16), np.array(mask, np.uint8)


def test_pieces_are_the_text_in_parts() -> None:
    text = Docs([(list(range(20, 20 + n)), [1] * n) for n in (7, 3, 10)])
    pieces = Pieces(text, 4)
    docs = [pieces.doc(i)[0].tolist() for i in range(len(pieces))]
    assert pieces.lengths.tolist() == [len(d) for d in docs] == [4, 3, 3, 4, 4, 2]
    assert [*docs[0], *docs[1]] == list(range(20, 27)) and [*docs[3], *docs[4], *docs[5]] == list(range(20, 30))
    assert pieces.num_tokens == 20 and pieces.fingerprint != Pieces(text, 5).fingerprint


def stream(seed: int = 1, source: int = 40, target: int = 24) -> PairStream:
    chats = Docs([([16 + i % 200] * (5 + i % 9) + [300 + i] * (2 + i % 7) + [2], [0] * (5 + i % 9) + [1] * (3 + i % 7))
                  for i in range(60)])  # fmt: skip
    text = Docs([([16 + (i * 7 + j) % 200 for j in range(20)], [1] * 20) for i in range(30)])
    mixture = Mixture({"chats": chats, "text": text}, {"chats": 1.0, "text": 1.0}, seed)
    return PairStream(mixture, TABLE, seed, source, target)


def packer(seed: int = 1) -> Seq2SeqPacker:
    return Seq2SeqPacker(stream(seed), 4, 48, 32)


def pairs_of(batch: Batch) -> list[Pair]:
    """The pairs of a batch, read off its documents; checks what must hold of every row."""
    out = []
    for row in range(len(batch.tokens)):
        for number in range(int(batch.doc[row].max()) + 1):
            at, source_at = batch.doc[row] == number, batch.extra["source_doc"][row] == number
            tokens, targets = batch.tokens[row][at].tolist(), batch.targets[row][at].tolist()
            assert tokens == [START, *targets[:-1]] and targets[-1] in (END_OF_TEXT, IM_END)
            assert batch.pos[row][at].tolist() == list(range(len(tokens)))
            source = batch.extra["source"][row][source_at].tolist()
            assert batch.extra["source_pos"][row][source_at].tolist() == list(range(len(source))) and source
            out.append((source, targets))
        assert (batch.targets[row][batch.doc[row] < 0] == IGNORE).all()
    return out


def test_rows_hold_whole_pairs_with_the_same_number_on_both_sides_and_nearly_no_padding() -> None:
    made = packer()
    batches = [next(made) for _ in range(12)]
    packed = [pair for batch in batches for pair in pairs_of(batch)]
    alone = stream()
    expected = [pair for _ in range(len(packed) + 100) for pair in next(alone)]  # some still wait
    assert all(pair in expected for pair in packed)
    filled = torch.cat([batch.doc for batch in batches]) >= 0
    sources = torch.cat([batch.extra["source_doc"] for batch in batches]) >= 0
    assert filled.float().mean() > 0.85 or sources.float().mean() > 0.95  # one side or the other is full


def test_no_pair_waits_for_ever() -> None:
    made, alone = packer(), stream()
    first = [pair for _ in range(6) for pair in next(alone)]
    seen = [pair for _ in range(40) for pair in pairs_of(next(made))]
    assert all(pair in seen for pair in first)


def test_a_packer_goes_on_where_it_was() -> None:
    made = packer()
    for _ in range(5):
        next(made)
    state = json.loads(json.dumps(made.state_dict()))
    again = packer()
    again.load_state_dict(state)
    for _ in range(5):
        one, other = next(made), next(again)
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name


def test_pairs_that_fit_nowhere_are_left_out_or_named() -> None:
    some = stream(target=6)
    got = [pair for _ in range(60) for pair in next(some)]
    assert all(len(target) <= 6 for _, target in got) and some.left_out > 0 and some.given == len(got)
    with pytest.raises(DataError, match=r"a target of at most 1 tokens; raise train\.length"):
        next(stream(target=1))


def test_a_packed_batch_has_the_loss_of_its_pairs_one_by_one() -> None:
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig.model_validate(SHAPE)).eval()
    objective = seq2seq.Seq2SeqObjective()
    batch = next(packer())
    apart = torch.zeros(())
    for source, target in pairs_of(batch):
        h = model(torch.tensor([[START, *target[:-1]]]), source=torch.tensor([source])).h
        apart += torch.nn.functional.cross_entropy(model.head("logits", h)[0], torch.tensor(target), reduction="sum")
    assert float(objective.weight(batch)) == sum(len(target) for _, target in pairs_of(batch))
    torch.testing.assert_close(objective(model, batch).sum, apart, rtol=1e-5, atol=1e-3)


# --- the stage -------------------------------------------------------------------------------------------------------


def recipe(data: Path, run: Path, **tables: Any) -> Recipe:
    table: dict[str, Any] = {
        "stage": "seq2seq", "run": run, "data": str(data), "model": SHAPE, "tokenizer": {"vocab_size": 300},
        "parts": {"chat": {"files": ["chat.jsonl"], "val": ["chat.jsonl"]},
                  "en": {"format": "text", "files": ["en.txt"], "val": ["en.txt"]}},
        "seq2seq": {"piece": 24, "label_smoothing": 0.1},
        "train": {"tokens": 2 * 2 * 48 * 20, "batch_size": 2, "length": 48, "accumulate": 2, "dropout": 0.1, "lr": 1e-2,
                  "compile": False, "device": "cpu", "dtype": "fp32"},
        "checkpoint": {"every": 1},
        "eval": {"tokens": 512, "every": 7, "prompts": ["春"]},
    }  # fmt: skip
    for name, values in tables.items():
        table[name] = {**table.get(name, {}), **values} if isinstance(values, dict) and name != "parts" else values
    return validate(Recipe, table, "toy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_stage.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_stage(recipe(data, folder))
    return folder


def test_the_stage_learns_both_kinds_of_pairs(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "seq2seq" / "metrics.jsonl").read_text().splitlines()]
    done = lines[-1]
    assert done["event"] == "done" and done["stage"] == "seq2seq"
    assert all(done["bpb"][part] < 0.9 * done["bpb_before"][part] for part in ("chat", "en"))
    assert any(line.get("samples") for line in lines if line["event"] == "eval")


def test_a_broken_run_goes_on_and_ends_with_the_same_weights(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def stopping(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        if self.now.step == 8:
            self._stop.signum = 15

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(Interrupted, match="after step 8 of 20"):
            run_stage(recipe(data, tmp_path))
    torch.manual_seed(99)
    run_stage(recipe(data, tmp_path))
    mine, whole = (load_file(f / "seq2seq" / "model" / "model.safetensors") for f in (tmp_path, run))
    assert mine.keys() == whole.keys() and all(torch.equal(mine[name], whole[name]) for name in mine)


def test_its_folder_chats_and_can_be_looked_into_and_is_no_decoder_alone(run: Path) -> None:
    model = Oriole(run)
    assert isinstance(model.model, Seq2Seq) and model.can_chat
    answer = model.generate("3?", temperature=0.0, max_new_tokens=12)
    pieces = [text for text, _ in model.stream_generate("3?", temperature=0.0, max_new_tokens=12)]
    assert pieces[-1] == answer
    assert model.batch_generate(["3?", "41?"], temperature=0.0, max_new_tokens=12)[0] == answer
    with pytest.raises(ModelError, match="holds an encoder-decoder, and here a decoder-only model is needed"):
        load_model(run / "seq2seq" / "model")
    seen = describe(model, "3?", InsideConfig(answer=12))
    said = [token["id"] for token in seen["tokens"][seen["written"] :]]
    assert model.tokenizer.decode([i for i in said if i not in model.stop_ids]) == answer


def test_training_goes_on_from_its_own_folder_and_refuses_others(run: Path, data: Path, tmp_path: Path) -> None:
    parent = run / "seq2seq" / "model"
    tokenizer = Tokenizer.load(parent)
    task = seq2seq.build(recipe(data, tmp_path, init=str(parent)), tokenizer, parent)
    for name, tensor in load_file(parent / "model.safetensors").items():
        assert torch.equal(tensor, task.lm.get_parameter(name).detach())
    with pytest.raises(ModelError, match="no model folder at"):
        seq2seq.build(recipe(data, tmp_path, init="nowhere"), tokenizer, Path("nowhere"))


def test_epochs_are_passes_over_the_documents(data: Path, tmp_path: Path) -> None:
    made = recipe(data, tmp_path, train={"tokens": None, "epochs": 3.0})
    tokenizer = toy_tokenizer(data, tmp_path)
    task = seq2seq.build(made, tokenizer, None)
    packed = task.data
    assert isinstance(packed, Seq2SeqPacker)
    for _ in range(task.steps * 2):
        next(packed)
    walked = packed.stream.mixture.epochs()
    sizes = {"chat": 80, "en": len(Pieces(seq2seq.make_shards(made, tokenizer)[0]["en"], 24))}
    documents = sum(walked[name] * size for name, size in sizes.items())
    assert documents / sum(sizes.values()) == pytest.approx(3.0, rel=0.1)


def toy_tokenizer(data: Path, run: Path) -> Tokenizer:
    return seq2seq_tokenizer(recipe(data, run))


def seq2seq_tokenizer(made: Recipe) -> Tokenizer:
    from oriole.train.prepare import make_tokenizer

    return make_tokenizer(made, None)


# --- TFChat ----------------------------------------------------------------------------------------------------------


def test_a_recipe_like_tfchat_learns_its_file_character_by_character(tmp_path: Path) -> None:
    """TFChat padded replies with up to 255 unknown characters, could not ask a Chinese question, and saved pickles."""
    rows = [{"instruction": f"第{i}个问题 ABC", "output": [f"答案是{i}。"]} for i in "零一二三四五六七八九"] * 4
    (tmp_path / "data_zh.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    classic = {"norm": "layer", "norm_at": "post", "positions": "sinusoid", "activation": "relu", "biases": True,
               "qk_norm": False, "norm_eps": 1e-5}  # fmt: skip
    made = recipe(
        tmp_path, tmp_path / "run", model=SHAPE | classic,
        parts={"qa": {"format": "question", "files": ["data_zh.json"], "val": ["data_zh.json"]}},
        tokenizer={"kind": "char", "vocab_size": 2000},
        train={"tokens": 2 * 48 * 250, "accumulate": 1, "dropout": 0.0, "schedule": "noam", "warmup": 40, "lr": 6e-3,
               "beta2": 0.98, "weight_decay": 0.0}, checkpoint={"every": 0}, eval={"every": 1000},
    )  # fmt: skip
    run_stage(made)
    model = Oriole(tmp_path / "run")
    assert model.tokenizer.kind == "char" and model.model.config.source == "question"  # type: ignore[union-attr]
    assert model.prompt([Message("user", "第三个问题 ABC")], model_options()) == model.tokenizer.encode(
        "第三个问题 ABC"
    )
    said = model.batch_generate([row["instruction"] for row in rows[:10]], temperature=0.0, max_new_tokens=20)
    assert said == [row["output"][0] for row in rows[:10]]
    assert not list((tmp_path / "run").rglob("*.pt*"))


def model_options() -> Any:
    from oriole.apps.api import Generation

    return Generation()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model": "clasic"}, "no encoder-decoder preset 'clasic'; did you mean 'classic'"),
        ({"model": SHAPE | {"layers": 2}}, "unknown key 'layers'"),
        ({"lora": {"rank": 4}}, "lora.* is for decoder-only models"),
        ({"train": {"tokens": 10, "dropout_depth": "linear"}}, "has train.dropout alone"),
        ({"train": {"tokens": 10, "head_dropout": 0.1}}, "has train.dropout alone"),
        ({"parts": {"x": {"format": "preference", "files": ["x"]}}}, "preference pairs"),
        (
            {"parts": {"x": {"files": ["x"]}, "y": {"files": ["y"], "format": "question"}}},
            "one format, chat or question",
        ),
        ({"stage": "sft", "parts": {"x": {"files": ["x"], "format": "question"}}, "model": "demo"}, "format question"),
        ({"stage": "sft", "parts": {"x": {"files": ["x"]}}, "model": {"kind": "seq2seq"}}, "model"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(tables: dict[str, Any], message: str) -> None:
    table = {"stage": "seq2seq", "parts": {"x": {"files": ["x"]}}, "train": {"tokens": 10}} | tables
    with pytest.raises(ConfigError, match=message):
        validate(Recipe, table, "toy")


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rope", "relative", "sinusoid"])
def test_answers_do_not_depend_on_who_runs_beside_them_and_are_those_without_a_cache(positions: str) -> None:
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig.model_validate(SHAPE | {"positions": positions, "init_std": 0.3})).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(16, 400, (n,), generator=generator).tolist() for n in (3, 30, 7, 12, 21)]
    sampling = [Sampling(max_new_tokens=n, temperature=0.0, stop_ids=(2,)) for n in (20, 5, 9, 30, 12)]
    engine = Engine(model, max_batch=2)
    together = engine.run(list(zip(prompts, sampling, strict=True)))
    for prompt, how, answer in zip(prompts, sampling, together, strict=True):
        written = [START]
        while len(written) <= how.max_new_tokens and written[-1] != 2:
            with torch.no_grad():
                h = model(torch.tensor([written]), source=torch.tensor([prompt])).h[:, -1]
            written.append(int(model.head("logits", h).argmax()))
        assert [token for token in written[1:] if token != 2] == answer
        assert Engine(model).run([(prompt, how)]) == [answer]


def test_a_longer_request_that_joins_leaves_the_running_one_as_it_is() -> None:
    """The engine moves to a larger cache then: of what is written, and of the sources."""
    torch.manual_seed(0)
    model = Seq2Seq(Seq2SeqConfig.model_validate(SHAPE | {"context": 256, "init_std": 0.3})).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(16, 400, (n,), generator=generator).tolist() for n in (9, 150)]
    how = Sampling(max_new_tokens=30, temperature=0.0, stop_ids=())
    alone = [Engine(model).run([(prompt, how)])[0] for prompt in prompts]
    engine, answers = Engine(model, max_batch=2), dict[int, list[int]]()
    first = engine.submit(prompts[0], how)
    for _ in range(4):
        for event in engine.step():
            answers.setdefault(event.request, []).append(event.token)
    second = engine.submit(prompts[1], how)
    while engine:
        for event in engine.step():
            answers.setdefault(event.request, []).append(event.token)
    assert [answers[first], answers[second]] == alone
