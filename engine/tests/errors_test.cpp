// Wrong arguments: each is refused with a status and a message that names it, and nothing is written. All of them
// are tried, whatever fails.

#include <functional>

#include "checks.h"

namespace {

constexpr int64_t B = 2, H = 4, KV = 2, LQ = 5, LK = 7, D = 8, DV = 6;

struct Everything {
    Problem p;
    Tensor out{HEEDFUL_FLOAT32, {B, H, LQ, DV}}, lse{HEEDFUL_FLOAT32, {B, H, LQ}};
    Tensor grad_out = out, grad_lse = lse, delta = lse, grad_slopes = lse;
    Tensor grad_query{HEEDFUL_FLOAT32, {B, H, LQ, D}}, grad_key{HEEDFUL_FLOAT32, {B, KV, LK, D}},
        grad_value{HEEDFUL_FLOAT32, {B, KV, LK, DV}}, weights{HEEDFUL_FLOAT32, {B, H, LQ, LK}};
    Tensor bias{HEEDFUL_FLOAT32, {1, H, LQ, LK}}, slopes{HEEDFUL_FLOAT32, {1, H}}, sinks{HEEDFUL_FLOAT32, {H}},
        offset{HEEDFUL_INT32, {B}}, cu{HEEDFUL_INT32, {3}}, mask{HEEDFUL_BOOL, {1, 1, LQ, LK}};

    Everything() {
        p.query = Tensor(HEEDFUL_FLOAT32, {B, H, LQ, D});
        p.key = Tensor(HEEDFUL_FLOAT32, {B, KV, LK, D});
        p.value = Tensor(HEEDFUL_FLOAT32, {B, KV, LK, DV});
        for (Tensor *tensor : {&p.query, &p.key, &p.value, &bias, &slopes, &sinks, &offset, &cu, &mask})
            std::fill(tensor->memory.begin(), tensor->memory.end(), char(0));
    }
};

struct Case {
    const char *name; // what the message must contain
    std::function<void(heedful_forward &)> spoil;
};

bool refused(heedful_status status, const char *name, const char *what) {
    EXPECT(status == HEEDFUL_INVALID_ARGUMENT || status == HEEDFUL_UNSUPPORTED,
           std::string(what) + ": a wrong " + name + " gives status " + std::to_string(status));
    EXPECT(std::string(heedful_error_message()).find(name) != std::string::npos,
           std::string(what) + ": the message for a wrong " + name + " is \"" + heedful_error_message() + "\"");
    return true;
}

bool check_forward() {
    Everything e;
    bool good = true;
    const std::vector<Case> cases = {
        {"query", [](heedful_forward &f) { f.query.dtype = HEEDFUL_INT32; }},
        {"query", [](heedful_forward &f) { f.query.dtype = -7; }},
        {"query", [](heedful_forward &f) { f.query.ndim = 3; }},
        {"query", [](heedful_forward &f) { f.query.data = nullptr; }},
        {"query", [](heedful_forward &f) { f.query.size[2] = -1; }},
        {"key", [](heedful_forward &f) { f.key.dtype = HEEDFUL_FLOAT64; }},
        {"key", [](heedful_forward &f) { f.key.size[1] = 3; }},
        {"key", [](heedful_forward &f) { f.key.size[3] = D + 1; }},
        {"key", [](heedful_forward &f) { f.key.size[0] = 1; }},
        {"key", [](heedful_forward &f) { f.key.size[1] = 0; }},
        {"value", [](heedful_forward &f) { f.value.size[2] = LK + 1; }},
        {"value", [](heedful_forward &f) { f.value.dtype = HEEDFUL_BFLOAT16; }},
        {"head dim", [](heedful_forward &f) { f.query.size[3] = f.key.size[3] = 1 << 20; }},
        {"head dim", [](heedful_forward &f) { f.value.size[3] = f.out.size[3] = 0; }},
        {"out", [](heedful_forward &f) { f.out.size[3] = DV + 1; }},
        {"out", [](heedful_forward &f) { f.out.data = nullptr; }},
        {"lse", [](heedful_forward &f) { f.lse.dtype = HEEDFUL_FLOAT64; }},
        {"lse", [](heedful_forward &f) { f.lse.stride[2] = 2; }},
        {"lse", [](heedful_forward &f) { f.lse.ndim = 2; }},
        {"scale", [](heedful_forward &f) { f.scale = NAN; }},
        {"softcap", [](heedful_forward &f) { f.features.softcap = -1; }},
        {"softcap", [](heedful_forward &f) { f.features.softcap = NAN; }},
        {"dropout_p", [](heedful_forward &f) { f.features.dropout_p = 1.5; }},
        {"dropout_p", [](heedful_forward &f) { f.features.dropout_p = NAN; }},
        {"bias", [&](heedful_forward &f) { (f.features.bias = e.bias.seen()).size[1] = 3; }},
        {"bias", [&](heedful_forward &f) { (f.features.bias = e.bias.seen()).dtype = HEEDFUL_FLOAT16; }},
        {"bias", [&](heedful_forward &f) { (f.features.bias = e.bias.seen()).ndim = 2; }},
        {"alibi_slopes", [&](heedful_forward &f) { (f.features.alibi_slopes = e.slopes.seen()).size[1] = 3; }},
        {"alibi_slopes",
         [&](heedful_forward &f) {
             (f.features.alibi_slopes = e.slopes.seen()).ndim = 3;
             f.features.alibi_slopes.size[2] = f.query.size[2] + 1;
         }},
        {"query_offset",
         [&](heedful_forward &f) {
             f.features.alibi_slopes = e.slopes.seen();
             (f.features.query_offset = e.offset.seen()).ndim = 2;
             f.features.query_offset.size[1] = f.query.size[2] + 1;
         }},
        {"query_offset",
         [&](heedful_forward &f) {
             f.features.alibi_slopes = e.slopes.seen();
             (f.features.query_offset = e.offset.seen()).dtype = HEEDFUL_FLOAT32;
         }},
        {"sinks", [&](heedful_forward &f) { (f.features.sinks = e.sinks.seen()).size[0] = 3; }},
        {"pages", [&](heedful_forward &f) { (f.pages = e.cu.seen()).ndim = 1; }},
        {"pages",
         [&](heedful_forward &f) {
             (f.pages = e.cu.seen()).ndim = 2;
             f.pages.size[0] = B + 1;
             f.pages.size[1] = 1;
         }},
    };
    for (const Case &each : cases) {
        heedful_forward f = {
            e.p.query.seen(), e.p.key.seen(), e.p.value.seen(), e.out.seen(), e.lse.seen(), 0.3, {}, {}, {}};
        if (heedful_attention_forward(&f, nullptr) != HEEDFUL_OK) return fail(heedful_error_message());
        each.spoil(f);
        const std::vector<char> before = e.out.memory;
        good = refused(heedful_attention_forward(&f, nullptr), each.name, "forward") && good;
        EXPECT(e.out.memory == before, std::string("a refused call wrote its output: ") + each.name);
    }
    return good;
}

bool check_schedules() {
    Everything e;
    bool good = true;
    const int64_t huge = std::numeric_limits<int64_t>::max();
    const heedful_tensor cu = e.cu.seen(), mask = e.mask.seen();
    heedful_tensor short_mask = mask, flat_mask = mask, other_cu = cu, heads_mask = mask, items_mask = mask;
    short_mask.size[3] = LK - 1;
    flat_mask.ndim = 2;
    other_cu.size[0] = 2;
    heads_mask.size[1] = 3;
    items_mask.size[0] = 3;
    const std::vector<heedful_tensor> operands = {cu,        cu,       mask,       short_mask,
                                                  flat_mask, other_cu, heads_mask, items_mask};
    const std::vector<std::vector<int64_t>> codes = {
        {1},                               // no atom follows
        {huge},                            //
        {-1},                              //
        {1, 1},                            // no term follows
        {1, -3},                           //
        {1, 1, 9},                         // no such kind
        {1, 1, 0, 2, 1, 0, -2, 1},         // one number short
        {1, 1, 0, 3, 1, 0, -1, 1, -1},     // no such axis
        {1, 1, 0, 2, 2, 0, -1, 1, -1},     // no such side
        {1, 1, 0, 2, 1, 0, 99, 1, -1},     // no such operand
        {1, 1, 0, 2, 1, 0, -3, 1, -1},     // no such symbol
        {1, 1, 0, 2, 1, 0, -2, 1, 0},      // a frame without its documents
        {1, 1, 0, 2, 1, 0, 0, 1, -1},      // 3 values for a batch of 2
        {1, 1, 1, 0, 0, -1, 1, -1},        // a step of 0
        {1, 1, 2, 0, 0, -1, 1, -1},        // a chunk of 0
        {1, 1, 3, 2},                      // documents by a mask
        {1, 1, 3, 7},                      // no second operand
        {1, 1, 3, -1},                     //
        {1, 1, 5, 0},                      // a mask by integers
        {1, 1, 5, 3},                      // a mask that is too small
        {1, 1, 5, 4},                      // of 2 dimensions
        {1, 1, 5, 6},                      // of 3 heads for 4
        {1, 1, 5, 7},                      // of 3 items for 2
        {1, 1, 4, 0, 2},                   // blocks of 0
        {1, 1, 4, -5, 2},                  //
        {1, 1, 0, 2, 1, 0, -1, 1, -1, 12}, // more numbers than the terms take
    };
    for (const std::vector<int64_t> &code : codes) {
        heedful_forward f = {
            e.p.query.seen(), e.p.key.seen(), e.p.value.seen(), e.out.seen(), e.lse.seen(), 0.3, {}, {}, {}};
        f.schedule = {code.data(), int64_t(code.size()), operands.data(), int64_t(operands.size())};
        good = refused(heedful_attention_forward(&f, nullptr), "schedule", ("code " + at(code)).c_str()) && good;
    }
    return good;
}

bool check_backward() {
    Everything e;
    bool good = true;
    const std::vector<std::pair<const char *, std::function<void(heedful_backward &)>>> cases = {
        {"query", [](heedful_backward &f) { f.query.ndim = 2; }},
        {"out", [](heedful_backward &f) { f.out.size[2] = 1; }},
        {"lse", [](heedful_backward &f) { f.lse.data = nullptr; }},
        {"lse", [](heedful_backward &f) { f.lse.dtype = HEEDFUL_BFLOAT16; }},
        {"grad_out", [](heedful_backward &f) { f.grad_out.data = nullptr; }},
        {"grad_out", [](heedful_backward &f) { f.grad_out.dtype = HEEDFUL_FLOAT16; }},
        {"grad_lse", [&](heedful_backward &f) { (f.grad_lse = e.grad_lse.seen()).size[1] = 1; }},
        {"grad_weights", [&](heedful_backward &f) { (f.grad_weights = e.weights.seen()).size[3] = 1; }},
        {"grad_query", [](heedful_backward &f) { f.grad_query.size[3] = 1; }},
        {"grad_key", [](heedful_backward &f) { f.grad_key.data = nullptr; }},
        {"grad_value", [](heedful_backward &f) { f.grad_value.dtype = HEEDFUL_INT32; }},
        {"delta", [](heedful_backward &f) { f.delta.data = nullptr; }},
        {"grad_bias", [&](heedful_backward &f) { f.grad_bias = e.bias.seen(); }}, // and no bias
        {"grad_slopes",
         [&](heedful_backward &f) {
             f.features.alibi_slopes = e.slopes.seen();
             (f.grad_slopes = e.grad_slopes.seen()).size[0] = 1;
         }},
    };
    for (const auto &[name, spoil] : cases) {
        heedful_backward f = {};
        f.query = e.p.query.seen(), f.key = e.p.key.seen(), f.value = e.p.value.seen();
        f.out = e.out.seen(), f.lse = e.lse.seen(), f.grad_out = e.grad_out.seen();
        f.grad_query = e.grad_query.seen(), f.grad_key = e.grad_key.seen(), f.grad_value = e.grad_value.seen();
        f.delta = e.delta.seen();
        f.scale = 0.3;
        if (heedful_attention_backward(&f, nullptr) != HEEDFUL_OK) return fail(heedful_error_message());
        spoil(f);
        good = refused(heedful_attention_backward(&f, nullptr), name, "backward") && good;
    }
    return good;
}

bool check_weights() {
    Everything e;
    bool good = true;
    const std::vector<std::pair<const char *, std::function<void(heedful_weights &)>>> cases = {
        {"key", [](heedful_weights &f) { f.key.size[3] = 3; }},
        {"lse", [](heedful_weights &f) { f.lse.data = nullptr; }},
        {"weights", [](heedful_weights &f) { f.weights.size[3] = 1; }},
        {"counts", [](heedful_weights &f) { f.weights.data = nullptr; }}, // no output at all
        {"weights", [](heedful_weights &f) { f.weights.dtype = HEEDFUL_FLOAT64; }},
    };
    for (const auto &[name, spoil] : cases) {
        heedful_weights f = {};
        f.query = e.p.query.seen(), f.key = e.p.key.seen(), f.lse = e.lse.seen(), f.weights = e.weights.seen();
        f.scale = 0.3;
        if (heedful_attention_weights(&f, nullptr) != HEEDFUL_OK) return fail(heedful_error_message());
        spoil(f);
        good = refused(heedful_attention_weights(&f, nullptr), name, "weights") && good;
    }
    return good;
}

bool check_masks() {
    std::vector<uint8_t> mask(64);
    const heedful_schedule all = {};
    EXPECT(heedful_schedule_mask(&all, 1, 0, 0, 8, 8, mask.data()) == HEEDFUL_OK, heedful_error_message());
    return refused(heedful_schedule_mask(&all, 1, 1, 0, 8, 8, mask.data()), "batch_index", "mask") &&
           refused(heedful_schedule_mask(&all, 1, -1, 0, 8, 8, mask.data()), "batch_index", "mask") &&
           refused(heedful_schedule_mask(&all, 1, 0, -1, 8, 8, mask.data()), "head_index", "mask") &&
           refused(heedful_schedule_mask(&all, 1, 0, 0, -8, 8, mask.data()), "q_length", "mask") &&
           refused(heedful_schedule_tiles(&all, 1, 0, 0, 8, 8, 0, 8, mask.data()), "tile_q", "tiles") &&
           refused(heedful_schedule_tiles(&all, 1, 0, 0, 8, 8, 8, 5, mask.data()), "tile_k", "tiles");
}

} // namespace

int main(int argc, char **argv) {
    begin(argc, argv, 0);
    const bool good[] = {check_forward(), check_schedules(), check_backward(), check_weights(), check_masks()};
    for (const bool each : good)
        if (!each) return 1;
    return end();
}
