"""The page's API, for `gradio_client` and other programs."""

import dataclasses

import gradio as gr

from ..pictures.mask import fit_mask, read_mask
from .handlers import DEFAULT_CONTEXT, Demo, friendly
from .photos import VisitorError, open_photo
from .session import Session, delete_upload


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
        session, name = None, model or demo.shelf.default
        try:
            if not photo or not mask:
                raise VisitorError("photo and mask are both needed.")
            if file_format not in ("PNG", "JPEG"):
                raise VisitorError(f"file_format must be PNG or JPEG, but is {file_format!r}.")
            opened, given = open_photo(photo), open_photo(mask).image
            try:
                values = fit_mask(read_mask(given)[0], opened.image.height, opened.image.width)
            except ValueError as error:
                raise VisitorError(str(error)) from error
            session = Session(opened)
            options = {"edge_margin": edge_margin, "context": surroundings, "color_compensation": color_compensation}
            run = demo.run(session, 1, values, name, steps, guidance, seed, detail=detail, **options)
            *_, (_, (result,)) = run
            path = str(demo.write(session, result, file_format))
            gradio_copy = gr.processing_utils.save_file_to_cache(path, cache_dir=gr.utils.get_upload_folder())
            # Where the model lies on the server is not for everybody.
            settings = dataclasses.asdict(session.version(result).settings) | {"model": name}
            return gradio_copy, settings
        finally:
            if session is not None:
                session.close()
            for path in filter(None, (photo, mask)):
                delete_upload(path)

    with gr.Column(visible=False):
        inputs = [
            gr.File(label="photo", type="filepath"),
            gr.File(label="mask (white is filled, the photo's size)", type="filepath"),
            gr.Textbox("", label="model (empty: the default)"),
            gr.Number(None, label="steps (none: the model's own)"),
            gr.Number(None, label="guidance (none: the model's own)"),
            gr.Number(0, label="seed"),
            gr.Number(None, label="edge margin in pixels (none: over what is left of an object)"),
            gr.Number(DEFAULT_CONTEXT, label="surroundings (percent of the mask)"),
            gr.Checkbox(False, label="match colours"),
            gr.Textbox("PNG", label="file format (PNG or JPEG)"),
            gr.Textbox("auto", label="texture from the photo (auto, patches or none)"),
        ]
        outputs = [gr.File(label="result"), gr.JSON(label="settings")]
        gr.Button("API").click(
            predict, inputs, outputs, api_name="predict", concurrency_limit=1, concurrency_id="model"
        )
