"""Tic-tac-toe, the example of a task of one's own: a position, and a move that a perfect player could make.

    python -m experiments.tasks.tictactoe    → out/tasks/tictactoe/: π_ref, problems and files of flags
    python vstar.py @out/tasks/tictactoe/vstar.args
    python train.py @out/tasks/tictactoe/train.args

    X2O/4X6/78O,X:\\boxed{4}                                   the first that comes to mind: mostly wrong
    X2O/4X6/78O,X:X2O;4X6*78O;X47*2X8*O6O-XXO;OX7;\\boxed{6}   line by line: mostly right

X is to move. A digit is a free square, by its number. + marks a line that wins, - one that the other side
would win with, * one with a single mark, of one's own. π_ref imitates both kinds of players, and it adds as
the embedded world does. Several seeds, in a table and a picture:

    python -m experiments.sweep tictactoe --stage1 @out/tasks/tictactoe/vstar.args \\
        --train @out/tasks/tictactoe/train.args --steps 60
"""

import argparse
import random
import re
from functools import cache
from pathlib import Path

from rewards import final_answers

FOLDER = Path("out/tasks/tictactoe")
LINES = ["123", "456", "789", "147", "258", "369", "159", "357"]
SIGNS = {(1, 2): "+", (1, 0): "-", (2, 1): "*"}  # of a line, by its free squares and one's own marks
CHARACTERS = "0123456789+-*=;}XO/,:"

# ------------------------------------------------------------------------------------------------------------
# the game: a board is nine characters, X, O or the number of a free square; X begins


def reward(response: str, row: dict, finished: bool) -> float:
    """1 for a move, in the last box, that loses nothing against a perfect player."""
    found = final_answers(response) if finished else []
    return float(bool(found) and found[-1] in optimal(row["board"]))


def optimal(board):
    """The moves after which a perfect player gets as much as before."""
    return [move for move in free(board) if -value(play(board, move)) == value(board)]


@cache
def value(board):
    """Minimax: what the player who is to move can enforce. 1 is to win, 0 a draw, -1 to lose."""
    if lost(board):
        return -1
    return max((-value(play(board, move)) for move in free(board)), default=0)


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
    """One name for a position, its rotations and mirror images. (Not with X and O swapped: X begins.)"""
    marks, found = re.sub(r"\d", ".", board), []
    for _ in range(4):
        marks = cells(marks, "741852963")  # turned
        found += [marks, cells(marks, "321654987")]  # and mirrored
    return min(found)


def split(rng):
    """The positions in which some moves are better than others → those to train on, those to test on.

    No rotation or mirror image of a position of the one is in the other.
    """
    boards, waiting = set(), {"123456789"}
    while waiting:
        boards |= waiting
        waiting = {play(board, move) for board in waiting for move in free(board)}
        waiting = {board for board in waiting if not lost(board)}
    boards = [board for board in sorted(boards) if len(optimal(board)) < len(free(board))]
    kinds = sorted({canonical(board) for board in boards})
    held_out = set(rng.sample(kinds, round(len(kinds) / 4)))
    rng.shuffle(boards)
    sides = [], []
    for board in boards:
        sides[canonical(board) in held_out].append(board)
    return sides


# ------------------------------------------------------------------------------------------------------------
# π_ref and its demonstrations


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
        sign = SIGNS.get((len(opened), own), ";")
        moves.setdefault(sign, []).extend(opened)
        text += "".join(seen) + sign
    move = rng.choice(moves["+"] or moves["-"] or optimal(board))
    return f"{text}\\boxed{{{move}}}"


def demonstration(rng, progress, boards):
    """The first half of the lessons is all worked, or the small model would never learn to read the lines."""
    board = rng.choice(boards)
    if progress < 0.5 or rng.random() < 0.3:
        return question(board), worked(rng, board, slips=0.015)
    return question(board), f"\\boxed{{{rng.choice('123456789')}}}"


def main():
    from tiny import make  # here: a reward should load without torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lessons", type=int, default=1600, help="supervised steps of π_ref")
    lessons = parser.parse_args().lessons
    learned, held_out = split(random.Random(0))

    def lesson(rng, args, progress):
        if rng.random() < 0.3:
            return make.demonstration(rng, args, progress)  # the embedded world's sums
        return demonstration(rng, progress, learned)

    problems = [dict(question=question(board), board=board) for board in learned[:1024] + held_out[:512]]
    make.make_world(FOLDER, problems[:1024], problems[1024:], lesson, CHARACTERS, lessons,
                    ["--reward=experiments/tasks/tictactoe.py:reward", "--max_new_tokens=48"],
                    ["--steps=60", "--eval_every=5"])


if __name__ == "__main__":
    main()
