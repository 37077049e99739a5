"""The loop in one process: what it computes, that it goes on exactly, and what it leaves out."""

import json
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import FORKED, run_ranks
from metrics_of_runs import losses
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import statetrack
from statetrack import LanguageModel, cross_entropy, layers, mixer_configs, seeds
from statetrack.data import DataError, PackedBatches, PackedTokens
from statetrack.files import file_hash
from statetrack.pretraining import loop, parallel
from statetrack.pretraining.checkpoints import CheckpointError, Checkpoints, _Writer
from statetrack.pretraining.config import config_of
from statetrack.pretraining.guard import StepGuard, guarded_step
from statetrack.pretraining.held_out import batch_loss
from statetrack.pretraining.loop import pretrain
from statetrack.pretraining.optimizers import learning_rate_factor
from statetrack.pretraining.parallel import ParallelModel
from statetrack.pretraining.processes import processes
from statetrack.pretraining.run import PretrainRun
from statetrack.runs import RunError
from statetrack.training import TrainingError


def train(tables, out, stop_after=None, **options):
    steps = []
    with processes("cpu") as own:
        return pretrain(
            config_of(tables, 257),
            PretrainRun(out),
            own,
            on_progress=lambda progress: steps.append(progress.step),
            should_stop=lambda: stop_after is not None and len(steps) >= stop_after,
            **options,
        )


@pytest.fixture(scope="module")
def undisturbed(tables_of_all, tmp_path_factory):
    """The directory of a run that came to its end at once, and its result; nobody writes there."""
    place = tmp_path_factory.mktemp("undisturbed") / "run"
    return place, train(tables_of_all, place)


@pytest.fixture(scope="module")
def _stopped(tables_of_all, tmp_path_factory):
    place = tmp_path_factory.mktemp("stopped") / "run"
    train(tables_of_all, place, stop_after=3)
    return place


@pytest.fixture
def stopped(_stopped, tmp_path):
    """The directory of a run that was stopped after 3 of its 6 steps, with checkpoints of steps 2 and 3."""
    return Path(shutil.copytree(_stopped, tmp_path / "stopped"))


def test_the_loop_computes_what_a_plain_loop_of_pytorch_does(config, undisturbed, text_data):
    torch.manual_seed(int(seeds.generator("initial weights", 0).initial_seed()))
    model = LanguageModel(config.model)
    mixers = [block.mixer for block in model.blocks]
    kept = {id(p) for mixer in mixers for p in mixer.eigenvalue_parameters()} | {id(model.embedding.weight)}
    kept |= {id(p) for p in model.parameters() if p.ndim < 2}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if id(p) in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    batches = iter(PackedBatches(PackedTokens(text_data), sequence_length=24, batch_size=4))
    expected = {}
    for step in range(6):
        batch = next(batches)
        loss = F.cross_entropy(model(batch.ids, batch.cu_seqlens)[0], batch.labels[0])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * learning_rate_factor(step, 6, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        expected[step + 1] = loss.item(), norm.item()
    found = losses(undisturbed[0])
    assert found.keys() == expected.keys()
    for step, pair in expected.items():
        assert found[step] == pytest.approx(pair, rel=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_goes_on_exactly(cut, tables, undisturbed, tmp_path):
    place, whole = undisturbed
    part = train(tables, tmp_path / "part", stop_after=cut)
    assert (whole.step, part.step) == (6, cut)
    assert not part.held_out
    rest = train(tables, tmp_path / "part")
    assert losses(tmp_path / "part") == losses(place)
    assert rest.held_out == whole.held_out
    assert set(whole.held_out) == {"code", "prose"}
    first, second = (statetrack.from_pretrained(run).state_dict() for run in (place, tmp_path / "part"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 1},
        {"parallelism": "fsdp"},
        {"parallelism": "fsdp", "micro_batch_size": 1, "reduce_every_micro_batch": True},
        {"parallelism": "fsdp", "evaluate_every": 1},  # which leaves weights gathered
        {"parallelism": "fsdp", "reshard_after_forward": True, "micro_batch_size": 2, "activation_checkpointing": 1},
        {"parallelism": "ddp", "micro_batch_size": 2},
        {"num_workers": 1},
    ],
)
@pytest.mark.thin(2)
def test_how_it_is_computed_changes_nothing_but_rounding(changes, tables, undisturbed, tmp_path):
    tables["execution"] |= changes
    train(tables, tmp_path / "other")
    plain, other = losses(undisturbed[0]), losses(tmp_path / "other")
    assert all(other[step] == pytest.approx(plain[step], rel=1e-4) for step in plain)


def test_a_run_from_before_a_field_of_the_config_goes_on(tables, undisturbed, stopped):
    run, whole = PretrainRun(stopped), undisturbed[1]
    for file in (run.config_file, run.checkpoints.path(3) / "progress.json"):
        data = json.loads(file.read_text())
        assert data["pretraining"]["model"].pop("initializer_range", 0) is None
        file.write_text(json.dumps(data))
    resumed = train(tables, stopped)
    assert (resumed.step, resumed.held_out) == (whole.step, whole.held_out)


def test_a_run_goes_on_with_another_execution_but_not_another_model(tables, stopped):
    tables["execution"] |= {"parallelism": "fsdp", "micro_batch_size": 1}
    other = json.loads(json.dumps(tables))
    other["model"]["mixer"]["eigenvalue_range"] = [0, 1]
    sentence = (
        r"model.mixer.eigenvalue_range is -1,1 there, not 0,1\); .* go on with the config .*pretrain --out .*stopped$"
    )
    with pytest.raises(RunError, match=sentence):
        train(other, stopped)
    train(tables, stopped)
    assert sorted(losses(stopped)) == [1, 2, 3, 4, 5, 6]


class _Dtypes:
    """Sees, in the middle of a forward pass, in which dtypes the parameters that decide on eigenvalues are there."""

    def __init__(self, model):
        self.model, self.of_eigenvalues = model, set()

    def __call__(self, module, inputs):
        found = [p for block in self.model.blocks for p in block.mixer.eigenvalue_parameters()]
        self.of_eigenvalues |= {p.dtype for p in found}


@contextmanager
def _spread(tables, text_data, **execution):
    """The same model each time, spread over this process alone, in bf16; and a batch."""
    config = config_of({**tables, "execution": execution}, 257)
    torch.manual_seed(0)
    with processes("cpu") as own:
        spread = ParallelModel(LanguageModel(config.model), own, config.execution, "bfloat16")
        yield spread, next(iter(PackedBatches(PackedTokens(text_data), sequence_length=24, batch_size=2)))


def _sharded_and_not(tables, text_data):
    """Logits and the gradient's norm of the same model, not sharded and sharded, in bf16."""
    for parallelism in ("none", "fsdp"):
        with _spread(tables, text_data, parallelism=parallelism) as (spread, batch):
            dtypes = _Dtypes(spread.model)
            spread.model.norm.register_forward_pre_hook(dtypes)
            logits = spread(batch.ids, batch.cu_seqlens)
            logits.float().square().mean().backward()
            norm = spread.clip_gradients(0)
            assert logits.dtype == torch.bfloat16
            assert dtypes.of_eigenvalues <= {torch.float32}
            trained = [p for p in spread.parameters.values() if p.grad is not None]
            assert {p.dtype for p in trained} | {p.grad.dtype for p in trained} == {torch.float32}
            yield logits.detach().float(), norm.detach()


@pytest.mark.parametrize("reshard", [False, True])
def test_gathered_weights_stay_until_the_backward_unless_they_are_to_go(reshard, tables, text_data, monkeypatch):
    monkeypatch.setattr(parallel, "_SMALL", 1)
    with _spread(tables, text_data, parallelism="fsdp", reshard_after_forward=reshard) as (spread, batch):

        def parts():
            return {name for name, p in spread.model.named_parameters() if isinstance(p, DTensor)}

        products = {name for name in spread.parameters if name.startswith("blocks") and "_proj" in name}
        products -= {name for name in products if name.endswith(("b_proj.weight", "a_proj.weight"))}
        assert parts() == set(spread.parameters)
        loss = spread(batch.ids, batch.cu_seqlens).float().square().mean()
        assert parts() == (products if reshard else set())  # embeddings and the like are wanted at once
        loss.backward()
        assert parts() == set(spread.parameters)


@pytest.mark.parametrize("every", [False, True])
def test_accumulated_gradients_are_whole_until_they_are_reduced(every, tables, text_data):
    with _spread(tables, text_data, parallelism="fsdp", reduce_every_micro_batch=every) as (spread, batch):
        for last in (False, False, True):
            with spread.accumulating(last):
                spread(batch.ids, batch.cu_seqlens).float().square().mean().backward()
            reduced = {p.grad is not None for p in spread.parameters.values()}
            assert reduced == {every or last}


@pytest.mark.parametrize("gathered", ["by layers", "by blocks"])
@pytest.mark.parametrize("name", sorted(mixer_configs()))
def test_every_mixer_computes_the_same_when_it_is_sharded_in_bf16(name, gathered, tables, text_data, monkeypatch):
    """Gathered weights of linear layers are bf16, everything else float32: the numbers of autocast."""
    monkeypatch.setattr(parallel, "_SMALL", {"by layers": -1, "by blocks": 1}[gathered])
    options = {"name": name, **({"num_heads": 2} if hasattr(mixer_configs()[name](), "num_heads") else {})}
    tables["model"]["mixer"] = options
    (whole, norm), (sharded, norm_of_parts) = _sharded_and_not(tables, text_data)
    torch.testing.assert_close(sharded, whole, rtol=0, atol=0)
    torch.testing.assert_close(norm_of_parts, norm, rtol=1e-2, atol=0)


def test_layers_of_one_input_are_one_product_in_sharded_blocks_too(tables, text_data, monkeypatch):
    joined = []  # the widths of products, of weights in float32 and of those that are gathered in bf16

    def seen(function, in_forward):
        apply = function.apply
        monkeypatch.setattr(function, "apply", lambda *args: (in_forward() and joined.append(args[1])) or apply(*args))

    seen(layers._Join, torch.is_grad_enabled)
    seen(layers._JoinedProduct, lambda: True)
    monkeypatch.setattr(layers, "_JOINED_ON", ("cpu",))
    monkeypatch.setattr(layers, "_KEPT_BYTES", 0)
    monkeypatch.setattr(parallel, "_SMALL", 1)  # as wide blocks are by themselves
    tables["model"] |= {"d_model": 8, "mixer": {"name": "deltanet", "num_heads": 2}}
    results = []
    for result in _sharded_and_not(tables, text_data):
        results.append((*result, joined.copy()))
        joined.clear()
    (whole, norm, once), (sharded, norm_of_parts, again) = results
    assert again == once
    assert once == 2 * [32, 32]  # q, k, v and beta, to a multiple of 16; the gate and what it multiplies
    torch.testing.assert_close(sharded, whole, rtol=0, atol=0)
    torch.testing.assert_close(norm_of_parts, norm, rtol=1e-2, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_without_a_finite_gradient_are_left_out(optimizer, tables, tmp_path, monkeypatch):
    real, calls, messages = loop.batch_loss, [], []

    def broken(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(loop, "batch_loss", broken)
    tables["optimizer"]["name"] = optimizer
    train(tables, tmp_path / "run", on_message=messages.append)
    found = losses(tmp_path / "run")
    assert [step for step in found if found[step][0] != found[step][0]] == [2, 3]
    assert all(found[step][0] < 7 for step in (1, 4, 5, 6))
    assert any("skipped" in text for text in messages)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [r["skipped"] for r in records if r["kind"] == "training"] == [0, 1, 2, 2, 2, 2]


def test_a_run_without_usable_steps_ends_with_a_sentence(tables, tmp_path, monkeypatch):
    real = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *args, **kwargs: real(*args, **kwargs) * float("inf"))
    tables["training"]["max_skipped"] = 3
    with pytest.raises(TrainingError, match="3 steps in a row before step 3 of 6"):
        train(tables, tmp_path / "run")


def test_what_led_to_skipped_steps_takes_no_checkpoint_away(tables, tmp_path, monkeypatch):
    real, calls = loop.batch_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) in (4, 5) or len(calls) > 6 else 1)

    write = _Writer.write_data
    monkeypatch.setattr(loop, "batch_loss", broken)
    # So slowly that the run gives up in the middle of it.
    monkeypatch.setattr(_Writer, "write_data", lambda *args: time.sleep(0.5) or write(*args))
    tables["training"] |= {"steps": 12, "max_skipped": 4}
    with pytest.raises(TrainingError, match="4 steps in a row before step 10 of 12"):
        train(tables, tmp_path / "run")
    assert PretrainRun(tmp_path / "run").checkpoints.steps() == [2, 6]


def test_a_skipped_step_changes_neither_weights_nor_moments():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(3)
    guarded_step(optimizer, torch.tensor(True))
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    weight.grad = torch.full((3,), torch.nan)
    guarded_step(optimizer, torch.tensor(False))
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_spikes_are_told_from_the_usual_spread(config):
    guard = StepGuard(config.training, "cpu")
    for step in range(100):
        assert guard.accepts(torch.tensor(3 + 0.1 * (step % 3)), torch.tensor(1.0 + 0.2 * (step % 2)))
    assert not guard.accepts(torch.tensor(9.0), torch.tensor(1.0))
    assert not guard.accepts(torch.tensor(3.0), torch.tensor(50.0))
    assert guard.accepts(torch.tensor(2.0), torch.tensor(0.5))
    assert guard.state["skipped"].item() == guard.state["worst"].item() == 2
    assert guard.state["in_a_row"].item() == 0


def test_a_checkpoint_counts_only_when_it_is_complete(tables, stopped):
    checkpoints = PretrainRun(stopped).checkpoints
    assert checkpoints.steps() == [2, 3]
    half = checkpoints.directory / ".step-00000005.tmp"
    shutil.copytree(checkpoints.path(3), half)
    assert checkpoints.steps() == [2, 3]
    train(tables, stopped)
    assert not half.exists()
    assert checkpoints.steps() == [4, 6]  # the last two are kept
    assert not [path for path in checkpoints.directory.rglob("*") if path.suffix not in ("", ".json", ".safetensors")]


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-10]), r"model-00001-of-00001.safetensors is missing or"),
        (lambda shard: shard.unlink(), r"model-00001-of-00001.safetensors is missing or cut short"),
        (lambda shard: flip(shard, 7), "its hash differs"),  # the length of the header
        (lambda shard: flip(shard, -1), "its hash differs"),
        (lambda shard: shard.with_name("other.safetensors").write_text("x"), "other.safetensors does not belong to it"),
        (lambda shard: (shard.parent / "progress.json").unlink(), "its progress.json is missing"),
        (lambda shard: (shard.parent / "progress.json").write_text("[]"), "its progress.json is missing or"),
        (
            lambda shard: (shard.parent / "progress.json").write_bytes(b"\xff"),
            "its progress.json is missing or not what",
        ),
    ],
)
@pytest.mark.thin(3)
def test_damage_is_named_and_what_is_before_it_is_offered(damage, message, tables, stopped):
    checkpoints = PretrainRun(stopped).checkpoints
    (shard,) = checkpoints.path(3).glob("*.safetensors")
    damage(shard)
    with pytest.raises(RunError, match=f"{message}.*; remove that directory to go on from step-00000002") as raised:
        train(tables, stopped)
    assert str(checkpoints.path(3)) in str(raised.value)
    shutil.rmtree(checkpoints.path(3))
    assert train(tables, stopped).step == 6


def test_tensors_that_cannot_be_read_are_named_even_if_they_are_what_was_written(tables, tmp_path):
    train(tables, tmp_path / "run", stop_after=2)
    place = PretrainRun(tmp_path / "run").checkpoints.path(2)
    (shard,) = place.glob("*.safetensors")
    flip(shard, 7)
    facts = json.loads((place / "progress.json").read_text())
    facts["files"][shard.name]["sha256"] = file_hash(shard)
    (place / "progress.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"its tensors can't be read .*begin anew: there is none before it"):
        train(tables, tmp_path / "run")


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("model", "num_layers", 1, "model.num_layers is 1 there, not 2"),
        ("model", "mixer", {"name": "deltanet", "num_heads": 2}, "model.mixer is deltanet there, not gated_deltanet"),
        ("optimizer", "name", "muon", "optimizer.name is muon there, not adamw"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(table, key, value, message, tables, tmp_path):
    train(tables, tmp_path / "run", stop_after=2)
    train({**tables, table: {**tables[table], key: value}}, tmp_path / "other", stop_after=3)
    name = "checkpoints/step-00000003"
    shutil.copytree(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(RunError, match=f"step-00000003 is a checkpoint of another run than .*{message}"):
        train(tables, tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(tables, stopped, monkeypatch):

    @contextmanager
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(tables, stopped)
    assert Checkpoints(stopped / "checkpoints").steps() == [2, 3]


@pytest.mark.parametrize("method", ["mkdir", "rename"])
def test_a_directory_that_cannot_be_written_is_named(method, tables, stopped, monkeypatch):
    original = getattr(Path, method)

    def refused(path, *args, **kwargs):
        if "step-" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Path, method, refused)
    with pytest.raises(CheckpointError, match=r"could not be written to .*checkpoints \(Permission denied\)"):
        train(tables, stopped)
    assert Checkpoints(stopped / "checkpoints").steps() == [2, 3]


def hold(place, held):
    run = PretrainRun(place)
    run.begin(run.read_config())
    held.set()
    time.sleep(600)


def test_a_run_has_one_trainer_at_a_time(tables, stopped):
    held = FORKED.Event()
    other = FORKED.Process(target=hold, args=(stopped, held), daemon=True)
    other.start()
    assert held.wait(60)
    with pytest.raises(RunError, match=f"is in use by process {other.pid} on "):
        train(tables, stopped)
    other.kill()
    other.join()
    assert train(tables, stopped).step == 6


def test_data_that_has_changed_is_named_before_training(tables, text_data, tmp_path):
    shutil.copytree(text_data, tmp_path / "data")
    tables["data"]["directory"] = str(tmp_path / "data")
    flip(tmp_path / "data" / "train" / "code-00000.tokens.npy", -1)
    with pytest.raises(DataError, match=r"train/code-00000.tokens.npy is not the file that was written"):
        train(tables, tmp_path / "run")
    flip(tmp_path / "data" / "train" / "code-00000.tokens.npy", -1)
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").unlink()  # needed when training ends
    with pytest.raises(DataError, match=r"tokenizer/tokenizer.json is missing"):
        train(tables, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_of_any_bytes_do_not_stop_a_run(tables, tmp_path):
    train(tables, tmp_path / "run", stop_after=2)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"step": 2')
    train(tables, tmp_path / "run")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))


def test_shares_of_domains_decide_what_is_read(tables, text_data):
    tokens = PackedTokens(text_data)
    batches = PackedBatches(tokens, sequence_length=24, batch_size=4, shares={"code": 3, "prose": 1})
    windows = batches._order(0)
    boundary = tokens.domain_ranges["code"][1] / 24
    assert ((windows < boundary).double().mean() - 0.75).abs() < 0.02
    assert windows.max() < batches.num_windows
    assert not torch.equal(windows, batches._order(1))
    with pytest.raises(ValueError, match="no domain 'songs'"):
        PackedBatches(tokens, sequence_length=24, batch_size=4, shares={"songs": 1})


def losses_of_two(rank, path, tables, batch, expected):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for case, (loss, norm) in expected.items():
            found = loss_and_norm(tables, batch.split(2)[rank], *case)
            assert found[0] == pytest.approx(loss, rel=1e-3 if case[2] == "bfloat16" else 1e-6), case
            assert found[1] == pytest.approx(norm, rel=1e-2 if case[2] == "bfloat16" else 1e-4), case
        for every in (False, True):  # sequences one by one, of which all are as long
            found = loss_and_norm(tables, batch.split(2)[rank], "fsdp", False, "float32", 2, every)
            assert found == pytest.approx(expected["fsdp", False, "float32"], rel=1e-4), every
    finally:
        dist.destroy_process_group()


def loss_and_norm(tables, batch, parallelism, tied, precision, micro_batches=1, every=False):
    """Of a batch that all processes have a part of."""
    execution = {"parallelism": parallelism, "reduce_every_micro_batch": every}
    tables = {**tables, "model": {**tables["model"], "tie_embeddings": tied}, "execution": execution}
    config = config_of(tables, 257)
    torch.manual_seed(0)
    with processes("cpu") as own:
        parallel = ParallelModel(LanguageModel(config.model), own, config.execution, precision)
        total = torch.zeros(())
        for index, part in enumerate(batch.split(micro_batches)):
            with parallel.accumulating(last=index + 1 == micro_batches):
                loss = batch_loss(parallel, part, config, z_loss=0.1) / micro_batches
                loss.backward()
            total += loss.detach()
        return own.mean(total).item(), parallel.clip_gradients(0).item()


def test_the_loss_of_two_processes_is_that_of_one(tables, text_data, tmp_path, monkeypatch):
    """With the weight of the output layer whole or sharded, its own or the embedding's, in chunks of a few tokens."""
    batch = next(iter(PackedBatches(PackedTokens(text_data), sequence_length=24, batch_size=4)))
    precisions = ("float32", "bfloat16")
    alone = {(tied, p): loss_and_norm(tables, batch, "none", tied, p) for tied in (False, True) for p in precisions}
    monkeypatch.setattr(cross_entropy, "_LOGITS_ON_CPU", 10 * 257)  # in this process alone: chunks change nothing
    for (tied, precision), expected in alone.items():
        found = loss_and_norm(tables, batch, "none", tied, precision)
        assert found == pytest.approx(expected, rel=1e-2 if precision == "bfloat16" else 1e-5)
    expected = {(parallelism, *case): value for case, value in alone.items() for parallelism in ("ddp", "fsdp")}
    run_ranks(losses_of_two, (tmp_path / "store", tables, batch, expected), 2)


def test_documents_may_share_a_state(tables, tmp_path):
    tables["data"]["separate_documents"] = False
    result = train(tables, tmp_path / "run")
    assert result.step == 6
    assert losses(tmp_path / "run")[6][0] < losses(tmp_path / "run")[1][0]


def test_a_process_that_stands_alone_leaves_no_group_behind_after_an_error():
    with pytest.raises(KeyError), processes("cpu"):
        raise KeyError
    assert not dist.is_initialized()
