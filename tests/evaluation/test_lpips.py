import sys
import types

import pytest
import torch
from lpips_weights import NETWORKS, make_weights
from safetensors.torch import save_file
from torch import nn

from diffusers_moebius.evaluation.lpips import LPIPS, distance_map

# What an independent implementation of the published metric gives for these weights and pictures.
EXPECTED = {"alex": [1.1349162, 1.1254812], "vgg": [0.6817960, 0.6838334]}


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(7)
    return torch.rand(2, 2, 3, 64, 80, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_lpips_matches_independent_implementation(name, pictures):
    values = LPIPS(make_weights(name))(*pictures)
    torch.testing.assert_close(values, torch.tensor(EXPECTED[name]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_lpips_of_equal_pictures_is_zero(name, pictures):
    lpips = LPIPS(make_weights(name))
    assert lpips(pictures[0], pictures[0]).abs().max() == 0


def test_distance_map_is_high_where_the_pictures_differ(pictures):
    a, b = pictures[0], pictures[0].clone()
    b[..., :20, :20] = pictures[1][..., :20, :20]
    lpips = LPIPS(make_weights("alex"))
    distances = distance_map(lpips.distances(a, b), (64, 80))
    assert distances.shape == (2, 64, 80)
    torch.testing.assert_close(distances.mean((1, 2)), lpips(a, b), rtol=0.05, atol=0)
    assert distances[..., :20, :20].mean() > 3 * distances[..., 40:, 50:].mean()


def test_lpips_counts_places_by_their_weight(pictures):
    a, b = pictures
    lpips = LPIPS(make_weights("alex"))
    torch.testing.assert_close(lpips(a, b, torch.ones_like(a[:, :1])), lpips(a, b))
    half = torch.zeros_like(a[:, :1])
    half[..., : half.shape[3] // 2] = 2
    torch.testing.assert_close(lpips(a, b, half) + lpips(a, b, 2 - half), 2 * lpips(a, b))
    c = torch.where(half > 0, a, b)  # like `a` on the left
    assert (lpips(a, c, half) < 0.7 * lpips(a, c, 2 - half)).all()


def test_lpips_can_be_trained_through(pictures):
    a = pictures[0].clone().requires_grad_()
    lpips = LPIPS(make_weights("alex"))
    lpips(a, pictures[1]).sum().backward()
    step = a.detach() - 1e-3 * a.grad / a.grad.abs().max()
    assert lpips(step, pictures[1]).sum() < lpips(a, pictures[1]).sum()
    assert not list(lpips.parameters())


def test_lpips_from_file(tmp_path, pictures):
    path = tmp_path / "alex.safetensors"
    save_file({name: value.half() for name, value in make_weights("alex").items()}, path)
    values = LPIPS.from_pretrained(path)(*pictures)
    torch.testing.assert_close(values, torch.tensor(EXPECTED["alex"]), rtol=1e-2, atol=0)


def test_lpips_from_the_package(monkeypatch, pictures):
    # The package's own layout: convolutions among other layers in slices, a head behind a dropout.
    weights = make_weights("alex")

    class PackageLPIPS(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"
            self.net = nn.Module()
            self.lins = nn.ModuleList()
            for i in range(5):
                kernels = weights[f"conv.{i}.weight"]
                conv = nn.Conv2d(kernels.shape[1], kernels.shape[0], kernels.shape[-1])
                conv.weight, conv.bias = nn.Parameter(kernels), nn.Parameter(weights[f"conv.{i}.bias"])
                self.net.add_module(f"slice{i + 1}", nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3)))
                head = nn.Conv2d(kernels.shape[0], 1, 1, bias=False)
                head.weight = nn.Parameter(weights[f"head.{i}"].view(1, -1, 1, 1))
                lin = nn.Module()
                lin.model = nn.Sequential(nn.Dropout(), head)
                self.lins.append(lin)

    package = types.ModuleType("lpips")
    package.LPIPS = PackageLPIPS
    monkeypatch.setitem(sys.modules, "lpips", package)
    torch.testing.assert_close(LPIPS.from_pretrained()(*pictures), torch.tensor(EXPECTED["alex"]), rtol=1e-5, atol=0)


def test_lpips_without_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="`lpips_weights`"):
        LPIPS.from_pretrained()
    with pytest.raises(ValueError, match=r"`lpips_weights`.*absent"):
        LPIPS.from_pretrained(tmp_path / "absent.safetensors")


def test_lpips_with_wrong_weights(pictures):
    weights = make_weights("alex")
    del weights["head.4"]
    with pytest.raises(ValueError, match="`state_dict`"):
        LPIPS(weights)
    with pytest.raises(ValueError, match="`input` and `target`"):
        LPIPS(make_weights("alex"))(pictures[0], pictures[1][..., 1:])
