"""Networks of torchaudio."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("torchaudio.models", name)(**settings)


def wav2vec2() -> nn.Module:
    return get("torchaudio.models", "wav2vec2_model")(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(8, 4, 4), (8, 4, 4)],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=4,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=24,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=10,
    )


ARCHITECTURES = {
    "conformer": Architecture(
        built("Conformer", input_dim=8, num_heads=2, ffn_dim=16, num_layers=2, depthwise_conv_kernel_size=3),
        lambda: (torch.randn(2, 20, 8), torch.tensor([20, 15])),
    ),
    "conv-tasnet": Architecture(
        built(
            "ConvTasNet",
            enc_kernel_size=8,
            enc_num_feats=8,
            msk_num_feats=8,
            msk_num_hidden_feats=8,
            msk_num_layers=2,
            msk_num_stacks=1,
        ),
        image(2, 1, 64),
    ),
    "deepspeech": Architecture(built("DeepSpeech", n_feature=8, n_hidden=16, n_class=6), image(2, 1, 20, 8)),
    "emformer": Architecture(
        built(
            "Emformer",
            input_dim=8,
            num_heads=2,
            ffn_dim=16,
            num_layers=2,
            segment_length=4,
            right_context_length=1,
        ),
        lambda: (torch.randn(2, 21, 8), torch.tensor([20, 16])),
    ),
    "wav2letter": Architecture(built("Wav2Letter", num_classes=6, input_type="mfcc", num_features=8), image(1, 8, 20)),
    "wav2vec2": Architecture(wav2vec2, image(2, 400)),
    "wavernn": Architecture(
        built(
            "WaveRNN",
            upsample_scales=[2, 2],
            n_classes=8,
            hop_length=4,
            n_res_block=1,
            n_rnn=16,
            n_fc=16,
            kernel_size=3,
            n_freq=8,
            n_hidden=8,
            n_output=8,
        ),
        lambda: (torch.randn(2, 1, 16), torch.randn(2, 1, 8, 6)),
    ),
}
