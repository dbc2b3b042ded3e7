"""The training loop: read it top to bottom."""

import math
import time
from dataclasses import dataclass

import torch
from safetensors import SafetensorError

from data_prep.common import progress as show
from data_prep.common.errors import DIVERGED, RunFailed, Stopped
from data_prep.shards.manifest import to_json_list
from train.data.augment import augment
from train.data.batches import Batch
from train.data.loader import TrainLoader
from train.data.order import stream_seed
from train.data.stimuli import StimulusSet
from train.distributed.engine import Engine, average_batch_norm_statistics, batch_norm_statistics
from train.distributed.runtime import Runtime
from train.evaluation.metrics import LOWER_IS_BETTER
from train.evaluation.scoring import Scores, score_recordings
from train.finetuning.bottlenecks import Pace
from train.finetuning.charts import Watch
from train.finetuning.ema import RunningAverage
from train.finetuning.non_finite_steps import FiniteSteps
from train.finetuning.resume import StartingPoint
from train.finetuning.schedule import momentum, plateaus, rate_factor, set_momentum
from train.models.network import Network
from train.run.checkpoint import Progress, forget_newer, save_checkpoint
from train.run.folder import RunFolder
from train.run.monitor import Monitor
from train.run.recipe import Recipe

STEPS_BETWEEN_LOOKS = 10


@dataclass
class Training:
    """Everything a run consists of.

    Attributes:
        recipe: its settings.
        folder: where it is written.
        runtime: this process.
        engine: network and optimizer.
        network: the network itself.
        average: of its weights; None without one.
        loader: this rank's training batches.
        selection: the stimuli that choose the best epoch: by the mean over recordings of each one's score.
        workers: decoding processes per rank.
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
    selection: StimulusSet
    workers: int
    monitor: Monitor
    progress: Progress

    def __post_init__(self):
        self._finite = FiniteSteps(
            self.network, self.loader.stimuli, self.runtime, self.recipe.faults.bad_steps, self.monitor.say
        )
        self._epoch_loss = 0.0  # this rank's part, of the epoch under way, up to the last look
        self._pace, self._waited = Pace(), 0.0
        split = self.progress.selection_split
        self._watch = Watch(self.network, self.runtime, self.monitor, self.loader.stimuli, self.selection, split)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.loader.steps * self.recipe.epochs

    @property
    def scored_network(self) -> Network:
        """The network that is scored and saved: the averaged one where there is one."""
        return self.network if self.average is None else self.average.network

    def run(self) -> None:
        """Train until the epochs or the patience are used up.

        Raises:
            Stopped: a process was told to stop; a checkpoint is saved.
            RunFailed: the loss stayed infinite or NaN, or a checkpoint cannot be saved.
        """
        if not self.progress.step and self.recipe.readout.start != "zero":
            self._begin()
        while self.progress.epoch < self.recipe.epochs and not self._out_of_patience():
            started, first_step = time.monotonic(), self.progress.step
            try:
                with self.runtime.cudnn_autotuning(self.recipe.deterministic):
                    loss = self._epoch()
                trained, as_trained = time.monotonic(), self._watch.train_means()
                scored = self._score()
            except Stopped as stop:
                self._save_midway()
                raise Stopped(f"{stop} after step {self.progress.step}; saved") from None
            self._finish_epoch()
            best = self._select(scored)
            self.progress.improved.append(best)
            steps = self.progress.step - first_step
            speed = steps * self.loader.global_size / (trained - started)
            self._tell(
                f"epoch {self.progress.epoch:>3}/{self.recipe.epochs}  loss {loss:.4f}",
                scored,
                best,
                as_trained,
                loss=loss,
                images_per_second=speed,
                train_seconds=trained - started,
                score_seconds=time.monotonic() - trained,
            )
            self._watch.epoch(scored, self.progress.step, time.monotonic() - started)
            self._remark(steps, trained - started)
            self._save()
        ended = "no improvement" if self._out_of_patience() else "all epochs done"
        best = math.nan if self.progress.best is None else self.progress.best
        epoch = self.progress.best_epoch
        self.monitor.say(
            f"{ended}: best {self.progress.selection_metric} {best:.4f} on {self.progress.selection_split} "
            + (f"after epoch {epoch}" if epoch else "at the start: no epoch is better")
        )

    def _begin(self) -> None:
        """Score and save where a readout in closed form begins: an epoch must be better than that to be the best."""
        started = time.monotonic()
        scored = self._score()
        self._select(scored)
        self._tell("the start", scored, True, {}, train_seconds=0.0, score_seconds=time.monotonic() - started)
        self._save()

    @property
    def _first_step(self) -> int:
        """Steps of the epoch under way that are done."""
        return self.progress.step - self.progress.epoch * self.loader.steps

    def _epoch(self) -> float:
        """One pass over the training stimuli, or what is left of it; returns the mean loss of the steps that were done.

        Raises:
            RunFailed: there were none, or too many in a row were left out.
        """
        self.network.train()
        drops = plateaus(self.recipe.schedule, self.progress.improved)
        self._epoch_loss = self._loss_so_far()
        with show.Progress(
            self.loader.steps - self._first_step,
            f"epoch {self.progress.epoch + 1}",
            "steps",
            silent=not self.runtime.is_main,
        ) as bar:
            waited, self._waited = time.monotonic(), 0.0
            for micros in self.loader.epoch(self.progress.epoch, self._first_step):
                data_wait = time.monotonic() - waited
                self._waited += data_wait
                self.runtime.beat(data_wait + self.engine.clock.seconds.get("forward", 0.0))
                losses = self._step(micros, drops)
                if self.progress.step % STEPS_BETWEEN_LOOKS == 0:
                    self._look()
                    self._scalars(losses, data_wait, time.monotonic() - waited)
                bar.advance()
                if self._saves_midway():
                    self._save_midway()
                waited = time.monotonic()
        self._look()
        if self.progress.left_out == self.loader.steps:
            raise RunFailed(
                f"{DIVERGED}no step of epoch {self.progress.epoch + 1} had a finite loss and gradient; lower "
                "optimizer.lr or set optimizer.clip_norm (the checkpoints before are kept)"
            )
        return sum(self._epoch_losses()) / (self.loader.steps - self.progress.left_out)

    def _finish_epoch(self) -> None:
        self.progress.epoch, self.progress.losses, self.progress.left_out = self.progress.epoch + 1, [], 0

    def _look(self) -> None:
        """See whether the steps were finite, and name those that were not; the only host sync beside the charts'."""
        for loss in self._finite.look():
            if loss is None:
                self.progress.left_out += 1
            else:
                self._epoch_loss += loss

    def _epoch_losses(self) -> list[float]:
        """Each rank's part of the epoch's loss."""
        own = torch.tensor(self._epoch_loss, dtype=torch.float64, device=self.runtime.device)
        return self.runtime.all_gather(own).tolist()

    def _loss_so_far(self) -> float:
        """This rank's part of the losses of the epoch under way; with another number of ranks, the first has all."""
        losses, runtime = self.progress.losses, self.runtime
        if len(losses) == runtime.ranks:
            return losses[runtime.rank]
        return sum(losses) if runtime.is_main else 0.0

    def _saves_midway(self) -> bool:
        every = self.recipe.checkpoint.every_steps
        return every is not None and self.progress.step % every == 0 and self._first_step < self.loader.steps

    def _save_midway(self) -> None:
        """Save between two epochs' ends, where an epoch's losses so far belong to what is saved."""
        self._look()
        if self.progress.step:
            self.progress.losses = self._epoch_losses()
            self._save()

    def _step(self, micros: list[Batch], drops: int) -> dict[str, torch.Tensor]:
        """One optimizer step; returns this rank's part of its losses, which stay on the device."""
        seed_everything(self.recipe.seed, self.progress.step, self.runtime.rank, self.runtime.device)
        self._set_rates(drops)
        pieces = [self._piece(piece, micro.to(self.runtime.device)) for piece, micro in enumerate(micros)]
        with self.engine.clock.part("optimizer"):
            left_out = self.engine.step()
        self.engine.clock.finish_step()
        self.progress.step += 1
        if self.average is not None:
            self.average.update(self.progress.step)
        losses = pieces[0]
        if len(pieces) > 1:
            losses = {name: torch.stack([piece[name] for piece in pieces]).sum() for name in losses}
        self._finite.note(self.progress.step, micros, losses["loss"], left_out)
        return losses

    def _set_rates(self, drops: int) -> None:
        schedule, step = self.recipe.schedule, self.progress.step
        self.engine.set_learning_rate(rate_factor(schedule, step, self.total_steps, drops))
        if (value := momentum(schedule, step, self.total_steps)) is not None:
            set_momentum(self.engine.optimizer, value)

    def _piece(self, piece: int, batch: Batch) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch."""
        with self.engine.accumulate(piece):
            with self.engine.clock.part("forward"):
                augments = batch.draws is not None
                images = augment(batch.images, batch.draws, self.recipe.augment) if augments else batch.images
                outputs = self.engine.forward(images)
                parts = self.network.objective.parts(outputs, batch, self._sum)
            self._watch.note(outputs, batch)
            with self.engine.clock.part("backward"):
                self.engine.backward(parts["loss"])
        return {name: part.detach() for name, part in parts.items()}

    def _sum(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, within a step."""
        with self.engine.clock.part("communication"):
            return self.runtime.sum(own)

    def _scalars(self, losses: dict[str, torch.Tensor], data_wait: float, seconds: float) -> None:
        names = list(losses)
        totals = self.runtime.sum(torch.stack([losses[name] for name in names]))
        charts = {
            "train/loss" if name == "loss" else f"train/loss_{name}": total
            for name, total in zip(names, totals.tolist(), strict=True)
        }
        charts |= {f"rate/{group['part']}": group["lr"] for group in self.engine.optimizer.param_groups}
        charts |= {name: float(value) for name, value in self.network.objective.learned_weights().items()}
        charts["speed/images_per_second"] = self.loader.global_size / seconds
        charts["speed/data_wait_seconds"] = data_wait
        charts |= {f"speed/{part}_seconds": seconds for part, seconds in self.engine.clock.seconds.items()}
        self.monitor.scalars(charts, self.progress.step)

    def _score(self) -> Scores:
        """Score the stimuli that select, with the network that is going to be saved."""
        network = self.scored_network
        average_batch_norm_statistics(self.network, self.runtime)
        if self.average is not None:
            self.average.gather()
            average_batch_norm_statistics(network, self.runtime)
        batch_size = self.recipe.evaluation_batch_size
        responses = network.objective.responses
        if responses is not None and responses.ignores_offsets:
            responses.reset()
            scores = score_recordings(
                network,
                self.loader.stimuli,
                self.runtime,
                batch_size=batch_size,
                workers=self.workers,
                keep_predictions=False,
            )
            responses.calibrate(scores.moments.least_squares_lines())
        return score_recordings(
            network,
            self.selection,
            self.runtime,
            batch_size=batch_size,
            workers=self.workers,
            keep_predictions=True,
        )

    def _select(self, scored: Scores) -> bool:
        """Compare with the best epoch so far; all ranks see the same reduced numbers and decide alike.

        Raises:
            RunFailed: the selection metric cannot be computed.
        """
        metric, best = self.progress.selection_metric, self.progress.best
        value = scored.value(metric)
        if math.isnan(value) and scored.moments is not None and not scored.moments.is_finite():
            raise RunFailed(f"{DIVERGED}its predictions are not finite; lower optimizer.lr or set optimizer.clip_norm")
        if math.isnan(value):
            part = next(
                part for part in self.selection.recordings if math.isnan(scored.by_recording[part.name].value(metric))
            )
            raise RunFailed(
                f"{metric} has no value on the {len(part)} stimuli of {self.progress.selection_split} of "
                f"{part.name}: too few, or constant responses or predictions; raise early_stopping.inner_fraction "
                "or choose another early_stopping.metric"
            )
        sign = -1 if metric in LOWER_IS_BETTER else 1
        improved = best is None or sign * value > sign * best
        if improved:
            self.progress.best = value
            self.progress.best_epoch, self.progress.best_step = self.progress.epoch, self.progress.step
        return improved

    def _out_of_patience(self) -> bool:
        return self.progress.epochs_without_improvement >= self.recipe.early_stopping.patience

    def _save(self) -> None:
        """Save a checkpoint; all ranks go on when it is whole, or end together.

        Raises:
            RunFailed: it cannot be written.
        """
        tensors = {"optimizer": self.engine.optimizer_tensors()}
        if self.average is None:
            tensors["network"] = self.engine.network_tensors()
        else:
            self.average.gather()
            tensors |= {"network": self.average.network.state_dict(), "training": self.engine.network_tensors()}
        tensors["statistics"] = self._statistics_of_ranks(tensors) if self.progress.losses else {}
        failure = None
        if self.runtime.is_main:
            try:
                save_checkpoint(self.folder.checkpoints, tensors, self.progress, self.recipe.checkpoint.keep)
            except (OSError, SafetensorError) as error:
                failure = f"checkpoint step_{self.progress.step} cannot be saved ({error}); those before are kept"
        if failure := self.runtime.gather_objects(failure)[0]:
            raise RunFailed(failure)

    def _statistics_of_ranks(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """In mid-epoch each rank has BatchNorm statistics of its own: all of them, and their mean in `tensors`."""
        networks = {"network": self.scored_network} | ({} if self.average is None else {"training": self.network})
        found = {}
        for file, network in networks.items() if self.runtime.ranks > 1 else ():
            for name, own in batch_norm_statistics(network):
                found[f"{file}|{name}"] = self.runtime.all_gather(own)
                tensors[file][name] = self.runtime.mean(own).to(own)
        return found

    def _tell(self, where: str, scored: Scores, best: bool, as_trained: dict[str, float], **facts: float) -> None:
        """Write a line, points in charts, and a line of history.jsonl, which has all `facts`."""
        progress, means = self.progress, scored.means()
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        each = (
            {name: part.means() for name, part in scored.by_recording.items()} if len(scored.by_recording) > 1 else {}
        )
        if each:
            of_each = ", ".join(f"{name} {part[progress.selection_metric]:.4f}" for name, part in each.items())
            shown += f"  ({progress.selection_metric}: {of_each})"
        speed = f"  {facts['images_per_second']:,.0f} images/s" if "images_per_second" in facts else ""
        self.monitor.say(f"{where}  {progress.selection_split}: {shown}{speed}{'  *' if best else ''}")
        charts = {f"{progress.selection_split}/{name}": value for name, value in scored.chart_values().items()}
        charts |= {f"train/{name}": value for name, value in as_trained.items()}
        charts["selection/value"] = means[progress.selection_metric]
        self.monitor.scalars(charts, progress.step)
        self.monitor.epoch(
            {
                "epoch": progress.epoch,
                "step": progress.step,
                progress.selection_split: _for_json(means),
                **({"recordings": {name: _for_json(part) for name, part in each.items()}} if each else {}),
                "best": best,
                **facts,
            }
        )

    def _remark(self, steps: int, seconds: float) -> None:
        if steps:
            facts = {"busy": self.runtime.heartbeat.busy.tolist(), "hosts": self.runtime.hosts}
            for sentence in self._pace.remarks(waited=self._waited, trained=seconds, steps=steps, **facts):
                self.monitor.say(sentence)

    def go_on(self, start: StartingPoint) -> None:
        """Say where the run begins again, and drop what was written after that."""
        for fault in start.faults:
            self.monitor.say(f"warning: {fault}; taking the checkpoint before")
        if start.checkpoint is not None and self.runtime.is_main:
            forget_newer(self.folder.checkpoints, self.progress)
        if start.begins:
            self.monitor.rewind(-1, -1)
            self.monitor.say("no step had been saved: starting from the beginning")
            return
        self.monitor.rewind(self.progress.epoch, self.progress.step)
        midway = f", step {self._first_step} of the next" if self._first_step else ""
        self.monitor.say(f"resumed after epoch {self.progress.epoch}{midway} (step {self.progress.step})")


def _for_json(means: dict[str, float]) -> dict[str, float | None]:
    return dict(zip(means, to_json_list(means.values()), strict=True))


def seed_everything(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed what is random in a network (dropout, drop path) for a step, differently on every rank.

    In each step anew, so that a run can go on from any step without the generators' states.
    """
    number = stream_seed(seed, step, rank)
    torch.default_generator.manual_seed(number)  # `torch.manual_seed` would take a millisecond of each step
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
