import pytest
import torch

from distmoe.contracts import DataSpec
from distmoe.models.protocol import Normalize

SPEC = DataSpec("little", (2, 1, 2), 2, ("a", "b"), (100.0, 50.0), (50.0, 10.0))
IMAGE = torch.tensor([[[[0, 200]], [[50, 255]]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("standard", [[[-2.0, 2.0]], [[0.0, 20.5]]]),  # (0 - 100) / 50, (200 - 100) / 50, (255 - 50) / 10
        ("unit", [[[0.0, 200 / 255]], [[50 / 255, 1.0]]]),
        ("none", [[[0.0, 200.0]], [[50.0, 255.0]]]),
    ],
)
def test_pixels_are_normalised_by_channel(mode, expected):
    output = Normalize(SPEC, mode)(IMAGE)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output[0], torch.tensor(expected))


def test_one_mean_serves_samples_of_any_shape():
    spec = DataSpec("vectors", (3,), 2, ("a", "b"), (1.0,), (2.0,))
    assert Normalize(spec)(torch.tensor([[1.0, 3.0, -1.0]])).tolist() == [[0.0, 1.0, -1.0]]


def test_the_constants_are_saved_with_the_weights():
    saved = Normalize(SPEC).state_dict()
    other = Normalize(SPEC, "none")
    other.load_state_dict(saved)
    assert torch.equal(other(IMAGE), Normalize(SPEC)(IMAGE))


def test_no_images_stay_no_images():
    assert Normalize(SPEC)(IMAGE[:0]).tolist() == []
