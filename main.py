"""Train a detection transformer, dense or with ENACT, and evaluate it.

    python main.py --model detr --enact                         # on scenes that it draws, in minutes
    torchrun --nproc_per_node=8 main.py --model detr --enact --coco_path COCO
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
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
    BatchLoader,
    CocoDetection,
    CocoEvaluator,
    EpochBatches,
    EvalBatches,
    build_coco,
    build_loader,
    eval_transform,
    prepare_shapes,
    train_transform,
)
from models import build_criterion_from, build_model_from, build_postprocessor, load_weights, warm_start
from util import checkpoint, distributed, environment, plots
from util.errors import InputError
from util.logs import Curves, Record, set_up_console, write_log
from util.training_state import TrainingState

logger = logging.getLogger("main")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error of the user's is one line and exit status 2."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        device = pick_device(config.device)
        distributed.initialize(device.type, config.dist_timeout)
        Run(config, device).go()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.shut_down()
    return 0


class Run:
    """One command, from its configuration to its pictures."""

    def __init__(self, config: Config, device: torch.device) -> None:
        set_up_console()
        demand_same_settings(config)
        torch.manual_seed(config.seed + distributed.rank())
        self.device = device
        self.train_set, self.val_set = build_data(config)
        found = checkpoint_to_resume(config)
        self.config = config = complete(config, self.train_set, self.val_set, resumed=found is not None)
        with distributed.node_leader_first():  # who fetches pretrained weights
            self.model = build_model_from(config).to(device)
        self.criterion = build_criterion_from(config)
        self.postprocess = build_postprocessor(config.model)
        optimizer = build_optimizer(self.model, config)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_drop)
        self.state = TrainingState(self.model, optimizer, scheduler)
        if found is not None:
            self.resume(found)
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
        curves = Curves(self.folder)
        self.evaluate_if_due(curves)  # of a run that stopped in between
        with self.progress(len(batches)) as bar:
            while state.epochs_done < config.epochs:
                bar.set_description(f"epoch {state.epochs_done + 1}/{config.epochs}")
                batches.set_epoch(state.epochs_done)
                self.train_one_epoch(model, loader, bar)
                self.evaluate_if_due(curves)
        curves.close()

    def progress(self, batches: int) -> tqdm[Any]:
        """A bar over the batches of all epochs; a log file gets a line of it now and then."""
        return tqdm(
            total=self.config.epochs * batches,
            initial=self.state.epochs_done * batches,
            unit="batch",
            mininterval=0.2 if sys.stderr.isatty() else 30,
            disable=not distributed.is_main(),
        )

    def train_one_epoch(self, model: nn.Module, loader: BatchLoader, bar: tqdm[None]) -> None:
        """Train, step the schedule, and keep the result before anything else can go wrong."""
        config, state = self.config, self.state
        options = engine.StepOptions(config.accumulate, config.clip_max_norm, config.amp)
        rate, start = state.optimizer.param_groups[0]["lr"], time.perf_counter()
        numbers = engine.train_one_epoch(model, self.criterion, loader, state.optimizer, bar, self.device, options)
        state.scheduler.step()
        parameters = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        state.records.append({
            "train_lr": rate,
            **{f"train_{key}": value for key, value in numbers.items()},
            "train_seconds": time.perf_counter() - start,
            "epoch": state.epochs_done,
            "n_parameters": parameters,
        })
        self.save(checkpoint.LATEST)
        if state.epochs_done % config.lr_drop == 0 or state.epochs_done % config.checkpoint_every == 0:
            self.save(f"checkpoint{state.epochs_done - 1:04d}.pth")

    def evaluate_if_due(self, curves: Curves) -> None:
        """Complete the last epoch's record, and log it."""
        records = self.state.records
        if not records:
            return
        due = (len(records) % self.config.eval_every == 0 or len(records) == self.config.epochs)
        if due and "test_coco_eval_bbox" not in records[-1]:
            records[-1].update(self.evaluate())
            self.save(checkpoint.LATEST)
        if distributed.is_main():
            write_log(records, self.folder)
            curves.add(len(records) - 1, records[-1])

    def evaluate(self) -> Record:
        """Score the validation images; log COCO's table."""
        world = distributed.rank(), distributed.world_size()
        loader = self.loader(self.val_set, EvalBatches(len(self.val_set), self.config.batch_size, *world))
        numbers, summary = engine.evaluate(
            self.model,
            self.criterion,
            self.postprocess,
            loader,
            CocoEvaluator(self.val_set.coco),
            self.device,
            self.config.amp,
        )
        logger.info("%s", summary.table)
        return {
            **{f"test_{key}": value for key, value in numbers.items()},
            "test_coco_eval_bbox": list(summary.metrics.values()),
        }

    def draw(self) -> None:
        """curves.png of the epochs so far, detections.png of a few validation images."""
        if self.state.records:
            plots.save_curves(self.state.records, self.folder / "curves.png")
        names = self.val_set.class_names
        plots.save_detections(self.example_detections(), names, self.folder / "detections.png")
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
                self.state.restore(saved, load_weights)
                logger.info("resumed %s after epoch %d", path, self.state.epochs_done)
            else:
                official = origin["enact"] == "official" if origin else None
                notes = warm_start(self.model, saved["model"], official)
                logger.info("start from the weights of %s%s", path, "".join(f"; {note}" for note in notes))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None

    def save(self, name: str) -> None:
        self.state.save(self.folder / name, dataclasses.asdict(self.config))

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
            (self.folder / "config.yaml").write_text(to_yaml(self.config))
            described = json.dumps(environment.describe(self.device), indent=1)
            (self.folder / "environment.json").write_text(f"{described}\n")
        distributed.barrier()


def pick_device(name: str) -> torch.device:
    """The device of this process; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"no such device: {name}; try --device cpu or --device cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device.type == "cuda" and distributed.is_launched():
        return torch.device("cuda", distributed.local_rank())
    return device


def demand_same_settings(config: Config) -> None:
    """Processes that were started with different flags would wait for one another for ever."""
    settings = [dataclasses.asdict(config), *distributed.gather_objects(dataclasses.asdict(config))]
    different = [name for name in settings[0] if any(other[name] != settings[0][name] for other in settings)]
    if different:
        values = [other[different[0]] for other in settings[1:]]
        raise InputError(f"the processes were started with different --{different[0]}: {values}; give all the same")


def build_data(config: Config) -> tuple[CocoDetection, CocoDetection]:
    """The training and the validation set."""
    if config.coco_path is not None:
        root = Path(config.coco_path)
    else:
        with distributed.node_leader_first():
            root = prepare_shapes(num_train=config.shapes_train, num_val=config.shapes_val)
    transforms = {
        "train": train_transform(
            config.train_short_sides, config.max_long_side, config.crop_short_sides, config.crop_range
        ),
        "val": eval_transform(config.eval_short_side, config.max_long_side),
    }
    train, val = (build_coco(root, split, transform, config.seed) for split, transform in transforms.items())
    return train, val


def checkpoint_to_resume(config: Config) -> Path | None:
    """The file that --resume names; for "auto" the output folder's newest, if it has one."""
    if config.resume == "auto":
        newest = default_folder(config) / checkpoint.LATEST
        return newest if newest.exists() else None
    return Path(config.resume) if config.resume else None


def default_folder(config: Config) -> Path:
    variant = {None: "", "paper": "_enact"}.get(config.enact, f"_enact_{config.enact}")
    return Path(config.output_dir or f"outputs/{config.model}{variant}")


def complete(config: Config, train_set: CocoDetection, val_set: CocoDetection, resumed: bool) -> Config:
    """Fill in what the data decides; weights that a checkpoint brings need not be fetched first."""
    num_classes = config.num_classes or train_set.num_classes
    for name, dataset in (("training", train_set), ("validation", val_set)):
        if dataset.num_classes > num_classes:
            raise InputError(
                f"the {name} annotations have the category id {dataset.num_classes - 1}, and the detector is for ids "
                f"below {num_classes}; give --num_classes {dataset.num_classes}, or renumber the categories"
            )
    return dataclasses.replace(
        config,
        num_classes=num_classes,
        output_dir=str(default_folder(config)),
        backbone_weights=None if resumed else config.backbone_weights,
    )


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW with one learning rate for the backbone and one for the rest (spec 5.2)."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if not name.startswith("backbone.")]},
        {
            "params": [parameter for name, parameter in trained if name.startswith("backbone.")],
            "lr": config.lr_backbone,
        },
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


if __name__ == "__main__":
    sys.exit(main())
