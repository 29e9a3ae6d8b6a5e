"""The page's API, for `gradio_client` and other programs."""

import tempfile
from pathlib import Path

import gradio as gr
from PIL import Image

from ..pictures.mask import fit_mask, read_mask, removal_dilation
from .handlers import DEFAULT_CONTEXT, Demo, friendly
from .inpainting import generate
from .models import OWN
from .photos import Photo, VisitorError, open_photo, save_photo
from .session import delete_upload, remove_folder


def add_api(demo: Demo) -> None:
    """Adds the endpoint, by components that are not shown, whose labels are its documentation."""

    @friendly()
    def predict(
        photo: str | None,
        mask: str | None,
        model: str = "",
        steps: float | None = None,
        guidance: float | None = None,
        seed: float = 0,
        edge_margin: float | None = None,
        surroundings: float = DEFAULT_CONTEXT,
        color_compensation: bool = False,
        file_format: str = "PNG",
        detail: str = "auto",
    ) -> tuple[str, dict]:
        """
        Removes what a mask marks from a photo. `mask` is a picture of the photo's size, white where it is filled.
        `model` is a name of the page's list, owner/name or owner/name/folder; empty is the default. Returns the file
        (of the photo's size; in PNG every pixel outside the mask is the photo's) and the settings used.
        """
        if not photo or not mask:
            raise VisitorError("photo and mask are both needed.")
        if file_format not in ("PNG", "JPEG"):
            raise VisitorError(f"file_format must be PNG or JPEG, but is {file_format!r}.")
        folder = Path(tempfile.mkdtemp(prefix="moebius-demo-"))
        try:
            opened, given = open_photo(photo), open_photo(mask).image
            try:
                values = fit_mask(read_mask(given)[0], opened.image.height, opened.image.width)
            except ValueError as error:
                raise VisitorError(str(error)) from error
            edge_margin = removal_dilation(*opened.image.size) if edge_margin is None else edge_margin
            values = demo.grow(values, edge_margin)
            name = model or demo.shelf.default
            source = demo.shelf.resolve(name) if name in demo.shelf.sources else demo.shelf.resolve(OWN, name)
            settings = demo.settings(source, values, steps, guidance, seed, surroundings, color_compensation, detail)
            demo.shelf.get(source)
            outputs = generate(source, opened.image, values, opened.view(), settings, str(folder / "stop"))
            result = next(output for output in outputs if isinstance(output, Image.Image))
            path = save_photo(Photo(result, opened.metadata, opened.name), folder, file_format)
            gradio_copy = gr.processing_utils.save_file_to_cache(path, cache_dir=gr.utils.get_upload_folder())
            return gradio_copy, demo.describe(name, settings, edge_margin)
        finally:
            remove_folder(folder)
            for path in (photo, mask):
                delete_upload(path)

    with gr.Column(visible=False):
        inputs = [
            gr.File(label="photo", type="filepath"),
            gr.File(label="mask (white is filled, the photo's size)", type="filepath"),
            gr.Textbox("", label="model (empty: the default)"),
            gr.Number(None, label="steps (none: the model's own)"),
            gr.Number(None, label="guidance (none: the model's own)"),
            gr.Number(0, label="seed"),
            gr.Number(None, label="edge margin in pixels (none: by the photo's size)"),
            gr.Number(DEFAULT_CONTEXT, label="surroundings (percent of the mask)"),
            gr.Checkbox(False, label="match colours"),
            gr.Textbox("PNG", label="file format (PNG or JPEG)"),
            gr.Textbox("auto", label="texture from the photo (auto, patches or none)"),
        ]
        outputs = [gr.File(label="result"), gr.JSON(label="settings")]
        gr.Button("API").click(
            predict, inputs, outputs, api_name="predict", concurrency_limit=1, concurrency_id="model"
        )
