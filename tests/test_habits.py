"""What users of the older scripts bring with them: their folders, adapters and profiles."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from conftest import Launch, Silent, move
from paw.cli.compose import compose_config, groups
from paw.data.load import examples
from paw.data.tokenise import Encoded
from paw.errors import AdapterError, ConfigError, TransferError
from paw.evaluation.engine import Engine, Job
from paw.evaluation.plan import plan_scoring
from paw.models.adapters import PICKLED, WEIGHTS, find_adapter, other_base, read_adapter
from paw.models.config import ModelConfig
from paw.models.load import Runtime, load_model
from paw.models.locate import locate
from paw.paths import embedded
from paw.store import Input
from paw.transfer import modules


def lora(folder: Path, model: str = "tiny_llama", base: str | None = None, **config: Any) -> Path:
    """A LoRA as stock PEFT saves it, its B drawn at random where the initialisation would leave it
    at zero."""
    torch.manual_seed(0)
    ready = get_peft_model(
        load_model(embedded(model), Runtime("float32")),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config),
    )
    for name, parameter in ready.named_parameters():
        if "lora_B" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    ready.peft_config["default"].base_model_name_or_path = base
    ready.save_pretrained(str(folder))
    return folder


# ---- models and profiles
# ----------------------------------------------------------------------------


def test_model_folders_are_where_the_two_machines_have_them() -> None:
    assert compose_config(["hardware=rtx4090"]).paths.models_dir == "../autodl-tmp/models"
    assert compose_config(["hardware=a800x4"]).paths.models_dir == "../models"


@pytest.mark.parametrize("name", ["qwen", "Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B", "Qwen_Qwen2.5-1.5B"])
def test_a_model_is_found_under_every_usual_name(name: str, tmp_path: Path, watch: Silent) -> None:
    shutil.copytree(embedded("tiny_qwen2"), tmp_path / name)
    found = locate(ModelConfig(name="qwen", hub="Qwen/Qwen2.5-1.5B"), str(tmp_path), watch)
    assert found == tmp_path / name


def test_base_models_and_their_instruct_siblings() -> None:
    for size in ("05b", "15b"):
        base, chat = (
            compose_config([f"model@source=qwen25_{size}{x}"]).source.hub for x in ("", "_instruct")
        )
        assert chat == f"{base}-Instruct"


@pytest.mark.parametrize("name", ["local", "server", "quick_test"])
def test_profiles_ask_as_the_source_systems_do(name: str) -> None:
    c = compose_config([f"experiment={name}"])
    assert (c.evaluate.mode, c.dataset.chat) == ("letter", True)
    assert (c.transfer.similarity, c.transfer.similarity_threshold) == ("weights", 1e-4)
    back = compose_config([f"experiment={name}", "evaluate.mode=likelihood", "dataset.chat=false"])
    assert (back.evaluate.mode, back.dataset.chat) == ("likelihood", False)


def test_configurations_of_the_notes_and_of_the_training_framework() -> None:
    c = compose_config(["experiment=notes_gemma2_2b"])
    assert (c.source.name, c.target.name) == ("qwen25_15b", "gemma2_2b")
    assert (c.train.max_steps, c.train.batch_size, c.train.lr) == (600, 6, 1.5e-5)
    c = compose_config(["experiment=mrpc_bert"])
    assert (c.task, c.evaluate.mode, c.source.name) == ("train", "classify", "bert_base")
    assert getattr(c.adapter, "target_modules", None) == ["query", "value"]
    c = compose_config(["experiment=gsm8k_mistral"])
    assert (getattr(c.adapter, "r", 0), getattr(c.adapter, "alpha", 0), c.dataset.name) == (
        32,
        64,
        "gsm8k",
    )
    for name in groups()["experiment"]:
        asked = compose_config([f"experiment={name}", "task=validate"])
        assert asked.task == "validate", "an experiment must not take the command line's task away"


def test_a_deepspeed_configuration_of_ones_own(tmp_path: Path) -> None:
    own = ["hardware=a800x4", f"hardware.deepspeed={tmp_path}/zero3.json"]
    assert (
        compose_config([*own, "hardware.strategy=deepspeed"]).hardware.deepspeed
        == f"{tmp_path}/zero3.json"
    )
    with pytest.raises(
        ConfigError, match=r"hardware\.deepspeed: needs hardware\.strategy=deepspeed, not ddp"
    ):
        compose_config(own)


# ---- adapters
# ---------------------------------------------------------------------------------------


def test_old_layouts_are_taken_as_they_are(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "arc-challenge" / "tiny_llama"
    final = lora(runs / "lora_20250601_120000" / "final_model")
    shutil.copytree(final, runs / "lora_20250601_120000" / "checkpoint-100")
    assert find_adapter(str(runs)) == final
    assert find_adapter(str(final)) == final
    with pytest.raises(AdapterError, match="no such adapter folder"):
        find_adapter(str(tmp_path / "none"))
    shutil.copytree(runs / "lora_20250601_120000", runs / "lora_20250602_120000")
    with pytest.raises(AdapterError, match=r"holds 2 adapters\. Name one"):
        find_adapter(str(runs))


def test_weights_that_older_versions_pickled(tmp_path: Path) -> None:
    new = lora(tmp_path / "new")
    old = Path(shutil.copytree(new, tmp_path / "old"))
    torch.save(load_file(old / WEIGHTS), old / PICKLED)
    (old / WEIGHTS).unlink()
    wanted, found = read_adapter(new), read_adapter(old)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name].b, found[name].b) for name in wanted)
    (old / PICKLED).write_bytes((old / PICKLED).read_bytes()[:200])
    with pytest.raises(AdapterError, match="is damaged"):
        read_adapter(old)
    torch.save([1, 2], old / PICKLED)
    with pytest.raises(AdapterError, match="holds no tensors by name"):
        read_adapter(old)


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ("Qwen/Qwen2.5-1.5B", False),
        ("/data/models/Qwen2.5-1.5B/", False),
        ("../models/Qwen_Qwen2.5-1.5B", False),
        (None, False),
        (
            "/root/hub/models--Qwen--Qwen2.5-1.5B/snapshots/8faed761d45a263340a0528343f099c05c9a4323",
            False,
        ),
        ("Qwen/Qwen2.5-1.5B-Instruct", True),
        ("meta-llama/Llama-3.2-3B", True),
    ],
)
def test_an_adapter_of_another_base_is_warned_of(
    said: str | None, warned: bool, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": said})
    )
    found = other_base(tmp_path, ["qwen25_15b", "../models/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"])
    assert found == (said if warned else None)
    assert other_base(tmp_path, ["/models/Qwen_Qwen2.5-1.5B"]) == (said if warned else None)


def test_the_warning_is_said_and_stands_at_the_head_of_the_results(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora(tmp_path / "foreign", base="meta-llama/Llama-3.2-3B-Instruct")
    launch(
        "task=evaluate",
        "models=[tiny_llama]",
        f"adapters=[{tmp_path / 'foreign'}]",
        "experiment=demo",
        "evaluate.limit=4",
    )
    assert "Warning: " in capsys.readouterr().out
    (summary,) = Path("outputs/runs").glob("*/summary.md")
    assert "trained on meta-llama/Llama-3.2-3B-Instruct" in summary.read_text()


@pytest.mark.parametrize("how", ["pissa_niter_4", "olora"])
def test_adapters_relative_to_a_changed_base_are_refused(how: str, tmp_path: Path) -> None:
    """Moved as they are they would be wrong without a sign of it."""
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(lora(tmp_path / how, init_lora_weights=how))


def test_such_an_adapter_leaves_the_base_as_it_was_for_the_next(tmp_path: Path) -> None:
    """PEFT takes its part out of the base's weights again when it is loaded, and does not put it
    back."""
    base, adapter = (
        Input(embedded("tiny_llama"), "llama"),
        lora(tmp_path / "pissa", init_lora_weights="pissa"),
    )
    row = Encoded((5, 6, 7, 8), 2)
    (batch,), _ = plan_scoring([[row]], 0, 100, 100)
    engine, plain = Engine(), Job(base=base, runtime=Runtime("float32"), pad_id=0)
    before = engine.run(plain, batch)
    engine.run(replace(plain, adapter=Input(adapter, "pissa")), batch)
    assert engine.run(plain, batch) == before


@pytest.mark.slow
def test_an_old_adapter_of_the_target_is_not_trained_again(launch: Launch, tmp_path: Path) -> None:
    source, target = lora(tmp_path / "source"), lora(tmp_path / "own" / "final_model", "tiny_qwen2")
    launch(
        "experiment=demo",
        f"adapter.path={source}",
        f"target_adapter.path={target.parent}",
        "transfer.controls=[]",
        "evaluate.limit=10",
    )
    assert not Path("outputs/artifacts/train").exists()
    (results,) = Path("outputs/runs").glob("*/results.json")
    systems = [s["system"] for s in json.loads(results.read_text())["systems"]]
    assert systems[-1] == "target + own adapter"
    with pytest.raises(TransferError, match="does not fit the target model"):
        launch(
            "experiment=demo",
            f"adapter.path={source}",
            f"target_adapter.path={source}",
            "evaluate.limit=10",
        )
    with pytest.raises(ConfigError, match=r"target_adapter: only task=pipeline"):
        compose_config(["task=transfer", f"target_adapter.path={target}"])


# ---- data
# -------------------------------------------------------------------------------------------

ROW = {
    "id": "1",
    "context": "Tracy spilled the milk.",
    "question": "What now?",
    "choices": ["mop", "sing"],
    "labels": ["1", "2"],
}


def test_a_field_that_nothing_reads_is_named_once(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        "".join(json.dumps(ROW | {"id": str(i), "answer": "1"}) + "\n" for i in range(4))
    )
    ask = ["task=evaluate", "models=[tiny_llama]", "dataset=own", f"dataset.path={file}"]
    launch(*ask)
    assert (
        capsys.readouterr().out.count("nothing reads the field context") == 2
    )  # when it is found, and with the results
    launch(*ask, 'dataset.prompt="{context} {question}"')
    assert "nothing reads" not in capsys.readouterr().out


def test_a_situation_beside_its_question_is_scored_with_it(tmp_path: Path) -> None:
    """Rows of one's own as the hub's: the same prompts, with letters too."""
    dataset = compose_config(["dataset=social_iqa"]).dataset
    hub = {
        "context": ROW["context"],
        "question": ROW["question"],
        "answerA": "mop",
        "answerB": "sing",
        "answerC": "go",
        "label": "1",
    }
    own = ROW | {"choices": ["mop", "sing", "go"], "labels": ["1", "2", "3"], "answer": "1"}
    dataset.classes = ["mop", "sing", "go"]
    for form in ("likelihood", "letter", "classify"):
        found = []
        for row in (hub, own):
            (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n")
            found.append(examples(tmp_path / "row.jsonl", dataset, "validation", form)[0].contexts)
        assert found[0] == found[1]
        assert "Tracy spilled the milk. What now?" in found[0][0]


# ---- what is transferred
# ----------------------------------------------------------------------------


def test_roles_are_selected(launch: Launch, tmp_path: Path) -> None:
    adapter = lora(tmp_path / "adapter")
    ask = [
        "task=transfer",
        "experiment=demo",
        f"adapter.path={adapter}",
        "transfer.controls=[]",
        "transfer=cross_lora",
    ]
    moved: Any = launch(*ask, "transfer.gain=weight", "transfer.modules=[q_proj,v_proj]")
    found = {name.rsplit(".", 1)[-1] for name in read_adapter(moved.adapters["target_cross_lora"])}
    assert found == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"transfer\.modules: 'query' is not allowed"):
        compose_config(["transfer.modules=[query]"])
    only = lora(tmp_path / "only")
    config = json.loads((only / "adapter_config.json").read_text())
    assert config["r"] == 4
    with pytest.raises(TransferError, match=r"the adapter has none of these. It has: q_proj"):
        modules.pair_names(
            ["model.layers.0.self_attn.q_proj"], {0: {"k_proj": "k"}}, [(0, 0)], ["k_proj"]
        )


def test_the_source_systems_measure_decides_at_their_thresholds(
    launch: Launch, tmp_path: Path
) -> None:
    """Two unrelated random subspaces have 1 in the larger width; the report counts what each
    threshold leaves."""
    adapter = lora(tmp_path / "adapter")
    ask = [
        "task=transfer",
        "experiment=demo",
        f"adapter.path={adapter}",
        "transfer.controls=[]",
        "transfer=cross_lora",
    ]
    ask += ["transfer.gain=weight", "transfer.similarity=weights"]
    left = []
    for threshold in ("1e-4", "1e-2"):
        moved: Any = launch(
            *ask, f"transfer.similarity_threshold={threshold}", f"name=at_{threshold}"
        )
        folder = moved.adapters["target_cross_lora"]
        report = json.loads((folder / "report.json").read_text())
        rows = report["modules"]
        assert sum(r["weights"] for r in rows) / sum(
            r["weights_chance"] for r in rows
        ) == pytest.approx(1, abs=0.2)
        assert all(r["transferred"] == (r["weights"] >= float(threshold)) for r in rows)
        assert report["left"] == {
            t: sum(r["weights"] >= float(t) for r in rows) for t in ("0.0001", "0.001", "0.01")
        }
        assert f"{report['left']['0.01']} at 0.01" in (folder / "report.md").read_text()
        left.append(len(read_adapter(folder)))
    assert left[0] == 35 > left[1] > 0


def test_the_notes_projection_is_the_nearest_in_its_subspaces(tmp_path: Path) -> None:
    """Of a model to itself: U_tU_tᵀ ΔW V_tV_tᵀ, with as many directions as the adapter has
    ranks."""
    from paw.store import Store
    from paw.transfer.linalg import singular_basis
    from paw.transfer.transfer import TransferStage

    store, base = Store(tmp_path / "store"), embedded("tiny_llama")
    adapter = lora(tmp_path / "adapter")
    c = compose_config(["transfer=frobenius_adapter", "transfer.gain=none"]).transfer
    inputs = {
        "adapter": store.file(adapter),
        "source": store.file(base),
        "target": store.file(base),
    }
    stage = TransferStage(transfer=c, text=None, runtime=Runtime("float32"))
    move(stage, inputs, tmp_path / "moved")
    moved, before = read_adapter(tmp_path / "moved"), read_adapter(adapter)
    weights = load_model(base, Runtime("float32"))
    for name in list(before)[:4]:
        w = weights.get_submodule(name).weight.detach()
        basis = singular_basis(w, 4)
        wanted = basis.u @ basis.u.T @ before[name].b @ before[name].a @ basis.v @ basis.v.T
        assert moved[name].rank == 4
        assert torch.allclose(moved[name].b @ moved[name].a, wanted, atol=1e-6)
