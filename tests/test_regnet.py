"RegNetY against torchvision, timm and transformers: the same numbers for the same weights."
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from seer_nb.regnet import REGNETY, AnyNetConfig, RegNetY, count_macs, count_parameters, regnety
from seer_nb.weights import convert_state

torch.set_num_threads(1)

def scramble(model):
    "Give every normalisation values that a wrong mapping cannot survive; keep activations near their size."
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, .7, 1.3), (module.bias, -.2, .2), (module.running_mean, -.2, .2), (module.running_var, .7, 1.3)):
                with torch.no_grad(): tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def torchvision_net(config):
    from torchvision.models.regnet import BlockParams, RegNet

    depths, widths, group_widths = zip(*config.stages)
    net = RegNet(BlockParams(depths, widths, group_widths, [1.0] * 4, [2] * 4, config.se_ratio), stem_width=config.stem_width)
    net.fc = torch.nn.Identity()
    return net


def timm_net(config):
    from timm.models.regnet import RegNet, RegNetCfg

    cfg = RegNetCfg(depth=config.depth, w0=config.w_0, wa=config.w_a, wm=config.w_m, group_size=config.group_width, se_ratio=config.se_ratio,
                    stem_width=config.stem_width, group_min_ratio=0.9 if config.width_rule == "torchvision" else 0.0)
    return RegNet(cfg, num_classes=0)


class Transformers(torch.nn.Module):
    "transformers' RegNet with features of the shape [B, D]."

    def __init__(self, config):
        from transformers import RegNetConfig, RegNetModel

        super().__init__()
        depths, widths, group_widths = zip(*config.stages)
        assert len(set(group_widths)) == 1
        self.net = RegNetModel(RegNetConfig(embedding_size=config.stem_width, hidden_sizes=list(widths), depths=list(depths),
                                            groups_width=group_widths[0], layer_type="y"))

    def forward(self, images): return self.net(images).pooler_output.flatten(1)
    def state_dict(self): return self.net.state_dict()


TV = "torchvision"
CASES = [
    ("regnety_toy", "vissl"), ("regnety_400mf", "vissl"), ("regnety_800mf", "vissl"), ("regnety_800mf", TV), ("regnety_1_6gf", "vissl"),
]
PEERS = {"torchvision": torchvision_net, "timm": timm_net, "transformers": Transformers}


def assert_same_outputs(peer, config, size=64):
    torch.manual_seed(0)
    scramble(peer)
    ours = RegNetY(config).eval()
    ours.load_state_dict(convert_state(peer.state_dict(), "seer_nb"))        # strict: the same keys and shapes
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode(): want, got = peer(images), ours(images)
    assert want.shape == got.shape == (2, ours.num_features)
    assert 0.05 < want.std() < 50, "the comparison needs outputs of a sensible size"
    assert (want - got).abs().max() <= 1e-4


@pytest.mark.parametrize("library", PEERS)
@pytest.mark.parametrize("name, rule", CASES)
def test_same_outputs(library, name, rule):
    pytest.importorskip(library)
    config = regnety(name, width_rule=rule).config
    assert_same_outputs(PEERS[library](config), config, size=96 if name == "regnety_400mf" else 64)


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_same_outputs_anynet(library):
    "A network on no line, odd image size: rounding of sizes is the same too."
    pytest.importorskip(library)
    config = AnyNetConfig(depths=(1, 2, 1, 3), widths=(24, 40, 88, 104), group_widths=(8, 8, 8, 8), stem_width=24)
    assert_same_outputs(PEERS[library](config), config, size=75)


def shapes(state): return {key: tuple(tensor.shape) for key, tensor in state.items()}


# our name, torchvision's rule? -> a network made by the library's own constructor
TV_NAMES = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf")             # torchvision draws weights on the CPU: small ones only
TIMM_NAMES = {"400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320",
              "64gf": "640", "128gf": "1280", "256gf": "2560"}


@pytest.mark.parametrize("size", TV_NAMES)
def test_torchvisions_own_networks(size):
    "The width rule `torchvision` is torchvision's."
    theirs = torchvision_state(size)
    with torch.device("meta"): ours = regnety(f"regnety_{size}", width_rule=TV)
    assert shapes(theirs) == shapes(ours.state_dict())


def torchvision_state(size):
    models = pytest.importorskip("torchvision").models
    net = getattr(models, f"regnet_y_{size}")()
    return convert_state(net.state_dict(), "seer_nb", drop="heads")


@pytest.mark.parametrize("size", TIMM_NAMES)
def test_timms_own_networks(size):
    "The default width rule is timm's; all names, shapes and the parameter count agree on the meta device."
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(f"regnety_{TIMM_NAMES[size]}", num_classes=0), regnety(f"regnety_{size}")
    assert shapes(convert_state(theirs.state_dict(), "seer_nb")) == shapes(ours.state_dict())
    assert count_parameters(theirs) == count_parameters(ours)


def test_feature_maps_match_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("regnety_004", features_only=True, out_indices=(1, 2, 3, 4))
    scramble(theirs)
    ours = regnety("regnety_400mf").eval()
    ours.load_state_dict(convert_state(theirs.state_dict(), "seer_nb"))
    images = torch.randn(1, 3, 96, 64)
    with torch.inference_mode(): want, got = theirs(images), ours.feature_maps(images)
    assert list(got) == ["res2", "res3", "res4", "res5"]
    assert [tuple(x.shape) for x in got.values()] == [(1, 48, 24, 16), (1, 104, 12, 8), (1, 208, 6, 4), (1, 440, 3, 2)]
    for a, b in zip(want, got.values()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_same_initialisation_as_torchvision():
    "Layer by layer: the standard deviation of weights and SE biases, and normalisations exactly."
    theirs = torchvision_state("400mf")
    spread = {"weight": [], "bias": []}
    for key, ours in regnety("regnety_400mf").state_dict().items():
        if ours.ndim == 4 or ".se." in key:
            spread[key.rsplit(".")[-1]].append(ours.double().std() / theirs[key].double().std())
            assert abs(spread[key.rsplit(".")[-1]][-1] - 1) < 6 / ours.numel() ** 0.5 + 0.01, key
        else: torch.testing.assert_close(ours, theirs[key], msg=key)
    for ratios in spread.values(): assert abs(torch.stack(ratios).mean() - 1) < 0.05
    assert all(block.c[1].weight.eq(1).all() for stage in regnety("regnety_toy").stages.values() for block in stage)


# per-size GMAC at 160, 96 and 384 pixels, computed from VISSL's source
OTHER_SIZES = {"regnety_8gf": (4.06, 1.47, 23.39), "regnety_16gf": (8.12, 2.93, 46.73), "regnety_32gf": (16.47, 5.94, 94.82),
               "regnety_64gf": (32.70, 11.79, 188.22), "regnety_128gf": (65.10, 23.49, 374.56), "regnety_256gf": (129.86, 46.86, 747.23),
               "regnety_10b": (951.25, 343.23, 5473.41)}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_macs_at_other_resolutions(name):
    with torch.device("meta"): model = regnety(name)
    assert tuple(round(count_macs(model, size) / 1e9, 2) for size in (160, 96, 384)) == OTHER_SIZES[name]


def test_macs_equal_torchs_own_counter():
    model = regnety("regnety_400mf").eval()
    with FlopCounterMode(display=False) as counter: model(torch.zeros(1, 3, 96, 96))
    assert counter.get_total_flops() == 2 * count_macs(model, 96)


def test_counting_leaves_the_model_alone():
    model = regnety("regnety_toy").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_part_is_registered_once_and_learns():
    model = regnety("regnety_toy")
    names = [id(m) for _, m in model.named_modules(remove_duplicate=False)]
    assert len(names) == len(set(names))
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_channels_last_and_bfloat16_agree():
    torch.manual_seed(0)
    model, images = scramble(regnety("regnety_toy")), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16): half = model(images)
    torch.testing.assert_close(plain, last, atol=1e-4, rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(plain, half.float()).min() > 0.999


def test_family_is_complete():
    assert list(REGNETY) == ["regnety_" + s for s in "toy 400mf 800mf 1_6gf 3_2gf 8gf 16gf 32gf 64gf 128gf 256gf 10b".split()]


def test_compiles_into_one_graph():
    model, images = regnety("regnety_toy").eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(): torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


def test_timm_would_start_elsewhere():
    "What the page says of timm: last normalisations at zero, fan-out divided by the groups."
    theirs = pytest.importorskip("timm").create_model("regnety_004").s4.b2
    ours = regnety("regnety_400mf").stages["res5"][1]
    assert theirs.conv3.bn.weight.eq(0).all()
    assert 7 < theirs.conv2.conv.weight.std() / ours.b[0].weight.std() < 8      # the square root of 55 groups
