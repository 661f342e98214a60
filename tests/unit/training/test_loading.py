from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distmoe.config import RunConfig
from distmoe.contracts import Context, DataSpec, UserError
from distmoe.models import build_model
from distmoe.models.protocol import Network
from distmoe.training.checkpoint import Best
from distmoe.training.ema import WeightAverage
from distmoe.training.loading import export_model, load_inference_weights, load_model, start_from
from distmoe.training.run_folder import RunFolder
from tests.unit.training.little import MIXTURE, SGD, SPARSE, SPEC, batch, run_config, trainer

IMAGES = batch(40, 6).images


@pytest.fixture(params=["sparse", "mixture"])
def config(request, tmp_path):
    run = {"run": {"dir": str(tmp_path), "name": "one"}}
    return run_config(**run) if request.param == "sparse" else run_config(MIXTURE, **run)


def scores_of(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IMAGES, Context(0, 0, torch.arange(6), training=False)).scores.clone()


def train(config, saves) -> dict[int, torch.Tensor]:
    """Trains, saves after the steps in ``saves`` (step -> best so far), and gives the scores at each."""
    folder, scores = RunFolder.of(config), {}
    with trainer(config) as run:
        folder.open(config)
        for step in range(1, 4):
            run.module.train()
            run.train(range(step - 1, step))
            if step in saves:
                folder.checkpoints(keep=3).save(run.state(step, saves[step]), run.pieces())
                scores[step] = scores_of(run.module)
    return scores


def test_a_run_and_its_export_give_the_scores_of_the_training_model(config, tmp_path):
    scores = train(config, {3: None})
    loaded = load_model(tmp_path / "one")
    exported = load_model(export_model(tmp_path / "one", tmp_path / "out" / "model.safetensors"))
    assert not torch.equal(scores[3], scores_of(build_model(config, SPEC)))  # it has learnt something
    for model in (loaded, exported):
        assert torch.equal(scores_of(model.network), scores[3])
        assert torch.equal(model(IMAGES).scores, scores[3])
        assert not model.training
        assert model.spec == SPEC
        assert model.config == config
        torch.testing.assert_close(model.predict(IMAGES), scores[3].softmax(-1))
        torch.testing.assert_close(model.predict(IMAGES).sum(-1), torch.ones(6))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]


def test_the_best_or_the_last_checkpoint_is_taken_as_the_config_says(config, tmp_path):
    scores = train(config, {1: Best(1, 0.9), 3: Best(1, 0.9)})
    assert torch.equal(load_model(tmp_path / "one")(IMAGES).scores, scores[1])
    assert torch.equal(load_model(tmp_path / "one", ["train.select=last"])(IMAGES).scores, scores[3])


def test_averaged_weights_are_the_trained_ones(config, tmp_path):
    with trainer(config) as run:
        average = WeightAverage(run.module, 0.9)  # of the initial weights: it is never updated
        initial = dict(build_model(config, SPEC).named_parameters())
        run.train(range(3))
        RunFolder.of(config).open(config)
        RunFolder.of(config).checkpoints().save(run.state(3), run.pieces(average))
        trained = scores_of(run.module)
    loaded = load_model(tmp_path / "one")
    assert all(torch.equal(value, initial[name]) for name, value in loaded.network.named_parameters())
    assert not torch.equal(loaded(IMAGES).scores, trained)
    exported = load_model(export_model(tmp_path / "one", tmp_path / "model.safetensors"))
    assert torch.equal(exported(IMAGES).scores, loaded(IMAGES).scores)


def test_overrides_change_the_loaded_model(tmp_path):
    config = run_config(run={"dir": str(tmp_path), "name": "one"})
    train(config, {3: None})
    fewer = load_model(tmp_path / "one", ["moe.gate.k=1", "moe.gate.renormalize=false"])
    routing = fewer(IMAGES).routings["ffns.1"]
    assert len(routing.row_ids_A) == routing.num_rows
    with pytest.raises(
        UserError, match=r"one: 19 of its tensors do not fit .*w1 has shape \[3, 4, 6\], this model takes \[3, 5, 6\]"
    ):
        load_model(tmp_path / "one", ["model.widths=[5]", "model.ffn_hidden=6"])


def test_weights_that_do_not_fit_are_listed():
    model = build_model(run_config(), SPEC)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {**before, "head.weight": torch.zeros(4, 9), "extra": torch.zeros(1)}
    del weights["stem.bias"]
    with pytest.raises(UserError) as caught:
        load_inference_weights(model, weights, "checkpoint X")
    for part in (
        "checkpoint X: 3 of its tensors do not fit",
        "stem.bias is missing",
        "extra is not in this model",
        "head.weight has shape [4, 9], this model takes [4, 4]",
        "use the configuration it was trained with",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # nothing was copied


@pytest.mark.parametrize("damage", ["truncated", "text", "foreign"])
def test_a_damaged_or_foreign_export_is_refused(config, tmp_path, damage):
    train(config, {3: None})
    target = export_model(tmp_path / "one", tmp_path / "model.safetensors")
    content = target.read_bytes()
    if damage == "foreign":
        save_file({"x": torch.zeros(1)}, target)
    else:
        target.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"hello")
    with pytest.raises(UserError, match=r"model.safetensors: not a whole file written by `distmoe export`"):
        load_model(target)


def test_places_without_a_trained_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config.yaml there"):
        load_model(tmp_path)
    config = run_config(optim=SGD, run={"dir": str(tmp_path), "name": "untrained"})
    RunFolder.of(config).open(config)
    with pytest.raises(UserError, match="no whole checkpoint in it; train it first"):
        load_model(tmp_path / "untrained")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_model(tmp_path / "untrained", tmp_path / "model.pt")


# --- the start of a run from another one

DENSE_MODEL = SPARSE["model"]
TOP2 = {"num_experts": 3}
TWIN_MODEL = {"name": "tutorial_cnn", "channels": [4], "hidden": 6}
OTHER_SPEC = DataSpec("other", (3, 8, 8), 2, ("x", "y"), (110.0,) * 3, (50.0,) * 3)


def saved(tmp_path, **sections: Any) -> dict[str, torch.Tensor]:
    """The folder of a run with random weights and buffers, no two alike, and what is in it."""
    config = run_config({}, run={"dir": str(tmp_path), "name": "one"}, **sections)
    folder = RunFolder.of(config)
    with trainer(config) as run:
        generator = torch.Generator().manual_seed(0)
        for tensor in (*run.module.parameters(), *run.module.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(torch.rand(tensor.shape, generator=generator))
        folder.open(config)
        folder.checkpoints(keep=1).save(run.state(1), run.pieces())
        return run.weights()


def started(tmp_path, model: dict[str, Any], spec: DataSpec = SPEC, **sections: Any) -> tuple[Network, Network]:
    """A model that starts from that run, and the same one with its fresh weights."""
    config = run_config({}, model={**model, "init_from": str(tmp_path / "one")}, **sections)
    network, fresh = build_model(config, spec), build_model(config, spec)
    start_from(network, config, tmp_path / "one")
    return network, fresh


def differing(network: Network, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not as expected."""
    own = network.state_dict()
    return [name for name in own if name not in expected or not torch.equal(own[name], expected[name])]


@pytest.mark.parametrize("source", ["run", "file"])
def test_every_expert_starts_as_the_dense_layer(tmp_path, source):
    trained = saved(tmp_path, model=DENSE_MODEL)
    moe = {**TOP2, "shared_hidden": 5}
    model = {**DENSE_MODEL, "init_mode": "upcycle", "upcycle_noise": 0.0}
    config = run_config({}, model=model, moe=moe)
    network, fresh = build_model(config, SPEC), build_model(config, SPEC).state_dict()
    place = tmp_path / "one"
    start_from(network, config, place if source == "run" else export_model(place, tmp_path / "dense.safetensors"))
    expected = {name: trained.get(name, value) for name, value in fresh.items()}
    for part, name in {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}.items():
        dense = trained[f"ffns.1.ffn.{name}"]
        expected[f"ffns.1.ffn.experts.{part}"] = torch.stack([dense.T if dense.dim() == 2 else dense] * 3)
    assert differing(network, expected) == []
    # Fresh: the gate and the shared expert.
    assert {name.split(".")[3] for name in differing(network, trained)} == {"experts", "gate", "shared"}


def test_upcycled_model_gives_the_scores_of_the_dense_one(tmp_path):
    saved(tmp_path, model=DENSE_MODEL)
    network, _ = started(tmp_path, {**DENSE_MODEL, "init_mode": "upcycle", "upcycle_noise": 0.0}, moe=TOP2)
    dense = load_model(tmp_path / "one").network
    torch.testing.assert_close(scores_of(network), scores_of(dense), rtol=1e-5, atol=1e-5)  # float32


def test_upcycled_tutorial_gives_the_class_probabilities_of_its_one_expert(tmp_path):
    saved(tmp_path, model=TWIN_MODEL)
    model = {**MIXTURE["model"], "init_mode": "upcycle", "upcycle_noise": 0.0}
    network, fresh = started(tmp_path, model, moe=MIXTURE["moe"])
    twin = load_model(tmp_path / "one").network
    torch.testing.assert_close(scores_of(network), scores_of(twin).log_softmax(-1), rtol=1e-5, atol=1e-5)
    same = set(fresh.state_dict()) - set(differing(network, fresh.state_dict()))
    assert same == {name for name in fresh.state_dict() if name.startswith("gate.")}


def test_noise_comes_from_the_config_and_the_seed(tmp_path):
    trained = saved(tmp_path, model=DENSE_MODEL)
    dense = trained["ffns.1.ffn.fc1.weight"]

    def noise(seed: int, **settings: Any) -> torch.Tensor:
        network, _ = started(tmp_path, {**DENSE_MODEL, "init_mode": "upcycle", **settings}, moe=TOP2, seed=seed)
        return network.state_dict()["ffns.1.ffn.experts.w1"].transpose(1, 2) - dense

    default, more = noise(0), noise(0, upcycle_noise=0.5)
    # 72 draws: the standard deviation is known to 8 %.
    assert float(default.std() / dense.std(correction=0)) == pytest.approx(0.01, rel=0.3)
    torch.testing.assert_close(more / 50.0, default, rtol=1e-2, atol=1e-6)  # the same draws; float32 sums
    assert not torch.allclose(noise(1), default, rtol=0.1)


def test_grown_model_keeps_the_trained_experts(tmp_path):
    trained = saved(tmp_path, model=DENSE_MODEL, moe={**TOP2, "shared_hidden": 5})
    model = {**DENSE_MODEL, "init_mode": "grow"}
    network, fresh = started(tmp_path, model, moe={"num_experts": 5, "shared_hidden": 5})
    expected = {}
    for name, value in fresh.state_dict().items():
        by_expert = ".experts." in name or ".gate." in name
        expected[name] = torch.cat([trained[name], value[3:]]) if by_expert else trained[name]
    assert differing(network, expected) == []
    assert len([name for name in expected if expected[name].shape != trained[name].shape]) == 5  # w1 b1 w2 b2 and gate


def test_parts_that_are_named_start_fresh(tmp_path):
    trained = saved(tmp_path, model=DENSE_MODEL, moe=TOP2)
    skip = ["head", "normalize", "ffns.1.norm.bias"]
    model = {**DENSE_MODEL, "init_mode": "grow", "init_skip": skip}
    network, fresh = started(tmp_path, model, OTHER_SPEC, moe=TOP2)  # of two classes instead of four
    skipped = {"head.weight", "normalize.mean", "normalize.std", "ffns.1.norm.bias"}
    assert set(differing(network, trained)) == skipped
    assert skipped.isdisjoint(differing(network, fresh.state_dict()))


def test_state_of_a_balancer_that_is_gone_can_be_left_out(tmp_path):
    dense_gate = {"num_experts": 3, "gate": {"name": "dense", "margin": 1.0}}
    trained = saved(tmp_path, model=DENSE_MODEL, moe=dense_gate)
    model = {**DENSE_MODEL, "init_skip": ["ffns.1.ffn.gate.balancer"]}
    network, _ = started(tmp_path, model, moe={"num_experts": 3, "gate": {"name": "dense"}})
    assert differing(network, trained) == []


REFUSED = {
    "a dense run as it is": (
        {"model": DENSE_MODEL},
        {"model": DENSE_MODEL, "moe": TOP2},
        ["9 of its tensors", "ffns.1.ffn.experts.b1 is missing", "use model.init_mode=upcycle"],
    ),
    "fewer experts as they are": (
        {"model": DENSE_MODEL, "moe": TOP2},
        {"model": DENSE_MODEL, "moe": {"num_experts": 4}},
        ["5 of its tensors", "experts.b1 has shape [3, 6], this model takes [4, 6]", "use model.init_mode=grow"],
    ),
    "more experts as they are": (
        {"model": DENSE_MODEL, "moe": TOP2},
        {"model": DENSE_MODEL, "moe": {"num_experts": 2}},
        ["5 of its tensors", "use the configuration it was trained with, or name in model.init_skip"],
    ),
    "upcycled twice": (
        {"model": DENSE_MODEL, "moe": TOP2},
        {"model": {**DENSE_MODEL, "init_mode": "upcycle"}, "moe": TOP2},
        ["one: is no dense model", "use model.init_mode=grow"],
    ),
    "upcycled to a dense model": (
        {"model": DENSE_MODEL},
        {"model": {**DENSE_MODEL, "init_mode": "upcycle"}},
        ["model.init_mode upcycle is for a model with experts"],
    ),
    "upcycled with another hidden width": (
        {"model": DENSE_MODEL},
        {"model": {**DENSE_MODEL, "init_mode": "upcycle", "ffn_hidden": 7}, "moe": TOP2},
        ["3 of its tensors", "ffns.1.ffn.fc1.weight has shape [6, 4], this model takes [7, 4]"],
    ),
    "upcycled from a smaller network": (
        {"model": {**DENSE_MODEL, "ffn_stages": []}},
        {"model": {**DENSE_MODEL, "init_mode": "upcycle"}, "moe": TOP2},
        ["6 of its tensors", "ffns.1.ffn.fc1.bias is missing"],
    ),
    "grown from a dense model": (
        {"model": DENSE_MODEL},
        {"model": {**DENSE_MODEL, "init_mode": "grow"}, "moe": TOP2},
        ["is a dense model", "use model.init_mode=upcycle"],
    ),
    "grown to fewer experts": (
        {"model": DENSE_MODEL, "moe": TOP2},
        {"model": {**DENSE_MODEL, "init_mode": "grow"}, "moe": {"num_experts": 2}},
        ["has 3 experts, more than moe.num_experts (2)"],
    ),
    "grown to another width": (
        {"model": DENSE_MODEL, "moe": TOP2},
        {"model": {**DENSE_MODEL, "init_mode": "grow", "ffn_hidden": 7}, "moe": {"num_experts": 4}},
        ["3 of its tensors", "experts.w1 has shape [3, 4, 6], this model takes [3, 4, 7]"],
    ),
    "other classes": (
        {"model": {**DENSE_MODEL, "widths": [3]}},
        {"model": {**DENSE_MODEL, "widths": [3, 4]}},
        ["head.weight has shape [4, 3], this model takes [4, 4]", "name in model.init_skip what is to start fresh"],
    ),
    "skipping what is nowhere": (
        {"model": DENSE_MODEL},
        {"model": {**DENSE_MODEL, "init_skip": ["head", "hea"]}},
        ["model.init_skip hea: no tensor of this model or of", "begins with it"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_start_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, case):
    trained, ours, parts = REFUSED[case]
    saved(tmp_path, **trained)
    config: RunConfig = run_config({}, **ours)
    network = build_model(config, SPEC)
    fresh = build_model(config, SPEC).state_dict()
    with pytest.raises(UserError) as caught:
        start_from(network, config, tmp_path / "one")
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 800
    assert differing(network, fresh) == []


def test_long_names_do_not_make_a_long_message():
    model = build_model(run_config(), SPEC)
    weights = {**model.state_dict(), **{f"{letter * 10_000}": torch.zeros(1) for letter in "abcdefgh"}}
    with pytest.raises(UserError, match=r"8 of its tensors do not fit.*a\.\.\.; b.*b\.\.\.; c") as caught:
        load_inference_weights(model, weights, "checkpoint X")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("settings", "name"), [({"init_mode": "grow"}, "model.init_mode"), ({"init_skip": ["head"]}, "model.init_skip")]
)
def test_settings_of_a_start_without_one_are_a_problem_of_training(settings, name):
    problem = run_config({}, model={**DENSE_MODEL, **settings}).model.training_problem()
    assert problem == f"{name} needs model.init_from, the run or exported file to start from"
    assert run_config({}, model={**DENSE_MODEL, **settings, "init_from": "x"}).model.training_problem() is None
    assert run_config({}, model=DENSE_MODEL).model.training_problem() is None
