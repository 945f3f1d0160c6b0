"""Try a detector in a browser: upload a photograph, see detections, clusters and times, dense beside ENACT.

    python tools/demo.py --checkpoint outputs/detr_enact/checkpoint.pth --compare outputs/detr/checkpoint.pth
    python tools/demo.py --checkpoint outputs/detr/checkpoint.pth       # beside itself with enact.apply, untrained

It needs gradio: pip install gradio. The page is served on this machine alone, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.clusters_plot import draw_layer
from tools.commands import add_device_flag, one_line_errors
from tools.detector_files import add_detector_flags, fields_from, inference_device, load_detector, validation_images
from tools.predict_results import draw
from tools.side_by_side import REPEATS, Arm, Look, arms_of, look_at
from util.errors import InputError
from util.logs import set_up_console

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger("demo")

EXAMPLES = 4
SHOWN_SIDES = (640, 1280)  # pixels that a small picture is enlarged to, and a large one made smaller
FIGURE_DPI = 100
HOW_TIMED = f"Times are medians of {REPEATS} passes in turns, after one to warm up, of this picture alone."
TABLE_HEAD = "| | detections | forward pass | encoder | tokens | clusters a layer |\n|---|---|---|---|---|---|"


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command: serves until it is interrupted; 2 if it could not start."""
    set_up_console()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
    options = build_parser().parse_args(argv)
    arms = load_arms(options)
    examples = example_pictures(arms)
    serve(build_page(arms, examples), options.host, options.port, examples)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_flags(parser)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a second checkpoint, of main.py")
    add_device_flag(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0: all of this machine's")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    return parser


def load_arms(options: argparse.Namespace) -> list[Arm]:
    """The detectors that the flags name."""
    device = inference_device(options.device)
    first = load_detector(options.checkpoint, device, fields_from(options))
    return arms_of(first, load_detector(options.compare, device) if options.compare else None)


def example_pictures(arms: Sequence[Arm]) -> list[Path]:
    """A few validation images of the data set of the first arm, if it is on this machine."""
    try:
        return [path.resolve() for path in validation_images(arms[0].detector.config, EXAMPLES) if path.is_file()]
    except InputError as error:
        logger.info("no examples: %s", error)
        return []


def build_page(arms: Sequence[Arm], examples: Sequence[Path] = ()) -> gradio.Blocks:
    """The page; InputError without gradio."""
    gr = import_gradio()
    with gr.Blocks(title="ENACT", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("## " + " beside ".join(f"*{arm.name}*" for arm in arms))
        looks = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture, score, sigma, button = _controls(gr, arms, examples)
            with gr.Column(scale=3, min_width=480):
                shown = _results(gr, arms)
        shown += [_image(gr, f"encoder layer {number}", f"layer-{number}") for number in range(layers_of(arms[-1]))]

        def look(chosen: Image.Image | None, smoothing_sigma: float, min_score: float) -> list[Any]:
            found = [] if chosen is None else look_at(upright(chosen), arms, smoothing_sigma)
            return [found, *show(found, min_score, arms)]

        def show_again(found: list[Look], min_score: float) -> list[Any]:
            return show(found, min_score, arms)

        gr.on([button.click, sigma.release, picture.change], look, [picture, sigma, score], [looks, *shown])
        score.release(show_again, [looks, score], shown)
    return page


def _controls(gr: Any, arms: Sequence[Arm], examples: Sequence[Path]) -> tuple[Any, Any, Any, Any]:
    """What the reader chooses: photograph, least score, sigma, and the button."""
    clustered = (arm.detector.config for arm in arms if arm.detector.config.enact)
    sigma = next((config.smoothing_sigma for config in clustered), 3.0)
    picture = gr.Image(type="pil", label="photograph", sources=["upload", "clipboard"], elem_id="photograph")
    sliders = (
        gr.Slider(0, 1, 0.5, step=0.01, label="least score of a detection", elem_id="score"),
        gr.Slider(0.5, 12, sigma, step=0.5, label="smoothing sigma of ENACT, in tokens", elem_id="sigma"),
    )
    button = gr.Button("Detect", variant="primary", elem_id="detect")
    if examples:
        gr.Examples([str(path) for path in examples], picture)
    return (picture, *sliders, button)


def _results(gr: Any, arms: Sequence[Arm]) -> list[Any]:
    """Where the detections of each arm and their figures appear."""
    with gr.Row():
        pictures = [_image(gr, arm.name, f"arm-{number}") for number, arm in enumerate(arms)]
    return [*pictures, gr.Markdown(elem_id="table")]


def _image(gr: Any, label: str, name: str) -> Any:
    """A place for a picture of ours."""
    return gr.Image(label=label, interactive=False, elem_id=name, format="png", buttons=["fullscreen", "download"])


def layers_of(arm: Arm) -> int:
    """How many encoder layers a detector has."""
    return arm.detector.config.enc_layers


def import_gradio() -> Any:
    """The gradio package; InputError where it is missing."""
    try:
        import gradio as gr
    except ImportError:
        raise InputError("tools/demo.py needs gradio, which is not installed; pip install gradio") from None
    return gr


def serve(page: gradio.Blocks, host: str, port: int, examples: Sequence[Path] = (), wait: bool = True) -> str:
    """Serve the page and the folders of its examples, until interrupted if `wait`; the page's address.

    Raises:
        InputError: the port is taken.
    """
    gr = import_gradio()
    # Gradio's own themes fetch their letters from the net.
    letters = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    folders = {str(path.parent) for path in examples}
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, show_error=True,
            theme=gr.themes.Default(**letters), allowed_paths=sorted(folders), ssr_mode=False, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot serve on {host}, port {port}: {error}; choose another --port") from None
    logger.info("open %s in a browser; Ctrl+C stops", address)
    if wait:
        page.block_thread()
    return str(address)


def upright(picture: Image.Image) -> Image.Image:
    """As RGB, turned as its EXIF data says."""
    turned: Image.Image = ImageOps.exif_transpose(picture).convert("RGB")
    return turned


def show(looks: Sequence[Look], min_score: float, arms: Sequence[Arm]) -> list[Any]:
    """What the page shows: a picture for each of the arms, a table in Markdown, and the last arm's layers."""
    if not looks:
        return [*[None] * len(arms), "Choose a photograph.", *[None] * layers_of(arms[-1])]
    table = "\n".join([TABLE_HEAD, *(table_row(look, min_score) for look in looks), "", HOW_TIMED])
    return [*(annotated(look, min_score) for look in looks), table, *layer_pictures(looks[-1], min_score)]


def table_row(look: Look, min_score: float) -> str:
    """A line of Markdown."""
    tokens, clusters = look.tokens_and_clusters()
    count = len(look.found(min_score)["scores"])
    times = f"{look.milliseconds:.1f} ms | {look.encoder_milliseconds:.1f} ms"
    return f"| {look.name} | {count} | {times} | {tokens} | {'' if clusters is None else f'{clusters:.0f}'} |"


def annotated(look: Look, min_score: float) -> Image.Image:
    """The picture with what was found, in a size that a screen can show."""
    side = max(look.picture.size)
    zoom = min(max(1.0, SHOWN_SIDES[0] / side), SHOWN_SIDES[1] / side)
    size = round(look.picture.width * zoom), round(look.picture.height * zoom)
    found = look.found(min_score)
    return draw(look.picture.resize(size, Image.Resampling.BICUBIC), {**found, "boxes": found["boxes"] * zoom})


def layer_pictures(look: Look, min_score: float) -> list[Image.Image]:
    """A picture of each encoder layer."""
    explanation, names = look.with_score(min_score), look.class_names
    titles = [f"{look.name}, encoder layer {number}" for number in range(len(explanation.layers))]
    return [rendered(draw_layer(explanation, number, title, names)) for number, title in enumerate(titles)]


def rendered(figure: Figure) -> Image.Image:
    """The pixels of a figure."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=FIGURE_DPI)
    return Image.open(pixels).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
