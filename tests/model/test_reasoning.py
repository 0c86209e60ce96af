"""The latent block: one iteration is a plain block, a token halts on its own, a cache changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oriole.config import apply_overrides, validate
from oriole.errors import ConfigError, ModelError
from oriole.model.attention import Backend
from oriole.model.config import LoraConfig, ModelConfig, ReasoningConfig, preset
from oriole.model.costs import flops_per_token, kv_cache_bytes, training_memory
from oriole.model.deepconfig import DeepConfig
from oriole.model.folder import load_model, save_model, to_hf
from oriole.model.lm import LM, Cache
from oriole.model.lora import attach, merge
from oriole.model.reasoning import Context, Pondering
from oriole.train.batch import Batch
from oriole.train.groups import groups_of
from oriole.train.objectives import LMObjective

FULL = {"steps": 3, "layers": 2, "cross": True, "step_embedding": True}


def tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(3))


def context(b: int, s: int, dim: int = 48) -> Context:
    return Context(
        torch.randn(b, s, dim, generator=torch.Generator().manual_seed(5)), torch.ones(b, s, dtype=torch.bool)
    )


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture
def thinker(make: Callable[..., LM]) -> LM:
    return make(reasoning={"steps": 4, "layers": 2})


def median(model: LM, x: torch.Tensor) -> float:
    """A threshold at which tokens halt at different steps."""
    return float(torch.stack([model.head("confidence", h) for h in model(x).mid]).detach().sigmoid().median())


def test_one_iteration_is_a_plain_model_with_more_blocks(make: Callable[..., LM]) -> None:
    thinker, plain = make(reasoning={"steps": 1, "layers": 2}), make(num_layers=4)
    mine = thinker.state_dict()
    for name in plain.state_dict():
        if not name.startswith(("blocks.2.", "blocks.3.")):
            plain.get_parameter(name).data.copy_(mine[name])
            continue
        own = f"reasoning.layers.{int(name[7]) - 2}{name[8:]}"
        parts = [own.replace("qkv", "query"), own.replace("qkv", "kv")] if "qkv" in name else [own]
        plain.get_parameter(name).data.copy_(torch.cat([mine[part] for part in parts]))
    x = tokens(2, 11)
    assert torch.equal(thinker(x).h, plain(x).h)


@torch.no_grad()
def test_iterations_are_those_of_the_formula(make: Callable[..., LM]) -> None:
    """Of a single token, whose attention gives its value whatever it asks: that of the first iteration."""
    model = make(reasoning={"steps": 3, "layers": 1, "step_embedding": True})
    r, ends = model.reasoning, []
    assert r is not None and r.step_embedding is not None
    layer = r.layers[0]
    model.blocks[-1].register_forward_hook(lambda _, __, out: ends.append(out[0][0, 0]))
    x = tokens(1, 1)
    every, longer = model(x).mid, model(x, pondering=Pondering(5)).h
    e = state = ends[0]
    value = None
    for i in range(5):
        s = e + torch.sigmoid(r.keep) * (state - e) + r.step_embedding.weight[min(i, 2)]
        if value is None:
            value = layer.attention.kv(layer.attention_norm(s))[32:].view(2, 16).repeat_interleave(2, 0).flatten()
        s = s + layer.attention.out(value)
        state = s + layer.mlp(layer.mlp_norm(s))
        if i < 3:
            near(every[i][0, 0], model.norm(state))
    near(longer[0, 0], model.norm(state))


def test_without_the_block_the_model_is_the_plain_one() -> None:
    config = preset("demo").model_copy(update={"num_layers": 1, "vocab_size": 50})
    torch.manual_seed(0)
    plain = LM(config)
    assert plain.reasoning is None and not config.options
    assert plain(tokens(1, 4) % 50).thought is None and plain(tokens(1, 4) % 50).mid == ()
    torch.manual_seed(0)
    thinking = LM(config.model_copy(update={"reasoning": ReasoningConfig()}))
    assert thinking.reasoning is not None
    assert {n for n, _ in thinking.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        f"reasoning.{n}" for n, _ in thinking.reasoning.named_parameters()
    }


def test_every_iteration_and_gradient_equals_the_eager_reference(make: Callable[..., LM]) -> None:
    model = make(num_layers=1, context=260, reasoning=FULL | {"layers": 1, "steps": 2})
    x, beside = tokens(1, 258), context(1, 5)  # long enough for blocks of queries
    doc = torch.tensor([[0] * 100 + [1] * 158])
    results = []
    backends: tuple[Backend, ...] = ("eager", "sdpa", "grouped")
    for model.backend in backends:
        model.zero_grad()
        mid = model(x, doc, context=beside).mid
        torch.stack(mid).square().sum().backward()
        named = model.reasoning.named_parameters()  # type: ignore[union-attr]
        results.append((mid, {name: p.grad.clone() for name, p in named if p.grad is not None}))
    (every, gradients), *others = results
    names = {name for name, _ in model.reasoning.named_parameters()}  # type: ignore[union-attr]
    assert gradients.keys() == {name for name in names if "confidence" not in name}
    for mid, other in others:
        for one, reference in zip(mid, every, strict=True):
            near(one, reference)
        for name, reference in gradients.items():
            torch.testing.assert_close(other[name], reference, atol=1e-2, rtol=1e-3, msg=name)


def test_cached_equals_uncached_while_tokens_halt_by_themselves(thinker: LM) -> None:
    long, short = tokens(1, 14), tokens(1, 9) + 1
    pondering = Pondering(6, median(thinker, long))
    with torch.inference_mode():
        whole = thinker(long, pondering=pondering), thinker(short % 97, pondering=pondering)
        assert whole[0].thought is not None and len(whole[0].thought.steps.unique()) > 2
        cache = Cache(thinker.config, 2, 16)
        prompts = torch.zeros(2, 10, dtype=torch.long)
        prompts[0], prompts[1, :5] = long[0, :10], short[0, :5] % 97
        doc = torch.zeros(2, 10, dtype=torch.int)
        doc[1, 5:] = -1
        first = thinker(prompts, doc, cache=cache, pondering=pondering._replace(at=torch.tensor([9, 4])))
        assert first.thought is not None and whole[1].thought is not None
        for row, at in ((0, 9), (1, 4)):
            near(first.h[row, at], whole[row].h[0, at])
            assert first.thought.steps[row, at] == whole[row].thought.steps[0, at]
        assert first.thought.steps.sum() == first.thought.steps[0, 9] + first.thought.steps[1, 4] + 18  # others: one
        for i in range(4):
            step = thinker(
                torch.stack([long[0, 10 + i :][:1], short[0, 5 + i :][:1] % 97]), cache=cache, pondering=pondering
            )
            assert step.thought is not None
            for row, at in ((0, 10 + i), (1, 5 + i)):
                near(step.h[row, 0], whole[row].h[0, at])
                assert step.thought.steps[row, 0] == whole[row].thought.steps[0, at]
                near(step.thought.confidence[row, 0], whole[row].thought.confidence[0, at])


def test_a_token_halts_at_the_first_step_that_is_sure_enough(thinker: LM) -> None:
    x = tokens(2, 12)
    every = thinker(x).mid
    sure = torch.stack([thinker.head("confidence", h).sigmoid() for h in every])  # (n, B, T)
    threshold = median(thinker, x)
    out = thinker(x, pondering=Pondering(4, threshold))
    assert out.thought is not None
    for row in range(2):
        for at in range(12):
            above = (sure[:, row, at] > threshold).nonzero()
            step = int(above[0]) if len(above) else 3
            assert out.thought.steps[row, at] == step + 1
            near(out.h[row, at], every[step][row, at])
            near(out.thought.confidence[row, at], sure[step, row, at])
    never = thinker(x, pondering=Pondering(4)).h
    near(never, every[-1])
    assert thinker(x, pondering=Pondering(9)).thought.steps.unique().tolist() == [9]  # type: ignore[union-attr]


def test_documents_and_padding_are_worlds_of_their_own(thinker: LM) -> None:
    a, b = tokens(1, 7), tokens(1, 5) + 1
    doc, pos = torch.tensor([[0] * 7 + [1] * 5 + [-1] * 2]), torch.tensor([[*range(7), *range(5), 0, 1]])
    packed = thinker(torch.cat([a, b, a[:, :2]], 1), doc, pos)
    for n, h in enumerate(packed.mid):
        near(h[:, :7], thinker(a).mid[n])
        near(h[:, 7:12], thinker(b).mid[n])
    left = thinker(
        torch.cat([b[:, :3], b], 1), torch.tensor([[-1] * 3 + [0] * 5]), torch.tensor([[0, 1, 2, *range(5)]])
    )
    near(left.h[:, 3:], thinker(b).h)
    assert left.h.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_a_context_is_seen_whole_and_only_where_it_is_given(make: Callable[..., LM], backend: Backend) -> None:
    model = make(reasoning=FULL)
    model.backend = backend
    x, beside = tokens(2, 6), context(2, 9)
    masked = Context(beside.h, torch.tensor([[True] * 9, [True] * 4 + [False] * 5]))
    out, plain = model(x, context=masked).h, model(x).h
    short = model(x[1:], context=Context(beside.h[1:, :4], masked.mask[1:, :4])).h
    near(out[1:], short)
    assert not torch.allclose(out[:, 0], plain[:, 0], atol=1e-3)
    last = Context(beside.h.clone(), beside.mask)
    last.h[:, 8] += 1  # the first token looks at the last passage, too
    assert not torch.allclose(model(x, context=last).h[:, 0], model(x, context=beside).h[:, 0], atol=1e-4)
    none = model(x, context=Context(beside.h, torch.tensor([[True] * 9, [False] * 9]))).h
    near(none[1], plain[1])
    near(none[0], out[0])


def test_passages_are_read_by_themselves_and_each_row_has_its_own(make: Callable[..., LM]) -> None:
    model = make(reasoning=FULL)
    a, b, c = ([int(i) for i in tokens(1, n)[0]] for n in (3, 5, 4))
    made = model.context_of([[a, b], [], [c]])
    assert made.mask.tolist() == [[True] * 8, [False] * 8, [True] * 4 + [False] * 4]
    for row, at, ids in ((0, slice(0, 3), a), (0, slice(3, 8), b), (2, slice(0, 4), c)):
        near(made.h[row, at], model(torch.tensor([ids])).h[0])
    x = tokens(3, 6)
    near(model(x, context=made).h[1], model(x[1:2]).h[0])
    with pytest.raises(ModelError, match="129 tokens exceed the model's context of 128"):
        model.context_of([[a, [5] * 129]])
    with pytest.raises(ModelError, match="a context of 3 rows beside 2 rows of tokens"):
        model(x[:2], context=made)


@pytest.mark.parametrize("most", [64, 4])
def test_a_cache_and_pieces_of_a_prompt_change_nothing_of_what_is_seen_beside(
    make: Callable[..., LM], most: int
) -> None:
    model, x = make(reasoning=FULL), tokens(2, 10)
    beside = context(2, 5)._replace(mask=torch.tensor([[True] * 5, [True] * 2 + [False] * 3]))
    pondering = Pondering(5, 0.5)
    with torch.inference_mode():
        whole, cache = model(x, context=beside, pondering=pondering), Cache(model.config, 2, 16)
        lengths = torch.tensor([9, 9])
        out = model.prefill(x[:, :9], lengths, cache, most=most, pondering=pondering, context=beside)
        near(out.h[:, 0], whole.h[:, 8])
        near(model(x[:, 9:], cache=cache, context=beside, pondering=pondering).h[:, 0], whole.h[:, 9])


def test_the_state_stays_bounded_however_long_it_goes_on(thinker: LM) -> None:
    states: list[float] = []
    thinker.norm.register_forward_hook(lambda _, args, __: states.append(float(args[0].detach().norm())))
    thinker(tokens(1, 8), pondering=Pondering(60))
    assert len(states) == 60 and max(states) < 8 * states[0]


def test_gradients_reach_every_parameter_in_training(make: Callable[..., LM]) -> None:
    model = make(reasoning={"steps": 3, "layers": 2, "step_embedding": True})
    x = tokens(2, 9)
    doc = torch.zeros(2, 9, dtype=torch.int32)
    batch = Batch(x, x.roll(-1, 1), doc, torch.arange(9).expand(2, 9))
    loss = LMObjective()(model, batch)
    loss.sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    reads = [
        torch.nn.functional.cross_entropy(
            model.head("logits", h).flatten(0, 1), batch.targets.flatten(), reduction="sum"
        )
        for h in model(x, doc).mid
    ]
    near(loss.metrics["first_loss"], reads[0])
    near(loss.metrics["last_loss"], reads[2])
    doubts = []
    for h in model(x, doc).mid:
        right = (model.head("logits", h).argmax(-1) == batch.targets).float()
        odds = model.head("confidence", h)
        doubts.append(torch.nn.functional.binary_cross_entropy_with_logits(odds, right, reduction="sum"))
    near(loss.metrics["confidence_loss"], torch.stack(doubts).mean())
    near(loss.sum, sum(reads) / 3 + 0.1 * loss.metrics["confidence_loss"])


def test_recomputing_and_dropout_reach_the_block(thinker: LM) -> None:
    x, gradients = tokens(2, 10), []
    for thinker.recompute in (False, True):
        thinker.zero_grad()
        thinker(x).h.square().sum().backward()
        gradients.append(thinker.reasoning.layers[0].mlp.gate_up.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*gradients)
    plain = thinker(x)
    thinker.set_dropout(0.5)
    assert torch.equal(thinker(x).h, plain.h)
    for block in thinker.blocks:
        block.dropout = 0.0
    assert not torch.allclose(thinker.train()(x).mid[0], plain.mid[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch.compile's own imports
def test_a_training_step_is_one_graph(make: Callable[..., LM]) -> None:
    model = make(num_layers=1, reasoning={"steps": 2})
    x, doc = tokens(2, 16), torch.tensor([[0] * 7 + [1] * 9, [0] * 16])
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    near(compiled(x, doc).h, model(x, doc).h)


def test_a_folder_keeps_every_bit(make: Callable[..., LM], tmp_path: Path) -> None:
    model = make(reasoning=FULL)
    save_model(model, tmp_path, chat=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "oriole" and config["architectures"] == ["OrioleForCausalLM"]
    assert config["oriole"]["reasoning"]["layers"] == 2
    again = load_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert "model.reasoning.layers.1.cross_attention.kv.weight" in to_hf(model)
    config["oriole"]["reasoning"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="depth"):
        load_model(tmp_path)


@pytest.mark.parametrize("table", [{}, FULL, {"layers": 3, "cross": True}])
def test_the_figures_are_those_of_the_real_thing(make: Callable[..., LM], table: dict[str, object]) -> None:
    model = make(reasoning=table)
    c = model.config
    assert c.num_params() == sum(p.numel() for p in model.parameters())
    cache = Cache(c, 3, 7)
    assert kv_cache_bytes(c, 3, 7, 4) == sum(4 * t.numel() for t in (*cache.keys, *cache.values))


def test_flops_count_every_iteration_and_keys_once(make: Callable[..., LM]) -> None:
    """Against the matrix products that really run in a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make(reasoning={"steps": 3, "layers": 2})
    model.backend = "sdpa"
    with FlopCounterMode(display=False) as count, torch.no_grad():
        out = model(tokens(1, 64))
        for h in out.mid:
            model.head("logits", h)
    c = model.config
    # The counter knows no attention of a CPU: what is left are the products with weights.
    attention = 12 * c.num_heads * c.head_dim * 64 / 2 * (c.num_layers + 2 * 3)
    norms = 6 * sum(p.numel() for p in model.parameters() if p.dim() < 2) + 6 * c.dim  # and the confidence head
    assert 3 * count.get_total_flops() / 64 == flops_per_token(c, 64) - attention - norms


def test_memory_of_training_counts_every_iteration(make: Callable[..., LM]) -> None:
    one, four = (training_memory(make(reasoning={"steps": n}).config, 4, 64) for n in (1, 4))
    c = make().config
    assert four["logits"] - one["logits"] == 3 * (4 * c.vocab_size * c.dim + 4 * 64 * c.dim * 12)
    assert four["activations"] > one["activations"] and four["weights"] == one["weights"]


def test_the_optimizer_and_adapters_know_the_block(make: Callable[..., LM]) -> None:
    model = make(reasoning=FULL)
    assert model.fused_rows()["reasoning.layers.1.attention.kv.weight"] == (32, 32)
    assert "reasoning.layers.0.mlp.gate_up.weight" in model.fused_rows()
    plain = groups_of(model, muon=True).plain
    assert {"reasoning.step_embedding.weight", "reasoning.confidence_head.weight", "reasoning.keep"} <= set(plain)
    x = tokens(1, 6)
    before = model(x).h
    attach(model, LoraConfig(rank=2))
    assert torch.equal(model(x).h, before)
    assert all("blocks." in n for n, p in model.named_parameters() if p.requires_grad)
    merge(model)
    near(model(x).h, before)


def test_what_cannot_be_is_named(make: Callable[..., LM], thinker: LM) -> None:
    plain, x = make(), tokens(1, 3)
    with pytest.raises(ModelError, match="no latent block to reason with"):
        plain(x, pondering=Pondering(2))
    with pytest.raises(ModelError, match="no latent block to reason with"):
        plain.head("confidence", plain(x).h)
    with pytest.raises(ModelError, match=r"looks at no context beside the tokens; .* is trained in Python"):
        thinker(x, context=context(1, 2))
    for bad in ({"steps": 0}, {"threshold": 1.5}, {"layer": 1}):
        with pytest.raises(ConfigError, match=r"reasoning\."):
            validate(ModelConfig, {"preset": "demo", "reasoning": bad}, "here")


def test_it_is_not_supervised_twice(thinker: LM) -> None:
    with pytest.raises(ConfigError, match="supervises its iterations; leave out deep"):
        thinker.supervise(DeepConfig(depths=(1,)), 0)


def test_a_recipe_switches_it_on() -> None:
    table: dict[str, object] = {"model": "demo"}
    apply_overrides(table, {"model.reasoning.steps": 2})
    config = validate(ModelConfig, dict(table["model"]), "here")  # type: ignore[call-overload]
    assert config.reasoning == ReasoningConfig(steps=2)
