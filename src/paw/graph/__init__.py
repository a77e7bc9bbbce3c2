"""A task's graph: steps that know what they need, before any of them runs."""

from paw.graph.execute import Execution, execute
from paw.graph.plan import Planned, plan
from paw.graph.step import Absent, Check, Node, Source, Step, View, sources_of, steps_of

__all__ = [
    "Absent",
    "Check",
    "Execution",
    "Node",
    "Planned",
    "Source",
    "Step",
    "View",
    "execute",
    "plan",
    "sources_of",
    "steps_of",
]
