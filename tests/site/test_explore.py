"""The figures that a reader moves: every control works, and what they show is the package's."""

import functools
import re

import pytest
import torch
from bs4 import BeautifulSoup
from conftest import PAGES, SITE, visits

from cgn_tutorial import CGNOptimizer, Hessian, cg

KINDS = {
    "parabola": "auto_examples/plot_1_newton_step.html",
    "valley": "auto_examples/plot_1_newton_step.html",
    "paths": "auto_examples/plot_2_conjugate_gradients.html",
    "runs": "auto_examples/plot_3_matrix_free_optimization.html",
}
SLIDERS = [
    ("parabola", "x"),
    ("parabola", "lambda"),
    ("parabola", "gamma"),
    ("valley", "lambda"),
    ("valley", "gamma"),
    ("paths", "kappa"),
    ("paths", "steps"),
    ("runs", "run"),
]


@functools.cache
def soup(path):
    return BeautifulSoup((SITE / path).read_bytes(), "html.parser")


def kinds(path):
    return [script["data-explore"] for script in soup(path).select("script[data-explore]")]


class Figure:
    """A figure on an open page."""

    def __init__(self, page, kind):
        self.page = page
        number = kinds(KINDS[kind]).index(kind)
        self.box = page.locator(".explore").nth(number)
        self.picture = self.box.locator("svg")
        self.grip = self.box.locator(".grip")
        self.box.scroll_into_view_if_needed()

    def slider(self, name):
        return self.box.locator(f"input[name={name}]")

    def setting(self, name):
        """What a slider says it is set to, as it is read out."""
        return plain(self.slider(name).get_attribute("aria-valuetext"))

    def said(self):
        return plain(self.box.locator("output").inner_text())

    def numbers(self):
        return self.box.evaluate("(box) => box.numbers")

    def look(self):
        return self.picture.locator("> g").first.inner_html()

    def start(self):
        return [float(x) for x in re.findall(r"= (\S+?)(?:,|$)", self.grip_text())]

    def grip_text(self):
        return plain(self.grip.get_attribute("aria-valuetext"))

    def centre(self):
        box = self.grip.locator(".handle").bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def plain(text):
    return text.replace("−", "-")


def two_decimals(number):
    """A number as it is shown, with no sign before zero."""
    return f"{number:.2f}".replace("-0.00", "0.00")


DEVICES = {"mouse": {}, "touch": {"viewport": {"width": 375, "height": 800}, "has_touch": True}}
devices = pytest.mark.parametrize("device", DEVICES)

#: Remember where the sliders are at first, and put back those that have moved.
RESET = """
    (box) => {
      for (const input of box.querySelectorAll("input")) {
        input.dataset.first ??= input.value;
        if (input.value === input.dataset.first) continue;
        input.value = input.dataset.first;
        input.dispatchEvent(new Event("input"));
      }
    }"""


@pytest.fixture(scope="module")
def open_page(chromium):
    """Open a page, or find it open already: to open one takes longer than most tests."""
    with visits(chromium) as visit:
        yield functools.cache(lambda url, device: visit(url, **DEVICES[device]))


@pytest.fixture
def figure(open_page, server):
    """Show a figure with its sliders where they were at first, or on a page that is fresh."""

    def show(kind, device="mouse", address=server, fresh=False):
        page = open_page(f"{address}/{KINDS[kind]}", device)
        page.set_viewport_size(DEVICES[device].get("viewport", {"width": 1280, "height": 900}))
        page.emulate_media(media="screen", reduced_motion="reduce")
        if fresh:
            page.reload()
        figure = Figure(page, kind)
        figure.box.evaluate(RESET)
        assert page.problems == []
        return figure

    return show


def double(values):
    """A tensor as precise as the numbers in a browser."""
    return torch.tensor(values, dtype=torch.float64)


def damped_step(loss, start, lam, gamma):
    """One step of the package's optimizer: the Newton step v, where it ends, and the loss there."""

    def end(lr):
        x = torch.nn.Parameter(double(start))
        curvature = Hessian([[x]])
        options = {"damping": lam, "negative_curvature": "ignore", "tol": 0, "atol": 0}
        optimizer = CGNOptimizer([x], curvature, lr=lr, maxiter=x.numel(), **options)
        curvature.backward(loss(x), ())
        optimizer.step()
        return x.detach()

    x = end(gamma)
    return {"v": end(1.0) - double(start), "end": x, "after": loss(x)}


def check_step(figure, loss, start, lam, gamma):
    """Compare what the figure computes and says with a step of the package's optimizer."""
    there, here = damped_step(loss, start, lam, gamma), figure.numbers()
    for name, value in there.items():
        assert here[name] == pytest.approx(value.tolist(), rel=1e-9, abs=1e-9)
    assert f"{two_decimals(there['after'])} after" in figure.said()


def check_parabola(figure):
    x, lam, gamma = (float(figure.setting(name)) for name in ("x", "lambda", "gamma"))
    check_step(figure, lambda x: -torch.expm1(-(x**2) / 2), x, lam, gamma)
    assert f"to {two_decimals(figure.numbers()['end'])}" in figure.said()


def check_valley(figure):
    lam, gamma = (float(figure.setting(name)) for name in ("lambda", "gamma"))
    C = double([1.0, 20.0]).diag()
    check_step(figure, lambda x: x @ C @ x / 2, [10.0, 1.0], lam, gamma)


def check_paths(figure):
    """Compare with the paths of the package's `cg`, on page 2's quadratic for the same κ."""
    A, b = torch.tensor([[2, -1.8], [-1.8, 2.5]]).double(), torch.tensor([0.9, -0.1]).double()
    solution = torch.linalg.solve(A, b)
    Q = torch.linalg.eigh(A).eigenvectors
    A = Q @ double([1.0, float(figure.setting("kappa"))]).diag() @ Q.T
    b, x0 = A @ solution, double(figure.start())
    conjugate, descent = [x0], [x0]
    cg(A.mv, b, x0, tol=1e-12, atol=0, callback=conjugate.append)
    for _ in range(20):  # conjugate gradients that start afresh at every step
        descent.append(cg(A.mv, b, descent[-1], tol=1e-12, atol=0, maxiter=1).x)

    here = {name: double(walk["path"]) for name, walk in figure.numbers().items()}
    torch.testing.assert_close(here["conjugate"], torch.stack(conjugate), rtol=0, atol=1e-9)
    common = min(21, len(here["descent"]))  # it ends where nothing is left
    torch.testing.assert_close(
        here["descent"][:common], torch.stack(descent[:common]), rtol=0, atol=1e-9
    )
    assert f"1 % after {len(conjugate) - 1}" in figure.said().split("conjugate gradients: ")[1]


def check_runs(figure):
    """Compare with the table that the page printed."""
    run = int(figure.slider("run").input_value())
    (table,) = (
        block.get_text()
        for block in soup(KINDS["runs"]).select(".sphx-glr-script-out pre")
        if "of the layers, first step" in block.get_text()
    )
    damping, late, products, *lengths = table.splitlines()[1 + run].split()
    assert float(figure.setting("run")) == float(damping)
    assert late in figure.said()
    assert f"{products} products" in figure.said()
    layers = ("conv 1", "conv 2", "linear 1", "linear 2")
    for layer, length in zip(layers, lengths, strict=True):
        assert f"{layer} {length}" in figure.said()


CHECKS = {
    "parabola": check_parabola,
    "valley": check_valley,
    "paths": check_paths,
    "runs": check_runs,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_opens_with_the_pages_numbers(kind, figure, address, tally):
    CHECKS[kind](figure(kind, address=address, fresh=True))
    tally("figures to move × address: open with the package's numbers")


@pytest.mark.parametrize(("kind", "name"), SLIDERS)
def test_the_keyboard_moves_a_slider(kind, name, figure, tally):
    shown = figure(kind)
    settings, looks, said = set(), set(), set()
    shown.slider(name).focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "End", "ArrowLeft"):
        shown.page.keyboard.press(key)
        settings.add(shown.setting(name))
        looks.add(shown.look())
        said.add(shown.said())
        CHECKS[kind](shown)
    assert len(settings) == len(looks) == 5
    assert len(said) > 2
    tally("sliders: moved by the keyboard")


@devices
@pytest.mark.parametrize(("kind", "name"), SLIDERS)
def test_pointers_move_a_slider(kind, name, device, figure, tally):
    shown = figure(kind, device)
    slider = shown.slider(name)
    slider.scroll_into_view_if_needed()
    settings = {shown.setting(name)}
    for part in (0.1, 0.9):
        box = slider.bounding_box()
        at = box["x"] + part * box["width"], box["y"] + box["height"] / 2
        (shown.page.touchscreen.tap if device == "touch" else shown.page.mouse.click)(*at)
        settings.add(shown.setting(name))
        CHECKS[kind](shown)
    assert len(settings) == 3
    tally("sliders × mouse and touch: moved")


def drag(figure, right, down, device):
    """Drag the start by so many pixels, with the mouse or a finger."""
    x, y = figure.centre()
    ways = [(x + right * part, y + down * part) for part in (0.3, 0.6, 1)]
    if device == "mouse":
        figure.page.mouse.move(x, y)
        figure.page.mouse.down()
        for way in ways:
            figure.page.mouse.move(*way)
        return figure.page.mouse.up()
    finger = figure.page.context.new_cdp_session(figure.page)
    for kind, points in (
        ("touchStart", [(x, y)]),
        *(("touchMove", [way]) for way in ways),
        ("touchEnd", []),
    ):
        touches = [{"x": x, "y": y} for x, y in points]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    return None


@devices
@pytest.mark.parametrize("corner", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_pointers_drag_the_start_of_the_paths(corner, device, figure, tally):
    shown = figure("paths", device, fresh=True)
    shown.picture.scroll_into_view_if_needed()
    before = shown.page.evaluate("scrollY")
    drag(shown, 600 * corner[0], 600 * corner[1], device)
    check_paths(shown)
    assert shown.page.evaluate("scrollY") == before, "the page scrolled in place of the point"
    tally("start of the paths × mouse and touch: dragged")


@devices
def test_the_start_follows_the_pointer(device, figure, tally):
    shown = figure("paths", device, fresh=True)
    x, y = shown.centre()
    drag(shown, 60, -40, device)
    assert shown.centre() == pytest.approx((x + 60, y - 40), abs=1)
    drag(shown, -60, 40, device)
    assert shown.start() == pytest.approx([0, 0], abs=0.01)

    shown = figure("parabola", device)
    lands = shown.numbers()["end"]
    drag(shown, -80, 0, device)
    assert float(shown.setting("x")) < 1.2
    assert shown.numbers()["end"] != lands
    assert shown.slider("x").input_value() in shown.setting("x")
    tally("start of a figure × mouse and touch: follows the pointer", 2)


def test_the_arrow_keys_move_the_start(figure, tally):
    shown = figure("paths", fresh=True)
    shown.grip.focus()
    before = shown.page.evaluate("scrollY")
    for key, place in (("ArrowRight", [0.1, 0]), ("ArrowUp", [0.1, 0.1])):
        shown.page.keyboard.press(key)
        assert shown.start() == place
        check_paths(shown)
    for key in ("ArrowLeft", "ArrowDown"):
        shown.page.keyboard.press(key)
    assert shown.start() == [0, 0]
    CHECKS["paths"](shown)
    assert shown.page.evaluate("scrollY") == pytest.approx(before, abs=2)  # rounding
    tally("start of the paths: moved by the keyboard")


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_tells_its_state(kind, figure, tally):
    shown = figure(kind)
    output = shown.box.locator("output")
    assert output.get_attribute("aria-live") == "polite"
    assert shown.picture.get_attribute("aria-describedby") == output.get_attribute("id")
    assert len(shown.picture.get_attribute("aria-label").split()) > 10
    for slider in shown.box.locator("input").all():
        name = slider.evaluate("(input) => input.labels[0].innerText")
        assert name.strip().endswith(slider.get_attribute("aria-valuetext"))
    tally("figures to move: told to who cannot see them")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [375, 768, 1280])
def test_a_figure_fits_its_column(kind, width, figure, tally):
    shown = figure(kind)
    shown.page.set_viewport_size({"width": width, "height": 800})
    outside = """
        (box) => [...box.querySelectorAll("text")].filter((text) => {
          const [inner, outer] = [text, box].map((element) => element.getBoundingClientRect());
          return inner.left < outer.left - 1 || inner.right > outer.right + 1;
        }).map((text) => text.textContent)"""
    for name in [name for other, name in SLIDERS if other == kind]:
        for key in ("Home", "End"):
            shown.slider(name).press(key)
            assert shown.box.evaluate(outside) == []
            assert shown.page.evaluate(
                "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            )
    sizes = shown.box.evaluate("""
        (box) => {
          const svg = box.querySelector("svg");
          return [svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
                  parseFloat(getComputedStyle(svg.querySelector("text")).fontSize)];
        }""")
    assert sizes[0] * sizes[1] >= 12, "words in the drawing are too small"
    tally("figures to move × width: words inside, at 12 pixels or more")


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_prints_its_state_and_does_not_move_by_itself(kind, figure, tally):
    shown = figure(kind)
    shown.page.emulate_media(reduced_motion="no-preference")
    name = next(name for other, name in SLIDERS if other == kind)
    shown.slider(name).press("End")
    look, said = shown.look(), shown.said()
    moving = "(box) => document.getAnimations().filter((a) => box.contains(a.effect.target)).length"
    assert shown.box.evaluate(moving) == 0
    shown.page.emulate_media(media="print")
    assert shown.picture.is_visible()
    assert (shown.look(), shown.said()) == (look, said)
    tally("figures to move: print the state they are in")


@pytest.mark.parametrize("path", sorted(set(KINDS.values())))
def test_without_scripts_the_pictures_stay(path, server, visit, tally):
    page = visit(f"{server}/{path}", java_script_enabled=False)
    boxes = page.locator(".explore").all()
    assert len(boxes) == len(kinds(path))
    for box in boxes:
        assert box.locator("img.only-light").is_visible()
        assert box.locator("svg, input, output").count() == 0
        assert box.inner_text().strip() == ""
    tally("figures to move: pictures without scripts", len(boxes))


def test_only_their_pages_load_the_script_which_is_small(tally):
    script = SITE / "_static" / "explore.js"
    for path in PAGES:
        text = (SITE / path).read_text()  # which takes less time than its soup
        loaded = re.findall(r"<script\b[^>]*/explore\.js", text)
        assert len(loaded) == (path in KINDS.values()), path
        data = re.findall(r"<script\b[^>]*data-explore.*?</script>", text, re.DOTALL)
        assert sum(map(len, data)) < 30_000
    assert script.stat().st_size < 30_000
    assert [kind for path in sorted(set(KINDS.values())) for kind in kinds(path)] == list(KINDS)
    tally("pages: load the script if they need it", len(PAGES))
