"""`paw --help` without importing Hydra: choices are file names, so reading folders is enough."""

from __future__ import annotations

from paw.plugins import choices, conf_dirs

USAGE = """\
paw - can a LoRA adapter trained on one language model be moved to another, and how much of its
gain survives?

  python -m paw.run                                 the demo: the embedded pair, no download
  python -m paw.run GROUP=CHOICE ... KEY=VALUE ...  one run, for example
      model@source=llama3_8b model@target=qwen25_7b hardware=a800x4 train.lr=3e-5
  python -m paw.run task=train adapter=dora dataset=gsm8k model@source=smollm2_135m
  python -m paw.run task=validate ...               check a composition without running it
  python -m paw.run ... plan=true                   what would run, and what it would cost
  python -m paw.run task=evaluate 'models=[smollm2_135m]' dataset=arc_easy evaluate.limit=100
  python -m paw.run -m model@source=a,b KEY=1,2     a sweep
  python -m paw.run ... --cfg job --resolve         show the composed configuration, run nothing
  python -m paw.run ... 'force=[train]'             run a stage again (train, evaluate, ..., all)
  python -m paw.run -q ...   -v ...                 results and warnings only; or tracebacks, too
  eval "$(paw -sc install=bash)"                    tab completion of `paw ...` (bash, zsh, fish)
  python -m paw.run --hydra-help                    Hydra's own options

Choices:
"""


def groups() -> dict[str, list[str]]:
    """Every group of conf/, of paw and of the plugins, with its choices."""
    names = {folder.name for conf in conf_dirs() for folder in conf.iterdir() if folder.is_dir()}
    return {name: sorted(choices(name)) for name in sorted(names)}


def text() -> str:
    lines = []
    for group, names in groups().items():
        shown = "model@source, model@target" if group == "model" else group
        gap = "\n      " if group in ("model", "dataset") else " "
        lines.append(f"  {shown}:{gap}{', '.join(names)}")
    return USAGE + "\n".join(lines) + "\n"
