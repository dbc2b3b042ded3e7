"""The loader gives the same stimuli in the same order on any processes, with the exact pixels of the source."""

import io
import shutil

import numpy as np
import psutil
import pytest
import torch
from hostile import sealed
from make_sources import make_folder, make_images
from PIL import Image

from data_prep.common.errors import BadInput
from data_prep.common.image_decoding import decode
from data_prep.recording import Recording, Stimulus
from data_prep.shards.folder import ShardFolder
from data_prep.shards.index import index_shard
from data_prep.shards.members import MEMBERS
from data_prep.shards.packing import pack
from data_prep.shards.summary import contact_sheet
from data_prep.sources.folder import Folder
from train.data.batch_buffers import BatchBuffers
from train.data.batches import Batch
from train.data.decoding import decode_into, fit
from train.data.loader import TrainLoader, evaluation_loader, rank_positions, workers_per_rank
from train.data.order import global_batch
from train.data.stimuli import RecordingStimuli
from train.models.network import Network
from train.run.recipe import Recipe


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """50 PNGs, 30 of them for training; a tenth of the responses is missing."""
    path = tmp_path_factory.mktemp("recording")
    written = make_folder(path / "src", n=50, splits=True)
    written.rates[np.random.default_rng(0).uniform(size=written.rates.shape) < 0.1] = np.nan
    np.save(path / "src" / "rates.npy", written.rates)
    written.shards = pack(Folder(source=path / "src").open(), path / "shards", stimuli_per_shard=12, workers=1)
    written.train = [row for row, split in enumerate(written.splits) if split == "train"]
    return written


@pytest.fixture(scope="module")
def stimuli(recording):
    return RecordingStimuli(recording.shards.split("train"), 32, classes=True)


def train_loader(stimuli, rank=0, ranks=1, workers=0, global_size=7, per_device=None, seed=5):
    return TrainLoader(
        stimuli,
        seed=seed,
        global_size=global_size,
        per_device=per_device,
        rank=rank,
        ranks=ranks,
        workers=workers,
        pin=False,
    )


def read_steps(loader, epoch=0, first_step=0):
    return list(loader.epoch(epoch, first_step))


def assert_same_batch(one: Batch, other: Batch):
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.rates.nan_to_num(-1), other.rates.nan_to_num(-1))
    assert (one.global_stimuli, one.global_observed) == (other.global_stimuli, other.global_observed)


def assert_same_steps(one, other):
    assert [len(step) for step in one] == [len(step) for step in other]
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert_same_batch(a, b)


def counted(batches) -> list[int]:
    """The positions with weight, in order."""
    return [int(position) for batch in batches for position in batch.positions[batch.weight > 0]]


# ---- what is in a batch --------------------------------------------------------------------------------------------


def test_a_batch_holds_the_sources_pixels_responses_and_labels(recording, stimuli):
    seen = 0
    for (batch,) in train_loader(stimuli, global_size=30).epoch(0):
        rows = [recording.train[position] for position in batch.positions]
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), recording.images[rows])
        assert batch.rates.dtype == torch.float32
        assert np.array_equal(batch.rates.numpy(), recording.rates[rows], equal_nan=True)
        assert [recording.shards.manifest.classes[k] for k in batch.labels] == [recording.objects[row] for row in rows]
        assert [stimuli.stimulus_ids[position] for position in batch.positions] == [recording.ids[row] for row in rows]
        seen += len(rows)
    assert seen == 30


def test_arrays_that_were_not_requested_are_absent(recording):
    bare = RecordingStimuli(recording.shards.split("val"), 32, responses=False)
    (batch,) = evaluation_loader(bare, size=10, rank=0, ranks=1, workers=0, pin=False)
    assert batch.rates is None
    assert batch.labels is None
    assert batch.global_observed == 0


def test_a_subset_of_a_split_has_its_own_positions(recording, stimuli):
    subset = np.array([29, 3, 17, 8])
    part = RecordingStimuli(recording.shards.split("train"), 32, subset=subset, classes=True)
    (batch,) = evaluation_loader(part, size=4, rank=0, ranks=1, workers=0, pin=False)
    (whole,) = evaluation_loader(stimuli, size=30, rank=0, ranks=1, workers=0, pin=False)
    assert len(part) == 4
    assert part.stimulus_ids == [stimuli.stimulus_ids[position] for position in subset]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert torch.equal(batch.images, whole.images[subset])
    assert torch.equal(batch.labels, whole.labels[subset])
    assert torch.equal(batch.rates.nan_to_num(-1), whole.rates[subset].nan_to_num(-1))


def test_z_scores_are_standard_over_train_and_invert_to_the_recorded_rates(recording, stimuli):
    recipe = Recipe.model_validate({"backbone": {"name": "resnet10t", "weights": "random"}})
    rates = torch.from_numpy(stimuli.rates)
    responses = Network(recipe, recording.shards.manifest, 32).objective.responses
    z = responses.target(rates)
    np.testing.assert_allclose(np.nanmean(z.double(), axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(z.double(), axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(responses.to_rates(z), recording.rates[recording.train], rtol=1e-5)


# ---- training ------------------------------------------------------------------------------------------------------


def test_workers_change_nothing(stimuli):
    """Over several epochs, after an epoch that was abandoned, and when one is resumed."""
    alone, helped = (train_loader(stimuli, workers=workers, per_device=3) for workers in (0, 2))
    half_way = helped.epoch(0)
    next(half_way)
    del half_way
    for epoch, first_step in ((0, 0), (1, 0), (1, 2)):
        assert_same_steps(read_steps(alone, epoch, first_step), read_steps(helped, epoch, first_step))
    files = psutil.Process().num_fds()
    kept = [(batch.positions, batch.weight, batch.rates) for step in helped.epoch(2) for batch in step]
    assert psutil.Process().num_fds() - files < len(kept)  # what a run keeps of its batches holds no files open


@pytest.mark.parametrize("per_device", [None, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_ranks_together_see_the_same_step(recording, stimuli, ranks, per_device):
    everyone = [read_steps(train_loader(stimuli, rank, ranks, per_device=per_device), epoch=3) for rank in range(ranks)]
    assert {len(steps) for steps in everyone} == {4}
    for step in range(4):
        expected = global_batch(5, 3, step, 7, 30)
        batches = [batch for steps in everyone for batch in steps[step]]
        assert counted(batches) == expected.tolist()
        assert sum(float(batch.weight.sum()) for batch in batches) == 7
        assert {batch.global_stimuli for batch in batches} == {7}
        rates = recording.rates[np.array(recording.train)[expected]]
        assert {batch.global_observed for batch in batches} == {int((~np.isnan(rates)).sum())}
        assert all(1 <= len(batch.positions) <= (per_device or 7) for batch in batches)
        assert len({len(steps[step]) for steps in everyone}) == 1


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_an_epoch_resumed_at_a_step_is_the_tail_of_the_whole(stimuli, first_step):
    whole = read_steps(train_loader(stimuli, 1, 2, per_device=2), epoch=6)
    assert_same_steps(
        read_steps(train_loader(stimuli, 1, 2, per_device=2), epoch=6, first_step=first_step), whole[first_step:]
    )


def test_a_run_can_go_on_with_another_number_of_ranks(stimuli):
    before = [step for rank in range(3) for step in read_steps(train_loader(stimuli, rank, 3))[:2]]
    after = [step for rank in range(2) for step in read_steps(train_loader(stimuli, rank, 2), first_step=2)]
    shown = [position for step in before + after for position in counted(step)]
    assert len(shown) == len(set(shown)) == 28
    assert set(shown) == {position for step in read_steps(train_loader(stimuli)) for position in counted(step)}


def test_epochs_and_seeds_differ(stimuli):
    one, other = train_loader(stimuli, seed=5), train_loader(stimuli, seed=6)
    orders = [
        tuple(position for step in read_steps(loader, epoch) for position in counted(step))
        for loader, epoch in ((one, 0), (one, 1), (other, 0), (one, 0))
    ]
    assert len(set(orders)) == 3
    assert orders[0] == orders[3]


def test_fewer_stimuli_than_a_batch_make_one_step(recording):
    few = RecordingStimuli(recording.shards.split("train"), 32, subset=np.arange(5))
    ((batch,),) = read_steps(train_loader(few, global_size=64))
    assert sorted(counted([batch])) == [0, 1, 2, 3, 4]
    assert batch.global_stimuli == 5


def test_more_processes_than_stimuli_in_a_batch_are_refused(stimuli):
    with pytest.raises(BadInput, match="9 processes cannot share a global batch of 7 stimuli"):
        train_loader(stimuli, ranks=9)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_takes_every_stimulus_once(stimuli, ranks, size):
    everyone = [
        list(evaluation_loader(stimuli, size=size, rank=rank, ranks=ranks, workers=0, pin=False))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in everyone}) == 1
    assert {tuple(batch.images.shape) for batches in everyone for batch in batches} == {(size, 3, 32, 32)}
    assert sorted(position for batches in everyone for position in counted(batches)) == list(range(30))
    assert sum(batch.global_stimuli for batches in everyone for batch in batches) == 30
    assert sum(batch.global_observed for batches in everyone for batch in batches) == int(
        (~np.isnan(stimuli.rates)).sum()
    )
    for rank, batches in enumerate(everyone):
        assert counted(batches) == rank_positions(30, rank, ranks).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_sentence(recording, tmp_path, workers):
    shutil.copytree(recording.shards.folder, tmp_path / "shards")
    tar = tmp_path / "shards" / "train-000001.tar"
    index, png = index_shard(tar), MEMBERS.index("png")
    data = bytearray(tar.read_bytes())
    data[index.offset[2, png] + index.size[2, png] // 2] ^= 0xFF
    tar.write_bytes(data)
    damaged = RecordingStimuli(ShardFolder(tmp_path / "shards").split("train"), 32)
    with pytest.raises(BadInput) as caught:
        list(evaluation_loader(damaged, size=8, rank=0, ranks=1, workers=workers, pin=False))
    message = str(caught.value)
    assert f"{tar}: {index.stimulus_id[2]}.png: these are not the bytes that were packed" in message
    assert "\n" not in message


def test_cores_are_shared_out_as_workers():
    assert workers_per_rank(None, cores=4) == 3
    assert workers_per_rank(None, cores=1) == 0
    assert workers_per_rank(None, cores=256) == 16
    assert workers_per_rank(20, cores=2) == 20
    assert workers_per_rank(0, cores=64) == 0


# ---- decoding ------------------------------------------------------------------------------------------------------

IMAGE = make_images(1, size=33)[0][0]


def encoded(image: Image.Image, encoding: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format={"jpg": "JPEG", "png": "PNG"}[encoding], **options)
    return file.getvalue()


IMAGES = {
    "png": (Image.fromarray(IMAGE), "png", {}),
    "greyscale png": (Image.fromarray(IMAGE).convert("L"), "png", {}),
    "black-and-white png": (Image.fromarray(IMAGE).convert("1"), "png", {}),
    "palette png": (Image.fromarray(IMAGE).quantize(16), "png", {}),
    "palette png with a transparent colour": (Image.fromarray(IMAGE).quantize(16), "png", {"transparency": 3}),
    "transparent png": (Image.fromarray(np.dstack([IMAGE, IMAGE[..., 0]])), "png", {}),
    "transparent greyscale png": (Image.fromarray(np.dstack([IMAGE[..., 0], IMAGE[..., 1]]), "LA"), "png", {}),
    "jpg": (Image.fromarray(IMAGE), "jpg", {}),
    "fine jpg": (Image.fromarray(IMAGE), "jpg", {"quality": 98, "subsampling": 0}),
    "progressive jpg": (Image.fromarray(IMAGE), "jpg", {"progressive": True}),
    "greyscale jpg": (Image.fromarray(IMAGE).convert("L"), "jpg", {}),
    "CMYK jpg": (Image.fromarray(IMAGE).convert("CMYK"), "jpg", {}),
    "RGB jpg": (Image.fromarray(IMAGE), "jpg", {"keep_rgb": True}),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_is_decoded_as_pillow_does(kind):
    image, encoding, options = IMAGES[kind]
    data = encoded(image, encoding, **options)
    pixels = decode(data, encoding)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (33, 33, 3)
    assert np.ptp(pixels) > 50
    tolerance = 2 if encoding == "jpg" else 0  # grey levels; another build of libjpeg may round otherwise
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    for size in (33, 20, 48):
        decoded = np.zeros((size, size, 3), np.uint8)
        decode_into(decoded, memoryview(data), encoding)
        assert np.array_equal(decoded, fit(pixels, size))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_raw_pixels_are_taken_as_they_are():
    grey = np.repeat(IMAGE[..., :1], 3, axis=2)
    for array, expected in ((IMAGE, IMAGE), (grey[..., 0], grey), (grey[..., :1], grey), (IMAGE[::-1], None)):
        decoded = np.empty_like(IMAGE)
        decode_into(decoded, memoryview(npy(array)), "image.npy")
        assert np.array_equal(decoded, array if expected is None else expected)


@pytest.mark.parametrize(
    "array", [IMAGE.astype(np.uint16), IMAGE / 255, IMAGE[..., :2], IMAGE[0, 0], IMAGE[:0]], ids=repr
)
def test_raw_pixels_of_another_kind_are_refused(array):
    with pytest.raises(ValueError, match=r"raw pixels must be uint8 \(H, W, 3\), not (uint|float)"):
        decode(npy(array), "image.npy")
    with pytest.raises(ValueError, match="not a complete npy array"):
        decode(npy(IMAGE)[:-1], "image.npy")


class Raw(Recording):
    """A source whose images are raw pixels."""

    name, provenance, sites = "raw", {}, [{"id": "n0"}]

    def __init__(self, images: np.ndarray):
        self.images, self.stimulus_ids = images, [f"s{number}" for number in range(len(images))]
        self.splits = ["train"] * len(images)

    def read(self, indices):
        for index in indices:
            rates = np.full(1, index, np.float32)
            yield Stimulus(self.stimulus_ids[index], npy(self.images[index]), "image.npy", rates)


def test_raw_members_are_packed_read_and_shown(tmp_path):
    raw_images = make_images(6, size=32)[0]
    shards = pack(Raw(raw_images), tmp_path / "shards", stimuli_per_shard=4, workers=1)
    (batch,) = evaluation_loader(
        RecordingStimuli(shards.split("train"), 32), size=6, rank=0, ranks=1, workers=0, pin=False
    )
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), raw_images)
    assert contact_sheet(shards.split("train"), 3, 2, 48).size == (144, 124)
    assert all(fault is None for _, fault in shards.verify())


def test_an_index_from_before_raw_members_is_read(recording, tmp_path):
    shutil.copytree(recording.shards.folder, tmp_path / "shards")
    with np.load(tmp_path / "shards" / "index.npz") as arrays:
        old = {
            name: array[..., :6] if name.endswith(("members", "offset", "size")) else array
            for name, array in arrays.items()
            if not name.endswith("crc32")
        }
    np.savez(tmp_path / "shards" / "index.npz", **old)
    sealed(tmp_path / "shards")
    stimuli = RecordingStimuli(ShardFolder(tmp_path / "shards").split("train"), 32)
    (batch,) = evaluation_loader(stimuli, size=30, rank=0, ranks=1, workers=0, pin=False)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), recording.images[recording.train])
    assert all(fault is None for _, fault in ShardFolder(tmp_path / "shards").verify())


@pytest.mark.parametrize("encoding", ["jpg", "png"])
def test_an_image_that_lacks_but_its_end_is_damaged(encoding):
    for options in ({}, {"progressive": True}):
        data = encoded(Image.fromarray(IMAGE), encoding, **options)
        for end in range(len(data) - 12, len(data)):
            with pytest.raises(ValueError, match=r"."):
                decode_into(np.empty_like(IMAGE), memoryview(data)[:end], encoding)


def test_16_bit_greyscale_is_scaled_or_refused_not_clipped_to_white():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encoded(Image.fromarray(ramp.astype(np.uint16) * 257), "png")
    try:
        pixels = decode(data, "png")
    except ValueError:
        return
    assert np.abs(pixels.astype(int) - ramp[..., None]).max() <= 1


@pytest.mark.parametrize("encoding", ["jpg", "png"])
def test_a_damaged_image_is_a_value_error_whatever_the_damage(encoding):
    data = encoded(Image.fromarray(IMAGE), encoding)
    for end in range(0, len(data), 40):
        with pytest.raises(ValueError, match=r"."):
            decode(data[:end], encoding)
    rng = np.random.default_rng(0)
    for offset in rng.integers(0, len(data), 60):
        broken = bytearray(data)
        broken[offset] ^= rng.integers(1, 256)
        try:
            pixels = decode(bytes(broken), encoding)
        except ValueError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3


# ---- fitting -------------------------------------------------------------------------------------------------------


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(32, 32)
    assert np.array_equal(fit(image, 32), image)


@pytest.mark.parametrize(("height", "width"), [(32, 40), (40, 32), (32, 96)])
def test_the_longer_side_is_cropped_centrally(height, width):
    image = noise(height, width)
    top, left = (height - 32) // 2, (width - 32) // 2
    assert np.array_equal(fit(image, 32), image[top : top + 32, left : left + 32])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (20, 20), (17, 31)])
def test_other_sizes_are_resized_bicubically_and_cropped(height, width):
    image = Image.fromarray(make_images(1, size=96)[0][0]).resize((width, height), Image.Resampling.BICUBIC)
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC), int)
    pixels = fit(np.asarray(image), 32)
    assert pixels.shape == (32, 32, 3)
    assert np.abs(pixels - expected)[3:-3, 3:-3].max() <= 6  # at the edges the uncropped neighbours count


def test_a_crop_that_needs_no_resizing_does_not_blur():
    """33 pixels to 32: either 32 of them, not the means of neighbours."""
    image = noise(32, 33)
    pixels = fit(image, 32)
    assert any(np.array_equal(pixels, image[:, left : left + 32]) for left in (0, 1))


# ---- memory --------------------------------------------------------------------------------------------------------


def test_memory_is_reused_only_when_no_view_of_a_batch_is_left():
    buffers, shape = BatchBuffers(), (2, 4, 4, 3)
    batch = buffers.allocate(shape)
    address, view = batch.data_ptr(), batch.permute(0, 3, 1, 2)[1:]
    del batch
    assert buffers.allocate(shape).data_ptr() != address
    array = view.numpy()
    del view
    assert buffers.allocate(shape).data_ptr() != address
    del array
    allocated = [buffers.allocate(shape) for _ in range(9)]
    assert address in {batch.data_ptr() for batch in allocated}
    assert len({batch.data_ptr() for batch in allocated}) == 9
    assert buffers.allocate((1, 4, 4, 3)).shape == (1, 4, 4, 3)


def test_batches_that_are_kept_are_not_overwritten(stimuli):
    loader = train_loader(stimuli)
    assert_same_steps(list(loader.epoch(0)), [[loader.stimuli[request]] for request in loader._requests(0, 0)])
