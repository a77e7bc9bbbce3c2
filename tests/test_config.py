"""Every configuration composes and is typed; the card's command lines mean what they say; wrong
ones are one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import Paw
from paw.cli.compose import compose_config, groups
from paw.errors import ConfigError
from paw.paths import conf_dir
from paw.run import checked
from paw.transfer.config import PlaceboConfig
from paw.transfer.controls import transfer_named
from paw.transfer.methods.ridge import RidgeConfig

# A model is the same file as source and as target.
CHOICES = [
    f"{group}={choice}"
    for group, choices in groups().items()
    if group != "model@target"
    for choice in choices
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_yaml_composes(choice: str) -> None:
    compose_config(
        [choice, *(["task=train"] if choice.startswith(("adapter", "dataset")) else [])]
    )  # not all have a pipeline


def test_every_yaml_is_reachable() -> None:
    """No yaml file lies where no group finds it."""
    files = {p.relative_to(conf_dir()) for p in conf_dir().rglob("*.yaml")}
    reachable = {
        f"{g.split('@')[0]}/{c}.yaml" for g, choices in groups().items() for c in choices
    } | {"config.yaml"}
    assert {str(f) for f in files} == reachable


def test_what_the_specification_names_is_there() -> None:
    models = {
        "qwen25_05b",
        "qwen25_15b",
        "qwen25_7b",
        "llama3_8b",
        "llama32_3b",
        "gemma2_2b",
        "smollm2_135m",
        "gemma3_270m",
    }
    datasets = {
        "arc_challenge",
        "arc_easy",
        "piqa",
        "hellaswag",
        "winogrande",
        "gsm8k",
        "metamath_qa",
        "mrpc",
        "qqp",
        "sst2",
    }
    found = groups()
    assert models <= set(found["model@source"])
    assert datasets <= set(found["dataset"])
    submitting = {"slurm_rtx4090", "slurm_a800x4", "slurm_gpux8", "slurm_nodes", "slurm_cpu"}
    machines = {"cpu", "rtx4090", "a800x4", "gpux8", "auto"}
    assert machines | submitting | {"local_pool"} == set(found["hardware"])
    assert {"quick_test", "local", "server", "smollm_to_gemma", "demo"} <= set(found["experiment"])


def test_the_cards_command_line() -> None:
    c = compose_config(["model@source=llama3_8b", "model@target=qwen25_7b", "hardware=a800x4"])
    assert (c.source.hub, c.target.hub) == (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
    )
    assert (c.dataset.name, c.task, c.transfer.method) == (
        "arc_challenge",
        "pipeline",
        "procrustes",
    )
    assert (
        c.hardware.devices,
        c.train.batch_size,
        c.evaluate.batch_tokens,
        c.paths.models_dir,
    ) == (4, 2, None, "../models")
    assert (c.adapter.r, c.adapter.alpha, c.adapter.dropout, c.transfer.similarity_threshold) == (
        16,
        32,
        0.1,
        1e-4,
    )


def test_without_a_model_the_demo_runs_and_keys_override_it() -> None:
    c = compose_config(["train.lr=3e-5", "transfer.similarity_threshold=1e-3"])
    assert (c.source.name, c.target.name, c.dataset.name) == ("tiny_llama", "tiny_qwen2", "facts")
    assert (c.train.lr, c.transfer.similarity_threshold) == (3e-5, 1e-3)
    assert compose_config(["model@source=llama3_8b"]).dataset.name == "arc_challenge"
    assert compose_config(["dataset=arc_easy"]).source.name == "tiny_llama"


@pytest.mark.parametrize(
    ("name", "pair"),
    [("local", ("gemma2_2b", "qwen25_15b")), ("server", ("llama3_8b", "qwen25_7b"))],
)
def test_profiles_of_the_seeds(name: str, pair: tuple[str, str]) -> None:
    c = compose_config([f"experiment={name}"])
    assert (c.source.name, c.target.name) == pair
    assert compose_config([f"experiment={name}", "hardware=cpu"]).hardware.device == "cpu"


def test_models_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAW_MODELS_DIR", "/models")
    assert compose_config(["hardware=rtx4090"]).paths.models_dir == "/models"
    assert compose_config(["hardware=rtx4090", "paths.models_dir=here"]).paths.models_dir == "here"


def test_a_control_keeps_its_own_defaults_and_shares_the_rest() -> None:
    like = compose_config(["transfer.gain=none", "transfer.layers=index"]).transfer
    ridge, random = transfer_named("ridge", like), transfer_named("random", like)
    assert isinstance(ridge, RidgeConfig)
    assert (ridge.gain, ridge.layers, ridge.penalty) == ("none", "index", 0.1)
    assert isinstance(random, PlaceboConfig)
    assert random.reference == "procrustes"
    assert (
        transfer_named("random", compose_config(["transfer=cross_lora"]).transfer).reference
        == "cross_lora"
    )  # type: ignore[attr-defined]


def test_standard_controls_are_the_placebos_that_a_method_can_have() -> None:
    def controls(*ask: str) -> list[str]:
        return compose_config([*ask, "transfer.controls=standard"]).transfer.controls  # type: ignore[no-any-return]

    assert controls() == ["negated", "random", "shuffled"]
    assert controls("transfer=cross_lora") == ["negated", "random", "sign_random"]
    assert controls("transfer=embedding") == ["negated", "random"]
    shuffled = transfer_named("shuffled", compose_config(["transfer=shift"]).transfer)
    assert (shuffled.reference, shuffled.evidence) == ("shift", "models")  # type: ignore[attr-defined]


def test_help_is_quick_and_lists_choices() -> None:
    def once() -> float:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "paw.run", "--help"], capture_output=True, text=True, check=True
        )
        assert "llama3_8b" in done.stdout
        assert "procrustes" in done.stdout
        return time.perf_counter() - began

    assert min(once() for _ in range(3)) < 0.5


# Each is one mistake; the second column is what the one line must name.
WRONG = [
    ("evaluate.mode=letters", "letter"),
    ("evaluate.mode=letter dataset=gsm8k", "likelihood or generate"),
    ("evaluate.num_fewshot=-1", "evaluate.num_fewshot"),
    ("evaluate.records=csv", "parquet"),
    ("evaluate.split=dev dataset=facts", "test.jsonl"),
    ("dataset.bad_rows=drop", "skip"),
    ("task=compare", "runs=[RUN_A,RUN_B]"),
    ("adapter=ia3", "only LoRA is transferred"),
    ("refine=sequences evaluate.mode=letter", "the source is asked as training asks"),
    ("refine=sequences hardware.strategy=fsdp hardware.devices=2", "refine.learn=[factors]"),
    ("refine=sequence", "Did you mean"),
    ("adapter=prefix_tuning model@source=qwen25_7b", "only LoRA is transferred"),
    ("adapter.quantise=nf8", "int8"),
    ("task=train adapter=adalora adapter.init_r=2", "adapter.init_r: 2 is outside [8, 4096]"),
    ("task=train train.patience=2", "Set train.val_every"),
    ("task=train train.packing=true train.compile=true", "never have the same shape"),
    ("task=train train.gradient_checkpointing=true adapter=prefix_tuning", "keeps a cache"),
    ("task=train dataset=gsm8k evaluate.mode=classify", "needs a data set with labels"),
    ("evaluate.mode=classify dataset=mrpc", "is not transferred"),
    ("task=prefer adapter=qlora", "Use adapter=lora"),
    ("task=merge", "adapter.path=DIR"),
    ("task=predict", "predict.text=TEXT"),
    ("hardware.strategy=ddp_spawn", "deepspeed"),
    ("task=train train.optimizer=sgd", "paged_adamw_8bit"),
    ("task=train experiment=demo train.val_every=500", "nothing would be validated"),
    ("task=train experiment=demo dataset.val_split=null train.val_every=5", "Set one aside"),
    ("task=train experiment=demo train.resume=nowhere", "holds no unfinished training"),
    ("task=train experiment=demo train.liger=true", "pip install"),
    ("task=train experiment=demo adapter.target_modules=[q_prj]", "Did you mean q_proj?"),
    ("task=compare runs=[nowhere]", "no run folder"),
    ("runs=[a]", "task=compare"),
    ("model@source=llama9", "llama3_8b"),
    ("model@traget=qwen25_7b", "model@target"),
    ("modl@source=llama3_8b", "model@source"),
    ("model=llama3_8b", "model@source"),
    ("dataset=arc_hard", "arc_easy"),
    ("dataset=", "arc_easy"),
    ("hardware=a800x5", "a800x4"),
    ("hardware.device=tpu", "cuda"),
    ("task=evalute", "evaluate"),
    ("task=null", "evaluate"),
    ("transfer=procrust", "procrustes"),
    ("transfer=null", "procrustes"),
    ("experiment=quicktest", "quick_test"),
    ("tracker=mlflow", "swanlab"),
    ("tracker.swanlab.mode=offline", "tracker.swanlab.mode: needs tracker=swanlab"),
    ("tracker.wandb.project=x experiment=server", "tracker.wandb.project: needs tracker=wandb"),
    ("train.lrr=1", "lr"),
    ("train.lr=x", "train.lr"),
    ("train.lr=-1", "train.lr"),
    ("train.lr=", "train.lr"),
    ("train.max_steps=0", "train.max_steps"),
    ("train.max_steps=1.5", "train.max_steps"),
    ("train.schedule=cosin", "cosine"),
    ("+train.foo=1", "train.foo"),
    ("+source.nmae=x", "name"),
    ("adapter.r=0", "adapter.r"),
    ("adapter.dropout=2", "adapter.dropout"),
    ("adapter.target_modules=q_proj", "adapter.target_modules"),
    ("adapter.target_modules=[]", "adapter.target_modules"),
    ("evaluate.sample_ratio=5", "evaluate.sample_ratio"),
    ("evaluate.limit=0", "evaluate.limit"),
    ("evaluate.limit=many", "evaluate.limit"),
    ("transfer.gain=loud", "activation"),
    ("transfer.layers=cca", "proportional"),
    ("transfer.penalty=1", "transfer.penalty"),
    ("transfer.similarity_threshold=high", "transfer.similarity_threshold"),
    ("transfer.controls=[foo]", "cross_lora"),
    ("transfer.controls=standart", "transfer.controls"),
    ("transfer.controls=3", "transfer.controls"),
    ("transfer.layers=ckaa", "cka"),
    ("transfer.keep_top=0", "transfer.keep_top"),
    ("transfer.draws=0", "transfer.draws"),
    ("transfer.workers=0", "transfer.workers"),
    ("dataset.kind=winogrand", "winogrande"),
    ("task=evaluate models=[llama9]", "llama3_8b"),
    ("adapters=[x]", "adapters"),
    ("force=[trian]", "train"),
    ("seed=1.5", "seed"),
    ("foo=1", "foo"),
    ("'dataset.prompt=Q {} A'", "dataset.prompt"),
    ("hardware.strategy=deepspeed hardware=cpu", "needs GPUs"),
    ("--config-dir=/nowhere", "--config-dir"),
    ("train", "train"),
    ("models=[tiny_llama]", "task=evaluate"),
    ("task=train adapter.path=x", "adapter.path"),
    ("transfer=random transfer.reference=rigde", "ridge"),
    ("train.lr=${foo.bar}", "foo.bar"),
    ("source.path=[1", "source.path"),
    ("model@source=tiny_llama,tiny_qwen2", "-m"),
    ("--foo", "--foo"),
    ("--config-name=other", "--config-name"),
    # found before any stage runs
    ("source.path=/nowhere", "/nowhere"),
    ("dataset.path=/nowhere", "/nowhere"),
    ("evaluate.split=exam", "test.jsonl"),
    ("adapter.path=/nowhere", "/nowhere"),
    ("hardware=rtx4090", "hardware=cpu"),
    ("transfer.calibration=/nowhere", "/nowhere"),
    ("paths.artifacts=/proc/paw", "paths.artifacts"),
]


@pytest.mark.parametrize(("line", "named"), WRONG)
def test_wrong_command_lines_are_one_line(paw: Paw, line: str, named: str, tmp_path: Path) -> None:
    done = paw(*shlex.split(line), ok=False)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("paw: error: ")
    assert named in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "outputs" / "runs").exists()


def test_a_wrong_sweep_is_refused_whole(paw: Paw) -> None:
    done = paw("-m", "model@source=tiny_llama,llama9", ok=False)
    assert done.returncode == 2
    assert "llama3_8b" in done.stderr.strip().splitlines()[-1]


def test_errors_are_typed_for_library_users() -> None:
    with pytest.raises(ConfigError, match="Did you mean"):
        compose_config(["transfer=ridgee"])


def test_a_profile_that_dispatches_takes_several_values_without_m(tmp_path: Path) -> None:
    """Also a user's own, in a folder outside."""
    (tmp_path / "hardware").mkdir()
    ours = "# @package _global_\ndefaults:\n  - cpu@hardware\n  - _self_\n"
    ours += "  - override /hydra/launcher: paw_slurm\nhydra:\n  mode: MULTIRUN\n"
    (tmp_path / "hardware" / "ours.yaml").write_text(ours)
    several = ["experiment=demo", "seed=0,1"]
    for profile in [p for p in groups()["hardware"] if p.startswith(("slurm", "local"))]:
        assert checked([f"hardware={profile}", *several]).jobs
    [c] = checked(["--config-dir", str(tmp_path), "hardware=ours", *several]).jobs
    assert c.hardware.device == "cpu"
    with pytest.raises(ConfigError, match="several values are a sweep: add -m"):
        checked(["hardware=cpu", *several])
    with pytest.raises(ConfigError, match="dispatch: 'step' is not allowed"):
        checked(["hardware=slurm_cpu", "experiment=demo", "dispatch=step"])


def test_a_plan_has_gpu_hours_where_a_profile_has_gpus(tmp_path: Path) -> None:
    """Of the devices that a stage uses, by what it took before: here it never ran."""
    ask = ["experiment=demo", "plan=true", f"paths.artifacts={tmp_path}"]
    table = checked(["hardware=a800x4", *ask]).plan() or ""
    cells = {
        row[1].strip(): row[-2].strip()
        for line in table.splitlines()
        if len(row := line.split("|")) == 9
    }
    assert cells["stage"] == "GPU hours"
    assert (cells["encode"], cells["train"]) == ("0.00", "2 × ?")
    assert "GPU hours" not in (checked(["hardware=cpu", *ask]).plan() or "")
