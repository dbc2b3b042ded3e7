"""Images that look alike are told, unrelated ones and true copies are not."""

import io

import numpy as np
import pytest
from helpers import succeed_here
from hypothesis import given, settings
from hypothesis import strategies as st
from make_sources import make_images
from make_tars import members_of, write_tar
from PIL import Image

from data_prep.shards.folder import ShardFolder
from data_prep.shards.near_copies import find_pairs, near_copies, thumbnail

IMAGES, _ = make_images(30, size=96, n_objects=30, seed=5)

CHANGES = {
    "compressed": lambda image: image,
    "scaled": lambda image: image.resize((61, 61)),
    "brighter": lambda image: image.point(lambda value: min(255, int(1.1 * value + 5))),
    "grey": lambda image: image.convert("L"),
}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tars(path, train: dict[str, bytes], val: dict[str, bytes], kind: str = "jpg") -> ShardFolder:
    for split, images in (("train", train), ("val", val)):
        write_tar(path / f"{split}.tar", members_of({name: {kind: data} for name, data in images.items()}))
    return ShardFolder(path)


@pytest.mark.parametrize("change", CHANGES)
def test_an_image_in_another_form_is_found(tmp_path, change):
    train = {f"t{k:02d}": encoded(Image.fromarray(image), "JPEG", quality=95) for k, image in enumerate(IMAGES)}
    val = {"again": encoded(CHANGES[change](Image.fromarray(IMAGES[7])), "JPEG", quality=40)}
    found = near_copies(write_tars(tmp_path, train, val))
    assert found.pairs == [("t07 (train)", "again (val)")]
    assert (found.images, found.across) == (31, 1)
    text = succeed_here("data_prep/show.py", tmp_path, "--near-copies").stdout
    assert "1 pairs among 31 images look alike without being the same, 1 of them in train and held out" in text
    assert "t07 (train) and again (val)" in text


def test_true_copies_unrelated_images_and_flat_ones_are_not_told(tmp_path):
    train = {f"t{k:02d}": encoded(Image.fromarray(image)) for k, image in enumerate(IMAGES)}
    train |= {f"flat{grey}": encoded(Image.new("RGB", (96, 96), (grey,) * 3)) for grey in (0, 100, 101, 255)}
    found = near_copies(write_tars(tmp_path, train, {"copy": train["t03"]}, "png"))
    assert str(found) == "near-copies: none among 35 images"


def test_pairs_within_train_come_last(tmp_path):
    train = {f"t{k}": encoded(Image.fromarray(IMAGES[k // 2]), "JPEG", quality=90 - 40 * (k % 2)) for k in range(4)}
    val = {"v": encoded(Image.fromarray(IMAGES[1]), "JPEG", quality=70)}
    found = near_copies(write_tars(tmp_path, train, val))
    assert found.across == 2
    assert {pair[1] for pair in found.pairs[:2]} == {"v (val)"}
    assert set(found.pairs[2:]) == {("t0 (train)", "t1 (train)"), ("t2 (train)", "t3 (train)")}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(30, 95), st.floats(0.5, 1.5), st.floats(-20, 20))
def test_photographs_like_images_stay_apart_whatever_their_form(seed, quality, contrast, brightness):
    """Two random images of one kind never look alike, however they are changed; one and its changed form do."""
    random = np.random.default_rng(seed)
    first, second = (
        Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(2)
    )
    changed = np.clip((np.asarray(first, float) - 128) * contrast * 0.6 + 128 + brightness, 0, 255).astype(np.uint8)
    data = [
        encoded(first, "JPEG"),
        encoded(second, "JPEG", quality=quality),
        encoded(Image.fromarray(changed), "JPEG", quality=quality),
    ]
    assert list(find_pairs(np.stack([thumbnail(memoryview(image), "jpg") for image in data]))) == [(0, 2)]
