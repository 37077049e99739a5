"""Text from a language model: the tokens, how they are drawn, and how they are shown."""

import itertools
import subprocess
import sys

import pytest
import torch

from benchmarks import decode
from statetrack import LanguageModel, ModelConfig, generation, mixer_config
from statetrack.cli import main
from statetrack.data.tokenizer import byte_tokenizer
from statetrack.generation import Decoder, generate, streamed

DECODED = [
    "deltanet",
    "gated_deltaproduct",
    "homogeneous_deltaproduct",
    "mamba",
    "mamba2",
    "rwkv7",
    "slstm",
    "attention",
]


def make(vocab_size=257, **options):
    torch.manual_seed(0)
    mixer = (mixer_config("deltanet")(), mixer_config("attention")())
    return LanguageModel(ModelConfig(vocab_size=vocab_size, d_model=16, mixer=mixer, **options)).double().eval()


def test_without_temperature_each_token_is_the_most_likely_one():
    model, ids = make(), [256, 5, 9]
    got = list(generate(model, ids, max_new_tokens=12, temperature=0))
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert got == ids[3:]
    stopped = list(generate(model, ids[:3], max_new_tokens=12, temperature=0, stop=got[7]))
    assert stopped == got[: got.index(got[7])]
    assert list(generate(model, ids[:3], max_new_tokens=0)) == []


def test_a_decoder_leaves_the_state_that_it_starts_from_alone():
    model, ids = make(), torch.tensor([[256, 5, 9, 2]])
    with torch.no_grad():
        state = model.scan(ids[:, :2])[1]
        first, second = Decoder(model, state), Decoder(model, state)
        for t in (2, 3):
            assert torch.allclose(first(ids[:, t]), model(ids[:, : t + 1])[:, -1])
        assert torch.allclose(second(ids[:, 2]), model(ids[:, :3])[:, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODED)
def test_a_decoder_on_a_gpu_replays_a_graph_that_computes_the_same(name):
    config = ModelConfig(vocab_size=257, d_model=64, mlp_ratio=2, mixer=mixer_config(name)())
    model, ids = LanguageModel(config).cuda().eval(), torch.randint(257, (3, 12), device="cuda")
    with torch.no_grad():
        expected, state = model(ids), model.scan(ids[:, :4])[1]
        decoder = Decoder(model, state)
        assert (decoder._graph is None) == (name == "attention")
        for t in range(4, 12):
            assert torch.allclose(decoder(ids[:, t]), expected[:, t], atol=1e-4)


@torch.no_grad()
def test_the_benchmark_of_decoding_counts_what_a_token_moves():
    model = decode.build("deltanet", "tiny", "auto", torch.device("cpu"), torch.float32)
    row = decode.measure(model, "deltanet", 3, 1e9, calls=1, rounds=1)
    assert row["error"] < 1e-6
    state = 2 * 3 * (4 * 16 * 16 + 3 * 3 * 64) * 4  # two layers, three rows: four heads, and three convolutions
    assert row["state_bytes"] == state
    assert row["floor_bytes"] == (row["parameters"] - 256 * 64 + 3 * 64) * 4 + 2 * state
    assert row["floor_ms"] == pytest.approx(row["floor_bytes"] * 1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    mixer = mixer_config("deltanet")(num_heads=2, conv_size=0)
    model = LanguageModel(ModelConfig(vocab_size=3, d_model=8, num_layers=1, mixer=mixer)).double()
    logits = model(torch.tensor([[1, 2]]))[0, -1]
    draws = 600
    counts = torch.zeros(3)
    for seed in range(draws):
        counts[next(generate(model, [1, 2], max_new_tokens=1, temperature=0.5, seed=seed))] += 1
    expected = torch.softmax(logits.detach() / 0.5, 0)
    assert torch.allclose(counts.double() / draws, expected, atol=0.085)  # over four standard deviations
    top = set(logits.topk(2).indices.tolist())
    drawn = {next(generate(model, [1, 2], max_new_tokens=1, top_k=2, temperature=5.0, seed=s)) for s in range(30)}
    assert drawn == top


def test_a_seed_determines_the_text():
    model = make()
    first, again, other = (list(generate(model, [256], max_new_tokens=20, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_characters_are_shown_when_they_are_complete():
    tokenizer, text = byte_tokenizer(), "naïve ☃!"
    pieces = list(streamed(list(text.encode()), tokenizer.decode))
    assert pieces == list(text)
    assert "".join(streamed([97, 0xE2, 0x98], tokenizer.decode)).startswith("a")


def test_bytes_that_are_no_text_are_shown_and_not_waited_for():
    endless = itertools.chain([97], itertools.repeat(0xFF))
    pieces = list(itertools.islice(streamed(endless, byte_tokenizer().decode), 20))
    assert "".join(pieces).startswith("a\ufffd\ufffd\ufffd")
    snowman = "☃".encode()
    text = "".join(streamed([*[0xFF] * 20, *snowman, *[0xE2] * 9, *snowman], byte_tokenizer().decode))
    assert text.strip("\ufffd") == "☃" + 9 * "\ufffd" + "☃"


def test_a_prompt_is_read_in_pieces(monkeypatch):
    model, prompt = make(), torch.randint(257, (40,)).tolist()
    whole = list(generate(model, prompt, max_new_tokens=6, temperature=0))
    monkeypatch.setattr(generation, "_PIECE", 7)
    read, scan = [], model.scan
    monkeypatch.setattr(
        model, "scan", lambda ids, *args, **options: read.append(ids.shape[1]) or scan(ids, *args, **options)
    )
    assert list(generate(model, prompt, max_new_tokens=6, temperature=0)) == whole
    assert read[:6] == [7] * 5 + [5]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_has_diverged_says_so(temperature):
    model = make()
    torch.nn.init.constant_(model.embedding.weight, torch.nan)
    with pytest.raises(ValueError, match="the logits of this model are NaN"):
        list(generate(model, [1], max_new_tokens=2, temperature=temperature))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "at least one token"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"temperature": -1.0}, "temperature must be 0 or positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"model": make(output_size=3)}, "reads 257 tokens and answers with 3 labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"model": make(), "prompt": [1], "max_new_tokens": 2, **options})


def test_the_command_writes_what_the_model_says(tmp_path, capsys):
    from statetrack.hf import StatetrackForCausalLM

    model = make()
    StatetrackForCausalLM.of(model).save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "one ☃", "--max-new-tokens", "9", "--temperature", "0"]
    assert main(words) == 0
    tokens = generate(model, [256, *"one ☃".encode()], max_new_tokens=9, temperature=0, stop=256)
    assert capsys.readouterr().out == "one ☃" + byte_tokenizer().decode(list(tokens)) + "\n"


@pytest.fixture
def saved(tmp_path):
    from statetrack.hf import StatetrackForCausalLM

    StatetrackForCausalLM.of(make()).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, "has no tokenizer"),
        ({"tokenizer.json": None}, "is missing or damaged"),
        ({"tokenizer.json": "{"}, "is missing or damaged"),
        ({"tokenizer_config.json": "{"}, "is no JSON object"),
        ({"tokenizer_config.json": "[]"}, "is no JSON object"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"model.safetensors": "short"}, "damaged or cut short"),
    ],
)
def test_a_damaged_model_is_refused_in_a_sentence(damage, message, saved, capsys):
    for name, text in damage.items():
        (saved / name).unlink() if text is None else (saved / name).write_text(text)
    capsys.readouterr()
    assert main(["generate", str(saved)]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out


def test_a_prompt_that_is_no_text_is_refused(saved, capsys):
    capsys.readouterr()
    assert main(["generate", str(saved), "--prompt", "caf\udce9"]) == 2
    assert capsys.readouterr().err == "statetrack: the prompt is not valid UTF-8, so that it is no text\n"


def test_text_comes_as_it_is_drawn_and_a_reader_may_leave(saved):
    """As with `statetrack generate ... | head -c 20`: all of the text would take hours."""
    words = [sys.executable, "-m", "statetrack", "generate", saved, "--prompt", "one ", "--temperature", "0"]
    words += ["--max-new-tokens", "10000000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(20).startswith(b"one ")
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_a_run_of_a_task_writes_no_text(tmp_path, capsys):
    assert main(["compile", "parity", "--out", str(tmp_path / "run")]) == 0
    assert main(["generate", str(tmp_path / "run")]) == 2
    assert "is a run of the task parity, whose model answers with labels" in capsys.readouterr().err
