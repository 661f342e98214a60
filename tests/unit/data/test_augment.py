"""Augmentation against a loop over samples and pixels, and against the statistics it promises."""

from collections import Counter

import numpy as np
import pytest
import torch

from distmoe.config import AugmentSection, DataSection
from distmoe.contracts import Batch, DataSpec, UserError
from distmoe.data.augment import DEFAULTS, Augmenter
from distmoe.data.datasets import DATASETS

SEED = 7


def spec_of(name, shape=(3, 6, 5)):
    return DataSpec(name, shape, 10, (), (10.4, 20.6, 30.0)[: shape[0]], (1.0,) * shape[0])


def augmenter(name="cifar10", shape=(3, 6, 5), seed=SEED, **settings):
    path = "x.npz" if name == "arrays" else None
    return Augmenter(DataSection(name=name, path=path, augment=AugmentSection(**settings)), spec_of(name, shape), seed)


def batch_of(ids, shape=(3, 6, 5)):
    """Images whose every pixel is different from its neighbours; they depend on the sample alone."""
    ids = torch.as_tensor(ids, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 256, (50, *shape), dtype=torch.uint8, generator=generator)
    return Batch(pool[ids % 50], ids % 10, ids, {"scale": torch.ones(len(ids), 1)})


def flipped(image):
    return image[:, :, ::-1]


def windows(image, padding):
    """All windows of the image's own size in its mirrored padding, by numpy."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    height, width = image.shape[1:]
    places = range(2 * padding + 1)
    return {(y, x): padded[:, y : y + height, x : x + width] for y in places for x in places}


def test_defaults_cover_all_data_sets():
    assert set(DEFAULTS) == set(DATASETS)


@pytest.mark.parametrize("mode", ["random", "alternating"])
def test_flip_mirrors_left_right_or_not_at_all(mode):
    batch = batch_of(range(40))
    result = augmenter(flip=mode, crop_padding=0).train(batch, epoch=3).images.numpy()
    mirrored = 0
    for before, after in zip(batch.images.numpy(), result, strict=True):
        if np.array_equal(after, flipped(before)):
            mirrored += 1
        else:
            np.testing.assert_array_equal(after, before)
    assert 8 <= mirrored <= 32  # 20 +- 3.2: almost four standard deviations


def test_alternating_flip_turns_in_each_epoch():
    batch, augment = batch_of(range(30)), augmenter(flip="alternating", crop_padding=0)
    epochs = [augment.train(batch, epoch).images.numpy() for epoch in range(3)]
    np.testing.assert_array_equal(epochs[1], epochs[0][..., ::-1])
    np.testing.assert_array_equal(epochs[2], epochs[0])


def test_random_flip_is_drawn_anew_in_each_epoch():
    batch, augment = batch_of(range(30)), augmenter(flip="random", crop_padding=0)
    sides = [(augment.train(batch, epoch).images == batch.images).flatten(1).all(1) for epoch in range(4)]
    # Neither always the same nor in turn: all pairs of epochs have samples that agree and samples that differ.
    for other in sides[1:]:
        assert 0 < int((sides[0] == other).sum()) < 30


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_crop_is_a_window_of_the_mirrored_image(padding):
    batch = batch_of(range(50))
    result = augmenter(flip="none", crop_padding=padding).train(batch, epoch=0).images.numpy()
    seen = Counter()
    for before, after in zip(batch.images.numpy(), result, strict=True):
        matching = [place for place, window in windows(before, padding).items() if np.array_equal(window, after)]
        assert matching  # a wide padding of five columns holds the same window twice
        seen.update(matching[:1])
    assert len(seen) >= 6


def test_crop_reaches_every_window_equally_often():
    batch = batch_of([0]).images
    ids = torch.arange(5_000)
    many = Batch(batch.expand(5_000, -1, -1, -1), ids, ids)
    result = augmenter(flip="none", crop_padding=2).train(many, epoch=0).images.numpy()
    index = {window.tobytes(): place for place, window in windows(batch[0].numpy(), 2).items()}
    counts = Counter(index[np.ascontiguousarray(image).tobytes()] for image in result)
    assert len(counts) == 25
    assert max(abs(count - 200) for count in counts.values()) < 70  # 200 +- 13.9: five standard deviations


def test_flip_and_crop_together_equal_one_after_the_other():
    batch = batch_of(range(40))
    flip = augmenter(flip="random", crop_padding=0).train(batch, epoch=5)
    both = augmenter(flip="random", crop_padding=2).train(batch, epoch=5)
    assert torch.equal(both.images, augmenter(flip="none", crop_padding=2).train(flip, epoch=5).images)


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_cutout_paints_one_square_with_the_mean_colour(side):
    batch = batch_of(range(50))
    result = augmenter(flip="none", crop_padding=0, cutout=side).train(batch, epoch=0).images.numpy()
    for before, after in zip(batch.images.numpy(), result, strict=True):
        candidates = []
        for y in range(6):
            for x in range(5):
                painted = before.copy()
                top, left = y - side // 2, x - side // 2
                painted[:, max(top, 0) : top + side, max(left, 0) : left + side] = np.array([10, 21, 30])[:, None, None]
                candidates.append(painted)
        assert any(np.array_equal(after, candidate) for candidate in candidates)
    assert not np.array_equal(result, batch.images.numpy())


def test_nothing_changes_where_all_is_off():
    batch = batch_of(range(5))
    assert augmenter(flip="none", crop_padding=0, cutout=0).train(batch, epoch=1).images is batch.images
    assert augmenter().evaluate(batch) is batch


@pytest.mark.parametrize(("name", "shape"), [("cifar10", (3, 8, 8)), ("translated_mnist", (1, 28, 28))])
def test_result_depends_on_seed_epoch_and_sample_but_not_on_the_batch(name, shape):
    input_shape = (1, 36, 36) if name == "translated_mnist" else shape
    augment = augmenter(name, input_shape, flip="random", crop_padding=2, cutout=3)
    whole = augment.train(batch_of(range(20), shape), epoch=2)
    order = [17, 3, 11]
    parts = augment.train(batch_of(order, shape), epoch=2)
    assert torch.equal(parts.images, whole.images[order])
    for factor, values in parts.factors.items():
        assert torch.equal(values, whole.factors[factor][order])
    again = augmenter(name, input_shape, flip="random", crop_padding=2, cutout=3).train(batch_of(order, shape), epoch=2)
    assert torch.equal(again.images, parts.images)
    assert not torch.equal(augment.train(batch_of(order, shape), epoch=3).images, parts.images)
    other = augmenter(name, input_shape, seed=8, flip="random", crop_padding=2, cutout=3)
    assert not torch.equal(other.train(batch_of(order, shape), epoch=2).images, parts.images)


def test_result_does_not_depend_on_memory_format_or_global_seed():
    batch = batch_of(range(9))
    torch.manual_seed(1)
    first = augmenter(cutout=2).train(batch, epoch=0).images
    torch.manual_seed(2)
    last = Batch(batch.images.to(memory_format=torch.channels_last), batch.labels, batch.sample_ids)
    assert torch.equal(augmenter(cutout=2).train(last, epoch=0).images, first)


def test_translation_places_the_digit_and_records_where():
    batch = batch_of(range(40), (1, 28, 28))
    for result in (
        augmenter("translated_mnist", (1, 36, 36)).train(batch, epoch=1),
        augmenter("translated_mnist", (1, 36, 36)).evaluate(batch),
    ):
        assert result.images.shape == (40, 1, 36, 36)
        assert result.factors["translation"].dtype == torch.float32
        assert "scale" in result.factors
        for digit, image, moved in zip(batch.images, result.images, result.factors["translation"], strict=True):
            down, right = (int(value) for value in moved)
            expected = np.zeros((1, 36, 36), np.uint8)
            expected[:, 4 + down : 32 + down, 4 + right : 32 + right] = digit.numpy()
            np.testing.assert_array_equal(image.numpy(), expected)


def test_translation_reaches_all_81_places_equally_often():
    ids = torch.arange(8_100)
    batch = Batch(torch.zeros(8_100, 1, 2, 2, dtype=torch.uint8), ids, ids)
    augment = augmenter("translated_mnist", (1, 10, 10))
    for result in (augment.train(batch, epoch=0), augment.evaluate(batch)):
        counts = Counter(map(tuple, result.factors["translation"].int().tolist()))
        assert set(counts) == {(y, x) for y in range(-4, 5) for x in range(-4, 5)}
        assert max(abs(count - 100) for count in counts.values()) < 50  # 100 +- 10: five standard deviations


def test_evaluation_offsets_are_the_same_for_every_seed_and_training_offsets_are_not():
    batch = batch_of(range(30), (1, 28, 28))
    one, two = (augmenter("translated_mnist", (1, 36, 36), seed=seed) for seed in (1, 2))
    assert torch.equal(one.evaluate(batch).images, two.evaluate(batch).images)
    assert not torch.equal(one.train(batch, 0).images, two.train(batch, 0).images)
    assert not torch.equal(one.train(batch, 0).images, one.train(batch, 1).images)


def test_empty_batch_passes_through():
    empty = augmenter(cutout=2).train(batch_of([]), epoch=0)
    assert empty.images.shape == (0, 3, 6, 5)
    placed = augmenter("translated_mnist", (1, 36, 36)).train(batch_of([], (1, 28, 28)), epoch=0)
    assert placed.images.shape == (0, 1, 36, 36)
    assert placed.factors["translation"].shape == (0, 2)


def test_float_images_keep_their_type():
    batch = batch_of(range(6))
    floats = Batch(batch.images.float() / 3, batch.labels, batch.sample_ids)
    result = augmenter("arrays", flip="random", crop_padding=1, cutout=1).train(floats, epoch=0)
    assert result.images.dtype == torch.float32
    assert torch.isclose(result.images[:, 0], torch.tensor(10.4)).any()  # the mean is not rounded


@pytest.mark.parametrize("settings", [{"flip": "random"}, {"crop_padding": 1}, {"cutout": 1}])
def test_inputs_that_are_no_images_are_refused(settings):
    section = DataSection(name="arrays", path="x.npz", augment=AugmentSection(**settings))
    with pytest.raises(UserError, match=r"data\.augment.*\(7,\).*not images"):
        Augmenter(section, DataSpec("arrays", (7,), 2, (), (0.0,), (1.0,)), 0)


def test_inputs_that_are_no_images_pass_where_nothing_is_asked():
    section = DataSection(name="arrays", path="x.npz")
    augment = Augmenter(section, DataSpec("arrays", (7,), 2, (), (0.0,), (1.0,)), 0)
    batch = Batch(torch.randn(3, 7), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert torch.equal(augment.train(batch, 0).images, batch.images)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "allowed"),
    [
        ("cifar10", (3, 6, 5), {"crop_padding": 5}, r"crop_padding \(5\): must be below 5"),
        ("translated_mnist", (1, 36, 36), {"crop_padding": 28}, r"crop_padding \(28\): must be below 28"),
        ("cifar10", (3, 6, 5), {"cutout": 6}, r"cutout \(6\): must be at most 5"),
    ],
)
def test_too_large_settings_are_refused(name, shape, settings, allowed):
    with pytest.raises(UserError, match=allowed):
        augmenter(name, shape, **settings)
