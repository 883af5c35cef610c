"""The page itself, in Gradio: its parts, what its buttons do, and the server.

Whatever uses the model waits in one queue and runs one at a time. Gradio keeps uploads and what it shows in the folder
that `serve` gives it, and serves no other files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from varcli.config import SampleConfig
from varcli.demo.files import LARGEST_FILE, canvas, painted_mask, read_photo, save_frame, save_image, save_mask
from varcli.errors import RunError, VarError
from varcli.images.image import Image
from varcli.images.provenance import reproduction_command
from varcli.pipelines.model import Model

SLIDERS: dict[str, tuple[float, float, float]] = {
    "cfg": (0, 10, 0.1),
    "top_p": (0, 1, 0.01),
    "temperature": (0.1, 2, 0.05),
    "ssg": (0, 5, 0.1),
}
"""Least and largest value and step of the settings that are sliders, besides top-k, whose end the codebook sets.

Any other field of `SampleConfig` becomes a box for its type.
"""
USES_MODEL = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "show_progress": "minimal",
}
"""Of all events that use the model: one runs at a time."""
LOOPBACK = ("127.0.0.1", "localhost")
CSS = """
.image-frame { width: 100%; }
.image-frame img { object-fit: contain !important; }
.pixels img { image-rendering: pixelated; }
.grid-wrap { min-height: 0 !important; padding-top: 36px; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important; }
"""
"""Small images fill their places, samples with each pixel a block; the scales take no more height than they need."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "frame-ancestors 'none'"
)
"""Content security policy: nothing is loaded from, or sent to, another machine. Gradio's page needs inline scripts."""


class SecurityPolicy:
    """ASGI middleware that sends the policy with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(model: Model, folder: Path, host: str, port: int, *, browser: bool = False) -> tuple[Any, str]:
    """Serve the page from threads of this process; return Gradio's page, whose `close` ends it, and its address.

    Args:
        model: what samples and edits.
        folder: for uploads and results, which go after an hour.
        host: address to listen at.
        port: to listen at.
        browser: open the page in the system's browser.

    Raises:
        RunError: the address or the port is not available.
    """
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    page = build(model, folder)
    # Without this check another site could use the page through a name that resolves to this machine.
    names = [*LOOPBACK] if host in LOOPBACK else ["*"]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(SecurityPolicy)]
    try:
        _, address, _ = page.queue(max_size=16).launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=LARGEST_FILE,
            footer_links=[],
            app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},  # FastAPI's own pages
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
        )
    except OSError as error:
        raise RunError(
            f"cannot listen at --host {host} --port {port}: give an address of this machine and a port that is free"
        ) from error
    return page, address


def build(model: Model, folder: Path) -> Any:
    """Return the page for a model as Gradio's `Blocks`; results are written into `folder`."""
    with gr.Blocks(title="varcli", delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# varcli\n{model.name}, {model.tokenizer_config.pixels} × {model.tokenizer_config.pixels} pixels")
        with gr.Tab("Sample"):
            _sample_tab(model, folder)
        with gr.Tab("Compare"):
            _compare_tab(model, folder)
        with gr.Tab("Edit"):
            _edit_tab(model, folder)
    return page


# --- tabs ------------------------------------------------------------------------------------------


def _sample_tab(model: Model, folder: Path) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            label, seed = _class_box(model), _seed_box()
            with gr.Row():
                button = gr.Button("Sample", variant="primary", min_width=120)
                following = gr.Button("Next seed", min_width=120)
            settings = _setting_boxes(model)
        with gr.Column(min_width=280):
            result = _result_boxes("Image")
            growth = gr.Gallery(
                label="After each scale", height="auto", format="png", buttons=[], elem_classes="pixels"
            )

    def sample(label: str, seed: int | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        with _errors_shown():
            frames: list[tuple[Path, str]] = []
            growing = model.grow(label, seed=seed or 0, **_settings(values))
            for image, side in zip(growing, model.tokenizer_config.sides, strict=True):
                frames.append((save_frame(image, folder), f"{side} × {side}"))
                yield frames[-1][0], "", gr.DownloadButton(interactive=False), frames
            yield *_shown(image, folder), frames

    inputs, outputs = [label, seed, *settings], [*result, growth]
    button.click(sample, inputs, outputs, **USES_MODEL)
    following.click(lambda seed: (seed or 0) + 1, seed, seed, api_visibility="private").then(
        sample, inputs, outputs, **USES_MODEL
    )


def _compare_tab(model: Model, folder: Path) -> None:
    with gr.Row():
        label, seed = _class_box(model), _seed_box()
    settings, results = [], []
    button = gr.Button("Sample both", variant="primary")
    with gr.Row():
        for name, preset in (("A", "looks"), ("B", "metrics")):
            with gr.Column(min_width=280):
                results.append(_result_boxes(name))
                settings.append(_setting_boxes(model, preset))

    def compare(label: str, seed: int | None, *values: Any) -> Iterator[tuple[Any, ...]]:
        half = len(values) // 2
        with _errors_shown():
            (first,) = model.stream([(label, seed or 0)], **_settings(values[:half]))
            yield *_shown(first, folder), None, "", gr.DownloadButton(interactive=False)
            (second,) = model.stream([(label, seed or 0)], **_settings(values[half:]))
            yield *_shown(first, folder), *_shown(second, folder)

    button.click(compare, [label, seed, *settings[0], *settings[1]], [*results[0], *results[1]], **USES_MODEL)


def _edit_tab(model: Model, folder: Path) -> None:
    with gr.Row():
        with gr.Column(min_width=280):
            mode = gr.Radio(
                [("Fill a hole", "inpaint"), ("Repaint with another class", "edit"), ("Extend", "outpaint")],
                value="inpaint",
                label="What to do",
            )
            upload = gr.File(label=f"Photograph, at most {LARGEST_FILE // 2**20} MB", file_types=["image"], height=120)
            painting = gr.ImageEditor(
                label="Paint over what is to be filled",
                type="numpy",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=["#ff5a00"], color_mode="fixed"),
                buttons=["fullscreen"],
            )
            with gr.Row(visible=False) as margins:
                pads = [gr.Slider(0, 50, 25, step=1, label=f"{side}, %") for side in ("Left", "Top", "Right", "Bottom")]
            label, seed = _class_box(model, "none"), _seed_box()
            button = gr.Button("Edit", variant="primary")
            settings = _setting_boxes(model)
        with gr.Column(min_width=280):
            result = _result_boxes("Result", style="photo")
            mask_file = gr.DownloadButton("Download the mask", interactive=False)

    def edit(
        mode: str, upload: str | None, painted: Any, label: str, seed: int | None, *values: Any
    ) -> tuple[Any, ...]:
        with _errors_shown():
            photo, settings = read_photo(upload), _settings(values[len(pads) :])
            if mode == "outpaint":
                pad = ",".join(f"{percent:g}%" for percent in values[: len(pads)])
                image = model.outpaint(photo, pad=pad, label=label, seed=seed or 0, **settings)
                return *_shown(image, folder), gr.DownloadButton(interactive=False)
            mask = painted_mask(painted["layers"] if painted else [], photo)
            if mode == "edit":
                image = model.edit(photo, label, mask, seed=seed or 0, **settings)
            else:
                image = model.inpaint(photo, mask, label=label, seed=seed or 0, **settings)
            return *_shown(image, folder), gr.DownloadButton(value=save_mask(mask, folder), interactive=True)

    def show_photo(upload: str | None) -> Any:
        with _errors_shown():
            return None if upload is None else canvas(read_photo(upload))

    def show_mode(mode: str) -> tuple[Any, Any]:
        return gr.ImageEditor(visible=mode != "outpaint"), gr.Row(visible=mode == "outpaint")

    upload.change(show_photo, upload, painting, api_visibility="private")
    mode.change(show_mode, mode, [painting, margins], api_visibility="private")
    button.click(edit, [mode, upload, painting, label, seed, *pads, *settings], [*result, mask_file], **USES_MODEL)


# --- parts of tabs ---------------------------------------------------------------------------------


def _class_box(model: Model, value: str | None = None) -> Any:
    """Classes by index and all names, so that what is typed is searched in all of them."""
    choices = [(f"{entry.id} {', '.join(entry.names)}", str(entry.id)) for entry in model.classes.entries]
    return gr.Dropdown(
        [("none", "none"), *choices], value=value or choices[0][1], label="Class", filterable=True, min_width=240
    )


def _seed_box() -> Any:
    return gr.Number(0, label="Seed", precision=0, minimum=0)


FIELDS = sorted(
    (field for field in fields(SampleConfig) if field.name not in ("refiner", "refine_from")),
    key=lambda field: not field.metadata["shown"],
)
"""Settings in the order of their boxes: those that have a value in every preset come first.

The refiner is the preset's: visitors of the page must not name files to read, or checkpoints to download.
"""


def _setting_boxes(model: Model, preset: str = "looks") -> list[Any]:
    """One box per setting, in the order of `FIELDS`; those without a preset are folded."""
    config = model.settings(preset)

    def box(field: Any) -> Any:
        value = getattr(config, field.name)
        shown = {"label": field.name.replace("_", "-"), "info": field.metadata["help"]}
        if field.name == "top_k":
            most = model.tokenizer_config.codebook_size
            return gr.Slider(0, most, min(value, most), step=1, **shown)
        if field.name in SLIDERS:
            least, largest, step = SLIDERS[field.name]
            return gr.Slider(least, largest, value, step=step, **shown)
        if field.type is bool:
            return gr.Checkbox(value, **shown)
        return gr.Textbox(value, **shown) if field.type is str else gr.Number(value, **shown)

    boxes = [box(field) for field in FIELDS if field.metadata["shown"]]
    with gr.Accordion("More settings", open=False):
        boxes += [box(field) for field in FIELDS if not field.metadata["shown"]]
    return boxes


def _settings(values: Sequence[Any]) -> dict[str, Any]:
    """The settings that are in the boxes; an empty number keeps the preset's value."""
    kinds: list[tuple[str, Any]] = [(field.name, field.type) for field in FIELDS]
    return {name: kind(value) for (name, kind), value in zip(kinds, values, strict=True) if value is not None}


def _result_boxes(name: str, style: str = "pixels") -> list[Any]:
    """An image, the command that reproduces it, and its download."""
    return [
        gr.Image(label=name, format="png", height=360, interactive=False, buttons=["fullscreen"], elem_classes=style),
        gr.Textbox(label="The command that makes this image", lines=2, interactive=False, buttons=["copy"]),
        gr.DownloadButton("Download", interactive=False),
    ]


def _shown(image: Image, folder: Path) -> tuple[Any, ...]:
    """What goes into the result boxes. The browser gets the file that was written, so that its provenance is kept."""
    path = str(save_image(image, folder))
    return path, reproduction_command(image.provenance), gr.DownloadButton(value=path, interactive=True)


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show an error that the user can fix on the page, and print nothing."""
    try:
        yield
    except VarError as error:
        raise gr.Error(str(error), print_exception=False) from error
