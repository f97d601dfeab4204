"""Weights and state files: what loads, what is refused, and that no half a file is left."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

from bdu.checkpoint import (
    CheckpointError,
    atomic_path,
    atomic_write,
    load_into,
    load_state,
    load_state_dict,
    save_state,
    save_state_dict,
)


@pytest.fixture
def state():
    return {"fc.weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(4)}


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".pth.tar", ".tar"])
def test_torch_files_load(tmp_path, state, suffix):
    torch.save(state, tmp_path / f"a{suffix}")
    assert same(load_state_dict(tmp_path / f"a{suffix}"), state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
def test_state_dict_is_found_under_its_usual_keys(tmp_path, state, key):
    torch.save({"epoch": 3, key: state}, tmp_path / "a.pt")
    assert same(load_state_dict(tmp_path / "a.pt"), state)


def test_state_dict_is_found_two_levels_down(tmp_path, state):
    torch.save({"model": {"epoch": 3, "state_dict": state}}, tmp_path / "a.pt")
    assert same(load_state_dict(tmp_path / "a.pt"), state)


def test_wrapper_prefixes_are_taken_off_where_all_keys_have_them(tmp_path, state):
    torch.save({"_orig_mod.module." + k: v for k, v in state.items()}, tmp_path / "a.pt")
    assert same(load_state_dict(tmp_path / "a.pt"), state)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "b.pt")
    assert list(load_state_dict(tmp_path / "b.pt")) == ["module.a", "b"]


def test_pickled_object_is_refused_and_its_class_is_named(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear") as e:
        load_state_dict(tmp_path / "a.pt")
    assert "bdu never unpickles" in str(e.value)
    assert "torch.save(model.state_dict()" in str(e.value)


def test_pickled_object_beside_the_weights_is_refused(tmp_path, state):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"asks for argparse\.Namespace"):
        load_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "best": 0.5}, "a dict with epoch, best"),
        ({"weight": torch.zeros(1), "epoch": 3}, "a dict with weight, epoch"),
        ([torch.zeros(1)], "list"),
        ({}, "a dict with no keys"),
    ],
)
def test_content_that_is_no_state_dict_is_described(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"expected a state dict .* got {found}"):
        load_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all"])
def test_broken_file_is_named(tmp_path, suffix, content):
    (tmp_path / f"broken{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match="broken"):
        load_state_dict(tmp_path / f"broken{suffix}")


def test_truncated_file_is_named(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        load_state_dict(tmp_path / "a.pt")


def test_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_state_dict(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_state(tmp_path / "absent.pt")


def test_unknown_suffix_lists_the_known_ones(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"\.safetensors, got \.onnx"):
        load_state_dict(tmp_path / "a.onnx")


def test_model_is_unchanged_where_the_weights_do_not_fit(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    wrong = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(5), "head.bias": torch.ones(1)}
    torch.save(wrong, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        load_into(model, tmp_path / "a.pt")
    message = str(error.value)
    assert "2 missing (1.weight, 1.bias)" in message
    assert "1 unexpected (head.bias)" in message
    assert "1 of another shape (0.bias: expected (2,), got (5,))" in message
    assert same(model.state_dict(), before)


def test_long_lists_of_names_are_cut(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pt")
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)])
    with pytest.raises(CheckpointError, match=r"8 missing \(0\.weight.* and 3 more\)"):
        load_into(model, tmp_path / "a.pt")


def test_saved_weights_load_again_with_their_metadata(tmp_path, state):
    path = tmp_path / "new" / "a.safetensors"
    save_state_dict(path, state, {"method": "balanced"})
    assert same(dict(sorted(load_state_dict(path).items())), dict(sorted(state.items())))
    with safe_open(path, "pt") as file:
        assert file.metadata()["method"] == "balanced"


def test_shared_and_strided_tensors_are_saved(tmp_path):
    base = torch.arange(24.0).view(1, 4, 2, 3)
    state = {
        "a": base,
        "b": base,
        "view": base[:, 1:],
        "strided": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3),
    }
    save_state_dict(tmp_path / "a.safetensors", state)
    loaded = load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_saving_refuses_what_is_not_a_tensor_or_not_safetensors(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict\['a'\]: expected a tensor, got int"):
        save_state_dict(tmp_path / "a.safetensors", {"a": 3})
    with pytest.raises(ValueError, match=r"suffix \.safetensors"):
        save_state_dict(tmp_path / "a.pt", {})


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, "old\r\nlines\n")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old\r\nlines\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_write_replaces_with_bytes_and_makes_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("has_links", [True, False])
def test_exclusive_write_leaves_what_is_there(tmp_path, monkeypatch, has_links):
    def no_link(source, target):
        raise PermissionError("no hard links")

    if not has_links:
        monkeypatch.setattr("os.link", no_link)
    path = tmp_path / "a.txt"
    atomic_write(path, "one", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(path, "two", exclusive=True)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_training_state_survives(tmp_path):
    state = {"epoch": 3, "lr": 0.1, "none": None, "list": [1, (2.5, "x")], 0: torch.ones(2)}
    save_state(tmp_path / "s.pt", state)
    loaded = load_state(tmp_path / "s.pt")
    assert torch.equal(loaded.pop(0), state.pop(0))
    assert loaded == state


def test_state_that_would_need_unpickling_is_refused_by_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]: expected .* got Namespace"):
        save_state(tmp_path / "s.pt", {"a": [1, argparse.Namespace()]})
    assert list(tmp_path.iterdir()) == []


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "self.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_state_dict(tmp_path / "self.pth")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_cut_anywhere_is_refused_in_words(tmp_path, is_zip):
    path = tmp_path / "whole.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 17):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_state_dict(path)


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: t.to(torch.complex64)])
def test_a_weight_that_cannot_be_loaded_leaves_the_model_alone(tmp_path, make):
    model = torch.nn.Linear(3, 2)
    before = model.bias.detach().clone()
    state = {"bias": torch.full((2,), 7.0), "weight": make(torch.ones(2, 3))}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"1 that are not plain dense tensors \(weight"):
        load_into(model, tmp_path / "odd.pth")
    assert torch.equal(model.bias, before)
