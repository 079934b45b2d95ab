"""The signs of sketches, written a second time."""

import torch


def mixed(h):
    for _ in range(2):
        h = (((h >> 16) ^ h) * 0x45D9F3B) % 2**31
    return (h >> 16) ^ h


def signs(key, side, rows, count):
    seed = mixed(mixed(mixed(key % 2**31) ^ (key >> 31) % 2**31) ^ (side + 1))
    words = [mixed(mixed(seed ^ word) ^ torch.arange(rows)) for word in range(-(-count // 24))]
    return torch.stack([1.0 - 2 * (words[j // 24] >> (j % 24 + 4) & 1) for j in range(count)], 1).double()
