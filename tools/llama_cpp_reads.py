"""What llama.cpp computes with an adapter, or a merged model, beside what PEFT and transformers compute.

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36
    cmake -S vendor/llama.cpp -B build -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \\
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_COMMON=OFF
    cmake --build build --target llama                    # 20 minutes on one core
    pip install --no-deps sentencepiece diskcache         # which the converter and llama_cpp import

    python tools/llama_cpp_reads.py --llama_cpp llama_cpp_python-0.3.36 --base BASE out folded merged

BASE is the folder of the base model, the others are adapters' or merged models' folders.

Shapes: T tokens, V vocabulary.
"""

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "Q: A box holds 12 pens, and Anna buys 3 boxes. She gives 7 pens away. How many pens has she left?\nA:",
    "Q: A train covers 60 miles in an hour. How far does it get in two and a half hours?\nA:",
)


class Reading(NamedTuple):
    """What one reader makes of one prompt."""

    logits_TV: Tensor
    """float32, at every token of the prompt."""
    greedy: list[int]
    """The tokens that it goes on with."""


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def read_with_transformers(base: Path, folder: Path, prompts: list[list[int]], new_tokens: int) -> list[Reading]:
    """In float32, with PEFT for an adapter."""
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter(folder) else folder, dtype=torch.float32)
    reader = PeftModel.from_pretrained(model, folder) if is_adapter(folder) else model
    readings = []
    for ids in prompts:
        with torch.no_grad():
            logits_TV = reader.eval()(torch.tensor([ids])).logits[0]
            going_on = reader.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
            )
        readings.append(Reading(logits_TV, going_on[0, len(ids) :].tolist()))
    return readings


def convert(llama_cpp: Path, program: str, source: Path, out: Path, *options: str) -> Path:
    """Run a converter of llama.cpp.

    Raises:
        RuntimeError: it fails.
    """
    vendor = llama_cpp.resolve() / "vendor/llama.cpp"
    command = [sys.executable, str(vendor / program), str(source), "--outfile", str(out), "--outtype", "f32", *options]
    path = os.pathsep.join([str(vendor / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stderr[-2000:]}")
    return out


def convert_for(llama_cpp: Path, base: Path, folder: Path, work: Path) -> dict[str, str]:
    """The GGUF files of `folder` in `work`, as arguments of `llama_cpp.Llama`. That of the base is made once."""
    model = base if is_adapter(folder) else folder
    converted = work / f"{model.name}.gguf"
    if not converted.is_file():
        convert(llama_cpp, "convert_hf_to_gguf.py", model, converted)
    if not is_adapter(folder):
        return {"model_path": str(converted)}
    adapter = convert(
        llama_cpp, "convert_lora_to_gguf.py", folder, work / f"{folder.name}.lora.gguf", "--base", str(base)
    )
    return {"model_path": str(converted), "lora_path": str(adapter)}


def read_with_llama_cpp(
    llama_cpp: Path, files: dict[str, str], prompts: list[list[int]], new_tokens: int
) -> list[Reading]:
    os.environ["LLAMA_CPP_LIB_PATH"] = str(llama_cpp.resolve() / "build/bin")
    sys.path.insert(0, str(llama_cpp.resolve()))
    try:
        from llama_cpp import Llama
    finally:
        sys.path.pop(0)
    model = Llama(**files, logits_all=True, n_ctx=512, n_batch=512, n_threads=1, verbose=False)
    readings = []
    for ids in prompts:
        model.reset()
        model.eval(ids)
        logits_TV = torch.tensor(model.scores[: len(ids)])
        greedy = [int(logits_TV[-1].argmax())]
        while len(greedy) < new_tokens:
            model.eval(greedy[-1:])
            greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        readings.append(Reading(logits_TV, greedy))
    model.close()
    return readings


def rms(ours: list[Reading], theirs: list[Reading]) -> float:
    """The root mean square of the difference of the logits, over all prompts."""
    squares = [(one.logits_TV - other.logits_TV).square().flatten() for one, other in zip(ours, theirs, strict=True)]
    return torch.cat(squares).mean().sqrt().item()


def same_tokens(ours: list[Reading], theirs: list[Reading]) -> int:
    """How many tokens are the same before the first that is not, in the prompt where they are fewest."""
    pairs = [list(zip(one.greedy, other.greedy, strict=True)) for one, other in zip(ours, theirs, strict=True)]
    return min(next((n for n, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama_cpp", type=Path, required=True, help="the unpacked and built source distribution")
    parser.add_argument("--base", type=Path, required=True, help="folder of the untouched base model")
    parser.add_argument("folders", type=Path, nargs="+", help="adapters and merged models")
    parser.add_argument("--new_tokens", type=int, default=32)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    untouched = read_with_transformers(args.base, args.base, prompts, args.new_tokens)
    print(
        "| | moved by it | llama.cpp beside PEFT, rms of the logits | greedy tokens that are the same |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as work:
        for folder in (args.base, *args.folders):
            expected = read_with_transformers(args.base, folder, prompts, args.new_tokens)
            files = convert_for(args.llama_cpp, args.base, folder, Path(work))
            found = read_with_llama_cpp(args.llama_cpp, files, prompts, args.new_tokens)
            tokens = f"{same_tokens(found, expected)} of {args.new_tokens}"
            print(
                f"| {folder.name} | {rms(expected, untouched):.4f} | {rms(found, expected):.4f} | {tokens} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
