from hypothesis import given
from hypothesis import strategies as st

from sltt_ext.online.schedule import runs


@given(time_steps=st.integers(1, 20), chunk=st.integers(1, 25), group=st.integers(1, 25), data=st.data())
def test_runs_split_the_steps_in_order_without_mixing(time_steps, chunk, group, data):
    selected = data.draw(st.sets(st.integers(0, time_steps - 1)))
    split = list(runs(time_steps, selected, chunk, group))
    assert [t for start, stop, _ in split for t in range(start, stop)] == list(range(time_steps))
    assert all(stop - start <= (chunk if chosen else group) for start, stop, chosen in split)
    assert all((t in selected) == chosen for start, stop, chosen in split for t in range(start, stop))
