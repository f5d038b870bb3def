"""What looks at a model: samples and bounds, the Fréchet distance, pictures."""
