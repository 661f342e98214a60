import pytest
import torch
from safetensors.torch import save_file

from distmoe.contracts import Context, UserError
from distmoe.models import build_model
from distmoe.training.checkpoint import Best
from distmoe.training.loading import (
    export_model,
    load_inference_weights,
    load_model,
    read_inference_weights,
)
from distmoe.training.run_folder import RunFolder
from tests.unit.training.little import MIXTURE, SGD, SPEC, batch, run_config, trainer

IMAGES = batch(40, 6).images


@pytest.fixture(params=["sparse", "mixture"])
def config(request, tmp_path):
    run = {"run": {"dir": str(tmp_path), "name": "one"}}
    return run_config(**run) if request.param == "sparse" else run_config(MIXTURE, **run)


def scores_of(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IMAGES, Context(0, 0, torch.arange(6), training=False)).scores.clone()


def train(config, saves, **settings) -> dict[int, torch.Tensor]:
    """Trains, saves after the steps in ``saves`` (step -> best so far), and gives the scores at each."""
    folder, scores = RunFolder.of(config), {}
    with trainer(config) as run:
        folder.open(config)
        for step in range(1, 4):
            run.module.train()
            run.train(range(step - 1, step))
            if step in saves:
                folder.checkpoints(keep=3).save(run.state(step, saves[step], **settings))
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
    average = {name: value.detach().clone() for name, value in build_model(config, SPEC).named_parameters()}
    scores = train(config, {3: None}, average=average)
    weights = read_inference_weights(tmp_path / "one")
    assert all(torch.equal(weights[name], value) for name, value in average.items())
    assert not torch.equal(load_model(tmp_path / "one")(IMAGES).scores, scores[3])


def test_overrides_change_the_loaded_model(tmp_path):
    config = run_config(run={"dir": str(tmp_path), "name": "one"})
    train(config, {3: None})
    fewer = load_model(tmp_path / "one", ["moe.gate.k=1", "moe.gate.renormalize=false"])
    routing = fewer(IMAGES).routings["ffns.1"]
    assert len(routing.row_ids_A) == routing.num_rows
    with pytest.raises(
        UserError, match=r"one: 19 of its tensors do not fit .*w1 has shape \[3, 4, 6\], this model's has \[3, 5, 6\]"
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
        "head.weight has shape [4, 9], this model's has [4, 4]",
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
