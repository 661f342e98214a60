import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.models import build_model
from distmoe.moe.sums import no_reduction
from distmoe.training.optim import split_by_decay
from distmoe.training.step import train_step
from tests.unit.training.little import (
    ADAMW,
    MIXTURE,
    SPARSE,
    SPEC,
    batch,
    mixtures_of,
    run_config,
    step_of,
    trainer,
)

PLAIN_SGD = {"name": "sgd", "lr": 1.0, "momentum": 0.0}  # one step moves the weights by minus the gradient


def auxiliary_by_formula(routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Load balance E sum f P and z mean (log sum exp)^2 of one routing."""
    counts = torch.tensor([routing.expert_ids_A.tolist().count(e) for e in range(routing.num_experts)])
    balance = routing.num_experts * (counts / counts.sum() * routing.logits_TE.softmax(-1).mean(0)).sum()
    return balance, routing.logits_TE.exp().sum(-1).log().square().mean()


def objective(config, model, start, count, step=0):
    """Cross-entropy and weighted auxiliary losses of one micro-batch, written out."""
    data = batch(start, count)
    output = model(data.images, Context(config.seed, step, data.sample_ids, training=True))
    smoothing = config.train.label_smoothing
    cross_entropy = F.cross_entropy(output.logits, data.labels, label_smoothing=smoothing, reduction="sum")
    balance, z = auxiliary_by_formula(output.routings["ffns.1"])
    return cross_entropy, 0.5 * balance + 0.25 * z


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_equal_a_plain_loop_of_torch(clip_norm):
    config = run_config(
        schedule={"name": "linear", "warmup_share": 0.5}, train={"clip_norm": clip_norm, "label_smoothing": 0.1}
    )
    model = build_model(config, SPEC)
    decayed, rest = split_by_decay(model)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    norms, losses = [], []
    for step, lr in enumerate([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.2 / 3]):  # 3 of 6 steps warm up, then 1, 2/3, 1/3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        cross_entropy, auxiliary = objective(config, model, 8 * step, 8, step)
        (cross_entropy / 8 + auxiliary).backward()
        losses.append(float(cross_entropy.detach()))
        norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    assert min(norms) > 0.5  # so that clipping acts

    with trainer(config) as ours:
        results = ours.train(range(5))
        # float32: the loss is scaled in another order. Five steps amplify it little.
        for name, value in model.state_dict().items():
            torch.testing.assert_close(
                ours.weights()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert [float(result.gradient_norm) for result in results] == pytest.approx(norms, rel=1e-4)
        assert [float(result.sums["loss"]) for result in results] == pytest.approx(losses, rel=1e-4)
        assert all(parameter.grad is None for parameter in ours.module.parameters())


@pytest.mark.parametrize("counts", [(4, 4), (5, 3), (1, 2, 5), (8, 0)])
@pytest.mark.parametrize("optim", [PLAIN_SGD, ADAMW])
def test_micro_batches_of_any_sizes_are_one_step(counts, optim):
    config = run_config(MIXTURE, optim=optim, train={"clip_norm": 0.5})
    with trainer(config) as whole:
        expected = whole.train(range(2))
        with trainer(config) as cut:
            results = cut.train(range(2), *counts)
            for name, value in whole.weights().items():
                # float32 sums in another order; AdamW divides by the gradient's size, which enlarges that.
                torch.testing.assert_close(cut.weights()[name], value, rtol=1e-3, atol=2e-5)
            for one, other in zip(results, expected, strict=True):
                assert float(one.gradient_norm) == pytest.approx(float(other.gradient_norm), rel=1e-4)
                for name in ("loss", "correct", "samples"):
                    assert float(one.sums[name]) == pytest.approx(float(other.sums[name]), rel=1e-5)


def test_auxiliary_losses_enter_with_weight_and_share():
    config = run_config(optim=PLAIN_SGD)
    model = build_model(config, SPEC)
    total, balances = torch.zeros(()), 0.0
    for start, count in ((0, 5), (5, 3)):
        cross_entropy, auxiliary = objective(config, model, start, count)
        total = total + cross_entropy / 8 + auxiliary * count / 8
    total.backward()
    with trainer(config) as ours:
        before = ours.weights()
        (result,) = ours.train(range(1), 5, 3)
        after = ours.weights()
    lr = 1.0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - lr * parameter.grad, after[name], rtol=1e-4, atol=1e-5)
    again = build_model(config, SPEC)
    for start, count in ((0, 5), (5, 3)):
        data = batch(start, count)
        routing = again(data.images, Context(0, 0, data.sample_ids, training=True)).routings["ffns.1"]
        balances += float(auxiliary_by_formula(routing.detach())[0]) * count / 8
    # Reported unweighted.
    assert float(result.auxiliary["load_balance"]) == pytest.approx(balances, rel=1e-5)


@dataclass
class TwoRanks:
    """An engine that says it is one of two and keeps what it is given."""

    world_size: int = 2
    reducer: object = no_reduction
    losses: list[float] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)

    @contextmanager
    def micro_batch(self, last):
        self.last.append(last)
        yield

    def backward(self, loss):
        self.losses.append(float(loss.detach()))

    def step(self):
        return torch.tensor(0.0)


def test_a_rank_scales_its_samples_by_the_world_and_the_balance_losses_not():
    config = run_config()
    engine = TwoRanks()
    model = build_model(config, SPEC)
    # This rank has 3 and 2 of the step's 10 samples; over both ranks its micro-batches hold 6 and 4.
    micro_batches = [
        copy.copy(type(one)(one.batch, 10, micro_samples, one.last))
        for one, micro_samples in zip(step_of(0, 3, 2), (6, 4), strict=True)
    ]
    train_step(engine, model, mixtures_of(config, model), config, 0, micro_batches)
    twin = build_model(config, SPEC)
    expected = []
    for start, count, share in ((0, 3, 0.6), (3, 2, 0.4)):
        cross_entropy, auxiliary = objective(config, twin, start, count)
        expected.append(float((2 * cross_entropy / 10 + share * auxiliary).detach()))
    assert engine.losses == pytest.approx(expected, rel=1e-5)
    assert engine.last == [False, True]


def test_the_result_counts_samples_and_keeps_the_last_routing():
    with trainer(run_config()) as ours:
        before = copy.deepcopy(ours.module)
        (result,) = ours.train(range(1), 5, 3)
        outputs = [
            before(data.images, Context(0, 0, data.sample_ids, training=True)) for data in (batch(0, 5), batch(5, 3))
        ]
    labels = [batch(0, 5).labels, batch(5, 3).labels]
    correct = sum(int((out.scores.argmax(-1) == own).sum()) for out, own in zip(outputs, labels, strict=True))
    assert (float(result.sums["correct"]), float(result.sums["samples"]), result.step_samples) == (correct, 8.0, 8)
    assert torch.equal(result.routings["ffns.1"].expert_ids_A, outputs[1].routings["ffns.1"].expert_ids_A)
    assert not result.routings["ffns.1"].logits_TE.requires_grad


def test_a_loss_that_is_not_finite_shows_in_the_health():
    with trainer(run_config()) as ours:
        (good,) = ours.train(range(1))
        assert math.isfinite(float(good.health))
        with torch.no_grad():
            ours.module.head.weight.fill_(float("nan"))
        (bad,) = ours.train(range(1, 2))
        assert math.isnan(float(bad.health))


def test_bfloat16_runs_the_network_in_half_precision_and_keeps_weights_and_gate_in_float32():
    data, losses = batch(0, 8), []
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with trainer(run_config(train={"precision": precision})) as ours:
            output = ours.model(data.images, Context(0, 0, data.sample_ids, training=False))
            assert output.logits.dtype == dtype
            assert output.routings["ffns.1"].logits_TE.dtype == torch.float32
            assert {parameter.dtype for parameter in ours.module.parameters()} == {torch.float32}
            losses.append(float(ours.train(range(1))[0].sums["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # bfloat16 keeps 8 bits
    assert losses[0] != losses[1]


def test_the_weights_of_the_losses_come_from_the_config():
    off = {**SPARSE, "moe": {"num_experts": 3}}
    with trainer(run_config(off)) as ours:
        (result,) = ours.train(range(1))
        assert result.auxiliary == {}


SIGMOID = {**SPARSE, "moe": {"num_experts": 3, "gate": {"name": "sigmoid", "k": 2, "bias_rate": 0.25}}}
TOTALS = {**MIXTURE, "moe": {"num_experts": 3, "gate": {"name": "dense", "margin": 0.125, "constraint_steps": 2}}}


def routings_before(config, model, step, *counts):
    """Of each micro-batch of a step, by a copy of the model as it was before the step."""
    routings, start = [], 8 * step
    for count in counts:
        data = batch(start, count)
        output = copy.deepcopy(model)(data.images, Context(config.seed, step, data.sample_ids, training=True))
        routings.extend(output.routings.values())
        start += count
    return routings


def test_a_bias_moves_once_a_step_by_the_load_of_all_micro_batches():
    config = run_config(SIGMOID)
    with trainer(config) as ours:
        bias = ours.module.gates()["ffns.1"].balancer.bias_E
        for step in range(4):
            before = bias.tolist()
            loads = [one.rows_per_expert() for one in routings_before(config, ours.module, step, 1, 4, 3)]
            ours.train(range(step, step + 1), 1, 4, 3)
            total = sum(loads)
            expected = 0.25 * torch.sign(total.double().mean() - total)
            assert bias.tolist() == [old + float(move) for old, move in zip(before, expected, strict=True)]
    # Three updates in the last step would have ended elsewhere.
    assert sum(torch.sign(load.double().mean() - load) for load in loads).tolist() != expected.div(0.25).tolist()


def test_running_totals_grow_once_a_step_by_the_weights_of_all_micro_batches():
    config = run_config(TOTALS)
    with trainer(config) as ours:
        totals = ours.module.gates()["mixture"].balancer.totals_E
        expected = torch.zeros(3, dtype=torch.float64)
        excluded = []
        for step in range(3):
            routings = routings_before(config, ours.module, step, 5, 3)
            excluded.append([bool((one.probs_TE == 0).all(0).any()) for one in routings])
            expected += sum(one.probs_TE.double().sum(0) for one in routings).detach()
            ours.train(range(step, step + 1), 5, 3)
            torch.testing.assert_close(totals, expected, rtol=1e-6, atol=1e-6)
    # Nobody is ahead at first; then somebody is, in both micro-batches alike; then the constraint is lifted.
    assert excluded == [[False, False], [True, True], [False, False]]


def test_balancers_get_the_sums_of_all_ranks_after_the_optimizer():
    config = run_config(TOTALS)
    model = build_model(config, SPEC)
    events = []

    class Doubled(type(no_reduction)):
        def __call__(self, sums):
            events.append(sorted(sums))
            return {name: 2 * value for name, value in sums.items()}

    class Recorded(TwoRanks):
        def step(self):
            events.append("step")
            return super().step()

    (first, second) = routings_before(config, model, 0, 5, 3)
    engine = Recorded(reducer=Doubled())
    train_step(engine, model, mixtures_of(config, model), config, 0, step_of(0, 5, 3))
    assert events == ["step", ["mixture weights_E"]]
    expected = 2 * (first.probs_TE.double().sum(0) + second.probs_TE.double().sum(0))
    torch.testing.assert_close(model.gate.balancer.totals_E, expected.detach(), rtol=1e-6, atol=1e-6)


def test_the_objective_of_a_mixture_is_what_is_minimised():
    config = run_config({**MIXTURE, "moe": {**MIXTURE["moe"], "objective": "competitive"}}, optim=PLAIN_SGD)
    model = build_model(config, SPEC)
    data = batch(0, 8)
    x = model.normalize(data.images)
    probs = torch.stack([expert(x).softmax(-1) for expert in model.experts.modules_by_id.values()], dim=1)
    errors = (F.one_hot(data.labels, 4)[:, None] - probs).square().sum(-1)
    loss = (model.gate.network(x).softmax(-1) * errors).sum()
    (loss / 8).backward()
    with trainer(config) as ours:
        before = ours.weights()
        (result,) = ours.train(range(1))
        assert float(result.sums["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(before[name] - parameter.grad, ours.weights()[name], rtol=1e-4, atol=1e-5)


def test_losses_that_compare_samples_see_the_images_as_they_are_fed():
    weights = {"similarity_within": 0.5}
    config = run_config({**MIXTURE, "moe": {**MIXTURE["moe"], "loss_weights": weights}})
    with trainer(config) as ours:
        (routing,) = routings_before(config, ours.module, 0, 8)
        (result,) = ours.train(range(1))
    images, probs = batch(0, 8).images.flatten(1).double() / 255, routing.probs_TE.detach().double()
    expected = 0.0
    for one in range(8):
        for other in range(8):
            expected += float((images[one] - images[other]).square().sum() * (probs[one] @ probs[other])) / 3 / 56
    assert float(result.auxiliary["similarity_within"]) == pytest.approx(expected, rel=1e-5)
