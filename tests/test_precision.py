"""Training in bfloat16 and TF32: what stays float32, several runs as one, going on, devices that can't; it learns."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from statetrack import LanguageModel, mixer_config
from statetrack.config import RunConfig, TrainingConfig, from_data, run_config, to_data
from statetrack.evaluation import evaluate
from statetrack.precision import check_device, products
from statetrack.runs import RunDirectory, RunError
from statetrack.tasks import get_task
from statetrack.training import train, train_together
from statetrack.training_step import TrainingStep, make_optimizer


def make(mixer="deltanet", task="parity", precision="bfloat16", sizes=None, **training):
    options: dict[str, Any] = {"steps": 20, "batch_size": 4, "min_length": 12, "max_length": 12, "z_loss": 0.1}
    options |= {"precision": precision, **training}
    mixer = mixer_config(mixer)() if mixer == "mamba" else mixer_config(mixer)(num_heads=2, eigenvalue_range=(-1, 1))
    sizes = sizes or {"d_model": 16, "num_layers": 2}
    return run_config(task, mixer, sizes, TrainingConfig(**options))


def with_seed(config, seed):
    return replace(config, training=replace(config.training, seed=seed))


def gradients(config, seeds, *, fixed=False, device="cpu", one_by_one=False):
    """Those of each run at the first step; weights rounded by autocast itself if `one_by_one`."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(LanguageModel(config.model).to(device))
    optimizers = [make_optimizer(model, config.training) for model in models]
    step = TrainingStep([with_seed(config, seed) for seed in seeds], models, optimizers, fixed=fixed)
    if one_by_one:
        step._replicas._linear = None
    with step.context():
        step(0)
    return [{name: p.grad.clone() for name, p in model.named_parameters()} for model in models]


def distance(a, b):
    """The norm of the difference of two gradients over that of the second."""
    error, size = (sum(float(x.square().sum()) for x in xs) for xs in ([a[n] - b[n] for n in b], b.values()))
    return (error / size) ** 0.5


@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltaproduct", "mamba", "mlstm", "rwkv7"])
def test_gradients_of_runs_trained_together_in_bfloat16_are_those_of_each_alone(mixer):
    config = make(mixer)
    plain = replace(config, training=replace(config.training, precision="float32"))
    for seed, together in enumerate(gradients(config, [0, 1, 2])):
        (alone,), (exact,) = gradients(config, [seed]), gradients(plain, [seed])
        # Sums over tokens are cut in other parts: a few roundings of 2^-9.
        assert distance(together, alone) < 5e-3
        assert 1e-4 < distance(alone, exact) < 0.15
        assert all(gradient.dtype == torch.float32 for gradient in together.values())


@pytest.mark.parametrize("mixer", ["deltanet", "kda", "mamba", "mlstm", "rwkv7", "gla"])
def test_weights_rounded_together_are_those_that_autocast_rounds(mixer):
    config = make(mixer, sizes={"d_model": 16, "num_layers": 1, "mlp_ratio": 2.0})
    (together,), (one_by_one,) = (gradients(config, [0], one_by_one=value) for value in (False, True))
    assert all(torch.equal(together[name], one_by_one[name]) for name in one_by_one)


def test_steps_in_fixed_memory_have_the_same_gradients_in_bfloat16():
    for seeds in ([3], [3, 4]):
        fixed, plain = (gradients(make(), seeds, fixed=value) for value in (True, False))
        for a, b in zip(fixed, plain, strict=True):
            assert distance(a, b) < 1e-5


def test_weights_and_states_stay_float32_and_products_do_not():
    config = make()
    seen = {}

    def watch(module, inputs, outputs):
        seen[module] = inputs[0].dtype, outputs.dtype

    models = [LanguageModel(config.model)]
    optimizers = [make_optimizer(models[0], config.training)]
    block = models[0].blocks[1]
    for module in (block.mixer.q_proj, block.mixer.o_proj, models[0].embedding):
        module.register_forward_hook(watch)
    streams = []
    block.register_forward_hook(lambda module, inputs, outputs: streams.append((outputs[0].dtype, outputs[1])))
    loss, _ = TrainingStep([config], models, optimizers, fixed=False)(0)
    assert seen[block.mixer.q_proj] == (torch.bfloat16, torch.bfloat16)
    assert seen[block.mixer.o_proj][1] == torch.bfloat16
    assert seen[models[0].embedding][1] == torch.float32
    ((stream, state),) = streams
    assert (stream, state["recurrence"].dtype, loss.dtype) == (torch.float32, torch.float32, torch.float32)
    kept = [*models[0].parameters(), *(x for values in optimizers[0].state.values() for x in values.values())]
    assert all(x.dtype == torch.float32 for x in kept)


def test_a_run_in_bfloat16_goes_on_bit_for_bit_and_in_no_other_precision(tmp_path):
    config = make(checkpoint_every=5)
    whole = train(config).model
    calls = []
    directory = RunDirectory(tmp_path / "run")
    assert train(config, directory, should_stop=lambda: len(calls) == 6 or calls.append(0)).step == 7
    with pytest.raises(RunError, match=r"training.precision is bfloat16 there, not float32"):
        train(replace(config, training=replace(config.training, precision="float32")), directory)
    resumed = train(config, directory).model
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_configs_from_before_precisions_are_float32():
    config = make(precision="float32")
    data = to_data(config)
    assert data["training"].pop("precision") == "float32"
    assert from_data(RunConfig, data) == config


def test_parity_is_learned_in_bfloat16_and_judged_in_float32():
    config = make(
        sizes={"d_model": 16, "num_layers": 1}, steps=120, batch_size=32, learning_rate=1e-2, min_length=3, z_loss=0.0
    )
    # Of two seeds, as one of them may be an unlucky one.
    results = train_together([with_seed(config, seed) for seed in (0, 1)])
    judged = [evaluate(result.model, get_task("parity"), [12], sequences=256)[0].accuracy for result in results]
    assert max(judged) > 0.95  # where a guess is right in half of the cases
    assert all(p.dtype == torch.float32 for p in results[0].model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_precisions_that_a_device_lacks_are_refused(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match="precision = tf32 needs an NVIDIA GPU, and this is training on cpu"):
        train(make(precision="tf32"), directory)
    assert not directory.path.exists()
    with pytest.raises(ValueError, match="precision = bfloat16 needs autocast, which PyTorch lacks on meta"):
        check_device("bfloat16", torch.device("meta"))
    with pytest.raises(ValueError, match="precision must be float32, tf32 or bfloat16, got 'half'"):
        TrainingConfig(precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("legacy", [None, "high", "highest"])
def test_the_setting_of_the_process_is_as_before(legacy):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        own = settings.fp32_precision
        with products("tf32"):
            assert settings.fp32_precision == "tf32"
        assert settings.fp32_precision == own
        with contextlib.suppress(KeyError), products("tf32"):
            raise KeyError
        assert settings.fp32_precision == own
        if legacy is not None:
            assert torch.get_float32_matmul_precision() == legacy
        with products("bfloat16"):
            assert settings.fp32_precision == own
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        settings.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 3e-2), ("tf32", 3e-3)])
@pytest.mark.parametrize("mixer", ["deltanet", "gated_deltaproduct", "mamba", "mlstm"])
def test_captured_steps_in_a_precision_are_the_eager_ones(mixer, precision, tolerance, seeds):
    config = make(mixer, precision=precision, steps=30, min_length=3, learning_rate=1e-3)
    losses = {}
    for fixed in (True, False):
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(LanguageModel(config.model).to("cuda"))
        optimizers = [make_optimizer(model, config.training) for model in models]
        configs = [with_seed(config, seed) for seed in seeds]
        step = TrainingStep(configs, models, optimizers, fixed=fixed)
        with step.context():
            losses[fixed] = torch.stack([step(number)[0].clone() for number in range(30)])
        if fixed:
            assert step._fixed._graphs._graphs
            assert not step._fixed._graphs._waiting
    torch.testing.assert_close(losses[True], losses[False], rtol=tolerance, atol=tolerance)
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_gradients_on_a_gpu_are_near_those_in_float32(precision):
    config = make(precision=precision, sizes={"d_model": 64, "num_layers": 2}, batch_size=32)
    plain = replace(config, training=replace(config.training, precision="float32"))
    found, exact = gradients(config, [0, 1], device="cuda"), gradients(plain, [0, 1], device="cuda")
    for a, b in zip(found, exact, strict=True):
        assert 1e-6 < distance(a, b) < (0.15 if precision == "bfloat16" else 0.02)
