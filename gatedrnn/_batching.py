"""vmap: a batch of scans is one scan with more groups, the batch folded into the channels."""


def fold(tensor, bdim, size, channel):
    """Moves the batch into the channel dimension: (..., B * C, ...)."""
    if tensor is None:
        return None
    if bdim is None:
        tensor = tensor.unsqueeze(channel).expand(
            *tensor.shape[:channel], size, *tensor.shape[channel:]
        )
    else:
        tensor = tensor.movedim(bdim, channel)
    return tensor.flatten(channel, channel + 1)


def fold_gate(g, bdim, size, channels):
    if g is None:
        return None
    rank = g.dim() - (bdim is not None)
    channel = rank - 3
    logical = [s for i, s in enumerate(g.shape) if i != bdim]
    if logical[channel] == 1 and bdim is None:
        return g
    shape = list(logical)
    shape[channel] = channels
    if bdim is None:
        return fold(g.expand(shape), None, size, channel)
    g = g.movedim(bdim, 0).expand(size, *shape)
    return fold(g, 0, size, channel)


def unfold(tensor, size, channel):
    """(..., B * C, ...) -> (B, ..., C, ...)."""
    return tensor.unflatten(channel, (size, -1)).movedim(channel, 0)
