"""``lit-unlearn app``: look at edits in the browser, before and after beside each other, at any strength."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading
from importlib.util import find_spec

from lit_unlearn.commands.parser import Parser, add_model_options, command_parser
from lit_unlearn.system.errors import UserError, plain_warnings, user_errors
from lit_unlearn.system.names import check_numbers
from lit_unlearn.system.run_file import checkpoint_of

DESCRIPTION = "look at edits in the browser, before and after, at any strength"


def parser() -> Parser:
    """Options of ``app``."""
    made = command_parser("app", DESCRIPTION)
    made.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, its checkpoint, or a delta")
    add_model_options(made, "the one that was edited")
    made.add_argument("--num_inference_steps", type=int, help="denoising steps; default: the runs'")
    made.add_argument("--guidance_scale", type=float, help="classifier-free guidance; default: the runs'")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    made.add_argument("--port", type=int, help="default: the first free one from 7860")
    made.add_argument("--no_browser", action="store_true", help="do not open a browser")
    return made


def run(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: An option, an edit or the model is wrong, Gradio is missing, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise UserError("app needs Gradio: pip install 'lit-unlearn[app]'.")
    with user_errors():
        check_numbers(num_inference_steps=options.num_inference_steps, port=options.port)
        check_address(options.host, options.port)
        files = [checkpoint_of(given) for given in options.runs]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere

    from lit_unlearn.edits.checkpoint import read_edit, warn_unfinished
    from lit_unlearn.edits.several import agreed, one_base, titles_of
    from lit_unlearn.edits.strength import AdjustableEdits, Drawer
    from lit_unlearn.reports.app import page_of, serve
    from lit_unlearn.system.devices import explaining_memory, find_device

    with user_errors():
        edits = [read_edit(file) for file in files]
        steps = int(agreed(edits, "num_inference_steps", options.num_inference_steps))
        guidance_scale = agreed(edits, "guidance_scale", options.guidance_scale)
        base = one_base(edits, options.model, options.revision, options.config_folder)
        base.check_steps(steps, "num_inference_steps")
        device = find_device(options.device)
    for file in files:
        warn_unfinished(file)
    with user_errors(), plain_warnings(), explaining_memory("app", device, []):
        drawer = Drawer(AdjustableEdits(base, edits, device), steps, guidance_scale)
    how = f"{base.name}, {steps} denoising steps, guidance {guidance_scale:g}."
    how = how if base.clip_skip is None else f"{how[:-1]}, clip_skip {base.clip_skip}."
    page = page_of(titles_of(edits), how, drawer)
    with user_errors():
        address = serve(page, options.host, options.port, not options.no_browser)
    print(f"{address}: open it in a browser; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        if page.server is not None:
            logging.getLogger("uvicorn.error").disabled = True  # of requests that are cut off
            page.server.force_exit = True  # it would wait until the browser closes the page
        page.close(verbose=False)


def check_address(host: str, port: int | None) -> None:
    """Refuse an address that cannot be listened on, before a model is loaded.

    Raises:
        ValueError: The host is not this machine's, or the port is out of range or taken.
    """
    if port is not None and port > 65535:
        raise ValueError(f"port={port} must be at most 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"host={host}" if port is None else f"port={port} on host={host}"
        raise ValueError(
            f"{where} cannot be listened on ({error.strerror}): choose another, or leave it out."
        ) from error
