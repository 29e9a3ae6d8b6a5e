TINY_AUTOENCODER = "madebyollin/taesdxl"  # has the latents of the published models
