"""Invariants 1, 3, 4, 5 and 6 on two real processes: every backend gives the same factors, losses and files as one process."""

import hashlib
import inspect
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from backend_worker import INPUTS, STEPS, Run, execute, factor_error
from communication import exact_bytes, sketch_bytes
from costs.on_paper import Model
from launching import (
    PYTHON,
    REPOSITORY,
    accelerate_command,
    ended_well,
    environment,
    free_port,
    launch,
    launch_on_two_machines,
    torchrun,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_families import FAMILIES
from test_vision_language import batches_of
from tiny import lora_config, moved_at_random, peft_pair, tiny_batches, tiny_model, tiny_t5
from tiny_vision import FAMILIES as VISION_FAMILIES
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint.adapter_files import FROZEN_FILE
from lora_ga_trainer.distributed.launches import Launch, check_fsdp2, launch_of, splits_model

BACKENDS = {
    "ddp": (Launch("DDP", 2), "DistributedDataParallel"),
    "zero1": (Launch("ZeRO-1", 2), "DeepSpeedEngine"),
    "zero2": (Launch("ZeRO-2", 2), "DeepSpeedEngine"),
    "zero3": (Launch("ZeRO-3", 2), "DeepSpeedEngine"),
    "zero3_offload": (Launch("ZeRO-3", 2), "DeepSpeedEngine"),
    "fsdp2": (Launch("FSDP2", 2), "FSDPPeftModelForCausalLM"),
}
SEQ2SEQ = ("ddp", "zero2", "zero3")
MIXTURES = ("ddp", "zero2", "fsdp2")
FEWER_RUNS = ("zero1", "zero3_offload")
"""Next of kin of ZeRO-2 and ZeRO-3, under which every run is made; here those that are resumed."""
SHARDED = ("zero3", "zero3_offload", "fsdp2")

# Float32 sums in another order. A singular vector moves by that rounding times σ₁ / (gap to its neighbours), so the runs
# take few samples and a small rank, where the gaps are wide; the bounds.
FACTOR_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-4
# PEFT multiplies by α·√2/√(2r) where the trainer multiplies by α/√r; logits of order 1
LOGITS_TOLERANCE = 1e-5


def make_runs(model: str) -> list[Run]:
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    return [
        Run("plain", model, saving, {"r": 2}),
        # a real sketch; 5 samples over 2 processes; a rank that 2 processes cannot share evenly
        Run(
            "checkpointing",
            model,
            saving
            | {"gradient_checkpointing": True, "ga_estimator": "sketch", "ga_sketch_size": 10, "ga_num_samples": 5},
            {"r": 3, "modules_to_save": ["norm", "embed_tokens"]},
        ),
        Run("accumulation", model, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, {"r": 2}),
        # each process averages over its own tokens; the estimation still averages over all of them
        Run("own_average", model, {"average_tokens_across_devices": False, "ga_scale": "weight_svd"}, {"r": 2}),
        # the largest loss as the best: that of the first checkpoint, which is from before the restart
        Run(
            "best",
            model,
            {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
            | {"load_best_model_at_end": True, "greater_is_better": True, "ga_restart_steps": 3},
            {"r": 2},
        ),
        Run("streaming", model, {"max_steps": 1}, {"r": 2}, streaming=True),
        # a look at half of the sample before one pass over it
        Run(
            "look",
            model,
            {"ga_estimator": "sketch", "ga_sketch_size": 10, "ga_sketch_passes": 1.5, "max_steps": 1},
            {"r": 2},
        ),
        # c follows both rates, also at a restart
        Run(
            "two_rates",
            model,
            {"learning_rate": 1e-4, "ga_full_learning_rate": 1e-2, "ga_restart_steps": 2, "max_steps": 3},
            {"r": 2},
            ratio=8.0,
        ),
        # one process has no sample at all
        Run("one_sample", model, {"ga_num_samples": 1, "max_steps": 1}, {"r": 1}),
    ]


def smaller_batches(model: str) -> list[Run]:
    """The first attempt fails, in the initialization or in the step after it."""
    return [
        Run(f"smaller_{phase}", model, {"auto_find_batch_size": True}, {"r": 2}, out_of_memory_in=phase)
        for phase in ("estimation", "training")
    ]


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("t5"))
    tiny_t5(dropout_rate=0.0).save_pretrained(folder)  # in training every process drops out other activations
    return folder


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("experts"))
    tiny_model("mixture").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base_model, tmp_path_factory) -> str:
    """The folder of a trained adapter of rank 4, that a stage of rank 2 starts from."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model), lora_config())
    folder = tmp_path_factory.mktemp("adapter")
    moved_at_random(model)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def references(base_model, t5, experts, adapter, tmp_path_factory) -> dict[str, dict]:
    """The same runs in one process, with the same examples in a step."""
    found = {}
    for run in [
        *make_runs(base_model),
        restarts(base_model),
        no_offset(base_model),
        stage(base_model, adapter),
        seq2seq(t5),
        mixture(experts),
    ]:
        if run.options.get("gradient_accumulation_steps") == 2:
            run.options["per_device_train_batch_size"] = 2
        found[run.name] = execute(run, tmp_path_factory.mktemp("reference"))
    return found


def restarts(model: str) -> Run:
    """Half-time lies between the restarts before the third and the fifth step."""
    options = {"ga_restart_steps": 2, "ga_restart_warmup_steps": 1, "save_strategy": "steps", "save_steps": STEPS // 2}
    return Run("restarts", model, options, {"r": 2})


def seq2seq(model: str) -> Run:
    options = {"save_strategy": "steps", "save_steps": STEPS // 2, "gradient_accumulation_steps": 2}
    return Run("seq2seq", model, options | {"per_device_train_batch_size": 1}, {"r": 2}, seq2seq=True)


def no_offset(model: str) -> Run:
    """A in two parts, whose sum is in the adapter's file, and B as PEFT made it."""
    options = {"ga_offset": False, "save_strategy": "steps", "save_steps": STEPS // 2}
    return Run("no_offset", model, options, {"r": 2})


def stage(model: str, adapter: str) -> Run:
    """On top of a trained adapter, which every process holds whole."""
    return Run("stage", model, {"save_strategy": "steps", "save_steps": STEPS // 2}, adapter=adapter)


def mixture(model: str) -> Run:
    """All that "all-linear" means there: attention, experts and router."""
    options = {"ga_batch_size": 1, "ga_num_samples": 5, "save_strategy": "steps", "save_steps": STEPS // 2}
    return Run("mixture", model, options, {"r": 2})


def new_tokens(model: str) -> Run:
    return Run("new_tokens", model, {"max_steps": 2}, {"r": 2, "trainable_token_indices": [5, 6]})


NAMES = [run.name for run in make_runs("")]


def bf16(model: str) -> Run:
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    in_bf16 = {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "learning_rate": 1e-2}
    return Run("bf16", model, saving | in_bf16, {"r": 2})


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def launched(backend, base_model, t5, experts, adapter, tmp_path_factory) -> dict[str, dict]:
    """The runs under one backend, and those that `to_resume` names resumed at half-time by new processes."""
    out = tmp_path_factory.mktemp(backend)
    to_resume = [*make_runs(base_model)[:2], bf16(base_model), restarts(base_model)]
    if backend not in FEWER_RUNS:
        to_resume += [no_offset(base_model), stage(base_model, adapter)]
    if backend in SEQ2SEQ:
        to_resume.append(seq2seq(t5))
    if backend in MIXTURES:
        to_resume.append(mixture(experts))
    runs = to_resume if backend in FEWER_RUNS else [*to_resume, *make_runs(base_model)[2:]]
    if not backend.startswith("zero3") and backend not in FEWER_RUNS:  # where Trainer refuses `auto_find_batch_size`
        runs += smaller_batches(base_model)
    if backend == "zero3":
        runs += [new_tokens(base_model), replace(mixture(experts), error=True)]
    found = launch(backend, runs, out)
    resumed = []
    for run in to_resume:
        checkpoint = out / run.name / f"checkpoint-{STEPS // 2}"
        resumed.append(replace(run, name=f"{run.name}_resumed", resume=str(checkpoint)))
    return Launched(found | launch(backend, resumed, out))


class Launched(dict):
    """What came of the runs under one backend, by name."""

    def __missing__(self, name: str):
        pytest.skip("run under the next of kin of this backend")


@pytest.mark.parametrize("name", [*NAMES, "restarts"])
def test_it_is_that_backend_and_two_processes(launched, backend, name):
    expected, wrapper = BACKENDS[backend]
    found = launched[name]
    assert (found["launch"], found["wrapper"], found["communication"]) == (expected, wrapper, "gloo")


def test_new_tokens_train_beside_the_adapter(launched):
    """What is looked at in a batch does not touch the embedding, of which ZeRO-3 has nothing whole."""
    found = launched["new_tokens"]
    assert len(found["losses"]) == 2 and found["report"] is not None
    (tokens,) = (value for name, value in found["adapter"].items() if "trainable_tokens" in name)
    assert tokens.shape == (2, 48) and tokens.isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, "no_offset"])
def test_at_init_the_logits_are_the_base_models(launched, base_model, name):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base_model).eval()(INPUTS).logits
    assert torch.equal(launched[name]["init_logits"], logits)


def test_at_init_in_bf16_the_logits_are_the_base_models(launched, backend):
    """Each backend has its own mixed precision; within it the adapter adds nothing."""
    found = launched["bf16"]
    assert torch.equal(found["init_logits"], found["base_logits"])
    assert abs(found["losses"][0] - found["losses"][-1]) > 0.01, "nothing was learned"


def test_a_stage_starts_where_its_adapter_is(launched, base_model, adapter):
    """Whatever the backend; the same products, summed beside others: float32."""
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(base_model).eval()
        logits = PeftModel.from_pretrained(base, adapter).eval()(INPUTS).logits
    assert (launched["stage"]["init_logits"] - logits).abs().max() < LOGITS_TOLERANCE
    layers = {name for name in launched["stage"]["adapter"] if name.endswith("history")}
    assert len(layers) == 2 * 14


@pytest.mark.parametrize("name", [*NAMES, "no_offset", "stage"])
def test_the_factors_are_those_of_one_process(launched, references, name):
    found, reference = launched[name], references[name]
    assert factor_error(found["adapter"], reference["adapter"]) < FACTOR_TOLERANCE
    assert found["report"].num_items == reference["report"].num_items
    assert found["report"].alignment == pytest.approx(reference["report"].alignment, rel=1e-4)
    assert found["report"].gradient_norm == pytest.approx(reference["report"].gradient_norm, rel=1e-4)
    for layer, values in reference["report"].singular_values.items():
        assert found["report"].singular_values[layer] == pytest.approx(values, rel=1e-3)  # the small ones vary more


@pytest.mark.parametrize("name", [*NAMES, "restarts"])
def test_all_processes_write_the_same_bits(launched, name):
    first, second = launched[name]["factor_digests"]
    assert first == second != hashlib.sha256().hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_factored_once(launched, name):
    first, second = launched[name]["factorizations"]
    assert first + second == 14 * launched[name]["initializations"] and abs(first - second) <= 2, (
        "spread over the processes"
    )


@pytest.mark.parametrize("name", ["plain", "checkpointing", "accumulation", "restarts", "no_offset", "stage"])
def test_the_loss_curve_is_that_of_one_process(launched, references, name):
    found, reference = launched[name]["losses"], references[name]["losses"]
    assert len(found) == STEPS and found == pytest.approx(reference, abs=LOSS_TOLERANCE)
    assert abs(found[0] - found[1]) > 10 * LOSS_TOLERANCE, "the curve is flat, so that it shows nothing"


@pytest.mark.parametrize("name", ["plain", "checkpointing", "bf16", "restarts", "no_offset", "stage"])
def test_resuming_is_the_uninterrupted_run(launched, name):
    is_the_uninterrupted_run(launched, name)


def is_the_uninterrupted_run(launched, name):
    """To the bit: a new process does the same operations in the same order."""
    whole, resumed = launched[name], launched[f"{name}_resumed"]
    assert resumed["losses"] == whole["losses"]
    assert resumed["adapter"].keys() == whole["adapter"].keys()
    assert all(torch.equal(resumed["adapter"][key], value) for key, value in whole["adapter"].items())
    assert resumed["report"] == whole["report"] and resumed["initializations"] == whole["initializations"]
    assert whole["initializations"] == (3 if name == "restarts" else 1)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "checkpointing",
        "plain_resumed",
        "restarts",
        "restarts_resumed",
        "no_offset",
        "no_offset_resumed",
        "stage",
    ],
)
def test_stock_peft_loads_the_adapter(launched, base_model, name):
    found = launched[name]
    base = AutoModelForCausalLM.from_pretrained(base_model).eval()
    with torch.no_grad():
        untrained = base(INPUTS).logits
        logits = PeftModel.from_pretrained(base, f"{found['output_dir']}/final").eval()(INPUTS).logits
    assert (logits - found["final_logits"]).abs().max() < LOGITS_TOLERANCE
    assert (logits - untrained).abs().max() > 0.01, "training changed nothing, so that it shows nothing"


@pytest.mark.parametrize("name", ["plain", "checkpointing", "restarts", "no_offset"])
def test_estimation_leaves_no_gradient_and_the_same_parameters_training(launched, references, name):
    assert launched[name]["gradients"] == []
    assert launched[name]["trainable"] == references[name]["trainable"]


def test_the_frozen_half_is_sharded_like_any_parameter(launched, backend):
    shares = launched["plain"]["own_share"]  # all ranks and widths here are even
    assert set(shares.values()) == ({0.5} if backend in SHARDED else {1.0})
    assert any(name.endswith("frozen") for name in shares)


@pytest.mark.parametrize("name", ["plain", "checkpointing", "own_average"])
def test_no_more_of_the_model_stands_whole_than_in_training(launched, backend, name):
    """The test's ZeRO-3 settings gather a module at a time, FSDP2 a decoder layer; with the others all of it stands."""
    whole = launched[name]["most_whole"]
    assert 0 < whole["estimation"] <= whole["training"]
    if backend in SHARDED and name == "plain":  # with checkpointing DeepSpeed itself has all of it stand
        assert whole["training"] < sum(parameter.numel() for parameter in tiny_model().parameters())


def test_the_best_model_is_loaded_at_the_end(launched):
    found = launched["best"]
    assert found["initializations"] == 2, "restarted in between"
    assert found["eval_losses"][0] == max(found["eval_losses"])
    run = Path(found["output_dir"])
    tensors = {
        name: load_file(run / name / "adapter_model.safetensors") for name in ("final", "checkpoint-2", "checkpoint-6")
    }
    assert all(torch.equal(value, tensors["checkpoint-2"][key]) for key, value in tensors["final"].items())
    assert not all(torch.equal(value, tensors["checkpoint-6"][key]) for key, value in tensors["final"].items())


def test_only_the_sketches_are_all_reduced(launched):
    """The bytes of benchmarks/communication.py, on paper, for the tiny Llama."""
    tiny = Model("tiny", layers=2, hidden=48, intermediate=80, key_value=24)
    report = launched["checkpointing"]["report"]
    assert report.all_reduced_bytes == sketch_bytes(tiny, width=10)
    assert "MiB per process all-reduced, pass by pass" in report.summary()
    assert launched["plain"]["report"].all_reduced_bytes == exact_bytes(tiny)


@pytest.mark.parametrize("phase", ["estimation", "training"])
def test_running_out_of_memory_ends_in_the_same_initialization(launched, references, backend, phase):
    if backend.startswith("zero3"):
        pytest.skip("Trainer refuses `auto_find_batch_size` with ZeRO-3")
    found = launched[f"smaller_{phase}"]
    assert found["batch_size"] == 1 and len(found["losses"]) == STEPS
    assert factor_error(found["adapter"], references["plain"]["adapter"]) < FACTOR_TOLERANCE


@pytest.mark.parametrize("backend", SEQ2SEQ, indirect=True)
def test_an_encoder_decoder_is_trained_as_in_one_process(launched, references, backend):
    found, reference = launched["seq2seq"], references["seq2seq"]
    assert found["launch"] == BACKENDS[backend][0] and found["wrapper"] == BACKENDS[backend][1]
    assert torch.equal(found["init_logits"], found["base_logits"])
    assert factor_error(found["adapter"], reference["adapter"]) < FACTOR_TOLERANCE
    assert found["losses"] == pytest.approx(reference["losses"], abs=LOSS_TOLERANCE)
    assert found["gradients"] == [] and found["trainable"] == reference["trainable"]
    is_the_uninterrupted_run(launched, "seq2seq")


@pytest.mark.parametrize("backend", MIXTURES, indirect=True)
def test_mixture_of_experts(launched, references, backend):
    """The router's loss is a mean per batch and not per token, so it would show a loss multiplied by the number of processes, a
    batch counted twice, and the batch that a process repeats because the other has one more."""
    found, reference = launched["mixture"], references["mixture"]
    expected, wrapper = BACKENDS[backend]
    assert (found["launch"], found["wrapper"]) == (expected, wrapper)
    assert torch.equal(found["init_logits"], found["base_logits"])
    assert any(".experts.base_layer.lora_A" in name for name in found["adapter"])
    assert factor_error(found["adapter"], reference["adapter"]) < FACTOR_TOLERANCE
    # not the losses: a batch of one process is not that of another, and the router's loss is a mean over it in training too
    is_the_uninterrupted_run(launched, "mixture")


@pytest.mark.parametrize("backend", ["zero3"], indirect=True)
def test_experts_under_zero3_are_refused(launched):
    assert "is partitioned by DeepSpeed ZeRO-3, where PEFT's adapters of parameters" in launched["mixture"]["error"]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> list[dict[str, tuple[float, bool]]]:
    out = tmp_path_factory.mktemp("families")
    pictures = {family: batches_of(family, (2, 2), (1, 2)) for family in VISION_FAMILIES}
    torch.save(pictures, out / "pictures.pt")
    return torchrun("families_worker.py", out)


def is_that_of_the_whole_model(families, name):
    return len(families) == 2 and all(error < FACTOR_TOLERANCE and same for error, same in (x[name] for x in families))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_under_fsdp2_every_architecture_gets_the_factors_of_the_whole_model(families, family):
    assert is_that_of_the_whole_model(families, family), [found[family] for found in families]


@pytest.mark.parametrize("family", list(VISION_FAMILIES))
def test_under_fsdp2_what_sees_pictures_gets_the_factors_of_the_whole_model(families, family):
    name = f"{family} with pictures"
    assert is_that_of_the_whole_model(families, name), [found[name] for found in families]


def test_what_fsdp2_cannot_do_is_refused(base_model, t5, tmp_path):
    options = {
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "compiled": {"torch_compile": True},
    }
    runs = [Run(name, base_model, of_run, error=True) for name, of_run in options.items()]
    found = launch("fsdp2", [*runs, replace(seq2seq(t5), error=True)], tmp_path)
    assert "'use_reentrant': True}` does not work with LoRA-GA's estimation under FSDP2" in found["reentrant"]["error"]
    assert "`torch_compile=True` does not work with LoRA-GA under FSDP2" in found["compiled"]["error"]
    assert "shared, base_model.model.encoder.embed_tokens" in found["seq2seq"]["error"]
    assert "which accelerate cannot shard with FSDP2. Launch with DDP or DeepSpeed ZeRO" in found["seq2seq"]["error"]


def test_a_model_that_transformers_has_sharded(base_model, references, tmp_path):
    """With `DistributedConfig`, before accelerate sees it: the base is FSDP2's, the adapter whole on every process."""
    if "fsdp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip("this version of transformers does not shard with FSDP2")
    options = {"save_strategy": "no", "ga_restart_steps": 2, "ga_restart_warmup_steps": 1}
    options["model_init_kwargs"] = {"dtype": "float32", "distributed_config": {"fsdp_size": 2}}
    sharded = launch("ddp", [Run("sharded", base_model, options, {"r": 2})], tmp_path)["sharded"]
    reference = references["restarts"]
    assert sharded["launch"] == Launch("FSDP2", 2)
    assert sharded["initializations"] == 3
    assert 0 < sharded["most_whole"]["estimation"] <= sharded["most_whole"]["training"]
    assert sharded["losses"] == pytest.approx(reference["losses"], abs=LOSS_TOLERANCE)
    base = AutoModelForCausalLM.from_pretrained(base_model).eval()
    with torch.no_grad():
        assert torch.equal(sharded["init_logits"], base(INPUTS).logits)
        logits = PeftModel.from_pretrained(base, f"{sharded['output_dir']}/final").eval()(INPUTS).logits
    assert (logits - sharded["final_logits"]).abs().max() < LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("dimensions", "refused"),
    [
        (None, False),
        ({"fsdp": 2}, False),
        ({"pp": 1, "dp_replicate": 2, "fsdp": 2, "tp": 1}, False),
        ({"tp": 2}, True),
        ({"dp_replicate": 1, "efsdp": 1, "ep": 2}, True),
    ],
)
def test_a_model_that_transformers_has_cut_is_told_from_a_sharded_one(dimensions, refused):
    mesh = SimpleNamespace(
        mesh_dim_names=dimensions and tuple(dimensions), shape=tuple(dimensions.values()) if dimensions else (2,)
    )
    assert splits_model(mesh) == refused


@pytest.mark.parametrize("size", [0, 1, 2])
def test_deepspeeds_own_tensor_parallelism_is_refused(size):
    """Its configuration has it where accelerate does not look."""
    plugin = SimpleNamespace(zero_stage=1, deepspeed_config={"tensor_parallel": {"autotp_size": size}})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        parallelism_config=None,
        num_processes=2,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    if size < 2:
        assert launch_of(accelerator, tiny_model()) == Launch("ZeRO-1", 2)
        return
    with pytest.raises(ValueError, match="splits its model or its sequences over processes"):
        launch_of(accelerator, tiny_model())


def test_fsdps_own_checkpointing_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match="`fsdp_activation_checkpointing: true` renames the layers"):
        check_fsdp2(accelerator, torch_compile=False)


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_the_configurations_for_gpus_start_with_either_precision(base_model, references, config, tmp_path):
    """Where there is no GPU they run on the CPU; what they leave at its default differs from the CPU variants."""
    runs = [Run(name, base_model, {"max_steps": 1, "bf16": name == "bf16"}, {"r": 2}) for name in ("fp32", "bf16")]
    found = launch(f"../{config}", runs, tmp_path, "--num_processes", "2")
    assert found["fp32"]["launch"] == found["bf16"]["launch"] == BACKENDS[config][0]
    assert factor_error(found["fp32"]["adapter"], references["plain"]["adapter"]) < FACTOR_TOLERANCE
    assert torch.equal(found["bf16"]["init_logits"], found["bf16"]["base_logits"])
    assert not torch.equal(found["bf16"]["init_logits"], found["fp32"]["init_logits"]), "bf16 was not used"


@pytest.fixture(scope="module")
def own_loops(tmp_path_factory) -> list[dict]:
    return torchrun("own_loop_worker.py", tmp_path_factory.mktemp("own_loop"))


@pytest.mark.parametrize("name", ["uneven", "one has none", "ZeRO-3", "FSDP2"])
def test_a_loop_of_ones_own(own_loops, name):
    model, _ = peft_pair()
    initialize_lora_ga(
        model, tiny_batches((8,)), LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact"), disable_tqdm=True
    )
    reference = {key: value for key, value in model.state_dict().items() if key.endswith("frozen")}
    first, second = own_loops
    assert first["world_size"] == 2
    assert factor_error(first[name], reference) < FACTOR_TOLERANCE
    assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())


@pytest.fixture(scope="module")
def example_alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The A0 of `examples/custom_loop.py` in one process."""
    return example([PYTHON], tmp_path_factory.mktemp("example"))


def example(launcher: list[str], out: Path) -> dict[str, torch.Tensor]:
    done = subprocess.run(
        [*launcher, "examples/custom_loop.py", "--r", "2", "--out", str(out)],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended_well(done), done.stderr[-2000:]
    assert done.stdout.count("The adapter is in") == 1, "on the main process only"
    return {f"{layer}.lora_A.frozen": value for layer, value in load_file(out / FROZEN_FILE).items()}


@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
def test_the_example_of_a_loop(config, example_alone, tmp_path):
    found = example(accelerate_command(config, "--main_process_port", str(free_port())), tmp_path)
    assert len(example_alone) == len(found) == 14
    assert factor_error(found, example_alone) < FACTOR_TOLERANCE
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(value.isfinite().all() and value.any() for value in adapter.values())


def test_an_error_on_one_process_is_raised_on_all(own_loops):
    for found in own_loops:
        assert found["nan"].startswith("The loss of batch 0 for LoRA-GA on process 1 is nan")
        assert found["unreached"].startswith("The loss of batch 0 for LoRA-GA does not depend on any target layer")
        assert found["nothing"].startswith("LoRA-GA got no batch")


def test_running_out_of_memory_on_one_process_is_so_on_all(own_loops):
    """At the end of a pass and while factoring; `auto_find_batch_size` then tries again on all of them."""
    for found in own_loops:
        assert found["out of memory"] == 3 * ["CUDA out of memory. (simulated)"]


def test_only_the_writer_holds_the_adapter(own_loops):
    first, second = own_loops
    assert first["kept"] == 2 * 2 * 14, "both halves of A and B"
    assert second["kept"] == 0


def test_sums_are_those_of_all_in_buckets(own_loops):
    first, second = (found["summed"] for found in own_loops)
    # float32, so buckets of 25 numbers: 12 + 5, 63, 1 + 1, 40, 4
    assert first["calls"] == second["calls"] == [17, 63, 2, 40, 4]
    assert first["bytes"] == second["bytes"] == 4 * 126
    for before, other, after, same in zip(
        first["before"], second["before"], first["after"], second["after"], strict=True
    ):
        assert torch.equal(after, before + other) and torch.equal(after, same), "to the bit"


def test_the_exact_gradient_of_a_sharded_model_warns_once(own_loops):
    first, second = (
        [text for text in found["warnings"] if "'exact' on a sharded model" in text] for found in own_loops
    )
    assert len(first) == 2 and not second, "ZeRO-3 and FSDP2, on rank 0"


def test_two_launchers_meet(base_model, references, tmp_path):
    """As on two machines: each launcher starts one of the two processes."""
    found = launch_on_two_machines("zero3_multinode", make_runs(base_model)[:1], tmp_path)["plain"]
    assert (found["launch"], found["communication"]) == (Launch("ZeRO-3", 2), "gloo")
    assert factor_error(found["adapter"], references["plain"]["adapter"]) < FACTOR_TOLERANCE
    assert found["losses"] == pytest.approx(references["plain"]["losses"], abs=LOSS_TOLERANCE)
