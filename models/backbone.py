"""ResNet -> one feature map.

Shapes: B images, H x W pixels, C channels of the feature map, h x w cells of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from models.layers import run_layer
from util import checkpoint
from util.errors import InputError

RESNETS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")
STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM = ("conv1", "bn1", "relu", "maxpool")

class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """torchvision's as one operation, whose result has the precision of its input.

    In bf16 torchvision's gives fp32, so that autograd keeps every map twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (factor.to(x.dtype).view(1, -1, 1, 1) for factor in (scale, shift))
        return torch.addcmul(shift, x, scale)


class GroupNorm(nn.GroupNorm):
    """torch's, with statistics in evaluation that are exact to fp32, in PyTorch and in an exported graph.

    On a CPU torch adds the squares of a channels-last map in one row in fp32, and so does onnxruntime: 1e-4 of the
    result over a map of 400 x 533 cells. Here rows of the map are summed each, then columns. Training keeps torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        if self.training or torch.finfo(x.dtype).bits < 32:
            normalized: Tensor = super().forward(x)
            return normalized
        of_rows = torch.var_mean(x, 3, correction=0)
        of_channels = (torch.unflatten(moment, 1, (self.num_groups, -1)) for moment in of_rows)
        variance, mean = of_channels  # each (B, G, C / G, h)
        centre = mean.mean(3, keepdim=True).mean(2, keepdim=True)
        spread = (variance + (mean - centre).square()).mean(3, keepdim=True).mean(2, keepdim=True)
        scale = (spread + self.eps).rsqrt() * self.weight.view(self.num_groups, -1, 1)  # (B, G, C / G, 1)
        shift = self.bias.view(self.num_groups, -1, 1) - centre * scale
        scale, shift = (factor.flatten(1, 2).unsqueeze(-1) for factor in (scale, shift))
        return torch.addcmul(shift, x, scale)


NORMS: dict[str, Callable[[int], nn.Module]] = {"frozen": FrozenBatchNorm, "group": partial(GroupNorm, 32)}


class Backbone(nn.Module):
    """A ResNet with frozen batch normalisation, up to one of its stages (spec 6.0).

    Args:
        name: one of `RESNETS`.
        weights: None for random numbers, "imagenet" for torchvision's pretrained ones, or the path of a file with a
            torchvision ResNet state dict.
        dilation: DC5, the stride of the last stage replaced by dilation; only with `stage=4`.
        stage: the last stage that is used, 1 to 4; its stride is 2 ** (stage + 1). The published models use 4.
        norm: "frozen" batch normalisation as published, or "group" normalisation, which learns from random weights and
            from small batches.
        frozen_stages: how many stages, the stem counted with the first, are not trained; 1 as published.
        recompute: keep the input of each trained stage alone for backward, which computes the rest once more.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str | None = None,
        dilation: bool = False,
        stage: int = 4,
        frozen_stages: int = 1,
        norm: str = "frozen",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if name not in RESNETS:
            raise InputError(f"unknown backbone {name!r}; choose one of {', '.join(RESNETS)}")
        if not 1 <= stage <= 4 or (dilation and stage != 4):
            raise InputError(f"backbone_stage must be 1 to 4, and 4 with dilation; got {stage}, dilation {dilation}")
        resnet = _resnet(name, weights, NORMS[norm])
        if dilation:
            _dilate(resnet.get_submodule("layer4"))
        kept = (*STEM, *STAGES[:stage])
        body = nn.Sequential(OrderedDict((part, getattr(resnet, part)) for part in kept))
        self.body = body.to(memory_format=torch.channels_last)  # a fifth faster on a CPU; what GPU kernels want
        self.recompute = recompute
        self.num_channels = _out_channels(self.body)
        self.stride = 16 if dilation else 2 ** (stage + 1)
        frozen = kept[: len(STEM) + frozen_stages] if frozen_stages else ()
        for part in frozen:
            getattr(self.body, part).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images float (B, 3, H, W), normalised -> features (B, C, h, w), h = ceil(H / stride)."""
        features = images.contiguous(memory_format=torch.channels_last)
        for part in self.body:
            trained = any(weight.requires_grad for weight in part.parameters())
            features = run_layer(part, features, recompute=self.recompute and trained)
        return features


def _resnet(name: str, weights: str | None, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    resnet: nn.Module
    if weights == "imagenet":
        try:
            resnet = torchvision.models.get_model(name, weights="IMAGENET1K_V1", norm_layer=norm_layer)
        except OSError as error:
            raise InputError(
                f"could not fetch torchvision's ImageNet weights of {name} ({error}); download them where there is "
                "a network and give the file with --backbone_weights, or use random ones: --backbone_weights null"
            ) from error
        return resnet
    if name == "resnet10":  # ResNet-18 with half of its blocks, for the small recipe; nobody publishes weights of it
        resnet = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)
    else:
        resnet = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
    if weights is not None:
        _load_file(resnet, Path(weights))
    return resnet


def _load_file(resnet: nn.Module, path: Path) -> None:
    if not path.exists():
        raise InputError(f"no backbone weights at {path}; check --backbone_weights")
    state = checkpoint.read_safely(path)
    try:
        missing, unexpected = resnet.load_state_dict(state, strict=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} does not hold weights of this ResNet: {reason}") from error
    wrong = [key for key in (*missing, *unexpected) if not key.startswith("fc.")]
    if wrong:
        raise InputError(f"{path} does not hold weights of this ResNet: {len(wrong)} keys differ, first {wrong[0]}")


def _dilate(stage: nn.Module) -> None:
    """Replace the stride of a ResNet stage by dilation from its second block on, as DC5 does."""
    for index, block in enumerate(stage.children()):
        for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
            conv.stride = (1, 1)
            if index > 0 and conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)


def _out_channels(body: nn.Module) -> int:
    convolutions = [module for module in body.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels
