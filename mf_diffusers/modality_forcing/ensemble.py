"""Several depth samples of one image to one depth map and its uncertainty."""

import torch


def ensemble_depth(
    depths: torch.Tensor, valid: torch.Tensor, iterations: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Aligned median of N samples, as Marigold does it, with what fits this model: samples are relative depth, known up to
    a scale, so each is aligned by a scale alone, and in log depth, where near and far pixels weigh the same.

    Args:
        depths: (N, B, 1, H, W), positive relative depth.
        valid: (N, B, 1, H, W), bool.
        iterations: rounds of alternating between the median map and the scales.

    Returns:
        Median depth (B, 1, H, W); its validity (B, 1, H, W), where at least half of the samples are valid; and its
        relative uncertainty (B, 1, H, W), the median absolute deviation of log depth (0.1 is about 10%).
    """
    log_depths = depths.log()
    everywhere = valid.all(dim=0, keepdim=True)
    # Where some sample is not valid it must not pull the scales; a map without common ground counts all its pixels.
    everywhere = everywhere | ~everywhere.flatten(2).any(dim=2)[..., None, None, None]
    for _ in range(iterations):
        median = log_depths.quantile(0.5, dim=0, keepdim=True)  # unlike torch.median, the middle of an even number too
        offset = torch.where(everywhere, log_depths - median, torch.nan).flatten(2).nanmedian(dim=2).values
        offset = offset - offset.mean(dim=0, keepdim=True)
        log_depths = log_depths - offset[..., None, None, None]
    median = log_depths.quantile(0.5, dim=0)
    uncertainty = (log_depths - median).abs().quantile(0.5, dim=0)
    return median.exp(), valid.float().mean(dim=0) >= 0.5, uncertainty
