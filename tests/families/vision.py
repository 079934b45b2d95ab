"""Networks on images and plain vectors: ResNet, ConvNeXt, a U-Net, an autoencoder."""

import torch
import transformers
from encoders import CLASSES
from family import Family
from torch import nn
from torch.nn import functional

BATCH = 3


def labelled_images():
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.randint(5, (BATCH,))}


class UNet(nn.Module):
    """Two scales down, two up by transposed convolutions, each beside its skip connection."""

    def __init__(self):
        super().__init__()
        self.enter, self.down1 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.up2, self.merge2 = nn.ConvTranspose2d(10, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.up1, self.merge1 = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.norm, self.leave = nn.GroupNorm(2, 8), nn.Conv2d(6, 3, 1)

    def forward(self, x, target):
        full = functional.silu(self.enter(x))
        half = functional.silu(self.down1(full))
        y = functional.silu(self.down2(half))
        y = functional.silu(self.norm(self.merge2(torch.cat([half, functional.silu(self.up2(y))], 1))))
        y = functional.silu(self.merge1(torch.cat([full, functional.silu(self.up1(y))], 1)))
        return functional.mse_loss(self.leave(y), target)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 20))

    def forward(self, x):
        return functional.mse_loss(self.decoder(self.encoder(x)), x)


def pictures():
    x = torch.randn(BATCH, 3, 8, 8)
    return {"x": x, "target": x.roll(1, 3)}


FAMILIES = [
    Family(
        "ResNet",
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", **CLASSES
            )
        ),
        labelled_images,
        """
        linear resnet.{embedder.embedder,encoder.stages.1.layers.0.shortcut}.convolution
        linear resnet.encoder.stages.0.layers.{0,1}.layer.{0,1}.convolution
        linear resnet.encoder.stages.1.layers.0.layer.{0,1}.convolution
        norm resnet.{embedder.embedder,encoder.stages.1.layers.0.shortcut}.normalization
        norm resnet.encoder.stages.0.layers.{0,1}.layer.{0,1}.normalization
        norm resnet.encoder.stages.1.layers.0.layer.{0,1}.normalization
        linear classifier.1
        """,
    ),
    Family(
        "ConvNeXt",  # depthwise convolutions, then layers on the last dimension
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(
                hidden_sizes=[8, 12], depths=[2, 1], num_stages=2, patch_size=2, **CLASSES, layer_scale_init_value=0.1
            )
        ),
        labelled_images,
        """
        linear convnext.embeddings.patch_embeddings convnext.encoder.stages.1.downsampling_layer.1
        linear convnext.encoder.stages.0.layers.{0,1}.{dwconv,pwconv1,pwconv2}
        linear convnext.encoder.stages.1.layers.0.{dwconv,pwconv1,pwconv2}
        norm convnext.embeddings.layernorm convnext.encoder.stages.1.downsampling_layer.0 convnext.layernorm
        norm convnext.encoder.stages.{0.layers.0,0.layers.1,1.layers.0}.layernorm
        plain convnext.encoder.stages.{0.layers.0,0.layers.1,1.layers.0}.layer_scale_parameter
        linear classifier
        """,
        hidden=("*.dwconv.weight",),
    ),
    Family(
        "U-Net",
        UNet,
        pictures,
        """
        linear enter down1 down2 up2 merge2 up1 merge1 leave
        norm norm
        """,
        hidden=("up1.weight", "up2.weight"),
    ),
    Family(
        "Autoencoder",
        Autoencoder,
        lambda: {"x": torch.randn(16, 20) + 0.3},
        "linear encoder.{0,2} decoder.{0,2}",
    ),
]
