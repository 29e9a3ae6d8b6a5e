import io
import threading

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from small_parts import hole, photo, seeded

from diffusers_moebius.pipelines.pipeline_moebius_inpaint import MoebiusInpaintPipeline


class TestCallbacks:
    RUN = {"num_inference_steps": 4, "strength": 1.0, "output_type": "latent"}

    def test_returned_tensors_replace_those_of_the_call(self, pipe, tiny_unet):
        names = MoebiusInpaintPipeline._callback_tensor_inputs
        shapes, seen = {}, []
        tiny_unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
        )

        def replace(pipeline, step, timestep, tensors):
            shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            return {name: torch.full_like(tensor, step) for name, tensor in tensors.items()}

        result = pipe(
            photo(),
            hole(),
            callback_on_step_end=replace,
            callback_on_step_end_tensor_inputs=names,
            guidance_end=0.75,
            **self.RUN,
        ).images
        assert shapes == {
            "latents": (1, 4, 8, 8),
            "category_embeds": (2, 10, 24),
            "mask": (1, 1, 8, 8),
            "masked_image_latents": (1, 4, 8, 8),
        }
        for step, (sample, embeds) in enumerate(seen[1:]):
            assert (sample == step).all() and (embeds == step).all()
        assert seen[-1][1].shape == (1, 10, 24)  # the last step is unguided
        assert (result == 3).all()

    def test_a_callback_may_change_the_guidance(self, pipe, unet_calls):
        def cut(pipeline, step, timestep, tensors):
            if step == 1:
                pipeline._guidance_scale = 0.0
            return tensors

        pipe(photo(), hole(), callback_on_step_end=cut, **self.RUN)
        assert [shape[0] for shape in unet_calls] == [2, 2, 1, 1]

    def test_pipeline_callbacks(self, pipe):
        steps = []

        class Record(PipelineCallback):
            tensor_inputs = ["latents", "mask"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                steps.append((step_index, sorted(callback_kwargs)))
                return callback_kwargs

        callback = MultiPipelineCallbacks([Record(cutoff_step_ratio=0.5)])
        pipe(photo(), hole(), callback_on_step_end=callback, **self.RUN)
        assert steps == [(step, ["latents", "mask"]) for step in range(4)]

    def test_interrupt(self, pipe, unet_calls):
        def stop(pipeline, step, timestep, tensors):
            pipeline._interrupt = step == 1
            return tensors

        images, masks = [photo(), photo(64, 96)], [hole(), hole(64, 96)]
        results = pipe(images, masks, callback_on_step_end=stop, **self.RUN | {"output_type": "pil"}).images
        assert pipe.interrupt and len(unet_calls) == 2
        assert (np.asarray(results[0])[hole()] != np.asarray(images[0])[hole()]).any()
        np.testing.assert_array_equal(results[1], images[1])  # had not begun
        pipe(photo(), hole(), **self.RUN)
        assert not pipe.interrupt and len(unet_calls) == 6

    def test_progress_bar(self, pipe):
        stream = io.StringIO()
        pipe.set_progress_bar_config(file=stream)
        pipe([photo(), photo(64, 96)], [hole(), hole(64, 96)], **self.RUN)
        assert "8/8" in stream.getvalue()
        assert pipe.num_timesteps == 4

    def test_threads_do_not_disturb_each_other(self, pipe):
        jobs = [
            {"num_inference_steps": steps, "guidance_scale": scale, "image": photo(seed=steps), "mask_image": hole()}
            for steps, scale in [(5, 1.0), (3, 3.0), (4, 2.0)]
        ]
        for job in jobs:
            job |= {"output_type": "latent", "callback_on_step_end": lambda pipeline, step, timestep, tensors: tensors}
        expected = [pipe(**job, generator=seeded(i)).images for i, job in enumerate(jobs)]
        results = [None] * len(jobs)
        start = threading.Barrier(len(jobs))

        def work(i):
            start.wait()
            results[i] = pipe(**jobs[i], generator=seeded(i)).images

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result, wanted in zip(results, expected):
            torch.testing.assert_close(result, wanted)
