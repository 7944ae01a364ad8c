/* PyTorch's own CPU kernels of attention, past its dispatcher, as libtorch offers them to compiled models.
 *
 * Declared by hand and weak: a libtorch without them loads all the same, and heedful then refuses to stand in front of
 * what it could not call. tests/test_build.py compiles this file beside PyTorch's own declarations. */
#ifndef HEEDFUL_BRIDGE_TORCH_FLASH_H
#define HEEDFUL_BRIDGE_TORCH_FLASH_H

#include "torch_shim.h"

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, double dropout_p, int32_t is_causal,
    AtenTensorHandle *attn_mask, double *scale, AtenTensorHandle *out, AtenTensorHandle *logsumexp);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
    AtenTensorHandle grad_out, AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
    AtenTensorHandle out, AtenTensorHandle logsumexp, double dropout_p, int32_t is_causal, AtenTensorHandle *attn_mask,
    double *scale, AtenTensorHandle *grad_query, AtenTensorHandle *grad_key, AtenTensorHandle *grad_value);
}

#endif
