import pytest
from matplotlib.container import BarContainer

from sltt_ext.analysis import plots


def bar_lengths(figure):
    return [
        [bar.get_width() for bar in container]
        for container in figure.axes[0].containers
        if isinstance(container, BarContainer)
    ]


def row_names(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def legend(figure):
    (legend,) = figure.legends or [figure.axes[0].get_legend()]
    return [text.get_text() for text in legend.get_texts()]


def test_bars_are_as_long_as_their_values():
    figure = plots.bars(
        ["first", "second"],
        {"a": [1, 2], "b": [3, 4]},
        xlabel="metres",
        spreads={"a": [0, 0.5], "b": [0, 0]},
        reference=1,
    )
    assert bar_lengths(figure) == [[1, 2], [3, 4]]
    assert row_names(figure) == ["first", "second"]
    assert legend(figure) == ["a", "b"]
    assert figure.axes[0].get_xlabel() == "metres"
    ends = [
        segment[:, 0].tolist()
        for collection in figure.axes[0].collections
        for segment in collection.get_segments()
    ]
    assert [1.5, 2.5] in ends
    assert [line.get_xdata() for line in figure.axes[0].lines if list(line.get_xdata()) == [1, 1]]


def test_bars_of_one_kind_need_no_legend():
    figure = plots.bars(["only"], {"rate": [0.5]}, xlabel="rate", limits=(0, 2))
    assert figure.legends == []
    assert figure.axes[0].get_xlim() == (0, 2)


def test_pieces_of_a_bar_follow_each_other():
    figure = plots.stacked_bars(["x", "y"], {"a": [1, 2], "b": [3, 4]}, xlabel="", title="both")
    first, second = figure.axes[0].containers
    assert [bar.get_x() for bar in first] == [0, 0]
    assert [bar.get_x() for bar in second] == [bar.get_width() for bar in first] == [1, 2]
    assert [bar.get_width() for bar in second] == [3, 4]
    assert figure.axes[0].get_title() == "both"


def test_lines_go_through_their_points():
    figure = plots.lines(
        {"a": [1, 4], "b": [2]}, {"a": [5, 6], "b": [7]}, xlabel="T", ylabel="MB", from_zero=True
    )
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [[[1, 5], [4, 6]], [[2, 7]]]
    assert figure.axes[0].get_xticks().tolist() == [1, 2, 4]
    assert figure.axes[0].get_ylim()[0] == 0
    assert legend(figure) == ["a", "b"]


@pytest.mark.parametrize("points", [3, 500])
def test_marks_do_not_run_into_each_other(points):
    figure = plots.lines({"a": range(points)}, {"a": range(points)}, xlabel="", ylabel="")
    figure.canvas.draw()
    marks = figure.axes[0].get_xticks()
    assert len(marks) <= 12
    assert all(mark == int(mark) for mark in marks)
