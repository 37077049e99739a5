"""Chess tracking: which piece is it that moves? A board is a state, and a move in coordinates says nothing of pieces.

Games are made by python-chess, an optional package under the GPL: `pip install "statetrack[chess]"`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statetrack.tasks.task import IGNORE, Batch, Task, TaskFamily, check_fits, check_stream, read_numbers

if TYPE_CHECKING:
    import chess

BOUNDS = {"PLIES": (1, 500), "GAMES": (1, 1_000_000), "SEED": (0, 10**9 - 1)}
PIECES = ("pawn", "knight", "bishop", "rook", "queen", "king")
SQUARES = tuple(f"{file}{rank}" for rank in "12345678" for file in "abcdefgh")
DESCRIPTION = (
    "random legal chess games in coordinates, e2 e4 ..., GAMES of them with PLIES moves each; the label, after the "
    "first square of a move, is the kind of piece that stands there"
)


@dataclass(frozen=True, kw_only=True)
class ChessTracking(Task):
    """Beginnings of games in which every legal move is as likely as every other; pawns become queens.

    A move is two tokens, the square that a piece leaves and the one that it goes to (the king's in castling). A label
    stands at the first of the two. The games are made once for each name, when they are asked for, at about 0.05 ms a
    move, and a batch draws from them: so judge a model on games that it was not trained on, under another SEED.

    Attributes:
        chance: computed from the games when it is asked for.
        plies: moves of each game, of both players.
        games: how many games there are.
        seed: decides them.
    """

    name: str = field(init=False)
    description: str = DESCRIPTION
    vocab_size: int = len(SQUARES)
    num_labels: int = len(PIECES)
    chance: float = field(init=False, repr=False, compare=False)
    plies: int
    games: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"chess_tracking:{self.plies},{self.games},{self.seed}")

    def __getattr__(self, name: str) -> float:
        # Configs of runs are read where nobody wants the games, nor may have the package that makes them.
        if name != "chance":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        late = self._tables[1][:, self.plies // 2 :]
        object.__setattr__(self, name, float(late.flatten().bincount().max() / late.numel()))
        return self.chance

    @property
    def token_names(self) -> tuple[str, ...]:
        return SQUARES

    @property
    def algebraic_class(self) -> str:
        # Moves over an empty square permute the pieces on the others in every way.
        return "non-solvable monoid"

    @property
    def num_generators(self) -> None:
        return None

    def fits(self, length: int) -> bool:
        return length % 2 == 1 and 1 <= length < 2 * self.plies

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator, device: torch.device | str | None = None
    ) -> Batch:
        check_stream(batch_size, generator, device)
        check_fits(self, length)
        there = generator.device
        if there not in self._copies:
            self._copies[there] = tuple(table.to(there) for table in self._tables)
        moves, pieces = self._copies[there]
        chosen = torch.randint(self.games, (batch_size,), generator=generator, device=there)
        labels = torch.full((batch_size, length), IGNORE, device=there)
        labels[:, ::2] = pieces[chosen, : (length + 1) // 2].long()
        return Batch(moves[chosen, :length].long(), labels)

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return _games(self.plies, self.games, self.seed)

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}


@lru_cache(maxsize=4)
def _games(plies: int, games: int, seed: int) -> tuple[Tensor, Tensor]:
    """The squares of the moves, uint8 [games, 2 plies], and the kinds of the pieces that move, uint8 [games, plies]."""
    try:
        import chess
    except ModuleNotFoundError:
        raise ValueError(
            'chess_tracking needs the package chess, which makes its games: pip install "statetrack[chess]"'
        ) from None
    source = random.Random(f"chess {plies} {games} {seed}")
    squares, pieces = [], []
    while len(squares) < games:
        board = chess.Board()
        game: list[chess.Move] = []
        kinds = []
        while len(game) < plies and (moves := _legal_moves(board)):
            move = moves[int(source.random() * len(moves))]
            kinds.append((board.piece_type_at(move.from_square) or 0) - 1)
            board.push(move)
            game.append(move)
        if len(game) == plies:  # one that ended before is played again
            squares.append([square for move in game for square in (move.from_square, move.to_square)])
            pieces.append(kinds)
    return torch.tensor(squares, dtype=torch.uint8), torch.tensor(pieces, dtype=torch.uint8)


def _legal_moves(board: chess.Board) -> list[chess.Move]:
    """In an order that doesn't depend on how they were found; of promotions only those to a queen (piece type 5)."""
    moves = [move for move in board.generate_legal_moves() if move.promotion in (None, 5)]
    return sorted(moves, key=lambda move: (move.from_square, move.to_square))


def _make(argument: str) -> ChessTracking:
    plies, games, seed = read_numbers(argument, "chess_tracking", BOUNDS, "60,10000,0")
    return ChessTracking(plies=plies, games=games, seed=seed)


TASK = TaskFamily(
    name="chess_tracking",
    argument=",".join(BOUNDS),
    description=DESCRIPTION,
    example="chess_tracking:40,200,0",
    make=_make,
    needs="chess",
)
