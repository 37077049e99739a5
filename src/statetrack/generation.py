"""Text from a language model, a token at a time, in memory that doesn't grow with the length but for attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from statetrack import seeds
from statetrack.model import LanguageModel, ModelState, owned

# What a decoder writes for bytes that are no character, or not yet.
_INCOMPLETE = "\ufffd"
# A character has four bytes at most, and a token one at least: so many tokens may be the beginning of a character.
_MOST_INCOMPLETE = 3

_PIECE = 2048
"""Tokens of a prompt that are read at once, which bounds the memory of activations."""


class Decoder:
    """A model that goes on from a state, one token of every row after another, and overwrites its own copy of it.

    On a CUDA device a step is one replay of a CUDA graph, unless the state grows, as that of attention does.

    Attributes:
        state: the state after the tokens so far.

    Args:
        model: the model, whose weights must stay where they are.
        state: the state after the tokens before; it is left as it is.
    """

    def __init__(self, model: LanguageModel, state: ModelState) -> None:
        self.model, self.state = model, owned(state)
        self._graph: torch.cuda.CUDAGraph | None = None
        if model.output_weight.is_cuda:
            self._capture()

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids [B] -> logits [B, output_size], which are good until the next call."""
        if self._graph is None:
            return self.model.step_(ids, self.state)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._logits

    def state_bytes(self) -> int:
        """What the state takes, which is all that is carried from token to token."""
        return sum(tensor.nbytes for tensor in _tensors(self.state))

    def _capture(self) -> None:
        rows = next(len(tensor) for layer in self.state for tensor in layer.values())
        self._ids = torch.zeros(rows, dtype=torch.long, device=self.model.output_weight.device)
        # Kernels are compiled and workspaces made ahead of the capture, on a state that is thrown away.
        trial = owned(self.state)
        tensors = _tensors(trial)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.model.step_(self._ids, trial)
        torch.cuda.current_stream().wait_stream(stream)
        if any(after is not before for after, before in zip(_tensors(trial), tensors, strict=True)):
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self.model.step_(self._ids, self.state)
        self._graph = graph


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state for tensor in layer.values()]


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that go on from a prompt, as they are drawn.

    Args:
        model: predicts its own tokens.
        prompt: token ids, at least one.
        max_new_tokens: how many are drawn at most.
        temperature: logits are divided by it; 0 takes the most likely token always.
        top_k: draw from the so many most likely tokens only; None for all.
        stop: the token after which nothing more is drawn; it is not returned.
        seed: of the draws, at least 0.

    Raises:
        ValueError: for an empty prompt, numbers out of range, or a model whose outputs are not its tokens; where the
            tokens are drawn, for a model whose logits are NaN.
    """
    if model.output_size != model.config.vocab_size:
        raise ValueError(
            f"generation needs a model that predicts its own tokens; this one reads {model.config.vocab_size} tokens "
            f"and answers with {model.output_size} labels"
        )
    if not prompt:
        raise ValueError("the prompt must have at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return _draw(model, prompt, max_new_tokens, temperature, top_k, stop, seed)


@torch.no_grad()
def _draw(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    stop: int | None,
    seed: int,
) -> Iterator[int]:
    device = model.output_weight.device
    draws = seeds.generator("generation", seed)
    state: ModelState | None = None
    logits = model.output_weight.new_empty(0)
    for piece in torch.tensor([list(prompt)], device=device).split(_PIECE, 1):
        last = torch.tensor([piece.shape[1] - 1], device=device)
        logits, state = model.scan(piece, state, positions=last)
    assert state is not None
    logits = logits[0, 0]
    decoder = Decoder(model, state) if max_new_tokens > 1 else None
    del state  # of which some tensors may be views of the activations of the prompt
    for drawn in range(max_new_tokens):
        if logits.isnan().any():
            raise ValueError("the logits of this model are NaN: its weights are damaged, or its training has diverged")
        if temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = logits.double().cpu() / temperature
            if top_k is not None and top_k < len(scaled):
                scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
            token = int(torch.multinomial(scaled.softmax(0), 1, generator=draws))
        if token == stop:
            return
        yield token
        if decoder is not None and drawn + 1 < max_new_tokens:
            logits = decoder(torch.tensor([token], device=device))[0]


def streamed(tokens: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of tokens as they come, held back while a character is not complete; bytes that are none are shown as �.

    Args:
        tokens: token ids.
        decode: the text of token ids; pieces are decoded behind the tokens before them, as some decoders want.
    """
    before: list[int] = []
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = decode(before + waiting)
        if not text.endswith(_INCOMPLETE):
            yield text[len(decode(before)) :]
            before, waiting = waiting, []
        elif len(waiting) > 2 * _MOST_INCOMPLETE:  # no character begins with all of them
            done, waiting = waiting[:-_MOST_INCOMPLETE], waiting[-_MOST_INCOMPLETE:]
            yield decode(before + done)[len(decode(before)) :]
            before = done
    if waiting:
        yield decode(before + waiting)[len(decode(before)) :]
