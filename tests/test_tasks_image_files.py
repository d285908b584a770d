"""What image files say besides three colours of 8 bits; expected pixels are worked out by hand."""

import io
import struct
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from offramp.tasks import image_files
from offramp.tasks.image_files import ALPHA, COLOURS, FRAMES, SIXTEEN_BITS, read_image, read_image_folder, tell

RED, GREEN, WHITE, BLACK = [255, 0, 0], [0, 255, 0], [255] * 3, [0] * 3


def sixteen(folder):
    """Grey values 0, 257, 32768 and 65535 of a PNG of 16 bits; the second is 1/255 of the whole."""
    Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)).save(folder / "x.png")
    return folder / "x.png"


def sixteen_tiff(folder):
    Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)).save(folder / "x.tif")
    return folder / "x.tif"


def sixteen_pgm(folder):
    (folder / "x.pgm").write_bytes(b"P5 4 1 65535\n" + struct.pack(">4H", 0, 257, 32768, 65535))
    return folder / "x.pgm"


def alpha(folder):
    """Red: opaque, transparent, and by a share of 51 / 255 = .2."""
    Image.fromarray(np.array([[[*RED, 255], [*RED, 0], [*RED, 51]]], np.uint8)).save(folder / "x.png")
    return folder / "x.png"


def grey_alpha(folder):
    image = Image.new("LA", (2, 1), (0, 255))
    image.putpixel((1, 0), (0, 0))
    image.save(folder / "x.png")
    return folder / "x.png"


def palette(folder):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.save(folder / "x.png")
    return folder / "x.png"


def clear_palette(folder):
    path = palette(folder)
    Image.open(path).save(path, transparency=0)
    return path


def one_bit(folder):
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    image.save(folder / "x.png")
    return folder / "x.png"


def animated(folder):
    frames = [Image.new("RGB", (1, 1), tuple(colour)) for colour in (RED, GREEN)]
    frames[0].save(folder / "x.gif", save_all=True, append_images=frames[1:])
    return folder / "x.gif"


def cmyk(folder):
    """No ink, then all of magenta and yellow: white and red."""
    image = Image.new("CMYK", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 255, 0))
    image.save(folder / "x.tif")
    return folder / "x.tif"


def turned(folder):
    """Red left of green, to be turned by 90 degrees to the right: red above green."""
    image, exif = Image.new("RGB", (2, 1), tuple(RED)), Image.Exif()
    image.putpixel((1, 0), tuple(GREEN))
    exif[0x0112] = 6
    image.save(folder / "x.png", exif=exif)
    return folder / "x.png"


@pytest.mark.parametrize(
    ("make", "pixels", "said"),
    [
        (sixteen, [[[v] * 3 for v in (0, 1, 128, 255)]], {SIXTEEN_BITS: 1}),
        (sixteen_tiff, [[[v] * 3 for v in (0, 1, 128, 255)]], {SIXTEEN_BITS: 1}),
        (sixteen_pgm, [[[v] * 3 for v in (0, 1, 128, 255)]], None),
        (alpha, [[RED, WHITE, [255, 204, 204]]], {ALPHA: 1}),
        (grey_alpha, [[BLACK, WHITE]], {ALPHA: 1}),
        (palette, [[RED, GREEN]], {}),
        (clear_palette, [[WHITE, GREEN]], {ALPHA: 1}),
        (one_bit, [[BLACK, WHITE]], {}),
        (animated, [[RED]], {FRAMES: 1}),
        (cmyk, [[WHITE, RED]], {}),
        (turned, [[RED], [GREEN]], {}),
    ],
)
def test_what_files_may_say(tmp_path, make, pixels, said):
    seen = Counter()
    assert read_image(make(tmp_path), seen=seen).tolist() == pixels
    assert said is None or seen == said


def test_grey_values_of_colours(tmp_path):
    seen = Counter()
    found = read_image(palette(tmp_path), grey=True, seen=seen)
    luma = [round(0.299 * 255), round(0.587 * 255)]  # ITU-R 601-2
    assert found.shape == (1, 2, 1)
    assert np.abs(found.ravel().astype(int) - luma).max() <= 1
    assert seen == {COLOURS: 1}
    Image.new("RGB", (1, 1), (7, 7, 7)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png", grey=True, seen=seen).tolist() == [[[7]]]
    assert seen == {COLOURS: 1}  # nothing was lost


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.array([[0, 0.5, 1]], np.float32), "floats"),
        (np.array([[0, 5, 70000]], np.int32), "whole numbers of 32 bits"),
    ],
)
def test_values_without_a_known_white_are_refused(tmp_path, values, what):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif holds {what}, whose black and white are not known; save it with 8"):
        read_image(tmp_path / "x.tif")


# ---------------------------------------------------------------- too large, or damaged


def png(width, height):
    """A small file that says it is this large, without all of its pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (20_000, 20_000), (2_000_000_000, 1)])
def test_huge_images_are_refused_by_their_head(tmp_path, width, height):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(width, height))
    for read in (lambda: read_image(tmp_path / "a" / "x.png"), lambda: read_image_folder(tmp_path, size=8)):
        with pytest.raises(ValueError, match="x.png has more than 89,478,485 pixels, the most that are read") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_thin_image_is_not_made_huge(tmp_path):
    Image.new("L", (60_000, 1)).save(tmp_path / "x.png")
    with pytest.raises(
        ValueError, match=r"x.png has 60000 x 1 pixels, 15360000 x 256 with its shorter side brought to"
    ):
        read_image(tmp_path / "x.png", size=224)
    assert read_image(tmp_path / "x.png").shape == (1, 60_000, 3)


def test_every_damage_is_one_error(tmp_path):
    generator, whole = np.random.default_rng(0), {}
    picture = Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for ending in ("png", "jpg", "gif", "bmp", "webp", "tif"):
        stream = io.BytesIO()
        picture.save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
        whole[ending] = stream.getvalue()
    refused = 0
    for ending, data in whole.items():
        path = tmp_path / f"x.{ending}"
        for _ in range(60):
            bad = bytearray(data)
            for at in generator.integers(0, len(bad), 3):
                bad[at] = generator.integers(0, 256)
            path.write_bytes(bytes(bad[: generator.integers(1, len(bad) + 1)]))
            said = refusal(path)
            refused += said is not None
            assert said is None or (f"x.{ending}" in said and "\n" not in said)
    assert refused > 100


def refusal(path):
    try:
        read_image(path)
    except ValueError as error:
        return str(error)
    return None


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pets"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (3, 2), tuple(RED)).save(root / name / "1.png")
    return root


def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in found]


def test_what_is_no_class_and_no_image_is_left_out_and_counted(folder):
    for name in (".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes((folder / "cat" / "1.png").read_bytes())
    (folder / "dog" / "._1.png").write_bytes(b"of a Mac")
    (folder / "dog" / "notes.txt").write_text("no image")
    (folder / "README.md").write_text("pets")
    (folder / "empty").mkdir()
    data, said = warned(lambda: read_image_folder(folder))
    assert data.classes == ("cat", "dog")
    assert data.ids == ("pets/cat/1.png", "pets/dog/1.png")
    (line,) = said
    assert "hidden files and folders (4: .ipynb_checkpoints, __MACOSX, ._1.png)" in line
    assert "files that are no images (1: .txt)" in line
    assert "files beside the folders of classes (1: README.md)" in line
    assert "folders without an image (1: empty)" in line


def test_other_endings_and_deeper_folders_are_read(folder):
    (folder / "cat" / "persian").mkdir()
    for name in ("cat/persian/2.PNG", "cat/3.gif", "dog/4.tiff", "dog/5.pgm", "dog/6.JFIF"):
        Image.new("L", (3, 2), 9).save(folder / name, {"gif": "GIF", "jfif": "JPEG"}.get(name[-4:].lower().strip(".")))
    data, said = warned(lambda: read_image_folder(folder))
    assert data.ids == (
        "pets/cat/1.png", "pets/cat/3.gif", "pets/cat/persian/2.PNG", "pets/dog/1.png", "pets/dog/4.tiff",
        "pets/dog/5.pgm", "pets/dog/6.JFIF",
    )  # fmt: skip
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert not said
    assert data.inputs[np.arange(7)].shape == (7, 2, 3, 3)


def test_links_to_folders_are_not_followed(folder):
    (folder / "cat" / "all").symlink_to(folder)
    data, said = warned(lambda: read_image_folder(folder))
    assert len(data) == 2
    assert "links to folders (1: all)" in said[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [(f / a).rename(f / b) for a, b in (("cat", "train"), ("dog", "test"))],
         r"has the folders test, train, which are splits, not classes; give .*train"),
        (lambda f: (f / "dog").rename(f / "dog "), "has a folder 'dog ', with blanks around the name; rename it"),
        (lambda f: (f / "dog" / "1.png").unlink(), "has images in the folder 'cat' only; two classes are needed"),
        (lambda f: Image.new("RGB", (2, 3)).save(f / "dog" / "2.png"), "2.png has 2 x 3 pixels and others have 3 x 2"),
        (lambda f: (f / "dog" / "2.png").write_bytes(b"GIF89a"), "2.png is no whole image"),
        (lambda f: (f / "dog" / "b\udce4r.png").write_bytes((f / "dog" / "1.png").read_bytes()),
         "has a name that is no UTF-8; rename it"),
    ],
)  # fmt: skip
def test_folders_that_are_refused_before_anything_long_begins(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        warned(lambda: read_image_folder(folder))


def test_classes_that_differ_in_capitals_only_are_said(folder):
    (folder / "Cat").mkdir()
    Image.new("RGB", (3, 2)).save(folder / "Cat" / "1.png")
    _, said = warned(lambda: read_image_folder(folder))
    assert "the classes 'Cat', 'cat' differ in capitals only and stay different" in said[0]


def test_a_turned_image_has_the_size_it_is_shown_in(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2, 3)).save(folder / "dog" / "2.jpg", exif=exif)
    assert read_image_folder(folder).inputs[np.arange(3)].shape == (3, 2, 3, 3)


def test_images_that_are_not_taken_as_they_stand_are_counted(folder):
    for n in range(2):
        Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(folder / "cat" / f"a{n}.png")
    Image.fromarray(np.full((2, 3), 65535, np.uint16)).save(folder / "dog" / "b.png")
    data, said = warned(lambda: read_image_folder(folder))
    (line,) = said
    assert line.endswith("of 5 images, 1 of 16 bits (divided by 257), 2 with an alpha channel (shown on white)")
    assert data.inputs[np.array([1, 4])].min() == 255  # white, all of them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell("nothing", Counter(), 5)


def test_limits_are_pillows_own():
    assert image_files.MOST_PIXELS == Image.MAX_IMAGE_PIXELS
