"""Batch normalisation becomes part of the convolution before it, once a network is trained."""

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_bn(network):
    """The same network, which is in evaluation, with its batch normalisations in convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1:
            for i in range(len(module) - 1):
                pair = module[i], module[i + 1]
                if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                    module[i], module[i + 1] = fuse_conv_bn_eval(*pair), nn.Identity()
    return network
