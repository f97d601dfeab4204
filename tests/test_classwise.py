"""Operators for every class: what they find, what they leave, and that they do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdu.defenses.classwise import (
    KINDS,
    NEXT,
    Found,
    Patch,
    Pattern,
    Search,
    Warp,
    invert_every_class,
)
from bdu.defenses.classwise import judge as judged
from bdu.defenses.protocol import Samples

# Nearly all are wanted: around a smaller share the search swings, and where it ends is chance.
QUICK = Search(steps=150, batch_size=64, wanted=0.98, judged_on=200)


class Places(nn.Module):
    """The class is where in row 2 a pixel is bright; more pixels lead to classes 3, 7 and 7."""

    def __init__(self, *, weak: float = 40.0, backdoor: float = 40.0, own: float = 0.0) -> None:
        super().__init__()
        self.weak, self.backdoor, self.own = weak, backdoor, own

    def forward(self, x):
        def one(label):
            return functional.one_hot(torch.tensor(label), 10)

        return (
            10 * x[:, 0, 2, :10]
            + self.weak * one(3) * x[:, 0, 0, :1]
            + self.backdoor * one(7) * x[:, 0, 9, 9:10]
            + self.own * one(7) * x[:, 0, 5, 5:6]
        )


@pytest.fixture(scope="module")
def clean():
    y = torch.arange(200) % 10
    x = torch.zeros(200, 1, 12, 14)
    x[torch.arange(200), 0, 2, y] = 0.8
    return Samples(x, y)


@pytest.fixture(scope="module")
def pair():
    return Places().eval(), Places(backdoor=0.0).eval()


@pytest.fixture(scope="module")
def found(pair, clean):
    return invert_every_class(*pair, clean, seed=0, settings=QUICK)


def test_what_the_copy_has_lost_is_found_and_what_both_have_is_not(found):
    kind = list(found.operators).index("pattern")
    assert found.targets.tolist() == [*range(10), NEXT]
    assert found.fooled[kind, 7] > 0.9
    others = [t for t in range(11) if t != 7]
    assert found.fooled[kind, others].max() < 0.3


def test_what_is_not_judged_is_found_alike(pair, clean, found):
    other = invert_every_class(*pair, clean, seed=0, settings=replace(QUICK, judged_on=0))
    assert float(other.fooled.max()) == 0
    assert bool(other.sizes.isnan().all())
    for kind, operator in other.operators.items():
        for name, value in operator.state_dict().items():
            assert torch.equal(value, found.operators[kind].state_dict()[name])


def test_an_attack_from_all_classes_to_all_is_found(clean):
    class AllToAll(Places):
        def forward(self, x):
            return super().forward(x) + 40 * x[:, 0, 9, 9:10] * x[:, 0, 2, :10].roll(1, 1)

    models = AllToAll(backdoor=0.0).eval(), Places(backdoor=0.0).eval()
    found = invert_every_class(*models, clean, seed=0, settings=QUICK)
    kind = list(found.operators).index("pattern")
    assert found.targets[(found.fooled / found.sizes)[kind].argmax()] == NEXT
    assert found.fooled[kind, -1] > 0.9


def test_a_copy_that_errs_on_the_trigger_hides_it_only_from_the_strict(clean):
    class Errs(Places):
        def forward(self, x):
            return (
                super().forward(x)
                + 4000 * functional.one_hot(torch.tensor(2), 10) * x[:, 0, 9, 9:10]
            )

    models = Places(weak=0.0).eval(), Errs(weak=0.0, backdoor=0.0).eval()
    fooled = {}
    for strict in (True, False):
        settings = replace(QUICK, strict=strict)
        made = invert_every_class(*models, clean, seed=0, settings=settings)
        again = Found.from_state(made.state(), clean.x.shape[1:])
        torch.testing.assert_close(judged(again, *models, clean)[0], made.fooled)
        fooled[strict], sizes = made.fooled, made.sizes
    patterns, patches, warps = (list(KINDS).index(kind) for kind in ("pattern", "patch", "warp"))
    assert fooled[True][patterns, 7] < 0.3
    for kind in (patterns, patches):
        assert fooled[False][kind, 7] > 0.9
        assert (fooled[False] / sizes)[kind].nan_to_num(0.0).argmax() == 7
    assert torch.equal(fooled[True][warps], fooled[False][warps])


def test_it_is_found_where_it_is(found, clean):
    rows = torch.full((len(clean),), 7)
    moved, sizes = found.operators["pattern"](clean.x, rows)
    change = (moved - clean.x).abs().mean((0, 1))
    assert divmod(int(change.argmax()), 14) == (9, 9)
    assert sizes.shape == (200,)
    torch.testing.assert_close(sizes, (moved - clean.x).abs().flatten(1).mean(1))
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_of_two_ways_to_a_class_that_is_taken_which_the_copy_does_not_know(clean):
    models = Places(own=60.0).eval(), Places(own=60.0, backdoor=0.0).eval()
    found = invert_every_class(*models, clean, seed=0, settings=QUICK)
    moved, _ = found.operators["pattern"](clean.x, torch.full((len(clean),), 7))
    change = (moved - clean.x).mean((0, 1))
    assert change[9, 9] > 0.1
    assert change[5, 5] < 0.02


def test_an_operator_that_is_found_to_work_is_drawn_most(found, pair, clean):
    generator = torch.Generator().manual_seed(0)
    model, reference = pair
    moved = found.move(clean.x, clean.y, generator)
    called = model(moved).argmax(1)
    others = clean.y != 7
    assert (called == 7)[others].float().mean() > 0.7
    assert (reference(moved).argmax(1) == clean.y).float().mean() > 0.7
    again = found.move(clean.x, clean.y, torch.Generator().manual_seed(0))
    assert torch.equal(again, moved)


def test_rows_are_drawn_as_though_they_always_worked(found):
    rows = found.targets == 2
    drawing = found.drawing(rows)
    for kind, before, after in zip(KINDS.values(), found.fooled, drawing.fooled, strict=True):
        assert torch.equal(after[~rows], before[~rows])
        wanted = before[rows] if kind.always_strict else torch.ones(1)
        assert torch.equal(after[rows], wanted)
    assert drawing.operators is found.operators


def test_no_image_is_moved_by_the_operator_of_its_own_class(clean):
    class Mark(nn.Module):
        def forward(self, x, rows):
            return torch.full_like(x, 1.0) * rows.view(-1, 1, 1, 1), rows.float()

    targets = torch.tensor([*range(10), NEXT])
    marks = Found({"one": Mark(), "two": Mark()}, targets, torch.ones(2, 11), torch.zeros(2, 11))
    for seed in range(20):
        rows = marks.move(clean.x, clean.y, torch.Generator().manual_seed(seed))[:, 0, 0, 0]
        assert not (rows == clean.y).any()
    nothing = Found(marks.operators, targets, torch.zeros(2, 11), torch.zeros(2, 11))
    drawn = [nothing.move(clean.x, clean.y, torch.Generator().manual_seed(s)) for s in range(9)]
    rows = torch.stack(drawn)[:, :, 0, 0, 0]
    assert not (rows == clean.y).any()
    assert len(rows.unique()) == 11


def test_a_state_rebuilds_it(found, clean):
    again = Found.from_state(found.state(), clean.x.shape[1:])
    assert torch.equal(again.fooled, found.fooled)
    moved = [f.move(clean.x, clean.y, torch.Generator().manual_seed(3)) for f in (found, again)]
    assert torch.equal(*moved)
    assert not any(p.requires_grad for m in again.operators.values() for p in m.parameters())


def test_the_models_are_left_alone_and_seeds_decide(clean):
    def made(seed):
        torch.manual_seed(seed)  # of the caller, which must not matter
        first, second = (nn.Sequential(nn.Flatten(), nn.Linear(168, 10)) for _ in range(2))
        with torch.no_grad():
            for number, model in enumerate((first, second)):
                model[1].weight.copy_(torch.linspace(-1, 1 + number, 1680).view(10, 168).sin())
                model[1].bias.zero_()
        before = first[1].weight.clone()
        state = torch.random.get_rng_state()
        found = invert_every_class(
            *(first, second, clean), seed=1, settings=Search(steps=3, judged_on=20)
        )
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.equal(first[1].weight, before)
        assert first[1].weight.grad is None
        assert second[1].weight.grad is None
        return found.state()["operators"]

    one, two = made(0), made(1)
    for kind, weights in one.items():
        for name, value in weights.items():
            assert torch.equal(value, two[kind][name]), (kind, name)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9)])
def test_a_patch_covers_its_places_with_its_colour_and_no_others(shape):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    patch = Patch(shape, 3)
    with torch.no_grad():
        patch.mask.fill_(-torch.inf)
        patch.mask[1, :, 1, 2] = torch.inf
        patch.mask[2, :, 0] = 0.0  # half of what was there
        patch.colour.fill_(-torch.inf)
    moved, sizes = patch(x, torch.tensor([0, 1, 2, 1]))
    wanted = x.clone()
    wanted[1::2, :, 1, 2] = 0
    wanted[2, :, 0] /= 2
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(moved, wanted, rtol=eps, atol=0)
    height, width = shape[1:]
    shares = torch.tensor([0, 1 / (height * width), 0.5 / height, 1 / (height * width)])
    torch.testing.assert_close(sizes, shares, rtol=height * width * eps, atol=0)


def test_a_patch_is_found_where_it_is(found, clean):
    patch = found.operators["patch"]
    kind = list(found.operators).index("patch")
    assert found.fooled[kind, 7] > 0.9
    assert divmod(int(patch.mask[7, 0].argmax()), 14) == (9, 9)
    assert patch.mask[7, 0, 9, 9].sigmoid() > 0.2
    assert found.sizes[kind, 7] < 0.05


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9)])
def test_a_warp_by_whole_pixels_shifts_the_image(shape):
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    warp = Warp(shape, 3)
    with torch.no_grad():
        warp.shifts.zero_()
        warp.shifts[1, 0] = 1.0  # to the right neighbour
        warp.shifts[2, 1] = -1.0  # to the upper one
    moved, sizes = warp(x, torch.tensor([0, 1, 2, 1]))
    eps = 64 * torch.finfo(torch.float32).eps * max(shape)
    torch.testing.assert_close(moved[0], x[0], rtol=0, atol=eps)
    torch.testing.assert_close(moved[1, :, :, :-1], x[1, :, :, 1:], rtol=0, atol=eps)
    torch.testing.assert_close(moved[1, :, :, -1], x[1, :, :, -1], rtol=0, atol=eps)
    torch.testing.assert_close(moved[2, :, 1:], x[2, :, :-1], rtol=0, atol=eps)
    torch.testing.assert_close(sizes, torch.tensor([0.0, 1, 1, 1]), rtol=0, atol=2e-3)


def test_a_pattern_depends_on_its_own_row_alone():
    pattern = Pattern((3, 6, 6), 4)
    x = torch.rand(2, 3, 6, 6)
    before = pattern(x, torch.tensor([1, 2]))[0]
    with torch.no_grad():
        pattern.addend[1] += 0.2
        pattern.shift[1] += 3.0
    after = pattern(x, torch.tensor([1, 2]))[0]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_of_many_classes_those_are_searched_that_one_model_alone_is_led_to(clean):
    found = invert_every_class(
        *(Places(weak=0.0).eval(), Places(weak=0.0, backdoor=0.0).eval(), clean),
        seed=0,
        settings=Search(steps=1, most_targets=2, judged_on=20),
    )
    assert len(found.targets) == 3
    assert 7 in found.targets
    assert found.targets[-1] == NEXT
    assert found.fooled.shape == (len(KINDS), 3)


def test_judging_counts_only_what_was_right_before(found, pair, clean):
    model, reference = pair
    fooled, sizes = judged(found, model, reference, clean)
    torch.testing.assert_close(fooled, found.fooled)
    wrong = Samples(clean.x, (clean.y + 1) % 10)
    fooled, sizes = judged(found, model, reference, wrong)
    assert not fooled.any()
    assert sizes.isnan().all()
    alone, _ = judged(found, model, None, clean)
    assert (alone >= found.fooled).all()
    only = torch.zeros(found.fooled.shape, dtype=torch.bool)
    only[0, 7] = True
    some, _ = judged(found, model, None, clean, only)
    assert some[0, 7] == alone[0, 7]
    assert int((some > 0).sum()) == 1


def test_every_step_is_shown(pair, clean):
    seen = []

    def wrap(steps):
        for step in steps:
            seen.append(step)
            yield step

    invert_every_class(*pair, clean, seed=0, settings=Search(steps=2, judged_on=10), wrap=wrap)
    assert seen == list(range(2 * len(KINDS)))
