import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltt_ext.errors import ConfigurationError
from sltt_ext.online import schedule
from sltt_ext.online.schedule import random_steps, runs, selected_steps


@given(time_steps=st.integers(1, 20), chunk=st.integers(1, 25), group=st.integers(1, 25), data=st.data())
def test_runs_split_the_steps_in_order_without_mixing(time_steps, chunk, group, data):
    selected = data.draw(st.sets(st.integers(0, time_steps - 1)))
    split = list(runs(time_steps, selected, chunk, group))
    assert [t for start, stop, _ in split for t in range(start, stop)] == list(range(time_steps))
    assert all(stop - start <= (chunk if chosen else group) for start, stop, chosen in split)
    assert all((t in selected) == chosen for start, stop, chosen in split for t in range(start, stop))


@given(time_steps=st.integers(1, 20), data=st.data())
def test_random_steps_are_k_different_ones(time_steps, data):
    k = data.draw(st.integers(1, time_steps))
    steps = selected_steps(random_steps(k), time_steps, None)
    assert len(steps) == len(set(steps)) == k
    assert set(steps) <= set(range(time_steps))


def test_every_step_is_drawn_equally_often():
    counts = [0] * 6
    for _ in range(3000):
        for t in selected_steps(random_steps(2), 6, None):
            counts[t] += 1
    assert all(850 < count < 1150 for count in counts)


def test_a_draw_is_not_captured_in_a_cuda_graph(monkeypatch):
    """Every replay would back-propagate the same steps."""
    monkeypatch.setattr(schedule, "capturing", lambda: True)
    with pytest.raises(ConfigurationError, match="capture without k"):
        random_steps(2)(6, None)
