"""torch.hub.load("OWNER/r2o", "encoder", ckpt="r2o.pth"), or torch.hub.load("FOLDER", "encoder", source="local", …)."""

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm"]


def encoder(ckpt: str, arch: str | None = None):
    """A torchvision ResNet or ViT in eval mode with r2o.pth's weights, whose classifier is the identity: (B, 3, h, w)
    -> (B, C).

    ckpt: r2o.pth, or any file that runtime.weights.read_weights reads. arch: what it holds (default: it tells).
    """
    import torch
    from torchvision.models import get_model

    from runtime.cli import need
    from runtime.weights import load_encoder

    net, _ = load_encoder(ckpt, arch)
    need(net.arch != "tiny", f"{ckpt} holds the encoder tiny, which torchvision lacks: use load_encoder")
    whole = get_model({"vit_b": "vit_b_16"}.get(net.arch, net.arch), weights=None)
    setattr(whole, "heads" if net.arch == "vit_b" else "fc", torch.nn.Identity())
    names = whole.state_dict()
    whole.load_state_dict({name: x for name, x in net.state_dict().items() if name in names})
    return whole.eval()
