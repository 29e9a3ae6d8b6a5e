import pytest
from runs import assert_equal_weights, load_script, run

from diffusers_moebius.training.data import index_batches


def test_batches_resume_and_are_dealt_to_processes():
    def take(count, **kwargs):
        batches = index_batches(10, 3, seed=1, **kwargs)
        return [next(batches) for _ in range(count)]

    whole = take(8)
    assert take(5, first_batch=3) == whole[3:]
    assert take(4, num_processes=2) == whole[0::2]
    assert take(4, num_processes=2, process_index=1) == whole[1::2]
    assert take(2, num_processes=2, process_index=1, first_batch=2) == whole[5::2]
    for epoch in range(2):
        indices = [index for batch in whole[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(set(indices)) == 9 and all(10 * epoch <= index < 10 * epoch + 10 for index in indices)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_run_from_a_stream_resumes_to_the_same_parameters(command, shard, tmp_path, num_processes):
    command = [argument for argument in command if not argument.startswith("--train_data_dir")]
    command += [f"--train_shards_path_or_url={shard}", "--stream_shards", "--shuffle_buffer_size=5"]
    command += ["--train_batch_size=2", "--dataloader_num_workers=2", "--max_train_steps=8", "--freeze_batch_norm"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def train(*options):
        if num_processes == 1:
            load_script("train_inpainting").main([*command, *options])
        else:
            run("train_inpainting", [*command, *options], num_processes)

    train(f"--output_dir={whole}", "--checkpointing_steps=5")  # not a multiple of the workers
    resumed.mkdir()
    (whole / "checkpoint-5").rename(resumed / "checkpoint-5")
    train(f"--output_dir={resumed}", "--resume_from_checkpoint=latest", "--checkpointing_steps=99")
    assert_equal_weights(whole, resumed)
