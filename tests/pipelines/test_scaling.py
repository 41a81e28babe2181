"""Communication on paper: closed cases of the formulas, and the bytes that two processes really send."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "pipelines/benchmarks")
sys.path.insert(0, BENCHMARKS)

from scaling import (  # noqa: E402
    BACKWARD,
    Cluster,
    Setting,
    closed_seconds,
    efficiency,
    replayed_seconds,
    smallest_batch,
)
from step_messages import HALVES, Message, Work, buckets, messages, read_work  # noqa: E402

sys.path.remove(BENCHMARKS)

WORKER = Path(__file__).with_name("scaling_worker.py")
MIB = 2**20
EVEN = Cluster("even", inside=1e9, between=1e9, latency=0.0)


def work(*gradients: tuple[float, int]) -> Work:
    return Work("made up", 10**12, gradients, ((),), (), (), 0, 64)


@pytest.mark.parametrize("kind", HALVES)
def test_one_process_sends_nothing(kind: str) -> None:
    assert Message(kind, "gradients", MIB).sent(1) == 0


def test_a_ring_sends_every_byte_almost_twice() -> None:
    assert Message("all-reduce", "gradients", 1000).sent(2) == 1000
    assert Message("all-reduce", "gradients", 1000, times=3).sent(4) == 4500
    assert Message("all-gather", "weights", 1000).sent(4) == 750


def test_buckets_close_at_the_first_gradient_that_fills_them() -> None:
    arrivals = [(0.1, MIB // 2), (0.2, MIB), (0.3, 20 * MIB), (0.4, 6 * MIB), (0.9, 1), (1.0, 2)]
    assert buckets(arrivals) == [(0.3, 43 * MIB // 2), (0.4, 6 * MIB), (1.0, 3)]
    assert buckets(arrivals, cap=25 * MIB) == [(0.4, 55 * MIB // 2), (1.0, 3)]
    assert [share for share, _ in buckets(arrivals, cap=1)] == [0.1, 0.2, 0.3, 0.4, 0.9, 1.0]


def test_machines_of_eight_send_what_one_ring_sends() -> None:
    """2 (N - 1) / N of the bytes at any split, here through links that are alike."""
    for world in (2, 8, 64):
        seconds = EVEN.seconds(Message("all-reduce", "gradients", 10**9), world)
        assert seconds == pytest.approx(2 * (world - 1) / world)
    assert EVEN.seconds(Message("all-reduce", "gradients", 10**9), 1) == 0


def test_one_bucket_needs_nine_times_its_seconds_of_compute() -> None:
    """It is full when all is computed, so at 90% it may take a tenth of the step: by hand, no model."""
    setting = Setting(work((1.0, MIB)), EVEN)
    seconds = 9 * 2 * 63 / 64 * MIB / 1e9
    assert closed_seconds(setting) == pytest.approx(seconds, rel=1e-3)
    assert replayed_seconds(setting) == pytest.approx(seconds, rel=1e-3)
    assert closed_seconds(replace(setting, accumulate=3)) == pytest.approx(seconds / 3, rel=1e-3)


def test_what_hides_behind_the_backward_pass_costs_nothing() -> None:
    early, last = (0.0, 30 * MIB), (1.0, MIB)
    setting = Setting(work(early, last), EVEN)
    ring = 2 * 63 / 64 * MIB / 1e9
    compute = 1000 * ring  # its backward pass outlasts the first bucket
    assert efficiency(setting, compute) == pytest.approx(compute / (compute + ring), rel=1e-3)
    compute = 30 * ring  # the link is the limit
    limited = compute / (compute * (1 - BACKWARD) + 31 * ring)
    assert efficiency(setting, compute) == pytest.approx(limited, rel=1e-3)


def test_a_network_alone_is_efficient_and_others_wait_for_the_message_of_control() -> None:
    setting = Setting(work((1.0, MIB)), replace(EVEN, latency=1e-3))
    assert efficiency(replace(setting, world=1), 1e-9) == 1
    assert setting.blocked() == pytest.approx(1e-3, rel=1e-3)


def test_a_published_network_is_counted_as_its_authors_count_it() -> None:
    """XCiT-S12/16: 4.8 GFLOPs, as papers call multiply-adds (El-Nouby et al. 2021); no weight is left out."""
    found = read_work("imagenet/xcit_small_12_p16")
    assert found.flops / 2e9 == pytest.approx(4.8, rel=0.01)
    assert sum(size for _, size in found.gradients) == found.size == 4 * 26_253_304
    shares = [share for share, _ in found.gradients]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.2
    assert shares[-1] > 0.95
    assert found.batch == 1024


def test_accumulation_repeats_norms_and_loss_but_not_gradients_and_buffers() -> None:
    made = replace(work((1.0, MIB)), buffers=(64,), norms=(16, 32), loss=84)

    def sent(about: str, accumulate: int) -> float:
        found = messages(made, synced=True, accumulate=accumulate)
        return sum(one.size * one.times for one in found if one.about == about)

    assert [sent("norms", a) for a in (1, 3)] == [4 * 4 * 48, 3 * 4 * 4 * 48]
    assert [sent("loss", a) for a in (1, 3)] == [168, 504]
    assert [sent("gradients", a) for a in (1, 3)] == [MIB, MIB]
    assert [sent("buffers", a) for a in (1, 3)] == [64, 64]


def test_the_batch_found_is_the_smallest() -> None:
    setting = Setting(work((0.5, 30 * MIB), (1.0, 4 * MIB)), EVEN)
    batch = smallest_batch(setting)
    assert batch > 1
    assert efficiency(setting, batch * setting.sample_seconds) >= 0.9
    assert efficiency(setting, (batch - 1) * setting.sample_seconds) < 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters of TCP connections")
def test_two_processes_send_what_is_derived(tmp_path: Path) -> None:
    """By the kernel's count of each connection; gloo's headers are a few bytes for each piece of a tensor."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(WORKER), str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for name, volume in found["volumes"].items():
        assert volume["measured"] == pytest.approx(volume["gloo"], rel=2e-3), name
        if "sharded" not in name:  # gloo scatters gradients by reducing all of them
            assert volume["measured"] == pytest.approx(volume["derived"], rel=0.02), name
    # modules that run side by side, as a shortcut and what it skips, may come back in another order
    assert found["buckets"]["found"] == pytest.approx(found["buckets"]["derived"], rel=1e-3)
    assert len(found["buckets"]["found"]) == 4
