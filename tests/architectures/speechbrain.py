"""Networks of speechbrain: speakers, speech recognition, separation, synthesis."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import Architecture, get, ids, image

LOBES = "speechbrain.lobes.models"


def built(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get(f"{LOBES}.{module}", name)(**settings)


def recognizer() -> nn.Module:
    return get(f"{LOBES}.transformer.TransformerASR", "TransformerASR")(
        tgt_vocab=20,
        input_size=8,
        d_model=16,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        d_ffn=24,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        kernel_size=3,
        normalize_before=True,
        causal=False,
    )


ARCHITECTURES = {
    "ecapa-tdnn": Architecture(
        built(
            "ECAPA_TDNN",
            "ECAPA_TDNN",
            input_size=8,
            channels=[16, 16, 16, 16, 32],
            kernel_sizes=[5, 3, 3, 3, 1],
            dilations=[1, 2, 3, 4, 1],
            attention_channels=8,
            res2net_scale=4,
            se_channels=8,
            lin_neurons=8,
        ),
        image(2, 40, 8),
    ),
    "xvector": Architecture(
        built(
            "Xvector",
            "Xvector",
            device="cpu",
            in_channels=8,
            tdnn_blocks=2,
            tdnn_channels=[16, 16],
            tdnn_kernel_sizes=[3, 1],
            tdnn_dilations=[1, 1],
            lin_neurons=8,
        ),
        image(2, 40, 8),
    ),
    "crdnn": Architecture(
        built(
            "CRDNN",
            "CRDNN",
            input_size=8,
            cnn_blocks=1,
            cnn_channels=[8],
            rnn_layers=1,
            rnn_neurons=8,
            dnn_blocks=1,
            dnn_neurons=8,
        ),
        image(2, 40, 8),
    ),
    "contextnet": Architecture(
        built(
            "ContextNet",
            "ContextNet",
            input_shape=(2, 40, 8),
            out_channels=16,
            conv_channels=[8, 8, 16],
            strides=[1, 2, 1],
            residuals=[True] * 3,
            num_blocks=3,
            num_layers=2,
        ),
        image(2, 40, 8),
    ),
    "speaker-resnet": Architecture(
        built("ResNet", "ResNet", input_size=16, channels=[8, 8, 8, 8], block_sizes=[1, 1, 1, 1], lin_neurons=8),
        image(2, 40, 16),
    ),
    "conv-tasnet": Architecture(
        built("conv_tasnet", "MaskNet", N=8, B=8, H=8, P=3, X=2, R=1, C=2, norm_type="gLN", causal=False),
        image(2, 8, 40),
    ),
    "hifigan": Architecture(
        built(
            "HifiGAN",
            "HifiganGenerator",
            in_channels=8,
            out_channels=1,
            resblock_type="1",
            resblock_dilation_sizes=[[1, 3, 5]],
            resblock_kernel_sizes=[3],
            upsample_kernel_sizes=[4, 4],
            upsample_initial_channel=16,
            upsample_factors=[2, 2],
        ),
        image(2, 8, 12),
    ),
    "metric-gan": Architecture(
        built("MetricGAN", "MetricDiscriminator", kernel_size=(3, 3), base_channels=8),
        image(2, 2, 24, 24),
    ),
    "conformer-recognizer": Architecture(recognizer, lambda: (torch.randn(2, 20, 8), ids(2, 6, high=20))),
    "cnn14": Architecture(built("Cnn14", "Cnn14", mel_bins=64, emb_dim=32), image(2, 64, 64)),
}
