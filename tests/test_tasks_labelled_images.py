"""Published formats of image sets, written here byte by byte; damage is one clear line."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from offramp.tasks.image_files import read_image, read_image_folder
from offramp.tasks.images import FASHION, read_cifar10, read_cifar100, read_idx

RANDOM = np.random.default_rng(0)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with four files, and what is in them."""
    arrays = {}
    for prefix, rows in (("train", 12), ("t10k", 5)):
        images = RANDOM.integers(0, 256, (rows, 4, 6), dtype=np.uint8)
        labels = np.arange(rows, dtype=np.uint8) % 10
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        arrays[prefix] = images, labels
    return tmp_path, arrays


def test_idx_files_are_read_gzipped_or_not(mnist):
    folder, arrays = mnist
    found = read_idx(folder)
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[prefix]
        assert np.array_equal(found[name].inputs[..., 0], images)
        assert found[name].inputs.shape == (*images.shape, 1)
        assert found[name].labels.tolist() == labels.tolist()
        assert found[name].ids[:2] == (f"{name}/0", f"{name}/1")
    assert found["train"].classes == tuple("0123456789")
    assert read_idx(folder, FASHION)["test"].classes[9] == "ankle boot"


def test_damaged_idx_files_are_named(mnist):
    folder, arrays = mnist
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz, row 2 has the label 2; allowed are 0\.\.1"):
        read_idx(folder, ("a", "b"))
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte is to hold 5 x 4 x 6 values but holds 119"):
        read_idx(folder)
    path.write_bytes(idx(arrays["t10k"][0][:4]))
    with pytest.raises(ValueError, match="holds 4 images and .*t10k-labels-idx1-ubyte.gz 5 labels"):
        read_idx(folder)
    path.write_bytes(idx(arrays["t10k"][1]))
    with pytest.raises(ValueError, match="begins with 00000801, but .* with 00000803"):
        read_idx(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte is missing \(nor .*idx3-ubyte.gz"):
        read_idx(folder)
    labels = folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-9])
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz is not a whole gzip file"):
        read_idx(folder)


def cifar_row(labels, image):
    """As the page of the data set has it: labels, then 1024 red, 1024 green, 1024 blue values, row by row."""
    values = bytes(labels)
    for channel in range(3):
        for y in range(32):
            values += bytes(int(image[y, x, channel]) for x in range(32))
    return values


def test_cifar10_is_read_as_published(tmp_path):
    images = RANDOM.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(cifar_row([i], images[i]))
    (tmp_path / "test_batch.bin").write_bytes(cifar_row([9], images[5]))
    found = read_cifar10(tmp_path)
    assert np.array_equal(found["train"].inputs, images[:5])
    assert np.array_equal(found["test"].inputs, images[5:])
    assert found["train"].labels.tolist() == [0, 1, 2, 3, 4]
    assert found["test"].classes == tuple(map(str, range(10)))
    (tmp_path / "batches.meta.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n")
    assert read_cifar10(tmp_path)["test"].classes[9] == "j"

    (tmp_path / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"batches.meta.txt has 2 names for 10 classes"):
        read_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").unlink()
    (tmp_path / "data_batch_3.bin").write_bytes(cifar_row([2], images[2]) + cifar_row([10], images[2]))
    with pytest.raises(ValueError, match=r"data_batch_3.bin, row 1 has the label 10; allowed are 0\.\.9"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(cifar_row([2], images[2])[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin has 3072 bytes, no multiple of 3073"):
        read_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing; give the folder"):
        read_cifar10(tmp_path)


def test_cifar100_has_two_labels(tmp_path):
    images = RANDOM.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    rows = [cifar_row(labels, image) for labels, image in zip(([19, 99], [0, 5], [7, 42]), images, strict=True)]
    (tmp_path / "train.bin").write_bytes(b"".join(rows[:2]))
    (tmp_path / "test.bin").write_bytes(rows[2])
    fine = read_cifar100(tmp_path)
    assert (fine["train"].labels.tolist(), fine["test"].labels.tolist()) == ([99, 5], [42])
    assert len(fine["train"].classes) == 100
    assert np.array_equal(fine["train"].inputs, images[:2])
    assert np.array_equal(fine["test"].inputs, images[2:])


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            values = np.full((20, 30, 3), 40 * i, np.uint8)
            values[..., 0] = 200 if name == "dog" else 0
            Image.fromarray(values).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_classes(folder):
    data = read_image_folder(folder)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.ids[2] == f"{folder.name}/dog/0.png"
    images = data.take([3, 0]).inputs[np.arange(2)]
    assert images.shape == (2, 20, 30, 3)
    assert images[0, 5, 5].tolist() == [200, 40, 40]
    assert images[1, 5, 5].tolist() == [0, 0, 0]
    assert data.take([3, 2]).take([1]).inputs[np.array([0])][0, 0, 0].tolist() == [200, 0, 0]
    assert read_image_folder(folder, classes=("dog", "cat")).labels.tolist() == [0, 0, 1, 1]


def test_images_are_brought_to_a_size_as_for_imagenet(folder):
    values = np.zeros((50, 100, 3), np.uint8)
    values[:, 50:] = 255  # the edge is in the middle, and stays there
    Image.fromarray(values).save(folder / "cat" / "2.png")
    data = read_image_folder(folder, size=28)
    images = data.inputs[np.arange(len(data))]
    assert images.shape == (5, 28, 28, 3)
    assert images[2, :, :12].max() == 0
    assert images[2, :, 16:].min() == 255
    exact = np.arange(28 * 28 * 3).reshape(28, 28, 3).astype(np.uint8)
    Image.fromarray(exact).save(folder / "exact.png")
    assert np.array_equal(read_image(folder / "exact.png", size=28), exact)


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_image_folder(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="bird is missing, the folder of class 'bird'"):
        read_image_folder(folder, classes=("cat", "bird"))
    (folder / "none" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="none holds no image"):
        read_image_folder(folder / "none")
    Image.new("RGB", (30, 21)).save(folder / "cat" / "9.png")
    with pytest.raises(ValueError, match=r"9.png has 30 x 21 pixels and others have 30 x 20; give a size"):
        read_image_folder(folder, classes=("cat", "dog")).inputs[np.arange(5)]
    (folder / "cat" / "9.png").write_bytes((folder / "cat" / "0.png").read_bytes()[:45])
    with pytest.raises(ValueError, match=r"9.png is no whole image"):
        read_image_folder(folder, classes=("cat", "dog")).inputs[np.arange(5)]
