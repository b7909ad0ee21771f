"""Tic-tac-toe: the game, its reward, the split, and both stages at toy size."""

import random

import pytest

from experiments.tasks import tictactoe
from experiments.tasks.test_countdown import at_toy_size
from experiments.tasks.tictactoe import LINES, canonical, cells, free, lost, optimal, play, split, value, worked
from rewards import final_answers, load_reward
from test_apo import long

SIDES = split(random.Random(0))
HOSTILE = ["", "7", "####", "}" * 99, "\\boxed{", "\\boxed{" * 5000, "\\boxed{\\boxed{7}", "\ud800\\boxed{\ud800}",
           "\\boxed{" + "9" * 10000 + "}",
           *(f"\\boxed{{{move}}}" for move in ("", "{9}", "9\x00", "٩", "9.0", "-9", "99", "79", "None", "*", "[9]"))]


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


@pytest.fixture
def reward():
    return load_reward("experiments/tasks/tictactoe.py:reward")


def test_the_reward(reward):
    row = dict(board="XX3OO6789", answer="no move is read here")
    for response, worth in {"\\boxed{3}": 1, "\\boxed{6}": 0, "\\boxed{1}": 0, "3": 0, "\\boxed{6}\\boxed{3}": 1,
                            "\\boxed{3}\\boxed{6}": 0, "\\boxed{0}": 0, "\\boxed{X}": 0, "\\boxed{ 3 }": 1}.items():
        assert reward(response, row, True) == worth, response
        assert reward(response, row, False) == 0
    fork = dict(board="X23OX678O")
    assert [reward(f"\\boxed{{{move}}}", fork, True) for move in "12345"] == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("response", HOSTILE)
def test_hostile_text_earns_nothing(reward, response):
    assert reward(response, dict(board="XOXOOX7X9"), True) == 0.0


def test_all_ways_of_turning_a_position_have_one_name():
    board = "X2O4X678O"
    ways = ["123456789", "741852963", "987654321", "369258147", "321654987", "789456123", "147258369", "963852741"]
    turned = {"".join(cell if cell in "XO" else str(i + 1) for i, cell in enumerate(cells(board, way))) for way in ways}
    assert len(turned) > 1 and {canonical(other) for other in turned} == {canonical(board)}
    assert canonical("XO3456789") != canonical("X2345678O")
    assert {value(other) for other in turned} == {value(board)}


def test_held_out_positions_are_new_in_every_direction():
    learned, held_out = SIDES
    assert len(learned) > 1024 and len(held_out) > 512  # what main() takes
    assert not {canonical(board) for board in learned} & {canonical(board) for board in held_out}
    boards = [*learned, *held_out]
    assert len(boards) == len(set(boards)) == 3191
    assert all(0 < len(optimal(board)) < len(free(board)) and not lost(board) for board in boards)
    assert all(board.count("X") - board.count("O") in (0, 1) for board in boards)
    assert split(random.Random(0)) == SIDES


def test_worked_demonstrations_are_right_unless_they_slip():
    rng, slipped = random.Random(0), 0
    for board in SIDES[0][:500]:
        text = worked(rng, board, slips=0)
        (move,) = final_answers(text)
        assert move in optimal(board), (board, text)
        assert [text[4 * i : 4 * i + 3] for i in range(8)] == [cells(board, line) for line in LINES]
        for i, line in enumerate(LINES):  # the sign says what a move there does
            if text[4 * i + 3] == "+":
                (last,) = free(cells(board, line))
                assert lost(play(board, last))
        slipped += final_answers(worked(rng, board, slips=1))[0] not in optimal(board)
    assert slipped > 100
    assert tictactoe.question("X2O4X678O") + worked(rng, "X2O4X678O", 0) == (
        "X2O/4X6/78O,X:X2O;4X6*78O;X47*2X8*O6O-XXO;OX7;\\boxed{6}")


@long
def test_both_stages_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tictactoe, "split", lambda rng: [boards[:40] for boards in SIDES])
    found = at_toy_size(tictactoe, tmp_path, monkeypatch)
    assert found["runs"]["0"]["untrained"]["sums"].keys() == found["before"]["sums"].keys() >= {"accuracy", "2", "3"}
