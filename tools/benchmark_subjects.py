"""What a cell of the benchmark runs: a whole detector, or its encoder alone."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from configs.schema import Config
from datasets import Batch, normalize
from datasets.randomness import cpu_seed
from enact.method import form_clusters
from models import build_criterion_from
from models.compilation import compile_model
from preparation import build_optimizer
from tools.benchmark_arms import ARMS, build_arm
from tools.benchmark_inputs import (
    SEED,
    EncoderCall,
    cells_of,
    inference_batch,
    largest_batch,
    map_without_padding,
    token_maps,
    training_batch,
)
from tools.benchmark_measure import Subject, attempt, matrix_product, peak_bytes, resident_bytes, time_shares

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCT = "matrix product"  # stands in place of an arm: the rate of the machine
PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}
# An encoder alone is also trained on one image of so many tokens, about that of 800 x 1066 pixels at a stride of 16;
# of fewer in a trial, whose images are smaller.
LONG_MAP, LONG_MAP_SIDE = 3400, 800


@dataclass(frozen=True)
class Cell:
    """One figure of each column: a row of the table, an arm, and how it runs.

    Args:
        row: a file of configs/, without _enact.
        arm: of `benchmark_arms.ARMS`, or `PRODUCT`.
        precision: of `PRECISIONS`; bf16 is autocast.
        compiled: by torch.compile.
        batch: images of a training step.
        tokens: of the one image of a sweep; 0 elsewhere.
    """

    row: str
    arm: str
    precision: str = "fp32"
    compiled: bool = False
    batch: int = 1
    tokens: int = 0

    def __str__(self) -> str:
        extras = ["compiled"] * self.compiled + [f"{self.tokens} tokens"] * bool(self.tokens)
        return " ".join([self.row, self.arm, self.precision, *extras])

    @property
    def amp(self) -> bool:
        return self.precision == "bf16"


def model_subject(cell: Cell, config: Config, device: torch.device) -> Subject:
    """A detector: a full training step, and inference on one image."""
    others = resident_bytes(device)
    picture = inference_batch(config)
    facts = dict(_profile_of_model(config, cell.arm))
    model = build_arm(config, cell.arm)
    scale_features(model, picture)
    model.to(device)
    if cell.compiled:
        compile_model(model, fall_back=False)
    step = TrainingStep(model, config, training_batch(config, cell.batch).to(device), cell.amp)
    step()  # the optimizer has its state from the first step on
    facts["bytes"] = peak_bytes(step, device, model, others)
    if device.type == "cuda" and not cell.compiled:
        facts["bytes_largest"] = _peak_of_largest_batch(step, config, cell, others)
    picture = picture.to(device)

    def detect() -> object:
        return engine.forward(model, picture, cell.amp)

    return Subject({"train": step, "inference": lambda: infer(model, detect)}, facts)


def _peak_of_largest_batch(step: TrainingStep, config: Config, cell: Cell, others: int) -> int | None:
    """What training needs at most; None where that is more than there is."""
    usual = step.batch
    device = usual.images.device
    step.batch = largest_batch(config, cell.batch).to(device)
    peak = attempt(lambda: peak_bytes(step, device, step.model, others)).result
    step.batch = usual
    step.optimizer.zero_grad(set_to_none=True)  # of a step that was not finished
    return peak


class TrainingStep:
    """Forward, loss with matching, backward, clipping, optimizer, as in `engine`, on one batch."""

    def __init__(self, model: nn.Module, config: Config, batch: Batch, amp: bool) -> None:
        self.model: Any = model
        self.batch, self.amp = batch, amp
        self.clip = config.clip_max_norm or math.inf
        self.criterion = build_criterion_from(config)
        self.weights = self.criterion.weight_dict
        self.optimizer = build_optimizer(model, config)

    def __call__(self) -> dict[str, Tensor]:
        """The losses."""
        self.model.train()
        normalizers = self.criterion.normalizers([self.batch.targets], self.model.num_queries)
        losses = self.criterion(engine.forward(self.model, self.batch, self.amp), self.batch.targets, normalizers)
        torch.autograd.backward(torch.stack([losses[key] * weight for key, weight in self.weights.items()]).sum())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses


def infer(model: nn.Module, forward: Callable[[], object]) -> object:
    """Run something of a model in evaluation mode, without gradients."""
    model.eval()
    with torch.inference_mode():
        return forward()


@torch.no_grad()
def scale_features(model: Any, picture: Batch) -> None:
    """Let the encoder's input be about 1, as a trained backbone's is; a random one's grows with every block."""
    if isinstance(model.input_proj, nn.Conv2d):  # Anchor DETR normalises it itself
        features = model.input_proj(model.backbone(normalize(picture.images, picture.pad_mask)))
        model.input_proj.weight.div_(features.std())


@functools.cache
def _profile_of_model(config: Config, arm: str) -> dict[str, Any]:
    """What does not depend on device and precision, found on the host for the image of inference."""
    with cpu_seed(SEED):  # the weights that follow are not to depend on whether this is known already
        model, picture = build_arm(config, arm).eval(), inference_batch(config)
    scale_features(model, picture)
    facts = _profile(model, lambda: engine.forward(model, picture, amp=False))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": cells_of(picture, config).numel(),
        **facts,
    }


def encoder_subject(cell: Cell, config: Config, device: torch.device) -> Subject:
    """The encoder of a detector on random tokens: forward and backward, and forward alone."""
    if cell.arm == PRODUCT:
        return matrix_product(device, PRECISIONS[cell.precision], PRODUCT_SIZES[device.type])
    others = resident_bytes(device)
    if cell.tokens:
        config = replace(config, enc_layers=1)
        train_cells = map_without_padding(cell.tokens)
    else:
        train_cells = _training_cells(config, cell.batch)
    model = build_arm(_without_the_rest(config), cell.arm)
    facts: dict[str, Any] = {"tokens_padded": train_cells.numel(), "tokens_real": int((~train_cells).sum())}
    if not cell.tokens:
        facts |= _profile_of_encoder(config, cell.arm, cell.batch)
    model.to(device)
    if cell.compiled:
        model.get_submodule("encoder").compile(dynamic=False)
    train = EncoderStep(model, config, train_cells, device, cell.amp)
    train()
    facts["bytes"] = peak_bytes(train, device, model, others)
    if not (cell.compiled or cell.tokens):
        facts["shares"] = time_shares(train, device)
    steps: dict[str, Callable[[], object]] = {"train": train}
    if not cell.tokens:
        picture = EncoderStep(model, config, cells_of(inference_batch(config), config), device, cell.amp)
        steps["inference"] = lambda: infer(model, picture.forward)
    if not cell.tokens and not ARMS[cell.arm].published:  # which would take most of the time for it; see the sweep
        long_map = map_without_padding(round(LONG_MAP * (config.eval_short_side / LONG_MAP_SIDE) ** 2))
        facts["tokens_long"] = long_map.numel()
        steps["train_long"] = EncoderStep(model, config, long_map, device, cell.amp)
    return Subject(steps, facts)


class EncoderStep:
    """Forward and backward of an encoder, with a random gradient for what comes out of real tokens."""

    def __init__(self, model: nn.Module, config: Config, cells: Tensor, device: torch.device, amp: bool) -> None:
        self.call = EncoderCall(model, token_maps(cells, config.hidden_dim, device), config)
        self.call.maps.tokens.requires_grad_()
        self.amp = amp
        self._gradient: Tensor | None = None

    def __call__(self) -> None:
        self.call.model.train()
        memory = self.forward()
        if self._gradient is None:
            self._gradient = self._random_gradient(memory)
        torch.autograd.backward(memory, self._gradient)
        for tensor in (*self.call.model.parameters(), self.call.maps.tokens):
            tensor.grad = None

    def forward(self) -> Tensor:
        """The encoded tokens."""
        with torch.autocast(self.call.maps.tokens.device.type, torch.bfloat16, enabled=self.amp):
            return self.call()

    def _random_gradient(self, memory: Tensor) -> Tensor:
        gradient = torch.randn_like(memory)
        if memory.dim() > 2:  # not packed: a decoder does not look at padding
            gradient *= ~self.call.maps.cells.view(*memory.shape[:-1], 1).to(memory.device)
        return gradient


@functools.cache
def _training_cells(config: Config, images: int) -> Tensor:
    return cells_of(training_batch(config, images), config)


@functools.cache
def _profile_of_encoder(config: Config, arm: str, images: int) -> dict[str, Any]:
    with cpu_seed(SEED):
        model = build_arm(_without_the_rest(config), arm).eval()
    cells = _training_cells(config, images)
    call = EncoderCall(model, token_maps(cells, config.hidden_dim, torch.device("cpu")), config)
    facts = _profile(model, call)
    parameters = sum(parameter.numel() for parameter in model.get_submodule("encoder").parameters())
    return {"parameters": parameters, "flops": facts["flops"], "clusters": facts["clusters"]}


def _without_the_rest(config: Config) -> Config:
    """The same encoder in a detector that costs nothing to build."""
    return replace(config, backbone="resnet10", dec_layers=1)


@torch.no_grad()
def _profile(model: nn.Module, forward: Callable[[], object]) -> dict[str, Any]:
    """Operations of a forward pass (two for a multiplication with its addition), all and the encoder's, and clusters.

    Attention is counted in its plain form, which every version of torch knows how to count.
    """
    model.requires_grad_(False)  # the counter would look for gradients
    with _clusters_of(model) as clusters, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    encoder = counter.get_flop_counts().get(f"{type(model).__name__}.encoder", {})
    operations = {"flops": counter.get_total_flops(), "flops_encoder": sum(encoder.values())}
    return {**operations, "clusters": clusters}


@contextlib.contextmanager
def _clusters_of(model: nn.Module) -> Iterator[list[float]]:
    """A list that holds, after the block, the mean number of clusters of an image in each encoder layer; or nothing."""
    found: list[float] = []
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    attentions = [module for module in model.get_submodule("encoder").modules() if hasattr(module, "information")]
    ours: list[Any] = [module for module in attentions if hasattr(module, "method")]
    hooks = [
        module.information.register_forward_pre_hook(lambda _, inputs, owner=module: calls.append((owner, inputs)))
        for module in ours
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    for owner, (logits, *real) in calls:
        found.append(form_clusters(logits, owner.information, owner.method, *real).count.float().mean().item())
    found += [float(module.num_clusters) for module in attentions if module not in ours]  # type: ignore[arg-type]

