"""Files of a stranger: no program in them is run, and no name in them leads out of their folder."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from metamath import RECIPE
from methods.table import MethodConfig
from mistakes import World, finish_a_run, rewrite
from peft import PeftModel, get_peft_model
from tiny import lora_config, tiny_model, word_tokenizer

from lora_ga_trainer.checkpoint import export

ROOT = Path(__file__).resolve().parents[1]


def model_args(base: Path) -> MethodConfig:
    return MethodConfig(model_name_or_path=str(base), dtype="float32")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    finish_a_run(folder / "finished")
    return folder


class Program:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_the_program_would_run(tmp_path):
    pickle.loads(pickle.dumps(Program(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


# --- pickles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_torch_saves", [True, False], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_program_in_a_checkpoint_is_run(file, as_torch_saves, shared, tmp_path):
    """Those files are read by transformers, as tensors and numbers only."""
    world, program = World(tmp_path, shared), {"state": Program(tmp_path / "marker")}
    checkpoint = world.saved() / "checkpoint-4"
    if as_torch_saves:
        torch.save(program, checkpoint / file)
    else:
        (checkpoint / file).write_bytes(pickle.dumps(program))
    rewrite(checkpoint, file, (checkpoint / file).read_bytes())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        world.resume(checkpoint, max_steps=6)
    assert not (tmp_path / "marker").exists()


def test_the_arguments_of_the_run_are_never_read(shared, tmp_path):
    """`training_args.bin` is a pickle that cannot be read as anything less."""
    world = World(tmp_path, shared)
    checkpoint = world.saved() / "checkpoint-4"
    rewrite(checkpoint, "training_args.bin", pickle.dumps(Program(tmp_path / "marker")))
    world.resume(checkpoint, max_steps=6)
    assert world.trainers[0].state.global_step == 6
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_no_program_in_an_evaluated_model_is_run(where, shared, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    shutil.copytree(shared / "finished/checkpoint-4", adapter)
    folder, name = (adapter, "adapter_model") if where == "adapter" else (base, "model")
    (folder / f"{name}.safetensors").unlink()
    name = "adapter_model.bin" if where == "adapter" else "pytorch_model.bin"
    torch.save({"weight": Program(tmp_path / "marker")}, folder / name)
    with pytest.raises(Exception, match="Weights only load failed|Unsupported"):
        PeftModel.from_pretrained(RECIPE.base_model(model_args(base)), adapter)
    with pytest.raises(ValueError, match=r"has no (adapter_model\.safetensors|\.safetensors file)"):
        export(adapter, tmp_path / "out", merge=True, base_model=base)
    assert not (tmp_path / "marker").exists()


def test_the_package_unpickles_nothing_and_trusts_no_code():
    """Neither by itself; and what asks transformers for a stranger's code is left to its user's own option."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "lora_ga_trainer").rglob("*.py")}
    sources |= {path: path.read_text(encoding="utf-8") for path in (ROOT / "recipes").rglob("*.py")}
    assert len(sources) > 40
    unpickles = re.compile(
        r"torch\.load\(|pickle\.loads?\(|\bjoblib\b|\bdill\b|weights_only=False|\beval\(|(?<!def )\bexec\("
    )
    for path, source in sources.items():
        found = unpickles.findall(re.sub(r"\.eval\(\)", "", source))
        # the sandbox's own process runs generated programs, behind its filter
        assert not found or path.name == "sandbox.py", (path, found)
        assert "trust_remote_code=True" not in source and '"trust_remote_code": True' not in source, path
    for path in (*(ROOT / "recipes/configs").glob("*.yaml"), *(ROOT / "benchmarks").rglob("*.yaml")):
        assert not re.search(r"trust_remote_code: *[tT]rue", path.read_text(encoding="utf-8")), path


# --- a stranger's code ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model_with_code(tmp_path) -> Path:
    """A model whose classes come with it, in a file that makes tmp_path/marker when it is imported."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "code.OurConfig", "AutoModelForCausalLM": "code.OurModel"}
    config |= {"model_type": "ours", "architectures": ["OurModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'marker')!r}).touch()\n"
        "from transformers import LlamaConfig as OurConfig, LlamaForCausalLM as OurModel\n"
    )
    return folder


@pytest.mark.parametrize("how", ["train", "evaluate", "merge"])
def test_code_that_comes_with_a_model_is_not_run(how, model_with_code, shared, tmp_path):
    adapter, world = shared / "finished/checkpoint-4", World(tmp_path, shared)
    act = {
        "train": lambda: world.trainer(model=str(model_with_code)),
        "evaluate": lambda: RECIPE.base_model(model_args(model_with_code)),
        "merge": lambda: export(adapter, tmp_path / "out", merge=True, base_model=model_with_code),
    }[how]
    with pytest.raises(ValueError, match="trust_remote_code"):
        act()
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pipeline", "os", "no_such_thing", "Trainer"])
def test_an_architecture_is_a_model_and_nothing_else(name, shared, tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(ValueError, match=f"names the architecture '{name}', which is not a transformers model"):
        export(shared / "finished/checkpoint-4", tmp_path / "out", merge=True, base_model=base)
    assert not (tmp_path / "out").exists()


# --- names that lead elsewhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "../../secret", "deep/../../secret", "/etc/hostname"])
def test_a_list_of_files_names_nothing_outside(name, shared, tmp_path):
    """Its size must not be told, whether it is there or not, and whatever it is."""
    world = World(tmp_path, shared)
    checkpoint = world.saved() / "checkpoint-4"
    (world.saved() / "secret").write_text("secret")
    sizes = json.loads((checkpoint / "lora_ga_files.json").read_text())
    for size in (0, 6, 10**9):
        (checkpoint / "lora_ga_files.json").write_text(json.dumps({name: size} | sizes))
        with pytest.raises(ValueError, match="not in the checkpoint's folder.*Do not trust"):
            world.resume(checkpoint)


@pytest.mark.parametrize("content", [[1, 2], {"optimizer.pt": {}}, "text"])
def test_a_list_of_files_of_another_form_is_refused(content, shared, tmp_path):
    world = World(tmp_path, shared)
    checkpoint = world.saved() / "checkpoint-4"
    (checkpoint / "lora_ga_files.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lora_ga_files.json"):
        world.resume(checkpoint)


def test_the_adapters_name_in_a_file_leads_nowhere(shared, tmp_path):
    """What is read and written goes by the name that the user gave."""
    world = World(tmp_path, shared)
    checkpoint = world.saved() / "checkpoint-4"
    document = json.loads((checkpoint / "lora_ga.json").read_text())
    rewrite(checkpoint, "lora_ga.json", json.dumps(document | {"adapter_name": "../../elsewhere"}))
    world.resume(checkpoint, max_steps=6)
    assert world.trainers[0].model.lora_ga.name == "default"
    assert (world.out / "checkpoint-6/adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob("elsewhere*"))
    # nor can the user's own: torch has no such names for modules
    with pytest.raises(KeyError, match="module name can"):
        get_peft_model(tiny_model(), lora_config(), adapter_name="../elsewhere")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/tmp/secret.safetensors", "model-00009-of-00009.safetensors"]
)
def test_an_index_of_weights_names_nothing_outside(name, shared, tmp_path):
    """transformers would follow it; and what it names would stay unmerged."""
    base = tmp_path / "base"
    tiny_model().save_pretrained(base, max_shard_size="100KB")
    index = base / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is not among the .safetensors files of its folder"):
        export(shared / "finished/checkpoint-4", tmp_path / "out", merge=True, base_model=base)
    assert not (tmp_path / "out").exists()
