"""Pictures: what they say is right, and they can be drawn of every run there may be."""

import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.nn import functional as F

from tilelab.nets import pictures


def history(epochs):
    return [
        {"epoch": n, "test_loss": 1 / n, "train_accuracy": 1 - 0.5 / n, "accuracy": 1 - 0.4 / n}
        for n in range(1, epochs + 1)
    ]


def texts(figure):
    """Everything that is written in a figure, tick labels and titles included."""
    figure.canvas.draw()
    found = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return [text for text in found if text]


def drawn(figure, low=400):
    """The figure's pixels [H, W, 3], after checking that there is something in them."""
    pixels = imread(io.BytesIO(pictures.png(figure)))[..., :3]
    assert min(pixels.shape[:2]) > 50 and pixels.shape[1] >= low
    assert pixels.std() > 0.01  # not all white
    assert np.all(pixels[0] == 1) or np.all(pixels[-1] == 1)  # nothing is cut off at both edges
    return pixels


@pytest.mark.parametrize("epochs", [1, 3, 100])
def test_curves(epochs):
    figure = pictures.curves(history(epochs), torch.linspace(2, 0.1, 7 * epochs))
    written = texts(figure)
    for label in ("Loss", "Accuracy", "cross-entropy (nats)", "images classified correctly"):
        assert label in written
    assert written.count("epoch") == 2 and f"{1 - 0.4 / epochs:.1%}" in written
    left, right = figure.axes
    steps, mean, held_out = left.get_lines()
    assert steps.get_xdata()[-1] == held_out.get_xdata()[-1] == epochs  # on one scale of epochs
    np.testing.assert_allclose(
        held_out.get_ydata(), [line["test_loss"] for line in history(epochs)]
    )
    np.testing.assert_allclose(mean.get_ydata()[len(mean.get_ydata()) // 2], 1.05, rtol=0.2)
    assert right.get_lines()[1].get_ydata()[-1] == pytest.approx(1 - 0.4 / epochs)
    drawn(figure)


def test_curves_of_a_perfect_run_and_of_one_step():
    perfect = [{"epoch": 1, "test_loss": 0.0, "train_accuracy": 1.0, "accuracy": 1.0}]
    drawn(pictures.curves(perfect, torch.tensor([0.0])))


def test_the_running_mean_is_one():
    values = np.arange(100.0)
    smooth = pictures._smooth(values, share=0.1)  # over 5 to each side
    np.testing.assert_allclose(smooth[5:-5], values[5:-5])
    assert smooth[0] == values[:6].mean() and smooth[-1] == values[-6:].mean()


def test_confusion_says_every_number():
    matrix = torch.tensor([[97, 3, 0], [1, 1200, 11], [0, 0, 50]])
    written = texts(pictures.confusion(matrix, ("ant", "bee", "cat")))
    for number in ("97", "3", "1", "1,200", "11", "50"):
        assert number in written, number
    for share in ("97%", "99%", "100%"):  # recall: 97/100, 1200/1212, 50/50
        assert share in written, share
    assert "82%" in written  # precision of cat: 50/61
    assert "Confusion matrix: 1,347 of 1,362 held-out images right (98.9%)" in written
    assert {"true", "predicted", "ant", "bee", "cat"} <= set(written)


def test_confusion_has_true_classes_in_rows():
    matrix = torch.tensor([[5, 4], [0, 5]])  # four images of class 0 were taken for class 1
    figure = pictures.confusion(matrix, ("a", "b"))
    (four,) = [text for text in figure.axes[0].texts if text.get_text() == "4"]
    column, row = four.get_position()
    assert (row, column) == (0, 1)
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # row 0 is above


@pytest.mark.parametrize("classes", [2, 10, 26, 62])
def test_confusion_of_many_classes_and_of_classes_that_never_occur(classes):
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    matrix[0, 1] = 7  # no hit at all, and classes 1 and more have no image
    figure = pictures.confusion(matrix, tuple(f"class {n}" for n in range(classes)))
    assert ("7" in texts(figure)) == (classes <= 30)
    drawn(figure)


@pytest.mark.parametrize("filters", [1, 8, 16, 200])
def test_filters_of_a_convolution(filters):
    weight, bias, image = torch.randn(filters, 1, 3, 5), torch.randn(filters), torch.randn(20, 28)
    figure = pictures.filters(weight, bias, image)
    shown = min(filters, 32)
    images = [image.get_array() for image in figure.axes[0].images]
    assert len(images) == 2 * shown
    np.testing.assert_array_equal(images[0], weight[0, 0])
    seen = F.conv2d(image[None, None], weight, bias).relu()[0]
    np.testing.assert_allclose(images[shown + shown // 2], seen[shown // 2], rtol=1e-6)
    assert f"{shown} filters of 3 x 5 pixels" in " ".join(texts(figure))
    assert "weight" in texts(figure)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high and high == pytest.approx(weight[:shown].abs().max().item())
    drawn(figure)


def test_filters_of_a_linear_layer_are_pictures_too():
    weight, image = torch.randn(128, 6 * 9), torch.randn(6, 9)
    figure = pictures.filters(weight, torch.zeros(128), image)
    assert len(figure.axes[0].images) == 32
    np.testing.assert_array_equal(figure.axes[0].images[1].get_array(), weight[1].view(6, 9))
    assert "The first layer: 32 of 128 units" in texts(figure)


def test_filters_that_are_all_zero():
    drawn(pictures.filters(torch.zeros(16, 1, 3, 3), torch.zeros(16), torch.zeros(9, 9)))


def predictions():
    """Five images of three classes: three mistakes, of 60, 90 and 75 percent."""
    labels = torch.tensor([0, 1, 2, 0, 1])
    probability = torch.tensor(
        [[0.3, 0.6, 0.1], [0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.05, 0.2, 0.75], [0.1, 0.8, 0.1]]
    )
    return torch.randint(0, 256, (5, 12, 10), dtype=torch.uint8), labels, probability


def test_mistakes_begin_with_the_most_confident():
    images, labels, probability = predictions()
    figure = pictures.mistakes(images, labels, probability, ("a", "b", "c"))
    shown = [image.get_array() for image in figure.axes[0].images]
    np.testing.assert_array_equal(shown, images[[2, 3, 0]])
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["c → a", "90%", "a → c", "75%", "a → b", "60%"]
    assert "3 of 5 held-out images wrong (true → predicted, with its probability)" in texts(figure)
    drawn(figure)


def test_only_the_worst_mistakes_are_drawn():
    figure = pictures.mistakes(*predictions(), ("a", "b", "c"), limit=2)
    assert len(figure.axes[0].images) == 2
    assert "3 of 5 held-out images wrong; the 2 worst" in " ".join(texts(figure))


def test_no_mistake_is_said():
    images, _, probability = predictions()
    figure = pictures.mistakes(images, probability.argmax(1), probability, ("a", "b", "c"))
    assert not figure.axes[0].images and "No mistake in 5 held-out images" in texts(figure)
    drawn(figure)


def test_drawing_changes_no_settings():
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.png(pictures.curves(history(2), torch.ones(4)))
    assert dict(matplotlib.rcParams) == before
