"""An adapter's file in other forms: the scaling in B, and the best approximation at another rank."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCABULARY, lora_config, moved_at_random, tiny_batches, tiny_model, word_problems, word_tokenizer
from transformers import AutoModelForCausalLM

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.checkpoint.scaling import scaling_of
from lora_ga_trainer.checkpoint.truncation import truncate
from lora_ga_trainer.cli.__main__ import main

INPUTS = tiny_batches(seed=9)[0]["input_ids"]
PREFIX = "base_model.model."
ROUNDING = 2**-22
"""Of the norm of a matrix: float32 rounds each entry of A and of B once, by at most 2⁻²⁴, and s·B once more."""


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def save_adapter(folder: Path, family="llama", offset=True, **lora) -> None:
    """A base in `folder/base` and a LoRA-GA adapter, about as large as its weights, in `folder/adapter`."""
    base = tiny_model(family)
    base.save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora_config(**lora))
    config = LoRAGAArguments(ga_learning_rate=1e-3, ga_offset=offset)
    initialize_lora_ga(model, tiny_batches(), config, disable_tqdm=True)
    moved_at_random(model)
    model.save_pretrained(folder / "adapter")
    word_tokenizer().save_pretrained(folder / "adapter")


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """ΔW = s·BA of every module, as a dense product in float64."""
    config, tensors = LoraConfig.from_pretrained(adapter), load_file(adapter / "adapter_model.safetensors")
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        module: scaling_of(config, module.removeprefix(PREFIX))
        * (tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double())
        for module in modules
    }


def with_peft(folder: Path, adapter: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter)


BOTH_FORMS = pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
KINDS = pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": False, "r": 6}),
        ("llama", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 40, "layers.0.self_attn.k_proj": 9}}),
        ("llama", {"r": 32}),  # with the offset 64, above the small side of most weights, 48 or 24
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {}),  # Conv1D: I×O
        ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    ],
    ids=["rslora", "α/r", "patterns", "thin", "modules_to_save", "conv1d", "lora_bias"],
)

# --- the equation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 30, 8), (30, 40, 8), (12, 40, 16), (40, 12, 16), (6, 5, 9)])
@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_no_product_of_that_rank_is_nearer(shape, rank):
    out_features, in_features, inner = shape
    torch.manual_seed(0)
    b_OK, a_KI = torch.randn(out_features, inner), torch.randn(inner, in_features)
    found = truncate(b_OK, a_KI, rank)
    assert found.b_OR.shape == (out_features, rank) and found.a_RI.shape == (rank, in_features)
    assert found.b_OR.dtype == found.a_RI.dtype == torch.float32
    u, s, vh = torch.linalg.svd(b_OK.double() @ a_KI.double())
    best = u[:, : min(rank, len(s))] * s[:rank] @ vh[: min(rank, len(s))]
    assert (found.b_OR.double() @ found.a_RI.double() - best).norm() < ROUNDING * best.norm()
    # float64, and singular values of order 10; those past the inner rank are zero in the dense matrix only
    assert torch.allclose(found.singular_values, s[: len(found.singular_values)], atol=1e-12)
    assert s[len(found.singular_values) :].norm() < 1e-12


def test_nothing_is_lost_where_there_is_nothing_more():
    torch.manual_seed(0)
    b_OK, a_KI = torch.randn(20, 2), torch.randn(2, 30)
    found = truncate(b_OK, a_KI, 5)
    assert (found.b_OR @ found.a_RI - b_OK @ a_KI).norm() < ROUNDING * (b_OK @ a_KI).norm() * 2  # products in float32
    assert not found.b_OR[:, 2:].any() and not found.a_RI[2:].any() and len(found.singular_values) == 2
    nothing = truncate(torch.zeros(20, 4), torch.randn(4, 30), 2)
    assert not nothing.b_OR.any() and nothing.a_RI.isfinite().all(), "a layer that did not train"


# --- files ------------------------------------------------------------------------------------------------------------


@KINDS
@BOTH_FORMS
def test_the_folded_scaling(family, lora, offset, tmp_path):
    save_adapter(tmp_path, family, offset, **lora)
    export(tmp_path / "adapter", tmp_path / "folded", fold_scale=True)
    config = json.loads((tmp_path / "folded/adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False) and type(config["lora_alpha"]) is int
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "folded/adapter_model.safetensors")
    assert {len(value) for name, value in tensors.items() if ".lora_A." in name} == {config["r"]}, "one rank for all"
    ours, theirs = deltas(tmp_path / "folded"), deltas(tmp_path / "adapter")
    assert all((ours[name] - theirs[name]).norm() < ROUNDING * theirs[name].norm() for name in theirs)
    expected = logits(with_peft(tmp_path, tmp_path / "adapter"))
    # float32, the same products with the scaling at another place; logits of order 10
    assert (logits(with_peft(tmp_path, tmp_path / "folded")) - expected).abs().max() < 1e-4 * expected.abs().max()


@KINDS
@BOTH_FORMS
@pytest.mark.parametrize("fold_scale", [False, True], ids=["", "folded"])
def test_every_layer_is_the_best_at_that_rank(family, lora, offset, fold_scale, tmp_path):
    save_adapter(tmp_path, family, offset, **lora)
    rank = 3
    lost = export(tmp_path / "adapter", tmp_path / "small", rank=rank, fold_scale=fold_scale)
    ours, theirs = deltas(tmp_path / "small"), deltas(tmp_path / "adapter")
    assert lost.keys() == ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        assert (ours[name] - best).norm() < ROUNDING * best.norm(), name
        assert lost[name].norm == pytest.approx(delta.norm().item(), rel=1e-9)
        # relative to what there is, since nothing is lost where the rank in the file is smaller
        assert lost[name].error == pytest.approx(s[rank:].norm().item(), abs=1e-9 * delta.norm().item())
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["r"] == rank and not config["rank_pattern"] and not config["use_rslora"]
    assert not fold_scale or (config["lora_alpha"], config["alpha_pattern"]) == (rank, {})
    with_peft(tmp_path, tmp_path / "small")  # stock PEFT takes it


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_smaller_rank_is_merged(family, tmp_path):
    save_adapter(tmp_path, family)
    for fold_scale in (False, True):
        out = tmp_path / f"merged{fold_scale}"
        export(tmp_path / "adapter", out, merge=True, base_model=tmp_path / "base", rank=2, fold_scale=fold_scale)
        export(tmp_path / "adapter", tmp_path / f"small{fold_scale}", rank=2, fold_scale=fold_scale)
        expected = logits(with_peft(tmp_path, tmp_path / f"small{fold_scale}"))
        merged = logits(AutoModelForCausalLM.from_pretrained(out))
        assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()  # float32: W + ΔW is rounded once more
        whole = logits(with_peft(tmp_path, tmp_path / "adapter"))
        assert (merged - whole).abs().max() > 0.05 * whole.abs().max(), "something is lost"


def test_a_file_with_rslora_is_exported_in_the_plain_form(tmp_path):
    """Such as 0.1.0 saved, and PEFT does."""
    model = get_peft_model(tiny_model(), lora_config(rank_pattern={"k_proj": 2}, init_lora_weights=False))
    tiny_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "plain")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 32, False)
    assert config["rank_pattern"] == {"k_proj": 2} and config["alpha_pattern"] == {"k_proj": 16 / math.sqrt(2) * 2}
    assert torch.equal(
        logits(with_peft(tmp_path, tmp_path / "plain")), logits(with_peft(tmp_path, tmp_path / "adapter"))
    )


def test_what_has_no_rank_to_cut_is_refused(tmp_path):
    save_adapter(tmp_path, r=2)

    def refused(message, adapter=tmp_path / "adapter", **how):
        with pytest.raises(ValueError, match=message):
            export(adapter, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()

    for rank in (0, 4, 9):
        refused(
            rf"`rank` is {rank}, but the adapter's file has rank 4, so only a whole number from 1 to 3 makes it.*leave out",
            rank=rank,
        )
    kinds = {
        "embedding": LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False),
        "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    }
    messages = {
        "embedding": "embed_tokens.lora_embedding_A is not that of a linear layer.*Export the adapter alone",
        "dora": "`use_dora` is True: DoRA trains.*cannot be given another rank or another scaling",
    }
    for name, config in kinds.items():
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / name)
        refused(messages[name], tmp_path / name, rank=1)
        refused(messages[name], tmp_path / name, fold_scale=True)


# --- what it loses, on data -------------------------------------------------------------------------------------------


def by_hand(model, rows, tokenizer):
    """(the logits that predict the completions, N×V; their mean loss), one row at a time."""
    found, losses = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            predicted = model.eval()(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        found.append(predicted)
        losses.append(torch.nn.functional.cross_entropy(predicted, torch.tensor(ids[len(prompt) :]), reduction="none"))
    return torch.cat(found), torch.cat(losses).mean().item()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_the_table_says_what_is_lost_on_data(merge, tmp_path, capsys):
    save_adapter(tmp_path)
    rows = word_problems()
    rows.to_json(tmp_path / "rows.jsonl")
    words = ["--checkpoint_dir", tmp_path / "adapter", "--out", tmp_path / "out", "--rank", 3, "--num_samples", 10]
    words += ["--dataset_path", tmp_path / "rows.jsonl", "--base_model", tmp_path / "base", "--batch_size", 4]
    main(["export", *map(str, words), *(["--merge"] if merge else [])])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    said = dict(line.removeprefix("| ").removesuffix(" |").split(" | ", 1) for line in printed)

    tokenizer, rows = word_tokenizer(), list(rows)[:10]
    exported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out") if merge else with_peft(tmp_path, tmp_path / "out")
    )
    models = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        with_peft(tmp_path, tmp_path / "adapter"),
        exported,
    )
    (base, trained, small), losses = zip(*(by_hand(model, rows, tokenizer) for model in models), strict=True)
    assert base.shape[1] == VOCABULARY
    moved, error = ((one - other).square().mean().sqrt().item() for one, other in ((trained, base), (small, trained)))
    # printed with four digits; float32 sums in other batches differ in the sixth
    numbers = [float(number) for number in said[f"loss on {len(base)} tokens"].split() if number[0].isdigit()]
    assert numbers == pytest.approx(losses, abs=1e-4)
    numbers = [float(number) for number in said["rms of the logits"].split() if number[0].isdigit()]
    assert numbers == pytest.approx((moved, error), abs=1e-4)
    whole = deltas(tmp_path / "adapter")
    tail = {name: torch.linalg.svdvals(delta)[3:].norm().item() for name, delta in whole.items()}
    together = math.hypot(*tail.values()) / math.hypot(*(delta.norm().item() for delta in whole.values()))
    assert said[f"of ‖ΔW‖, {len(whole)} layers together"] == f"{together:.2%}"
    worst = max(tail, key=lambda name: tail[name] / whole[name].norm())
    assert said["in the worst"].partition(", ")[0].endswith(worst.removeprefix(PREFIX))


def test_without_a_rank_only_the_data_are_in_the_table(tmp_path, capsys):
    save_adapter(tmp_path)
    word_problems().to_json(tmp_path / "rows.jsonl")
    words = ["--checkpoint_dir", tmp_path / "adapter", "--out", tmp_path / "out", "--fold_scale", "--num_samples", 4]
    main(
        [
            "export",
            *map(str, words),
            "--dataset_path",
            str(tmp_path / "rows.jsonl"),
            "--base_model",
            str(tmp_path / "base"),
        ]
    )
    said = capsys.readouterr().out
    # float32: s·B is rounded once more, of logits of order 1
    assert "‖ΔW‖" not in said and "moved by training, 0.0000 by the export" in said
    assert "holds the adapter" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_path", "none.jsonl"], "There is no file none.jsonl"),
        (["--dataset_path", "a.jsonl", "--dataset_name", "b"], "at most one of them"),
        (["--num_samples", "0"], "`num_samples` is 0, but must be at least 1"),
        (["--rank", "8"], "`rank` is 8, but the adapter's file has rank 8"),
    ],
)
def test_mistakes_on_the_command_line(words, message, tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(SystemExit) as ending:
        main(["export", "--checkpoint_dir", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), *words])
    assert message in str(ending.value) and not (tmp_path / "out").exists()
