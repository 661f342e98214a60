"""Runs that start from other runs, and runs evaluated with fewer experts: end to end through train and evaluate."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import distmoe.train as flow
from distmoe.config import load_config
from distmoe.contracts import UserError
from distmoe.evaluate import evaluate_run
from distmoe.models import build_model
from distmoe.training.checkpoint import Checkpoint, load_checkpoint
from distmoe.training.loading import load_model
from distmoe.training.run_folder import RunFolder
from tests.oracles import mlp_experts
from tests.runs import NUM_TEST, all_tensors, assert_same_run, last_checkpoint, last_state, tiny_config, write_quadrants

Run = Callable[..., RunFolder]
LAYER = "ffns.2.ffn"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


@pytest.fixture(scope="module")
def halves(data: Path) -> Path:
    """Another task on the same images: is the upper or the lower half the brighter one?"""
    with np.load(data) as arrays:
        labels = {name: arrays[name] // 2 for name in ("labels", "test_labels")}
        np.savez(data.with_name("halves.npz"), **{**arrays, **labels})
    return data.with_name("halves.npz")


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps take longer than the rest of a tiny run."""
    monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args, **kwargs: None)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    """Trains a tiny run with overrides and gives its folder."""

    def trained(name: str, *overrides: str) -> RunFolder:
        config = tiny_config(data, tmp_path, f"run.name={name}", *overrides)
        flow.train(config)
        return RunFolder.of(config)

    return trained


def held_out(data: Path) -> tuple[Tensor, Tensor]:
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["test_inputs"]).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(arrays["test_labels"])


# --- fewer experts


def favourites(name: str, gate: nn.Module, experts: nn.Module, x_TD: Tensor) -> Tensor:
    """(T,) the expert that each gate likes best, from its weights."""
    outputs = x_TD @ gate.network.weight.T
    if name == "attentive":
        query_Th = outputs @ gate.query.weight.T
        hidden = [x_TD @ w1 + b1 for w1, b1 in zip(experts.w1, experts.b1, strict=True)]
        return torch.stack([(query_Th * (one @ gate.key.weight.T)).sum(-1) for one in hidden]).argmax(0)
    logits_TE = outputs[:, :4]
    return (logits_TE.sigmoid() + gate.balancer.bias_E if name == "sigmoid" else logits_TE).argmax(-1)


GATES = {
    "dense": "{name: dense, margin: 3.0}",
    "topk": "{name: topk, k: 2}",
    "attentive": "{name: attentive, width: 4}",
    "sigmoid": "{name: sigmoid, k: 2, bias_rate: 0.1}",
    "noisy_topk": "{name: noisy_topk, k: 2}",
}


def accuracies(text: str) -> list[float]:
    """Of the test set, and of its classes, in what ``evaluate`` prints."""
    return [float(found) for found in re.findall(r"^(?:test accuracy|  \d) +(\d\.\d{4})", text, re.MULTILINE)]


def expected_accuracies(scores: Tensor, labels: Tensor) -> list[float]:
    correct = (scores.argmax(-1) == labels).double()
    return [float(correct.mean()), *(float(correct[labels == label].mean()) for label in range(4))]


@pytest.mark.parametrize("name", GATES)
def test_evaluation_with_one_expert_uses_the_favourite_of_each_token_alone(run: Run, data: Path, name: str):
    folder = run("run", f"moe.gate={GATES[name]}", "train.max_steps=4", "optim.lr=0.05", "train.select=last")
    model = load_model(folder.path)
    layer = model.network.get_submodule(LAYER)
    functions = mlp_experts(layer.experts.w1, layer.experts.b1, layer.experts.w2, layer.experts.b2, F.gelu)

    def one_expert(module: nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor, object]) -> object:
        x_TD = arguments[0].flatten(0, -2)
        chosen_T = favourites(name, module.gate, module.experts, x_TD)
        y_TD = torch.stack([functions[int(expert)](x) for expert, x in zip(chosen_T, x_TD, strict=True)])
        return y_TD.view_as(output[0]), output[1]

    images, labels = held_out(data)
    with torch.no_grad():
        as_trained = model(images).scores
        handle = layer.register_forward_hook(one_expert)
        expected = model(images).scores
        handle.remove()
        ours = load_model(folder.path, ["moe.gate.k=1"])(images)
    weights_A = ours.routings["ffns.2"].weights_A
    # An attentive gate gives the others the weight 0: they had to work before it could choose.
    assert weights_A[weights_A != 0].tolist() == pytest.approx([1.0] * (4 * NUM_TEST), abs=1e-6)
    torch.testing.assert_close(ours.scores, expected, rtol=1e-4, atol=1e-5)  # float32
    assert not torch.allclose(as_trained, expected, rtol=0.01, atol=1e-3)
    assert accuracies(evaluate_run(folder.path, ["moe.gate.k=1"])) == pytest.approx(
        expected_accuracies(expected, labels), abs=5e-5
    )
    assert accuracies(evaluate_run(folder.path, [])) == pytest.approx(expected_accuracies(as_trained, labels), abs=5e-5)


def test_bias_of_a_sigmoid_gate_has_a_part_in_the_choice(run: Run, data: Path):
    folder = run("run", f"moe.gate={GATES['sigmoid']}", "train.max_steps=4", "optim.lr=0.05", "train.select=last")
    model = load_model(folder.path, ["moe.gate.k=1"])
    images, _ = held_out(data)
    before = model(images).routings["ffns.2"].expert_ids_A
    bias_E = model.network.get_submodule(LAYER).gate.balancer.bias_E
    assert float(bias_E.abs().sum()) > 0.1
    bias_E.zero_()
    assert not torch.equal(model(images).routings["ffns.2"].expert_ids_A, before)


def test_mixture_of_class_probabilities_with_one_expert_is_that_expert(run: Run, data: Path):
    folder = run(
        "run",
        "model={name: tutorial, channels: [4, 4], hidden: 8, gate_channels: [4], gate_hidden: 8}",
        "moe={num_experts: 3, gate: {name: dense}}",
        "train.max_steps=4",
        "train.select=last",
    )
    images, labels = held_out(data)
    model = load_model(folder.path)
    with torch.no_grad():
        x = model.network.normalize(images)
        chosen = model.network.gate.network(x).argmax(-1)
        experts = list(model.network.experts.modules_by_id.values())
        scores = torch.stack([experts[int(one)](image.unsqueeze(0))[0] for one, image in zip(chosen, x, strict=True)])
        fewer = load_model(folder.path, ["moe.gate.k=1"]).predict(images)
        torch.testing.assert_close(fewer, scores.softmax(-1), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(model.predict(images), fewer, atol=1e-3)
    assert len(chosen.unique()) > 1
    text = evaluate_run(folder.path, ["moe.gate.k=1"])
    assert accuracies(text) == pytest.approx(expected_accuracies(scores, labels), abs=5e-5)


# --- starts from other runs


def weights(folder: RunFolder) -> dict[str, Tensor]:
    """Of the last checkpoint."""
    tensors = all_tensors(last_checkpoint(folder))
    return {name.removeprefix("weight "): value for name, value in tensors.items() if name.startswith("weight ")}


def test_upcycled_run_starts_as_the_dense_one(run: Run, data: Path):
    dense = run("dense", "moe=null", "train.max_steps=4", "optim.lr=0.05", "train.select=last")
    start = [f"model.init_from={dense.path}", "model.init_mode=upcycle", "train.max_steps=1"]
    still = run("still", *start, "model.upcycle_noise=0.0", "optim.lr=1e-9")
    trained = weights(dense)
    expected = {name: weight for name, weight in trained.items() if ".fc" not in name}
    for stack, name in {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}.items():
        weight = trained[f"{LAYER}.{name}"]
        expected[f"{LAYER}.experts.{stack}"] = torch.stack([weight.T if weight.dim() == 2 else weight] * 4)
    fresh = build_model(load_config(still.config_file), last_state(still).spec)
    expected[f"{LAYER}.gate.network.weight"] = fresh.get_parameter(f"{LAYER}.gate.network.weight").detach()
    # The one step of AdamW moves a weight by the learning rate, 1e-9.
    torch.testing.assert_close(weights(still), expected, rtol=1e-6, atol=1e-8)
    assert_same_run(run("noisy", *start), run("again", *start))  # noise is drawn alike whenever a run is started


FROZEN = {
    "adamw, average, accumulation": [
        "optim={name: adamw, lr: 0.05, weight_decay: 0.5}",
        "train.ema_decay=0.9",
        "train.accumulation=2",
        "train.clip_norm=0.1",
    ],
    "sgd, bf16": [
        "optim={name: sgd, lr: 0.5, momentum: 0.9, nesterov: true, weight_decay: 0.1}",
        "train.precision=bf16",
        "train.clip_norm=0.1",
    ],
}


@pytest.mark.parametrize("settings", FROZEN)
def test_frozen_experts_of_a_second_task_are_the_first_tasks_bit_for_bit(run: Run, halves: Path, settings: str):
    first = run("first", "moe.num_experts=3", "train.max_steps=3", "optim.lr=0.05", "train.select=last")
    trained = weights(first)
    second = [
        f"model.init_from={first.path}", "model.init_mode=grow", "model.init_skip=[head]", "model.freeze_experts=3",
        "moe.num_experts=5", f"data.path={halves}", "train.max_steps=5", "train.checkpoint_every_steps=1",
        *FROZEN[settings],
    ]  # fmt: skip
    whole = run("whole", *second)
    run("parts", *second, "train.stop_after_steps=2")
    parts = run("parts", *second, "run.resume=true")
    assert_same_run(whole, parts)
    assert weights(whole)["head.weight"].shape == (2, 8)
    stacks = [name for name in trained if ".experts." in name]
    assert len(stacks) == 4
    for step in (1, 3, 5):
        tensors = all_tensors(load_step(whole, step))
        for name in stacks:
            kinds = ["weight", "average"] if "average" in settings else ["weight"]
            for kind in kinds:
                assert torch.equal(tensors[f"{kind} {name}"][:3], trained[name]), (step, kind, name)
    start, end = load_step(whole, 1), load_step(whole, 5)
    for name in stacks:
        moved = (all_tensors(end)[f"weight {name}"] - all_tensors(start)[f"weight {name}"]).flatten(1).abs().amax(1)
        assert [bool(one > 1e-3) for one in moved] == [False, False, False, True, True], name


def load_step(folder: RunFolder, step: int) -> Checkpoint:
    return load_checkpoint(folder.checkpoints().path(step))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.freeze_experts=5"], r"model.freeze_experts: .* \(5\) must be at most that of all \(4\)"),
        (["model.freeze_experts=1", "moe=null"], r"model.freeze_experts: .* \(1\) must be at most that of all \(0\)"),
    ],
)
def test_more_frozen_experts_than_there_are_is_an_error(run: Run, tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(UserError, match=message):
        run("run", "model.init_from=elsewhere", *overrides)
    assert list(tmp_path.iterdir()) == []
