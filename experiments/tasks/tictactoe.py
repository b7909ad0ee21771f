"""Tic-tac-toe: reasoning that is no mathematics. A position, and a move that a perfect player could make.

    python -m experiments.tasks.tictactoe    → experiments/results/tictactoe.json, .png        (makes its own π_ref)

    X2O/4X6/78O,X:\\boxed{4}                                     the first square that comes to mind: mostly wrong
    X2O/4X6/78O,X:X2O;4X6*78O;X47*2X8*O6O-XXO;OX7;\\boxed{6}     line by line: mostly right

X is to move. A digit is a free square, by its number. + marks a line that wins, - one that the other side would win
with, * one with a single mark, of one's own. π_ref imitates both kinds of players, and it adds as the embedded world
does. It is trained on the game alone; evaluate.py measures what becomes of the sums. Restartable: what is in
out/tasks/ is not run again.
"""

import random
from functools import lru_cache
from pathlib import Path

from rewards import final_answers

FOLDER = Path("out/tasks/tictactoe")
LINES = ["123", "456", "789", "147", "258", "369", "159", "357"]
CHARACTERS = "0123456789+-*=;}XO/,:"

# ---------------------------------------------------------------------------------------------------------------------
# the game: a board is nine characters, X, O or the number of a free square; X begins


def reward(response: str, row: dict, finished: bool) -> float:
    """1 for a move, in the last box, that loses nothing against a perfect player."""
    found = final_answers(response) if finished else []
    return float(bool(found) and found[-1] in optimal(row["board"]))


def optimal(board):
    """The moves after which a perfect player gets as much as before."""
    return [move for move in free(board) if -value(play(board, move)) == value(board)]


@lru_cache(None)
def value(board):
    """Minimax: what the player who is to move can enforce. 1 is to win, 0 a draw, -1 to lose."""
    return max((-value(play(board, move)) for move in free(board)), default=0) if not lost(board) else -1


def lost(board):
    """By the player who is to move: the move before made a line."""
    return any(cells(board, line) in ("XXX", "OOO") for line in LINES)


def free(board):
    return [cell for cell in board if cell not in "XO"]


def player(board):
    return "XO"[board.count("X") > board.count("O")]


def play(board, move):
    return board.replace(move, player(board))


def cells(board, squares):
    return "".join(board[int(square) - 1] for square in squares)


def canonical(board):
    """One name for a position, its rotations and mirror images. (With X and O swapped it is none, for X begins.)"""
    marks, found = "".join("." if cell in free(board) else cell for cell in board), []
    for _ in range(4):
        marks = cells(marks, "741852963")  # turned
        found += [marks, cells(marks, "321654987")]  # and mirrored
    return min(found)


def split(rng, share=0.25):
    """The positions in which some moves are better than others → those to train on, those to test on.

    No rotation or mirror image of a position of the one is in the other.
    """
    boards = waiting = {"123456789"}
    while waiting:
        waiting = {play(board, move) for board in waiting if not lost(board) for move in free(board)}
        boards = boards | waiting
    boards = sorted(board for board in boards if not lost(board) and len(optimal(board)) < len(free(board)))
    kinds = sorted({canonical(board) for board in boards})
    held_out = set(rng.sample(kinds, round(share * len(kinds))))
    rng.shuffle(boards)
    return [[board for board in boards if (canonical(board) in held_out) == side] for side in (False, True)]


# ---------------------------------------------------------------------------------------------------------------------
# π_ref's demonstrations, and the experiment


def question(board):
    return f"{board[:3]}/{board[3:6]}/{board[6:]},{player(board)}:"


def worked(rng, board, slips):
    """Win, else block, else play well; with a cell misread here and there, on which the move then builds."""
    text, moves = "", {"+": [], "-": []}
    for line in LINES:
        seen = [*cells(board, line)]
        if rng.random() < slips:
            i = rng.randrange(3)
            seen[i] = rng.choice(["X", "O", line[i]])
        opened, own = free(seen), seen.count(player(board))
        sign = {(1, 2): "+", (1, 0): "-", (2, 1): "*"}.get((len(opened), own), ";")
        moves.setdefault(sign, []).extend(opened)
        text += "".join(seen) + sign
    return f"{text}\\boxed{{{rng.choice(moves['+'] or moves['-'] or optimal(board))}}}"


def demonstration(rng, progress, boards, share=0.3, slips=0.015):
    """The first half of the lessons is all worked, or the small model would never learn to read the lines."""
    board = rng.choice(boards)
    if progress < 0.5 or rng.random() < share:
        return question(board), worked(rng, board, slips)
    return question(board), f"\\boxed{{{rng.choice('123456789')}}}"


def main():
    from experiments import lab  # not above: a reward should load without torch
    from experiments.tasks import small

    asked = ["--prompt={question}", "--max_new_tokens=48"]
    parser = small.make_parser(__doc__, FOLDER, __file__, 60, asked)
    parser.add_argument("--lessons", type=int, default=1600, help="supervised steps of π_ref")
    args, folder = parser.parse_args(), lab.ROOT / FOLDER
    learned, held_out = split(random.Random(0))
    for name, boards in dict(train=learned[:1024], test=held_out[:512]).items():
        small.write(folder / f"{name}.jsonl", [dict(question=question(board), board=board,
                                                    answer=" or ".join(optimal(board))) for board in boards])
    if not (folder / "world/tokenizer_config.json").exists():
        small.train_small(folder / "world", CHARACTERS, lambda *now: demonstration(*now, learned), sums=0.3,
                          steps=args.lessons)
    small.experiment(args, "tictactoe", FOLDER)


if __name__ == "__main__":
    main()
