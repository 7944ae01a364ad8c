// What the features of a call do to the scores of a tile. Included by each tier's source, inside its anonymous
// namespace, after pack.h.

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// One number of a tensor in any float type.
template <class T> INLINE T number(const char *data, int32_t dtype, int64_t index) {
    switch (dtype) {
    case 0:
        return T(reinterpret_cast<const float *>(data)[index]);
    case 1:
        return T(to_float(reinterpret_cast<const bfloat16 *>(data)[index]));
    case 2:
        return T(to_float(reinterpret_cast<const float16 *>(data)[index]));
    default:
        return T(reinterpret_cast<const double *>(data)[index]);
    }
}

INLINE int64_t element_bytes(int32_t dtype) { return dtype == 0 ? 4 : dtype == 3 ? 8 : 2; }

// Numbers at a stride, as many as `count`, zero up to `padded`.
template <class T>
static NOINLINE void load_line(const char *data, int32_t dtype, int64_t stride, int64_t count, int64_t padded,
                               T *target) {
    typedef Real<T> R;
    int64_t k = 0;
    if (stride == 1 && sizeof(T) == 4 && dtype == 0) {
        __builtin_memcpy(target, data, count * sizeof(T));
        k = count;
    } else if (stride == 1 && sizeof(T) == 4 && dtype != 3) {
        for (; k + R::LANES <= count; k += R::LANES) {
            // The test above leaves float for T, which widen cannot see.
            const Real<float>::V wide = dtype == 1 ? widen(reinterpret_cast<const bfloat16 *>(data) + k)
                                                   : widen(reinterpret_cast<const float16 *>(data) + k);
            __builtin_memcpy(target + k, &wide, sizeof wide);
        }
    }
    for (; k < count; ++k) target[k] = number<T>(data, dtype, k * stride);
    for (; k < padded; ++k) target[k] = 0;
}

// Which of the 64 weights of query `query` from key 64 * group on are kept, a bit each: Philox4x32-10 of Salmon et
// al., "Parallel random numbers: as easy as 1, 2, 3" (2011), on counters that heedful_features gives.
struct Philox {
    typedef uint32_t V __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint64_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int LANES = VECTOR_BYTES / 4, PARTS = 16 / LANES;

    // Products of the even lanes.
    static INLINE Wide multiply(V a, uint32_t b) {
#if defined(__AVX512F__)
        return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(int(b)));
#elif defined(__AVX2__)
        return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(int(b)));
#else
        return ((Wide)a & 0xffffffffu) * uint64_t(b);
#endif
    }

    static INLINE void multiply(V a, uint32_t b, V &low, V &high) {
        const Wide even = multiply(a, b), odd = multiply((V)((Wide)a >> 32), b);
        low = (V)((even & 0xffffffffu) | odd << 32);
        high = (V)(even >> 32 | (odd & 0xffffffff00000000u));
    }

    static NOINLINE uint64_t keep(uint64_t seed, uint32_t threshold, uint32_t group, uint32_t query, uint32_t head,
                                  uint32_t batch) {
        uint64_t bits = 0;
        for (int part = 0; part < PARTS; ++part) {
            V word[4];
            for (int lane = 0; lane < LANES; ++lane) word[0][lane] = 16 * group + part * LANES + lane;
            word[1] = V{} + query;
            word[2] = V{} + head;
            word[3] = V{} + batch;
            uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma GCC unroll 10
            for (int round = 0; round < 10; ++round) {
                V low[2], high[2];
                multiply(word[0], 0xD2511F53u, low[0], high[0]);
                multiply(word[2], 0xCD9E8D57u, low[1], high[1]);
                word[0] = high[1] ^ word[1] ^ key[0];
                word[1] = low[1];
                word[2] = high[0] ^ word[3] ^ key[1];
                word[3] = low[0];
                key[0] += 0x9E3779B9u;
                key[1] += 0xBB67AE85u;
            }
            for (int w = 0; w < 4; ++w) {
                uint64_t kept = 0;
#if defined(__AVX512F__)
                kept = _mm512_cmpge_epu32_mask((__m512i)word[w], _mm512_set1_epi32(int(threshold)));
#else
                for (int lane = 0; lane < LANES; ++lane) kept |= uint64_t(word[w][lane] >= threshold) << lane;
#endif
                bits |= kept << (16 * w + part * LANES);
            }
        }
        return bits;
    }
};

// The features' view of one tile of rows.
template <class A> struct Rules {
    typedef typename A::Number T;
    typedef Real<T> R;
    typedef typename R::V V;
    static constexpr int LANES = R::LANES, UNIT = 2 * LANES;
    // A row of nothing but a bias such as the type's lowest number weighs its keys alike. Below this one the product
    // with log2(e) is off by so much that all of the row's weights would be 0 or infinite.
    static constexpr T LOWEST_BIAS = sizeof(T) == 4 ? -T(1 << 30) : -T(int64_t(1) << 60);

    const Inputs &call;
    const bool active, drops; // scores are changed; weights are dropped
    int64_t batch_index;
    int rows = 0;
    T magnitude, cap, inverse_cap; // scale without its sign; cap 0 for none
    int64_t query[MAX_TILE_ROWS + PANEL], head[MAX_TILE_ROWS + PANEL];
    const char *bias[MAX_TILE_ROWS + PANEL];
    T slope[MAX_TILE_ROWS + PANEL], position[MAX_TILE_ROWS + PANEL];

    Rules(const Inputs &call, int64_t batch_index)
        : call(call), active(call.features.change_scores()), drops(call.features.drop()), batch_index(batch_index),
          magnitude(T(call.scale < 0    ? -call.scale
                      : call.scale == 0 ? 1
                                        : call.scale)),
          cap(T(call.features.softcap)), inverse_cap(cap > 0 ? 1 / cap : 0) {}

    // What turns a score into the exponent of 2 that its weight is: scores that were changed are in natural units.
    T factor() const { return T((active ? 1 : double(magnitude)) * LOG2_E); }

    // Looks at rows [first_row, first_row + count) of a key head.
    void place(int64_t kv_head, int64_t first_row, int count) {
        const Features &f = call.features;
        rows = count;
        int64_t q = first_row / call.group, member = first_row % call.group;
        const int filled = int(round_up(count, PANEL));
        for (int r = 0; r < filled; ++r, ++member) {
            if (member == call.group) {
                member = 0;
                ++q;
            }
            // Rows past the end, which a panel computes too, repeat the first.
            const int from = r < count ? r : 0;
            query[r] = r < count ? q : query[0];
            head[r] = r < count ? kv_head * call.group + member : head[0];
            if (f.bias.data)
                bias[r] = f.bias.data +
                          element_bytes(f.bias.dtype) * (batch_index * f.bias.stride[0] + head[r] * f.bias.stride[1] +
                                                         query[r] * f.bias.stride[2]);
            if (!f.slopes.data) continue;
            const int64_t place = call.q_origin + call.step * query[r]; // as the caller counts
            slope[r] = from == r ? number<T>(f.slopes.data, f.slopes.dtype,
                                             batch_index * f.slopes.stride[0] + head[r] * f.slopes.stride[1] +
                                                 place * f.slopes.stride[2])
                                 : slope[0];
            position[r] = T(place + (f.offset ? f.offset[batch_index * f.offset_stride[0] + place * f.offset_stride[1]]
                                              : call.position));
        }
    }

    // The bias of a row against the unit at `key`, zero past the last key.
    INLINE void load_bias(int r, int64_t key, V *line) const {
        const Extra &b = call.features.bias;
        const int64_t left = call.k_length - key, stride = b.stride[3];
        const char *at = bias[r] + element_bytes(b.dtype) * key * stride;
        if constexpr (sizeof(T) == 4) {
            if (stride == 1 && left >= UNIT) {
                for (int half = 0; half < 2; ++half, at += element_bytes(b.dtype) * LANES)
                    line[half] = b.dtype == 0   ? widen(reinterpret_cast<const float *>(at))
                                 : b.dtype == 1 ? widen(reinterpret_cast<const bfloat16 *>(at))
                                                : widen(reinterpret_cast<const float16 *>(at));
                return;
            }
        } else if (b.dtype == 3 && stride == 1 && left >= UNIT) {
            for (int half = 0; half < 2; ++half) line[half] = R::load(reinterpret_cast<const T *>(at) + half * LANES);
            return;
        }
        alignas(64) T numbers[UNIT];
        load_line<T>(at, b.dtype, stride, left < UNIT ? left : UNIT, UNIT, numbers);
        for (int half = 0; half < 2; ++half) line[half] = R::load(numbers + half * LANES);
    }

    // Brings the scores of a panel against the unit at `key` into natural units. steepness, where it is asked for,
    // gets the derivative of the softcap.
    template <int M> NOINLINE void apply(int first, int64_t key, T *score, int64_t stride, T *steepness) const {
        const Features &f = call.features;
        V away[2] = {};
        if (f.slopes.data)
            for (int half = 0; half < 2; ++half)
                for (int lane = 0; lane < LANES; ++lane)
                    away[half][lane] = T(call.k_origin + call.step * (key + half * LANES + lane));
        for (int m = 0; m < M; ++m, score += stride) {
            const int r = first + m;
            V x[2] = {R::load(score) * magnitude, R::load(score + LANES) * magnitude};
            if (cap > 0) {
                for (int half = 0; half < 2; ++half) {
                    const V t = tanh<T>(x[half] * inverse_cap);
                    if (steepness) R::store(steepness + m * UNIT + half * LANES, T(1) - t * t);
                    x[half] = t * cap;
                }
            }
            if (f.bias.data) {
                V line[2];
                load_bias(r, key, line);
                const V lowest = R::set1(LOWEST_BIAS);
                for (int half = 0; half < 2; ++half) x[half] += line[half] < lowest ? lowest : line[half];
            }
            if (f.slopes.data) {
                for (int half = 0; half < 2; ++half) {
                    const V distance = away[half] - position[r];
                    x[half] -= (distance < V{} ? -distance : distance) * slope[r];
                }
            }
            R::store(score, x[0]);
            R::store(score + LANES, x[1]);
        }
    }

    // Takes the pairs whose bias is -inf out of what a tile sees of the key block at `block`.
    NOINLINE void exclude(int64_t block, Expansion &seen) const {
        const Features &f = call.features;
        if (!f.bias.data || seen.unit_count == 0) return;
        bool excluded = false, partial = false;
        uint64_t allowed[MAX_TILE_ROWS][BLOCK_WORDS];
        for (int r = 0; r < rows; ++r) {
            if (r > 0 && bias[r] == bias[r - 1]) {
                __builtin_memcpy(allowed[r], allowed[r - 1], sizeof allowed[r]);
                continue;
            }
            __builtin_memset(allowed[r], 0, sizeof allowed[r]);
            for (int u = 0; u < seen.unit_count; ++u) {
                const int first = seen.index[u] * UNIT;
                V line[2];
                load_bias(r, block + first, line);
                const uint64_t bits =
                    R::above_negative_infinity(line[0]) | uint64_t(R::above_negative_infinity(line[1])) << LANES;
                excluded |= bits != ALL;
                allowed[r][first / 64] |= bits << (first % 64);
            }
        }
        if (!excluded) return;
        for (int u = 0; u < seen.unit_count; ++u) partial |= seen.partial[u];
        // The rows of a block that all of a tile sees are not filled in.
        if (!partial)
            for (int r = 0; r < MAX_TILE_ROWS; ++r)
                __builtin_memset(seen.row[r], r < rows ? 0xff : 0, sizeof seen.row[r]);
        __builtin_memset(seen.used, 0, sizeof seen.used);
        int kept = 0;
        for (int u = 0; u < seen.unit_count; ++u) {
            const int first = seen.index[u] * UNIT, word = first / 64;
            const uint64_t unit = ALL << (first % 64);
            uint64_t any = 0, all = unit;
            for (int r = 0; r < rows; ++r) {
                seen.row[r][word] &= allowed[r][word] | ~unit;
                any |= seen.row[r][word] & unit;
                all &= seen.row[r][word];
            }
            if (!any) continue;
            seen.used[word] |= any;
            seen.index[kept] = seen.index[u];
            seen.partial[kept++] = all != unit;
        }
        seen.unit_count = kept;
    }

    // Bit k of kept[r]: key k of the block at `block` keeps its weight.
    NOINLINE void draw(int64_t block, const Expansion &seen, uint64_t (*kept)[BLOCK_WORDS]) const {
        for (int r = 0; r < rows; ++r) {
            uint64_t drawn = 0;
            int64_t group = -1; // of 64 keys, as the caller counts them
            for (int u = 0; u < seen.unit_count; ++u) {
                const int first = seen.index[u] * UNIT, word = first / 64;
                if (u == 0 || seen.index[u - 1] * UNIT / 64 != word) kept[r][word] = 0;
                if (call.step == 1) {
                    if (group != block / 64 + word) drawn = draw_group(r, group = block / 64 + word);
                    kept[r][word] = drawn;
                    continue;
                }
                for (int k = first; k < first + UNIT; ++k) {
                    const int64_t key = call.k_origin + call.step * (block + k);
                    if (group != key / 64) drawn = draw_group(r, group = key / 64);
                    kept[r][word] |= (drawn >> (key % 64) & 1) << (k % 64);
                }
            }
        }
    }
    uint64_t draw_group(int r, int64_t group) const {
        const Features &f = call.features;
        return Philox::keep(f.seed, f.threshold, uint32_t(group), uint32_t(call.q_origin + call.step * query[r]),
                            uint32_t(head[r]), uint32_t(batch_index));
    }

    static constexpr uint64_t ALL = UNIT == 64 ? ~uint64_t(0) : (uint64_t(1) << UNIT) - 1;
};
