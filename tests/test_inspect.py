"""`lora-ga inspect` and `lora-ga compare`: what they show is what the run's files say."""

import base64
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import dense_reference
import numpy
import pytest
import torch
from launching import REPOSITORY, environment
from peft import get_peft_model
from tiny import lora_config, peft_pair, sft_arguments, tiny_batches, tiny_model, word_problems, word_tokenizer
from trl import SFTTrainer

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTConfig, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.checkpoint.state import read_state
from lora_ga_trainer.cli.__main__ import main
from lora_ga_trainer.inspection import figures
from lora_ga_trainer.inspection.comparison import compare, run_names
from lora_ga_trainer.inspection.layer_names import layer_grid
from lora_ga_trainer.inspection.run_page import draw, inspect, layer_table, read_snapshots
from lora_ga_trainer.inspection.runs import Log, read_log
from lora_ga_trainer.report import InitReport

PICTURES = ["alignment", "spectra", "gradient_norm", "norms", "loss"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def train(out, cls=LoRAGASFTTrainer, resume=None, **options):
    args = LoRAGASFTConfig(
        **sft_arguments(
            out, **{"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2} | options
        )
    )
    rows = word_problems()
    trainer = cls(
        tiny_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer(),
        peft_config=lora_config(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "with the offset"
    train(out, max_steps=6)
    return out


@pytest.fixture(scope="module")
def page(run, tmp_path_factory) -> Path:
    return inspect(run, tmp_path_factory.mktemp("page"))


# --- what is kept of the gradient -------------------------------------------------------------------------------------


def test_the_spectra_are_those_of_autograds_gradient():
    model, base = peft_pair()
    batches = tiny_batches()
    report = initialize_lora_ga(
        model, batches, LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact"), disable_tqdm=True
    )
    layers = model.lora_ga.weights
    for name, grad_OI in dense_reference.autograd_gradients(base, layers, batches).items():
        _, s, _ = dense_reference.singular_vectors(grad_OI)
        # float32 gradients of float32 models; the smallest of the 2r is a hundredth of the largest or more
        assert report.singular_values[name] == pytest.approx(s[:8].tolist(), rel=1e-3)
        assert report.gradient_norm[name] == pytest.approx(grad_OI.norm().item(), rel=1e-4)


def test_idle_layers_are_in_the_table():
    """After the others, without numbers."""
    report = InitReport({"a": 0.5}, 1, 0.1, None, [0], {"a": [2.0, 1.0]}, {"a": 3.0}, {"a": 1.0}, idle=["b"])
    table = layer_table(report)
    assert "<td>a</td><td class=number>0.5000</td>" in table and table.index("<td>a</td>") < table.index("<td>b</td>")
    assert "<td>b</td><td class=number>no gradient</td><td class=number>–</td>" in table


def test_a_file_without_spectra_loads_and_is_shown(run, tmp_path):
    """As written before they were kept."""
    shutil.copytree(run / "checkpoint-6", tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6/lora_ga.json"
    document = json.loads(path.read_text())
    del document["report"]["singular_values"], document["report"]["gradient_norm"]
    path.write_text(json.dumps(document))
    report = read_state(path.parent).report
    assert report.singular_values == {} and report.alignment == read_state(run / "checkpoint-6").report.alignment
    found = Found(inspect(path.parent, tmp_path / "page"))
    assert found.figures == ["alignment", "norms", "loss"]
    assert "did not keep the gradients' singular values" in found.text


# --- the page ---------------------------------------------------------------------------------------------------------


class Found(HTMLParser):
    """What a page holds."""

    def __init__(self, path: Path):
        super().__init__()
        self.figures, self.images, self.rows, self.text, self.links = [], {}, [], "", []
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "figure":
            self.figures.append(attributes["id"])
        if tag == "img":
            assert attributes["alt"]
            self.images[self.figures[-1]] = attributes["src"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False


def test_the_page_is_self_contained_and_complete(page):
    found = Found(page)
    assert found.figures == PICTURES
    for name, source in found.images.items():
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png.startswith(b"\x89PNG") and png == (page.parent / f"{name}.png").read_bytes()
    assert all(link.startswith("data:") for link in found.links), "nothing is fetched"
    assert "<script" not in page.read_text()


def test_the_numbers_are_those_of_lora_ga_json(run, page):
    report = json.loads((run / "checkpoint-6/lora_ga.json").read_text())["report"]
    rows = {row[0]: row[1:] for row in Found(page).rows if row}
    for name, value in report["alignment"].items():
        alignment, norm, largest, share = rows[name]
        assert alignment == f"{value:.4f}"
        assert float(norm) == pytest.approx(report["gradient_norm"][name], rel=1e-3)  # as rounded for reading
        assert float(largest) == pytest.approx(report["singular_values"][name][0], rel=1e-3)
        energy = sum(s**2 for s in report["singular_values"][name]) / report["gradient_norm"][name] ** 2
        assert float(share) == pytest.approx(energy, abs=1e-4)
    assert f"mean {sum(report['alignment'].values()) / 14:.3f}" in rows["alignment with the full gradient"][0]
    assert rows["layers"] == ["14"] and rows["launched as"] == ["1 process"]


def test_the_plots_show_the_reports_numbers(run):
    report = read_state(run / "checkpoint-6").report
    image = figures.heat_map(report.alignment, "", "").axes[0].images[0].get_array()
    grid = layer_grid(list(report.alignment))
    assert image.shape == (7, 2)
    for name, (kind, depth) in grid.places.items():
        assert image[grid.kinds.index(kind), depth] == report.alignment[name]
    panels = {axes.get_title(): axes for axes in figures.spectra(report.singular_values, report.gradient_norm).axes}
    for name, (kind, depth) in grid.places.items():
        drawn = panels[kind].lines[depth].get_ydata() * report.gradient_norm[name]
        assert numpy.allclose(drawn, report.singular_values[name])
    curve = read_log(run).curve("loss")
    (line,) = figures.loss_curve(curve, Log([]).curve("eval_loss")).axes[0].lines
    assert list(line.get_ydata()) == curve.values and list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
def test_the_norms_are_those_of_the_parameters(tmp_path, offset):
    trainer = train(tmp_path / "run", ga_offset=offset, max_steps=4)
    snapshots = read_snapshots(tmp_path / "run")
    assert list(snapshots) == [2, 4]
    layers = trainer.model.lora_ga.weights.values()
    expected = {
        "A0": [layer.A.frozen for layer in layers],
        "dA": [layer.A.trainable for layer in layers],
        "B0": [layer.B.frozen for layer in layers] if offset else [],
        "dB": [layer.B.trainable if offset else layer.B.weight for layer in layers],
    }
    found = snapshots[4].norms
    assert found.keys() == {part for part, values in expected.items() if values}
    for part, values in found.items():
        assert sorted(values) == pytest.approx(sorted(value.norm().item() for value in expected[part]), rel=1e-6)
    assert snapshots[2].norms["A0"] == found["A0"] and snapshots[2].norms["dA"] != found["dA"]
    assert Found(inspect(tmp_path / "run", tmp_path / "page")).figures == PICTURES


def test_a_checkpoint_is_shown_up_to_itself(run, tmp_path):
    assert list(read_snapshots(run / "checkpoint-4")) == [2, 4]
    assert read_log(run / "checkpoint-4").curve("loss").steps == [1, 2, 3, 4]
    main(["inspect", str(run / "checkpoint-4"), "--out", str(tmp_path)])
    assert (tmp_path / "index.html").is_file()


def test_an_adapter_of_ones_own_loop(tmp_path):
    """No trainer, no log, no checkpoint; and an adapter with a name, in a folder of its own."""
    model = get_peft_model(tiny_model(), lora_config(), adapter_name="mine")
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), disable_tqdm=True)
    model.save_pretrained(tmp_path / "own")
    found = Found(inspect(tmp_path / "own", tmp_path / "page"))
    assert found.figures == PICTURES[:-1] and "has no trainer_state.json" in found.text


def test_the_last_factors_are_at_the_last_step(tmp_path):
    """Of a run that kept no checkpoint; the page goes to the run's folder."""
    trainer = LoRAGASFTTrainer(
        tiny_model(), LoRAGASFTConfig(**sft_arguments(tmp_path, max_steps=3)), train_dataset=word_problems(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    assert list(read_snapshots(tmp_path)) == [3]
    main(["inspect", str(tmp_path)])
    assert Found(tmp_path / "index.html").figures == PICTURES


@pytest.mark.parametrize(("layers", "kinds"), [(32, 7), (2, 7), (1, 1), (80, 12)])
def test_models_of_every_size_are_drawn(layers, kinds, tmp_path):
    names = [f"model.layers.{layer}.kind_{kind}" for layer in range(layers) for kind in range(kinds)]
    report = InitReport(
        {name: 0.5 for name in names}, 1, 1.0, None, [0], {name: [2.0, 1.0] for name in names}, {name: 3.0 for name in names}
    )  # fmt: skip
    drawn = draw(report, {3: {"A0": [1.0], "dA": [0.0], "dB": [0.1]}}, Log([]), tmp_path)
    assert [picture.path.stem for picture in drawn] == PICTURES[:-1]


def test_layers_have_short_names_that_differ():
    stacks = {
        "encoder": ("0.SelfAttention.q", "1.DenseReluDense.wo"),
        "decoder": ("0.SelfAttention.q", "1.EncDecAttention.q"),
    }
    names = [
        f"base.{stack}.block.{i}.layer.{kind}" for stack, kinds in stacks.items() for i in (0, 1) for kind in kinds
    ]
    grid = layer_grid([*names, "base.score"])
    assert grid.kinds == [
        "encoder SelfAttention.q",
        "encoder wo",
        "decoder SelfAttention.q",
        "decoder EncDecAttention.q",
        "score",
    ]
    assert grid.depths == [0, 1, None] and grid.places["base.score"] == ("score", None)
    assert len(set(grid.places.values())) == len(names) + 1


# --- what cannot be shown ---------------------------------------------------------------------------------------------


def stop(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    return ending.value.code


def test_there_is_nothing_to_inspect(run, tmp_path):
    def said(path):
        return stop(["inspect", str(path), "--out", str(tmp_path / "page")])

    assert "error: There is no folder" in said(tmp_path / "nowhere")
    (tmp_path / "started").mkdir()
    assert "has no `checkpoint-N` and no adapter: the run has not started, or has not saved yet. Wait" in said(
        tmp_path / "started"
    )
    model = get_peft_model(tiny_model(), lora_config())
    model.save_pretrained(tmp_path / "foreign")
    assert "holds an adapter but no lora_ga.json, so it was not made by LoRA-GA" in said(tmp_path / "foreign")
    shutil.copytree(run / "checkpoint-2", tmp_path / "torn/checkpoint-2")
    (tmp_path / "torn/checkpoint-2/adapter_model.safetensors").write_bytes(b"torn")
    assert "has no readable checkpoint" in said(tmp_path / "torn") and not (tmp_path / "page").exists()


def test_a_half_written_checkpoint_is_passed_over(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoint-6/lora_ga.tensors").unlink()
    assert list(read_snapshots(tmp_path / "run")) == [2, 4]
    assert "Skipping a checkpoint" in caplog.text


def test_without_matplotlib_the_extra_is_named(run, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from lora_ga_trainer.cli.__main__ import main; "
        f"main(['compare', {str(run)!r}, '--out', {str(tmp_path)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Install the extra `plot`: pip install 'lora_ga_trainer[plot]'" in done.stderr
    assert "Traceback" not in done.stderr


# --- compare ----------------------------------------------------------------------------------------------------------


def test_runs_are_compared_plain_ones_too(run, tmp_path, capsys):
    plain = tmp_path / "plain"
    train(plain, SFTTrainer, max_steps=4)
    capsys.readouterr()
    main(["compare", str(run), str(plain), "--out", str(tmp_path)])
    header, _, *rows = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[:4])
    ours, theirs = (dict(zip(header, row, strict=False)) for row in rows)
    log = json.loads((run / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert ours["training loss"] == f"{[entry['loss'] for entry in log if 'loss' in entry][-1]:.4f}"
    assert ours["lowest"] == f"{min(entry['eval_loss'] for entry in log if 'eval_loss' in entry):.4f}"
    assert (ours["steps"], theirs["steps"]) == ("6", "4") and (tmp_path / "losses.png").is_file()
    assert read_log(plain).curve("loss").seconds is None, "a plain run's log has no clock, and none is made up"


def test_losses_are_drawn_over_steps_and_seconds(run):
    log = read_log(run)
    curves = log.curve("loss"), log.curve("eval_loss")
    figure = figures.compared_losses(
        {"a": curves, "b": (curves[0]._replace(seconds=None), curves[1]._replace(seconds=None))}
    )
    _, over_seconds, eval_steps, eval_seconds = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 2, 1]
    assert list(over_seconds.lines[0].get_xdata()) == curves[0].seconds
    assert list(eval_seconds.lines[0].get_ydata()) == curves[1].values
    assert eval_steps.get_xlabel() == "optimizer step" and eval_seconds.get_xlabel() == "seconds since training began"


def test_what_compare_refuses(run, tmp_path):
    with pytest.raises(ValueError, match="is given twice"):
        compare([run, run], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no trainer_state.json"):
        compare([run, tmp_path / "empty"], tmp_path)
    (tmp_path / "empty/trainer_state.json").write_text('{"log_history": [{"step": 0, "ga/seconds": 1.0}]}')
    with pytest.raises(ValueError, match="holds no loss yet"):
        compare([run, tmp_path / "empty"], tmp_path)
    (tmp_path / "empty/trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        compare([tmp_path / "empty"], tmp_path)


def test_runs_are_named_by_what_they_do_not_share(tmp_path):
    assert run_names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    assert run_names([tmp_path / "a", tmp_path / "a/checkpoint-3"]) == ["a", "checkpoint-3"]
    assert run_names([tmp_path / "a"]) == ["a"]


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_the_logs_clock_runs_on_after_resuming(run, tmp_path):
    seconds = read_log(run).curve("loss").seconds
    assert seconds == sorted(seconds) and seconds[0] > read_log(run).last("ga/init_seconds")
    resumed = train(tmp_path / "resumed", resume=str(run / "checkpoint-4"), max_steps=6)
    again = Log(resumed.state.log_history).curve("loss").seconds
    assert again[:4] == seconds[:4] and again == sorted(again) and len(again) == 6


def test_the_metrics_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path / "run", report_to="tensorboard", max_steps=2)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    recorded = EventAccumulator(str(events.parent))
    recorded.Reload()
    report = trainer.lora_ga_report
    assert {"ga/alignment_mean", "ga/alignment_min", "ga/init_seconds", "ga/init_bytes"} <= report.metrics().keys()
    for name, value in report.metrics().items():
        (event,) = recorded.Scalars(f"train/{name}")
        assert event.value == pytest.approx(value, rel=1e-6)  # kept in float32
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert report.metrics().items() <= state["log_history"][0].items()


@pytest.mark.parametrize("logging_on", [False, True])
def test_one_bar_and_one_block(logging_on, caplog, capsys):
    """The bar counts samples over all passes; the block comes once, whoever listens."""
    if logging_on:
        caplog.set_level("INFO", logger="lora_ga_trainer")
    model, _ = peft_pair()
    report = initialize_lora_ga(
        model, tiny_batches((3, 3, 2)), LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=10, ga_sketch_passes=2)
    )
    said = capsys.readouterr()
    last = said.err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("LoRA-GA gradient, pass 2 of 2: 100%") and " 16/16 [" in last and "samples/s" in last
    assert (said.out + caplog.text).count(report.summary()) == 1
    lines = report.summary().splitlines()
    assert [line.split()[0] for line in lines] == ["LoRA-GA", "time", "memory", "alignment", "scale"]
    assert report.alignment_min_layer in lines[-2]


def test_padding_free_batches_are_counted_in_samples():
    from lora_ga_trainer.gradient.objective import count_examples

    rows = torch.zeros(3, 5, dtype=torch.long)
    assert count_examples({"input_ids": rows, "labels": rows}) == 3
    flat = torch.zeros(1, 9, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    assert count_examples({"input_ids": flat, "labels": flat, "position_ids": positions}) == 3


# --- in a browser -----------------------------------------------------------------------------------------------------

MEASURE = """<script>addEventListener("load", () => {
  const seen = {client: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
                images: [...document.images].map(image => image.complete && image.naturalWidth > 0)};
  document.body.setAttribute("data-seen", JSON.stringify(seen)); })</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("opened", [False, True], ids=["closed", "layers opened"])
def test_a_browser_shows_it(page, tmp_path, opened):
    """At 1280 pixels: nothing in the console, every image there, nothing to scroll sideways."""
    text = page.read_text().replace("</body>", MEASURE)
    assert text.count("data-seen") == 1
    (tmp_path / "page.html").write_text(text.replace("<details>", "<details open>") if opened else text)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,2000",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert "CONSOLE" not in done.stderr, done.stderr

    class Body(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "body":
                self.seen = json.loads(dict(attrs)["data-seen"])

    body = Body()
    body.feed(done.stdout)
    assert body.seen["images"] == [True] * len(PICTURES)
    assert 1200 < body.seen["client"] <= 1280 and body.seen["scroll"] <= body.seen["client"]
