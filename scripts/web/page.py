"""A web page that draws images of a class, shows them as they form, and fills what is painted over.

It listens on 127.0.0.1 unless told otherwise. Without --password it asks nobody who they are: with --host 0.0.0.0
everyone in reach may use the GPU. Numbers from the browser are checked again here, and no path or address that a
browser names is opened but the pictures uploaded for the editor, in a temporary folder of the page's own.
"""

import hmac
import html
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
import web_guards
import web_requests
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from masked_diffusion import logger, script_util
from masked_diffusion.sample_config import SOLVERS_OF, SampleConfig
from masked_diffusion.sampling.build import load_weights, make_image_sampler
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import make_grid, save_grid
from masked_diffusion.weights.pretrained import describe

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_WAITING = 20  # jobs in the queue
ENDING_SECONDS = 10  # that the step of a job may take when the page ends
PANE = 540  # pixels
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
#status p {font-size: 1rem; min-height: 1.5em}
#status .wrap:has(.error) {display: none}  /* a toast says what is wrong; a stopped job is no error */
.pixels img {image-rendering: pixelated}
"""


@dataclass(frozen=True)
class PageConfig(Config):
    """page"""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(7860, "port to listen on; 0: a free one", at_least=0, at_most=65535)
    password: str | None = option(
        None, "what visitors have to enter, with any name; of use with --host 0.0.0.0; None: nothing",
        check=lambda text: None if text else "a password that is not empty",
    )  # fmt: skip
    max_images: int = option(16, "images that one request may ask for", at_least=1)
    max_steps: int = option(250, "sampling steps that one request may ask for", at_least=1)


@dataclass(frozen=True)
class Flags(Config):
    sample: SampleConfig = field(default_factory=SampleConfig)
    page: PageConfig = PageConfig()


def parse_flags() -> Flags:
    """The command line, with defaults that show something soon."""
    quick = {"solver": "ddim", "num_sampling_steps": "50", "cfg_cond": True, "cfg_scale": 4.0, "scale_pow": 0.01}
    return script_util.parse_flags(Flags, __doc__, **quick, precision="auto")


# ---------------------------------------------------------------- what comes from the browser


class Page(gr.Blocks):
    """Blocks that open nothing that a browser names but what was uploaded for the editor, and few pixels of that.

    Gradio itself also fetches addresses, for any widget.
    """

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        try:
            inputs = [self.check_value(widget, value) for widget, value in zip(block_fn.inputs, inputs, strict=True)]
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except (gr.Error, UserError) as error:
            raise refusal(getattr(error, "message", str(error))) from error
        except Exception as error:  # what gradio and pydantic raise for values that no widget sends
            raise refusal("The values are of another form than this page sends: load it again.") from error

    def check_value(self, widget, value):
        """The value of a widget, without what nobody looks at."""
        files = list(named_files(value))
        if not all(isinstance(widget, gr.ImageEditor) and is_upload(path) for path in files):
            raise UserError("This page opens no paths and no addresses.")
        if not isinstance(widget, gr.ImageEditor) or value is None:
            return value
        layers = value.get("layers") or []
        if not isinstance(layers, list) or len(layers) > 1:
            raise UserError("the picture has several layers of paint: one is taken")
        value = {"background": value.get("background"), "layers": layers, "composite": None}
        web_guards.check_pictures(list(named_files(value)), web_requests.MOST_PIXELS)
        return value


def refusal(message: str) -> gr.Error:
    """What a browser shows; it takes the message for HTML."""
    return gr.Error(html.escape(message, quote=False), print_exception=False)


def named_files(value: Any) -> Iterator[Any]:
    """What gradio could take for the path of a file, anywhere in a JSON value."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from named_files(part)


def is_upload(path: Any) -> bool:
    folder = Path(get_upload_folder()).resolve()
    return isinstance(path, str) and folder in Path(path).resolve().parents


# ---------------------------------------------------------------- jobs


@contextmanager
def errors_shown() -> Iterator[None]:
    """What is wrong with a request is shown in the browser."""
    try:
        yield
    except ValueError as error:
        raise refusal(str(error)) from error


class Studio:
    """What the buttons do.

    :param config: holds what the page offers no choice of. :param weights: from `load_weights(config)`.
    :param folder: where files to download are written; gradio copies them.
    :param jobs: what runs, and may have to end.
    :raises UserError: when the flags' own settings are none that the page may ask for.
    """

    def __init__(self, config, limits, weights, folder, jobs):
        self.config, self.weights, self.folder, self.jobs = config, weights, Path(folder), jobs
        self.limits = replace(limits, solvers=SOLVERS_OF[weights.diffusion["objective"]])
        image_sampler, solver = make_image_sampler(config, weights), config.solver
        self.size, guidance = image_sampler.size, image_sampler.denoise.guidance
        self.rule, steps = guidance.rule, solver.num_sampling_steps
        self.initial = self.check(
            0, min(4, limits.images), solver.seed, image_sampler.solver.name,
            int(steps) if steps.isdecimal() else steps, guidance.cfg_scale, guidance.scale_pow,
        )  # fmt: skip

    def check(self, *values: Any) -> web_requests.Request:
        return web_requests.check_request(self.limits, self.weights.model.num_classes, *values)

    def class_choices(self) -> list[tuple[str, int]]:
        """Pairs of what is shown and its label."""
        labels = range(max(self.weights.model.num_classes, 1))
        return [(self.name_of(label), label) for label in labels]

    def name_of(self, label: int) -> str:
        name = self.weights.class_names[label] if self.weights.class_names else str(label)
        return name if name == str(label) else f"{label}  {name}"

    def draw(self, visitor: gr.Request, *values: Any) -> Iterator[tuple]:
        """The values of `Request`, in its order -> what `show` yields."""
        with errors_shown(), self.jobs.running(visitor.session_hash) as check:
            request = self.check(*values)
            yield from self.show(request, web_requests.draw(self.config, self.weights, request, check))

    def fill(self, visitor: gr.Request, painting: Any, resamplings: Any, *values: Any) -> Iterator[tuple]:
        """What the editor holds, resamplings, and the values of `Request` -> what `show` yields."""
        with errors_shown(), self.jobs.running(visitor.session_hash) as check:
            request = self.check(*values)
            image, hole = web_requests.check_painting(painting, self.size)
            job = web_requests.fill(self.config, self.weights, request, image, hole, resamplings, check)
            yield from self.show(request, job)

    def show(self, request: web_requests.Request, job: Iterator[web_requests.Progress]) -> Iterator[tuple]:
        """The view, a line of text, the download and the images, as a job goes on."""
        start = time.perf_counter()
        yield gr.skip(), "Starting ...", gr.DownloadButton(interactive=False), gr.skip()
        for progress in job:
            view, seconds = web_requests.view_of(progress.images), time.perf_counter() - start
            if progress.done < progress.total:
                yield view, f"Step {progress.done} of {progress.total}, {seconds:.1f} s", gr.skip(), gr.skip()
        path = self.folder / f"class{request.label}_seed{request.seed}.png"
        save_grid(path, progress.images, web_requests.columns_of(request.count))
        line = f"{request.count} x **{web_guards.escape(self.name_of(request.label))}**, seed {request.seed}: "
        line += f"{progress.total} steps in {seconds:.1f} s"
        yield view, line, gr.DownloadButton(value=path, interactive=True), progress.images

    def take(self, images: Any, event: gr.EventData) -> Any:
        """The image that was clicked goes into the editor."""
        with errors_shown():
            place = event._data.get("index") if isinstance(event._data, dict) else None
            image = web_requests.clicked(images, place)
        return make_grid(image[None], 1, max(1, web_requests.VIEW // self.size))


# ---------------------------------------------------------------- the page


def build_page(studio: Studio) -> gr.Blocks:
    """The widgets, and which of them do what."""
    age = web_guards.STORED_SECONDS
    with Page(title="Masked diffusion", analytics_enabled=False, delete_cache=(age, age)) as page:
        gr.Markdown(f"# Masked diffusion\n{describe(studio.weights.model)}, images of {studio.size}x{studio.size}")
        values = add_settings(studio)
        images = gr.State(None)
        with gr.Row():
            with gr.Column():
                view = gr.Image(
                    show_label=False, format="png", interactive=False, buttons=["fullscreen"], height=PANE,
                    elem_id="view", elem_classes="pixels" if studio.size < 64 else None,
                )  # fmt: skip
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
                    download = gr.DownloadButton("Download PNG", interactive=False, elem_id="download")
                status = gr.Markdown("Choose a class and press Draw.", elem_id="status")
            with gr.Column():
                painting = add_editor(studio.size)
                with gr.Row():
                    fill = gr.Button("Fill what is painted over", variant="primary", elem_id="fill")
                    resamplings = gr.Slider(
                        1, web_requests.MOST_RESAMPLINGS, value=4, step=1, label="Resamplings", buttons=[]
                    )
                gr.Markdown(
                    "Click one of the images, or upload one, and paint over what is to be drawn anew, as the class "
                    "above. ddpm, ddim and the flow solvers can do it; more resamplings join old and new better, and "
                    "take longer."
                )
        # One job at a time, whichever button it comes from.
        shared = {"outputs": [view, status, download, images], "concurrency_id": "model", "concurrency_limit": 1}
        shared |= {"show_progress": "minimal", "show_progress_on": status, "api_visibility": "private"}
        jobs = [draw.click(studio.draw, values, **shared)]
        jobs += [fill.click(studio.fill, [painting, resamplings, *values], **shared)]
        cancelled = stop.click(None, cancels=jobs, api_visibility="private")
        cancelled.then(lambda: "Stopped.", None, status, queue=False, show_progress="hidden", api_visibility="private")
        view.select(studio.take, images, painting, api_visibility="private", show_progress="hidden")
    return page.queue(max_size=MAX_WAITING, api_open=False)


def add_settings(studio: Studio) -> list:
    """The widgets of a `Request`'s values, in its order."""
    initial, limits = studio.initial, studio.limits
    with gr.Row(equal_height=True):
        label = gr.Dropdown(
            studio.class_choices(), value=initial.label, label="Class: type to search", filterable=True, scale=2,
            elem_id="class",
        )  # fmt: skip
        count = gr.Slider(1, limits.images, value=initial.count, step=1, label="Images", buttons=[], elem_id="count")
        another = gr.Button("another", size="sm")
        seed = gr.Number(initial.seed, precision=0, minimum=0, label="Seed", buttons=[another], elem_id="seed")
    with gr.Row(equal_height=True):
        solver = gr.Dropdown(list(limits.solvers), value=initial.solver, label="Solver")
        steps = gr.Slider(1, limits.steps, value=initial.steps, step=1, label="Steps", buttons=[], elem_id="steps")
        scale = gr.Slider(
            0, web_requests.LARGEST_SCALE, value=initial.cfg_scale, step=0.1, label="Guidance scale", buttons=[],
            visible=studio.rule != "none",
        )  # fmt: skip
        power = gr.Slider(
            0, web_requests.LARGEST_POWER, value=initial.scale_pow, step=0.01, label="Power", buttons=[],
            visible=studio.rule == "power-cosine",
        )  # fmt: skip
    another.click(lambda: random.randint(0, web_requests.LARGEST_SEED), None, seed, api_visibility="private")
    return [label, count, seed, solver, steps, scale, power]


def add_editor(size: int) -> gr.ImageEditor:
    editor = gr.ImageEditor(
        show_label=False, placeholder="Click one of the images, or upload one", sources=("upload",), transforms=(),
        layers=False, format="png", height=PANE, canvas_size=(web_requests.VIEW, web_requests.VIEW),
        brush=gr.Brush(default_size=max(24, web_requests.VIEW // size), colors=["#ff2d87"], color_mode="fixed"),
        elem_id="painting",
    )  # fmt: skip
    editor.accept_blobs = None  # pictures are uploaded, which has a limit; what came this way would stay in memory
    return editor


def launch(page: gr.Blocks, config: PageConfig, listeners: web_guards.Listeners) -> None:
    """Start to serve a page, in a thread.

    :raises UserError: when the address cannot be had.
    """

    def session_of(event_id: str) -> str | None:
        event = page._queue.event_ids_to_events.get(event_id)
        return event.session_hash if event else None

    middleware = [
        Middleware(web_guards.BodyLimit),
        Middleware(web_guards.OriginCheck),
        Middleware(web_guards.UploadLimit, folder=get_upload_folder()),
        Middleware(web_guards.CancelCheck, session_of=session_of),
        Middleware(web_guards.ListenerCount, listeners=listeners),
    ]
    if config.host in LOOPBACK:  # other sites' pages cannot reach it under a name of theirs
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"]))
    elif config.password is None:
        logger.log(f"everyone who reaches {config.host} may use this page: --password asks for a password")
    auth = None
    if config.password is not None:

        def auth(name: str, password: str) -> bool:
            return hmac.compare_digest(password.encode(), config.password.encode())

    port = web_guards.find_port(config.host, config.port)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to fetch
    page.launch(
        server_name=config.host, server_port=port, share=False, inbrowser=False, quiet=True, footer_links=[],
        theme=gr.themes.Soft(**fonts), css=CSS, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
        enable_monitoring=False, max_file_size=web_guards.MAX_UPLOAD, prevent_thread_lock=True,
        auth=auth, auth_message="Any name, and the password that the owner of this page gave you.",
        app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None},
    )  # fmt: skip
    logger.log(f"open http://{config.host}:{port} in a browser; Ctrl+C ends it")


def wait_for_the_end(page: gr.Blocks, jobs: web_guards.Jobs) -> bool:
    """Wait for SIGTERM or Ctrl+C, then end the jobs and close the page. Return whether all jobs have ended."""
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    while not signals:
        time.sleep(0.1)
    ended = jobs.end(ENDING_SECONDS)
    page.close(verbose=False)
    return ended


def main() -> None:
    flags = parse_flags()
    page, limits = flags.page, web_requests.Limits(flags.page.max_images, flags.page.max_steps)
    web_guards.find_port(page.host, page.port)  # before the weights, which take long
    Image.MAX_IMAGE_PIXELS = web_requests.LONGEST_SIDE**2  # twice as many are refused before they are decoded
    weights = load_weights(flags.sample)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        # Uploads and pictures lie apart from those of other pages on this machine, and go when this one ends.
        os.environ |= {"GRADIO_TEMP_DIR": cache, "GRADIO_ALLOWED_PATHS": "", "GRADIO_ANALYTICS_ENABLED": "False"}
        jobs = web_guards.Jobs(web_guards.Listeners())
        built = build_page(Studio(flags.sample, limits, weights, folder, jobs))
        launch(built, page, jobs.listeners)
        ended = wait_for_the_end(built, jobs)
    if not ended:
        # A thread that computes when Python takes itself apart aborts the process.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    script_util.run(main)
