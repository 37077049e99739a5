"""Training: it learns, it resumes bit for bit, and it survives being killed."""

import itertools
import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from forked import FORKED
from turns import results_in_turn

from statetrack import LanguageModel, mixer_config, seeds, training
from statetrack.config import TrainingConfig, run_config
from statetrack.evaluation import evaluate
from statetrack.runs import RunDirectory, RunError
from statetrack.tasks import IGNORE, get_task
from statetrack.training import SharedTime, TrainingError, train, training_steps
from statetrack.training_step import (
    data_generator,
    draw_batch,
    draw_length,
    fitting_lengths,
    learning_rate_at,
    longest_length,
    loss_and_accuracy,
    make_optimizer,
)


def make(mixer="deltanet", **training):
    options = {
        "steps": 12,
        "batch_size": 8,
        "max_length": 12,
        "log_every": 2,
        "checkpoint_every": 5,
        "learning_rate": 1e-2,
    }
    config = mixer_config(mixer)(conv_size=2)
    return run_config("parity", config, {"d_model": 8, "num_layers": 1}, TrainingConfig(**{**options, **training}))


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(metrics):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in metrics]


def test_training_learns_and_is_reproducible():
    config = make(steps=60)
    losses = []
    first = train(config, on_progress=lambda progress: losses.append(progress.loss))
    assert losses[-1] < losses[0]
    assert weights_equal(first.model, train(config).model)
    assert not weights_equal(first.model, train(replace(config, training=replace(config.training, seed=1))).model)


DOUBLING = {"curriculum": 1.0, "curriculum_shape": "doubling", "curriculum_learning_rate_power": 0.5}


@pytest.mark.parametrize(("mixer", "options"), [("deltanet", {}), ("mamba", {}), ("deltanet", DOUBLING)])
@pytest.mark.parametrize("stop", [1, 5, 7, 11])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(tmp_path, mixer, options, stop):
    config = make(mixer, **options)
    whole = train(config, RunDirectory(tmp_path / "whole"))
    directory, seen = RunDirectory(tmp_path / "stopped"), []

    def should_stop():
        seen.append(None)
        return len(seen) == stop

    assert train(config, directory, should_stop=should_stop).step == stop
    resumed = train(config, directory)
    assert resumed.step == config.training.steps
    assert weights_equal(whole.model, resumed.model)
    assert without_time(directory.read_metrics()) == without_time(RunDirectory(tmp_path / "whole").read_metrics())
    for file in ("model.safetensors", "config.json"):
        a, b = ((tmp_path / run / file).read_bytes() for run in ("whole", "stopped"))
        assert a == b or file == "model.safetensors"
    assert weights_equal(directory.load_model(), whole.model)


def test_a_finished_run_is_not_trained_again(tmp_path):
    config, directory = make(), RunDirectory(tmp_path / "run")
    train(config, directory)
    before = directory.state_file.read_bytes()
    steps = []
    result = train(config, directory, on_progress=lambda progress: steps.append(progress.step))
    assert (result.step, steps) == (12, [])
    assert directory.state_file.read_bytes() == before


def train_in_one_thread(config, path, ready):
    torch.set_num_threads(1)
    ready.set()
    train(config, RunDirectory(path))


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """kill -9 at random moments until the run is through; the end is that of a run that nobody disturbed."""
    config = make(steps=200, checkpoint_every=3)
    directory, kills = RunDirectory(tmp_path / "killed"), 0
    for delay in (0.05, 0.2, 0.35, None):
        ready = FORKED.Event()
        process = FORKED.Process(target=train_in_one_thread, args=(config, directory.path, ready), daemon=True)
        process.start()
        assert ready.wait(60)
        if delay is not None:
            time.sleep(delay)
            process.kill()
        process.join(120)
        assert process.exitcode in ((0,) if delay is None else (0, -signal.SIGKILL))
        kills += process.exitcode != 0
        if directory.model_file.exists():
            directory.load_model()  # whatever happened, what is there can be used
    assert kills >= 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(make(steps=200))
    finally:
        torch.set_num_threads(threads)
    assert weights_equal(directory.load_model(), whole.model)
    steps = [line["step"] for line in directory.read_metrics()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 200


def test_another_run_is_not_overwritten(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    train(make(), directory)
    with pytest.raises(RunError, match=r"holds another run \(training.steps is 12 there, not 13\)"):
        train(make(steps=13), directory)
    with pytest.raises(RunError, match=r"model.mixer is deltanet there, not mamba"):
        train(make("mamba"), directory)


def test_a_loss_that_is_not_finite_ends_training_with_advice():
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step .* learning rate below 1e\+30"):
        train(make(learning_rate=1e30, gradient_clip=0.0, warmup=0.0, steps=50))


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    config, directory = make(), RunDirectory(tmp_path / "run")
    seen = []
    train(config, directory, should_stop=lambda: len(seen) == 5 or seen.append(None) is not None)
    before = directory.state_file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(config, directory)
    assert directory.state_file.read_bytes() == before
    assert not list(directory.path.glob("*.tmp"))
    assert train(config, directory).step == 12


def test_metrics_have_what_a_plot_needs(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    train(make(), directory)
    lines = [json.loads(line) for line in directory.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 12]
    assert all(line.keys() >= {"loss", "accuracy", "learning_rate", "tokens_per_second", "seconds"} for line in lines)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_learning_rate_rises_stays_and_falls(shape):
    options = TrainingConfig(steps=100, warmup=0.1, decay=0.5, decay_shape=shape, learning_rate=2.0)
    rates = [learning_rate_at(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:50] == [2.0] * 40
    assert rates[75] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[51:]))
    assert 0 < rates[-1] < 0.05
    constant = TrainingConfig(steps=10, warmup=0, decay=0, learning_rate=3.0)
    assert {learning_rate_at(step, constant) for step in range(10)} == {3.0}


def test_weight_decay_leaves_out_vectors_embeddings_and_what_decides_on_eigenvalues():
    model = LanguageModel(replace(make().model, mixer=mixer_config("gated_deltanet")(num_heads=2)))
    decayed, kept = (
        {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}
        for group in make_optimizer(model, TrainingConfig(weight_decay=0.5)).param_groups
    )
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert not decayed & kept
    assert {"embedding.weight", "norm.weight", "blocks.0.mixer.b_proj.weight", "blocks.0.mixer.A_log"} <= kept
    assert {"head.weight", "blocks.0.mixer.k_proj.weight", "blocks.0.mixer.o_proj.weight"} <= decayed


def test_the_z_loss_adds_the_mean_square_of_the_log_partition_function():
    model = LanguageModel(make().model)
    ids = torch.randint(2, (3, 5))
    labels = torch.randint(2, (3, 5))
    labels[:, 0] = IGNORE
    plain, accuracy = loss_and_accuracy(model, ids, labels, 0.0)
    penalized, _ = loss_and_accuracy(model, ids, labels, 0.5)
    logits, asked = model(ids)[:, 1:], labels[:, 1:]
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked.flatten())
    assert plain.item() == pytest.approx(cross_entropy.item())
    assert (penalized - plain).item() == pytest.approx(0.5 * logits.logsumexp(-1).square().mean().item(), rel=1e-4)
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == asked).double().mean().item())


@pytest.mark.parametrize(("task", "lengths"), [("modular_arithmetic:3", {4, 6, 8}), ("parity", {3, 4, 5, 6, 7, 8})])
def test_training_draws_the_lengths_that_a_task_has(task, lengths):
    options = TrainingConfig(min_length=3, max_length=8)
    assert set(fitting_lengths(get_task(task), options)) == lengths
    with pytest.raises(ValueError, match="modular_arithmetic:3 has no sequences of 3 to 3 tokens"):
        fitting_lengths(get_task("modular_arithmetic:3"), TrainingConfig(min_length=3, max_length=3))


def test_in_a_curriculum_long_sequences_come_later():
    options = TrainingConfig(steps=100, min_length=4, max_length=12, curriculum=0.5)
    fitting = fitting_lengths(get_task("modular_arithmetic:3"), options)
    steps = (0, 25, 49, 50, 99)
    drawn = [draw_length(replace(options, seed=seed), fitting, step) for seed in range(60) for step in steps]
    assert [set(drawn[i::5]) for i in range(5)] == [{4}, {4, 6, 8}, {4, 6, 8, 10}, *[{4, 6, 8, 10, 12}] * 2]
    # Bounds that no sequence has leave the shortest that there is.
    odd = replace(options, min_length=3)
    assert draw_length(odd, fitting_lengths(get_task("modular_arithmetic:3"), odd), 0) == 4


def drawn_at_every_step(options, task="parity"):
    fitting = fitting_lengths(get_task(task), options)
    return [draw_length(options, fitting, step) for step in range(options.steps)]


@pytest.mark.parametrize(
    ("curriculum", "min_length", "max_length", "task", "expected"),
    [
        (1.0, 4, 32, "parity", [4] * 4 + [8] * 4 + [16] * 4 + [32] * 4),
        (0.5, 4, 32, "parity", [4] * 2 + [8] * 2 + [16] * 2 + [32] * 10),
        (0.75, 3, 10, "parity", [3] * 4 + [6] * 4 + [10] * 8),  # the last stage is shorter than twice the one before
        (1.0, 7, 7, "parity", [7] * 16),
        (1.0, 5, 20, "modular_arithmetic:3", [6] * 6 + [10] * 5 + [20] * 5),  # sequences of even lengths alone
        (1.0, 3, 14, "modular_arithmetic:3", [4] * 4 + [6] * 4 + [12] * 4 + [14] * 4),
    ],
)
def test_lengths_double_stage_by_stage(curriculum, min_length, max_length, task, expected):
    options = TrainingConfig(
        steps=16, min_length=min_length, max_length=max_length, curriculum=curriculum, curriculum_shape="doubling"
    )
    assert drawn_at_every_step(options, task) == expected
    assert drawn_at_every_step(replace(options, seed=1), task) == expected


def test_the_longest_length_grows_along_a_line_or_doubles():
    linear = TrainingConfig(steps=8, min_length=8, max_length=40, curriculum=1.0)
    doubling = replace(linear, curriculum_shape="doubling")
    assert [longest_length(step, linear) for step in range(8)] == [8, 12, 16, 20, 24, 28, 32, 36]
    assert [longest_length(step, doubling) for step in range(8)] == [8, 8, 16, 16, 32, 32, 40, 40]
    assert {longest_length(step, TrainingConfig(steps=8)) for step in range(8)} == {40}
    assert all(a <= b for a, b in zip(drawn_at_every_step(linear), [8, 12, 16, 20, 24, 28, 32, 36], strict=True))
    # Steps of data that is drawn ahead, for a step that is never taken, have lengths as well.
    assert (longest_length(8, linear), longest_length(8, doubling)) == (40, 40)


def test_the_learning_rate_may_fall_with_the_length():
    constant = {"steps": 6, "warmup": 0, "decay": 0, "learning_rate": 2.0, "min_length": 4, "max_length": 16}
    options = TrainingConfig(
        **constant, curriculum=1.0, curriculum_shape="doubling", curriculum_learning_rate_power=0.5
    )
    assert [learning_rate_at(step, options) for step in range(6)] == pytest.approx([2.0, 2.0, 2**0.5, 2**0.5, 1.0, 1.0])
    linear = replace(options, curriculum_shape="linear", curriculum_learning_rate_power=1.0)
    assert [learning_rate_at(step, linear) for step in range(6)] == pytest.approx(
        [2 * 4 / longest for longest in (4, 6, 8, 10, 12, 14)]
    )
    falling = replace(options, warmup=0.5, decay=0.5, decay_shape="linear")
    without = replace(falling, curriculum_learning_rate_power=0.0)
    ratios = [learning_rate_at(step, falling) / learning_rate_at(step, without) for step in range(6)]
    assert ratios == pytest.approx([1, 1, 0.5**0.5, 0.5**0.5, 0.5, 0.5])


def test_runs_from_before_the_shape_of_a_curriculum_go_on(tmp_path):
    config, directory = make(curriculum=0.5), RunDirectory(tmp_path / "run")
    whole = train(config)
    train(config, directory, should_stop=lambda: True)
    file = directory.path / "config.json"
    data = json.loads(file.read_text())
    for name in ("curriculum_shape", "curriculum_learning_rate_power"):
        del data["training"][name]
    file.write_text(json.dumps(data))
    assert directory.read_config().training.curriculum_shape == "linear"
    result = train(config, directory)
    assert result.step == config.training.steps
    assert weights_equal(result.model, whole.model)


def test_parts_may_be_learned_from_as_well():
    options = TrainingConfig(steps=1, batch_size=4, min_length=8, max_length=8, part_labels=True)
    config = run_config("modular_arithmetic:3", mixer_config("deltanet")(), {"d_model": 8, "num_layers": 1}, options)
    losses = []
    train(config, on_progress=lambda progress: losses.append(progress.loss))
    torch.manual_seed(seeds.number("initial weights", options.seed))
    model, task = LanguageModel(config.model), get_task(config.task)
    batch = draw_batch(task.with_parts(), options, 8, data_generator(options, 0, torch.device("cpu")))
    assert (batch.labels != IGNORE).sum() == 4 * 5
    assert losses == pytest.approx([loss_and_accuracy(model, *batch, 0.0)[0].item()])


def test_the_last_label_alone_may_be_learned_from():
    task, options = get_task("parity"), TrainingConfig(min_length=5, max_length=9, batch_size=6)
    cpu = torch.device("cpu")
    all_ids, all_labels = draw_batch(task, options, 9, data_generator(options, 3, cpu))
    ids, labels = draw_batch(task, replace(options, last_label_only=True), 9, data_generator(options, 3, cpu))
    assert torch.equal(ids, all_ids)
    assert torch.equal(labels[:, -1], all_labels[:, -1])
    assert (labels[:, :-1] == IGNORE).all()


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["deltanet", "mamba"])
def test_training_and_evaluation_on_a_gpu(tmp_path, mixer):
    directory = RunDirectory(tmp_path / "run")
    train(make(mixer), directory, device="cuda", should_stop=lambda: True)
    result = train(make(mixer), directory, device="cuda")
    assert result.step == 12
    task = get_task("parity")
    on_gpu = evaluate(result.model, task, [20], sequences=64, device="cuda")
    on_cpu = evaluate(directory.load_model(), task, [20], sequences=64)
    assert 0 <= on_gpu[0].accuracy <= 1
    assert 0 <= on_cpu[0].accuracy <= 1
    assert weights_equal(result.model.cpu(), directory.load_model())


@pytest.mark.parametrize(("backend", "message"), [("fast", "unknown backend 'fast'"), ("triton", "can't serve")])
def test_a_backend_that_can_not_compute_the_model_leaves_no_directory(backend, message, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    mixer = mixer_config("deltanet")(backend=backend)
    config = run_config("parity", mixer, {"d_model": 8, "num_layers": 1}, TrainingConfig(steps=1, batch_size=2))
    with pytest.raises(ValueError, match=message):
        train(config, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"log_every": "3"}, "log_every must be an integer, got '3'"),
        ({"steps": 10**26}, r"steps must be below 2\^63"),
        ({"max_length": 10**12}, "would have 64,000,000,000,000 tokens, more than 2,147,483,647"),
        ({"learning_rate": "fast"}, "learning_rate must be a number"),
    ],
)
def test_values_of_no_type_or_size_of_training_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_a_clock_in_common_gives_everybody_a_share(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds
        return shared()

    shared = SharedTime()
    with shared.in_use():
        start = shared()
        assert passes(6) - start == 6
        with shared.in_use():
            assert shared.users == 2
            assert passes(6) - start == 9
            with shared.stopped():
                assert passes(50) - start == 9
            with shared.in_use():
                now[0] += 6
        assert passes(1) - start == 12
    assert shared.users == 0


def test_steps_in_turn_are_those_of_runs_alone_and_share_the_time(monkeypatch):
    configs = [make(seed=seed, steps=steps, log_every=4, checkpoint_every=8) for seed, steps in ((0, 4), (1, 8))]
    shared, seen, slow = SharedTime(), [], LanguageModel.__init__
    began = time.perf_counter()

    def init(*args):
        time.sleep(0.5)  # which is nobody's time of training
        slow(*args)

    monkeypatch.setattr(LanguageModel, "__init__", init)
    results = results_in_turn(
        training_steps([config], shared=shared, on_progress=lambda _, progress: seen.append(progress))
        for config in configs
    )
    elapsed = time.perf_counter() - began
    assert [(progress.step, progress.together) for progress in seen] == [(4, 2), (4, 2), (8, 1)]
    for (result,), config in zip(results, configs, strict=True):
        alone = train(config)
        assert result.step == config.training.steps
        assert 0 < result.seconds < elapsed
        for a, b in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert sum(result.seconds for (result,) in results) <= elapsed - 1
