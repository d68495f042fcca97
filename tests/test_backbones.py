"""The table of transformer families."""

import pytest
import torch
from tiny import TINY_DIT, TINY_TRANSFORMER
from tiny_z_image import TINY_Z_IMAGE

from mf_diffusers.modality_forcing.backbones import BACKBONES, family_of


BASES = {
    "flux2": {name: value for name, value in TINY_TRANSFORMER.items() if "depth" not in name},
    "z_image": TINY_Z_IMAGE,
    "dit": TINY_DIT,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_what_depth_adds_is_what_the_base_lacks(name):
    backbone = BACKBONES[name]
    base = backbone.base_class(**BASES[name])
    model = backbone.transformer_class.from_base(base, depth_channels=16, num_depth_decoder_layers=1)
    added = {parameter for parameter in model.state_dict() if model.is_depth_parameter(parameter)}
    assert added == model.state_dict().keys() - base.state_dict().keys()
    assert family_of(base) == family_of(model) == family_of(type(model).__name__) == name
    assert backbone.transformer_class.shape_of(base.config) == model.shape


def test_other_transformers_are_of_no_family():
    with pytest.raises(ValueError, match="Linear is no transformer of a known family: flux2, z_image, dit"):
        family_of(torch.nn.Linear(1, 1))
