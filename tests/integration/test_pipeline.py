"""The main job as a user runs it: six real stages on the embedded pair, reused, killed, shared,
tracked, swept."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import warm
from conftest import PRECISION, QUICK, ROOT, Paw
from paw.models.load import Runtime, load_model
from paw.paths import embedded

pytestmark = pytest.mark.slow
STAGES = ["evaluate", "train", "transfer"]  # of questions, of steps that resume, of matrices


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """`python -m paw.run` in an empty folder."""
    folder = tmp_path_factory.mktemp("demo")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "paw.run", PRECISION],
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done, time.monotonic() - began


def newest(folder: Path) -> Path:
    return max((folder / "outputs" / "runs").iterdir(), key=lambda p: p.stat().st_mtime)


def first(folder: Path) -> Path:
    return min((folder / "outputs" / "runs").iterdir(), key=lambda p: p.name)


def results(run: Path) -> dict[str, dict[str, Any]]:
    return {s["system"]: s for s in json.loads((run / "results.json").read_text())["systems"]}


Demo = tuple[Path, "subprocess.CompletedProcess[str]", float]


# ---- what a run is ------------------------------------------------------------------------------


def test_the_embedded_pair_has_a_gap_and_it_is_closed(demo: Demo) -> None:
    found = results(first(demo[0]))
    for base in ("source base", "target base"):
        assert 1 / 8 < found[base]["accuracy"] < 0.6, base
    for own in ("source + own adapter", "target + own adapter"):
        assert found[own]["accuracy"] >= 0.9, own
    assert all(s["n"] == 224 for s in found.values())
    for system in found.values():
        p = system["accuracy"]
        assert system["stderr"] == pytest.approx((p * (1 - p) / 223) ** 0.5, abs=1e-9)
        assert system["seconds"] > 0
        assert system["ram_mib"] > 100


def test_the_default_method_stands_beside_methods_and_a_placebo_that_fail(demo: Demo) -> None:
    found = results(first(demo[0]))
    method = found["target + procrustes"]
    assert method["gap_low"] > 0.1
    assert method["coverage"] == 1.0
    draws = [name for name in found if name.startswith("target + random ")]
    assert len(draws) == 5
    for control in (
        "cross_lora",
        "pad_truncate",
        *(name.removeprefix("target + ") for name in draws),
    ):
        row = found[f"target + {control}"]
        assert row["gap_recovered"] < 0.1, control
        versus = next(v for v in method["versus"] if v["versus"] == f"target + {control}")
        assert versus["low"] > 0, control
        assert versus["p"] < 1e-6, control


def test_both_bases_know_their_facts(paw: Paw, tmp_path: Path) -> None:
    paw(
        "task=evaluate",
        "models=[tiny_llama,tiny_qwen2]",
        "dataset=facts_told",
        "evaluate.batch_tokens=2048",
    )
    found = results(newest(tmp_path))
    assert set(found) == {"tiny_llama", "tiny_qwen2"}
    assert all(s["accuracy"] >= 0.95 for s in found.values())


def test_adapters_find_their_bases(demo: Demo, paw: Paw, tmp_path: Path) -> None:
    adapters = first(demo[0]) / "adapters"
    given = f"adapters=[{adapters / 'source'},{adapters / 'target_own'}]"
    paw(
        "task=evaluate",
        "models=[tiny_llama,tiny_qwen2]",
        given,
        "dataset=facts",
        "evaluate.limit=50",
    )
    found = results(newest(tmp_path))
    assert list(found) == [
        "tiny_llama",
        "tiny_llama + source",
        "tiny_qwen2",
        "tiny_qwen2 + target_own",
    ]
    assert found["tiny_qwen2 + target_own"]["accuracy"] > 0.9
    assert found["tiny_llama + source"]["versus"][0]["low"] > 0.3
    wrong = paw("task=evaluate", "models=[tiny_llama]", given, "dataset=facts", ok=False)
    assert wrong.returncode == 2
    assert "was made for another base" in wrong.stderr


def test_two_models_of_one_name_are_two_rows(paw: Paw, tmp_path: Path) -> None:
    for where, name in (("a", "tiny_llama"), ("b", "tiny_qwen2")):
        shutil.copytree(embedded(name), tmp_path / where / "final")
    asked = ["models=[a/final,b/final]", "dataset=facts_told", "evaluate.limit=20"]
    paw("task=evaluate", *asked)
    found = json.loads((newest(tmp_path) / "results.json").read_text())["systems"]
    assert [s["system"] for s in found] == ["final", "final"]
    assert found[0]["loss"] != found[1]["loss"]


def test_what_lies_in_the_run_folder(demo: Demo) -> None:
    folder, done, _ = demo
    run = first(folder)
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "run.log",
        "results.json",
        "results.csv",
        "summary.md",
        "report.html",
        "figures",
        "adapters",
        "records",
    }
    assert {p.stem for p in (run / "records").iterdir()} == {
        s.replace(" + ", "_").replace(" ", "_") for s in results(run)
    }
    with open(run / "results.csv") as f:
        rows = list(csv.DictReader(f))
    assert [r["system"] for r in rows] == list(results(run))
    summary = (run / "summary.md").read_text()
    assert "| target + procrustes" in summary
    verdict, command = (part.strip() for part in summary.split("\n\n")[1:3])
    assert verdict.startswith("**procrustes recovers 10")
    assert command == f"python -m paw.run experiment=demo {PRECISION}"
    for file in re.findall(r"!\[.*?\]\((.*?)\)", summary):
        assert (run / file).stat().st_size > 1000
    shown = done.stdout.split("\n\n")
    assert shown[1].strip() == verdict.strip("*")  # before the table
    assert max(map(len, shown[2].splitlines())) <= 100
    assert str(run.relative_to(folder)) in done.stdout
    assert "[29/29] computed  target + own adapter" in done.stdout
    assert done.stderr == ""
    assert len(done.stdout) < 8000  # no flood
    assert "computed  source base" in (run / "run.log").read_text()


def test_adapters_load_in_stock_peft_with_the_logits_paw_scored(demo: Demo) -> None:
    """Every question's log-likelihoods, scored by plain PEFT and transformers, equal the
    records."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    run = first(demo[0])
    for name, base, system in (
        ("source", "tiny_llama", "source + own adapter"),
        ("target_procrustes", "tiny_qwen2", "target + procrustes"),
        ("target_own", "tiny_qwen2", "target + own adapter"),
    ):
        model = PeftModel.from_pretrained(
            load_model(embedded(base), Runtime("float32")), str(run / "adapters" / name)
        )
        tokenizer = AutoTokenizer.from_pretrained(str(embedded(base)))
        artifact = demo[0] / results(run)[system]["artifacts"]["evaluate"]
        record = json.loads((artifact / "records.jsonl").read_text().splitlines()[0])
        row = json.loads((embedded("facts") / "test.jsonl").read_text().splitlines()[0])
        context = tokenizer(f"question : {row['question']} answer :").input_ids
        for choice, expected in zip(row["choices"], record["loglikelihoods"], strict=True):
            ids = context + tokenizer(f" {choice}", add_special_tokens=False).input_ids
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            found = sum(logprobs[i - 1, ids[i]].item() for i in range(len(context), len(ids)))
            assert found == pytest.approx(expected, abs=1e-4), (name, choice)


def test_a_second_run_reuses_every_stage(demo: Demo, paw: Paw) -> None:
    folder, earlier, _ = demo
    before = results(first(folder))
    began = time.monotonic()
    done = paw(cwd=folder)
    assert time.monotonic() - began < 15
    assert "computed" not in done.stdout
    assert done.stdout.count("] reused") == earlier.stdout.count("] computed")
    after = results(newest(folder))
    for name, system in before.items():
        assert {k: after[name][k] for k in ("accuracy", "loss", "gap_recovered", "seconds")} == {
            k: system[k] for k in ("accuracy", "loss", "gap_recovered", "seconds")
        }


def test_force_runs_one_stage_again_with_the_same_numbers(demo: Demo, paw: Paw) -> None:
    before = results(first(demo[0]))
    done = paw("force=[train]", cwd=demo[0])
    assert done.stdout.count("] computed") == 2
    after = results(newest(demo[0]))
    assert {n: s["loss"] for n, s in after.items()} == {n: s["loss"] for n, s in before.items()}


def test_self_transfer_loses_nothing(demo: Demo, paw: Paw) -> None:
    paw("experiment=demo", "model@target=tiny_llama", "transfer.controls=[]", cwd=demo[0])
    found = results(newest(demo[0]))
    assert found["target + procrustes"]["accuracy"] == found["source + own adapter"]["accuracy"]
    assert found["target + procrustes"]["loss"] == pytest.approx(
        found["source + own adapter"]["loss"], abs=1e-3
    )


def test_an_adapter_from_elsewhere_is_transferred_but_not_evaluated_on_another_base(
    demo: Demo, paw: Paw
) -> None:
    folder = demo[0]
    source = first(folder) / "adapters" / "source"
    paw(
        "task=transfer",
        "experiment=demo",
        "transfer=ridge",
        "transfer.controls=[]",
        f"adapter.path={source}",
        cwd=folder,
    )
    moved = newest(folder) / "adapters" / "target_ridge"
    assert (moved / "adapter_model.safetensors").is_file()
    manifest = json.loads((moved / "paw.json").read_text())
    assert (manifest["config"]["method"], manifest["config"]["penalty"]) == ("ridge", 0.1)
    assert {len(manifest[name]["fingerprint"]) for name in ("source", "target", "adapter")} == {64}
    assert manifest["source"]["path"] == str(embedded("tiny_llama"))
    assert manifest["figures"]["coverage"] == 1.0
    assert "**align**" in (moved / "report.md").read_text()
    assert (moved / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Feasibility: align" in (newest(folder) / "run.log").read_text()
    done = paw(
        "task=evaluate",
        "models=[tiny_llama]",
        f"adapters=[{moved}]",
        "dataset=facts",
        cwd=folder,
        ok=False,
    )
    assert done.returncode == 2
    assert "another base" in done.stderr.strip().splitlines()[-1]
    done = paw(
        "task=evaluate", "models=[tiny_qwen2]", f"adapters=[{moved}]", "dataset=facts", cwd=folder
    )
    assert "tiny_qwen2 + target_ridge" in results(newest(folder))


def spoil_nothing(folder: Path) -> None: ...


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


# What may be wrong inside an adapter's files is in tests/test_models.py, one by one; here, that it
# leaves nothing behind.
SPOILT: dict[str, tuple[Any, list[str], str]] = {
    "another base": (
        spoil_nothing,
        ["model@source=tiny_qwen2", "model@target=tiny_llama"],
        "made for another base",
    ),
    "another base, no stamp": (
        lambda f: (f / "paw.json").unlink(),
        ["model@source=tiny_qwen2"],
        "does not fit the source",
    ),
    "truncated": (cut, [], "is damaged"),
    "no common word": (spoil_nothing, ["transfer.calibration=EMPTY"], "Give other text"),
    "a model of weights only": (
        spoil_nothing,
        ["target.path=STRANGE"],
        "this architecture is not known",
    ),
    "nothing similar": (
        spoil_nothing,
        ["transfer.similarity_threshold=0.9999"],
        "lets no module through",
    ),
    "nothing to shuffle": (
        spoil_nothing,
        ["transfer=cross_lora", "transfer.controls=[shuffled]"],
        "looks at no text",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_with_a_transfer_is_one_line_and_leaves_no_folder(
    demo: Demo, paw: Paw, tmp_path: Path, what: str
) -> None:
    spoil, arguments, expected = SPOILT[what]
    adapter = tmp_path / "adapter"
    shutil.copytree(first(demo[0]) / "adapters" / "source", adapter)
    spoil(adapter)
    (tmp_path / "EMPTY").write_text("\n")
    strange = tmp_path / "STRANGE"
    shutil.copytree(embedded("tiny_llama"), strange)
    tensors = load_file(strange / "model.safetensors")
    save_file(
        {k.replace("layers", "blocks"): v for k, v in tensors.items()},
        strange / "model.safetensors",
    )
    done = paw(
        "task=transfer",
        "experiment=demo",
        "transfer.controls=[]",
        f"adapter.path={adapter}",
        *arguments,
        ok=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("paw: error: ")
    assert expected in line
    assert not list((tmp_path / "outputs").glob("runs/*"))
    assert not list((tmp_path / "outputs" / "artifacts").glob("gate/*/adapter_config.json"))


def test_standard_controls_are_drawn_and_judged_together(demo: Demo, paw: Paw) -> None:
    paw(
        "experiment=demo",
        "transfer=ridge",
        "transfer.controls=standard",
        "transfer.draws=3",
        cwd=demo[0],
    )
    found = results(newest(demo[0]))
    names = ["negated", *(f"{p} {i}" for p in ("random", "shuffled") for i in (1, 2, 3))]
    assert [n for n in found if n.startswith("target + ")] == [
        "target + ridge",
        *(f"target + {n}" for n in names),
        "target + own adapter",
    ]
    assert {v["versus"] for v in found["target + ridge"]["versus"]} == {
        "target base",
        *(f"target + {n}" for n in names),
    }
    assert all(v["low"] > 0 for v in found["target + ridge"]["versus"])
    summary = (newest(demo[0]) / "summary.md").read_text()
    assert "| target + shuffled, 3 draws" in summary
    assert "target + ridge is above 3 and below 0 of 3 draws of target + random" in summary


# ---- broken off, shared -------------------------------------------------------------------------


SHORT = [PRECISION, *QUICK, "train.max_steps=20"]


def test_killed_in_the_middle_of_a_stage_and_of_the_next_it_ends_as_if_unbroken(
    tmp_path: Path, paw: Paw
) -> None:
    """kill −9 while a stage is at work; the next run finds what was finished and nothing that was
    not, and is killed in a later stage itself."""
    artifacts = tmp_path / "outputs" / "artifacts"
    finished: set[Path] = set()
    for stage in STAGES:
        begun = warm.Command(SHORT, tmp_path)
        deadline = time.monotonic() + 300
        left = set(artifacts.glob(f"{stage}/*.tmp-*"))
        while not set(artifacts.glob(f"{stage}/*.tmp-*")) - left:
            assert time.monotonic() < deadline
            assert begun.running
            time.sleep(0.005)
        begun.kill()
        begun.wait()
        now = {p.parent for p in artifacts.glob("*/*/stage.json") if ".tmp-" not in p.parent.name}
        assert finished <= now
        finished = now
        assert not any(p.parent.name == stage for p in finished) or stage == "evaluate"
    done = paw(*SHORT)
    assert done.stdout.count("] reused") == len(finished)
    assert not list(artifacts.glob("*/*.tmp-*"))

    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    assert warm.run(SHORT, unbroken).returncode == 0
    resumed, whole = results(newest(tmp_path)), results(newest(unbroken))
    assert {n: s["loss"] for n, s in resumed.items()} == {n: s["loss"] for n, s in whole.items()}


def test_four_processes_starting_at_once_train_once(tmp_path: Path) -> None:
    ask = [PRECISION, "task=train", "experiment=demo", "train.max_steps=60"]
    begun = [warm.Command(ask, tmp_path) for _ in range(4)]
    done = [one.wait() for one in begun]
    assert [one.returncode for one in done] == [0] * 4, done
    lines = [line for one in done for line in one.stdout.splitlines()]
    assert sum("computed  train tiny_llama: 60 steps" in line for line in lines) == 1
    assert sum("reused    train tiny_llama: 60 steps" in line for line in lines) == 3
    runs = list((tmp_path / "outputs" / "runs").iterdir())
    assert len(runs) == 4
    assert len({json.dumps([(n, s["loss"]) for n, s in results(r).items()]) for r in runs}) == 1


def test_a_failing_stage_leaves_results_so_far_and_says_unfinished(
    tmp_path: Path, paw: Paw
) -> None:
    done = paw("experiment=demo", "train.max_length=3", ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("paw: error: ")
    assert "all 128 examples are longer than 3 tokens" in done.stderr
    # what does not need the training goes on
    assert list(results(newest(tmp_path))) == ["source base", "target base"]
    summary = (newest(tmp_path) / "summary.md").read_text()
    assert "Unfinished" in summary
    assert "encode train for tiny_llama" in summary
    assert "are longer than 3 tokens" in (newest(tmp_path) / "summary.md").read_text()
    assert not list((tmp_path / "outputs" / "artifacts" / "train").glob("*/stage.json"))


# ---- the rest of the command line ---------------------------------------------------------------


def test_a_sweep_runs_every_job_and_shares_stages(tmp_path: Path, paw: Paw) -> None:
    done = paw("-m", *QUICK, "train.max_steps=20", "transfer=procrustes,pad_truncate")
    jobs = sorted((tmp_path / "outputs" / "sweeps").glob("*/*_tiny_llama-tiny_qwen2"))
    assert len(jobs) == 2
    assert all((j / "summary.md").is_file() for j in jobs)
    assert done.stdout.count("computed  train") == 2  # source and target, in the first job
    assert done.stdout.count("reused    train") == 2


def test_composed_configuration_is_shown_without_running(tmp_path: Path, paw: Paw) -> None:
    done = paw("model@source=llama3_8b", "--cfg", "job", "--resolve")
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_wheel_runs_the_same_from_another_folder(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, run there: conf/ and the embedded pair come from the wheel, and a
    package beside it adds a method, a data set without Python, and a stage with its task."""
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip"]
    for package in (ROOT, ROOT / "tests" / "plugin"):
        command = [*pip, "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(package)]
        subprocess.run(command, check=True)
    found = sorted(wheels.glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in found] == ["flips", "paw"]
    assert found[1].stat().st_size < 12 * 2**20
    command = [*pip, "install", "--quiet", "--no-deps", "--target", str(site), *map(str, found)]
    subprocess.run(command, check=True)
    where = "import paw.paths; print(paw.paths.conf_dir())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    shown = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(site / "paw" / "conf")
    command = [
        sys.executable,
        "-m",
        "paw.run",
        PRECISION,
        *QUICK,
        "train.max_steps=100",
        "evaluate.limit=100",
        "transfer.controls=[flipped]",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(newest(tmp_path))["target + own adapter"]["accuracy"] > 0.5
    assert "target + flipped" in results(newest(tmp_path))
    census = [sys.executable, "-m", "paw.run", PRECISION, "task=census", "dataset=facts"]
    done = subprocess.run(census, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "computed  count facts: 224 rows" in done.stdout, done.stderr
