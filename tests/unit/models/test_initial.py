import pytest
import torch
from torch import nn

from distmoe.config import RunConfig, parse_config
from distmoe.contracts import DataSpec, UserError
from distmoe.models import MODELS, build_model
from distmoe.models.initial import initialize_parameters
from distmoe.moe.dispatch import Placement

SPEC = DataSpec("little", (3, 16, 16), 5, tuple("abcde"), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
SOME_EXPERTS = Placement(local_experts=lambda num_experts: range(2, 4))


def tutorial(seed: int = 0) -> RunConfig:
    model = {"name": "tutorial", "channels": [4, 6], "hidden": 8, "gate_channels": [3], "gate_hidden": 4}
    return parse_config({"seed": seed, "model": model, "moe": {"num_experts": 5, "gate": {"name": "dense"}}}, "test")


def convnet(seed: int = 0) -> RunConfig:
    model = {"name": "convnet", "widths": [4, 6], "ffn_stages": [1, 2], "ffn_hidden": 7}
    return parse_config({"seed": seed, "model": model, "moe": {"num_experts": 5}}, "test")


def twin(seed: int = 0) -> RunConfig:
    model = {"name": "tutorial_cnn", "channels": [4, 6], "hidden": 8}
    return parse_config({"seed": seed, "model": model}, "test")


CONFIGS = {"tutorial": tutorial, "convnet": convnet, "tutorial_cnn": twin}


def state(config: RunConfig, placement: Placement | None = None) -> dict[str, torch.Tensor]:
    return dict(build_model(config, SPEC, placement).state_dict())


def test_every_model_is_checked():
    assert CONFIGS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_depend_on_the_seed_alone_and_torchs_generator_is_left_alone(name):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = state(CONFIGS[name]())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = state(CONFIGS[name]()), state(CONFIGS[name](seed=1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    drawn = [key for key, value in first.items() if value.is_floating_point() and len(value.unique()) > 4]
    assert len(drawn) >= 6
    assert not any(torch.equal(first[key], other[key]) for key in drawn if "normalize" not in key)


def test_named_experts_of_a_part_equal_those_of_the_whole():
    whole, part = state(tutorial()), state(tutorial(), SOME_EXPERTS)
    missing = {key for key in whole if any(f"modules_by_id.{expert}." in key for expert in (0, 1, 4))}
    assert part.keys() == whole.keys() - missing
    assert len(missing) == 3 * 8  # two convolutions and two linear layers, each weight and bias
    assert all(torch.equal(value, whole[key]) for key, value in part.items())


def test_stacked_experts_of_a_part_equal_those_of_the_whole():
    whole, part = state(convnet()), state(convnet(), SOME_EXPERTS)
    assert part.keys() == whole.keys()
    stacked = [key for key in whole if ".experts." in key]
    assert len(stacked) == 8  # two layers of w1 b1 w2 b2
    for key, value in part.items():
        assert torch.equal(value, whole[key][2:4] if key in stacked else whole[key]), key


@pytest.mark.parametrize("placement", [None, SOME_EXPERTS])
def test_experts_differ_from_one_another_and_layers_too(placement):
    named, stacked = state(tutorial(), placement), state(convnet(), placement)
    for part in ("convolutions.0.weight", "convolutions.1.weight", "fc1.weight", "fc2.bias"):
        values = [value for key, value in named.items() if "modules_by_id" in key and key.endswith(part)]
        assert len(values) == (5 if placement is None else 2)
        assert all(not torch.equal(values[0], value) for value in values[1:])
    for key in ("ffns.1.ffn.experts.w1", "ffns.2.ffn.experts.w2"):
        assert all(not torch.equal(stacked[key][0], value) for value in stacked[key][1:])
    # Equal shapes in different places of the network do not start equal either.
    stages = [stacked["stages.0.conv1.weight"], stacked["stages.0.conv2.weight"]]
    assert stages[0].shape == stages[1].shape
    assert not torch.equal(*stages)


def test_the_scale_of_torchs_modules_is_kept():
    weight = state(twin())["network.fc1.weight"]
    # nn.Linear: uniform in +-1 / sqrt(fan-in); 6 channels of 4 x 4 pixels.
    bound = (6 * 4 * 4) ** -0.5
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)  # 768 values: known to 1.6 %


def test_constants_and_norms_start_as_they_should():
    values = state(convnet())
    assert values["stages.0.norm1.weight"].tolist() == [1.0] * 4
    assert values["stages.0.norm1.running_var"].tolist() == [1.0] * 4
    assert values["ffns.1.norm.bias"].tolist() == [0.0] * 4
    assert values["normalize.mean"].flatten().tolist() == [100.0, 110.0, 120.0]


@pytest.mark.parametrize(
    ("config", "spec", "message"),
    [
        (twin(), DataSpec("flat", (10,), 5, tuple("abcde"), (0.0,), (1.0,)), "needs images"),
        (convnet(), DataSpec("tiny", (3, 3, 8), 5, tuple("abcde"), (0.0,) * 3, (1.0,) * 3), "leave nothing of a 3x8"),
        (twin(), DataSpec("tiny", (3, 8, 3), 5, tuple("abcde"), (0.0,) * 3, (1.0,) * 3), "leave nothing of a 8x3"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(config, spec, message):
    with pytest.raises(UserError, match=rf"model.name {config.model.name} .*{message}"):
        build_model(config, spec)


def test_no_rank_holds_more_than_its_own_experts():
    def count(model: nn.Module) -> int:
        return sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in f".{name}")

    for config in (tutorial(), convnet()):
        assert count(build_model(config, SPEC, SOME_EXPERTS)) * 5 == count(build_model(config, SPEC)) * 2


def test_parameter_without_a_rule_for_its_values_is_refused():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.rand(3))  # drawn while it was made: not keyed by its name

    model = nn.Sequential(nn.Linear(2, 2), Scale())
    with pytest.raises(ValueError, match=r"give the module of 1\.factor a reset_parameters"):
        initialize_parameters(model, seed=0)
