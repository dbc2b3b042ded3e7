"""Augmentation applies exactly the drawn change, with the same draws on any number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import losses

from train.data.augment import KINDS, augment
from train.data.order import accumulation, augmentation_draws, micro_batches
from train.run.recipe import Augment

settings.register_profile("unhurried", deadline=None)  # the machine may be busy
settings.load_profile("unhurried")

SIZE, COUNT = 20, 4
RIGHT, DOWN, ZOOM, BRIGHTNESS, CONTRAST, FLIP = range(6)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()


def draws(**kinds: float | list[float]) -> torch.Tensor:
    """Draws of 0, except those named."""
    drawn = torch.zeros(COUNT, KINDS)
    for name, values in kinds.items():
        drawn[:, globals()[name.upper()]] = torch.tensor(values)
    return drawn


def shifted(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """An image shifted by whole pixels; the edge is repeated."""
    rows = (torch.arange(SIZE) - down).clamp(0, SIZE - 1)
    columns = (torch.arange(SIZE) - right).clamp(0, SIZE - 1)
    return image[:, rows][:, :, columns]


def assert_equal(augmented: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> None:
    """Equal up to the rounding of interpolation weights in float32."""
    assert augmented.dtype == torch.float32
    torch.testing.assert_close(augmented, expected.float(), rtol=0, atol=tolerance)


# ---- what is changed -----------------------------------------------------------------------------------------------

EVERYTHING = Augment(shift=0.2, zoom=0.3, brightness=0.5, contrast=0.5, flip=True)


def test_draws_of_0_change_nothing(images):
    assert_equal(augment(images, draws(flip=-1.0), EVERYTHING), images)


def test_disabled_augmentations_change_nothing(images):
    assert torch.equal(augment(images, torch.full((COUNT, KINDS), 0.9), Augment()), images.float())
    assert not Augment().is_on
    for name in ("shift", "zoom", "brightness", "contrast", "flip"):
        assert Augment(**{name: True if name == "flip" else 0.1}).is_on


def test_shifts_move_by_whole_pixels(images):
    """Each image its own way: 0.2 of 20 pixels is 4, times a draw, rounded."""
    moves = [(0.5, -0.25), (-1.0, 1.0), (0.3, 0.0), (0.05, -0.9)]
    augmented = augment(images, draws(right=[r for r, _ in moves], down=[d for _, d in moves]), Augment(shift=0.2))
    for changed, image, (right, down) in zip(augmented, images, [(2, -1), (-4, 4), (1, 0), (0, -4)], strict=True):
        assert_equal(changed, shifted(image, right, down))


def test_a_flip_mirrors_left_and_right_and_nothing_else(images):
    augmented = augment(images, draws(flip=[0.5, -0.5, 0.01, -0.01]), Augment(flip=True))
    for changed, image, mirrored in zip(augmented, images, [True, False, True, False], strict=True):
        assert_equal(changed, image.flip(2) if mirrored else image)
    off = augment(images, draws(flip=0.9, right=0.5), Augment(shift=0.2))
    assert_equal(off[0], shifted(images[0], 2, 0))


def test_an_image_is_shifted_before_it_is_mirrored(images):
    augmented = augment(images, draws(flip=0.9, right=1.0, down=-0.5), Augment(flip=True, shift=0.2))
    for changed, image in zip(augmented, images, strict=True):
        assert_equal(changed, shifted(image, 4, -2).flip(2))


def test_a_zoom_enlarges_around_the_middle():
    """A line through the image gets so much steeper or flatter; where a smaller image ends, its edge goes on."""
    ramp = (4.0 * (torch.arange(SIZE) - 9.5) + 100).expand(COUNT, 3, SIZE, SIZE)
    augmented = augment(ramp, draws(zoom=[1.0, -1.0, 0.5, 0.0]), Augment(zoom=0.25))
    for image, scale in zip(augmented, (1.25, 0.75, 1.125, 1.0), strict=True):
        expected = 4 * ((torch.arange(SIZE) - 9.5) / scale).clamp(-9.5, 9.5) + 100
        assert_equal(image, expected.expand(3, SIZE, SIZE), 1e-3)
    upright = augment(ramp.transpose(2, 3), draws(zoom=[1.0, -1.0, 0.5, 0.0]), Augment(zoom=0.25))
    assert_equal(upright, augmented.transpose(2, 3))


def test_brightness_multiplies_and_stays_an_image(images):
    augmented = augment(images, draws(brightness=[1.0, -1.0, 0.5, 0.0]), Augment(brightness=0.4))
    for changed, image, factor in zip(augmented, images, (1.4, 0.6, 1.2, 1.0), strict=True):
        assert_equal(changed, (image.float() * factor).clamp(max=255))


def test_contrast_stretches_around_the_images_mean(images):
    augmented = augment(images, draws(contrast=[1.0, -1.0, 0.5, 0.0]), Augment(contrast=0.4))
    for changed, image, factor in zip(augmented, images, (1.4, 0.6, 1.2, 1.0), strict=True):
        mean = image.float().mean()
        assert_equal(changed, (mean + (image.float() - mean) * factor).clamp(0, 255))


def test_an_image_depends_only_on_its_own_draws(images):
    drawn = torch.from_numpy(augmentation_draws(0, 0, 0, COUNT, KINDS))
    whole = augment(images, drawn, EVERYTHING)
    for k in range(COUNT):
        assert_equal(augment(images[k : k + 1], drawn[k : k + 1], EVERYTHING), whole[k : k + 1])
    assert whole.min() >= 0
    assert whole.max() <= 255


# ---- what is drawn -------------------------------------------------------------------------------------------------


def test_draws_are_even_and_other_ones_in_every_step():
    drawn = {key: augmentation_draws(*key, 500, KINDS) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))}
    for values in drawn.values():
        assert values.dtype == np.float32
        assert values.shape == (500, KINDS)
        assert values.min() >= -1
        assert values.max() < 1
        np.testing.assert_allclose(values.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(values.std(0), 1 / np.sqrt(3), atol=0.05)
        np.testing.assert_allclose(np.corrcoef(values.T), np.eye(KINDS), atol=0.2)
    assert len({values.tobytes() for values in drawn.values()}) == 4
    assert np.array_equal(drawn[0, 0, 1], augmentation_draws(0, 0, 1, 500, KINDS))


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 20), st.none() | st.integers(1, 60))
def test_the_ranks_together_have_the_draws_of_the_global_batch(seed, size, ranks, per_device):
    everyones = augmentation_draws(seed, 3, 7, size, KINDS)
    batch = np.random.default_rng(seed).permutation(100)[:size]
    steps_per_rank = accumulation(size, ranks, per_device)
    dealt = [micro for rank in range(ranks) for micro in micro_batches(batch, rank, ranks, steps_per_rank)]
    places = np.concatenate([micro.batch_indices[micro.weight > 0] for micro in dealt])
    assert np.array_equal(
        np.concatenate([everyones[micro.batch_indices[micro.weight > 0]] for micro in dealt]), everyones
    )
    assert np.array_equal(places, np.arange(size))
    for micro in dealt:
        assert np.array_equal(batch[micro.batch_indices], micro.positions)


# ---- in training ---------------------------------------------------------------------------------------------------


def test_training_with_augmentation_does_not_depend_on_the_number_of_processes(hybrid_run_on):
    """The run's readouts begin at a ridge, so that already the first loss depends on the images."""
    assert losses(hybrid_run_on(2)) == pytest.approx(losses(hybrid_run_on(1)), rel=1e-4)
