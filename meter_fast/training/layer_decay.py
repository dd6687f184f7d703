"""How far below the top of its encoder each parameter lies, for learning rates that fall from layer to layer.

Knows our parameter names and the shapes of all vision and text encoders. Knows nothing of groups, optimizers or steps.

Source: ELECTRA (Clark et al. 2020, appendix A) and BEiT (Bao et al. 2021, appendix): the rate of a layer is the top
layer's times decay^(layers above it); embeddings lie below all layers. What follows the last layer (final norms) has
the top's rate, and so have fusion and heads, whose own multipliers stay.
"""

import re

from meter_fast.models.config import ModelConfig

SWIN_STAGES = (2, 2, None, 2)  # blocks of each stage; None: the rest of config.layers


def layers_above(name: str, config: ModelConfig) -> int:
    """Layers of its own encoder above the parameter `name` (ours); 0 for the top layer, what follows it, and whatever
    is in no encoder. Embeddings have all layers above them.
    """
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "vision":
        depth, layers = _vision_depth(rest.removeprefix("encoder."), config)
    elif part == "text":
        depth, layers = _text_depth(rest, config.text.name, config.text.layers)
    else:
        return 0
    return min(layers, max(0, layers - depth))


def _vision_depth(name: str, config: ModelConfig) -> tuple[int, int]:
    """(0 for embeddings, n for the n-th layer or more for what follows the last, number of layers)."""
    kind, layers = config.vision.name, config.vision.layers
    if kind == "swin":
        return _swin_depth(name, layers), layers
    if kind == "volo":
        return _volo_depth(name, layers), layers + VOLO_CLASS_LAYERS
    if kind == "cait":
        layers += CAIT_CLASS_LAYERS
        if found := re.match(r"blocks_token_only\.(\d+)\.", name):
            return config.vision.layers + int(found[1]) + 1, layers
        if name.startswith("cls_token"):  # it joins where the class-attention layers begin
            return config.vision.layers, layers
    if found := re.match(r"blocks\.(\d+)\.", name):
        return int(found[1]) + 1, layers
    return (layers + 1 if name.startswith(("norm.", "fc_norm.")) else 0), layers


CAIT_CLASS_LAYERS = 2
VOLO_CLASS_LAYERS = 2


def _swin_depth(name: str, layers: int) -> int:
    """The merging of patches at the start of a stage goes with the stage's first block."""
    found = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\b", name)
    if found is None:
        return layers + 1 if name.startswith("norm.") else 0
    stages = [layers - 6 if count is None else count for count in SWIN_STAGES]
    return sum(stages[: int(found[1])]) + int(found[2] or 0) + 1


def _volo_depth(name: str, layers: int) -> int:
    """`network` holds the stages of (2, 2, 4, 1) ninths with the merging of patches after the first."""
    ninth = layers // 9
    before = {0: 0, 1: 2 * ninth, 2: 2 * ninth, 3: 4 * ninth, 4: 8 * ninth}
    if found := re.match(r"network\.(\d+)\.(\d+)\.", name):
        return before[int(found[1])] + int(found[2]) + 1
    if name.startswith("network.1."):
        return before[1] + 1
    if found := re.match(r"post_network\.(\d+)\.", name):
        return layers + int(found[1]) + 1
    if name.startswith("cls_token"):
        return layers
    if name.startswith("pos_embed"):  # added after the merging
        return before[1]
    return layers + VOLO_CLASS_LAYERS + 1 if name.startswith("norm.") else 0


def _text_depth(name: str, kind: str, layers: int) -> tuple[int, int]:
    """As `_vision_depth`. ALBERT's one layer is called again and again, the last time as the top one: it has the top's
    rate. DeBERTa's table of relative positions is read by every layer and counts as an embedding.
    """
    if kind == "albert" and name.startswith("encoder.albert_layer_groups."):
        return layers, layers
    if found := re.match(r"encoder\.layers?\.(\d+)\.", name):
        return int(found[1]) + 1, layers
    return (layers + 1 if name.startswith("final_layer_norm.") else 0), layers
