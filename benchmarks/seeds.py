"""Gap recovered by every transferred system of a sweep, a column a run: python benchmarks/seeds.py SWEEP_DIR [SWEEP_DIR …]

python -m paw.run -m experiment=demo seed=0,1,2 paths.outputs=outputs/forth
python -m paw.run -m experiment=demo seed=0,1,2 model@source=tiny_qwen2 model@target=tiny_llama paths.outputs=outputs/back
python benchmarks/seeds.py outputs/forth/sweeps/* outputs/back/sweeps/*
"""

import json
import sys
from pathlib import Path

from paw.text import markdown_table


def main(folders: list[str]) -> None:
    for folder in folders:
        runs = [json.loads(f.read_text()) for f in sorted(Path(folder).glob("*/results.json"))]
        systems = [{s["system"]: s for s in run["systems"]} for run in runs]
        print(f"\n{runs[0]['title']}\n")
        head = ["system", *(f"seed {run['seed']}" for run in runs), "mean"]
        rows = [head]
        for name in ("source base", "source + own adapter", "target base", "target + own adapter"):
            values = [s[name]["accuracy"] for s in systems]
            rows.append([f"{name}, accuracy", *(f"{v:.3f}" for v in values), f"{sum(values) / len(values):.3f}"])
        for name in [n for n in systems[0] if systems[0][n]["gap"]]:
            gaps = [s[name]["gap"] for s in systems]
            if all(g["eligible"] for g in gaps):
                cells = [f"{g['recovered']:+.2f} [{g['low']:+.2f}, {g['high']:+.2f}]" for g in gaps]
                rows.append([f"{name}, gap", *cells, f"{sum(g['recovered'] for g in gaps) / len(gaps):+.2f}"])
            else:
                rows.append([f"{name}, gap", *("eligible" if g["eligible"] else "not eligible" for g in gaps), "–"])
        print(markdown_table(rows))


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
