import numpy as np
import pytest
import torch
from PIL import Image
from random_pictures import noise_image

from diffusers_moebius.pictures.picture import load_pictures

MODES = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "P": "RGB",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "CMYK": "CMYK",
    "I;16": "I;16",
    "I;16B": "I;16",
    "I": "I",
    "F": "F",
}


class TestLoadPictures:
    @pytest.mark.parametrize(("mode", "returned"), MODES.items())
    def test_modes_come_back(self, mode, returned):
        image = noise_image(mode)
        image.info["icc_profile"] = b"profile"
        (picture,) = load_pictures(image)
        result = picture.render("pil")
        assert result.mode == returned and result.size == image.size
        assert result.info["icc_profile"] == b"profile"
        expected = np.asarray(image if mode.startswith(("I", "F")) else image.convert(returned))
        np.testing.assert_array_equal(np.asarray(result), expected)
        array = picture.render("np")
        assert array.shape[:2] == (24, 20) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
        np.testing.assert_array_equal(picture.render("pt").permute(1, 2, 0).numpy(), array)

    @pytest.mark.parametrize("mode", ["P", "RGB", "L"])
    def test_transparent_colour_becomes_alpha(self, mode):
        image = noise_image(mode)
        key = image.getpixel((3, 4))
        image.info["transparency"] = key
        (picture,) = load_pictures(image)
        assert picture.alpha is not None and picture.alpha[4, 3, 0] == 0 and picture.alpha.max() == 255
        assert picture.render("pil").mode == ("LA" if mode == "L" else "RGBA")

    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
    def test_rgb_agrees_with_pillow(self, mode):
        image = noise_image(mode)
        rgb = load_pictures(image)[0].rgb((2, 3, 10, 20))
        np.testing.assert_allclose(rgb * 255, np.asarray(image.convert("RGB"))[3:20, 2:10], atol=1.01)

    def test_arrays_and_tensors_of_one_picture_agree(self):
        image = noise_image("RGBA")
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        batches = [image, array, array[None], tensor, tensor[None], [array], [tensor], (image,)]
        for value in batches:
            pictures = load_pictures(value)
            assert len(pictures) == 1
            np.testing.assert_array_equal(pictures[0].samples, array[..., :3])
            np.testing.assert_array_equal(pictures[0].alpha, array[..., 3:])
        for value in (array / np.float32(255), tensor.float() / 255):
            np.testing.assert_allclose(load_pictures(value)[0].samples * 255, array[..., :3], atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_float_types_come_back(self, dtype):
        tensor = torch.rand(3, 20, 18).to(dtype)
        result = load_pictures(tensor)[0].render("pt")
        assert result.dtype == dtype and torch.equal(result, tensor)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_floats_from_minus_one_to_one(self, dtype):
        signed = (torch.rand(2, 3, 20, 18) * 2 - 1).to(dtype)
        signed[1] = signed[1].abs()  # the first picture tells what is meant
        for value in (signed, list(signed), signed.float().permute(0, 2, 3, 1).numpy()):
            pictures = load_pictures(value)
            for picture, expected in zip(pictures, (signed + 1) / 2, strict=True):
                np.testing.assert_allclose(picture.render("pt").float(), expected.float(), atol=4e-3)
        unsigned = signed[1]
        assert torch.equal(load_pictures(unsigned)[0].render("pt"), unsigned)

    def test_integers_come_back_as_exact_floats(self):
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        np.testing.assert_array_equal(np.rint(load_pictures(values)[0].render("np")[..., 0] * 255), values)
        deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        np.testing.assert_array_equal(np.rint(load_pictures(deep)[0].render("np")[..., 0] * 65535), deep)

    def test_sixteen_bit_colour_is_rounded_for_pillow(self):
        deep = np.full((16, 16, 3), 32896, np.uint16)  # 128 / 255
        assert load_pictures(deep)[0].render("pil").getpixel((0, 0)) == (128, 128, 128)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("photo.png", "of type str"),
            (None, "of type NoneType"),
            ([], "empty"),
            ([np.zeros((2, 16, 16, 3), np.uint8)], "batch inside"),
            (np.zeros((0, 16, 3), np.uint8), "empty"),
            (np.zeros((0, 16, 16, 3), np.uint8), "empty"),
            (torch.zeros(3, 0, 5), "empty"),
            (Image.new("RGB", (0, 7)), "empty"),
            (np.zeros((16,), np.uint8), "1 dimensions"),
            (np.zeros((1, 1, 16, 16, 3), np.uint8), "5 dimensions"),
            (np.zeros((16, 16, 5), np.uint8), "one to four channels"),
            (torch.zeros(16, 16, 3), "one to four channels"),
            (np.full((16, 16, 3), np.nan, np.float32), "NaN"),
            (np.full((16, 16, 3), np.inf), "NaN or infinite"),
            (np.full((16, 16, 3), -0.2), "from -0.2"),
            (np.linspace(-1, 1.5, 768).reshape(16, 16, 3), "from -1 to 1.5"),
            (torch.full((3, 16, 16), -1.5), "from -1.5"),
            (torch.full((3, 16, 16), 1.5), "to 1.5"),
            (np.zeros((16, 16, 3), np.int64), "int64"),
            (np.zeros((16, 16, 3), bool), "bool"),
            (Image.new("HSV", (16, 16)), '"HSV"'),
            (Image.new("I", (16, 16), 70000), "70000"),
            (Image.new("F", (16, 16), 2.0), "range 0 to 1"),
        ],
    )
    def test_refuses(self, value, words):
        with pytest.raises(ValueError, match="`image`") as error:
            load_pictures(value)
        assert words in str(error.value)

    def test_refuses_a_truncated_file(self, tmp_path):
        path = tmp_path / "photo.jpg"
        noise_image("RGB", 200, 200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match="`image` cannot be read"):
            load_pictures(Image.open(path))
