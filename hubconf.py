"""torch.hub.load("OWNER/r2o", "encoder", ckpt="r2o.pth"), or torch.hub.load("FOLDER", "encoder", source="local", …)."""

dependencies = ["torch", "torchvision", "numpy", "PIL"]


def encoder(ckpt: str, arch: str | None = None):
    """A torchvision ResNet in eval mode with r2o.pth's weights, whose fc passes features on: (B, 3, h, w) -> (B, C).

    ckpt: r2o.pth, or anything else that r2o.load_encoder takes. arch: which ResNet, where the file does not say.
    """
    import torch
    from torchvision.models import get_model

    import r2o

    net, _ = r2o.load_encoder(ckpt, arch)
    if net.arch == "tiny":
        raise r2o.UsageError(f"{ckpt} holds the encoder tiny, which torchvision has not: use r2o.load_encoder")
    whole = get_model(net.arch, weights=None)
    whole.fc = torch.nn.Identity()
    whole.load_state_dict(net.state_dict())
    return whole.eval()
