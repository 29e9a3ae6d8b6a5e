import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_moebius import MoebiusInpaintPipeline
from diffusers_moebius.export import load_onnx_pipeline


@pytest.fixture(scope="module")
def photo_and_mask():
    photo = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    mask = np.zeros((150, 200), np.uint8)
    mask[60:100, 80:130] = 255
    return Image.fromarray(photo).resize((200, 150), Image.Resampling.BICUBIC), Image.fromarray(mask)


@pytest.mark.parametrize("options", [{"padding_mask_crop": 8}, {"guidance_start": 0.5, "strength": 1.0}])
def test_gives_the_pictures_of_the_pipeline(exported, kl_pipeline, photo_and_mask, options):
    photo, mask = photo_and_mask

    def run(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        result = pipeline(photo, mask, num_inference_steps=3, generator=generator, **options).images[0]
        return np.asarray(result).astype(int)

    given, expected = run(load_onnx_pipeline(exported)), run(kl_pipeline)
    assert np.abs(given - expected).max() <= 1
    outside = np.asarray(mask) == 0
    assert (given[outside] == np.asarray(photo)[outside]).all()


def test_several_pictures_at_once(exported, photo_and_mask):
    photo, mask = photo_and_mask
    pipeline = load_onnx_pipeline(exported)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([photo, photo], mask, num_inference_steps=2, num_images_per_prompt=2).images
    assert [image.size for image in images] == [photo.size] * 4


def test_unet_takes_every_form_of_timestep(exported):
    unet = load_onnx_pipeline(exported).unet
    sample, category = torch.ones(1, 9, 8, 8), torch.ones(1, 1, 1)
    results = [unet(sample, t, category, return_dict=False)[0] for t in (7, 7.0, torch.tensor(7), torch.tensor([7]))]
    assert all(torch.equal(result, results[0]) for result in results)


def test_graphs_have_no_adapters_to_weigh(exported):
    unet = load_onnx_pipeline(exported).unet
    with pytest.raises(ValueError, match="`attention_kwargs`"):
        unet(torch.ones(1, 9, 8, 8), 7, torch.ones(1, 1, 1), attention_kwargs={"scale": 0.5})


def test_folder_without_graphs(tmp_path):
    with pytest.raises(ValueError, match="`folder` must hold ONNX graphs"):
        load_onnx_pipeline(tmp_path)


def test_from_pretrained_says_who_loads_graphs(exported):
    with pytest.raises(ValueError, match="holds ONNX graphs: load them with"):
        MoebiusInpaintPipeline.from_pretrained(exported)
