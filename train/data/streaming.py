"""Training batches from webdataset's own streaming pipeline: tars drawn with replacement, read from front to back.

For disks that are slow at random reads. It promises less than `train/data/loader.py`:

- A stimulus may come twice in an epoch, or not at all; one in a tar with fewer stimuli comes more often. An epoch has
  as many steps as it would take to see every stimulus once.
- Which stimuli make a step depends on the number of ranks and workers. With both unchanged a run repeats.
- A resumed run continues at its step with a new stream, seeded by that step: not the one it would have had.
- Where responses are missing, the loss of a batch is divided by the average number recorded in a batch.

Every rank takes the same number of steps. Nothing is ever evaluated this way.
"""

import itertools
import os
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_prep.common.errors import BadInput
from data_prep.shards.members import BLOCK, IMAGE_MEMBERS, is_ignored, key_and_kind, not_plain
from train.data.batch_buffers import BatchBuffers
from train.data.batches import Batch, BatchRequest
from train.data.decoding import decode_into
from train.data.loader import TrainLoader, data_loader
from train.data.order import MicroBatch, augmentation_draws, micro_batches, stream_seed

SHUFFLED = 1000  # encoded images that a worker holds, to take the next one from at random


class StreamLoader(TrainLoader):
    """The training batches of one rank, as a stream that continues over epochs; arguments as for `TrainLoader`."""

    def _open(self, workers: int, pin: bool) -> None:
        self._workers, self._pin = workers, pin
        self._stream: Iterator[Batch] = iter(())
        self._next_step: int | None = None

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Yield each global step's micro-batches, `accumulation_steps` of them, from `first_step` on."""
        if self._next_step != epoch * self.steps + first_step:
            self._next_step = epoch * self.steps + first_step
            self._stream = iter(data_loader(_Stream(self, self._next_step), None, self._workers, self._pin))
        for _ in range(first_step, self.steps):
            step = [next(self._stream) for _ in range(self.accumulation_steps)]
            self._next_step += 1
            yield step


class _Stream(IterableDataset):
    """An endless stream of a rank's micro-batches; workers take turns. `first_step` is counted over all epochs."""

    def __init__(self, loader: TrainLoader, first_step: int):
        self.first_step, self.steps, self.accumulation_steps = first_step, loader.steps, loader.accumulation_steps
        (self.stimuli,) = loader.stimuli.recordings
        self.seed, self.draws = loader.seed, loader.draws
        self.rank, self.ranks, self.global_size = loader.rank, loader.ranks, loader.global_size
        self.buffers = BatchBuffers()
        split = self.stimuli.split
        self.sizes = {str(split.folder / shard.file): shard.bytes for shard in split.shards}
        self.micro_batches = micro_batches(np.arange(self.global_size), self.rank, self.ranks, self.accumulation_steps)
        observed = self.stimuli.observed
        self.observed = 0 if observed is None else round(self.global_size * float(observed.mean()))

    def __iter__(self) -> Iterator[Batch | BadInput]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        samples = self._samples(self.rank * workers + worker, self.ranks * workers)
        for number in itertools.count(worker, workers):
            step, index = divmod(number, self.accumulation_steps)
            try:
                yield self._batch(samples, self.first_step + step, self.micro_batches[index])
            except BadInput as error:
                yield error
                return

    def _samples(self, consumer: int, consumers: int) -> Iterator[dict[str, Any]]:
        """Encoded images of stimuli to fit, in the order in which one of the workers of all ranks takes them."""
        seed = stream_seed(self.seed, self.first_step)
        tars = webdataset.ResampledShards(
            list(self.sizes),
            seed=seed,
            worker_seed=lambda: 0,  # the same list for all, of which each takes its share
            deterministic=True,
        )
        return iter(
            webdataset.DataPipeline(
                tars,
                lambda drawn: itertools.islice(drawn, consumer, None, consumers),
                self._images,
                group_by_keys,
                self._to_fit,
                webdataset.shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(stream_seed(seed, consumer))),
            )
        )

    def _images(self, tars: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The members of the tars that are images; responses and labels are in memory already.

        Files are opened directly: webdataset's own `gopen` would run a shell for some names.
        """
        for tar in tars:
            try:
                with open(tar["url"], "rb") as stream:
                    self._check_same(tar["url"], stream.fileno())
                    # A stream would unpack a compressed file, however large it becomes; this refuses one.
                    tarfile.TarInfo.frombuf(os.pread(stream.fileno(), BLOCK, 0), "utf-8", "surrogateescape")
                    yield from _images_of(tar_file_expander([tar | {"stream": stream}]), tar["url"])
            except (OSError, tarfile.TarError, RecursionError) as error:
                reason = getattr(error, "strerror", None) or error.args[0]
                raise BadInput(f"{tar['url']} cannot be read to its end ({reason}); copy it again") from None

    def _check_same(self, tar: str, descriptor: int) -> None:
        """Refuse a tar that was cut or replaced: a stream that ends early does not show what is missing."""
        size, expected = os.fstat(descriptor).st_size, self.sizes[tar]
        if size != expected:
            raise BadInput(f"{tar} has {size} bytes, but had {expected} when it was indexed; copy it again")

    def _to_fit(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples to fit, each with its position; others in the tars are held out."""
        position_of = {key: position for position, key in enumerate(self.stimuli.stimulus_ids)}
        known = set(self.stimuli.split.stimulus_ids)
        for sample in samples:
            key = sample["__key__"]
            if key not in known:
                raise BadInput(f"{sample['__url__']}: {key}: was added after the run began; restart it")
            if key in position_of:
                yield sample | {"position": position_of[key]}

    def _batch(self, samples: Iterator[dict[str, Any]], step: int, template: MicroBatch) -> Batch:
        drawn = list(itertools.islice(samples, len(template.batch_indices)))
        size = self.stimuli.size
        images = self.buffers.allocate((len(drawn), size, size, 3))
        for sample, pixels in zip(drawn, images.numpy(), strict=True):
            self._decode(sample, pixels)
        micro_batch = replace(template, positions=np.array([sample["position"] for sample in drawn]))
        draws = self._draws_of(step, template.batch_indices)
        return self.stimuli.batch(images, BatchRequest(micro_batch, self.global_size, self.observed, draws=draws))

    def _decode(self, sample: dict[str, Any], pixels: np.ndarray) -> None:
        encoding = next(kind for kind in IMAGE_MEMBERS if kind in sample)
        self.stimuli.split.check_bytes(int(self.stimuli.subset[sample["position"]]), encoding, sample[encoding])
        try:
            decode_into(pixels, sample[encoding], encoding)
        except ValueError as error:
            where = f"{sample['__url__']}: {sample['__key__']}.{encoding}"
            raise BadInput(f"{where} cannot be decoded ({error})") from None

    def _draws_of(self, step: int, batch_indices: np.ndarray) -> np.ndarray | None:
        if not self.draws:
            return None
        epoch, step = divmod(step, self.steps)
        return augmentation_draws(self.seed, epoch, step, self.global_size, self.draws)[batch_indices]


def _images_of(members: Iterable[dict[str, Any]], tar: str) -> Iterator[dict[str, Any]]:
    for member in members:
        if not member:  # marks the end of a tar
            yield member
            continue
        if is_ignored(member["fname"]):
            continue
        name = key_and_kind(member["fname"])
        if name is None:
            raise not_plain(tar, member["fname"])
        if name[1] in IMAGE_MEMBERS:
            yield member | {"fname": ".".join(name)}
