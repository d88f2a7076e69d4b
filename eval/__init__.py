"""Evaluation of frozen backbones: features, k-NN, linear probe, pictures. Nothing here is imported by training."""
