"""Grad-CAM against its formula and an oracle, and the numbers that are made of heat maps."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdu import models
from bdu.monitor import panels
from bdu.monitor.attention import (
    attention_entropy,
    attribution_share,
    difference_mask,
    tar,
)
from bdu.monitor.gradcam import grad_cam, target_layer
from bdu.monitor.live import AttentionMonitor, Logger, TensorBoard, WeightsAndBiases


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(5)


def by_formula(model, layer, images, targets):
    """ReLU(Σ_k α_k A_k), image by image, with all of autograd."""
    kept = []

    def keep(module, args, output):
        kept.append(output.clone())
        return kept[-1].clone()  # a rectifier works in place

    handle = layer.register_forward_hook(keep)
    maps = []
    for image, target in zip(images, targets, strict=True):
        kept.clear()
        score = model(image[None])[0, target]
        (gradient,) = torch.autograd.grad(score, kept[0])
        alpha = gradient.mean((2, 3), keepdim=True)
        heat = (alpha * kept[0]).sum(1, keepdim=True).relu()
        maps.append(
            F.interpolate(heat, image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
        )
    handle.remove()
    return torch.stack(maps).detach()


class Deep(nn.Module):
    """With more than pooling between the last convolution and the logits."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(8 * 7 * 7, 12), nn.Linear(12, 4)

    def forward(self, x):
        h = self.relu(self.two(self.relu(self.one(x))))
        return self.head(F.gelu(self.hidden(h.flatten(1))))


NETWORKS = {
    "resnet18-w4": (lambda: models.build("resnet18-w4"), "layer4"),
    "wrn16-1": (lambda: models.build("wrn16-1"), None),
    "smallcnn": (lambda: models.build("smallcnn"), "features"),
    "deep": (Deep, "relu"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_heat_map_is_the_formula(name):
    make, expected = NETWORKS[name]
    model = make().eval()
    size = 16 if name == "deep" else 32
    images, targets = torch.rand(5, 3, size, size), torch.tensor([0, 1, 2, 3, 1])
    chosen = target_layer(model, images)
    assert expected is None or chosen == expected
    if name == "deep":
        chosen = "two"
    found = grad_cam(model, images, targets, layer=chosen, batch_size=2)
    exact = by_formula(model, model.get_submodule(chosen), images, targets)
    scale = float(exact.max())
    assert scale > 0
    tolerance = 2**10 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance * scale)


def test_linear_head_needs_no_backward(monkeypatch):
    model = models.build("resnet18-w4")

    def refuse(*args, **kwargs):
        raise AssertionError("differentiated")

    images = torch.rand(2, 3, 32, 32)
    expected = grad_cam(model, images, 3, layer="layer4")
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    assert torch.equal(grad_cam(model, images, 3, layer="layer4"), expected)
    with pytest.raises(AssertionError, match="differentiated"):
        grad_cam(model, images, 3, layer="layer3")


def test_captum_agrees():
    captum = pytest.importorskip("captum.attr")
    model = models.build("resnet18-w4").eval()
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([1, 0, 3, 9])
    for layer in ("layer4", "layer3", "layer2.1"):
        oracle = captum.LayerGradCam(model, model.get_submodule(layer))
        heat = oracle.attribute(images, target=targets, relu_attributions=True).detach()
        heat = F.interpolate(heat, (32, 32), mode="bilinear", align_corners=False)[:, 0]
        found = grad_cam(model, images, targets, layer=layer)
        torch.testing.assert_close(found, heat, rtol=1e-4, atol=1e-4 * float(heat.max()))


def vision_transformer(**changes):
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **settings, intermediate_size=24, image_size=32, patch_size=8, num_labels=4, **changes
    )
    return transformers.ViTForImageClassification(config)


def test_tokens_of_a_transformer_are_laid_out_as_the_grid_they_came_from():
    model = vision_transformer().eval()
    images = torch.rand(3, 3, 32, 32)
    name = target_layer(model, images)
    assert name == "vit.layers.2.layernorm_before"
    kept = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda m, a, out: kept.append(out.clone()) or kept[-1])
    (gradient,) = torch.autograd.grad(model(images).logits[:, 2].sum(), kept[0])
    handle.remove()
    grid = gradient[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    tokens = kept[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    heat = (grid.mean((2, 3), keepdim=True) * tokens).sum(1, keepdim=True).relu()
    expected = F.interpolate(heat, (32, 32), mode="bilinear", align_corners=False)[:, 0]
    found = grad_cam(model, images, 2)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("raising", [False, True])
def test_training_is_not_disturbed(raising):
    model = models.build("resnet18-w4").train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    images = torch.rand(2, 3, 32, 32)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    options = {"layer": "fc"} if raising else {}
    if raising:
        with pytest.raises(ValueError, match="layer: expected places in the output of fc"):
            grad_cam(model, images, 0, **options)
    else:
        grad_cam(model, images, 0)
        with torch.no_grad():
            grad_cam(model, images, 0, layer="layer2")
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
        assert p.requires_grad == (name != "conv1.weight")
    assert not any(m._forward_hooks for m in model.modules())
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "layer9"}, r"layer: expected a name .*'layer9'"),
        ({"targets": 10}, r"targets: expected classes in \[0, 10\)"),
        ({"targets": torch.tensor([1, 2, 3])}, r"targets: expected an integer or \(2,\)"),
        ({"targets": torch.tensor([1.0, 2.0])}, "targets: expected an integer"),
        ({"images": torch.rand(3, 32, 32)}, r"images: expected \(N, C, H, W\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    model = models.build("smallcnn")
    given = {"images": torch.rand(2, 3, 32, 32), "targets": 1, **options}
    with pytest.raises(ValueError, match=message):
        grad_cam(model, **given)


def test_model_without_places_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match="model: expected a layer whose output has places"):
        target_layer(model, torch.rand(1, 3, 4, 4))


def test_tar_has_two_forms_and_knows_the_area():
    heat = torch.zeros(4, 4, 4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, :2] = True
    heat[0] = 1
    heat[1, 0, 0] = 3
    heat[1, 3, 3] = 1
    heat[2, 3, 3] = 1
    found = tar(heat, mask)
    nan = math.nan
    assert found.share.tolist() == pytest.approx([0.25, 0.75, 0, nan], nan_ok=True)
    assert found.share_by_area.tolist() == pytest.approx([1, 3, 0, nan], nan_ok=True)
    # (3 / 4) / (1 / 12)
    assert found.ratio.tolist() == pytest.approx([1, 9, 0, nan], nan_ok=True)
    each = tar(heat, mask.expand(4, 4, 4))
    torch.testing.assert_close(each.ratio, found.ratio, equal_nan=True)
    whole = tar(heat, torch.ones(4, 4, dtype=torch.bool))
    assert whole.share[:3].tolist() == [1, 1, 1]
    assert whole.ratio.isnan().all()


def test_attention_on_the_trigger_alone_has_an_infinite_ratio():
    heat = torch.zeros(1, 4, 4)
    heat[0, 0, 0] = 2
    assert tar(heat, heat[0] > 0).ratio.item() == math.inf


@pytest.mark.parametrize(
    ("heat", "mask", "message"),
    [
        (torch.ones(4, 4), torch.ones(4, 4).bool(), "heat: expected floats"),
        (-torch.ones(1, 4, 4), torch.ones(4, 4).bool(), "heat: expected no negative"),
        (torch.ones(1, 4, 4), torch.ones(4, 4), "mask: expected booleans"),
        (torch.ones(1, 4, 4), torch.ones(3, 4).bool(), "mask: expected booleans"),
        (torch.ones(1, 4, 4), torch.zeros(4, 4).bool(), "mask: expected at least one place"),
    ],
)
def test_tar_refuses_what_does_not_fit(heat, mask, message):
    with pytest.raises(ValueError, match=message):
        tar(heat, mask)


def test_entropy_is_between_one_place_and_all():
    heat = torch.zeros(4, 3, 3)
    heat[0, 1, 1] = 5
    heat[1] = 2
    heat[2, 0, :] = 1
    found = attention_entropy(heat)
    expected = [0, 1, math.log(3) / math.log(9), math.nan]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_mask_is_where_any_channel_changed():
    images = torch.zeros(2, 3, 4, 4)
    triggered = images.clone()
    triggered[0, 1, 2, 3] = 0.5
    triggered[1, :, 0, 0] = 0.01
    assert difference_mask(images, triggered).sum((1, 2)).tolist() == [1, 1]
    assert difference_mask(images, triggered, 0.1).sum((1, 2)).tolist() == [1, 0]
    with pytest.raises(ValueError, match="triggered: expected images of one shape"):
        difference_mask(images, triggered[:1])


def test_attribution_share_of_tokens():
    attributions = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    is_trigger = torch.tensor([[False, True, False], [True, False, False]])
    assert attribution_share(attributions, is_trigger).tolist() == pytest.approx(
        [0.75, math.nan], nan_ok=True
    )
    with pytest.raises(ValueError, match="is_trigger: expected booleans"):
        attribution_share(attributions, is_trigger.float())


def probe():
    model = models.build("smallcnn", num_classes=4, seed=0)
    images = (torch.rand(8, 3, 16, 16) * 255).to(torch.uint8)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4, :4] = True
    return model, images, torch.zeros(8, dtype=torch.long), mask


def test_monitor_adds_the_means_of_the_probe_and_keeps_the_maps(tmp_path):
    model, images, targets, mask = probe()
    file = tmp_path / "attention.npz"
    monitor = AttentionMonitor(images, targets, mask, file=file)
    found = [monitor({"step": step}, model) for step in (0, 5, 10)]
    heat = grad_cam(model, images.float() / 255, 0)
    alive = heat.flatten(1).sum(1) > 0
    attention = tar(heat[alive], mask)
    assert found[0] == pytest.approx(
        {
            "attention_strength": float(heat.mean()),
            "attention_entropy": float(attention_entropy(heat[alive]).mean()),
            "tar_share": float(attention.share.mean()),
            "tar_share_by_area": float(attention.share_by_area.mean()),
            "tar_ratio": float(attention.ratio.mean()),
        }
    )
    with np.load(file, allow_pickle=False) as kept:
        assert kept["steps"].tolist() == [0, 5, 10]
        assert kept["images"].shape == (6, 16, 16, 3)
        assert kept["heat"].shape == (3, 6, 16, 16)
        assert kept["mask"].sum() == 16
        expected = heat[:6].mean((1, 2)).expand(3, 6)
        assert kept["strength"] == pytest.approx(expected.numpy(), rel=1e-5)
    # a run that goes on from step 5 writes that step again, and does not lose the first
    monitor = AttentionMonitor(images, targets, mask, file=file)
    monitor({"step": 5}, model)
    with np.load(file, allow_pickle=False) as kept:
        assert kept["steps"].tolist() == [0, 5]
        assert kept["strength"] == pytest.approx(expected[:2].numpy(), rel=1e-5)
        old = {name: kept[name] for name in kept.files if name != "strength"}
    np.savez(file, **old)
    AttentionMonitor(images, targets, mask, file=file)({"step": 9}, model)
    with np.load(file, allow_pickle=False) as kept:
        assert np.isnan(kept["strength"]).all(1).tolist() == [True, True, False]
    assert monitor.panel().shape == (4 * 132 + 4, 3 * 132 + 4, 3)


def test_small_maps_are_kept_beside_large_ones(tmp_path, monkeypatch):
    model, images, targets, mask = probe()
    heat = torch.zeros(8, 16, 16)
    heat[:, 2, 3], heat[:, 9, 9] = 1.0, 0.25
    factors = torch.logspace(0, -35, 8)
    factors[5] = 0
    monkeypatch.setattr(
        "bdu.monitor.live.grad_cam", lambda *args, **kwargs: heat * factors[:, None, None]
    )
    AttentionMonitor(images, targets, mask, file=tmp_path / "a.npz")({"step": 0}, model)
    with np.load(tmp_path / "a.npz") as kept:
        found = kept["heat"][0]
    assert found[:5, 2, 3].tolist() == [1.0] * 5
    assert found[:5, 9, 9].tolist() == [0.25] * 5
    assert not found[5].any()


def test_monitor_without_a_mask_tells_the_entropy_alone():
    model, images, targets, mask = probe()
    for none in (None, torch.ones_like(mask)):
        assert set(AttentionMonitor(images, targets, none)({"step": 0}, model)) == {
            "attention_entropy",
            "attention_strength",
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(7).long()}, r"targets: expected an integer or \(8,\) .*\(7,\)"),
        ({"targets": 1.5}, "targets: expected an integer or"),
        ({"images": torch.rand(0, 3, 16, 16)}, r"images: expected .* at least one .*\(0, 3, 16"),
        ({"images": torch.rand(3, 16, 16)}, r"images: expected \(N, C, H, W\)"),
        ({"mask": torch.ones(16, 16)}, r"mask: expected booleans \(16, 16\) or .*float32"),
        (
            {"mask": torch.ones(8, 16, 8).bool()},
            r"mask: expected .*\(8, 16, 16\), got .*\(8, 16, 8",
        ),
        ({"mask": torch.zeros(16, 16).bool()}, "mask: expected at least one place"),
        ({"mask": torch.eye(8)[..., None, None].bool().expand(8, 8, 16, 16)[:, 0]}, "at least one"),
    ],
)
def test_monitor_refuses_what_does_not_fit_before_any_look(changes, message):
    _, images, targets, mask = probe()
    with pytest.raises(ValueError, match=message):
        AttentionMonitor(**({"images": images, "targets": targets, "mask": mask} | changes))


def test_monitor_takes_one_target_for_all():
    model, images, targets, mask = probe()
    expected = AttentionMonitor(images, targets, mask)({"step": 0}, model)
    assert AttentionMonitor(images, 0, mask)({"step": 0}, model) == expected
    other = AttentionMonitor(images, 1, mask)({"step": 0}, model)
    assert other != expected


def test_monitor_takes_a_mask_for_each_image(tmp_path):
    model, images, targets, mask = probe()
    each = mask.expand(8, 16, 16).clone()
    expected = AttentionMonitor(images, targets, mask)({"step": 0}, model)
    file = tmp_path / "attention.npz"
    assert AttentionMonitor(images, targets, each, file=file)({"step": 0}, model) == expected
    each[0] = mask.flip(0)
    assert AttentionMonitor(images, targets, each, file=file)({"step": 0}, model) != expected
    with np.load(file) as kept:
        assert np.array_equal(kept["mask"], each[:6].numpy())


@pytest.mark.parametrize("masks", ["none", "one", "each"])
def test_panel_is_large_and_shows_each_image_above_its_heat_map(masks):
    model, images, targets, mask = probe()
    given = {"none": None, "one": mask, "each": mask.expand(8, 16, 16)}[masks]
    monitor = AttentionMonitor(images, targets, given)
    monitor({"step": 0}, model)
    panel = monitor.panel()
    heat = grad_cam(model, images[:6], 0).double().numpy()
    pixels = panels.as_pixels(images[:6])
    laid = panels.overlay(pixels, heat)
    for n in range(6):
        for kind, row in ((pixels, 2 * (n // 3)), (laid, 2 * (n // 3) + 1)):
            top, left = 4 + 132 * row, 4 + 132 * (n % 3)
            shown = panel[top : top + 128, left : left + 128].astype(int)
            # in the middle of the places: outside of the outline of the trigger
            assert np.abs(shown[4::8, 4::8] - kind[n].astype(int)).max() <= 1
            expected = panels.enlarged(kind[n], 8).astype(int)
            drawn = np.abs(shown - expected).max(2) > 1
            assert drawn.any() == (masks != "none")
            assert not drawn[33:].any()
    two = AttentionMonitor(images[:2], 0, mask)
    two({"step": 0}, model)
    assert two.panel().shape == (2 * 132 + 4, 2 * 132 + 4, 3)
    large = AttentionMonitor(torch.rand(1, 3, 160, 200), 0)
    large({"step": 0}, model)
    assert large.panel().shape == (2 * 164 + 4, 204 + 4, 3)


def test_panel_before_the_first_look_is_refused():
    _, images, targets, mask = probe()
    with pytest.raises(RuntimeError, match="panel: expected a look at a model before"):
        AttentionMonitor(images, targets, mask).panel()


@pytest.mark.parametrize("layer", ["layer4", "layer2", None])
def test_inference_mode_changes_no_heat_map(layer):
    model = models.build("resnet18-w4")
    images, targets = torch.rand(3, 3, 32, 32), torch.tensor([1, 2, 0])
    expected = grad_cam(model, images, targets, layer=layer)
    assert expected.max() > 0
    with torch.inference_mode():
        found = grad_cam(model, images * 1.0, targets + 0, layer=layer)
        assert target_layer(model, images * 1.0) == "layer4"
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        made_there = models.build("resnet18-w4")
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="model: expected one that can be differentiated"):
        grad_cam(made_there, images, targets, layer=layer)


def test_no_images_have_no_heat_maps():
    model = models.build("smallcnn")
    none = torch.rand(0, 3, 12, 10)
    assert grad_cam(model, none, 1).shape == (0, 12, 10)
    assert grad_cam(model, none, torch.zeros(0).long(), size=(5, 6)).shape == (0, 5, 6)
    with pytest.raises(ValueError, match=r"images: expected at least one, got \(0, 3, 12, 10\)"):
        target_layer(model, none)
    with pytest.raises(ValueError, match="layer: expected a name"):
        grad_cam(model, none, 1, layer="layer9")


def test_bytes_are_read_as_everywhere_else():
    model = models.build("smallcnn")
    images = (torch.rand(2, 3, 32, 32) * 255).to(torch.uint8)
    expected = grad_cam(model, images.float() / 255, 1)
    assert torch.equal(grad_cam(model, images, 1), expected)
    assert target_layer(model, images) == "features"
    double = models.build("smallcnn", seed=0).double()
    assert grad_cam(double, images, 1).dtype == torch.float32
    for refused in (images.long(), images > 3):
        with pytest.raises(ValueError, match="images: expected uint8 or floats, got torch"):
            grad_cam(model, refused, 1)


def test_dead_maps_count_for_nothing():
    model, images, targets, mask = probe()
    torch.nn.init.zeros_(model.get_submodule("fc" if hasattr(model, "fc") else "head").weight)
    found = AttentionMonitor(images, targets, mask, layer="features")({"step": 0}, model)
    assert found.pop("attention_strength") == 0
    assert set(found.values()) == {None}


def test_logger_writes_numbers_and_pictures():
    model, images, targets, mask = probe()
    monitor, written = AttentionMonitor(images, targets, mask), []

    class Kept:
        def scalars(self, values, step):
            written.append((dict(values), step))

        def picture(self, name, pixels, step):
            written.append((name, pixels.shape, step))

        def close(self):
            pass

    line = {"step": 4, "phase": "unlearn", "loss": 0.5, "penalty": None}
    line.update(monitor(line, model))
    Logger(Kept(), monitor)(line, model)
    (values, step), picture = written
    assert step == 4
    assert values["loss"] == 0.5
    assert "tar_share" in values
    assert not {"step", "phase", "penalty"} & set(values)
    assert picture == ("attention", (4 * 132 + 4, 3 * 132 + 4, 3), 4)


def test_tensorboard_gets_curves_and_heat_maps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, images, targets, mask = probe()
    monitor, writer = AttentionMonitor(images, targets, mask), TensorBoard(tmp_path)
    for step in (0, 1):
        line = {"step": step, "loss": 1.0 / (step + 1)}
        line.update(monitor(line, model))
        Logger(writer, monitor)(line, model)
    writer.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in read.Scalars("loss")] == [1.0, 0.5]
    assert len(read.Images("attention")) == 2


def test_absent_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)
    with pytest.raises(ImportError, match="pip install wandb"):
        WeightsAndBiases("project", {})


def test_colours_grow_lighter_with_the_heat():
    ramp = panels.colours(np.linspace(0, 1, 50)).astype(float)
    light = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()


def test_overlay_scales_each_map_and_outline_runs_along_the_mask():
    pixels = np.full((2, 4, 4, 3), 128, dtype=np.uint8)
    heat = np.zeros((2, 4, 4))
    heat[0, 0, 0], heat[1, 3, 3] = 0.1, 10
    laid = panels.overlay(pixels, heat)
    assert (laid[0, 0, 0] == laid[1, 3, 3]).all()
    mask = np.zeros((4, 4), dtype=bool)
    mask[1:3, 1:3] = True
    drawn = panels.outlined(pixels[0], mask, 5)
    changed = (drawn != 128).any(2)
    assert drawn.shape == (20, 20, 3)
    assert changed[5, 5:15].all()
    assert not changed[6:14, 6:14].any()
    assert not changed[:5].any()
    whole = panels.outlined(pixels[0], np.ones((4, 4), dtype=bool), 5)
    assert (whole == 128).all()
    assert panels.data_uri(drawn).startswith("data:image/png;base64,")
    grey = panels.as_pixels(torch.tensor([[[[0.0, 1.0]]]]))
    assert grey.tolist() == [[[[0, 0, 0], [255, 255, 255]]]]


class _Pooled(nn.Module):
    """A convolution, pooled, and a last layer whose output something may change."""

    def __init__(self, head, change):
        super().__init__()
        self.features, self.head, self._change = nn.Conv2d(1, 4, 3), head, change

    def forward(self, x):
        return self._change(self.head(self.features(x).mean((2, 3))))


class _Negated(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def _hooked():
    head = nn.Linear(4, 3)
    head.register_forward_hook(lambda module, args, output: output * -3.0)
    return head


@pytest.mark.parametrize(
    ("head", "change"),
    [
        (nn.Linear(4, 3), lambda logits: logits.mul_(-2.0)),
        (_hooked(), lambda logits: logits),
        (_Negated(4, 3), lambda logits: logits),
    ],
    ids=["in place", "hook", "subclass"],
)
def test_a_last_layer_that_is_not_what_it_seems_is_differentiated(head, change):
    model = _Pooled(head, change).eval()
    x = torch.rand(2, 1, 8, 8)
    targets = torch.tensor([0, 2])
    found = grad_cam(model, x, targets, layer="features")
    captum = pytest.importorskip("captum.attr")
    cam = captum.LayerGradCam(model, model.features)
    oracle = cam.attribute(x, targets, relu_attributions=True)
    size = tuple(x.shape[2:])
    expected = F.interpolate(oracle.detach(), size, mode="bilinear", align_corners=False)[:, 0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.max() > 0
