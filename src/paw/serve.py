"""A page to try adapters on: one question to several systems side by side, and the reports of runs
and sweeps. Gradio draws it; nothing leaves the machine."""

from __future__ import annotations

import html
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paw.data.config import DatasetConfig
from paw.errors import PawError
from paw.evaluation.config import PredictConfig
from paw.evaluation.model import Model
from paw.evaluation.predict import Asked, Prediction
from paw.report.page import PAGE

STYLE = """
.answers {display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem}
.answers figure {border: 1px solid #8885; border-radius: 8px; margin: 0; padding: .7rem}
.answers figcaption {font-weight: 600; margin-bottom: .4rem}
.answers p {white-space: pre-wrap; margin: 0}
iframe.report {width: 100%; height: 80vh; border: 1px solid #8885; border-radius: 8px}
"""


@dataclass(frozen=True)
class Answering:
    """Systems by name, of which one answers at a time."""

    systems: Mapping[str, Model]
    dataset: DatasetConfig
    config: PredictConfig
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, text: str, names: Sequence[str], tokens: int, raw: bool) -> Iterator[str]:
        """Answers, greedily, as cards of a page; one more each time.

        Args:
            raw: the text is the whole prompt; else dataset.prompt is put around it.
        """
        said: dict[str, str] = {}
        question = Asked("1", {"question": text, "text": text}, "the question")
        for name in names:
            config = replace(self.config, text=text, raw=raw, max_new_tokens=int(tokens))
            try:
                with self.lock:
                    [(_, answer)] = Prediction(
                        model=self.systems[name], mode="generate", dataset=self.dataset,
                        config=config,
                    ).answers([question])  # fmt: skip
                said[name] = str(answer["output"]) or "(nothing)"
            except PawError as e:
                said[name] = f"Not answered: {e}"
            yield cards(said)


def cards(said: Mapping[str, str]) -> str:
    """Answers beside each other. Whatever a model says is escaped."""
    found = (
        f"<figure><figcaption>{html.escape(name)}</figcaption><p>{html.escape(text)}</p></figure>"
        for name, text in said.items()
    )
    return f'<div class="answers">{"".join(found)}</div>'


def reports(outputs: Path) -> list[str]:
    """Folders of runs and sweeps with a page, the newest first."""
    found = [*outputs.glob(f"runs/*/{PAGE}"), *outputs.glob(f"sweeps/*/{PAGE}")]
    found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    return [str(file.parent.relative_to(outputs)) for file in found]


def shown(outputs: Path, folder: str | None) -> str:
    """The page of a run, in a frame of its own."""
    if folder is None or folder not in reports(outputs):
        return ""
    page = (outputs / folder / PAGE).read_text(encoding="utf-8")
    return f'<iframe class="report" title="report" srcdoc="{html.escape(page)}"></iframe>'


def page(answering: Answering, outputs: Path) -> Any:
    """The page, as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    import gradio as gr

    names = list(answering.systems)
    few = [name for name in names if not re.search(r"_\d+$", name)]  # not the draws of a placebo
    with gr.Blocks(title="paw", analytics_enabled=False) as made:
        gr.Markdown("# paw")
        with gr.Tab("Ask"):
            text = gr.Textbox(label="Question", lines=3)
            chosen = gr.CheckboxGroup(names, value=few, label="Systems")
            with gr.Row():
                most = answering.config.max_new_tokens
                tokens = gr.Slider(1, max(512, most), value=most, step=1, label="Tokens at most")
                raw = gr.Checkbox(answering.config.raw, label="The text is the whole prompt")
            ask = gr.Button("Ask", variant="primary")
            answers = gr.HTML(label="Answers")
            inputs = [text, chosen, tokens, raw]
            gr.on([ask.click, text.submit], answering.ask, inputs, answers, api_name="ask")
        with gr.Tab("Reports"):
            there = reports(outputs)
            run = gr.Dropdown(there, value=there[0] if there else None, label="Run or sweep")
            frame = gr.HTML(shown(outputs, there[0] if there else None))
            made.load(lambda: gr.Dropdown(choices=reports(outputs)), None, run)  # those of now
            run.change(lambda folder: shown(outputs, folder), run, frame, api_name="report")
    return made


def serve(answering: Answering, outputs: Path, host: str, port: int) -> Any:
    """Starts it, in threads of its own. Raises what Gradio does where it cannot."""
    made = page(answering, outputs)
    import gradio as gr

    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    made.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
        footer_links=[], theme=plain, css=STYLE,
    )  # fmt: skip
    return made
