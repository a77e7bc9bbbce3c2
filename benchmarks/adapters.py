"""Five adapters on one base: what they cost together, beside five passes with the base in memory
and one load of it.

python benchmarks/adapters.py --data DATA --model smollm2_135m --task arc_easy --rows 100
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import SPLITS, Quiet, random_adapter, rows_file


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", required=True)
    p.add_argument("--model", default="smollm2_135m")
    p.add_argument("--task", default="arc_easy")
    p.add_argument("--rows", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3)
    c = p.parse_args()

    from paw.cli.compose import compose_config
    from paw.evaluation.evaluate import EvaluateStage, evaluate
    from paw.models.load import Runtime, load_model
    from paw.models.locate import locate
    from paw.models.steps import model_named
    from paw.store import Context, Input, Kept

    c.data = str(Path(c.data).resolve())
    folder = locate(model_named(c.model), None, Quiet())
    config = compose_config([f"dataset={c.task}", "model@source=tiny_llama"])
    with tempfile.TemporaryDirectory() as work:
        c.work = work
        inputs = {"model": Input(folder, "base"), "data": Input(rows_file(c), "rows")}
        adapters = []
        for i in range(5):
            (Path(work) / str(i)).mkdir()
            adapters.append(Path(random_adapter(str(folder), str(Path(work) / str(i)), seed=i)))

        def scored(kept: Kept, adapter: Path) -> float:
            began = time.perf_counter()
            stage = EvaluateStage(
                dataset=config.dataset,
                split=SPLITS[c.task],
                evaluate=config.evaluate,
                runtime=Runtime("float32"),
            )
            own = {"adapter": Input(adapter, str(adapter))}
            evaluate(stage, inputs | own, Path(work), Context(Quiet(), kept=kept))
            return time.perf_counter() - began

        held = Kept()
        scored(held, adapters[0])
        ratios = []
        for i in range(c.rounds):
            began = time.perf_counter()
            load_model(folder, Runtime("float32"))
            load = time.perf_counter() - began
            passes = [scored(held, a) for a in adapters[1:] + adapters[:1]]
            began, fresh = time.perf_counter(), Kept()
            for a in adapters:
                scored(fresh, a)
            together = time.perf_counter() - began
            fresh.release()
            ratios.append(together / (sum(passes) + load))
            print(
                f"round {i + 1}: load {load:.2f} s, five passes {sum(passes):.2f} s, five adapters "
                f"from nothing {together:.2f} s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
