"""`var demo`: a local page on which to sample and edit."""

from importlib.util import find_spec
from time import sleep
from typing import Annotated

from typer import Option

from varcli.commands import options
from varcli.console import note, result
from varcli.errors import UsageError
from varcli.files import private_folder

Host = Annotated[
    str, Option("--host", metavar="ADDRESS", help="Address to listen at; 0.0.0.0 lets other machines use the page.")
]
Port = Annotated[int, Option("--port", min=1, max=65535, help="Port to listen at.")]
Browser = Annotated[bool, Option("--browser/--no-browser", help="Open the page in a browser.")]


def demo(
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    browser: Browser = True,
) -> None:
    """Serve a local web page for sampling, comparing settings and editing photographs. Ctrl-C ends it."""
    if find_spec("gradio") is None:
        raise UsageError("var demo needs another package: pip install 'varcli[demo]'")
    from varcli.pipelines.model import load

    model = load(checkpoint)
    model.load_weights()
    with private_folder() as folder:
        from varcli.demo.page import LOOPBACK, serve

        page, address = serve(model, folder, host, port, browser=browser)
        if host not in LOOPBACK:
            note(f"the page has no password: anyone who can reach {host} can use it")
        result(address)
        note("Ctrl-C stops the server")
        try:
            while True:  # unlike a wait for a lock, Ctrl-C ends a sleep on every system
                sleep(3600)
        finally:
            page.close(verbose=False)
