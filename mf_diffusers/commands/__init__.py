"""The commands of `mf-diffusers`, a module for each group of them.

What takes long to import (torch, diffusers, transformers) is imported inside the commands: help does not wait for it.
"""
