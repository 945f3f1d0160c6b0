"""Train a detection transformer, dense or with ENACT, and evaluate it.

    python main.py --model detr --enact                         # on scenes that it draws, in minutes
    torchrun --nproc_per_node=8 main.py --model detr --enact --coco_path COCO
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert
from tqdm import tqdm

import engine
from configs.cli import parse_args, to_yaml
from configs.schema import Config
from datasets import (
    METRIC_NAMES,
    BadImages,
    BatchLoader,
    CocoDetection,
    CocoEvaluator,
    EpochBatches,
    EvalBatches,
    build_loader,
)
from datasets.check import quick_check
from models import (
    build_criterion_from,
    build_model_from,
    build_postprocessor,
    compile_model,
    load_weights,
    warm_start,
)
from preparation import (
    build_data,
    build_optimizer,
    checkpoint_to_resume,
    complete,
    demand_same_settings,
    freeze,
    pick_device,
    weights_to_start_from,
)
from tools.report_page import write_report
from util import bad_steps, checkpoint, distributed, environment, memory, plots
from util.errors import InputError
from util.logs import Curves, Record, set_up_console, write_log
from util.randomness import seed_everything
from util.signals import Stopped, StopSignals
from util.step_guard import Outcome
from util.step_wishes import StepWishes
from util.training_state import TrainingState

logger = logging.getLogger("main")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says
SCORES = "test_coco_eval_bbox"  # of a record: COCO's 12 figures, AP first
# Fields that may differ when a run goes on, without a word.
UNLIKE_RUNS = {
    "output_dir", "resume", "eval", "device", "num_workers", "dist_timeout", "checkpoint_every", "checkpoint_steps",
    "keep_every", "backbone_weights", "num_classes", "max_bad_steps",
    "max_bad_images", "compile", "checkpoint_activations",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of the user's is one line and exit status 2."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        device = pick_device(config.device)
        distributed.initialize(device.type, config.dist_timeout)
        Run(config, device).go()
    except InputError as error:
        print(f"{distributed.prefix()}error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"{distributed.prefix()}error: {error}; make room, and go on with --resume auto", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{distributed.prefix()}stopped by SIGINT", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(f"{distributed.prefix()}{stopped}; --resume auto goes on", file=sys.stderr)
        return stopped.status
    distributed.shut_down()  # not after an error, when the others may never come
    return 0


class Run:
    """One command, from its configuration to its pictures.

    Args:
        config: what to do; `complete` fills in what the data decides.
        device: of the model.
        build: the detector of a configuration; None: `build_model_from`.
    """

    def __init__(
        self, config: Config, device: torch.device, build: Callable[[Config], nn.Module] | None = None
    ) -> None:
        set_up_console()
        self.signals = StopSignals()
        demand_same_settings(config)
        seed_everything(config.seed + distributed.rank())
        self.device = device
        self.train_set, self.val_set = build_data(config)
        self.bad_images = BadImages(self.train_set)
        if distributed.is_main() and config.coco_path is not None:
            for oddity in quick_check(self.train_set, self.val_set):
                logger.warning("%s", oddity)
        found = checkpoint_to_resume(config)
        self.config = config = complete(config, self.train_set, self.val_set, resumed=found is not None)
        with distributed.node_leader_first():  # who fetches pretrained weights
            self.model = (build or build_model_from)(config).to(device)
        if config.compile:
            compile_model(self.model)
        freeze(self.model, config.freeze)
        self.criterion = build_criterion_from(config)
        self.postprocess = build_postprocessor(config.model)
        optimizer = build_optimizer(self.model, config)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_drop)
        self.state = TrainingState(self.model, optimizer, scheduler)
        self.evaluator: CocoEvaluator | None = None  # of the last evaluation
        self.wishes = StepWishes(self.signals, config.checkpoint_every, config.checkpoint_steps)
        if found is not None:
            self.resume(found)
        elif config.pretrained is not None:
            self.start_from(Path(config.pretrained))
        elif config.eval:
            logger.warning("--eval without --resume scores weights that were never trained")
        self.folder = Path(config.output_dir or "")
        self.prepare_folder()

    def go(self) -> None:
        """Evaluate if that was asked for, else train to the end."""
        if self.config.eval:
            record = self.evaluate()
            if distributed.is_main():
                (self.folder / "eval.json").write_text(json.dumps(record, indent=1) + "\n")
                assert self.evaluator is not None
                (self.folder / "detections.json").write_text(json.dumps(self.evaluator.results))
        else:
            self.train()
        if distributed.is_main():
            self.draw()
        distributed.barrier()

    def train(self) -> None:
        """Train the epochs that are left, with a checkpoint and an evaluation after each."""
        config, state = self.config, self.state
        batches = EpochBatches(
            len(self.train_set), config.batch_size, config.seed, distributed.rank(), distributed.world_size()
        )
        loader = self.loader(self.train_set, batches)
        model = self.model
        if distributed.is_active():
            model = DistributedDataParallel(model)  # without device_ids, for masks are to stay in host memory
        between_epochs = state.position.batches == 0
        curves = Curves(self.folder, state.epochs_done - between_epochs, config.wandb, dataclasses.asdict(config))
        if between_epochs:
            self.finish_epoch(curves)  # of a run that stopped just there
        with self.progress(len(batches)) as bar:
            while state.epochs_done < config.epochs:
                bar.set_description(f"epoch {state.epochs_done + 1}/{config.epochs}")
                batches.set_epoch(state.epochs_done, state.position.batches)
                with self.signals.remembered():  # until a checkpoint holds the work
                    self.train_one_epoch(model, loader, bar)
                if any(distributed.gather_objects(self.signals.requested)):
                    raise self.signals.stopped()
                self.finish_epoch(curves)
        curves.close()

    def progress(self, batches: int) -> tqdm[Any]:
        """A bar over the batches of all epochs; a log file gets a line of it now and then."""
        return tqdm(
            total=self.config.epochs * batches,
            initial=self.state.epochs_done * batches + self.state.position.batches,
            unit="batch",
            mininterval=0.2 if sys.stderr.isatty() else 30,
            disable=not distributed.is_main(),
        )

    def train_one_epoch(self, model: nn.Module, loader: BatchLoader, bar: tqdm[None]) -> None:
        """Train to the end of the epoch, step the schedule, and keep the result before anything else can go wrong."""
        config, state = self.config, self.state
        options = engine.StepOptions(config.accumulate, config.clip_max_norm, config.amp)
        rate = state.optimizer.param_groups[0]["lr"]
        clock = time.perf_counter()
        steps = engine.train_one_epoch(
            model, self.criterion, self.bad_images.watch(loader), state.optimizer, self.device, options, self.wishes
        )
        for outcome in steps:
            state.position.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            self.account(outcome, bar)
            if outcome.save or outcome.stop:
                self.save(checkpoint.LATEST)
            if outcome.stop:
                raise self.signals.stopped()
        state.scheduler.step()
        parameters = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        state.end_epoch({
            "train_lr": rate,
            **{f"train_{key}": value for key, value in state.position.averages.over_processes(self.device).items()},
            "train_seconds": state.position.seconds,
            "epoch": state.epochs_done,
            "n_parameters": parameters,
        })
        self.save(checkpoint.LATEST)

    def account(self, outcome: Outcome[engine.Work], bar: tqdm[None]) -> None:
        """Count a step, and show it."""
        state, batches = self.state, outcome.work.batches
        if outcome.bad:
            self.handle_bad_step(outcome)
        else:
            state.position.averages.add(outcome.numbers, weight=1)
        state.position.batches += len(batches)
        state.steps += 1
        rate = (bar.format_dict["rate"] or 0.0) * len(batches[0].targets) * distributed.world_size()
        shown = {
            "loss": f"{outcome.numbers['loss']:.3f}", "lr": f"{outcome.work.rates[0]:.1e}", "img/s": f"{rate:.1f}",
            "mem": f"{memory.peak_gib(self.device):.1f}GiB",
        }  # fmt: skip
        bar.set_postfix(shown, refresh=False)
        bar.update(len(batches))

    def handle_bad_step(self, outcome: Outcome[engine.Work]) -> None:
        """Keep what made it; go on if so many may be skipped (InputError if not)."""
        state, work = self.state, outcome.work
        images = work.image_ids
        made_of = {
            "model": self.model.state_dict(), "config": dataclasses.asdict(self.config), "epoch": state.epochs_done,
            "step": state.steps, "numbers": outcome.numbers, "learning_rates": work.rates, "image_ids": images,
            "batches": [batch._asdict() for batch in work.batches], "random_state": work.random_state,
        }  # fmt: skip
        kept = bad_steps.keep(made_of, self.folder, state.steps)
        state.bad_steps += 1
        wrong = bad_steps.describe(outcome.numbers)
        said = f"step {state.steps}, epoch {state.epochs_done}: {wrong} on the images {images}"
        replay = f"; see it again with python tools/replay.py {kept}" if kept else ""
        if state.bad_steps > self.config.max_bad_steps:
            raise InputError(
                f"{said}; training stopped before this step changed the weights. Lower --lr, check these images' "
                f"boxes, turn --amp off, or skip such steps with --max_bad_steps{replay}"
            )
        logger.warning("%s; skipped, %d of at most %d%s", said, state.bad_steps, self.config.max_bad_steps, replay)

    def finish_epoch(self, curves: Curves) -> None:
        """Complete the last epoch's record, log it, keep its checkpoint if it is to stay; twice is as good as once."""
        config, records = self.config, self.state.records
        if not records:
            return
        done = len(records)
        if (done % config.eval_every == 0 or done == config.epochs) and SCORES not in records[-1]:
            records[-1].update(self.evaluate())
            self.save(checkpoint.LATEST)
        if not distributed.is_main():
            return
        latest = self.folder / checkpoint.LATEST
        if done % config.lr_drop == 0 or done % config.keep_every == 0:
            checkpoint.give_name(latest, self.folder / f"checkpoint{done - 1:04d}.pth")
        if records[-1] is best_of(records):
            checkpoint.give_name(latest, self.folder / checkpoint.BEST)
        write_log(records, self.folder)
        figures = dict(zip((f"test_{name}" for name in METRIC_NAMES), records[-1].get(SCORES, ()), strict=False))
        curves.add(done - 1, records[-1] | figures)

    def evaluate(self) -> Record:
        """Score the validation images; log COCO's table."""
        world = distributed.rank(), distributed.world_size()
        loader = self.loader(self.val_set, EvalBatches(len(self.val_set), self.config.batch_size, *world))
        self.evaluator = evaluator = CocoEvaluator(self.val_set.coco)
        numbers, summary = engine.evaluate(
            self.model, self.criterion, self.postprocess, loader, evaluator, self.device, self.config.amp
        )
        logger.info("%s", summary.table)
        return {
            **{f"test_{key}": value for key, value in numbers.items()},
            SCORES: list(summary.metrics.values()),
        }

    def draw(self) -> None:
        """curves.png of the epochs so far, detections.png of a few validation images, report.html of all of them."""
        if self.state.records:
            plots.save_curves(self.state.records, self.folder / "curves.png")
        names = self.val_set.class_names
        plots.save_detections(self.example_detections(), names, self.folder / "detections.png")
        if self.evaluator is not None:
            origin, found = f"the last evaluation, of {len(self.val_set)} validation images", self.evaluator.results
            write_report(self.folder, self.val_set.coco, self.val_set.image_dir, found, origin=origin)
        logger.info("results are in %s", self.folder)

    @torch.inference_mode()
    def example_detections(self, count: int = 12) -> list[plots.Picture]:
        """The first images of the validation set with their objects and what the model finds."""
        self.model.eval()
        one_by_one = EvalBatches(min(count, len(self.val_set)), batch_size=1, rank=0, world_size=1)
        pictures: list[plots.Picture] = []
        for batch in self.loader(self.val_set, one_by_one):
            target, size = batch.targets[0], batch.targets[0]["size"]
            boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * size.flip(0).repeat(2)
            outputs = engine.forward(self.model, batch.to(self.device), self.config.amp)
            found = {key: value.cpu() for key, value in self.postprocess(outputs, size.unsqueeze(0))[0].items()}
            pictures.append((batch.images[0], {"labels": target["labels"], "boxes": boxes}, found))
        return pictures

    def loader(self, dataset: CocoDetection, batches: EpochBatches | EvalBatches) -> BatchLoader:
        return build_loader(dataset, batches, self.config.num_workers, self.device.type == "cuda")

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this run, or start from the weights of another."""
        saved = checkpoint.load(path)
        origin = saved.get("config", {})
        same = all(origin.get(name) == getattr(self.config, name) for name in ("model", "enact", "num_classes"))
        try:
            if self.config.eval:
                load_weights(self.model, saved["model"])
            elif same:
                global_batch = self.config.batch_size * distributed.world_size()
                self.state.restore(saved, load_weights, global_batch)
                place = f" and {self.state.position.batches} batches" if self.state.position.batches else ""
                logger.info("resumed %s after epoch %d%s", path, self.state.epochs_done, place)
                self.warn_of_other_settings(origin)
            else:
                self.start_from(path)
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"{path}: {error}") from None

    def start_from(self, path: Path) -> None:
        """Take the weights of another model, as far as they fit; say what does not."""
        weights, official = weights_to_start_from(path)
        try:
            notes = warm_start(self.model, weights, official)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        logger.info("start from the weights of %s%s", path, "".join(f"; {note}" for note in notes))

    def save(self, name: str) -> None:
        """Write a checkpoint (a collective call)."""
        names = self.train_set.class_names
        self.state.save(self.folder / name, dataclasses.asdict(self.config), class_names=names)
        self.wishes.saved()

    def warn_of_other_settings(self, origin: Mapping[str, Any]) -> None:
        """Say which fields are not those that the run had."""
        own = dataclasses.asdict(self.config)
        other = [f"{name} {origin[name]} -> {own[name]}" for name in own.keys() & origin.keys() - UNLIKE_RUNS
                 if origin[name] != own[name]]  # fmt: skip
        if other:
            logger.warning("goes on with other settings: %s (learning rates and their schedule stay those of the "
                           "checkpoint)", ", ".join(sorted(other)))  # fmt: skip

    def prepare_folder(self) -> None:
        """Make the output folder; never write over another run."""
        resume = self.config.resume
        own = resume is not None and (resume == "auto" or Path(resume).parent.resolve() == self.folder.resolve())
        taken = not (own or self.config.eval) and (self.folder / checkpoint.LATEST).exists()
        if any(distributed.gather_objects(taken)):
            raise InputError(
                f"{self.folder} holds a run already; go on with it by --resume auto, or choose another --output_dir"
            )
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_leftovers(self.folder)
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
            described = json.dumps(environment.describe(self.device), indent=1)
            (self.folder / "environment.json").write_text(f"{described}\n")
        distributed.barrier()


def best_of(records: Sequence[Record]) -> Record | None:
    """The record of the highest AP, the first of equals; None if none was evaluated."""
    return max((one for one in records if SCORES in one), key=lambda one: float(one[SCORES][0]), default=None)


if __name__ == "__main__":
    sys.exit(main())
