"""Run directories that are missing, broken, or somebody else's: one sentence each."""

import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file

from statetrack import mixer_config
from statetrack.config import TrainingConfig, run_config
from statetrack.pretrained import from_pretrained
from statetrack.records import record_of_run
from statetrack.report.record import group
from statetrack.report.tables import seconds
from statetrack.runs import RunDirectory, RunError, TrainingError
from statetrack.training import train


@pytest.fixture
def directory(tmp_path):
    training = TrainingConfig(steps=2, batch_size=2, max_length=4, log_every=1)
    config = run_config("parity", mixer_config("deltanet")(), {"d_model": 8, "num_layers": 1}, training)
    directory = RunDirectory(tmp_path / "run")
    train(config, directory)
    return directory


def edit_config(directory, **changes):
    data = json.loads(directory.config_file.read_text()) | changes
    directory.config_file.write_text(json.dumps(data))


def edit_weights(directory, edit):
    weights = load_file(directory.model_file)
    edit(weights)
    save_file(weights, directory.model_file)


def edit_model(directory, **changes):
    model = json.loads(directory.config_file.read_text())["model"] | changes
    edit_config(directory, model=model)


def cut_short(directory):
    content = directory.model_file.read_bytes()
    directory.model_file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.config_file.unlink(), "is not a run directory: it has no config.json"),
        (lambda d: d.config_file.write_text("{"), "is not valid JSON"),
        (lambda d: d.config_file.write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda d: d.config_file.write_text("[]"), "is not the config of a run"),
        (lambda d: edit_config(d, format=99), "has the run format 99"),
        (lambda d: edit_config(d, task="nothing"), "nothing"),
        (lambda d: edit_config(d, extra=1), "unknown key extra"),
        (lambda d: d.model_file.unlink(), "has no model"),
        (cut_short, "is damaged or cut short"),
        (lambda d: d.model_file.write_bytes(b""), "is damaged or cut short"),
        (lambda d: d.model_file.write_bytes(b"not tensors at all"), "is damaged or cut short"),
        (lambda d: edit_weights(d, lambda w: w.pop("norm.weight")), r"missing norm\.weight"),
        (lambda d: edit_weights(d, lambda w: w.update(more=torch.ones(1))), "extra more"),
        (
            lambda d: edit_weights(d, lambda w: w.update({"norm.weight": torch.ones(3)})),
            r"misshapen norm.weight \(3,\) instead of \(8,\)",
        ),
    ],
)
def test_a_broken_run_is_refused_in_one_sentence(directory, damage, message):
    damage(directory)
    with pytest.raises(RunError, match=message) as caught:
        directory.load_model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 10**6}, "misshapen .*1000000"),
        ({"num_layers": 10**9}, "num_layers must be at most 10,000, got 1,000,000,000"),
        ({"num_layers": 9999}, "asks for 9,999 layers, and there are [0-9]+ tensors"),
        ({"d_model": 2**30}, "misshapen|sizes that no memory holds"),
        ({"d_model": 10**26}, "d_model must be at most 2,147,483,647"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(directory, changes, message):
    edit_model(directory, **changes)
    for read in (directory.load_model, lambda: from_pretrained(directory.path)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=message):
            read()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB, of the terabytes claimed


def edit_state(directory, edit, **metadata):
    with safe_open(directory.state_file, framework="pt") as file:
        tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    edit(tensors)
    save_file(tensors, directory.state_file, {k: v for k, v in (facts | metadata).items() if v is not None})


@pytest.mark.parametrize(
    ("edit", "metadata", "message"),
    [
        (lambda t: t.pop("optimizer.norm.weight.step"), {}, r"missing norm\.weight\.step"),
        (
            lambda t: t.update({"optimizer.norm.weight.exp_avg": torch.ones(3)}),
            {},
            "misshapen norm.weight.exp_avg",
        ),
        (lambda t: t.update({"optimizer.nothing.step": torch.ones(())}), {}, r"extra nothing\.step"),
        (lambda t: t["optimizer.norm.weight.exp_avg"].fill_(float("nan")), {}, "not finite: norm.weight.exp_avg"),
        (lambda t: t.update({"model.norm.weight": torch.ones(8).bfloat16()}), {}, r"float32: model\.norm\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(8).int()}), {}, "not floating-point numbers: norm.weight"),
        (lambda t: t.pop("model.norm.weight"), {}, "missing norm.weight"),
        (lambda t: t.update(strange=torch.ones(1)), {}, "strange"),
        (lambda t: None, {"step": None}, "must say its step, from 0 to 2, and says ''"),
        (lambda t: None, {"step": "3"}, "from 0 to 2, and says '3'"),
        (lambda t: None, {"step": "one"}, "and says 'one'"),
        (lambda t: None, {"seconds": "nan"}, "must say its seconds of training, and says 'nan'"),
    ],
)
def test_a_broken_training_state_is_refused_in_one_sentence(directory, edit, metadata, message):
    edit_state(directory, edit, **metadata)
    with pytest.raises(RunError, match=message) as caught:
        train(directory.read_config(), directory)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_not_saved(directory):
    before = directory.state_file.read_bytes(), directory.model_file.read_bytes()
    model = directory.load_model()
    with torch.no_grad():
        model.get_parameter("norm.weight")[0] = float("nan")
    with pytest.raises(TrainingError, match=r"at step 2 weights are no longer finite: norm\.weight"):
        directory.save_checkpoint(model, {}, {"step": "2"})
    assert before == (directory.state_file.read_bytes(), directory.model_file.read_bytes())


def test_moments_that_no_run_goes_on_from_are_not_saved(directory):
    before = directory.state_file.read_bytes(), directory.model_file.read_bytes()
    moments = {"norm.weight.exp_avg_sq": torch.full((8,), float("inf"))}
    with pytest.raises(TrainingError, match=r"the optimizer's tensors are no longer finite: norm\.weight\.exp"):
        directory.save_checkpoint(directory.load_model(), moments, {"step": "2"})
    assert before == (directory.state_file.read_bytes(), directory.model_file.read_bytes())


def test_an_evaluation_is_of_the_weights_that_it_judged(directory):
    directory.write_evaluation({"accuracy": {"4": 1.0}})
    assert directory.read_evaluation() == {"accuracy": {"4": 1.0}, "step": 2}
    save_file(load_file(directory.model_file), directory.model_file, {"step": "3", "seconds": "1"})
    assert directory.read_evaluation() == {}
    assert record_of_run(directory).accuracy == {}


def test_a_record_has_the_chance_of_the_task_that_the_run_was_judged_on(directory):
    assert record_of_run(directory).chance == 0.5
    directory.write_evaluation({"accuracy": {"4": 1.0}, "task": "modular_addition:4", "chance": 0.25})
    assert record_of_run(directory).chance == 0.25


def test_weights_that_say_nothing_of_their_training_have_a_record(directory):
    save_file(load_file(directory.model_file), directory.model_file)
    record = record_of_run(directory)
    assert (record.train_seconds, record.train_device) == (None, None)
    assert seconds(group([record])[0]) == "–"


def test_a_missing_directory_is_said_to_be_missing(tmp_path):
    with pytest.raises(RunError, match="there is no run directory"):
        RunDirectory(tmp_path / "nowhere").read_config()


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path, directory):
    config = directory.read_config()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"has files in it but no config\.json"):
        RunDirectory(tmp_path / "other").create(config)
    with pytest.raises(RunError, match="is a file"):
        RunDirectory(tmp_path / "other" / "thesis.tex").create(config)


def test_the_directory_is_all_that_is_needed(directory):
    model = directory.load_model()
    assert not model.training
    assert model.config == directory.read_config().model
    assert {f.name for f in directory.path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "training_state.safetensors",
    }


def test_metrics_cut_short_lose_their_last_line_only(directory):
    whole = directory.read_metrics()
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 3, "lo')
    assert directory.read_metrics() == whole
    directory.truncate_metrics(1)
    assert directory.read_metrics() == whole[:1]


def test_weights_lost_between_the_two_files_of_a_checkpoint_are_written_again(directory):
    before = directory.model_file.read_bytes()
    directory.model_file.unlink()
    train(directory.read_config(), directory)
    assert load_file(directory.model_file).keys() == load_safetensors(before).keys()


def test_weights_without_their_training_state_are_not_trained_over(directory):
    directory.state_file.unlink()
    with pytest.raises(RunError, match="can be evaluated, not trained on"):
        train(directory.read_config(), directory)
    directory.load_model()
