"""Our forward of the SD3 transformer and VAE decoder over the stock weights; needs no diffusers."""
