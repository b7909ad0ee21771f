"""Several processes and nodes, signals, kills at random moments, long runs."""

import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import (
    HERE,
    LONG,
    close,
    evaluation,
    inside,
    kill,
    long,
    long_value,
    metrics,
    read_jsonl,
    refused,
    run,
    stage1,
    stage2,
    start,
    torchrun,
    wait_until,
    weights,
    whole,
)


@long
def test_two_processes_write_stage1_and_an_evaluation_like_one(undisturbed, tmp_path):
    torchrun(2, *stage1(tmp_path / "vstar.jsonl"))
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()
    inside(*evaluation(tmp_path / "one", "--reference=tiny/model"))
    torchrun(2, *evaluation(tmp_path / "two", "--reference=tiny/model"))
    for path in (tmp_path / "one").glob("*.json*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@long
@pytest.mark.parametrize("more", [[], ["--lora=4", "--lr=3e-3"]])
def test_checkpoints_between_one_two_and_four_ranks(more, trained, all_rows, tmp_path):
    """A run of two processes goes on on four, and then on one."""
    one = trained[0]
    if more:
        one = tmp_path / "one"
        inside(*stage2(all_rows, one, *more))
    for count, steps in ((2, 1), (4, 2), (1, 4)):
        torchrun(count, *stage2(all_rows, tmp_path / "run", *more, f"--steps={steps}"))
    close(metrics(tmp_path / "run")[2:], metrics(one)[2:5])


@whole
@pytest.mark.parametrize("signals,code,line", [
    ("SIGINT SIGINT", 130, "ended at once; the same command resumes from the last checkpoint"),
    long_value(("SIGINT SIGTERM", 143, "ended at once")),  # torchrun's, for a second Ctrl-C
    long_value(("SIGTERM SIGTERM", 143, "stopped and saved after step 1")),  # a scheduler may repeat itself
    long_value(("SIGINT", 130, "stopped and saved after step 1")),
])
def test_a_second_ctrl_c_ends_the_run_at_once(signals, code, line, all_rows, tmp_path):
    """The first waits for the step, which is long here."""
    path, step = tmp_path / "metrics.jsonl", ["--batch_size=1000", "--eval_limit=1", "--show_every=0"]
    process = start(*stage2(all_rows, tmp_path, *step), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: path.exists() and path.read_text(), process)
    for name in signals.split():
        process.send_signal(signal.Signals[name])
        time.sleep(0.2)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == code, output
    assert line in output.strip().splitlines()[-1] and output.count("stopping after this step") == 1
    assert (tmp_path / "checkpoint").exists() == ("saved" in line)


def nodes(count, each, *command, **more):
    """Several machines, as far as the processes can tell: an agent for each, with its own share of the
    cores. They meet at an address."""
    cores = sorted(os.sched_getaffinity(0))
    pin = lambda node: lambda: os.sched_setaffinity(0, cores[node::count] or cores)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    sizes = [f"--nnodes={count}", f"--nproc_per_node={each}", "--local_addr=127.0.0.1"]
    agent = ["-m", "torch.distributed.run", *sizes, *meet]
    node = lambda number: start(*agent, *command, start_new_session=True, preexec_fn=pin(number), **more)
    first = node(0)
    wait_until(lambda: is_open(port), first)  # it has the store
    return [first, *map(node, range(1, count))]


def is_open(port):
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


def descendants(parent):
    """The ids of a process's children, and of theirs."""
    command = ["ps", "-o", "pid=", "--ppid", str(parent)]
    children = [int(line)
                for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]
    return children + [below for child in children for below in descendants(child)]


@whole
@pytest.mark.parametrize("end,line", [
    ("vstar.fail('the disk is full')", "error: the disk is full"),
    long_value(("raise KeyError('lost')", "KeyError: 'lost'")),
    ("os.kill(os.getpid(), signal.SIGKILL)", "has been silent for 3 seconds|another process is gone"),
    long_value(("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", "")),
    long_value(("train.fail_together('NaN')", "error: NaN"))])
@pytest.mark.parametrize("waits", ["vstar.barrier('never')", long_value("torch.distributed.barrier()")])
def test_where_one_process_ends_those_of_another_node_do(end, line, waits, tmp_path):
    """Within seconds, wherever they wait; the one that knows says why, and the other nothing."""
    (tmp_path / "it.py").write_text(f"""if True:
        import os, signal, sys, time
        sys.path.insert(0, {str(HERE)!r})
        import torch, train, vstar
        vstar.SILENCE = 3

        def main():
            torch.distributed.init_process_group("gloo")
            vstar.barrier("both are here")
            if vstar.RANK == 1:
                {end}
            elif {end.startswith("train")}:
                train.fail_together("NaN")
            {waits}

        vstar.run_script(main)
    """)
    both = nodes(2, 1, tmp_path / "it.py", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    outputs = [node.communicate(timeout=60)[0] for node in both]
    assert all(node.returncode != 0 for node in both)
    assert len(re.findall(line, "".join(outputs))) == 1 or not line, outputs
    traces = sum(output.count("it.py\", line") for output in outputs)  # torchrun's own name other files
    assert traces == end.startswith("raise"), outputs


@whole
def test_nodes_that_do_not_share_the_folder_are_told_at_the_start(all_rows, tmp_path):
    (tmp_path / "it.py").write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(HERE)!r})
        import train, vstar
        sys.argv.append(f"--out={tmp_path}/{{vstar.RANK}}")
        vstar.run_script(train.main)
    """)
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "it.py",
               *stage2(all_rows, tmp_path / "elsewhere")[1:], check=False)
    assert done.stderr.count("error: ") == 1 and "all nodes must share it" in done.stderr, done.stderr
    assert not (tmp_path / "0/metrics.jsonl").exists()


def test_another_launcher_than_torchrun_is_refused():
    done = run("vstar.py", "--overwrite", check=False, RANK="0", WORLD_SIZE="2")
    refused(done, "started by torchrun")


@long
def test_two_nodes_train_like_one(trained, all_rows, undisturbed, tmp_path):
    """Both stages on two nodes; one dies in the middle of Stage 2, and the same commands go on to the same
    result."""
    for node in nodes(2, 1, *stage1(tmp_path / "vstar.jsonl")):
        assert node.wait(timeout=300) == 0
    assert (tmp_path / "vstar.jsonl").read_bytes() == undisturbed[0].read_bytes()
    both = nodes(2, 1, *stage2(all_rows, tmp_path / "run"))
    wait_until(lambda: (tmp_path / "run/checkpoint/00000002").exists(), *both)
    ranks = descendants(both[0].pid) + descendants(both[1].pid)
    kill(both[1])  # a node is gone; the other's agent gives up after five minutes, or a scheduler ends it
    time.sleep(1)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert both[0].wait(timeout=60) != 0 and not (tmp_path / "run/model").exists()
    for node in nodes(2, 1, *stage2(all_rows, tmp_path / "run")):
        assert node.wait(timeout=300) == 0
    close(metrics(tmp_path / "run"), metrics(trained[0]))


@long
def test_random_kills_over_both_stages(undisturbed, tmp_path):
    """kill -9 at random moments (five; LONG=1: fifty); the same command, until it ends by itself: the same
    bits."""
    rng, kills = random.Random(2), 50 if LONG else 5
    rows = lambda name: tmp_path / name / "vstar.jsonl"
    more = ["--steps=60", "--batch_size=64", "--eval_every=20", "--tokens_per_microbatch=8000"]
    quiet = dict(shell=True, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def both(name):
        stages = stage1(rows(name)), stage2(rows(name), tmp_path / name / "run", *more)
        return " && ".join(shlex.join([sys.executable, *map(str, stage)]) for stage in stages)

    subprocess.run(both("whole"), check=True, **quiet)
    for _ in range(kills):
        process = subprocess.Popen(both("killed"), start_new_session=True, **quiet)
        time.sleep(rng.uniform(4, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(both("killed"), check=True, **quiet)
    assert rows("killed").read_bytes() == rows("whole").read_bytes() == undisturbed[0].read_bytes()
    one, other = (tmp_path / name / "run" for name in ("killed", "whole"))
    assert metrics(one) == metrics(other) and weights(one) == weights(other)


@long
def test_a_long_run_stays_as_small_as_it_began(all_rows, tmp_path):
    """Memory and open files from outside, over 80 steps (LONG=1: a thousand)."""
    more = ["--batch_size=64", "--tokens_per_microbatch=8000", "--eval_every=1000", "--save_every=20"]
    process = start(*stage2(all_rows, tmp_path, f"--steps={1000 if LONG else 80}", *more))
    resident, files, path = [], [], tmp_path / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and len(read_jsonl(path)) > 10:  # it has begun
            try:
                resident.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
            except OSError:
                break  # it has just ended
        time.sleep(0.1)
    assert process.wait() == 0 and len(resident) > 20
    fifth = len(resident) // 5
    assert np.median(resident[-fifth:]) < 1.1 * np.median(resident[fifth : 2 * fifth])
    # the first save opens some for good
    assert np.median(files[-fifth:]) <= np.median(files[2 * fifth : 3 * fifth])
