import pytest

from diffusers_moebius.training.data import ResumableBatchSampler


def test_batches_resume_and_are_dealt_to_processes():
    def take(count, **kwargs):
        batches = iter(ResumableBatchSampler(10, 3, seed=1, **kwargs))
        return [next(batches) for _ in range(count)]

    whole = take(8)
    assert take(5, first_batch=3) == whole[3:]
    assert take(4, num_processes=2) == whole[0::2]
    assert take(4, num_processes=2, process_index=1) == whole[1::2]
    assert take(2, num_processes=2, process_index=1, first_batch=2) == whole[5::2]
    for epoch in range(2):
        indices = [index for batch in whole[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(set(indices)) == 9 and all(10 * epoch <= index < 10 * epoch + 10 for index in indices)
    with pytest.raises(ValueError, match="`batch_size`"):
        ResumableBatchSampler(2, 3, seed=0)
