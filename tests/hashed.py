"""Random numbers that are hashes, written a second time."""

import math

import torch


def mixed(h):
    for _ in range(2):
        h = (((h >> 16) ^ h) * 0x45D9F3B) % 2**31
    return (h >> 16) ^ h


def seed_of(key, side):
    return mixed(mixed(mixed(key % 2**31) ^ (key >> 31) % 2**31) ^ (side + 1))


def signs(key, side, rows, count):
    seed = seed_of(key, side)
    words = [mixed(mixed(seed ^ word) ^ torch.arange(rows)) for word in range(-(-count // 24))]
    return torch.stack([1.0 - 2 * (words[j // 24] >> (j % 24 + 4) & 1) for j in range(count)], 1).double()


def uniforms(key, side, count):
    return ((mixed(seed_of(key, side) ^ torch.arange(count)) >> 8).double() + 0.5) / 2**23


def normals(key, side, count):
    one, other = uniforms(key, 2 * side, count), uniforms(key, 2 * side + 1, count)
    return torch.sqrt(-2 * torch.log(one)) * torch.cos(2 * math.pi * other)
