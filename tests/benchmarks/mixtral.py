"""`MixtralForCausalLM` of Transformers, built to compute the package's Mixtral-like model."""

import torch
from references import TURNED, Tie, below, norm_ties
from torch import nn
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM


class Mixtral(nn.Module):
    """The model of Transformers; `experts` is "eager" or "grouped_mm", how it runs its experts."""

    def __init__(self, config, experts):
        super().__init__()
        moe = config["moe"]
        self.heads = config["heads"]
        self.hf = MixtralForCausalLM._from_config(
            MixtralConfig(
                vocab_size=config["vocab_size"],
                hidden_size=config["width"],
                intermediate_size=moe["hidden"],
                num_hidden_layers=config["layers"],
                num_attention_heads=config["heads"],
                num_key_value_heads=config["kv_heads"] or config["heads"],
                max_position_embeddings=config["context"],
                rms_norm_eps=config["norm_eps"],
                num_local_experts=moe["num_experts"],
                num_experts_per_tok=moe["top_k"],
                rope_parameters={"rope_type": "default", "rope_theta": config["theta"]},
                bos_token_id=None,
                eos_token_id=None,
            ),
            experts_implementation=experts,
            dtype=torch.float32,
        )
        if self.hf.config._experts_implementation != experts:
            raise ValueError(
                f"Mixtral: experts must run as {experts!r}, got "
                f"{self.hf.config._experts_implementation!r}. Install another Transformers."
            )

    def forward(self, token):
        """Predict the next token at every position."""
        return self.hf(input_ids=token, use_cache=False).logits

    def generate(self, prompt, tokens):
        """Write greedily, with the cache of keys and values."""
        knobs = GenerationConfig(
            do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        with torch.no_grad():
            return self.hf.generate(prompt, generation_config=knobs)[0, prompt.shape[1] :]

    def ties(self):
        """Name the arrays of the package."""
        model, found = self.hf.model, {}
        for i, layer in enumerate(model.layers):
            found |= below(f"blocks.{i}", self._layer_ties(layer))
        return {
            "token_VC": Tie(model.embed_tokens.weight),
            **found,
            **below("norm", norm_ties(model.norm)),
            "head_CV": Tie(self.hf.lm_head.weight, TURNED),
        }

    def _layer_ties(self, layer):
        attention, experts = layer.self_attn, layer.mlp.experts
        F = experts.down_proj.shape[2]

        def heads(w):
            return w.T.unflatten(1, (-1, attention.head_dim))

        return {
            **below("norm_1", norm_ties(layer.input_layernorm)),
            "attention.q_CHD": Tie(attention.q_proj.weight, heads),
            "attention.k_CGD": Tie(attention.k_proj.weight, heads),
            "attention.v_CGD": Tie(attention.v_proj.weight, heads),
            "attention.out_HDC": Tie(
                attention.o_proj.weight, lambda w: w.T.unflatten(0, (self.heads, -1))
            ),
            **below("norm_2", norm_ties(layer.post_attention_layernorm)),
            "feed.router.w_CE": Tie(layer.mlp.gate.weight, TURNED),
            "feed.experts.in_ECF": Tie(experts.gate_up_proj, lambda w: TURNED(w[:, :F])),
            "feed.experts.up_ECF": Tie(experts.gate_up_proj, lambda w: TURNED(w[:, F:])),
            "feed.experts.out_EFC": Tie(experts.down_proj, TURNED),
        }
