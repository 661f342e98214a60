"""The procedural set: reproducible bytes, honest factors, and neither trivial nor impossible to learn."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from distmoe.config import DataSection, SyntheticSection
from distmoe.data import synthetic


def section(**settings):
    return DataSection(name="synthetic", synthetic=SyntheticSection(**settings))


def test_shapes_types_and_balance():
    split = synthetic.load(section(train_size=230), "train")
    assert split.inputs.shape == (230, 32, 32, 3)
    assert split.inputs.dtype == np.uint8
    assert np.array_equal(np.bincount(split.labels), np.full(10, 23))
    assert {name: values.shape for name, values in split.factors.items()} == {"position": (230, 2), "scale": (230, 1)}
    assert split.class_names[:3] == ("striped disc", "checkered disc", "striped square")


def test_a_sample_depends_on_split_and_number_alone():
    # 230 samples take several chunks, 7 do not fill one.
    many, few = (synthetic.load(section(train_size=size, test_size=9), "train") for size in (230, 7))
    assert np.array_equal(many.inputs[:7], few.inputs)
    assert np.array_equal(many.factors["position"][:7], few.factors["position"])
    test = synthetic.load(section(test_size=7), "test")
    assert not np.array_equal(test.inputs, few.inputs)


def test_bytes_are_those_of_every_other_machine():
    # If this fails on purpose, raise FORMAT_VERSION in distmoe/data/beton.py: prepared files hold the old images.
    split = synthetic.load(section(train_size=50), "train")
    digest = hashlib.blake2b(split.inputs.tobytes() + split.factors["position"].tobytes(), digest_size=8)
    assert digest.hexdigest() == "7704691e2cdf35da"


def test_factors_say_where_and_how_large_the_shape_is():
    split = synthetic.load(section(train_size=400, difficulty=0.0), "train")
    seen = 0
    for image, label, position, scale in zip(
        split.inputs, split.labels, split.factors["position"], split.factors["scale"], strict=True
    ):
        if label // 2 == 2:
            continue  # a triangle's centre is not the middle of its box
        # With difficulty 0 the ground is one colour with weak noise: whatever differs from the corner is the shape.
        ground = np.median(image.reshape(-1, 3), axis=0)
        rows, columns = np.nonzero(np.abs(image - ground).max(axis=2) > 40)
        half = 16 * scale[0]
        if (position * 31 - half < 0).any() or (position * 31 + half > 31).any():
            continue  # sticks out of the image
        box = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
        assert np.abs(box - position * 31).max() < 3.0  # pixels: turned squares, dark bands near the ground's colour
        seen += 1
    assert seen > 50


def test_difficulty_adds_clutter_and_takes_contrast():
    easy, hard = (synthetic.load(section(train_size=100, difficulty=value), "train") for value in (0.0, 1.0))

    def roughness(split):
        return np.abs(np.diff(split.inputs[:, :4].astype(np.float32), axis=2)).mean()

    assert roughness(hard) > 3 * roughness(easy)
    assert np.array_equal(easy.factors["position"], hard.factors["position"])


@pytest.fixture
def one_thread():
    """Small steps on several threads mostly wait for one another, the more so on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("one_thread")
def test_a_linear_classifier_fails():
    data = section(train_size=4_000, test_size=1_000)
    train, test = synthetic.load(data, "train"), synthetic.load(data, "test")

    def pixels(split):
        return torch.from_numpy(split.inputs).flatten(1).float() / 64 - 2

    torch.manual_seed(0)
    model, x, labels = nn.Linear(32 * 32 * 3, 10), pixels(train), torch.from_numpy(train.labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(500):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        assert (model(x).argmax(1) == labels).float().mean() > 0.3  # it did learn what there is by heart
        assert (model(pixels(test)).argmax(1).numpy() == test.labels).mean() <= 0.45


@pytest.mark.slow
def test_a_small_network_learns_it():
    data = section()
    train, test = synthetic.load(data, "train"), synthetic.load(data, "test")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Linear(128, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def images(split):
        return torch.from_numpy(split.inputs).permute(0, 3, 1, 2).float() / 64 - 2

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, labels = images(train), torch.from_numpy(train.labels)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(images(test)).argmax(1).numpy() == test.labels).mean()
    assert accuracy > 0.92
