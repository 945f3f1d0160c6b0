"""The configuration: what each field means, and where its value comes from.

A value is taken from the first of these that has it: a flag, `--config FILE`, `configs/shapes_MODEL.yaml` and
`configs/shapes.yaml` (only without `--coco_path`), the row of the results table that `--model` and `--enact` pick, the
default below. The defaults are DETR's published recipe (spec 5.1, 5.4).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from util.files import unprintable

CONFIG_DIR = Path(__file__).parent
# Fields that say what ENACT does, and their values where nothing is chosen.
ENACT_CHOICES = {
    "regions": None,
    "pooling": None,
    "cluster_bias": None,
    "boundary": None,
    "max_clusters": None,
    "token_order": "raster",
}
ModelName = Literal["detr", "conditional_detr", "anchor_detr"]
EnactVariant = Literal["paper", "official", "plus"]


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The names are those of DETR's flags where DETR has the flag."""

    # What to train
    model: ModelName = "detr"
    enact: EnactVariant | None = None
    """None: dense encoder; --enact alone: paper."""
    smoothing_sigma: float = 3.0
    """Standard deviation, in tokens, of the filter on the information."""
    max_clusters: int | None = None
    """The most clusters of an image and layer, neighbours merged beyond; None: one for 4 tokens (official: 2)."""
    regions: Literal["sign_change", "uniform", "random", "chunks", "image_chunks", "tokens"] | None = None
    """Where the tokens are cut into clusters; None: as the variant of ENACT has it, here and below."""
    pooling: Literal["information", "scaled_information", "probability", "mean"] | None = None
    """What a token weighs in its cluster."""
    cluster_bias: Literal["none", "size", "mass"] | None = None
    """What a cluster counts for in the attention: as one key, its tokens, or its share of the probability."""
    boundary: Literal["hard", "soft"] | None = None
    """Whether the tokens beside a cut belong to both clusters, so that cuts learn where to be."""
    token_order: Literal["raster", "serpentine", "windows", "hilbert"] = "raster"
    """The order of the tokens that is cut into clusters."""

    # Architecture
    backbone: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    backbone_weights: str | None = "imagenet"
    """None: random; imagenet: torchvision's; or a file."""
    backbone_stage: int = 4
    """Last ResNet stage used; its stride is 2 ** (stage + 1)."""
    backbone_frozen_stages: int = 1
    """Stages that are not trained, the stem counted with the first."""
    backbone_norm: Literal["frozen", "group"] = "frozen"
    """Frozen batch norm, or group norm for training from random weights."""
    dilation: bool = False
    """DC5: the last stage dilated instead of strided."""
    position_embedding: Literal["sine", "learned"] = "sine"
    """Of detr and conditional_detr; anchor_detr embeds sines with a small network."""
    enc_layers: int = 6
    dec_layers: int = 6
    dim_feedforward: int = 2048
    hidden_dim: int = 256
    nheads: int = 8
    dropout: float = 0.1
    attention_dropout: float | None = None
    """On attention weights alone; None: as dropout. Above 0 a CPU has no fused kernel, and stores the maps."""
    num_queries: int = 100
    """Detr and conditional_detr; anchor_detr has num_query_position * num_query_pattern."""
    num_query_position: int = 300
    """Anchor points of anchor_detr."""
    num_query_pattern: int = 3
    """Queries of anchor_detr at each anchor point."""
    spatial_prior: Literal["learned", "grid"] = "learned"
    """Anchor points of anchor_detr: learned, or the square lattice nearest to num_query_position in number."""
    num_classes: int | None = None
    """None: the largest category id of the training annotations + 1."""

    pretrained: str | None = None
    """Weights to start from: a checkpoint, ours or published, or a Hugging Face folder or safetensors file."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained, by the beginnings of their names: backbone, encoder, encoder.layers.0, ..."""

    # Loss and matching
    aux_loss: bool = True
    """Train the earlier decoder layers too."""
    set_cost_class: float = 1.0
    set_cost_bbox: float = 5.0
    set_cost_giou: float = 2.0
    cls_loss_coef: float = 1.0
    bbox_loss_coef: float = 5.0
    giou_loss_coef: float = 2.0
    eos_coef: float = 0.1
    """Weight of "no object" in the cross-entropy."""
    focal_alpha: float = 0.25

    # Data
    coco_path: str | None = None
    """Train2017/, val2017/, annotations/; None: the built-in drawn scenes."""
    shapes_train: int = 4000
    """Drawn scenes to train on."""
    shapes_val: int = 250
    """Drawn scenes to evaluate on."""
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Pixels."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Before a random crop; empty: no crops."""
    crop_range: tuple[int, int] = (384, 600)
    """Sides of a random crop, pixels."""
    eval_short_side: int = 800
    max_long_side: int = 1333
    num_workers: int = 2
    """Loader processes for each training process."""
    max_bad_images: int = 0
    """Training images that may be missing or damaged, for each process; the next image takes the place of each."""

    # Optimisation
    lr: float = 1e-4
    lr_backbone: float = 1e-5
    """0: the backbone is not trained."""
    batch_size: int = 2
    """Images for each process and step."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""
    weight_decay: float = 1e-4
    epochs: int = 300
    lr_drop: int = 200
    """Epochs after which both learning rates are divided by ten."""
    clip_max_norm: float = 0.1
    """Largest norm of the gradient of all weights; 0: no clipping."""
    amp: bool = False
    """Bf16 autocast."""
    checkpoint_activations: Literal["none", "encoder", "backbone", "all"] = "none"
    """Where to keep the inputs of layers alone for backward, which runs them again: less memory, more time."""
    compile: bool = False
    """Torch.compile for backbone, encoder layers and decoder; a first step takes minutes."""
    seed: int = 42

    # Run
    device: str = "auto"
    """Auto: cuda where there is one, else cpu."""
    output_dir: str | None = None
    """None: outputs/MODEL, outputs/MODEL_enact, outputs/MODEL_enact_official or outputs/MODEL_enact_plus."""
    resume: str | None = None
    """A checkpoint, or auto: the newest one of output_dir, if any."""
    eval: bool = False
    """Evaluate and stop."""
    eval_every: int = 1
    """Epochs."""
    checkpoint_every: float = 15.0
    """Minutes between checkpoints inside an epoch, by the clock of the main process; 0: only after epochs."""
    checkpoint_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: by minutes alone."""
    keep_every: int = 10
    """Epochs between the checkpoints that are kept."""
    max_bad_steps: int = 0
    """Steps with a loss or gradient that is not finite that are skipped before a run stops."""
    wandb: str | None = None
    """Project of Weights & Biases to log to beside TensorBoard, if installed; WANDB_MODE=offline keeps it here."""
    dist_timeout: float = 30.0
    """Minutes that a process waits for the others."""

    def __post_init__(self) -> None:
        """Refuse values that no run can have (ValueError)."""
        for allowed, rule in (
            (self.batch_size > 0 and self.accumulate > 0, "batch_size and accumulate must be 1 or more"),
            (self.eval_every > 0 and self.keep_every > 0, "eval_every and keep_every must be 1 or more"),
            (
                self.checkpoint_every >= 0 and self.checkpoint_steps >= 0 and self.max_bad_steps >= 0,
                "checkpoint_every, checkpoint_steps and max_bad_steps must be 0 or more",
            ),
            (self.epochs >= 0 and self.lr_drop > 0, "epochs must be 0 or more, lr_drop 1 or more"),
            (self.num_workers >= 0, "num_workers must be 0 or more"),
            (self.max_bad_images >= 0, "max_bad_images must be 0 or more"),
            (self.lr >= 0 and self.lr_backbone >= 0, "lr and lr_backbone must be 0 or more"),
            (self.clip_max_norm >= 0, "clip_max_norm must be 0 or more"),
            (0 <= self.dropout < 1, "dropout must be in [0, 1)"),
            (
                self.attention_dropout is None or 0 <= self.attention_dropout < 1,
                "attention_dropout must be in [0, 1), or null for that of dropout",
            ),
            (self.hidden_dim % (4 * self.nheads) == 0, "hidden_dim must be a multiple of 4 times nheads"),
            (self.enc_layers >= 0 and self.dec_layers > 0, "enc_layers must be 0 or more, dec_layers 1 or more"),
            (self.num_queries > 0, "num_queries must be 1 or more"),
            (self.max_clusters is None or self.max_clusters > 0, "max_clusters must be 1 or more"),
            (
                self.enact is not None or all(getattr(self, name) == ENACT_CHOICES[name] for name in ENACT_CHOICES),
                f"{', '.join(ENACT_CHOICES)} have no effect without enact",
            ),
            (
                self.enact != "official" or self.token_order == "raster",
                "token_order must be raster with enact official, which clusters the map as it stands",
            ),
            (self.smoothing_sigma > 1 / 3, "smoothing_sigma must be above 1/3"),
            (bool(self.train_short_sides), "train_short_sides must name at least one size"),
            (0 < self.crop_range[0] <= self.crop_range[1], "crop_range must be two sizes, the smaller first"),
            (self.shapes_train > 0 and self.shapes_val > 0, "shapes_train and shapes_val must be 1 or more"),
            (all(map(_is_plain, vars(self).values())), "integers must fit into 64 bits, and texts have no line breaks"),
        ):
            if not allowed:
                raise ValueError(rule)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return not unprintable(value) if isinstance(value, str) else not isinstance(value, int) or abs(value) < 2**63


FIELD_NAMES = frozenset(field.name for field in fields(Config))


def recipe_files(model: str, enact: str | None, built_in_data: bool) -> list[Path]:
    """The YAML files whose values hold for a run, weakest first."""
    if model not in get_args(ModelName):
        raise ValueError(f"no model {model!r}; choose one of {', '.join(get_args(ModelName))}")
    row = {"detr": "detr_r50", "conditional_detr": "conditional_detr_r101", "anchor_detr": "anchor_detr_r50_dc5"}[model]
    files = [CONFIG_DIR / f"{row}{'_enact' if enact else ''}.yaml"]
    if built_in_data:
        own = CONFIG_DIR / f"shapes_{model}.yaml"
        files += [CONFIG_DIR / "shapes.yaml", *([own] if own.exists() else [])]
    return files


def recipe(model: str, enact: str | None = None, **overrides: Any) -> Config:
    """The row of the results table for `model` and `enact`, with some fields replaced."""
    unknown = overrides.keys() - FIELD_NAMES
    if unknown:
        raise ValueError(f"no such field of the config: {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for file in recipe_files(model, enact, built_in_data=False):
        values |= yaml.safe_load(file.read_text())
    return replace(Config(), **{**values, "model": model, "enact": enact, **overrides})
