"""torch.hub.load("OWNER/r2o", "encoder", ckpt="r2o.pth"), or torch.hub.load("FOLDER", "encoder", source="local", …)."""

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def encoder(ckpt: str, arch: str | None = None):
    """A torchvision ResNet in eval mode with r2o.pth's weights, whose fc is the identity, or a ViT that gives the mean
    of its patch tokens: (B, 3, h, w) -> (B, C).

    ckpt: r2o.pth, or any file that runtime.weights.read_weights reads. arch: its encoder (default: as it says).
    """
    import torch
    from torchvision.models import get_model

    from runtime.cli import need
    from runtime.weights import load_encoder

    net, _ = load_encoder(ckpt, arch)
    need(
        net.arch != "tiny", f"{ckpt} holds the encoder tiny, which torchvision lacks: use runtime.weights.load_encoder"
    )
    if net.arch == "vit_b":
        return net
    whole = get_model(net.arch, weights=None)
    whole.fc = torch.nn.Identity()
    whole.load_state_dict(net.state_dict())
    return whole.eval()
