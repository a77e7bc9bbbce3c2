"""The launchers that paw's hardware profiles choose. Hydra looks for them here; what they do stands
in paw/sweeps."""

# No `from __future__ import annotations`: Hydra executes this module before it is in sys.modules,
# where dataclasses would look for it to read annotations that are text.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher


class Here(BasicLauncher):  # type: ignore[misc]
    """One job after the other, in this process."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from paw.sweeps.launch import one_by_one

        def run(number: int, overrides: Sequence[str]) -> JobReturn:
            [done] = BasicLauncher.launch(self, [overrides], number)
            return done

        assert self.config is not None
        return one_by_one(self.config, job_overrides, initial_job_idx, run)


class Submitted(BaseSubmititLauncher):  # type: ignore[misc]
    """Jobs in processes of their own, by submitit."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from paw.sweeps.launch import submitted

        assert self.config is not None
        return submitted(self, self.config, job_overrides, initial_job_idx)

    def __call__(self, *job: Any) -> JobReturn:
        """One job, in its own process.

        A job that failed raises here: else it would be COMPLETED to the cluster, and its log would
        have no traceback. One that is preempted ends in good order first, and is requeued by
        submitit then.
        """
        from paw.sweeps.nodes import first_of_nodes, followed, leads
        from paw.sweeps.signals import ends_in_good_order

        if not leads():
            return followed()
        with ends_in_good_order(), first_of_nodes():
            done: JobReturn = super().__call__(*job)
        _ = done.return_value
        return done


class Pool(Submitted):
    """On this machine, `workers` at once."""

    _EXECUTOR = "local"


class Slurm(Submitted):
    _EXECUTOR = "slurm"


@dataclass
class PoolConf(LocalQueueConf):  # type: ignore[misc]
    _target_: str = "hydra_plugins.paw_launchers.Pool"
    workers: int = 2  # jobs at once


@dataclass
class SlurmConf(SlurmQueueConf):  # type: ignore[misc]
    _target_: str = "hydra_plugins.paw_launchers.Slurm"


for name, node in (("paw_pool", PoolConf), ("paw_slurm", SlurmConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="paw")
