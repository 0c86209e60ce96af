"""PPO: its loss equals a slow one, its figures are what they say, and a toy reward rises."""

from pathlib import Path

import pytest
import torch
from toy_rl import SHAPE, Toy, batches, trainer

from oriole.model.folder import save_model
from oriole.model.lm import LM
from oriole.train.groups import groups_of
from oriole.train.ppo import ActorCritic, PPOObjective, value_model
from oriole.train.tables import PPOTable


def test_the_loss_equals_one_written_out_token_by_token_in_fp64() -> None:
    toy = Toy("ppo", prompts=8, batch_size=8, temperature=0.8, clip=0.1, value_clip=0.05, value_coef=0.3)
    batch = next(toy.rollouts)
    model = toy.model.double()
    assert isinstance(model, ActorCritic)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    made = toy.objective(model, batch)
    total = policy_total = value_total = torch.zeros((), dtype=torch.float64)
    clipped = held = 0
    for row in range(len(batch.tokens)):
        for number in range(int(batch.doc[row].max()) + 1):
            here = batch.doc[row] == number
            ids, targets = batch.tokens[row][here][None], batch.targets[row][here]
            log_p = (model.policy.head("logits", model.policy(ids).h) / 0.8).log_softmax(-1)[0]
            values = model.value.head("value", model.value(ids).h)[0]
            extra = {name: column[row][here].double() for name, column in batch.extra.items()}
            for t, y in enumerate(targets.tolist()):
                if y < 0:
                    continue
                r = (log_p[t, y] - extra["old_log_probs"][t]).exp()
                a, v, old, ret = extra["advantages"][t], values[t], extra["old_values"][t], extra["returns"][t]
                policy_total = policy_total + torch.max(-r * a, -r.clamp(0.9, 1.1) * a)
                limited = old + (v - old).clamp(-0.05, 0.05)
                value_total = value_total + 0.5 * torch.max((v - ret) ** 2, (limited - ret) ** 2)
                clipped += int((r * a > r.clamp(0.9, 1.1) * a).item())
                held += int(((limited - ret) ** 2 > (v - ret) ** 2).item())
    total = policy_total + 0.3 * value_total
    assert float(made.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert float(made.metrics["loss/policy_avg"]) == pytest.approx(float(policy_total.detach()), rel=1e-6)
    assert float(made.metrics["loss/value_avg"]) == pytest.approx(float(value_total.detach()), rel=1e-6)
    assert made.metrics["policy/clipfrac_avg"] == clipped > 0 and made.metrics["val/clipfrac_avg"] == held > 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, slow = torch.autograd.grad(made.sum, parameters), torch.autograd.grad(total, parameters)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_figures_of_a_rollout_are_those_of_its_answers() -> None:
    toy = Toy("ppo", prompts=8, batch_size=8, kl_coef=0.5, missing_eos_penalty=0.25)
    with torch.no_grad():  # away from the reference
        toy.policy.norm.weight.mul_(1.2)
    next(toy.rollouts)
    rollout, gauges = toy.rollouts.rollout, toy.rollouts.gauges
    assert rollout is not None
    divergence = entropy = score = 0.0
    for question, one in zip(rollout.questions, rollout.written, strict=True):
        ids = torch.tensor([[*question.ids, *one.ids]])
        both = []
        for model in (toy.policy, toy.reference):
            with torch.no_grad():
                log_p = model.head("logits", model(ids).h).log_softmax(-1)[0, :-1]
            both.append(log_p.gather(-1, ids[0, 1:, None])[len(question.ids) - 1 :, 0])
        divergence += float((both[0] - both[1]).sum()) / 8
        entropy -= float(both[0].sum()) / 8
        text = toy.rollouts.tokenizer.decode([i for i in one.ids if i not in (0, 2)])
        letters = sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))
        score += (letters - 0.25 * (not one.ended)) / 8
    assert abs(divergence) > 1e-3
    assert gauges["objective/kl"] == pytest.approx(divergence, abs=1e-4)
    assert gauges["objective/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert gauges["objective/scores"] == pytest.approx(score, abs=1e-5)
    assert gauges["objective/non_score_reward"] == pytest.approx(-0.5 * divergence, abs=1e-4)
    assert gauges["objective/rlhf_reward"] == pytest.approx(score - 0.5 * divergence, abs=1e-4)
    assert gauges["val/num_eos_tokens"] == sum(one.ended for one in rollout.written)


def test_every_metric_has_trls_name() -> None:
    toy = Toy("ppo")
    batch = next(toy.rollouts)
    assert set(toy.objective(toy.model, batch).metrics) >= {
        "eps", "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg",
        "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "episode",
    }  # fmt: skip


def test_a_figure_of_the_rollout_is_that_figure_in_the_log(tmp_path: Path) -> None:
    toy = Toy("ppo", batch_size=2)
    made = trainer(toy, tmp_path, steps=1, accumulate=2)
    made.fit()
    (record,) = made.metrics.of("step")  # type: ignore[attr-defined]
    for name in ("objective/kl", "objective/scores", "completions/mean_length", "episode"):
        assert record[name] == pytest.approx(toy.rollouts.gauges[name], rel=1e-6, abs=1e-7)
    assert record["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert record["data_wait"] == 0.0  # a rollout is the device's own work


def test_answers_without_an_end_mark_cost_the_penalty() -> None:
    free, dear = Toy("ppo", new_tokens=3), Toy("ppo", new_tokens=3, missing_eos_penalty=2.0)
    next(free.rollouts), next(dear.rollouts)
    assert free.rollouts.rollout is not None and not free.rollouts.rollout.ended.any()
    assert dear.rollouts.gauges["objective/scores"] == pytest.approx(free.rollouts.gauges["objective/scores"] - 2.0)


def test_a_kl_limit_ends_the_rollout_after_the_step(tmp_path: Path) -> None:
    def episodes(**table: float) -> float:
        toy = Toy("ppo", epochs=4, prompts=8, **table)
        trainer(toy, tmp_path / str(table), steps=6).fit()
        return toy.rollouts.gauges["episode"]

    assert episodes() == 8  # eight steps of one rollout
    assert episodes(stop_kl=1e-12) == 24  # the first step of a rollout has ratio 1, the second has moved
    assert episodes(stop_kl=1e9) == 8


def test_the_coefficient_is_steered_to_the_target() -> None:
    toy = Toy("ppo", epochs=1, batch_size=4, kl_coef=0.1, kl_target=1e-6, kl_horizon=8.0)
    with torch.no_grad():
        toy.policy.norm.weight.mul_(1.5)
    seen = []
    for _ in range(3):
        batches(toy, 1)
        error = max(-0.2, min(0.2, toy.rollouts.gauges["objective/kl"] / 1e-6 - 1))
        seen.append((toy.rollouts.gauges["objective/kl_coef"], 1 + error * 4 / 8))
    assert seen[0][0] == pytest.approx(0.1)
    assert seen[1][0] == pytest.approx(seen[0][0] * seen[0][1]) != pytest.approx(0.1)
    assert seen[2][0] == pytest.approx(seen[1][0] * seen[1][1])


def test_policy_and_value_model_are_apart_and_every_parameter_has_one_optimizer() -> None:
    toy = Toy("ppo")
    model = toy.model
    assert isinstance(model, ActorCritic)
    assert not {id(p) for p in model.policy.parameters()} & {id(p) for p in model.value.parameters()}
    groups = groups_of(model, muon=True)
    names = dict(model.named_parameters())
    assert sorted((*groups.muon, *groups.decayed, *groups.plain)) == sorted(names)
    assert "value.scalar_heads.value.weight" in groups.plain and "policy.blocks.0.attention.qkv.weight" in groups.muon
    assert set(model.fused_rows()) <= set(groups.muon)
    toy.objective(model, next(toy.rollouts)).sum.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_value_model_starts_from_a_language_model_or_a_reward_model(tmp_path: Path, tied: bool) -> None:
    shape = SHAPE.model_copy(update={"tie_embeddings": tied})
    torch.manual_seed(3)
    plain, rewards = LM(shape), LM(shape, heads=("reward",))
    save_model(plain, tmp_path / "lm", chat=True)
    save_model(rewards, tmp_path / "rm", chat=True)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        value = value_model(tmp_path / "lm", rewards=False)
        torch.testing.assert_close(value(ids).h, plain(ids).h)
        assert not value.head("value", value(ids).h).any()
        value = value_model(tmp_path / "rm", rewards=True)
        torch.testing.assert_close(value.head("value", value(ids).h), rewards.head("reward", rewards(ids).h))


def test_a_policy_that_knows_the_value_has_no_advantage() -> None:
    """With one constant reward and a value model that predicts it, there is nothing to learn."""
    toy = Toy("ppo", score=lambda answers: [0.0] * len(answers), kl_coef=0.0)
    assert isinstance(toy.model, ActorCritic)
    with torch.no_grad():
        toy.model.value.scalar_heads["value"].get_parameter("weight").zero_()
    batch = next(toy.rollouts)
    assert not batch.extra["advantages"].any() and not batch.extra["returns"].any()
    assert float(PPOObjective(PPOTable(), 1.0, dict)(toy.model, batch).sum.detach()) == 0.0


def test_a_toy_reward_rises(tmp_path: Path) -> None:
    toy = Toy("ppo", prompts=32, batch_size=32, epochs=4, kl_coef=0.01)
    made = trainer(toy, tmp_path, steps=64, log_every=4, kind="adamw", lr=1e-2)
    made.fit()
    rewards = [r["objective/scores"] for r in made.metrics.of("step")]  # type: ignore[attr-defined]
    assert rewards[0] < 0.3 and rewards[-1] > 0.7
