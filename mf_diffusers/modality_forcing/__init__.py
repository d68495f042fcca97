"""Modality Forcing for diffusers: the models and their pipeline. Its public classes are those of `mf_diffusers`."""
