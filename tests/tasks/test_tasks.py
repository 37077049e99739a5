"""What every task promises, over the registry, so that a new task is tested without touching this file."""

import pytest
import torch

from statetrack.tasks import IGNORE, Stream, Task, get_task, list_tasks

FAMILIES = list_tasks()
EXAMPLES = [family.example for family in FAMILIES]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=EXAMPLES)
def task(request) -> Task:
    return get_task(request.param)


def test_the_registry_lists_the_files_of_the_folder():
    names = [family.name for family in FAMILIES]
    assert names == sorted(names)
    assert {"group", "modular_addition", "parity"} <= set(names)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_says_what_it_is(family):
    assert family.example.partition(":")[0] == family.name
    assert bool(family.argument) == (":" in family.syntax)
    assert family.description
    assert "\n" not in family.description
    assert get_task(family.example).description


def test_a_task_is_made_again_from_its_name(task):
    again = get_task(task.name)
    assert again == task
    assert hash(again) == hash(task)


def test_a_task_can_not_be_changed(task):
    with pytest.raises(AttributeError, match="cannot assign"):
        task.name = "another"


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (3, 40), (5, 257), (2, 5000)])
def test_batches_have_the_promised_shapes_and_values(task, batch_size, length):
    ids, labels = task.sample(batch_size, length, generator())
    for values, bound in ((ids, task.vocab_size), (labels, task.num_labels)):
        assert values.dtype == torch.int64
        assert values.shape == (batch_size, length)
        assert values.is_contiguous()
        assert values.device.type == "cpu"
        real = values[values != IGNORE] if values is labels else values
        assert ((real >= 0) & (real < bound)).all()


def test_every_token_and_label_occurs_and_sequences_differ(task):
    ids, labels = task.sample(64, 200, generator())
    assert set(ids.flatten().tolist()) == set(range(task.vocab_size))
    assert set(labels.flatten().tolist()) - {IGNORE} == set(range(task.num_labels))
    assert len({tuple(row) for row in ids.tolist()}) == 64


def test_chance_is_what_the_best_constant_answer_gets(task):
    _, labels = task.sample(256, 1000, generator())
    late = labels[:, 500:]
    counts = torch.bincount(late[late != IGNORE], minlength=task.num_labels)
    assert counts.max() / counts.sum() == pytest.approx(task.chance, abs=0.01)


def test_the_seed_decides(task):
    first, second, other = (task.sample(4, 60, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.ids, other.ids)


def test_a_generator_goes_on_from_batch_to_batch(task):
    source = generator()
    assert not torch.equal(task.sample(4, 60, source).ids, task.sample(4, 60, source).ids)


def test_a_stream_has_segments_of_any_length(task):
    stream = task.stream(3, generator())
    assert isinstance(stream, Stream)
    for length in (1, 7, 300):
        ids, labels = stream.next(length)
        assert ids.shape == labels.shape == (3, length)


def test_the_device_must_be_the_generators(task):
    assert torch.equal(task.sample(2, 5, generator(), "cpu").ids, task.sample(2, 5, generator()).ids)
    assert task.stream(2, generator(), torch.device("cpu")).next(1).ids.device.type == "cpu"
    with pytest.raises(ValueError, match="a generator on cpu can't draw sequences on meta"):
        task.sample(2, 5, generator(), "meta")
    with pytest.raises(ValueError, match="a generator on cpu can't draw sequences on cuda:0"):
        task.stream(2, generator(), "cuda:0")


@pytest.mark.parametrize("wrong", [0, -1])
def test_empty_batches_are_refused(task, wrong):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {wrong}"):
        task.sample(wrong, 5, generator())
    with pytest.raises(ValueError, match=f"length must be at least 1, got {wrong}"):
        task.sample(5, wrong, generator())
    with pytest.raises(ValueError, match=f"length must be at least 1, got {wrong}"):
        task.stream(5, generator()).next(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", None])
def test_a_gpu_samples_where_its_generator_is(task, device):
    source = torch.Generator("cuda").manual_seed(0)
    ids, labels = task.sample(8, 100, source, device)
    assert ids.device == labels.device
    assert ids.device.type == "cuda"
    assert set(ids.flatten().tolist()) <= set(range(task.vocab_size))
    with pytest.raises(ValueError, match="can't draw sequences on cpu"):
        task.sample(8, 100, source, "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairty", "unknown task 'pairty'; did you mean 'parity'. the tasks are .*group:.*modular_addition:M.*parity"),
        ("modular_adition:5", "unknown task 'modular_adition:5'; did you mean 'modular_addition:M'"),
        ("", "unknown task ''; the tasks are"),
        ("zzz", "unknown task 'zzz'; the tasks are"),
        ("parity:3", "the task parity takes no argument; got 'parity:3'"),
        ("parity:", "the task parity takes no argument; got 'parity:'"),
        (
            "group",
            r"the task group needs an argument, group:NAME\[:LETTERS\[:TOKENS\]\], for example group:S3; got 'group'",
        ),
        ("modular_addition:", "the task modular_addition needs an argument, modular_addition:M, for example"),
        ("modular_addition:1", "M in modular_addition:M is an integer from 2 to 1000, such as 5; got '1'"),
        ("modular_addition:1001", "M in modular_addition:M is an integer from 2 to 1000"),
        ("modular_addition:-5", "M in modular_addition:M is an integer .* got '-5'"),
        ("modular_addition:5.0", "M in modular_addition:M is an integer .* got '5.0'"),
        ("modular_addition:99999999999999999999", "M in modular_addition:M is an integer"),
        ("group:M11", "unknown group 'M11'; groups are"),
        ("group:s5", "unknown group 's5'; did you mean 'S5'"),
        ("group:S8", "the group S8 has more than 5,040 elements"),
        (
            "group:S5:swap",
            "unknown letters 'swap' of a group; they may be all, generators, swaps, 3-cycles, two",
        ),
        ("group:S5:", "unknown letters '' of a group"),
    ],
)
def test_names_that_are_no_task_get_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as error:
        get_task(name)
    assert "\n" not in str(error.value)
