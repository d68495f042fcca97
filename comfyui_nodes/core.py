"""What the pack leans on in ComfyUI's core beyond the interface for nodes, in one place, and a check that it is there.

Written without an import of the core, so that the check can speak where the core has changed.
"""

import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement


OLDEST = "0.27"  # pyproject.toml says the same to ComfyUI's registry
NEWEST_TESTED = "0.33"

# By what is lost without them: names in the core, and those of their parameters whose names count: that the pack gives
# by keyword, or takes in the core's stead.
WHOLE_PACK = "the whole pack"
Z_IMAGE = "Z-Image with depth"
LEANS_ON = {
    WHOLE_PACK: {
        # A place among the models that the loaders know
        "comfy.supported_models.models": (),
        "comfy.supported_models.Flux2": ("unet_config",),
        "comfy.supported_models_base.BASE.matches": ("unet_config", "state_dict"),
        "comfy.supported_models_base.BASE.get_model": ("state_dict", "prefix", "device"),
        "comfy.supported_models_base.BASE.process_unet_state_dict": ("state_dict",),
        # The transformer: FLUX.2's parts
        "comfy.ldm.flux.model.Flux": ("dtype", "device", "operations"),
        "comfy.ldm.flux.layers.DoubleStreamBlock": (
            *("hidden_size", "num_heads", "mlp_ratio", "modulation", "mlp_silu_act", "proj_bias"),
            *("dtype", "device", "operations"),
        ),
        "comfy.ldm.flux.layers.SingleStreamBlock": (
            *("hidden_size", "num_heads", "mlp_ratio", "modulation", "mlp_silu_act", "bias"),
            *("dtype", "device", "operations"),
        ),
        "comfy.ldm.flux.layers.SingleStreamBlock.forward": ("x", "vec", "pe", "modulation_dims", "transformer_options"),
        "comfy.ldm.flux.layers.SelfAttention": ("dim", "num_heads", "proj_bias", "dtype", "device", "operations"),
        "comfy.ldm.flux.layers.build_mlp": (
            *("hidden_size", "mlp_hidden_dim", "mlp_silu_act"),
            *("dtype", "device", "operations"),
        ),
        "comfy.ldm.flux.layers.MLPEmbedder": ("in_dim", "hidden_dim", "bias", "dtype", "device", "operations"),
        "comfy.ldm.flux.layers.Modulation": ("dim", "double", "bias", "dtype", "device", "operations"),
        "comfy.ldm.flux.layers.ModulationOut": ("shift", "scale", "gate"),
        "comfy.ldm.flux.layers.LastLayer": (
            *("hidden_size", "patch_size", "out_channels", "bias"),
            *("dtype", "device", "operations"),
        ),
        "comfy.ldm.flux.layers.QKNorm": (),
        "comfy.ldm.flux.layers.apply_mod": (),
        "comfy.ldm.flux.math.attention": ("pe", "transformer_options"),
        # The model around it
        "comfy.model_base.Flux": ("model_config", "device", "unet_model"),
        "comfy.model_base.BaseModel.extra_conds": (),
        "comfy.model_base.BaseModel.encode_adm": (),
        "comfy.model_base.BaseModel.get_dtype_inference": (),
        "comfy.model_base.BaseModel._apply_model": ("x", "t", "c_crossattn", "transformer_options"),
        "comfy.conds.CONDRegular": (),
        "comfy.model_management.cast_to_device": (),
        # A run of its own for every sampling, and the latent that it packs
        "comfy.samplers.CFGGuider.outer_sample": (
            *("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed"),
            "latent_shapes",
        ),
        "comfy.samplers.CFGGuider.__call__": (),
        "comfy.samplers.CFGGuider.outer_predict_noise": ("model_options", "seed"),
        "comfy.samplers.KSAMPLER.sample": (
            *("model_wrap", "sigmas", "extra_args", "callback", "noise"),
            *("latent_image", "denoise_mask", "disable_pbar"),
        ),
        "comfy.sample.prepare_noise": (),
        "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE": (),
        "comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE": (),
        "comfy.patcher_extension.WrappersMP.PREDICT_NOISE": (),
        "comfy.patcher_extension.add_wrapper": ("is_model_options",),
        "comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL": (),
        "comfy.patcher_extension.WrapperExecutor.new_class_executor": (),
        "comfy.patcher_extension.get_all_wrappers": (),
        "comfy.model_patcher.ModelPatcher": ("model",),
        "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": (),
        "comfy.model_patcher.ModelPatcher.get_model_object": (),
        "comfy.model_patcher.ModelPatcher.add_object_patch": (),
        "comfy.nested_tensor.NestedTensor": ("tensors",),
        "comfy.nested_tensor.NestedTensor.unbind": (),
        "comfy.samplers.resolve_areas_and_cond_masks_multidim": ("conditions", "dims", "device"),
        "comfy.samplers.get_area_and_mult": ("conds", "x_in", "timestep_in"),
        "comfy.utils.pack_latents": (),
        "comfy.model_management.intermediate_device": (),
        # Previews
        "comfy.latent_formats.Flux2": (),
        "latent_preview.Latent2RGBPreviewer": ("latent_rgb_factors", "latent_rgb_factors_reshape"),
        # Sockets that take raw depth in two forms, and outputs that a graph may leave unconnected
        "comfy_api.latest.io.MultiType.Input": ("types", "tooltip", "optional"),
        "comfy_execution.graph_utils.ExecutionBlocker": (),
    },
    Z_IMAGE: {
        "comfy.ldm.lumina.model.NextDiT": (
            *("patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads"),
            *("multiple_of", "ffn_dim_multiplier", "norm_eps", "qk_norm", "cap_feat_dim", "axes_dims", "axes_lens"),
            *("rope_theta", "z_image_modulation", "time_scale", "pad_tokens_multiple"),
            *("dtype", "device", "operations"),
        ),
        "comfy.ldm.lumina.model.NextDiT.patchify_and_embed": ("transformer_options",),
        "comfy.ldm.lumina.model.NextDiT.unpatchify": ("return_tensor",),
        "comfy.ldm.lumina.model.JointTransformerBlock": (
            *("n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "qk_norm"),
            *("z_image_modulation", "operation_settings"),
        ),
        "comfy.ldm.lumina.model.JointTransformerBlock.forward": ("timestep_zero_index", "transformer_options"),
        "comfy.ldm.lumina.model.pad_zimage": (),
        "comfy.ldm.lumina.model.pos_ids_x": ("transformer_options",),
        "comfy.ldm.modules.diffusionmodules.mmdit.TimestepEmbedder": ("output_size", "dtype", "device", "operations"),
        "comfy.supported_models.ZImage": ("unet_config",),
        "comfy.model_base.Lumina2": (),
        "comfy.model_base.ModelType.FLOW": (),
        "comfy.latent_formats.Flux": (),
    },
    "'Load Modality Forcing Pipeline' or 'Adapter'": {
        "comfy.sd.load_lora_for_models": ("model", "clip", "lora", "strength_model", "strength_clip"),
        "comfy.sd.load_diffusion_model_state_dict": ("sd", "disable_dynamic"),
        "comfy.sd.CLIP": ("target", "parameters", "state_dict", "model_options"),
        "comfy.supported_models_base.ClipTarget": ("tokenizer", "clip"),
        "comfy.sd1_clip.SDClipModel": (
            *("layer", "textmodel_json_config", "special_tokens", "layer_norm_hidden_state", "model_class"),
            *("enable_attention_masks", "return_attention_masks", "dtype", "device", "model_options"),
        ),
        "comfy.text_encoders.flux.Flux2TEModel": ("device", "dtype", "model_options", "name", "clip_model"),
        "comfy.text_encoders.llama.BaseLlama": (),
        "comfy.text_encoders.llama.Llama2_": ("config", "device", "dtype", "ops"),
        "comfy.text_encoders.llama.Qwen3_4BConfig": ("num_hidden_layers", "rope_theta"),
        "comfy.sd.VAE": ("sd",),
        "comfy.sd.VAE.model_size": (),
        "comfy.model_management.vae_device": (),
        "comfy.model_management.vae_offload_device": (),
    },
}


def missing(names: dict[str, tuple]) -> Iterator[str]:
    """Those of `names` that are not there, and parameters that they have lost, as "name" and "name(parameter)"."""
    for name, parameters in names.items():
        try:
            thing = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield name
            continue
        if parameters:
            taken = inspect.signature(thing).parameters
            takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
            yield from (f"{name}({x})" for x in parameters if x not in taken and not takes_any)


def serves(what: str) -> bool:
    """Whether the core has all names that a key of `LEANS_ON` needs. Where a parameter alone is another, most graphs
    may run yet."""
    return LEANS_ON[what].keys().isdisjoint(missing(LEANS_ON[what]))


def state_of_the_core(version: str) -> tuple[bool, list[str]]:
    """
    Args:
        version: of the ComfyUI that runs.

    Returns:
        Whether the pack can be imported, and a line for each thing that this ComfyUI is too old or too new for.
    """
    release = tuple(int(part) for part in version.split(".")[:2])
    if release < tuple(int(part) for part in OLDEST.split(".")):
        return False, [f"Modality Forcing needs ComfyUI {OLDEST} or newer, and this is {version}: update ComfyUI."]
    lost = {what: list(missing(names)) for what, names in LEANS_ON.items()}
    lines = [
        f"ComfyUI {version} has changed what Modality Forcing leans on, so that {what} may not work "
        f"({', '.join(names)}; tested with ComfyUI {OLDEST} to {NEWEST_TESTED}): update the pack."
        for what, names in lost.items()
        if names
    ]
    return serves(WHOLE_PACK), lines


def state_of_the_packages(requirements: Path) -> tuple[bool, list[str]]:
    """
    Args:
        requirements: a file of them.

    Returns:
        Whether all are installed, and a line with the remedy for those that are missing, and for those that are old.
    """
    absent, old = [], []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            old.append(f"{line}, and {version} is installed")
    remedy = f'run "{sys.executable}" -m pip install -r "{requirements}" and restart ComfyUI.'
    said = {"needs packages that are not installed": absent, "may not work with older packages": old}
    lines = [f"Modality Forcing {what} ({'; '.join(names)}): {remedy}" for what, names in said.items() if names]
    return not absent, lines
