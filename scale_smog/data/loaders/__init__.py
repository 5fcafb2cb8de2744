"""The loaders: encoded images and sampled augmentation parameters in, batches of views out."""
