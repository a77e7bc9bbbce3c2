"""paw from Python: the functions that make steps, and the one that runs them.

    from paw import api

    c = api.compose("experiment=demo")
    source, target = api.base(c, c.source), api.base(c, c.target)
    moved = api.transfer(c, api.train(c, source), source, target)
    before, after = api.results(c, api.evaluate(c, target), api.evaluate(c, target, moved))
    print(before.accuracy, after.accuracy)

`compose` takes what a command line does. All others but `results` make a step and run nothing.
"""

from paw.cli.compose import composed as compose
from paw.evaluation.steps import evaluate
from paw.export.steps import compress, merge
from paw.launch.run import results
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
    "train",
    "transfer",
]
