"""`paw --help` without importing Hydra: the choices are file names, so reading folders is enough."""

from __future__ import annotations

from paw.paths import conf_dir

USAGE = """\
paw - can a LoRA adapter trained on one language model be moved to another, and how much of its gain survives?

  python -m paw.run                                 the demo: six stages on the embedded pair, no download
  python -m paw.run GROUP=CHOICE ... KEY=VALUE ...  one run, for example
      model@source=llama3_8b model@target=qwen25_7b hardware=a800x4 train.lr=3e-5
  python -m paw.run task=train adapter=dora dataset=gsm8k model@source=smollm2_135m
  python -m paw.run task=validate ...               check a composition without running it
  python -m paw.run task=evaluate 'models=[smollm2_135m]' dataset=arc_easy evaluate.sample_ratio=0.05
  python -m paw.run -m model@source=a,b KEY=1,2     a sweep
  python -m paw.run ... --cfg job --resolve         show the composed configuration, run nothing
  python -m paw.run ... 'force=[train]'             run a stage again (train, evaluate, transfer, all, ...)
  python -m paw.run --hydra-help                    Hydra's own options

Choices:
"""


def text() -> str:
    lines = []
    for folder in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        names = ", ".join(sorted(f.stem for f in folder.glob("*.yaml")))
        shown = "model@source, model@target" if folder.name == "model" else folder.name
        lines.append(
            f"  {shown}:\n      {names}"
            if folder.name in ("model", "dataset")
            else f"  {shown}: {names}"
        )
    return USAGE + "\n".join(lines) + "\n"
