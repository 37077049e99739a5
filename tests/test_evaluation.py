"""Evaluation against models whose accuracy is known beforehand."""

import pytest
import torch

from statetrack import LanguageModel, ModelConfig, mixer_config
from statetrack import evaluation as module
from statetrack.evaluation import evaluate, measure_eigenvalues
from statetrack.tasks import get_task

PARITY = get_task("parity")


def make(task=PARITY, **mixer):
    torch.manual_seed(0)
    config = mixer_config("deltanet")(num_heads=2, conv_size=2, **mixer)
    sizes = {"vocab_size": task.vocab_size, "output_size": task.num_labels}
    return LanguageModel(ModelConfig(**sizes, d_model=8, num_layers=2, mixer=config)).eval()


class Oracle(LanguageModel):
    """A model that knows parity: its state is the sum of the bits so far."""

    def __init__(self):
        super().__init__(make().config)
        self.segments = []

    def scan(self, ids, state=None, cu_seqlens=None, positions=None, mask=None):
        self.segments.append(ids.shape[1])
        before = ids.new_zeros(len(ids)) if state is None else state[0]["sum"]
        sums = before[:, None] + ids.cumsum(1)
        logits = torch.nn.functional.one_hot(sums % 2, 2).float()
        return logits if positions is None else logits[:, positions], [{"sum": sums[:, -1]}]


def test_a_model_that_knows_the_answer_is_right_at_every_length(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 32 * 50)
    oracle = Oracle()
    results = evaluate(oracle, PARITY, [1, 2, 49, 50, 51, 100, 333], sequences=32)
    assert [result.accuracy for result in results] == [1.0] * 7
    assert [result.length for result in results] == [1, 2, 49, 50, 51, 100, 333]
    assert oracle.segments == [50] * 6 + [33]


def test_a_model_that_knows_nothing_is_at_chance():
    (result,) = evaluate(make(), PARITY, [64], sequences=2000)
    assert abs(result.accuracy - PARITY.chance) < 0.06


def test_the_result_does_not_depend_on_the_segments(monkeypatch):
    model = make()
    expected = evaluate(model, PARITY, [5, 40, 200], sequences=16)
    for tokens in (16, 16 * 7, 16 * 64):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", tokens)
        assert evaluate(model, PARITY, [5, 40, 200], sequences=16) == expected


def test_long_lengths_are_judged_on_fewer_sequences(monkeypatch):
    monkeypatch.setattr(module, "LONG", 100)
    results = evaluate(make(), PARITY, [100, 40, 99, 40])
    assert [(r.length, r.sequences) for r in results] == [(40, 512), (99, 512), (100, 32)]


def test_seeds_make_different_sequences():
    model = make()
    a, b, again = (evaluate(model, PARITY, range(1, 30), sequences=64, seed=seed) for seed in (0, 1, 0))
    assert a != b
    assert a == again


def test_progress_ends_at_the_total():
    seen = []
    evaluate(make(), PARITY, [40], sequences=3, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (120, 120)


@pytest.mark.parametrize(("lengths", "sequences"), [([], None), ([0], None), ([-3, 4], None), ([4], 0)])
def test_wrong_lengths_are_refused(lengths, sequences):
    with pytest.raises(ValueError, match=r"lengths must be positive|sequences must be at least 1"):
        evaluate(make(), PARITY, lengths, sequences=sequences)


def test_measured_eigenvalues_lie_in_the_declared_range():
    for lo in (0, -1):
        measured = measure_eigenvalues(make(eigenvalue_range=(lo, 1)), PARITY)
        values = [pair for pairs in measured.values() for pair in pairs]
        assert set(measured) == {0, 1}
        assert all(lo - 1e-4 <= re <= 1 + 1e-4 and abs(im) < 1e-4 for re, im in values)
        assert min(re for re, _ in values) < lo + 0.9


def test_a_sample_of_eigenvalues_is_no_larger_than_asked():
    task = get_task("group:S3")
    model = make(task, num_householder=2)
    assert sum(map(len, measure_eigenvalues(model, task, most=60).values())) <= 66


def test_a_sequence_is_right_only_as_long_as_all_its_labels_are(monkeypatch):
    class Wrong(Oracle):
        """Parity but for one position, at which the first half of the sequences is answered wrongly."""

        def scan(self, ids, state=None, cu_seqlens=None, positions=None, mask=None):
            read = 0 if state is None else state[0]["read"]
            logits, after = super().scan(ids, state)
            if read < 30 <= read + ids.shape[1]:
                logits[: len(ids) // 2, 29 - read] *= -1
            after[0]["read"] = read + ids.shape[1]
            return logits if positions is None else logits[:, positions], after

    for tokens in (16 * 7, 16 * 64):
        monkeypatch.setattr(module, "SEGMENT_TOKENS", tokens)
        lengths = [1, 29, 30, 31, 100]
        whole = evaluate(Wrong(), PARITY, lengths, sequences=16, whole=True)
        labels = evaluate(Wrong(), PARITY, lengths, sequences=16)
        assert [result.accuracy for result in whole] == [1.0, 1.0, 0.5, 0.5, 0.5]
        assert [result.accuracy for result in labels] == [1.0, 1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("modular_arithmetic:3", [4, 10]), ("code_evaluation:3", [9, 30]), ("group:S3:all:4", [8, 12])],
)
def test_tasks_that_end_with_the_answer_are_judged_there(name, lengths):
    task = get_task(name)
    results = evaluate(make(task), task, lengths, sequences=8)
    assert [result.length for result in results] == lengths
    assert results == evaluate(make(task), task, lengths, sequences=8)
    assert measure_eigenvalues(make(task), task, length=7)
    if not task.fits(lengths[0] + 1):
        with pytest.raises(ValueError, match=f"no label at length {lengths[0] + 1}; near .* one at {lengths[0]}"):
            evaluate(make(task), task, [lengths[0] + 1])


def test_lengths_that_take_weeks_are_refused():
    with pytest.raises(ValueError, match="lengths of up to 1,000,000,000 are judged, got 100,000,000,000"):
        evaluate(make(), PARITY, [10**26])
