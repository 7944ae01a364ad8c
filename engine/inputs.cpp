#include "inputs.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace heedful {
namespace {

// A tensor of the features: sizes as given or 1, the inputs' dtype or float32.
Extra read_extra(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size, int32_t dtype) {
    Extra extra = {};
    if (!tensor.data) return extra;
    REQUIRE(tensor.ndim == ndim,
            std::string(name) + ": has " + std::to_string(tensor.ndim) + " dimensions, takes " + std::to_string(ndim));
    REQUIRE(tensor.dtype == dtype || tensor.dtype == HEEDFUL_FLOAT32,
            std::string(name) + ": has dtype code " + std::to_string(tensor.dtype) + ", takes query's or float32");
    for (int axis = 0; axis < ndim; ++axis) {
        REQUIRE(tensor.size[axis] == size[axis] || tensor.size[axis] == 1,
                std::string(name) + ": has " + std::to_string(tensor.size[axis]) + " as a size, takes 1 or " +
                    std::to_string(size[axis]));
        extra.stride[axis] = tensor.size[axis] == 1 ? 0 : tensor.stride[axis];
    }
    extra.data = static_cast<const char *>(tensor.data);
    extra.dtype = tensor.dtype;
    return extra;
}

void read_features(const heedful_features &source, int32_t dtype, const Inputs &inputs, Features &features) {
    const int64_t pairs[] = {inputs.batch, inputs.heads, inputs.q_length, inputs.k_length};
    features = {};
    features.bias = read_extra("bias", source.bias, 4, pairs, dtype);
    features.slopes =
        read_extra("alibi_slopes", source.alibi_slopes, source.alibi_slopes.ndim == 3 ? 3 : 2, pairs, dtype);
    features.sinks = read_extra("sinks", source.sinks, 1, pairs + 1, dtype);
    if (source.query_offset.data) {
        const heedful_tensor &offset = source.query_offset;
        REQUIRE((offset.ndim == 1 || offset.ndim == 2) && offset.dtype == HEEDFUL_INT32,
                "query_offset: takes one dimension of int32, or two");
        for (int axis = 0; axis < offset.ndim; ++axis) {
            const int64_t takes = axis == 0 ? inputs.batch : inputs.q_length;
            REQUIRE(offset.size[axis] == 1 || offset.size[axis] == takes,
                    "query_offset: has " + std::to_string(offset.size[axis]) + " values, takes 1 or " +
                        std::to_string(takes));
            features.offset_stride[axis] = offset.size[axis] == 1 ? 0 : offset.stride[axis];
        }
        features.offset = static_cast<const int32_t *>(offset.data);
    }
    REQUIRE(std::isfinite(source.softcap) && source.softcap >= 0, "softcap: takes a finite number from 0 on");
    REQUIRE(source.dropout_p >= 0 && source.dropout_p < 1, "dropout_p: takes a probability in [0, 1)");
    features.softcap = source.softcap;
    features.kept_share = 1 - source.dropout_p;
    features.threshold = uint32_t(source.dropout_p * 0x1p32);
    features.seed = source.seed;
}

} // namespace

void check_tensor(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size, int32_t dtype) {
    const auto wrong = [name](const char *what, int64_t got, int64_t takes) {
        return std::string(name) + ": has " + std::to_string(got) + " as " + what + ", takes " + std::to_string(takes);
    };
    REQUIRE(tensor.ndim == ndim, wrong("number of dimensions", tensor.ndim, ndim));
    REQUIRE(tensor.dtype == dtype, wrong("dtype code", tensor.dtype, dtype));
    int64_t count = 1;
    for (int axis = 0; axis < ndim; ++axis) {
        REQUIRE(tensor.size[axis] == size[axis], wrong("a size", tensor.size[axis], size[axis]));
        count *= size[axis];
    }
    REQUIRE(tensor.data || count == 0, std::string(name) + ": has no data");
}

void check_contiguous(const char *name, const heedful_tensor &tensor, int32_t ndim, const int64_t *size,
                      int32_t dtype) {
    check_tensor(name, tensor, ndim, size, dtype);
    int64_t stride = 1;
    for (int axis = ndim - 1; axis >= 0; --axis) {
        REQUIRE(tensor.size[axis] <= 1 || tensor.stride[axis] == stride, std::string(name) + ": must be contiguous");
        stride *= tensor.size[axis];
    }
}

void read_inputs(const heedful_tensor &query, const heedful_tensor &key, const heedful_tensor *value, double scale,
                 const heedful_features &features, const heedful_tensor *pages, Inputs &inputs) {
    REQUIRE(query.dtype >= HEEDFUL_FLOAT32 && query.dtype <= HEEDFUL_FLOAT64,
            "query: has dtype code " + std::to_string(query.dtype) + ", takes float32, bfloat16, float16 or float64");
    for (const heedful_tensor *tensor : {&query, &key, value}) {
        if (!tensor) continue;
        REQUIRE(tensor->ndim == 4, "query, key, value: take 4 dimensions each");
        for (int64_t size : tensor->size) REQUIRE(size >= 0, "query, key, value: a size is negative");
    }
    inputs.batch = query.size[0];
    inputs.heads = query.size[1];
    inputs.q_length = query.size[2];
    inputs.head_dim = query.size[3];
    inputs.kv_heads = key.size[1];
    inputs.k_length = key.size[2];
    inputs.value_dim = value ? value->size[3] : 1;
    inputs.pages = {};
    int64_t blocks = inputs.batch; // the first size of key and value
    if (pages && pages->data) {
        REQUIRE(pages->ndim == 2 && pages->dtype == HEEDFUL_INT32, "pages: takes two dimensions of int32");
        REQUIRE(pages->size[0] == inputs.batch, "pages: has " + std::to_string(pages->size[0]) + " rows, takes " +
                                                    std::to_string(inputs.batch) + ", the batch");
        REQUIRE(key.size[2] > 0, "key: has pages of no key");
        inputs.pages = {static_cast<const int32_t *>(pages->data), pages->stride[0], pages->stride[1], key.size[2],
                        key.size[0]};
        inputs.k_length = pages->size[1] * key.size[2];
        blocks = key.size[0];
    }
    REQUIRE(inputs.heads == 0 || (inputs.kv_heads > 0 && inputs.heads % inputs.kv_heads == 0),
            "key: has " + std::to_string(inputs.kv_heads) + " heads, which do not divide query's " +
                std::to_string(inputs.heads));
    for (int64_t dim : {inputs.head_dim, inputs.value_dim})
        if (dim < 1 || dim > MAX_HEAD_DIM)
            throw Error(HEEDFUL_UNSUPPORTED,
                        "head dim: is " + std::to_string(dim) + ", takes 1 to " + std::to_string(MAX_HEAD_DIM));
    check_tensor("query", query, 4, query.size, query.dtype);
    const int64_t k_size[] = {blocks, inputs.kv_heads, key.size[2], inputs.head_dim};
    check_tensor("key", key, 4, k_size, query.dtype);
    if (value) {
        const int64_t v_size[] = {blocks, inputs.kv_heads, key.size[2], inputs.value_dim};
        check_tensor("value", *value, 4, v_size, query.dtype);
        inputs.value = static_cast<const char *>(value->data);
        std::copy_n(value->stride, 4, inputs.value_stride);
    }
    inputs.q_origin = inputs.k_origin = 0;
    inputs.step = 1;
    inputs.caller_q_length = inputs.q_length;
    inputs.position = inputs.k_length - inputs.q_length;
    REQUIRE(std::isfinite(scale), "scale: is not finite");
    inputs.group = inputs.kv_heads ? inputs.heads / inputs.kv_heads : 1;
    inputs.query = static_cast<const char *>(query.data);
    inputs.key = static_cast<const char *>(key.data);
    std::copy_n(query.stride, 4, inputs.query_stride);
    std::copy_n(key.stride, 4, inputs.key_stride);
    inputs.scale = scale;
    read_features(features, query.dtype, inputs, inputs.features);
}

void stride_inputs(int64_t query_class, int64_t key_class, int64_t step, Inputs &inputs, int64_t number_bytes) {
    const auto move = [&](const char *&data, int64_t *stride, int axis, int64_t first, int64_t bytes) {
        if (data) data += first * stride[axis] * bytes;
        stride[axis] *= step;
    };
    inputs.q_origin = query_class;
    inputs.k_origin = key_class;
    inputs.step = step;
    inputs.q_length = (inputs.q_length - query_class + step - 1) / step;
    inputs.k_length = (inputs.k_length - key_class + step - 1) / step;
    move(inputs.query, inputs.query_stride, 2, query_class, number_bytes);
    move(inputs.key, inputs.key_stride, 2, key_class, number_bytes);
    move(inputs.value, inputs.value_stride, 2, key_class, number_bytes);
    Extra &bias = inputs.features.bias;
    const int64_t bias_bytes = dtype_bytes(bias.dtype);
    move(bias.data, bias.stride, 2, query_class, bias_bytes);
    move(bias.data, bias.stride, 3, key_class, bias_bytes);
}

} // namespace heedful
