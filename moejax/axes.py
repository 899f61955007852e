"""The axis alphabet, and the logical axis names that sharding rules refer to.

Every einsum, weight name and docstring uses these letters::

    b batch        t token (query)   s token (key), or routing group   d model width
    f hidden       n query heads     g key/value heads                 h head size
    m modality     e expert          k chosen experts                  c capacity
    v vocabulary   l layer           p patch                           z latent channel

A weight carries its axes in its name: ``wi_mdf`` is [modality, model, hidden].
"""

# Logical names of parameter axes (parallel/rules.py maps them to mesh axes).
LAYERS = "layers"
MODALITY = "modality"
EXPERT = "expert"
# Experts that each device has whole: shared ones, and those without a matmul.
LOCAL_EXPERT = "local_expert"
EMBED = "embed"
MLP = "mlp"
HEADS = "heads"
HEAD_SIZE = "head_size"
VOCABULARY = "vocabulary"
# Channels of convolutions.
CHANNELS = "channels"

# Mesh axes, slow network to fast.
MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
# Outside of an expert layer the expert axis is one more data axis.
BATCH_AXES = ("data", "fsdp", "expert")
