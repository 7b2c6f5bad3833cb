"""The training head under pytest-benchmark: `python -m fmkernels bench`, or `pytest benchmarks` for its own tables."""

import time

import pytest


class Clock:
    """Seconds a call: a lap makes ``calls`` of them between two readings."""

    calls = 1

    def __call__(self) -> float:
        return time.perf_counter() / self.calls


clock = Clock()


@pytest.mark.benchmark(timer=clock)
def test_head(benchmark, session, case):
    def run(race, rounds):
        clock.calls = race.calls["fmkernels"]
        benchmark.pedantic(race.run_ours, setup=race.run_others, rounds=rounds)

    row = session.measure(case, run=run)
    benchmark.extra_info.update(row)
    assert "error" not in row, row["error"]
