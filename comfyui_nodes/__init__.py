"""Modality Forcing in ComfyUI: a native model and the nodes around it."""
