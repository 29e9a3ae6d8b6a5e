"""The settings of the U-Net that most tests use; its native size is 128 px."""

TINY = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "num_attention_heads": 4,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 24,
    "norm_num_groups": 8,
}
