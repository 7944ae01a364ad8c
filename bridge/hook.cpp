#include "hook.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <mutex>

#include "arguments.h"
#include "selection.h"
#include "threads.h"
#include "torch_flash.h"

namespace heedful {
namespace {

constexpr int64_t MAX_HEAD_DIM = 512;

/* Why a call is PyTorch's. */
enum class Left : int64_t { small = 16, other = 17, bypassed = 18, slow = 19 };

std::atomic<int64_t> few_pairs[4], few_queries, cached_bytes;
thread_local int64_t bypasses = 0;

/* What was called how often, while somebody wants to know. */
class Record {
  public:
    static constexpr int64_t COLUMNS = 11;
    struct Row {
        int64_t of[COLUMNS];
    };

    bool on() const { return on_.load(std::memory_order_relaxed); }

    void add(bool backward, int64_t outcome, const heedful_tensor &query, const heedful_tensor &key, int64_t elapsed) {
        Row row = {{backward, outcome, query.dtype, query.size[0], query.size[1], key.size[1], query.size[2],
                    key.size[2], query.size[3], 1, elapsed}};
        const std::lock_guard<std::mutex> held(mutex_);
        /* A loop that decodes has a new length in every step; beyond a number of rows lengths are told together. */
        if (rows_.size() >= MAX_ROWS && find(row) == nullptr) row.of[6] = row.of[7] = -1;
        if (Row *const known = find(row)) {
            known->of[COLUMNS - 2] += 1;
            known->of[COLUMNS - 1] += elapsed;
        } else {
            rows_.push_back(row);
        }
    }

    std::vector<Row> set(bool on) {
        const std::lock_guard<std::mutex> held(mutex_);
        std::vector<Row> rows = rows_;
        if (on && !on_) rows_.clear();
        on_ = on;
        return rows;
    }

  private:
    static constexpr size_t MAX_ROWS = 1000;

    Row *find(const Row &wanted) {
        for (Row &row : rows_)
            if (std::equal(row.of, row.of + COLUMNS - 2, wanted.of)) return &row;
        return nullptr;
    }

    std::atomic<bool> on_{false};
    std::mutex mutex_;
    std::vector<Row> rows_;
};

Record &record() {
    static Record *const only = new Record; // never destroyed: threads may call until the end
    return *only;
}

/* What both operators are passed. */
struct Call {
    Tensor query, key, value, mask;
    double dropout_p, scale = 0;
    bool is_causal, scaled, masked = false;
    heedful_tensor q = {}, k = {}, v = {}, m = {};
    int64_t outcome = static_cast<int64_t>(Left::other);
    std::chrono::steady_clock::time_point began;

    Call(StableIValue query, StableIValue key, StableIValue value, StableIValue dropout_p, StableIValue is_causal,
         StableIValue mask, StableIValue scale)
        : query(query), key(key), value(value), mask(Tensor::optional(mask)), dropout_p(scalar<double>(dropout_p)),
          is_causal(scalar<bool>(is_causal)), scaled(scale != 0) {
        StableIValue *const given = reinterpret_cast<StableIValue *>(scale);
        if (scaled) this->scale = scalar<double>(*given);
        delete given;
        /* Autograd passes an undefined tensor for the mask that there was not. */
        if (this->mask.get() != nullptr && aoti_torch_is_defined(this->mask.get(), &masked) != 0)
            fail("attn_mask: torch refused to tell whether it is there");
        if (record().on()) began = std::chrono::steady_clock::now();
    }

    /* Whether the engine runs it, from what both directions know, so that both decide alike. */
    bool is_ours() {
        if (!read()) return false;
        if (!scaled) scale = 1 / std::sqrt(static_cast<double>(q.size[3]));
        const bool small = is_small();
        const bool slow = few_pairs[q.dtype].load(std::memory_order_relaxed) == INT64_MAX;
        outcome = static_cast<int64_t>(bypasses > 0 ? Left::bypassed : slow ? Left::slow : Left::small);
        return bypasses == 0 && !small;
    }

    AtenTensorHandle *mask_handle() { return masked ? &(handle_ = mask.get()) : nullptr; }
    double *scale_pointer() { return scaled ? &scale : nullptr; }

    void finish(bool backward) {
        if (!record().on() || began.time_since_epoch().count() == 0) return;
        const auto elapsed = std::chrono::steady_clock::now() - began;
        record().add(backward, outcome, q, k, std::chrono::nanoseconds(elapsed).count());
    }

  private:
    AtenTensorHandle handle_ = nullptr;

    /* False for what the engine does not compute, right or wrong: PyTorch then says what it says. */
    bool read() {
        q = view(query, "query");
        k = view(key, "key");
        v = view(value, "value");
        if (q.ndim != 4 || k.ndim != 4 || v.ndim != 4) {
            q = k = v = {};
            return false;
        }
        if (dropout_p != 0 || (scaled && !std::isfinite(scale))) return false;
        if (q.dtype > HEEDFUL_FLOAT64 || k.dtype != q.dtype || v.dtype != q.dtype) return false;
        const int64_t batch = q.size[0], heads = q.size[1], kv_heads = k.size[1], dim = q.size[3];
        for (const heedful_tensor *t : {&q, &k, &v})
            for (int64_t size : t->size)
                if (size == 0) return false;
        if (k.size[0] != batch || v.size[0] != batch || v.size[1] != kv_heads || heads % kv_heads != 0) return false;
        if (k.size[3] != dim || v.size[3] != dim || v.size[2] != k.size[2] || dim > MAX_HEAD_DIM) return false;
        return !masked || read_mask();
    }

    bool read_mask() {
        m = view(mask, "attn_mask");
        if (m.dtype != q.dtype && m.dtype != HEEDFUL_FLOAT32 && m.dtype != HEEDFUL_BOOL) return false;
        if (m.ndim != 2 && m.ndim != 4) return false;
        if (m.ndim == 2) m = {m.data, m.dtype, 4, {1, 1, m.size[0], m.size[1]}, {0, 0, m.stride[0], m.stride[1]}};
        const int64_t pairs[] = {q.size[0], q.size[1], q.size[2], k.size[2]};
        for (int axis = 0; axis < 4; ++axis)
            if (m.size[axis] != 1 && m.size[axis] != pairs[axis]) return false;
        return true;
    }

    /* The part of prefer.py's native_is_faster that is about size. */
    bool is_small() const {
        const int64_t pairs = q.size[0] * q.size[1] * q.size[2] * k.size[2];
        if (pairs < few_pairs[q.dtype].load(std::memory_order_relaxed)) return true;
        const bool wide = q.dtype == HEEDFUL_FLOAT32 || q.dtype == HEEDFUL_FLOAT64;
        if (!wide || q.size[1] != k.size[1]) return false;
        const int64_t item = q.dtype == HEEDFUL_FLOAT64 ? 8 : 4;
        const int64_t bytes = k.size[0] * k.size[1] * k.size[2] * k.size[3] * 2 * item;
        return q.size[2] <= few_queries.load(std::memory_order_relaxed) &&
               bytes <= cached_bytes.load(std::memory_order_relaxed);
    }
};

[[noreturn]] void fail_as_torch() {
    fail("scaled_dot_product_attention: PyTorch's own kernel refused the arguments; what it said is on stderr");
}

/* Uninitialised, with the strides that PyTorch's kernel and its meta function give their output. */
Tensor empty_like(const Tensor &tensor, heedful_tensor &result) {
    AtenTensorHandle reference = nullptr;
    if (aoti_torch_new_tensor_handle(tensor.get(), &reference) != 0) fail("heedful: torch refused a reference");
    StableIValue stack[6] = {reinterpret_cast<StableIValue>(reference)};
    if (torch_call_dispatcher("aten::empty_like", "", stack, TORCH_SHIM_VERSION) != 0)
        fail("heedful: torch could not allocate an output");
    Tensor made(stack[0]);
    result = view(made, "output");
    return made;
}

/* (B, H, Lq), in (B, Lq, H) memory order as PyTorch's kernel has it. */
Tensor empty_statistics(const heedful_tensor &q, heedful_tensor &result) {
    const int64_t heads = q.size[1], length = q.size[2];
    return Tensor::empty({q.size[0], heads, length}, {heads * length, 1, heads}, statistics_dtype(q), result);
}

template <class T> void copy_statistics(const heedful_tensor &from, const heedful_tensor &to, double without_key) {
    const T *const source = static_cast<const T *>(from.data);
    T *const target = static_cast<T *>(to.data);
    for (int64_t b = 0; b < from.size[0]; ++b)
        for (int64_t h = 0; h < from.size[1]; ++h)
            for (int64_t i = 0; i < from.size[2]; ++i) {
                const T x = source[b * from.stride[0] + h * from.stride[1] + i * from.stride[2]];
                target[b * to.stride[0] + h * to.stride[1] + i * to.stride[2]] =
                    std::isinf(x) && x < 0 ? T(without_key) : x;
            }
}

/* A row without a key has 0 for PyTorch, whose backward could not bear the -inf that it is. */
void copy_statistics(const heedful_tensor &from, const heedful_tensor &to, double without_key) {
    if (from.dtype == HEEDFUL_FLOAT64) copy_statistics<double>(from, to, without_key);
    else copy_statistics<float>(from, to, without_key);
}

void forward(StableIValue *stack, uint64_t, uint64_t) {
    Call call(stack[0], stack[1], stack[2], stack[3], stack[4], stack[5], stack[6]);
    if (!call.is_ours()) {
        AtenTensorHandle out = nullptr, lse = nullptr;
        if (aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
                call.query.get(), call.key.get(), call.value.get(), call.dropout_p, call.is_causal, call.mask_handle(),
                call.scale_pointer(), &out, &lse) != 0)
            fail_as_torch();
        stack[0] = reinterpret_cast<StableIValue>(out);
        stack[1] = reinterpret_cast<StableIValue>(lse);
        return call.finish(false);
    }
    const heedful_threads threads = torch_threads();
    const Selection selection(call.m, call.is_causal, call.q.size[2], call.k.size[2], threads);
    call.outcome = static_cast<int64_t>(selection.seen());
    heedful_forward arguments = {};
    heedful_tensor statistics;
    Tensor out = empty_like(call.query, arguments.out), lse = empty_statistics(call.q, statistics);
    const Tensor own_lse = empty_per_row(call.q, statistics_dtype(call.q), arguments.lse);
    arguments.query = call.q;
    arguments.key = call.k;
    arguments.value = call.v;
    arguments.scale = call.scale;
    arguments.schedule = selection.schedule();
    arguments.features.bias = selection.bias();
    check_status(heedful_attention_forward(&arguments, &threads));
    copy_statistics(arguments.lse, statistics, 0);
    stack[0] = out.release();
    stack[1] = lse.release();
    call.finish(false);
}

void backward(StableIValue *stack, uint64_t, uint64_t) {
    Call call(stack[1], stack[2], stack[3], stack[6], stack[7], stack[8], stack[9]);
    Tensor grad_out(stack[0]);
    const Tensor out(stack[4]), lse(stack[5]);
    if (!call.is_ours()) {
        AtenTensorHandle gradients[3] = {};
        if (aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out.get(), call.query.get(), call.key.get(), call.value.get(), out.get(), lse.get(),
                call.dropout_p, call.is_causal, call.mask_handle(), call.scale_pointer(), &gradients[0], &gradients[1],
                &gradients[2]) != 0)
            fail_as_torch();
        for (int index = 0; index < 3; ++index) stack[index] = reinterpret_cast<StableIValue>(gradients[index]);
        return call.finish(true);
    }
    const heedful_threads threads = torch_threads();
    const Selection selection(call.m, call.is_causal, call.q.size[2], call.k.size[2], threads);
    call.outcome = static_cast<int64_t>(selection.seen());
    heedful_backward arguments = {};
    const auto empty_gradient = [](const heedful_tensor &of, heedful_tensor &result) {
        return empty_4d(of.size[0], of.size[1], of.size[2], of.size[3], true, static_cast<heedful_dtype>(of.dtype),
                        result);
    };
    Tensor gradients[] = {empty_gradient(call.q, arguments.grad_query), empty_gradient(call.k, arguments.grad_key),
                          empty_gradient(call.v, arguments.grad_value)};
    const heedful_dtype dtype = statistics_dtype(call.q);
    const Tensor own_lse = empty_per_row(call.q, dtype, arguments.lse),
                 delta = empty_per_row(call.q, dtype, arguments.delta);
    copy_statistics(view(lse, "logsumexp"), arguments.lse, 0);
    arguments.query = call.q;
    arguments.key = call.k;
    arguments.value = call.v;
    arguments.out = view(out, "out");
    arguments.grad_out = view(grad_out, "grad_out");
    arguments.scale = call.scale;
    arguments.schedule = selection.schedule();
    arguments.features.bias = selection.bias();
    check_status(heedful_attention_backward(&arguments, &threads));
    for (int index = 0; index < 3; ++index) stack[index] = gradients[index].release();
    call.finish(true);
}

/* The registration, while there is one. */
std::mutex hook_mutex;
TorchLibraryHandle hook = nullptr;

void take_away() {
    if (hook != nullptr && aoti_torch_delete_library_object(hook) != 0) fail("heedful: torch kept the hook");
    hook = nullptr;
}

} // namespace

void sdpa_hook(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor limits(stack[0]);
    const heedful_tensor seen = view(limits, "limits");
    const std::lock_guard<std::mutex> held(hook_mutex);
    take_away();
    if (seen.size[0] == 0) return;
    if (seen.dtype != HEEDFUL_INT64 || seen.ndim != 1 || seen.size[0] != 6) fail("limits takes an int64 tensor of 6");
    if (aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu == nullptr ||
        aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward == nullptr)
        fail("this libtorch does not offer its own attention kernels, so heedful cannot stand in front of them");
    const int64_t *const numbers = static_cast<const int64_t *>(seen.data);
    for (int dtype = 0; dtype < 4; ++dtype) few_pairs[dtype] = numbers[dtype];
    few_queries = numbers[4];
    cached_bytes = numbers[5];
    const bool done =
        aoti_torch_library_init_impl("aten", "CPU", __FILE__, __LINE__, &hook) == 0 &&
        torch_library_impl(hook, "_scaled_dot_product_flash_attention_for_cpu", forward, TORCH_SHIM_VERSION) == 0 &&
        torch_library_impl(hook, "_scaled_dot_product_flash_attention_for_cpu_backward", backward,
                           TORCH_SHIM_VERSION) == 0;
    if (!done) {
        take_away();
        fail("heedful: torch refused the hook");
    }
}

void sdpa_bypass(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor change(stack[0]);
    bypasses += only_element(change, "change");
}

void sdpa_calls(StableIValue *stack, uint64_t, uint64_t) {
    const Tensor on(stack[0]);
    const std::vector<Record::Row> rows = record().set(only_element(on, "switch") != 0);
    heedful_tensor found;
    Tensor result =
        Tensor::empty({static_cast<int64_t>(rows.size()), Record::COLUMNS}, {Record::COLUMNS, 1}, HEEDFUL_INT64, found);
    for (size_t row = 0; row < rows.size(); ++row)
        std::copy_n(rows[row].of, Record::COLUMNS, static_cast<int64_t *>(found.data) + row * Record::COLUMNS);
    stack[0] = result.release();
}

} // namespace heedful
