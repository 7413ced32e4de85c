"""The reward that learns, served: other trainers post their images, get scores, and the discriminator learns."""
