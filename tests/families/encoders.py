"""BERT and its kin, the Vision Transformer, and torch's own encoder. Dropout is off: the reference draws other masks."""

import torch
import transformers
from family import Family
from torch import nn
from torch.nn import functional

VOCABULARY, BATCH, LENGTH = 61, 3, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
#: transformers would write it into the configuration in the first forward, which compiles everything again
CLASSES = {"num_labels": 5, "problem_type": "single_label_classification"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def text():
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def masked_text():
    """A masked-language batch: the loss is taken at masked positions alone, and the last example is padded."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    masked = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3 == 0
    attended = torch.ones_like(ids)
    attended[-1, -2:] = 0
    return {
        "input_ids": ids.masked_fill(masked, 2),
        "attention_mask": attended,
        "labels": ids.masked_fill(~masked, -100),
    }


def labelled_text():
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH)), "labels": torch.randint(5, (BATCH,))}


BERT = """
    weight bert.embeddings.{word,position,token_type}_embeddings.weight
    linear bert.encoder.layer.{0,1}.{attention.self.query,attention.self.key,attention.self.value}
    linear bert.encoder.layer.{0,1}.{attention.output,intermediate,output}.dense
    norm bert.{embeddings,encoder.layer.0.attention.output,encoder.layer.0.output}.LayerNorm
    norm bert.encoder.layer.1.{attention.output,output}.LayerNorm
"""


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder with a classifier; the projections of self-attention are one packed matrix."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x, labels):
        return functional.cross_entropy(self.head(self.encoder(x).mean(1)), labels)


class TorchTransformer(nn.Module):
    """nn.Transformer: cross attention reads its packed projection in two parts, one for each of its inputs."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x, y, labels):
        return functional.cross_entropy(self.head(self.transformer(x, y)).flatten(0, 1), labels.flatten())


FAMILIES = [
    Family(
        "BERT, masked words",
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
        masked_text,
        BERT
        + """
        bias cls.predictions.bias of bert.embeddings.word_embeddings.weight
        linear cls.predictions.transform.dense
        norm cls.predictions.transform.LayerNorm
        """,
    ),
    Family(
        "BERT, sequences",
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **NO_DROPOUT, **CLASSES)),
        labelled_text,
        BERT + "linear bert.pooler.dense classifier",
    ),
    Family(
        "RoBERTa",
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, **NO_DROPOUT, pad_token_id=1)),
        masked_text,
        BERT.replace("bert.", "roberta.")
        + """
        bias lm_head.bias of roberta.embeddings.word_embeddings.weight
        linear lm_head.dense
        norm lm_head.layer_norm
        """,
    ),
    Family(
        "ALBERT",  # both layers are one: every weight of it is used twice
        lambda: transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SIZES, **NO_DROPOUT, embedding_size=12)),
        masked_text,
        """
        weight albert.embeddings.{word,position,token_type}_embeddings.weight
        linear albert.encoder.embedding_hidden_mapping_in
        linear albert.encoder.albert_layer_groups.0.albert_layers.0.{ffn,ffn_output}
        linear albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{query,key,value,dense}
        norm albert.encoder.albert_layer_groups.0.albert_layers.0.{full_layer_layer_norm,attention.LayerNorm}
        norm albert.embeddings.LayerNorm predictions.LayerNorm
        bias predictions.bias of albert.embeddings.word_embeddings.weight
        linear predictions.dense
        """,
    ),
    Family(
        "ViT",
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **{k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")},
                **NO_DROPOUT,
                image_size=8,
                patch_size=4,
                **CLASSES,
            )
        ),
        lambda: {"pixel_values": torch.randn(BATCH, 3, 8, 8), "labels": torch.randint(5, (BATCH,))},
        """
        plain vit.embeddings.{cls_token,position_embeddings}
        linear vit.embeddings.patch_embeddings.projection
        linear vit.layers.{0,1}.{attention.q_proj,attention.k_proj,attention.v_proj,attention.o_proj,mlp.fc1,mlp.fc2}
        norm vit.layers.{0,1}.{layernorm_before,layernorm_after} vit.layernorm
        linear classifier
        """,
    ),
    Family(
        "nn.TransformerEncoder",
        TorchEncoder,
        lambda: {"x": torch.randn(BATCH, LENGTH, 16), "labels": torch.randint(5, (BATCH,))},
        """
        weight encoder.layers.{0,1}.self_attn.in_proj_weight
        bias encoder.layers.0.self_attn.in_proj_bias of encoder.layers.0.self_attn.in_proj_weight
        bias encoder.layers.1.self_attn.in_proj_bias of encoder.layers.1.self_attn.in_proj_weight
        linear encoder.layers.{0,1}.{self_attn.out_proj,linear1,linear2}
        norm encoder.layers.{0,1}.{norm1,norm2}
        linear head
        """,
        hidden=("*.in_proj_weight", "*.out_proj.weight"),  # attention calls no module
    ),
    Family(
        "nn.Transformer",
        TorchTransformer,
        lambda: {
            "x": torch.randn(BATCH, LENGTH, 16),
            "y": torch.randn(BATCH, 5, 16),
            "labels": torch.randint(5, (BATCH, 5)),
        },
        """
        weight transformer.{encoder.layers.0.self_attn,decoder.layers.0.self_attn}.in_proj_weight
        weight transformer.decoder.layers.0.multihead_attn.in_proj_weight
        bias transformer.encoder.layers.0.self_attn.in_proj_bias of transformer.encoder.layers.0.self_attn.in_proj_weight
        bias transformer.decoder.layers.0.self_attn.in_proj_bias of transformer.decoder.layers.0.self_attn.in_proj_weight
        bias CROSS.in_proj_bias of CROSS.in_proj_weight
        linear transformer.{encoder,decoder}.layers.0.{self_attn.out_proj,linear1,linear2}
        linear transformer.decoder.layers.0.multihead_attn.out_proj
        norm transformer.encoder.layers.0.{norm1,norm2} transformer.decoder.layers.0.{norm1,norm2,norm3}
        norm transformer.{encoder,decoder}.norm
        linear head
        """.replace("CROSS", "transformer.decoder.layers.0.multihead_attn"),
        hidden=("*.in_proj_weight", "*.out_proj.weight"),
    ),
]
