"""What the words of a picture cover."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def assert_words_are_apart(figure: Figure, slack: float = 0.0) -> int:
    """No words overlap, by more than `slack` pixels on each side, and none is cut off.

    Returns:
        How many texts there are beside those of the axes, which count as one.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    of_axes = [text for axis in axes for text in axis.findobj(Text)]
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    own = [text.get_window_extent(renderer) for text in texts if text not in of_axes]
    boxes = [*own, *(box for axis in axes if (box := axis.get_tightbbox(renderer)))]
    for box in boxes:
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-slack).overlaps(other.padded(-slack))
    return len(own)
