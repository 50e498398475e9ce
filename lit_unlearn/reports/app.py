"""The page of ``lit-unlearn app``, made with Gradio.

Data flow: the page calls a function (``edits.strength.Drawer``) with an edit's number, a prompt, a strength, a seed and
a count; it returns pictures without the edit and with it, from the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import gradio as gr

MAX_STRENGTH, MAX_PICTURES = 2.0, 8
"""Ends of the page's sliders."""
Pictures = list[Image.Image]


def page_of(titles: Sequence[str], how: str, draw: Callable[..., tuple[Pictures, Pictures]]) -> gr.Blocks:
    """The page.

    Args:
        titles: A name for each edit.
        how: The line under the heading: the model, steps and guidance.
        draw: Returns pictures before and after, as ``edits.strength.Drawer`` does.
    """
    import gradio as gr

    def shown(number: int, prompt: str, strength: float, seed: float, count: float) -> tuple[Pictures, Pictures]:
        try:
            return draw(int(number), prompt, float(strength), int(seed or 0), int(count))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title="lit-unlearn", analytics_enabled=False) as page:
        gr.Markdown(f"# Before and after an edit\n\n{how}")
        with gr.Row():
            edit = gr.Dropdown([(title, number) for number, title in enumerate(titles)], value=0, label="Edit")
            prompt = gr.Textbox(label="Prompt", placeholder="a dog on a beach", elem_id="prompt")
        with gr.Row():
            strength = gr.Slider(
                0, MAX_STRENGTH, value=1, step=0.05, label="Strength", elem_id="strength",
                info="0 is the unedited model, 1 the edit as it was made; beyond it goes further the same way.",
            )  # fmt: skip
            seed = gr.Number(0, label="First seed", precision=0, minimum=0)
            count = gr.Slider(1, MAX_PICTURES, value=2, step=1, label="Pictures")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        gallery = partial(gr.Gallery, format="png", columns=2, height="auto", object_fit="contain", interactive=False)
        with gr.Row():
            before = gallery(label="Before", elem_id="before")
            after = gallery(label="After", elem_id="after")
        inputs: list[Any] = [edit, prompt, strength, seed, count]
        for event in (button.click, prompt.submit, strength.release, edit.input):
            event(shown, inputs, [before, after], concurrency_limit=1, concurrency_id="model")
    return page


def serve(page: gr.Blocks, host: str, port: int | None, open_browser: bool) -> str:
    """Start to serve ``page`` in a thread; return its address.

    Raises:
        ValueError: The address cannot be listened on.
    """
    import gradio as gr

    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font from elsewhere
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True, quiet=True,
            share=False, theme=plain, footer_links=[], enable_monitoring=False, ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"The page cannot be served on {host} ({error}): choose another --host or --port.") from error
    return str(address)
