"""What `LM.supervise` adds: states for further losses, that see what they may see and are never saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oriole.config import validate
from oriole.errors import ConfigError
from oriole.model import lora
from oriole.model.config import LoraConfig, ModelConfig
from oriole.model.costs import flops_per_token, num_params, training_memory
from oriole.model.deep import Ahead
from oriole.model.deepconfig import DeepConfig
from oriole.model.folder import load_model, save_model
from oriole.model.layers import Sight
from oriole.model.lm import LM, Cache, Out

LAYERS = 3
SHAPE = ModelConfig(
    vocab_size=97, dim=48, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=80, context=64
)
BOTH = DeepConfig(depths=(1, 2), tokens_ahead=3)
DOCS = torch.tensor([[0] * 7 + [1] * 6 + [-1] * 2, [0] * 15])
POS = torch.tensor([[*range(7), *range(6), 0, 0], [*range(15)]])


def tokens(rows: int = 2, length: int = 15) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(3))


def plain(**changes: object) -> LM:
    """A model of three blocks, every weight far from where it starts."""
    torch.manual_seed(0)
    return shaken(LM(SHAPE.model_copy(update=changes)))


def supervised(**changes: object) -> LM:
    """The same with two depths and two further tokens."""
    model = plain(**changes)
    model.supervise(BOTH, seed=5)
    assert model.deep is not None
    shaken(model.deep)
    return model.eval()


def shaken(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return module.eval()


def mids(model: LM, x: Tensor, doc: Tensor | None = None, pos: Tensor | None = None) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        out: Out = model(x, doc, pos)
    return out.mid


def test_the_model_itself_stays_as_it_is_to_the_bit() -> None:
    without, model = plain(), plain()
    before = torch.get_rng_state()
    model.supervise(BOTH, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    own = {name: p for name, p in model.state_dict().items() if not name.startswith("deep.")}
    assert own.keys() == without.state_dict().keys()
    assert all(torch.equal(p, without.state_dict()[name]) for name, p in own.items())
    with torch.inference_mode():
        one, other = without(tokens(), DOCS, POS), model(tokens(), DOCS, POS)
    assert torch.equal(one.h, other.h) and one.mid == () and len(other.mid) == 4


def test_a_depth_is_the_model_cut_off_there_with_a_norm_of_its_own() -> None:
    model = supervised()
    states = mids(model, tokens(), DOCS, POS)
    for depth, state in zip(BOTH.depths, states, strict=False):
        short = LM(model.config.model_copy(update={"num_layers": depth})).eval()
        short.load_state_dict({k: v for k, v in model.state_dict().items() if k in short.state_dict()})
        short.norm.load_state_dict(model.deep.norms[depth - 1].state_dict())
        with torch.inference_mode():
            assert torch.equal(short(tokens(), DOCS, POS).h, state)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "grouped"])
def test_a_further_token_is_predicted_as_the_paper_says(backend: str) -> None:
    """DeepSeek-V3, equations 21 to 23, document by document and without a shift of the whole batch."""
    model = supervised()
    model.backend = backend  # type: ignore[assignment]
    x = tokens()
    states = mids(model, x, DOCS, POS)[2:]
    for row, number in ((0, 0), (0, 1), (1, 0)):
        columns = (DOCS[row] == number).nonzero().squeeze(-1)
        own = x[row, columns][None]
        length = own.shape[1]
        cos, sin = model.angles.cos[:length][None, :, None], model.angles.sin[:length][None, :, None]
        with torch.inference_mode():
            h = model.embedding(own)
            for block in model.blocks:
                h = block(h, Sight(cos, sin, None, "eager"))[0]
            for k, module in enumerate(model.deep.ahead, start=1):
                assert isinstance(module, Ahead)
                token = model.embedding(own[:, k:])
                h = torch.cat((module.state_norm(h[:, : length - k]), module.token_norm(token)), -1)
                h, _ = module.block(module.join(h), Sight(cos[:, : length - k], sin[:, : length - k], None, "eager"))
                got = states[k - 1][row, columns[: length - k]]
                torch.testing.assert_close(got, module.norm(h)[0], rtol=1e-4, atol=1e-4)


def test_a_further_token_sees_those_before_it_and_not_itself() -> None:
    model, x = supervised(), tokens(1)
    first = mids(model, x)
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % 97
    second = mids(model, changed)
    for ahead, (one, other) in enumerate(zip(first, second, strict=True)):
        k = max(0, ahead - 1)  # two depths, then the tokens after the next one
        same = (one == other).all(-1)[0]
        assert same[: 8 - k].all() and not same[8 - k]


def test_gradients_reach_everything_that_was_added() -> None:
    model = supervised().train()
    out = model(tokens(), DOCS, POS)
    torch.stack([state.square().sum() for state in out.mid]).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == ["norm.weight"]  # the last layer's, which has a loss of its own


def test_recomputed_and_traced_states_are_the_same() -> None:
    model = supervised().train()
    model.set_dropout(0.2)

    def gradients(call: object) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        torch.stack([state.sum() for state in call(tokens(), DOCS, POS).mid]).sum().backward()  # type: ignore[operator]
        return [p.grad.clone() for n, p in model.named_parameters() if n != "norm.weight"]

    kept = gradients(model)
    traced = gradients(torch.compile(model, backend="eager", fullgraph=True))
    model.recompute = True
    again = gradients(model)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(kept, again, traced, strict=True))


def test_nothing_is_added_to_what_generates_or_is_saved(tmp_path: Path) -> None:
    model = supervised()
    assert model(tokens(), cache=Cache(model.config, 2, 20)).mid == ()
    save_model(model, tmp_path / "model", chat=False)
    save_model(plain(), tmp_path / "plain", chat=False)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()
    assert load_model(tmp_path / "model").deep is None


def test_the_optimizer_knows_fused_matrices_and_dropout_reaches_the_modules() -> None:
    model = supervised()
    rows = model.fused_rows()
    fused = {n for n, _ in model.named_parameters() if n.endswith(("qkv.weight", "gate_up.weight"))}
    assert rows.keys() == fused and sum("deep.ahead" in name for name in fused) == 4
    assert all(sum(rows[name]) == len(model.get_parameter(name)) for name in fused)
    model.set_dropout(0.3)
    assert [module.block.dropout for module in model.deep.ahead] == [0.3, 0.3]


def test_with_adapters_what_was_added_trains_whole() -> None:
    model = supervised()
    lora.attach(model, LoraConfig(rank=2))
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in training if ".adapters." not in n} == {
        n for n, _ in model.named_parameters() if n.startswith("deep.")
    }
    assert all("blocks" in n for n in training if ".adapters." in n)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qk_norm": False}])
def test_parameters_are_counted(changes: dict[str, object]) -> None:
    model = supervised(**changes)
    assert num_params(model.config, BOTH) == sum(p.numel() for p in model.parameters())


def test_flops_are_those_of_the_matrices_that_a_token_meets() -> None:
    config, model, length = SHAPE, supervised(), 32
    inner = sum(p.numel() for p in model.deep.parameters())
    heads = 4 * config.vocab_size * config.dim  # of the model, four times more
    attention = 2 * 6 * config.num_heads * config.head_dim * length
    wanted = 6 * (inner + heads) + attention
    assert flops_per_token(config, length, BOTH) - flops_per_token(config, length) == pytest.approx(wanted)


def test_memory_grows_by_what_is_added() -> None:
    config = SHAPE
    plain, more = (training_memory(config, 4, 64, deep=deep, optimizer="muon") for deep in (None, BOTH))
    assert more.keys() == plain.keys()
    assert more["weights"] - plain["weights"] == 4 * BOTH.num_params(config)
    one_depth = training_memory(config, 4, 64, deep=DeepConfig(depths=(1,)), optimizer="muon")
    assert one_depth["activations"] == plain["activations"] < more["activations"]
    assert plain["logits"] < one_depth["logits"] < more["logits"]


def test_the_last_word_of_the_pattern_is_the_modules() -> None:
    config = SHAPE.model_copy(update={"pattern": "GL", "window": 4})
    model = LM(config.model_copy(update={"num_layers": 2}))
    model.supervise(DeepConfig(tokens_ahead=2), seed=0)
    one = DeepConfig(tokens_ahead=2)
    local, seeing = (flops_per_token(c, 64, one) - flops_per_token(c, 64) for c in (model.config, config))
    assert local < seeing  # of three, the last sees everything


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "nothing to supervise: give depths"),
        ({"depths": [0, 1]}, "a depth is a number of blocks, 1 or more"),
        ({"tokens_ahead": 0}, "tokens_ahead"),
        ({"depths": [1], "weight": 0}, "weight"),
    ],
)
def test_a_table_that_means_nothing_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DeepConfig, table, "[deep]")


def test_a_depth_beyond_the_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"deep\.depths has 3, but of the model's 3 blocks .*from 1 to 2"):
        LM(SHAPE).supervise(DeepConfig(depths=(3, 1)), seed=0)
    assert DeepConfig(depths=(3, 1, 3)).depths == (1, 3)
