"""Two runs that share most of their steps: one after the other, and at once, over one store each.

python benchmarks/overlap.py [--rounds 3]

Each round is in a fresh folder, with one thread per process, so that two processes have two cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ASK = ["experiment=demo", "hardware.precision=float32"]
ASK += ["transfer.controls=[]", "train.max_steps=300"]


def start(folder: Path, method: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "paw.run", *ASK, f"transfer={method}"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def seconds(at_once: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began, both = time.monotonic(), []
        for method in ("procrustes", "ridge"):
            both.append(start(Path(folder), method))
            if not at_once:
                both[-1].wait()
        assert [one.wait() for one in both] == [0, 0]
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    found: dict[bool, list[float]] = {False: [], True: []}
    for number in range(parser.parse_args().rounds):
        for at_once in (False, True) if number % 2 == 0 else (True, False):
            found[at_once].append(seconds(at_once))
    for at_once, name in ((False, "one after the other"), (True, "at once")):
        print(f"{name}: median {median(found[at_once]):.1f} s of {sorted(found[at_once])}")
    ratios = [b / a for a, b in zip(found[False], found[True], strict=True)]
    print(f"at once / one after the other: {median(ratios):.2f}")


if __name__ == "__main__":
    main()
