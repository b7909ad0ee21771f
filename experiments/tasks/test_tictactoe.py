"""Tic-tac-toe: the game, its reward, the split, and both stages at toy size."""

import random
import sys

import pytest

from experiments.tasks import tictactoe
from experiments.tasks.tictactoe import (
    LINES,
    canonical,
    cells,
    free,
    lost,
    optimal,
    play,
    split,
    value,
    worked,
)
from tests.helpers import HERE, inside, long, read_jsonl
from vstar import batched

SIDES = split(random.Random(0))


@pytest.mark.parametrize("board, moves, worth", [
    ("123456789", "123456789", 0),  # nothing is lost yet
    ("1234X6789", "1379", 0),  # the centre: a side would lose
    ("X23456789", "5", 0),  # a corner: all but the centre lose
    ("XX3OO6789", "3", 1),  # win now; 6 would only block
    ("XX34O6789", "3", 0),  # block
    ("X23OX678O", "23", 1),  # a fork: two lines at once
    ("X234O678X", "2468", 0),  # opposite corners: a corner runs into a fork
    ("XOXOOX7X9", "9", 0),  # block, and the board is full
    ("XOXXOOOXX", "", 0),  # full
    ("XXXOO6789", "", -1),  # X has just won
])
def test_positions_known_by_hand(board, moves, worth):
    assert value(board) == worth and lost(board) == (worth == -1)
    assert lost(board) or "".join(optimal(board)) == moves


@pytest.mark.parametrize("response, worth", [
    ("\\boxed{3}", 1),
    ("\\boxed{ 3 }", 1),
    ("\\boxed{6}\\boxed{3}", 1),  # the last counts
    ("\\boxed{3}\\boxed{6}", 0),
    ("\\boxed{6}", 0),
    ("\\boxed{1}", 0),  # taken
    ("3", 0),
    *((text, 0) for text in ("", "\\boxed{", "\\boxed{" * 5000, "\ud800\\boxed{\ud800}")),
    *((f"\\boxed{{{move}}}", 0) for move in ("", "X", "3\x00", "٣", "3.0", "36", "3" * 9999)),
])
def test_the_reward(response, worth):
    row = dict(board="XX3OO6789")
    assert tictactoe.reward(response, row, True) == worth
    assert tictactoe.reward(response, row, False) == 0


def test_all_ways_of_turning_a_position_have_one_name():
    corner = ["XO3456789", "X23O56789", "1OX456789", "12X45O789"]
    corner += ["1234567OX", "12345O78X", "123456XO9", "123O56X89"]
    assert len({canonical(board) for board in corner}) == 1
    assert canonical("XO3456789") != canonical("X2345678O")


def test_held_out_positions_are_new_in_every_direction():
    learned, held_out = SIDES
    assert len(learned) > 1024 and len(held_out) > 512  # what main() takes
    assert not set(map(canonical, learned)) & set(map(canonical, held_out))
    boards = {*learned, *held_out}
    assert len(boards) == len(learned + held_out) == 3191
    assert all(0 < len(optimal(board)) < len(free(board)) and not lost(board) for board in boards)
    assert split(random.Random(0)) == SIDES


def test_worked_demonstrations_are_right_unless_they_slip():
    rng, slipped = random.Random(0), 0
    for board in SIDES[0][:500]:
        text = worked(rng, board, slips=0)
        assert tictactoe.reward(text, dict(board=board), True)
        for line, (*seen, sign) in zip(LINES, batched(text, 4)):
            assert "".join(seen) == cells(board, line)
            if sign == "+":  # a move there wins
                assert lost(play(board, *free(seen)))
        slipped += not tictactoe.reward(worked(rng, board, slips=1), dict(board=board), True)
    assert slipped > 100
    board = "X2O4X678O"
    assert tictactoe.question(board) + worked(rng, board, 0) == (
        "X2O/4X6/78O,X:X2O;4X6*78O;X47*2X8*O6O-XXO;OX7;\\boxed{6}")


@long
def test_both_stages_at_toy_size(tmp_path, monkeypatch):
    """By the files of flags that it writes."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(tictactoe, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tictactoe", "--lessons=30"])
    (tmp_path / "world").mkdir()
    tictactoe.main()
    assert [len(read_jsonl(tmp_path / f"{name}.jsonl")) for name in ("train", "test")] == [1024, 512]
    inside("vstar.py", f"@{tmp_path}/vstar.args", "--limit=16", "--samples=2", "--engine=transformers")
    few = ["--steps=2", "--batch_size=8", "--eval_limit=8", "--engine=transformers"]
    inside("train.py", f"@{tmp_path}/train.args", *few)
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
