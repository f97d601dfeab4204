"""Reading, checking, splitting and augmenting images."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdu.data import (
    CIFAR10_CLASSES,
    ImageData,
    as_tensors,
    as_unit_float,
    augment,
    check_labels,
    load_images,
    save_npz,
    split_indices,
)


def write_image(path, color, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folders(tmp_path):
    write_image(tmp_path / "zebra" / "a.png", (255, 0, 0))
    write_image(tmp_path / "ant" / "b.png", (0, 255, 0))
    write_image(tmp_path / "ant" / "a.PNG", (0, 0, 255))
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_class_folders_are_labelled_in_sorted_order(folders):
    data = load_images(folders)
    assert data.classes == ["ant", "zebra"]
    assert data.y.tolist() == [0, 0, 1]
    assert data.x.dtype == torch.uint8
    assert data.x.shape == (3, 3, 5, 6)
    assert data.x[:, :, 0, 0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]


@pytest.mark.parametrize("classes", [["zebra", "cow", "ant"], {"ant": 2, "zebra": 0, "cow": 1}])
def test_saved_class_map_decides_the_labels(folders, classes):
    data = load_images(folders, classes=classes)
    assert data.classes == ["zebra", "cow", "ant"]
    assert data.y.tolist() == [2, 2, 0]
    assert data.num_classes == 3


def test_folder_outside_the_class_map_is_named(folders):
    with pytest.raises(ValueError, match="'zebra' too"):
        load_images(folders, classes=["ant"])


def test_class_map_with_a_gap_is_refused():
    with pytest.raises(ValueError, match="each label from 0 to 1 once"):
        load_images(".", classes={"a": 0, "b": 2})


def test_grey_folder_has_one_channel_and_a_mixed_one_three(tmp_path):
    write_image(tmp_path / "a" / "1.png", 7, mode="L")
    assert load_images(tmp_path).x.shape == (1, 1, 5, 6)
    write_image(tmp_path / "a" / "2.png", (1, 2, 3))
    data = load_images(tmp_path)
    assert data.x.shape == (2, 3, 5, 6)
    assert data.x[0, :, 0, 0].tolist() == [7, 7, 7]


def test_images_of_two_sizes_need_an_image_size(folders):
    write_image(folders / "ant" / "c.png", (1, 2, 3), size=(9, 9))
    with pytest.raises(ValueError, match=r"image_size: expected a value.*\(9, 9\)"):
        load_images(folders)
    data = load_images(folders, image_size=4)
    assert data.x.shape == (4, 3, 4, 4)
    assert data.x[2, :, 0, 0].tolist() == [1, 2, 3]


def test_class_folder_without_images_is_named(folders):
    (folders / "bee").mkdir()
    with pytest.raises(ValueError, match=r"expected images in .*bee, got none$"):
        load_images(folders)


def test_split_folders_read_as_classes_are_noticed(tmp_path):
    write_image(tmp_path / "train" / "ant" / "a.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"folders \(ant\): is 'train' a split"):
        load_images(tmp_path)
    assert load_images(tmp_path, split="train").classes == ["ant"]


def test_absent_split_folder_lists_what_is_there(folders):
    with pytest.raises(FileNotFoundError, match=r"'train' .* got ant, zebra"):
        load_images(folders, split="train")


def test_empty_folder_and_absent_path_are_named(tmp_path):
    with pytest.raises(ValueError, match="got no folder"):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        load_images(tmp_path / "nowhere")


def test_broken_image_is_named(folders):
    (folders / "ant" / "c.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"cannot read .*c\.png"):
        load_images(folders)


def test_sixteen_bit_image_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match=r"expected 8 bits .*1\.png"):
        load_images(tmp_path)


def test_npz_of_uint8_is_turned_to_channels_first(tmp_path):
    x = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    save_npz(tmp_path / "a.npz", x=x, y=np.array([1, 0], np.uint8))
    data = load_images(tmp_path / "a.npz")
    assert data.x.dtype == torch.uint8
    assert data.y.dtype == torch.int64
    assert torch.equal(data.x, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert data.classes is None
    assert data.num_classes == 2


def test_npz_of_float_stays_channels_first_in_float32(tmp_path):
    x = np.random.default_rng(0).random((2, 3, 4, 5))
    save_npz(tmp_path / "a.npz", x=x, y=np.array([1, 0]))
    data = load_images(tmp_path / "a.npz")
    assert data.x.dtype == torch.float32
    torch.testing.assert_close(data.x, torch.from_numpy(x).float())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz_of_grey_images_gets_one_channel(tmp_path, dtype):
    save_npz(tmp_path / "a.npz", x=np.ones((2, 4, 5), dtype), y=np.array([1, 0]))
    assert load_images(tmp_path / "a.npz").x.shape == (2, 1, 4, 5)


def test_npz_splits_and_image_size(tmp_path):
    one, two = np.zeros((1, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 9, np.uint8)
    y = np.array([0, 1])
    save_npz(tmp_path / "a.npz", train_x=two, train_y=y, test_x=one, test_y=y[:1])
    data = load_images(tmp_path / "a.npz", split="train", image_size=(2, 6))
    assert data.x.shape == (2, 3, 2, 6)
    assert bool((data.x == 9).all())


@pytest.mark.parametrize("split", ["val", None])
def test_absent_split_is_named(tmp_path, split):
    x, y = np.zeros((1, 4, 4, 3), np.uint8), np.array([0])
    save_npz(tmp_path / "a.npz", train_x=x, train_y=y, test_x=x, test_y=y, extra=y)
    with pytest.raises(FileNotFoundError, match=r"split: .* splits to choose from: train, test$"):
        load_images(tmp_path / "a.npz", split=split)


def test_npz_class_names_are_read_and_can_be_reordered(tmp_path):
    arrays = {"x": np.zeros((2, 4, 4), np.uint8), "y": np.array([0, 1])}
    save_npz(tmp_path / "a.npz", **arrays, classes=np.array(["ant", "bee"]))
    assert load_images(tmp_path / "a.npz").classes == ["ant", "bee"]
    data = load_images(tmp_path / "a.npz", classes=["bee", "cow", "ant"])
    assert data.y.tolist() == [2, 0]
    with pytest.raises(ValueError, match="'bee' is not given"):
        load_images(tmp_path / "a.npz", classes=["ant"])


GREY = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (GREY, np.array([0]), "y: expected 2 labels, as x, got 1"),
        (GREY, np.array([0, -1]), "y: expected labels of 0 and above, got -1"),
        (GREY, np.array([0.0, 1.0]), "y: expected integers, got float64"),
        (GREY, np.array([True, False]), "y: expected integers, got bool"),
        (GREY, np.array([[0], [1]]), r"y: expected shape \(N,\), got \(2, 1\)"),
        (GREY[:0], np.zeros(0, int), "x: expected at least one image"),
        (GREY.astype(np.int32), np.array([0, 1]), "x: expected uint8 or float"),
        (np.full((2, 4, 4), 1.5), np.array([0, 1]), r"\[0, 1\] without NaN, got 1.5 to 1.5"),
        (np.full((2, 4, 4), -0.1), np.array([0, 1]), "without NaN, got -0.1"),
        (np.full((2, 4, 4), np.nan), np.array([0, 1]), "without NaN, got nan"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.array([0, 1]), r"uint8 \(N, H, W, C\)"),
        (np.zeros((2, 4, 4, 3)), np.array([0, 1]), r"float \(N, C, H, W\)"),
        (np.zeros((2, 4)), np.array([0, 1]), "3 or 4 dimensions"),
    ],
)
def test_arrays_that_do_not_fit_are_described(tmp_path, x, y, message):
    save_npz(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "a.npz")


def test_pickled_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    with pytest.raises(ValueError, match="x: expected a plain array, got a pickled or broken one"):
        load_images(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="an array of objects"):
        save_npz(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object))
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_with_a_changed_byte_is_read_or_refused(tmp_path, write):
    file = tmp_path / "a.npz"
    write(file, x=np.zeros((3, 2, 2), np.uint8), y=np.arange(3))
    content = file.read_bytes()
    refused = []
    for place in range(len(content)):
        changed = content[place] ^ 0xFF
        file.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        try:
            load_images(file)
        except (ValueError, FileNotFoundError) as error:
            refused.append(str(error))
    assert len(refused) > len(content) / 2
    assert all(re.match("(path|split|x|y): expected ", message) for message in refused)


def test_file_that_is_no_npz_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"expected an .npz file, got a single array in .*a\.npz"):
        load_images(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"cannot read .*a\.npz"):
        load_images(tmp_path / "a.npz")
    (tmp_path / "a.csv").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"expected a folder or an \.npz file"):
        load_images(tmp_path / "a.csv")


def write_cifar10(folder, name, labels):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(labels))
    records = rng.integers(0, 256, (len(labels), 3073), dtype=np.uint8)
    records[:, 0] = labels
    records.tofile(folder / name)
    return records


def test_cifar10_binary_files_are_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    first = write_cifar10(folder, "data_batch_1.bin", [3, 9])
    second = write_cifar10(folder, "data_batch_2.bin", [0])
    write_cifar10(folder, "test_batch.bin", [5, 5, 5])
    data = load_images(folder, split="train")
    assert data.y.tolist() == [3, 9, 0]
    assert data.classes == list(CIFAR10_CLASSES)
    expected = np.concatenate([first, second])[:, 1:].reshape(3, 3, 32, 32)
    assert np.array_equal(data.x.numpy(), expected)
    assert len(load_images(tmp_path, split="test")) == 3
    with pytest.raises(FileNotFoundError, match=r"\(train, test\), got None"):
        load_images(folder)


def test_cifar10_file_of_another_length_is_named(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=r"3073 bytes in .*test_batch\.bin, got 100"):
        load_images(tmp_path, split="test")


def test_pickled_cifar10_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="bdu never unpickles"):
        load_images(tmp_path, split="train")


def test_real_data_are_read(bdu_data):
    data = load_images(bdu_data / "vision" / "cifar10_lossless_subset.npz", split="test")
    assert data.x.shape == (1017, 3, 32, 32)
    assert data.classes == list(CIFAR10_CLASSES)
    mnist = load_images(bdu_data / "vision" / "mnist.npz", split="test")
    assert mnist.x.shape == (10000, 1, 28, 28)
    assert mnist.y[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_uint8_becomes_unit_float():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(as_unit_float(x), torch.tensor([0, 0.2, 1.0]))


def test_labels_at_the_class_count_are_refused():
    assert check_labels([0, 2], 3).tolist() == [0, 2]
    with pytest.raises(ValueError, match="labels: expected labels below 3, got 3"):
        check_labels(torch.tensor([0, 3]), 3, "labels")


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_every_kind_of_source_gives_the_same_tensors():
    x, y = torch.rand(5, 3, 4, 4), torch.arange(5)
    sources = [
        (x, y),
        [x.numpy(), y.numpy()],
        ImageData(x, y),
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=2),
        Items([(x[i], i) for i in range(5)]),
    ]
    for source in sources:
        got_x, got_y = as_tensors(source, "clean")
        assert torch.equal(got_x, x)
        assert torch.equal(got_y, y)
        assert got_y.dtype == torch.int64


def test_true_labels_may_follow_the_target_labels():
    x = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    parts = as_tensors((x, torch.zeros(3, dtype=torch.int32), torch.arange(3)), "triggered")
    assert [p.dtype for p in parts] == [torch.uint8, torch.int64, torch.int64]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (torch.zeros(1), TypeError, "clean: expected a Dataset, .* got Tensor"),
        ((torch.zeros(1, 1, 2, 2),), ValueError, r"clean: expected \(x, y\).* got 1 parts"),
        ((torch.zeros(2, 4), torch.zeros(2).long()), ValueError, r"clean\[0\]: expected \(N, C"),
        ((torch.zeros(2, 1, 2, 2), torch.zeros(2)), ValueError, r"clean\[1\]: expected integers"),
        (
            (torch.zeros(2, 1, 2, 2), torch.zeros(3).long()),
            ValueError,
            r"clean\[1\]: expected 2 labels, got 3",
        ),
        ((torch.zeros(2, 1, 2, 2) + 2, torch.zeros(2).long()), ValueError, "got 2 to 2"),
        (("a", "b"), TypeError, r"clean\[0\]: expected a tensor, got str"),
        (Items([]), ValueError, "at least one sample"),
        (Items([(Image.new("L", (2, 2)), 0)]), TypeError, "images as tensors, got Image"),
    ],
)
def test_sources_that_do_not_fit_are_described(source, error, message):
    with pytest.raises(error, match=message):
        as_tensors(source, "clean")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_augment_is_a_crop_of_the_padded_image_or_of_its_mirror(mode):
    x = torch.rand(64, 3, 8, 8, generator=generator())
    before = x.clone()
    out = augment(x, generator(1), padding=2, mode=mode)
    assert torch.equal(x, before)
    name = "reflect" if mode == "reflect" else "constant"
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode=name)
    seen = set()
    for image, source in zip(out, padded, strict=True):
        matches = [
            (row, column, flipped)
            for row in range(5)
            for column in range(5)
            for flipped in (False, True)
            if torch.equal(
                image.flip(2) if flipped else image,
                source[:, row : row + 8, column : column + 8],
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {row for row, _, _ in seen} == {0, 1, 2, 3, 4}
    assert {column for _, column, _ in seen} == {0, 1, 2, 3, 4}
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_augment_is_seeded_and_keeps_uint8():
    x = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8, generator=generator())
    assert torch.equal(augment(x, generator(1)), augment(x, generator(1)))
    assert not torch.equal(augment(x, generator(1)), augment(x, generator(2)))
    assert augment(x, generator(1), mode="zero").dtype == torch.uint8


def test_augment_refuses_padding_as_large_as_the_image():
    with pytest.raises(ValueError, match="padding: expected 0 to 3, got 4"):
        augment(torch.rand(1, 1, 4, 4), generator())


def test_splits_are_disjoint_seeded_and_of_the_asked_sizes():
    first = split_indices(100, [30, 0.25, 0], seed=1)
    assert [len(part) for part in first] == [30, 25, 0]
    assert len(torch.cat(first).unique()) == 55
    again = split_indices(100, [30, 0.25, 0], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], split_indices(100, [30], seed=2)[0])


def test_splits_hold_every_class_in_proportion():
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 100)
    for part in split_indices(labels, [100, 50, 500], seed=0):
        counts = torch.bincount(labels[part], minlength=3)
        expected = len(part) * torch.tensor([0.7, 0.2, 0.1])
        assert bool(((counts - expected).abs() <= 1).all())


def test_a_split_keeps_tracks_whole_and_classes_in_proportion():
    labels = torch.arange(43).repeat_interleave(300)
    tracks = torch.arange(10).repeat_interleave(30).repeat(43)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    labels, tracks = labels[shuffled], tracks[shuffled]
    parts = split_indices(labels, [0.1, 0.2, 0.7], seed=0, tracks=tracks)
    units = [set((labels[p] * 100 + tracks[p]).tolist()) for p in parts]
    assert sum(len(p) for p in parts) == len(labels)
    assert sum(map(len, units)) == len(units[0] | units[1] | units[2])
    for part, tracks_of_a_class in zip(parts, (1, 2, 7), strict=True):
        assert torch.equal(labels[part].bincount(), torch.full((43,), 30 * tracks_of_a_class))
    for part in parts:
        assert torch.equal(labels[part[:43]].bincount(), torch.ones(43, dtype=torch.int64))
    again = split_indices(labels, [0.1, 0.2, 0.7], seed=0, tracks=tracks)
    assert all(map(torch.equal, parts, again))
    other = split_indices(labels, [0.1], seed=1, tracks=tracks)
    assert set((labels[other[0]] * 100 + tracks[other[0]]).tolist()) != units[0]
    with pytest.raises(ValueError, match="tracks: expected as many as labels"):
        split_indices(10, [5], seed=0, tracks=torch.zeros(10, dtype=torch.int64))


def test_tracks_are_read_with_their_split(tmp_path):
    x, y = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 2
    track = np.array([0, 0, 1, 1, 2, 2])
    save_npz(tmp_path / "films.npz", train_x=x, train_y=y, train_track=track)
    data = load_images(tmp_path / "films.npz", split="train", image_size=8)
    assert data.tracks is not None
    assert data.tracks.tolist() == track.tolist()
    assert data.subset(torch.tensor([4, 0])).tracks.tolist() == [2, 0]
    save_npz(tmp_path / "bad.npz", x=x, y=y, track=track[:5])
    with pytest.raises(ValueError, match=r"track: expected 6 integers, as y, got int64 \(5,\)"):
        load_images(tmp_path / "bad.npz")


@pytest.mark.parametrize("sizes", [[60, 60], [0.6, 0.6], [-1], [1.5]])
def test_splits_that_cannot_be_made_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes: expected"):
        split_indices(100, sizes, seed=0)
