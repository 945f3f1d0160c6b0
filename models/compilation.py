"""torch.compile for a detector, part by part.

What depends on where images have padding stays outside: which tokens are real is known to the host, and the packed
attention to them is a few large kernels anyway. Sizes are symbols, so that a part is compiled a few times (for training
and evaluation, one image and several, with padding and without) and not for every size of image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def compile_model(model: nn.Module, backend: str = "inductor", fall_back: bool = True) -> nn.Module:
    """Compile the backbone, each encoder layer and the decoder of a detector, in place.

    Modules, parameters and their names stay, so that checkpoints and optimizers do not notice. Where torch cannot
    compile (no compiler, or an operation that it does not know), everything runs as it is, after a warning.

    Args:
        model: one of `build_model`'s, on its device; before wrapping it for distributed training.
        backend: of torch.compile.
        fall_back: False: what cannot be compiled raises its `TorchDynamoException` when it is called.

    Returns:
        The same model.
    """
    state = _State(fall_back)
    encoder = model.get_submodule("encoder")
    layers = encoder.get_submodule("layers").children() if hasattr(encoder, "layers") else ()
    for part in (model.get_submodule("backbone"), *layers, model.get_submodule("decoder")):
        part.compile(dynamic=True, backend=backend)
        compiled: Callable[..., Any] = part._compiled_call_impl
        part._compiled_call_impl = _Guarded(part, compiled, state)
    return model


class _State:
    """What the parts of a model share."""

    def __init__(self, fall_back: bool) -> None:
        self.fall_back = fall_back
        self.failed = False


class _Guarded:
    """A compiled module, which is called as it was once compilation has failed."""

    def __init__(self, module: nn.Module, compiled: Callable[..., Any], state: _State) -> None:
        self._module, self._compiled, self._state = module, compiled, state

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not self._state.failed:
            try:
                return self._compiled(*inputs, **named)
            except torch._dynamo.exc.TorchDynamoException as error:
                if not self._state.fall_back:
                    raise
                self._state.failed = True
                reason = str(error).strip().splitlines()[0]
                logger.warning("torch.compile does not work here, so nothing is compiled: %s", reason)
        return self._module._call_impl(*inputs, **named)  # type: ignore[no-untyped-call]
