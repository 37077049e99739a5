"""What every task promises, over the registry, so that a new task is tested without touching this file."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from statetrack.automata.algebra import CLASSES
from statetrack.tasks import IGNORE, EndlessTask, Stream, Task, get_task, list_tasks

FAMILIES = list_tasks()
MORE = [
    "group:S5:swaps",
    "group:S3:all:4",
    "group:A5:6",
    "group:Z2^3",
    "group_with_resets:Z2",
    "modular_arithmetic:3:+-",
    "modular_arithmetic_brackets:5:+-",
    "bounded_dyck:1,3",
    "star_free:tomita4",
    "star_free:no_ab",
]
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(needs and not find_spec(needs)), reason=f"needs {needs}"))
    for name, needs in [*((family.example, family.needs) for family in FAMILIES), *((name, "") for name in MORE)]
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(task: Task, length: int) -> int:
    """The length that the task has and that is nearest to one."""
    return min((n for n in range(1, length + 100) if task.fits(n)), key=lambda n: abs(n - length))


@pytest.fixture(params=NAMES)
def task(request) -> Task:
    return get_task(request.param)


@pytest.fixture
def endless(task) -> EndlessTask:
    if not isinstance(task, EndlessTask):
        pytest.skip("its sequences have an end")
    return task


def test_the_registry_lists_the_files_of_the_folder():
    names = [family.name for family in FAMILIES]
    assert names == sorted(names)
    assert {"group", "modular_addition", "parity", "modular_arithmetic", "dyck", "code_evaluation"} <= set(names)


def test_the_page_on_tasks_lists_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert [family.name for family in FAMILIES if f"| `{family.name}" not in page] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_says_what_it_is(family):
    assert family.example.partition(":")[0] == family.name
    assert bool(family.argument) == (":" in family.syntax)
    assert family.description
    assert "\n" not in family.description


def test_a_task_says_what_it_is(task):
    assert task.description
    assert len(task.token_names) == len(set(task.token_names)) == task.vocab_size
    assert task.algebraic_class in CLASSES or task.algebraic_class.startswith("context-free: ")
    assert task.num_generators is None or task.num_generators >= 1
    assert 1 / task.num_labels - 1e-9 <= task.chance <= 1


def test_a_task_is_made_again_from_its_name(task):
    again = get_task(task.name)
    assert again == task
    assert hash(again) == hash(task)


def test_a_task_can_not_be_changed(task):
    with pytest.raises(AttributeError, match="cannot assign"):
        task.name = "another"


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (3, 40), (5, 257), (2, 5000)])
def test_batches_have_the_promised_shapes_and_values(task, batch_size, length):
    length = near(task, length)
    ids, labels = task.sample(batch_size, length, generator())
    for values, bound in ((ids, task.vocab_size), (labels, task.num_labels)):
        assert values.dtype == torch.int64
        assert values.shape == (batch_size, length)
        assert values.is_contiguous()
        assert values.device.type == "cpu"
        real = values[values != IGNORE] if values is labels else values
        assert ((real >= 0) & (real < bound)).all()
    assert (labels[:, -1] != IGNORE).all()


@pytest.mark.parametrize("length", range(-1, 12))
def test_lengths_that_do_not_fit_are_refused(task, length):
    if task.fits(length):
        assert task.sample(2, length, generator()).labels[:, -1].min() >= 0
    elif not isinstance(task, EndlessTask) or length < 1:
        with pytest.raises(ValueError, match=f"has no sequences of {length} tokens; near are|at least 1, got {length}"):
            task.sample(2, length, generator())


def test_every_token_and_label_occurs_and_sequences_differ(task):
    ids, labels = task.sample(256, near(task, 200), generator())
    assert set(ids.flatten().tolist()) == set(range(task.vocab_size))
    assert set(labels.flatten().tolist()) - {IGNORE} == set(range(task.num_labels))
    assert len({tuple(row) for row in ids.tolist()}) > 100


def test_chance_is_what_the_best_constant_answer_gets(task):
    if isinstance(task, EndlessTask):
        (_, labels), tolerance = task.sample(256, 1000, generator()), 0.015
    else:  # most have one label a sequence
        (_, labels), tolerance = task.sample(4096, near(task, 120), generator()), 0.03
    late = labels[:, labels.shape[1] // 2 :]
    counts = torch.bincount(late[late != IGNORE], minlength=task.num_labels)
    assert counts.max() / counts.sum() == pytest.approx(task.chance, abs=tolerance)


def test_the_seed_decides(task):
    first, second, other = (task.sample(4, near(task, 60), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.ids, other.ids)


def test_a_generator_goes_on_from_batch_to_batch(task):
    source, length = generator(), near(task, 60)
    assert not torch.equal(task.sample(4, length, source).ids, task.sample(4, length, source).ids)


def test_a_stream_has_segments_of_any_length(endless):
    stream = endless.stream(3, generator())
    assert isinstance(stream, Stream)
    for length in (1, 7, 300):
        ids, labels = stream.next(length)
        assert ids.shape == labels.shape == (3, length)


@pytest.mark.parametrize("cuts", [[1] * 30, [29, 1], [300, 1, 299]])
def test_segments_are_the_whole_however_they_are_cut(endless, cuts):
    whole, stream = endless.sample(3, sum(cuts), generator(5)), endless.stream(3, generator(5))
    segments = [stream.next(length) for length in cuts]
    assert torch.equal(torch.cat([segment.ids for segment in segments], 1), whole.ids)
    assert torch.equal(torch.cat([segment.labels for segment in segments], 1), whole.labels)


def test_the_device_must_be_the_generators(task):
    length = near(task, 6)
    assert torch.equal(task.sample(2, length, generator(), "cpu").ids, task.sample(2, length, generator()).ids)
    assert task.sample(2, length, generator(), torch.device("cpu")).ids.device.type == "cpu"
    for device in ("meta", "cuda:0"):
        with pytest.raises(ValueError, match=f"a generator on cpu can't draw sequences on {device}"):
            task.sample(2, length, generator(), device)


@pytest.mark.parametrize("wrong", [0, -1])
def test_empty_batches_are_refused(task, wrong):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {wrong}"):
        task.sample(wrong, near(task, 5), generator())
    with pytest.raises(ValueError, match=f"length must be at least 1, got {wrong}"):
        task.sample(5, wrong, generator())


@pytest.mark.parametrize("wrong", [0, -1])
def test_empty_segments_are_refused(endless, wrong):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {wrong}"):
        endless.stream(wrong, generator())
    with pytest.raises(ValueError, match=f"length must be at least 1, got {wrong}"):
        endless.stream(5, generator()).next(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", None])
def test_a_gpu_samples_where_its_generator_is(task, device):
    source = torch.Generator("cuda").manual_seed(0)
    ids, labels = task.sample(8, near(task, 100), source, device)
    assert ids.device == labels.device
    assert ids.device.type == "cuda"
    assert set(ids.flatten().tolist()) <= set(range(task.vocab_size))
    with pytest.raises(ValueError, match="can't draw sequences on cpu"):
        task.sample(8, near(task, 100), source, "cpu")


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
        ("group:A5:61", "A5 has 60 elements, so the number of letters is from 1 to 60; got 61"),
        ("group:S4:1", "the letters '1' reach only"),
        ("group:S5:all:0", "TOKENS in group:NAME:LETTERS:TOKENS is from 1 to 64; got '0'"),
        ("group:Z2^0", r"the exponent of a power of groups, as in Z2\^4, is from 1 to 99; got 'Z2\^0'"),
        ("group_with_resets:M11", "unknown group 'M11'"),
        ("cycle_navigation:2", "cycle_navigation:M takes M from 3 to 1000, such as 5; got '2'"),
        ("bounded_dyck:2", "bounded_dyck:K,DEPTH takes K from 1 to 12, DEPTH from 1 to 100, such as 2,5; got '2'"),
        ("bounded_dyck:3,9", "bounded_dyck:3,9 has 29,524 stacks; a table is made for 5,000"),
        ("star_free:d5", "E in star_free:E is one of tomita4, .* d12; got 'd5'"),
        ("permutation_reset:5", "permutation_reset:STATES,PERMUTATIONS,RESETS,SEED takes STATES from 2 to 200"),
        ("permutation_reset:5,0,1,0", "PERMUTATIONS from 1 to 100"),
        ("modular_arithmetic:1", "M in modular_arithmetic:M is an integer from 2 to 31, such as 5; got '1'"),
        (
            "modular_arithmetic:5:/",
            r"OPERATORS in modular_arithmetic:M:OPERATORS are some of \+-\*, such as",
        ),
        ("modular_arithmetic_brackets:5:++", "OPERATORS in modular_arithmetic_brackets:M:OPERATORS are some of"),
        ("dyck:0", "dyck:K takes K from 1 to 12, such as 2; got '0'"),
        ("code_evaluation:2", "code_evaluation:V takes V from 3 to 5, such as 5; got '2'"),
        ("chess_tracking:0,1,0", "chess_tracking:PLIES,GAMES,SEED takes PLIES from 1 to 500"),
    ],
)
def test_names_that_are_no_task_get_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as error:
        get_task(name)
    assert "\n" not in str(error.value)
