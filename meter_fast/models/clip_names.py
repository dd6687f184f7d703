"""Names of CLIP's vision tensors: OpenAI's and ours (timm's). Knows strings only."""

TOP = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
BLOCK = {
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
TOP_OF_OURS = {ours: theirs for theirs, ours in TOP.items()}
BLOCK_OF_OURS = {ours: theirs for theirs, ours in BLOCK.items()}
BLOCKS = "transformer.resblocks."
OUR_BLOCKS = "blocks."


def to_timm(name: str) -> str | None:
    """Our name of a tensor under CLIP's `visual.`; None if the encoder has no such tensor."""
    if name.startswith(BLOCKS):
        number, _, rest = name[len(BLOCKS) :].partition(".")
        return f"{OUR_BLOCKS}{number}.{BLOCK[rest]}" if rest in BLOCK else None
    return TOP.get(name)


def to_openai(name: str) -> str | None:
    """CLIP's name, under `visual.`, of a tensor of our encoder; None if it has no such tensor."""
    if name.startswith(OUR_BLOCKS):
        number, _, rest = name[len(OUR_BLOCKS) :].partition(".")
        return f"{BLOCKS}{number}.{BLOCK_OF_OURS[rest]}" if rest in BLOCK_OF_OURS else None
    return TOP_OF_OURS.get(name)
