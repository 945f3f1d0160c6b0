"""torch.compile, torch.export and ONNX: one graph for every size, with the eager result."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from test_models import SMALL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from enact import EnactAttention, EnactRowColumnAttention
from models import build_model

DYNAMIC = torch.export.Dim.DYNAMIC
SIZES = {"images": {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}, "pad_mask": {0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC}}
VARIANTS = ("paper", "official", "plus")
MODELS = ("detr", "conditional_detr", "anchor_detr")
ORDER = {"paper": "raster", "official": "raster", "plus": "hilbert"}
ROWS = [
    ("detr", "paper"),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (("detr", "plus"), ("conditional_detr", None), ("anchor_detr", "paper"), ("anchor_detr", "official"))
    ),
]


class Outputs(nn.Module):
    """A detector whose outputs are a tuple of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, pad_mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model(images, pad_mask)
        return outputs["pred_logits"], outputs["pred_boxes"]


def detector(name: str, variant: str | None) -> nn.Module:
    order = {} if variant is None else {"token_order": ORDER[variant]}
    sizes = {"backbone": "resnet10", "backbone_stage": 2, "dilation": False, "enc_layers": 1, "dec_layers": 1}
    return Outputs(build_model(name, variant, **{**SMALL, **sizes, **order})).eval()


def images_of(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    pad_mask = torch.zeros(batch, height, width, dtype=torch.bool)
    pad_mask[1:, height - 19 :] = True
    pad_mask[1:, :, width - 26 :] = True
    return torch.rand(batch, 3, height, width), pad_mask


def tokens_of(batch: int, count: int) -> tuple[Tensor, Tensor]:
    real = torch.tensor([[count - 7 * image] for image in range(batch)])
    return torch.randn(batch, count, 32), torch.arange(count) >= real


def attend(attention: Any, tokens: Tensor, pad_mask: Tensor) -> Tensor:
    result: Tensor = attention(tokens, tokens, tokens, key_padding_mask=pad_mask, need_weights=False)[0]
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile_makes_one_graph_of_a_layer_for_all_lengths(variant: Any) -> None:
    attention = EnactAttention(32, 4, batch_first=True, variant=variant).eval()
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (40, 64, 91):
            tokens, mask = tokens_of(2, count)
            assert_close(attend(compiled, tokens, mask), attend(attention, tokens, mask), atol=1e-5, rtol=0)


def test_compile_gives_the_eager_gradients() -> None:
    attention = EnactAttention(32, 4, batch_first=True, variant="plus")
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    tokens, mask = tokens_of(2, 50)
    gradients = []
    for layer in (attention, compiled):
        loss = attend(layer, tokens, mask).square().sum()
        gradients.append(torch.autograd.grad(loss, list(attention.parameters())))
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compile_by_inductor_gives_the_eager_result() -> None:
    attention = EnactAttention(32, 4, batch_first=True, variant="plus").eval()
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for count in (40, 91):
        tokens, mask = tokens_of(2, count)
        assert_close(attend(compiled, tokens, mask), attend(attention, tokens, mask), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_compile_takes_a_whole_detector_as_one_graph(name: str, variant: str | None) -> None:
    model = detector(name, variant)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((2, 128, 160), (2, 160, 192)):
            check(compiled, model, images_of(*size))


def check(found: Any, expected: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found(*inputs), expected(*inputs), strict=True):
        assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "variant"), ROWS)
def test_export_and_onnx_take_any_batch_and_size(name: str, variant: str | None) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = detector(name, variant)
    with torch.no_grad():
        exported = torch.export.export(model, images_of(3, 97, 130), dynamic_shapes=SIZES)
        program = torch.onnx.export(exported, dynamo=True, verbose=False)
        file = io.BytesIO()
        program.save(file)
        session = onnxruntime.InferenceSession(file.getvalue())
        names = [entry.name for entry in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            arrays = (tensor.numpy() for tensor in inputs)
            return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

        for size in ((3, 97, 130), (1, 128, 90), (2, 200, 150)):
            inputs = images_of(*size)
            check(exported.module(), model, inputs)
            check(run, model, inputs)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="fake tensors of older versions ask the driver of a real GPU")
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_for_the_device(variant: Any) -> None:
    """On tensors that claim to be on a GPU and hold no values, whatever asks for a value fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        attention = EnactAttention(32, 4, 0.1, batch_first=True, variant=variant, device="cuda")
        tokens = torch.randn(2, 40, 32, device="cuda")
        mask = torch.zeros(2, 40, dtype=torch.bool, device="cuda")
        assert attend(attention, tokens, mask).device.type == "cuda"
        row_column = EnactRowColumnAttention(32, 4, variant=variant, device="cuda")
        cells = torch.randn(2, 5, 8, 32, device="cuda")
        result = row_column(cells, cells, cells, cells, cells, key_padding_mask=mask.view(2, 5, 8))
        assert result.shape == cells.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_a_forward_and_backward_never_wait_for_the_gpu(name: str, variant: str | None) -> None:
    model = detector(name, variant).train().cuda()
    images, pad_mask = images_of(3, 160, 200)
    images = images.cuda()
    for strict in (False, True):
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            sum(output.sum() for output in model(images, pad_mask)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
