"""The training loop, to be read from top to bottom: epochs, steps, micro-batches; then score, select, save."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_prep.common.errors import Stopped
from data_prep.common.progress import Progress as ProgressBar
from train.data.augment import augment
from train.data.batches import Batch
from train.data.loader import TrainLoader
from train.distributed.engine import Engine
from train.distributed.runtime import Runtime
from train.evaluation.scoring import Scores
from train.finetuning.bottlenecks import Bottlenecks
from train.finetuning.charts import TrainingCharts
from train.finetuning.checkpointing import CheckpointWriter
from train.finetuning.early_stopping import EarlyStopping
from train.finetuning.ema import RunningAverage
from train.finetuning.epoch_log import EpochLog, TrainedEpoch
from train.finetuning.epoch_loss import EpochLoss
from train.finetuning.non_finite_steps import NonFiniteSteps
from train.finetuning.schedule import plateaus, set_rates
from train.finetuning.seeding import StepSeeds
from train.finetuning.selection_scoring import SelectionScoring
from train.models.network import Network
from train.run.folder import RunFolder
from train.run.monitor import Monitor
from train.run.progress import Progress
from train.run.recipe import Recipe

STEPS_BETWEEN_READS = 10  # of the losses; each read waits for the device


@dataclass
class Training:
    """Everything a run consists of.

    Attributes:
        recipe: its settings.
        folder: where it is written.
        runtime: this process.
        engine: network and optimizer as the strategy wraps them.
        network: the network itself.
        average: running average of its weights, or None.
        loader: this rank's training batches.
        scoring: scores the stimuli that select the best epoch.
        monitor: log and charts.
        progress: where the run stands.
    """

    recipe: Recipe
    folder: RunFolder
    runtime: Runtime
    engine: Engine
    network: Network
    average: RunningAverage | None
    loader: TrainLoader
    scoring: SelectionScoring
    monitor: Monitor
    progress: Progress

    def __post_init__(self) -> None:
        recipe, runtime, monitor = self.recipe, self.runtime, self.monitor
        fit, selection = self.scoring.fit, self.scoring.selection
        self._seeds = StepSeeds(recipe.seed, runtime.rank, runtime.device)
        self._early_stopping = EarlyStopping(recipe.early_stopping.patience, self.progress, selection)
        self._epoch_loss = EpochLoss(runtime, self.progress)
        self._non_finite = NonFiniteSteps(self.network, fit, runtime, recipe.faults.bad_steps, monitor.log)
        self._checkpoints = CheckpointWriter(
            self.folder.checkpoints, recipe.checkpoint.keep, self.engine, self.network, self.average, runtime
        )
        self._charts = TrainingCharts(self.network, runtime, monitor, fit, selection, self.progress.selection_split)
        self._log = EpochLog(monitor, self.progress, recipe.epochs)
        self._bottlenecks = Bottlenecks()

    def run(self) -> None:
        """Train until the epochs or the patience are used up.

        Raises:
            Stopped: a process was asked to stop; a checkpoint is saved.
            RunFailed: the loss stayed infinite or NaN, or a checkpoint cannot be saved.
        """
        if self.progress.step == 0 and self.recipe.readout.start != "zero":
            self._score_start()
        while self.progress.epoch < self.recipe.epochs and not self._early_stopping.out_of_patience:
            try:
                epoch = self._train_epoch()
                training_ended = time.monotonic()
                scores = self.scoring.scores()
            except Stopped as stop:
                self._save_mid_epoch()
                raise Stopped(f"{stop} after step {self.progress.step}; saved") from None
            self._end_epoch(epoch, scores, time.monotonic() - training_ended)
        self._log.end(self._early_stopping.out_of_patience)

    def _score_start(self) -> None:
        """Score and save a start in closed form: an epoch has to improve on it to be the best."""
        started = time.monotonic()
        scores = self.scoring.scores()
        self._early_stopping.update(scores)
        self._log.start(scores, time.monotonic() - started)
        self._checkpoints.save(self.progress)

    def _train_epoch(self) -> TrainedEpoch:
        """One pass over the training stimuli, or what is left of it.

        Raises:
            RunFailed: no step had a finite loss, or too many in a row had none.
        """
        started, first_step = time.monotonic(), self.progress.step
        with self.runtime.cudnn_autotuning(self.recipe.deterministic):
            waited = self._take_steps()
            loss = self._epoch_loss.mean(self.loader.steps)
        seconds, steps = time.monotonic() - started, self.progress.step - first_step
        return TrainedEpoch(
            loss=loss,
            train_scores=self._charts.train_scores(),
            steps=steps,
            images_per_second=steps * self.loader.global_size / seconds,
            seconds=seconds,
            data_wait_seconds=sum(waited),
            first_wait_seconds=waited[0] if waited else 0.0,
        )

    def _take_steps(self) -> list[float]:
        """The optimizer steps that are left of this epoch; returns the seconds that each waited for images."""
        self.network.train()
        self._epoch_loss.begin()
        drops = plateaus(self.recipe.schedule, self.progress.improved)
        first_step, waited = self._steps_into_epoch, list[float]()
        label = f"epoch {self.progress.epoch + 1}"
        with ProgressBar(self.loader.steps - first_step, label, "steps", silent=not self.runtime.is_main) as bar:
            step_began = time.monotonic()
            for micro_batches in self.loader.epoch(self.progress.epoch, first_step):
                data_wait = time.monotonic() - step_began
                waited.append(data_wait)
                self.runtime.beat(data_wait + self.engine.clock.seconds.get("forward", 0.0))
                losses = self.step(micro_batches, drops)
                if self.progress.step % STEPS_BETWEEN_READS == 0:
                    self._read_losses()
                    images_per_second = self.loader.global_size / (time.monotonic() - step_began)
                    self._charts.chart_step(self.progress.step, losses, self.engine, images_per_second, data_wait)
                bar.advance()
                if self._must_save_mid_epoch():
                    self._save_mid_epoch()
                step_began = time.monotonic()
        self._read_losses()
        return waited

    def step(self, micro_batches: Sequence[Batch], drops: int) -> dict[str, torch.Tensor]:
        """One optimizer step.

        Args:
            micro_batches: this rank's share of the global batch, on the host.
            drops: plateaus reached so far, see `schedule.plateaus`.

        Returns:
            This rank's share of the losses, by name, on the device.
        """
        device, total_steps = self.runtime.device, self.loader.steps * self.recipe.epochs
        self._seeds.begin(self.progress.step)
        set_rates(self.engine, self.recipe.schedule, self.progress.step, total_steps, drops)
        shares = [self._forward_and_backward(index, batch.to(device)) for index, batch in enumerate(micro_batches)]
        with self.engine.clock.part("optimizer"):
            outcome = self.engine.step()
        self.engine.clock.finish_step()
        self.progress.step += 1
        if self.average is not None:
            self.average.update(self.progress.step)
        losses = shares[0]
        if len(shares) > 1:
            losses = {name: torch.stack([share[name] for share in shares]).sum() for name in losses}
        self._non_finite.record(self.progress.step, micro_batches, losses["loss"], outcome)
        return losses

    def _forward_and_backward(self, index: int, batch: Batch) -> dict[str, torch.Tensor]:
        """One micro-batch; returns its share of the losses, by name."""
        with self.engine.accumulate(index):
            with self.engine.clock.part("forward"):
                images = batch.images
                if batch.draws is not None:
                    images = augment(images, batch.draws, self.recipe.augment)
                outputs = self.engine.forward(images)
                losses = self.network.objective.losses(outputs, batch, self._sum_over_ranks)
            self._charts.keep_predictions(outputs, batch)
            with self.engine.clock.part("backward"):
                self.engine.backward(losses["loss"])
        return {name: loss.detach() for name, loss in losses.items()}

    def _sum_over_ranks(self, share: torch.Tensor) -> torch.Tensor:
        with self.engine.clock.part("communication"):
            return self.runtime.sum(share)

    def _read_losses(self) -> None:
        """Add up the losses since the last read; beside the charts' the only time a step waits for the device."""
        self._epoch_loss.add(self._non_finite.read())

    def _end_epoch(self, epoch: TrainedEpoch, scores: Scores, score_seconds: float) -> None:
        """Select, report, save."""
        self.progress.epoch += 1
        self.progress.losses, self.progress.left_out = [], 0
        is_best = self._early_stopping.update(scores)
        self.progress.improved.append(is_best)
        self._log.epoch(epoch, scores, is_best, score_seconds)
        self._charts.chart_epoch(self.progress.step, scores, epoch.seconds + score_seconds)
        for note in self._bottlenecks.notes(epoch, self.runtime.heartbeat.work_seconds.tolist(), self.runtime.hosts):
            self.monitor.log(note)
        self._checkpoints.save(self.progress)

    @property
    def _steps_into_epoch(self) -> int:
        return self.progress.step - self.progress.epoch * self.loader.steps

    def _must_save_mid_epoch(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        return every is not None and self.progress.step % every == 0 and self._steps_into_epoch < self.loader.steps

    def _save_mid_epoch(self) -> None:
        """Save before the epoch is scored, with its losses so far."""
        self._read_losses()
        if self.progress.step:
            self.progress.losses = self._epoch_loss.of_ranks()
            self._checkpoints.save(self.progress)
