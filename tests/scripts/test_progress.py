"""What long work says of itself where there is no terminal."""

import re
import time

import pytest

from tests.agents.contract.conftest import Maker
from tests.agents.contract.runs import new_agent
from totalprop.scripts.run import progress


def test_silent_work_speaks_at_growing_intervals(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.2)
    with progress.counted(3, "parts") as advance:
        advance()
        time.sleep(0.4)  # the first line comes after 0.2 s, the second after 0.6 s
        advance()
        time.sleep(0.4)
    captured = capsys.readouterr()
    assert captured.err == "1 of 3 parts\n2 of 3 parts\n" and captured.out == ""
    with progress.counted(3, "parts") as advance:  # done before there was anything to say
        advance()
    assert capsys.readouterr().err == ""


def test_a_run_that_becomes_slow_says_so_once(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace, agent = progress.Pace(), new_agent(Maker("pipps"))
    improve, seconds = type(agent)._improve_policy, iter([2.0, 3.0, 2.5, 14.0, 28.0, 28.0, 28.0])

    def timed(agent, show_progress):
        improve(agent, show_progress)
        now[0] += next(seconds)

    monkeypatch.setattr(type(agent), "_improve_policy", timed)
    agent.learn(7 * 14, pace)
    error = capsys.readouterr().err
    # 14 s are 5.6 times the median of 2, 3, 2.5; what comes after is not said again.
    assert error.startswith("a step takes 1 s, 6 times as long as before (load ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["pipps", "pilco"])
def test_a_policy_search_says_how_far_it_is(name, monkeypatch):
    agent, phases = new_agent(Maker(name)), []
    search = type(agent)._search

    def watched(agent, on_step):
        def spy(step, cost):
            on_step(step, cost)
            phases.append(agent.phase)

        return search(agent, spy)

    monkeypatch.setattr(type(agent), "_search", watched)
    agent.learn(7)
    pattern = r"trial 1: policy search on \d+ points, (\d+) of (\d+), cost -?\d+\.\d\d"
    numbers = [tuple(map(int, re.fullmatch(pattern, phase).groups())) for phase in phases]
    total = agent.gradient_steps
    assert numbers == [(i + 1, total) for i in range(len(phases))] and len(phases) >= total
    assert agent.phase == ""
