"""Runs trained together are trained as they would be alone; steps in fixed memory, from graphs on a GPU, as others."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from turns import results_in_turn

from statetrack import LanguageModel, mixer_config, training_step
from statetrack.config import TrainingConfig, run_config
from statetrack.evaluation import evaluate
from statetrack.graphs import Lead
from statetrack.ops.vmapped import LinearLayersTogether
from statetrack.runs import RunDirectory
from statetrack.tasks import IGNORE, get_task
from statetrack.training import TrainingError, TrainingResult, train, train_together, training_steps
from statetrack.training_step import (
    TrainingStep,
    data_generator,
    draw_batch,
    make_optimizer,
    optimizers_together,
    padded_length,
)

MIXERS = ["deltanet", "gated_deltaproduct", "homogeneous_deltaproduct", "mamba", "mlstm", "rwkv7", "slstm", "attention"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(mixer="deltanet", task="parity", **training):
    options = {"steps": 20, "batch_size": 4, "max_length": 12, "log_every": 4, "checkpoint_every": 5, "z_loss": 0.1}
    own = TrainingConfig(**{**options, "learning_rate": 1e-2, **training})
    return run_config(task, mixer_config(mixer)(num_heads=2) if mixer != "mamba" else mixer_config(mixer)(), SIZES, own)


SIZES = {"d_model": 8, "num_layers": 2}


def seeds_of(config, seeds):
    return [replace(config, training=replace(config.training, seed=seed)) for seed in seeds]


def assert_alike(a, b, tolerance):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), name


def without_time(progress):
    return [progress.step, progress.loss, progress.accuracy, progress.learning_rate]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mixer", MIXERS)
def test_runs_trained_together_are_trained_as_they_would_be_alone(mixer):
    configs = seeds_of(make(mixer), [0, 1, 2])
    configs[2] = replace(configs[2], training=replace(configs[2].training, learning_rate=3e-3))
    seen = {0: [], 1: [], 2: []}
    together = train_together(configs, on_progress=lambda run, progress: seen[run].append(progress))
    for index, (config, result) in enumerate(zip(configs, together, strict=True)):
        alone = []
        expected = train(config, on_progress=alone.append)
        assert isinstance(result, TrainingResult)
        assert_alike(result.model, expected.model, 1e-9)
        assert [progress.step for progress in seen[index]] == [4, 5, 8, 10, 12, 15, 16, 20]
        for a, b in zip(seen[index], alone, strict=True):
            assert without_time(a) == pytest.approx(without_time(b), rel=1e-9)
            assert (a.together, b.together) == (3, 1)


@pytest.mark.usefixtures("double")
def test_answers_at_the_end_are_learned_from_whatever_the_length_of_the_others(tmp_path):
    configs = seeds_of(make(task="modular_arithmetic:3", last_label_only=True), [4, 5])
    directories = [RunDirectory(tmp_path / str(index)) for index in range(2)]
    train_together(configs, directories)
    for config, directory in zip(configs, directories, strict=True):
        assert_alike(directory.load_model(), train(config).model, 1e-9)
        assert [line["step"] for line in directory.read_metrics()] == [4, 5, 8, 10, 12, 15, 16, 20]


@pytest.mark.usefixtures("double")
def test_runs_trained_together_resume_bit_for_bit_also_from_different_steps(tmp_path):
    configs = seeds_of(make(), [0, 1])

    def directories(name):
        return [RunDirectory(tmp_path / name / str(index)) for index in range(2)]

    whole = train_together(configs, directories("whole"))
    calls = []
    stopped = train_together(configs, directories("stopped"), should_stop=lambda: len(calls) == 6 or calls.append(0))
    assert [result.step for result in stopped] == [7, 7]
    for a, b in zip(train_together(configs, directories("stopped")), whole, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))

    calls.clear()
    first, _ = ahead = directories("ahead")
    train(configs[0], first, should_stop=lambda: len(calls) == 2 or calls.append(0))
    for a, b in zip(train_together(configs, ahead), whole, strict=True):
        assert a.step == 20
        assert_alike(a.model, b.model, 1e-9)
    assert train_together(configs, ahead)[1].step == 20  # and a finished one stays as it is


@pytest.mark.usefixtures("double")
def test_a_run_that_breaks_down_does_so_alone():
    config = make(gradient_clip=0.0, warmup=0.0)
    configs = seeds_of(config, [0, 1])
    configs[0] = replace(configs[0], training=replace(configs[0].training, learning_rate=1e30))
    broken, sound = train_together(configs)
    assert isinstance(broken, TrainingError)
    assert "the loss became" in str(broken)
    assert isinstance(sound, TrainingResult)
    assert_alike(sound.model, train(configs[1]).model, 1e-9)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "at least one run"),
        ([make(), make(steps=21)], r"not in more \(training.steps is 20 there, not 21\)"),
        ([make(), make("mlstm")], "model.mixer is deltanet there, not mlstm"),
        (seeds_of(run_config("parity", mixer_config("lstm")(), SIZES, TrainingConfig()), [0, 1]), "runs of lstm"),
    ],
)
def test_runs_that_differ_otherwise_are_not_trained_together(configs, message):
    with pytest.raises(ValueError, match=message):
        train_together(configs)


def steps_of(config, seeds, *, fixed, device="cpu"):
    configs = seeds_of(config, seeds)
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(LanguageModel(config.model).to(device))
    optimizers = [make_optimizer(model, config.training) for model in models]
    return TrainingStep(configs, models, optimizers, fixed=fixed), models


def test_runs_of_one_learning_rate_have_one_optimizer_whose_state_each_of_theirs_shows():
    own = TrainingConfig(learning_rate=1e-2, weight_decay=0.3)
    options = [own, replace(own, learning_rate=3e-3), replace(own, seed=1)]
    models = [LanguageModel(make().model) for _ in options]
    optimizers = [make_optimizer(model, own) for model in models]
    (both, first), (other, second) = optimizers_together(optimizers, options)
    assert (first, second) == (options[0], options[1])
    assert other is optimizers[1]
    assert [group["weight_decay"] for group in both.param_groups] == [0.3, 0.0]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    both.step()
    for model, optimizer, count in zip(models, optimizers, (1, None, 1), strict=True):
        steps = [optimizer.state[p]["step"].item() if optimizer.state[p] else None for p in model.parameters()]
        assert steps == [count] * len(steps)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize("mixer", ["deltanet", "mamba"])
def test_steps_in_fixed_memory_are_the_same_steps(mixer, seeds):
    config = make(mixer)
    (fixed, fixed_models), (plain, models) = (steps_of(config, seeds, fixed=value) for value in (True, False))
    for step in range(12):
        for a, b in zip(fixed(step), plain(step), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=0)
    for a, b in zip(fixed_models, models, strict=True):
        assert_alike(a, b, 1e-6)


def test_the_lengths_of_a_step_are_the_same_whenever_they_are_asked_for():
    config = make()
    step, _ = steps_of(config, [0, 1], fixed=False)
    lengths = [step.lengths(number) for number in range(6)]
    assert [step.lengths(number) for number in (4, 5, 4, 3, 0)] == [lengths[number] for number in (4, 5, 4, 3, 0)]
    assert {length for both in lengths for length in both} <= set(range(3, 13))
    assert [first for first, _ in lengths] != [second for _, second in lengths]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_in_fixed_memory_lengths_double_as_they_do_otherwise(seeds):
    config = make(steps=9, min_length=3, max_length=11, curriculum=1.0, curriculum_shape="doubling")
    (fixed, fixed_models), (plain, models) = (steps_of(config, seeds, fixed=value) for value in (True, False))
    for step in range(9):
        assert fixed.lengths(step) == [(3, 6, 11)[step // 3]] * len(seeds)
        for a, b in zip(fixed(step), plain(step), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=0)
    for a, b in zip(fixed_models, models, strict=True):
        assert_alike(a, b, 1e-6)


@pytest.mark.gpu
def test_every_length_of_a_doubling_curriculum_has_a_graph():
    config = make(
        steps=32, learning_rate=1e-3, min_length=4, max_length=32, curriculum=1.0, curriculum_shape="doubling"
    )
    (captured, captured_models), (eager, models) = (
        steps_of(config, [0, 1], fixed=value, device="cuda") for value in (True, False)
    )
    with captured.context():
        for step in range(32):
            a, b = captured(step), eager(step)
            assert torch.allclose(a[0], b[0], rtol=2e-2, atol=2e-3), step
        assert sorted(captured._fixed._graphs._graphs) == [4, 8, 16, 32]
    for a, b in zip(captured_models, models, strict=True):
        assert_alike(a, b, 2e-2)


def test_batches_are_padded_to_few_lengths():
    assert [padded_length(length, 40) for length in (1, 4, 5, 33, 40)] == [4, 4, 8, 36, 40]
    assert padded_length(5, 6) == 6


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("most", [0, 1024])
def test_embeddings_of_many_tokens_and_of_few_are_the_same(most, monkeypatch):
    monkeypatch.setattr(training_step, "MOST_ONE_HOT", most)
    config = make(task="group:S3")
    (fixed, fixed_models), (plain, models) = (steps_of(config, [0, 1], fixed=value) for value in (True, False))
    for step in range(3):
        fixed(step)
        plain(step)
    assert_alike(fixed_models[1], models[1], 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "task",
    ["parity", "modular_arithmetic:5", "modular_arithmetic_brackets:5", "group:S3", "flip_flop", "bounded_dyck:2,3"],
)
def test_the_batches_of_graphs_are_those_of_the_generators(task):
    config = make(task=task, steps=120, max_length=12)
    step, _ = steps_of(config, [0, 1], fixed=True, device="cuda")
    with step.context():
        for number in range(120):
            step(number)
            for run, (own, length) in enumerate(zip(seeds_of(config, [0, 1]), step.lengths(number), strict=True)):
                generator = data_generator(own.training, number, torch.device("cuda"))
                ids, labels = draw_batch(get_task(task), own.training, length, generator)
                batch = step._fixed._batch[:, run]
                assert torch.equal(batch[0, :, :length], ids)
                assert torch.equal(batch[1, :, :length], labels)
                assert (batch[1, :, length:] == IGNORE).all()


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("mixer", [*MIXERS, "gla", "mamba2", "kda"])
def test_captured_steps_are_the_eager_ones(mixer, seeds):
    """So many steps that several lengths are captured and replayed."""
    config = make(mixer, steps=40, learning_rate=1e-3)
    (captured, captured_models), (eager, models) = (
        steps_of(config, seeds, fixed=value, device="cuda") for value in (True, False)
    )
    with captured.context():
        for step in range(40):
            a, b = captured(step), eager(step)
            # Padding and the order of sums differ, which AdamW's division makes more of; 40 steps stay close.
            assert torch.allclose(a[0], b[0], rtol=2e-2, atol=2e-3), step
        assert len(captured._fixed._graphs._graphs) >= 2
        assert not captured._fixed._graphs._waiting
    for a, b in zip(captured_models, models, strict=True):
        assert_alike(a, b, 2e-2)


@pytest.mark.gpu
def test_runs_trained_together_on_a_gpu_stop_and_go_on(tmp_path):
    configs = seeds_of(make(steps=60), [0, 1])
    directories = [RunDirectory(tmp_path / str(index)) for index in range(2)]
    calls = []
    train_together(configs, directories, device="cuda", should_stop=lambda: len(calls) == 30 or calls.append(0))
    results = train_together(configs, directories, device="cuda")
    whole = train_together(configs, device="cuda")
    for result, other, directory in zip(results, whole, directories, strict=True):
        assert result.step == 60
        assert_alike(result.model, other.model, 2e-2)
        assert_alike(result.model.cpu(), directory.load_model(), 0)
        accuracy = evaluate(result.model.to("cuda"), get_task("parity"), [20], sequences=64, device="cuda")
        assert 0 <= accuracy[0].accuracy <= 1


def test_every_step_in_fixed_memory_is_one_that_the_host_may_be_ahead_by(monkeypatch):
    counted = []
    monkeypatch.setattr(Lead, "step", lambda lead: counted.append(lead))
    step, _ = steps_of(make(), [0, 1], fixed=True)
    for number in range(3):
        step(number)
    assert counted == [step._fixed._lead] * 3


@pytest.mark.gpu
def test_the_host_is_a_few_steps_ahead_of_a_slow_gpu_and_no_more():
    step, _ = steps_of(make(steps=100, min_length=12), [0, 1], fixed=True, device="cuda")
    launched = []
    for number in range(100):
        with step.turn():
            torch.cuda._sleep(20_000_000)  # 10 milliseconds, far longer than launching a step takes
            step(number)
            launched.append(torch.cuda.Event())
            launched[-1].record()
        assert sum(not event.query() for event in launched) <= 2 * Lead.STEPS, number
    assert not launched[-1].query()  # the GPU has something to do while the host launches


@pytest.mark.gpu
def test_steps_in_turn_on_a_gpu_are_those_of_runs_alone():
    """Each model has a stream and graphs of its own, and some are captured while others compute."""
    groups = [seeds_of(make(mixer, steps=60, learning_rate=1e-3), [0, 1]) for mixer in ("deltanet", "mlstm", "mamba")]
    results = results_in_turn(training_steps(group, device="cuda") for group in groups)
    for together, group in zip(results, groups, strict=True):
        for result, alone in zip(together, train_together(group, device="cuda"), strict=True):
            assert_alike(result.model, alone.model, 1e-6)


def test_linear_layers_of_replicas_have_the_gradients_of_vmap():
    draws = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, generator=draws) for s in ((3, 6, 8, 5), (3, 7, 5), (3, 7))]

    def results(mode):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with mode:
            y = torch.func.vmap(lambda x, weight, bias: F.linear(x, weight, bias).tanh())(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for ours, theirs in zip(results(LinearLayersTogether()), results(contextlib.nullcontext()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
