"""Many of timm's nets, each tried: `python tests/field/timm_sweep.py [NAME ...]`.

Of each name: it is built without randomness (two passes in training mode agree), takes images of 96
px, and reads its own file back. What it cannot do is one line before anything is trained.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors.torch import save_file

from scale_smog.config import ModelConfig
from scale_smog.errors import UserError
from scale_smog.models import build_backbone
from scale_smog.models.check import require_images_fit
from scale_smog.models.timm_nets import own_size_px
from scale_smog.models.weights import load_weights

# Small ones of as many families.
NAMES = """
beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_lite_tiny convnext_atto convnextv2_atto
crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla34 dpn48b
edgenext_xx_small efficientformer_l1 efficientnet_b0 efficientvit_b0 efficientvit_m0
ese_vovnet19b_dw eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf ghostnet_100 hgnetv2_b0
hiera_tiny_224 inception_v3 legacy_xception levit_128s mambaout_femto maxvit_pico_rw_256
mixer_s16_224 mobilenetv3_small_050 mobilenetv4_conv_small mobilevit_xxs nest_tiny_jx pit_ti_224
poolformer_s12 regnety_002 repvit_m0_9 resnet50_clip swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
vit_tiny_patch16_224 volo_d1_224 xcit_nano_12_p16_224
""".split()
PX = 96


@dataclass(frozen=True)
class Outcome:
    """What became of a name.

    Attributes:
        name: timm's.
        same_twice: whether two passes in training mode agree, and no random number was drawn.
        own_weights: whether timm's own file of it, classifier included, is read back.
        refusal: the line with which 96 px are refused; "" where they are taken.
    """

    name: str
    same_twice: bool
    own_weights: bool
    refusal: str

    @property
    def is_good(self) -> bool:
        """All works, but for images of 96 px, which may be refused by one line."""
        return self.same_twice and self.own_weights and "\n" not in self.refusal


def try_name(name: str) -> Outcome:
    """Builds and tries one net; errors other than a refusal of 96 px are raised."""
    torch.manual_seed(0)
    net = build_backbone(name).train()
    try:
        require_images_fit(ModelConfig(backbone=name), {"data.small_px": PX}, batch=2)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    px = own_size_px(net) if refusal else PX
    images, state = torch.randn(2, 3, px, px), torch.get_rng_state()
    with torch.no_grad():
        first, second = net(images), net(images)
    drew_none = torch.equal(state, torch.get_rng_state())
    is_right_size = first.shape == (2, net.num_features)
    same_twice = is_right_size and drew_none and torch.equal(first, second)
    return Outcome(name, same_twice, _reads_own_file(name, net), refusal)


def _reads_own_file(name: str, net: torch.nn.Module) -> bool:
    theirs = timm.create_model(name).state_dict()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.safetensors"
        save_file({key: value.clone() for key, value in theirs.items()}, path)
        load_weights(net, path)
    own = net.state_dict()
    return all(torch.equal(own[key], theirs[key]) for key in own)


def main() -> None:
    torch.set_num_threads(1)
    outcomes = []
    print(f"{'net':<34}{'same twice':<12}{'own weights':<13}{PX} px")
    for name in sys.argv[1:] or NAMES:
        outcomes.append(try_name(name))
        x = outcomes[-1]
        words = ["NO", "yes"]
        print(
            f"{name:<34}{words[x.same_twice]:<12}{words[x.own_weights]:<13}"
            f"{'refused: ' + x.refusal if x.refusal else 'yes'}",
            flush=True,
        )
    good = [x for x in outcomes if x.is_good]
    print(f"{len(good)} of {len(outcomes)} are good, {sum(not x.refusal for x in good)} at {PX} px")
    sys.exit(len(good) < len(outcomes))


if __name__ == "__main__":
    main()
