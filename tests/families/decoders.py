"""Language models: GPT-2, Llama, Mamba, T5, mixtures of experts, a small GPT written out, recurrent classifiers."""

import torch
import transformers
from encoders import BATCH, LENGTH, SIZES, VOCABULARY, text
from family import Family, braces
from torch import nn
from torch.nn import functional

#: without these, transformers warns of symbols outside the small vocabulary
SYMBOLS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


#: of models whose loss transformers computes in float32 whatever they are
FLOAT32_LOSS = 1e-5


def looped_experts(model):
    """The plainest way to run experts, for the reference; Dynamo cannot capture it, and the others are faster."""
    model.set_experts_implementation("eager")


def translation():
    source, target = (torch.randint(3, VOCABULARY, (BATCH, length)) for length in (LENGTH, 5))
    return {"input_ids": source, "labels": target}


class NanoBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, 2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        return x + self.out(functional.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """A GPT as in Karpathy's nanoGPT: learnt positions, pre-norm blocks, the head tied to the table of symbols."""

    def __init__(self, width=16, heads=2, blocks=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(20, width)
        self.h = nn.ModuleList(NanoBlock(width, heads) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.wte.weight, std=0.1)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids, labels):
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return functional.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), labels.flatten())


class Recurrent(nn.Module):
    """Classifies by the last state of two recurrent layers."""

    def __init__(self, layer):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(14, 5)
        self.recurrent = layer(12, 14, 2, batch_first=True)

    def forward(self, input_ids, labels):
        return functional.cross_entropy(self.head(self.recurrent(self.table(input_ids))[0][:, -1]), labels)


def labelled():
    return {"input_ids": torch.randint(VOCABULARY, (BATCH, 5)), "labels": torch.randint(5, (BATCH,))}


RECURRENT = """
    weight table.weight recurrent.weight_{ih,hh}_{l0,l1}
    bias recurrent.bias_ih_l0 of recurrent.weight_ih_l0
    bias recurrent.bias_hh_l0 of recurrent.weight_hh_l0
    bias recurrent.bias_ih_l1 of recurrent.weight_ih_l1
    bias recurrent.bias_hh_l1 of recurrent.weight_hh_l1
    linear head
"""
LLAMA = """
    weight model.embed_tokens.weight lm_head.weight
    linear model.layers.{0,1}.self_attn.{q_proj,k_proj,v_proj,o_proj}
    norm model.layers.{0,1}.{input_layernorm,post_attention_layernorm} model.norm
"""
EXPERTS = """
    linear model.layers.{0,1}.mlp.gate
    weight model.layers.{0,1}.mlp.experts.{gate_up_proj,down_proj}
"""


def mixtral(experts):
    config = transformers.MixtralConfig(
        **SIZES, **SYMBOLS, num_key_value_heads=1, num_local_experts=4, experts_implementation=experts
    )
    return transformers.MixtralForCausalLM(config)


def qwen(experts):
    config = transformers.Qwen2MoeConfig(
        **SIZES, **SYMBOLS, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
        shared_expert_intermediate_size=20, experts_implementation=experts,
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss(experts):
    config = transformers.GptOssConfig(
        **SIZES, **SYMBOLS, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, experts_implementation=experts,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


FAMILIES = [
    Family(
        "GPT-2",  # its Conv1D layers keep weights as [in, out]
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=20,
                n_embd=16,
                n_layer=2,
                n_head=2,
                **SYMBOLS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        ),
        text,
        """
        weight transformer.{wte,wpe}.weight
        linear transformer.h.{0,1}.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}
        norm transformer.h.{0,1}.{ln_1,ln_2} transformer.ln_f
        """,
        hidden=("*.c_*.weight",),
        tolerance=FLOAT32_LOSS,
    ),
    Family(
        "nanoGPT",
        NanoGPT,
        text,
        """
        weight wte.weight wpe.weight
        linear h.{0,1}.{c_attn,c_proj,c_fc,out}
        norm h.{0,1}.{ln_1,ln_2} ln_f
        """,
    ),
    Family(
        "Llama",
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SYMBOLS, num_key_value_heads=1)),
        text,
        LLAMA + "linear model.layers.{0,1}.mlp.{gate_proj,up_proj,down_proj}",
        tolerance=FLOAT32_LOSS,
    ),
    Family(
        "T5",  # the table serves encoder, decoder and head
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                relative_attention_num_buckets=8,
                relative_attention_max_distance=12,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
        translation,
        """
        weight shared.weight {encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight
        linear {encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}
        linear decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}
        linear encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo} decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo}
        norm encoder.block.{0,1}.layer.{0,1}.layer_norm decoder.block.{0,1}.layer.{0,1,2}.layer_norm
        norm {encoder,decoder}.final_layer_norm
        """,
        still=tuple(braces("{encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")),
    ),
    Family(
        "Mamba",  # A_log and D scale the states; the convolution is depthwise
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                state_size=4,
                num_hidden_layers=2,
                conv_kernel=3,
                time_step_rank=3,
                **SYMBOLS,
            )
        ),
        text,
        """
        weight backbone.embeddings.weight
        plain backbone.layers.{0,1}.mixer.{A_log,D}
        linear backbone.layers.{0,1}.mixer.{conv1d,in_proj,x_proj,dt_proj,out_proj}
        norm backbone.layers.{0,1}.norm backbone.norm_f
        """,
        hidden=("*.conv1d.weight", "*.dt_proj.weight"),  # its weight is used outside of its layer
        tolerance=FLOAT32_LOSS,
    ),
    *(
        Family(
            f"Mixtral, {experts}",
            lambda experts=experts: mixtral(experts),
            text,
            LLAMA + EXPERTS,
            hidden=("*.experts.*", "*.mlp.gate.weight"),  # the router calls no nn.Linear
            tolerance=FLOAT32_LOSS,
            plain=looped_experts,
        )
        for experts in ("grouped_mm", "batched_mm")
    ),
    Family(
        "Qwen2-MoE",
        lambda: qwen("grouped_mm"),
        text,
        LLAMA
        + EXPERTS
        + "linear model.layers.{0,1}.mlp.{shared_expert_gate,shared_expert.{gate_proj,up_proj,down_proj}}",
        hidden=("*.experts.*", "*.mlp.gate.weight"),
        tolerance=FLOAT32_LOSS,
        plain=looped_experts,
    ),
    Family(
        "GPT-OSS",  # experts are [in, out] and have biases, one a row; sinks are learnt logits
        lambda: gpt_oss("grouped_mm"),
        text,
        LLAMA
        + """
        linear model.layers.{0,1}.mlp.router
        weight model.layers.{0,1}.mlp.experts.{gate_up_proj,down_proj}
        bias model.layers.0.mlp.experts.gate_up_proj_bias of model.layers.0.mlp.experts.gate_up_proj
        bias model.layers.1.mlp.experts.gate_up_proj_bias of model.layers.1.mlp.experts.gate_up_proj
        bias model.layers.0.mlp.experts.down_proj_bias of model.layers.0.mlp.experts.down_proj
        bias model.layers.1.mlp.experts.down_proj_bias of model.layers.1.mlp.experts.down_proj
        plain model.layers.{0,1}.self_attn.sinks
        """,
        hidden=("*.experts.*", "*.router.weight"),
        tolerance=FLOAT32_LOSS,
        plain=looped_experts,
    ),
    *(
        Family(
            f"nn.{layer.__name__}",
            lambda layer=layer: Recurrent(layer),
            labelled,
            RECURRENT,
            hidden=("recurrent.*",),
        )
        for layer in (nn.LSTM, nn.GRU)
    ),
]
