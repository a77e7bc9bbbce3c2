"""paw from Python: the functions that make steps, the one that runs them, and one for whole tasks.

    from paw import api

    c = api.compose("experiment=demo")
    source, target = api.base(c, c.source), api.base(c, c.target)
    moved = api.transfer(c, api.train(c, source), source, target)
    before, after = api.results(c, api.evaluate(c, target), api.evaluate(c, target, moved))
    print(before.accuracy, after.accuracy)

`compose` takes what a command line does. All others but `results` and `run` make a step and run
nothing. `run` does what a command line does, and returns the run's folder and its systems:

    finished = api.run("experiment=demo", "transfer=ridge")
    print(finished.folder, [(s.name, s.result.accuracy) for s in finished.systems])
"""

from paw.cli.compose import check
from paw.cli.compose import composed as compose
from paw.errors import ConfigError
from paw.evaluation.steps import evaluate
from paw.export.steps import compress, merge
from paw.launch.outline import outline_of
from paw.launch.run import Finished, results
from paw.launch.run import run as launched
from paw.models.steps import base, given, model_named
from paw.training.steps import prefer, train
from paw.transfer.steps import transfer

__all__ = [
    "base",
    "compose",
    "compress",
    "evaluate",
    "given",
    "merge",
    "model_named",
    "prefer",
    "results",
    "run",
    "train",
    "transfer",
]


def run(*overrides: str) -> Finished:
    """A task with a graph, as a command line runs it, with its folder in outputs/runs.

    Raises:
        PawError: the first thing that is wrong, or the first step that failed.
    """
    [c] = check(overrides)
    if c.plan:
        raise ConfigError("plan: api.run runs. Leave plan out, or ask on a command line.")
    return launched(c, outline_of(c, "api.run"), overrides, None)
