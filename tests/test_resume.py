"""Invariant 5 where it is hard: after a kill, on another launch, from damaged files; and what happens to checkpoints."""

import json
import logging
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers.trainer
from backend_worker import DEATHS, Run, execute
from huggingface_hub.utils import filter_repo_objects
from launching import launch, launch_and_die, results
from peft import PeftModel
from tiny import lora_config
from transformers import AutoModelForCausalLM

from lora_ga_trainer import LoRAGASFTTrainer
from lora_ga_trainer.checkpoint.adapter_files import FORMER_FROZEN_FILE, FROZEN_FILE
from lora_ga_trainer.checkpoint.completeness import mark_complete
from lora_ga_trainer.compatibility import check_resuming
from lora_ga_trainer.distributed.launches import Launch, check_resumable_launch

SAVING = {"save_strategy": "steps", "save_steps": 2}
# float32: the same examples in a step, summed in another order; see test_backends
LOSS_TOLERANCE = 1e-4


def same_adapter(found: dict, reference: dict) -> bool:
    ours, theirs = found["adapter"], reference["adapter"]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def skip_where_resuming_is_refused(backend: str) -> None:
    """With versions that do not restore the optimizer under `backend`; see test_compatibility."""
    try:
        check_resuming(Launch(backend, 2), torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


# --- kill -9 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(base_model, tmp_path_factory) -> dict:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = execute(Run("whole", base_model, SAVING), tmp_path_factory.mktemp("whole"))
    torch.set_num_threads(threads)
    return found


LEFT_BEHIND = {
    # where it dies: (the checkpoints there are then, the one that a resumed run starts from)
    "in the estimation": ([], None),
    "in training": ([2], 2),
    "in the adapter file": ([2, 4], 2),
    "in the optimizer file": ([2, 4], 2),
    "before the list of files": ([2, 4], 2),
    "in the list of files": ([2, 4], 2),
    "after the list of files": ([2, 4], 2),
    "in removing the older checkpoint": ([2, 4], 4),
}


@pytest.mark.parametrize("death", LEFT_BEHIND)
def test_after_a_kill_a_new_process_finishes_the_uninterrupted_run(
    base_model, uninterrupted, one_thread, death, tmp_path, caplog
):
    options = SAVING | ({"save_total_limit": 1} if death == "in removing the older checkpoint" else {})
    status = launch_and_die([Run("run", base_model, options, dies=death)], tmp_path)
    assert status == -signal.SIGKILL
    directory = tmp_path / "run"
    checkpoints, complete = LEFT_BEHIND[death]
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in checkpoints
    ]

    for step in checkpoints:
        if step != complete and (complete != 2 or step == 4):
            with pytest.raises(ValueError, match=rf"checkpoint-{step}.*(killed while it saved|not complete)"):
                execute(Run("run", base_model, options, resume=str(directory / f"checkpoint-{step}")), directory)
    if complete is None:
        with pytest.raises(ValueError, match="no complete checkpoint to resume from.*leave out"):
            execute(Run("run", base_model, options, resume=True), directory)
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        resumed = execute(Run("run", base_model, options, resume=complete is not None or None), directory)
    assert ("Skipping an incomplete checkpoint" in caplog.text) == (complete == 2 and 4 in checkpoints)
    assert resumed["losses"] == uninterrupted["losses"]
    assert same_adapter(resumed, uninterrupted)


def test_the_deaths_of_one_process_are_all_tried():
    assert set(LEFT_BEHIND) == set(DEATHS) - {"on another process"}


@pytest.mark.parametrize(
    ("config", "death"), [("zero3", "in the optimizer file"), ("fsdp2", "on another process"), ("ddp", "in training")]
)
def test_after_a_kill_of_one_of_two_processes(base_model, config, death, tmp_path):
    skip_where_resuming_is_refused({"zero3": "ZeRO-3", "fsdp2": "FSDP2", "ddp": "DDP"}[config])

    def run(name, **more):
        return Run(name, base_model, SAVING, {"r": 2}, **more)

    assert launch_and_die([run("whole"), run("run", dies=death)], tmp_path, config) != 0
    whole = results([run("whole")], tmp_path)["whole"]
    half, resumed = tmp_path / "run/checkpoint-4", [run("run", resume=True)]
    if death != "in training":
        assert half.exists()
        resumed.insert(0, run("half", resume=str(half), error=True))
    found = launch(config, resumed, tmp_path)
    assert death == "in training" or "killed while it saved" in found["half"]["error"]
    assert found["run"]["losses"] == whole["losses"] and same_adapter(found["run"], whole)


@pytest.mark.parametrize("death", ["in the optimizer file", "after the list of files"])
def test_a_checkpoint_that_is_saved_over_is_incomplete_meanwhile(base_model, one_thread, death, tmp_path):
    """A run started again in the same folder dies while it writes where a complete checkpoint was."""
    execute(Run("run", base_model, SAVING), tmp_path / "run")
    (tmp_path / "run/checkpoint-4/pytorch_model_fsdp_0").mkdir()  # as of another backend
    launch_and_die([Run("run", base_model, SAVING, dies=death)], tmp_path)
    assert not (tmp_path / "run/checkpoint-4/pytorch_model_fsdp_0").exists()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 has no readable lora_ga_files.json|trainer_state.json is missing"
    ):
        execute(Run("run", base_model, SAVING, resume=str(tmp_path / "run/checkpoint-4")), tmp_path / "run")


# --- another launch -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_one_process(base_model, tmp_path_factory) -> dict:
    return execute(Run("one", base_model, SAVING, {"r": 2}), tmp_path_factory.mktemp("one"))


def test_one_process_and_ddp_take_up_each_others_checkpoints(base_model, of_one_process, tmp_path, caplog):
    skip_where_resuming_is_refused("DDP")
    checkpoint = f"{of_one_process['output_dir']}/checkpoint-4"
    runs = [Run("grown", base_model, SAVING, {"r": 2}, resume=checkpoint), Run("two", base_model, SAVING, {"r": 2})]
    found = launch("ddp", runs, tmp_path)
    assert found["grown"]["launch"] == Launch("DDP", 2)
    assert found["grown"]["losses"] == pytest.approx(of_one_process["losses"], abs=LOSS_TOLERANCE)

    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        shrunk = execute(
            Run("shrunk", base_model, SAVING, {"r": 2}, resume=f"{tmp_path}/two/checkpoint-4"), tmp_path / "s"
        )
    assert "was saved by DDP over 2 processes, this is 1 process" in caplog.text
    assert shrunk["losses"] == pytest.approx(found["two"]["losses"], abs=LOSS_TOLERANCE)


def test_fsdp2_resumes_with_another_number_of_processes(base_model, tmp_path):
    skip_where_resuming_is_refused("FSDP2")
    two = launch("fsdp2", [Run("two", base_model, SAVING, {"r": 2})], tmp_path)["two"]
    whole_batch = SAVING | {"per_device_train_batch_size": 4}
    run = Run("one", base_model, whole_batch, {"r": 2}, resume=f"{tmp_path}/two/checkpoint-4")
    one = launch("fsdp2", [run], tmp_path, "--num_processes", "1")["one"]
    assert (two["launch"], one["launch"]) == (Launch("FSDP2", 2), Launch("FSDP2", 1))
    assert one["losses"] == pytest.approx(two["losses"], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(("config", "name"), [("zero3", "ZeRO-3"), ("fsdp2", "FSDP2")])
def test_other_backends_are_refused_in_both_directions(base_model, of_one_process, config, name, tmp_path):
    checkpoint = f"{of_one_process['output_dir']}/checkpoint-4"
    refused = Run("refused", base_model, SAVING, {"r": 2}, resume=checkpoint, error=True)
    found = launch(config, [refused, Run("saved", base_model, SAVING, {"r": 2})], tmp_path)
    assert f"was saved by 1 process, and {name} over 2 processes cannot read" in found["refused"]["error"]
    with pytest.raises(ValueError, match=f"was saved by {name} over 2 processes, and 1 process cannot read.*--merge"):
        execute(Run("plain", base_model, SAVING, {"r": 2}, resume=f"{tmp_path}/saved/checkpoint-4"), tmp_path / "plain")


@pytest.mark.parametrize(
    ("saved", "present", "works"),
    [
        (("DDP", 8), ("DDP", 1), True),
        (("FSDP2", 8), ("FSDP2", 4), True),
        (("ZeRO-3", 8), ("ZeRO-3", 8), True),
        (("ZeRO-3", 8), ("ZeRO-3", 4), False),
        (("ZeRO-2", 8), ("ZeRO-3", 8), False),
        (("DDP", 8), ("ZeRO-1", 8), False),
    ],
)
def test_which_launches_read_each_others_optimizer_state(saved, present, works):
    if works:
        check_resumable_launch(Launch(*saved), Launch(*present))
    else:
        with pytest.raises(ValueError, match="cannot read its optimizer state. Resume with"):
            check_resumable_launch(Launch(*saved), Launch(*present))


# --- damaged and foreign checkpoints, before anything is loaded -----------------------------------------------------


def refused(run: Run, directory: Path, message: str) -> None:
    def train(*args, **kwargs):
        pytest.fail("the checkpoint was not refused before training")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", train)
        with pytest.raises(ValueError, match=message):
            execute(run, directory)


@pytest.mark.parametrize(
    "file",
    [
        "adapter_model.safetensors",
        "lora_ga.tensors",
        "lora_ga.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_checkpoints_are_refused(base_model, of_one_process, file, damage, tmp_path):
    checkpoint = Path(shutil.copytree(f"{of_one_process['output_dir']}/checkpoint-4", tmp_path / "checkpoint-4"))
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    if damage != "missing":
        (checkpoint / file).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    run = Run("run", base_model, SAVING, {"r": 2}, resume=str(checkpoint))
    refused(run, tmp_path / "run", rf"{file} (is missing|has [\d,]+ bytes), but {len(content):,} bytes were saved")


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1'])
def test_a_half_written_trainer_state_is_refused(base_model, of_one_process, content, tmp_path):
    """It is written after the list of files."""
    checkpoint = Path(shutil.copytree(f"{of_one_process['output_dir']}/checkpoint-4", tmp_path / "checkpoint-4"))
    (checkpoint / "trainer_state.json").unlink()
    if content is not None:
        (checkpoint / "trainer_state.json").write_text(content)
    run = Run("run", base_model, SAVING, {"r": 2}, resume=str(checkpoint))
    refused(run, tmp_path / "run", "trainer_state.json is missing or damaged")


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        ({"r": 3}, {}, "`r` is 3, but .* was made with 2"),
        ({"r": 2, "lora_alpha": 8}, {}, "`lora_alpha` is 8, but .* was made with 16"),
        ({"r": 2, "lora_dropout": 0.5}, {}, "`lora_dropout` is 0.5, but .* was made with 0.0"),
        ({"r": 2}, {"ga_gamma": 64.0}, "`ga_gamma` is 64.0, but .* was made with 16.0"),
        ({"r": 2, "target_modules": ["q_proj"]}, {}, "does not fit this model"),
    ],
)
def test_other_settings_are_refused(base_model, of_one_process, lora, options, message, tmp_path):
    checkpoint = f"{of_one_process['output_dir']}/checkpoint-4"
    refused(Run("run", base_model, SAVING | options, lora, resume=checkpoint), tmp_path, message)


def test_what_no_trainer_saved_is_refused(base_model, of_one_process, tmp_path):
    """The state of an adapter that a loop of one's own saved: no launch, and no optimizer state to be found by it."""
    checkpoint = Path(shutil.copytree(f"{of_one_process['output_dir']}/checkpoint-4", tmp_path / "checkpoint-4"))
    state = json.loads((checkpoint / "lora_ga.json").read_text())
    (checkpoint / "lora_ga.json").write_text(json.dumps(state | {"launch": None}))
    mark_complete(checkpoint)
    run = Run("run", base_model, SAVING, {"r": 2}, resume=str(checkpoint))
    refused(run, tmp_path / "run", "was saved by a custom training loop")


def test_a_checkpoint_copied_elsewhere_resumes(base_model, of_one_process, tmp_path):
    checkpoint = shutil.copytree(f"{of_one_process['output_dir']}/checkpoint-4", tmp_path / "elsewhere")
    (tmp_path / "elsewhere/README.md").write_text("edited")
    found = execute(Run("run", base_model, SAVING, {"r": 2}, resume=str(checkpoint)), tmp_path / "run")
    assert found["losses"] == of_one_process["losses"] and same_adapter(found, of_one_process)


def test_a_checkpoint_of_0_1_0_resumes(base_model, of_one_process, tmp_path):
    """Its file has rsLoRA's α, and the initial factors are beside it as one more `*.safetensors`."""
    checkpoint = Path(shutil.copytree(f"{of_one_process['output_dir']}/checkpoint-4", tmp_path / "checkpoint-4"))
    (checkpoint / FROZEN_FILE).rename(checkpoint / FORMER_FROZEN_FILE)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "lora_alpha": config["lora_alpha"] / math.sqrt(config["r"])}
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    mark_complete(checkpoint)
    found = execute(Run("run", base_model, SAVING, {"r": 2}, resume=str(checkpoint)), tmp_path / "run")
    assert found["losses"] == of_one_process["losses"] and same_adapter(found, of_one_process)


# --- Trainer's ways with checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def trainer_of(sft_config, prompt_completion, tokenizer, base_model):
    def make(**options):
        args = sft_config(max_steps=6, **SAVING | options)
        return LoRAGASFTTrainer(base_model, args, train_dataset=prompt_completion, processing_class=tokenizer,
                                peft_config=lora_config())  # fmt: skip

    return make


def test_save_total_limit_keeps_the_last(trainer_of):
    trainer = trainer_of(save_total_limit=2)
    trainer.train()
    run = Path(trainer.args.output_dir)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert trainer_of().train(resume_from_checkpoint=True).global_step == 6


def test_save_only_model_saves_an_adapter_and_says_that_it_cannot_resume(trainer_of, base_model):
    trainer = trainer_of(save_only_model=True)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-6"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), checkpoint).eval()
    inputs = torch.arange(3, 15)[None]
    with torch.no_grad():
        difference = loaded(inputs).logits - trainer.model.eval()(inputs).logits
    assert difference.abs().max() < 1e-5  # float32, see test_checkpoint
    with pytest.raises(ValueError, match="cannot be resumed.*`save_only_model`"):
        trainer_of().train(resume_from_checkpoint=checkpoint)


class LocalHub:
    """The calls of `HfApi` that Trainer makes, with a folder for a hub."""

    def __init__(self, root: Path):
        self.root = root

    def create_repo(self, repo_id, **kwargs):
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(
        self, *, repo_id, folder_path, path_in_repo=".", ignore_patterns=None, run_as_future=False, **kwargs
    ):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            target = self.root / repo_id / path_in_repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target)
        return type("Done", (), {"done": lambda self: True, "result": lambda self: None})()


def test_push_to_hub(trainer_of, base_model, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    stand_ins = {"hf_api": lambda: hub, "create_repo": hub.create_repo, "upload_folder": hub.upload_folder}
    for name, stand_in in stand_ins.items():  # older versions of transformers call the two functions themselves
        monkeypatch.setattr(transformers.trainer, name, stand_in, raising=False)
    options = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_strategy": "checkpoint", "hub_always_push": True}
    trainer = trainer_of(**options)
    trainer.train()
    trainer.push_to_hub()
    repo = tmp_path / "hub/me/adapter"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), repo).eval()
    inputs = torch.arange(3, 15)[None]
    with torch.no_grad():
        difference = loaded(inputs).logits - trainer.model.eval()(inputs).logits
    assert difference.abs().max() < 1e-5  # float32, see test_checkpoint
    assert not list(repo.glob("checkpoint-*"))
    # what hub_strategy="checkpoint" pushed is a checkpoint to go on from
    assert trainer_of().train(resume_from_checkpoint=str(repo / "last-checkpoint")).global_step == 6
