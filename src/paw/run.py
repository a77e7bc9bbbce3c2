"""python -m paw.run [GROUP=CHOICE ...] [KEY=VALUE ...]: compose, check, dispatch to a task."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from paw.config.common import RunConfig


SHORT = {"-q": "verbosity=quiet", "-v": "verbosity=verbose"}


def entry() -> None:
    """Answers --help without Hydra; checks a command line before anything heavy is imported; then
    runs it."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        from paw.cli.help import text

        print(text(), end="")
        return
    from paw.errors import PawError

    try:
        command = checked(argv)
        plan = command.plan()
        if plan is not None:
            print(plan)
            return
        sys.argv[1:] = command.argv
        from paw.store import Preempted, stop

        try:
            with stop.ends_on(signal.SIGTERM):
                launch()
        except Preempted as e:
            print(f"paw: {e}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM) from None
    except PawError as e:
        fail(e)
    except KeyboardInterrupt:
        kept = "finished stages are kept, an unfinished training resumes from its last checkpoint"
        print(f"paw: interrupted; {kept}", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line that was checked."""

    argv: list[str]  # for Hydra, with the demo added where no model is named
    jobs: list[RunConfig]  # of a sweep the first, or all where a plan is asked

    def plan(self) -> str | None:
        """What would run, where that is asked."""
        if not any(job.plan for job in self.jobs):
            return None
        from paw.cli.plan import planned

        return planned(self.jobs)


def checked(argv: list[str]) -> Command:
    """
    Raises:
        ConfigError: if the command line is wrong.
    """
    from hydra._internal.utils import get_args_parser

    from paw.cli.compose import check, with_demo
    from paw.errors import ConfigError

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m paw.run --help.")

    argv = [SHORT.get(a, a) for a in argv]
    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign, assignment]
    args = parser.parse_args(argv)
    if args.config_name or args.config_path:
        fixed = "--config-name and --config-path are fixed"
        refuse(f"{fixed}; add configurations of your own with --config-dir")
    flags = [a for a in argv if a not in args.overrides]
    if args.hydra_help or args.shell_completion or args.info is not None:
        return Command(argv=flags + args.overrides, jobs=[])
    overrides = with_demo(args.overrides)
    jobs = check(overrides, sweep=args.multirun, config_dir=args.config_dir)
    return Command(argv=flags + overrides, jobs=jobs)


def launch() -> None:
    """Hydra's own main: single runs, sweeps and launchers."""
    import hydra

    from paw.cli.schema import register
    from paw.paths import conf_dir

    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come through to `entry` whole
    # Threads that spin long while they wait make two runs on the same cores take minutes; spinning
    # shortly costs one alone little (docs/architecture.md has the measurements).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()


def job(config: DictConfig) -> float | None:
    """One job, alone or of a sweep. Under a launcher this is what each worker process runs.

    Returns:
        What an optimising sweeper maximises: the gap recovered by the first transferred system.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from paw.cli.compose import typed
    from paw.cli.schema import register
    from paw.errors import PawError
    from paw.sweeps.folder import told
    from paw.tasks import dispatch

    register()
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    if hydra.mode != RunMode.MULTIRUN:
        try:
            dispatch(typed(config), overrides)
        except PawError as e:
            fail(e)
        return None
    folder = hydra.runtime.output_dir
    try:
        with told(Path(folder)):
            return objective(dispatch(typed(config), overrides, run_dir=folder))
    except PawError as e:
        print(f"paw: error: {e}", file=sys.stderr)  # the sweep goes on with its other jobs
        raise


def objective(finished: object) -> float | None:
    """The gap recovered by the first system of a run that has one: by accuracy, or where that has
    no gap, by log-likelihood."""
    from paw.launch.run import Finished
    from paw.report.claims import Recovered

    if not isinstance(finished, Finished):
        return None
    gaps = [c for c in finished.report.claims if isinstance(c, Recovered)]
    if not gaps:
        return None
    return gaps[0].gap.recovered if gaps[0].gap.eligible else gaps[0].by_likelihood.recovered


def fail(error: Exception) -> NoReturn:
    print(f"paw: error: {error}", file=sys.stderr)
    raise SystemExit(getattr(error, "exit_code", 2)) from None


if __name__ == "__main__":
    entry()
