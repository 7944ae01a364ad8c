#include "schedule.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <string>

#include "error.h"

namespace heedful {
namespace {

// Beyond any length, and small enough that sums of a few of them do not overflow.
constexpr int64_t FAR = int64_t(1) << 40;
constexpr int64_t NONE = -1, END = -2;
enum Kind { BOUND = 0, STEP = 1, CHUNK = 2, DOCUMENTS = 3, BLOCKS = 4, MASK = 5 };
constexpr int TERM_LENGTH[] = {7, 6, 6, 2, 3, 2};

int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : (a + 1) / b - 1; }
int64_t modulo(int64_t a, int64_t b) { return a - floor_divide(a, b) * b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::min(std::max(x, low), high); }

struct Frame {
    int64_t slot, q_origin, q_end, k_origin, k_end;
};

const heedful_tensor &operand(const heedful_schedule &source, int64_t slot, int32_t dtype) {
    REQUIRE(slot >= 0 && slot < source.operand_count,
            "schedule: refers to operand " + std::to_string(slot) + " of " + std::to_string(source.operand_count));
    const heedful_tensor &tensor = source.operands[slot];
    REQUIRE(tensor.dtype == dtype, "schedule: operand " + std::to_string(slot) + " has dtype code " +
                                       std::to_string(tensor.dtype) + ", not " + std::to_string(dtype));
    return tensor;
}

void check_operand(const heedful_tensor &tensor) {
    REQUIRE(tensor.ndim >= 1 && tensor.ndim <= 4, "schedule: an operand must have 1 to 4 dimensions");
    bool empty = false;
    for (int axis = 0; axis < tensor.ndim; ++axis) {
        REQUIRE(tensor.size[axis] >= 0, "schedule: an operand has a negative size");
        empty |= tensor.size[axis] == 0;
    }
    REQUIRE(tensor.data || empty, "schedule: an operand has no data");
}

int64_t read_int32(const heedful_tensor &tensor, int64_t index) {
    return static_cast<const int32_t *>(tensor.data)[index * tensor.stride[tensor.ndim - 1]];
}

// s, step with j - i = s (mod step) for both congruences; false where they contradict each other.
bool merge_steps(int64_t &step, int64_t &residue, int64_t other_step, int64_t other_residue) {
    int64_t a = step, b = other_step, x = 1, next_x = 0;
    while (b) {
        const int64_t quotient = a / b;
        std::swap(a -= quotient * b, b);
        std::swap(x -= quotient * next_x, next_x);
    }
    const int64_t gcd = a, difference = other_residue - residue;
    if (modulo(difference, gcd)) return false;
    const int64_t reduced = other_step / gcd,
                  times = modulo(__int128(difference / gcd) * modulo(x, reduced) % reduced, reduced);
    const __int128 exact = __int128(residue) + __int128(step) * times, whole = __int128(step) * reduced;
    if (whole <= 2 * FAR) {
        step = int64_t(whole);
        residue = modulo(int64_t(exact % whole), step);
        return true;
    }
    // Beyond every length at most one diagonal is left: the one nearest to the middle.
    const __int128 positive = (exact % whole + whole) % whole,
                   nearest = positive < whole / 2 ? positive : positive - whole;
    step = 2 * FAR;
    residue = modulo(int64_t(nearest % step), step);
    return nearest > -FAR && nearest < FAR;
}

// One conjunction of terms for one batch item and one choice of document for each frame.
class AtomReader {
  public:
    AtomReader(const heedful_schedule &source, int64_t batch_index, int64_t q_length, int64_t k_length)
        : source_(source), batch_index_(batch_index), q_length_(q_length), k_length_(k_length) {}

    std::vector<Frame> frames;

    int64_t value(const int64_t *bound) const {
        const Frame *in = frame(bound[3]);
        int64_t symbol = 0;
        if (bound[1] == END) {
            symbol = in ? (in->k_end - in->k_origin) - (in->q_end - in->q_origin) : k_length_ - q_length_;
        } else if (bound[1] != NONE) {
            const heedful_tensor &tensor = operand(source_, bound[1], HEEDFUL_INT32);
            symbol = read_int32(tensor, tensor.size[tensor.ndim - 1] == 1 ? 0 : batch_index_);
        }
        return clamp(clamp(bound[0], -2 * FAR, 2 * FAR) + bound[2] * symbol, -FAR, FAR);
    }

    const Frame *frame(int64_t slot) const {
        if (slot == NONE) return nullptr;
        for (const Frame &candidate : frames)
            if (candidate.slot == slot) return &candidate;
        throw Error(HEEDFUL_INVALID_ARGUMENT, "schedule: a bound is framed by documents that its atom does not name");
    }

  private:
    const heedful_schedule &source_;
    int64_t batch_index_, q_length_, k_length_;
};

uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }

// Sets bits [low, high) of a block, as far as they lie in it. Every word is written alike, so that the words
// stay in registers.
inline void set_range(uint64_t *bits, int64_t low, int64_t high) {
#pragma GCC unroll 4
    for (int word = 0; word < BLOCK_WORDS; ++word) {
        const int64_t from = clamp(low - 64 * word, 0, 64), to = clamp(high - 64 * word, 0, 64);
        bits[word] |= low_bits(to) & ~low_bits(from);
    }
}

// Bits of the bytes data[first..first + count) at a stride.
void gather_bits(const uint8_t *data, int64_t stride, int64_t first, int64_t count, uint64_t *bits) {
    std::memset(bits, 0, BLOCK_WORDS * sizeof *bits);
    int64_t k = 0;
    if (stride == 1) {
        for (; k + 8 <= count; k += 8) {
            uint64_t bytes;
            std::memcpy(&bytes, data + first + k, 8);
            // Multiplying gathers the low bit of each of the eight bytes in the top byte.
            bits[k / 64] |= ((bytes * 0x0102040810204080u) >> 56) << (k % 64);
        }
    }
    for (; k < count; ++k) bits[k / 64] |= uint64_t(data[(first + k) * stride]) << (k % 64);
}

uint64_t unit_bits(const uint64_t *bits, int unit_index, int unit) {
    const int first = unit_index * unit;
    return (bits[first / 64] >> (first % 64)) & low_bits(unit);
}

} // namespace

inline void Schedule::row_range(const Atom &atom, int64_t query, int64_t &low, int64_t &high) const {
    low = std::max(atom.k_begin, query + atom.d_low);
    high = std::min(atom.k_end, query + atom.d_high + 1);
    for (int32_t c = atom.chunk_begin; c < atom.chunk_end; ++c) {
        const Chunk &chunk = chunks_[c];
        const int64_t begin =
            chunk.k_origin + floor_divide(query - chunk.q_origin + chunk.offset, chunk.size) * chunk.size;
        low = std::max(low, begin);
        high = std::min(high, begin + chunk.size);
    }
}

Schedule::Schedule(const heedful_schedule &source, int64_t batch, int64_t heads, int64_t q_length, int64_t k_length)
    : q_length_(q_length), k_length_(k_length) {
    const int64_t *code = source.code;
    REQUIRE(q_length >= 0 && k_length >= 0, "q_length, k_length: are " + std::to_string(q_length) + " and " +
                                                std::to_string(k_length) + ", take 0 or more");
    if (source.code_length == 0) {
        atoms_.push_back({0, q_length, 0, k_length, -FAR, FAR, 1, 0, 0, 0, 0, 0});
        batch_begin_ = {0, 1};
        return;
    }
    for (int64_t slot = 0; slot < source.operand_count; ++slot) check_operand(source.operands[slot]);
    REQUIRE(code[0] >= 0, "schedule: the number of atoms is negative");
    // A slot that a bound reads and that holds one value per batch item makes the items differ.
    int64_t at = 1;
    for (int64_t atom = 0; atom < code[0]; ++atom) {
        REQUIRE(at < source.code_length, "schedule: the code ends early");
        int64_t terms = code[at++];
        REQUIRE(terms >= 0, "schedule: the number of terms is negative");
        for (; terms > 0; --terms) {
            REQUIRE(at < source.code_length && code[at] >= BOUND && code[at] <= MASK, "schedule: unknown term");
            const int64_t *term = code + at;
            at += TERM_LENGTH[*term];
            REQUIRE(at <= source.code_length, "schedule: the code ends early");
            const bool bounded = *term == BOUND || *term == STEP || *term == CHUNK;
            const int64_t *bound = term + (*term == BOUND ? 3 : 2);
            const int64_t symbol = bounded ? bound[1] : NONE;
            REQUIRE(*term != BOUND || (term[1] >= 0 && term[1] <= 2 && (term[2] == 0 || term[2] == 1)),
                    "schedule: unknown axis or side");
            REQUIRE(!bounded || (symbol >= END && (bound[2] == 1 || bound[2] == -1)),
                    "schedule: unknown symbol or sign");
            if (symbol >= 0) {
                const heedful_tensor &tensor = operand(source, symbol, HEEDFUL_INT32);
                const int64_t size = tensor.size[tensor.ndim - 1];
                REQUIRE(size == 1 || size == batch, "schedule: operand " + std::to_string(symbol) + " holds " +
                                                        std::to_string(size) + " values for a batch of " +
                                                        std::to_string(batch));
                if (size > 1) shared_ = false;
            }
            if (*term == BLOCKS || *term == MASK) {
                const heedful_tensor &tensor = operand(source, term[*term == BLOCKS ? 2 : 1], HEEDFUL_BOOL);
                REQUIRE(tensor.ndim == 4, "schedule: a block map or mask must have 4 dimensions");
                const auto wrong = [&](const char *axis, int64_t got, int64_t takes) {
                    return "schedule: a block map or mask has " + std::to_string(got) + " " + axis + " for " +
                           std::to_string(takes);
                };
                REQUIRE(tensor.size[0] == 1 || tensor.size[0] == batch, wrong("items", tensor.size[0], batch));
                REQUIRE(tensor.size[1] == 1 || tensor.size[1] >= heads, wrong("heads", tensor.size[1], heads));
                if (tensor.size[1] > 1) per_head_ = true;
            }
        }
    }
    REQUIRE(at == source.code_length, "schedule: the code is longer than its atoms");
    for (int64_t item = 0; item < (shared_ ? 1 : batch); ++item) {
        batch_begin_.push_back(atoms_.size());
        for (int64_t at = 1, atom = 0; atom < code[0]; ++atom) {
            const int64_t begin = at;
            int64_t terms = code[at++];
            for (; terms > 0; --terms) at += TERM_LENGTH[code[at]];
            add_atoms(code + begin, at - begin, item, source);
        }
    }
    batch_begin_.push_back(atoms_.size());
}

int64_t Schedule::common_step(int64_t &residue) const {
    int64_t step = 0;
    for (const Atom &atom : atoms_) {
        if (atom.step == 1 || !atom.interval_of_step()) return 1;
        int64_t a = step, b = atom.step;
        while (b) std::swap(a %= b, b);
        step = a;
    }
    if (step <= 1) return 1;
    residue = modulo(atoms_[0].residue, step);
    for (const Atom &atom : atoms_)
        if (modulo(atom.residue, step) != residue) return 1;
    return step;
}

Schedule::Schedule(const Schedule &whole, int64_t step, int64_t query_class, int64_t key_class, int64_t q_length,
                   int64_t k_length)
    : q_length_(q_length), k_length_(k_length), shared_(whole.shared_), atoms_(whole.atoms_),
      batch_begin_(whole.batch_begin_) {
    const auto up = [step](int64_t x) { return -floor_divide(-x, step); };
    const int64_t shift = key_class - query_class;
    for (Atom &atom : atoms_) {
        atom.q_begin = std::max<int64_t>(0, up(atom.q_begin - query_class));
        atom.q_end = std::min(q_length, up(atom.q_end - query_class));
        atom.k_begin = std::max<int64_t>(0, up(atom.k_begin - key_class));
        atom.k_end = std::min(k_length, up(atom.k_end - key_class));
        atom.d_low = up(atom.d_low - shift);
        atom.d_high = floor_divide(atom.d_high - shift, step);
        const int64_t own = atom.step / step;
        atom.residue = modulo(floor_divide(atom.residue - shift, step), own);
        atom.step = own;
    }
}

void Schedule::add_atoms(const int64_t *code, int64_t length, int64_t batch_index, const heedful_schedule &source) {
    AtomReader reader(source, batch_index, q_length_, k_length_);
    struct Documents {
        int64_t slot, count, current;
    };
    std::vector<Documents> documents;
    for (int64_t at = 1; at < length; at += TERM_LENGTH[code[at]]) {
        if (code[at] != DOCUMENTS) continue;
        const int64_t slot = code[at + 1];
        const heedful_tensor &cu_q = operand(source, slot, HEEDFUL_INT32);
        const heedful_tensor &cu_k = operand(source, slot + 1, HEEDFUL_INT32);
        REQUIRE(cu_q.ndim == 1 && cu_k.ndim == 1, "schedule: cu_q and cu_k must have 1 dimension");
        REQUIRE(cu_q.size[0] == cu_k.size[0] && cu_q.size[0] >= 1, "schedule: cu_q and cu_k differ in length");
        bool known = false;
        for (const Documents &other : documents) known |= other.slot == slot;
        if (!known) documents.push_back({slot, cu_q.size[0] - 1, 0});
    }
    for (const Documents &entry : documents)
        if (entry.count == 0) return;

    for (bool more = true; more;) {
        Atom atom = {0, q_length_, 0, k_length_, -FAR, FAR, 1, 0, 0, 0, 0, 0};
        atom.chunk_begin = chunks_.size();
        atom.filter_begin = filters_.size();
        reader.frames.clear();
        for (const Documents &entry : documents) {
            const heedful_tensor &cu_q = source.operands[entry.slot], &cu_k = source.operands[entry.slot + 1];
            const Frame frame = {entry.slot, clamp(read_int32(cu_q, entry.current), 0, q_length_),
                                 clamp(read_int32(cu_q, entry.current + 1), 0, q_length_),
                                 clamp(read_int32(cu_k, entry.current), 0, k_length_),
                                 clamp(read_int32(cu_k, entry.current + 1), 0, k_length_)};
            reader.frames.push_back(frame);
            atom.q_begin = std::max(atom.q_begin, frame.q_origin);
            atom.q_end = std::min(atom.q_end, frame.q_end);
            atom.k_begin = std::max(atom.k_begin, frame.k_origin);
            atom.k_end = std::min(atom.k_end, frame.k_end);
        }
        bool empty = false;
        for (int64_t at = 1; at < length && !empty; at += TERM_LENGTH[code[at]]) {
            const int64_t *term = code + at;
            if (*term == BOUND) {
                const Frame *frame = reader.frame(term[6]);
                const int64_t origin[] = {frame ? frame->q_origin : 0, frame ? frame->k_origin : 0,
                                          frame ? frame->k_origin - frame->q_origin : 0};
                const int64_t value = clamp(reader.value(term + 3) + origin[term[1]], -FAR, FAR);
                int64_t *const low[] = {&atom.q_begin, &atom.k_begin, &atom.d_low};
                int64_t *const high[] = {&atom.q_end, &atom.k_end, &atom.d_high};
                const int64_t past = term[1] == 2 ? 0 : 1; // diagonals are inclusive, the other ends are not
                if (term[2] == 0) *low[term[1]] = std::max(*low[term[1]], value);
                else *high[term[1]] = std::min(*high[term[1]], value + past);
            } else if (*term == STEP) {
                REQUIRE(term[1] >= 1, "schedule: a step is below 1");
                const Frame *frame = reader.frame(term[5]);
                const int64_t shift = frame ? frame->k_origin - frame->q_origin : 0;
                empty = !merge_steps(atom.step, atom.residue, term[1], modulo(reader.value(term + 2) + shift, term[1]));
            } else if (*term == CHUNK) {
                REQUIRE(term[1] >= 1, "schedule: a chunk size is below 1");
                const Frame *frame = reader.frame(term[5]);
                // Beyond twice any distance every size parts the positions alike.
                chunks_.push_back({std::min(term[1], 4 * FAR), reader.value(term + 2), frame ? frame->q_origin : 0,
                                   frame ? frame->k_origin : 0});
            } else if (*term == BLOCKS || *term == MASK) {
                const heedful_tensor &map = source.operands[term[*term == BLOCKS ? 2 : 1]];
                Filter filter = {
                    static_cast<const uint8_t *>(map.data), *term == BLOCKS ? std::min(term[1], FAR) : 1, {}};
                REQUIRE(filter.size >= 1, "schedule: a block size is below 1");
                const int64_t extent[] = {0, 0, (q_length_ + filter.size - 1) / filter.size,
                                          (k_length_ + filter.size - 1) / filter.size};
                for (int axis = 0; axis < 4; ++axis) {
                    filter.stride[axis] = map.size[axis] == 1 ? 0 : map.stride[axis];
                    REQUIRE(axis < 2 || map.size[axis] == 1 || map.size[axis] >= extent[axis],
                            "schedule: a block map or mask is smaller than the lengths");
                }
                filters_.push_back(filter);
            }
        }
        atom.chunk_end = chunks_.size();
        atom.filter_end = filters_.size();
        if (!empty && atom.q_begin < atom.q_end && atom.k_begin < atom.k_end && atom.d_low <= atom.d_high) {
            atoms_.push_back(atom);
        } else {
            chunks_.resize(atom.chunk_begin);
            filters_.resize(atom.filter_begin);
        }
        more = false;
        for (Documents &entry : documents) {
            if (++entry.current < entry.count) {
                more = true;
                break;
            }
            entry.current = 0;
        }
    }
}

int64_t Schedule::work(int64_t batch_index, int64_t q_begin, int64_t q_end) const {
    int64_t total = 0;
    for_atoms(batch_index, q_begin, q_end, [&](int32_t a) {
        const Atom &atom = atoms_[a];
        const int64_t first = std::max(q_begin, atom.q_begin), last = std::min(q_end, atom.q_end) - 1;
        for (int64_t query : {first, (first + last) / 2, last}) {
            int64_t low, high;
            row_range(atom, query, low, high);
            total += std::max<int64_t>(high - low, 0) * (last - first + 1) / 3;
        }
    });
    return total;
}

// What the filters of one atom let through of a key block: the same for all rows that read the same lines.
class Schedule::Sieve {
  public:
    // Whether a map of blocks lets a pair of the ranges through; true where that would take reading a mask.
    static bool reaches(const Schedule &schedule, const Atom &atom, int64_t batch_index, int64_t first_head,
                        int64_t heads, int64_t q_first, int64_t q_last, int64_t low, int64_t high) {
        for (int32_t f = atom.filter_begin; f < atom.filter_end; ++f) {
            const Filter &filter = schedule.filters_[f];
            if (filter.size == 1) continue;
            bool any = false;
            for (int64_t h = 0; h < (filter.stride[1] ? heads : 1) && !any; ++h)
                for (int64_t i = q_first / filter.size; i <= q_last / filter.size && !any; ++i) {
                    const uint8_t *line = filter.data + batch_index * filter.stride[0] +
                                          (first_head + h) * filter.stride[1] + i * filter.stride[2];
                    for (int64_t j = low / filter.size; j * filter.size < high && !any; ++j)
                        any = line[j * filter.stride[3]];
                }
            if (!any) return false;
        }
        return true;
    }

    const uint64_t *bits(const Schedule &schedule, const Atom &atom, int64_t batch_index, int64_t head, int64_t query,
                         int64_t k_begin, int64_t k_end) {
        const uint8_t *line[KEPT] = {};
        const int32_t count = atom.filter_end - atom.filter_begin;
        for (int32_t n = 0; n < std::min(count, KEPT); ++n) {
            const Filter &filter = schedule.filters_[atom.filter_begin + n];
            line[n] = filter.data + batch_index * filter.stride[0] + head * filter.stride[1] +
                      query / filter.size * filter.stride[2];
        }
        if (known_ && count <= KEPT && std::equal(line, line + KEPT, line_)) return bits_;
        known_ = true;
        std::copy(line, line + KEPT, line_);
        std::memset(bits_, 0xff, sizeof bits_);
        for (int32_t n = 0; n < count; ++n) {
            const Filter &filter = schedule.filters_[atom.filter_begin + n];
            const uint8_t *at = filter.data + batch_index * filter.stride[0] + head * filter.stride[1] +
                                query / filter.size * filter.stride[2];
            uint64_t allowed[BLOCK_WORDS] = {};
            if (filter.size == 1) {
                gather_bits(at, filter.stride[3], k_begin, k_end - k_begin, allowed);
            } else {
                for (int64_t block = k_begin / filter.size; block * filter.size < k_end; ++block)
                    if (at[block * filter.stride[3]])
                        set_range(allowed, block * filter.size - k_begin, (block + 1) * filter.size - k_begin);
            }
            for (int word = 0; word < BLOCK_WORDS; ++word) bits_[word] &= allowed[word];
        }
        return bits_;
    }

  private:
    static constexpr int32_t KEPT = 2;
    bool known_ = false;
    const uint8_t *line_[KEPT] = {};
    uint64_t bits_[BLOCK_WORDS];
};

AtomSelection::AtomSelection(const Schedule &schedule, int64_t batch_index, int64_t q_begin, int64_t q_end)
    : schedule_(schedule), batch_index_(batch_index), count_(0), atoms_(few_) {
    schedule.for_atoms(batch_index, q_begin, q_end, [this](int32_t) { ++count_; });
    if (count_ > int64_t(std::size(few_))) atoms_ = new int32_t[size_t(count_)];
    int32_t *next = atoms_;
    schedule.for_atoms(batch_index, q_begin, q_end, [&next](int32_t atom) { *next++ = atom; });
}

AtomSelection::~AtomSelection() {
    if (atoms_ != few_) delete[] atoms_;
}

// Both ends of a row's range never decrease from one row to the next, so the first and the last row bound
// the rest.
void AtomSelection::hull(int64_t q_begin, int64_t q_end, int64_t &low, int64_t &high) const {
    low = schedule_.k_length_;
    high = 0;
    for (int64_t a = 0; a < count_; ++a) {
        const Atom &atom = schedule_.atoms_[atoms_[a]];
        const int64_t first = std::max(q_begin, atom.q_begin), last = std::min(q_end, atom.q_end) - 1;
        if (first > last) continue;
        int64_t atom_low, atom_high, ignored;
        schedule_.row_range(atom, first, atom_low, ignored);
        schedule_.row_range(atom, last, ignored, atom_high);
        if (atom_low >= atom_high) continue;
        low = std::min(low, atom_low);
        high = std::max(high, atom_high);
    }
}

// With chunks the rows of a key end where its own chunk's do; without, where its diagonals do.
void AtomSelection::rows_hull(int64_t k_begin, int64_t k_end, int64_t &low, int64_t &high) const {
    low = schedule_.q_length_;
    high = 0;
    for (int64_t a = 0; a < count_; ++a) {
        const Atom &atom = schedule_.atoms_[atoms_[a]];
        const int64_t first = std::max(k_begin, atom.k_begin), last = std::min(k_end, atom.k_end) - 1;
        if (first > last) continue;
        int64_t begin = std::max(atom.q_begin, first - atom.d_high), end = std::min(atom.q_end, last - atom.d_low + 1);
        for (int32_t c = atom.chunk_begin; c < atom.chunk_end; ++c) {
            const Chunk &chunk = schedule_.chunks_[c];
            const int64_t shift = chunk.q_origin - chunk.offset;
            begin = std::max(begin, floor_divide(first - chunk.k_origin, chunk.size) * chunk.size + shift);
            end = std::min(end, (floor_divide(last - chunk.k_origin, chunk.size) + 1) * chunk.size + shift);
        }
        if (begin >= end) continue;
        low = std::min(low, begin);
        high = std::max(high, end);
    }
}

void AtomSelection::expand(int64_t first_head, int64_t group, int64_t first_row, int rows, int64_t k_begin,
                           int64_t keys, int unit, Expansion &out) const {
    const int64_t k_end = std::min(k_begin + keys, schedule_.k_length_);
    const int64_t first = first_row / group, last = (first_row + rows - 1) / group;
    const int units = int((k_end - k_begin + unit - 1) / unit);
    out.unit_count = 0;
    bool full = false;
    // The atoms that reach the tile; beyond so many, all of them are gone through for every row.
    constexpr int64_t MAX_ACTIVE = 16;
    int32_t near[MAX_ACTIVE];
    int64_t active = 0;
    for (int64_t a = 0; a < count_; ++a) {
        const Atom &atom = schedule_.atoms_[atoms_[a]];
        if (atom.q_end <= first || atom.q_begin > last) continue;
        const int64_t begin = std::max(first, atom.q_begin), end = std::min(last, atom.q_end - 1);
        int64_t low, inner_low, high, inner_high;
        schedule_.row_range(atom, begin, low, inner_high);
        schedule_.row_range(atom, end, inner_low, high);
        if (high <= k_begin || low >= k_end) continue;
        if (atom.filter_begin != atom.filter_end &&
            !Schedule::Sieve::reaches(schedule_, atom, batch_index_, first_head, group, begin, end,
                                      std::max(low, k_begin), std::min(high, k_end)))
            continue;
        if (active < MAX_ACTIVE) near[active] = atoms_[a];
        ++active;
        full |= atom.interval() && atom.q_begin <= first && last < atom.q_end && inner_low <= k_begin &&
                k_end <= inner_high;
    }
    if (active == 0) return;
    if (full && (k_end - k_begin) % unit == 0) {
        for (int u = 0; u < units; ++u) {
            out.index[u] = uint8_t(u);
            out.partial[u] = false;
        }
        out.unit_count = units;
        return;
    }
    const int32_t *atoms = active <= MAX_ACTIVE ? near : atoms_;
    if (active > MAX_ACTIVE) active = count_;
    uint64_t used[BLOCK_WORDS] = {}, all[BLOCK_WORDS];
    std::memset(all, 0xff, sizeof all);
    Schedule::Sieve sieves[MAX_ACTIVE];
    int64_t query = first, member = first_row % group; // of the group: its head
    for (int r = 0; r < rows; ++r, ++member) {
        if (member == group) {
            member = 0;
            ++query;
        } else if (r > 0 && !schedule_.per_head_) {
            std::memcpy(out.row[r], out.row[r - 1], sizeof out.row[r]);
            continue;
        }
        uint64_t bits[BLOCK_WORDS] = {};
        for (int64_t a = 0; a < active; ++a) {
            const Atom &atom = schedule_.atoms_[atoms[a]];
            if (query < atom.q_begin || query >= atom.q_end) continue;
            int64_t low, high;
            schedule_.row_range(atom, query, low, high);
            low = std::max(low, k_begin);
            high = std::min(high, k_end);
            if (low >= high) continue;
            if (atom.interval()) {
                set_range(bits, low - k_begin, high - k_begin);
                continue;
            }
            uint64_t own[BLOCK_WORDS] = {};
            if (atom.step == 1) {
                set_range(own, low - k_begin, high - k_begin);
            } else {
                for (int64_t j = low + modulo(atom.residue - (low - query), atom.step); j < high; j += atom.step)
                    own[(j - k_begin) / 64] |= uint64_t(1) << ((j - k_begin) % 64);
            }
            if (atom.filter_begin != atom.filter_end) {
                Schedule::Sieve unkept, &sieve = atoms == near ? sieves[a] : unkept;
                const uint64_t *allowed =
                    sieve.bits(schedule_, atom, batch_index_, first_head + member, query, k_begin, k_end);
                for (int word = 0; word < BLOCK_WORDS; ++word) own[word] &= allowed[word];
            }
            for (int word = 0; word < BLOCK_WORDS; ++word) bits[word] |= own[word];
        }
        for (int word = 0; word < BLOCK_WORDS; ++word) {
            out.row[r][word] = bits[word];
            used[word] |= bits[word];
            all[word] &= bits[word];
        }
    }
    for (int r = rows; r < MAX_TILE_ROWS; ++r) std::memset(out.row[r], 0, sizeof out.row[r]);
    std::memcpy(out.used, used, sizeof used);
    for (int u = 0; u < units; ++u) {
        if (!unit_bits(used, u, unit)) continue;
        const bool partial = unit_bits(all, u, unit) != low_bits(unit);
        out.index[out.unit_count] = uint8_t(u);
        out.partial[out.unit_count++] = partial;
    }
}

} // namespace heedful

using namespace heedful;

static void check_place(int64_t batch, int64_t batch_index, int64_t head_index) {
    REQUIRE(batch_index >= 0 && batch_index < batch,
            "batch_index: is " + std::to_string(batch_index) + ", takes 0 to " + std::to_string(batch - 1));
    REQUIRE(head_index >= 0, "head_index: is " + std::to_string(head_index) + ", takes 0 or more");
}

extern "C" heedful_status heedful_schedule_mask(const heedful_schedule *source, int64_t batch, int64_t batch_index,
                                                int64_t head_index, int64_t q_length, int64_t k_length, uint8_t *mask) {
    return guarded([&] {
        check_place(batch, batch_index, head_index);
        const Schedule schedule(*source, batch, head_index + 1, q_length, k_length);
        Expansion seen;
        for (int64_t i = 0; i < q_length; ++i) {
            const AtomSelection selection(schedule, batch_index, i, i + 1);
            for (int64_t k = 0; k < k_length; k += KEY_BLOCK) {
                // With a group of one, row i is query i of the first head.
                selection.expand(head_index, 1, i, 1, k, KEY_BLOCK, 4, seen);
                const int64_t count = std::min(KEY_BLOCK, k_length - k);
                uint8_t *line = mask + i * k_length + k;
                std::memset(line, 0, count);
                for (int u = 0; u < seen.unit_count; ++u)
                    for (int64_t j = seen.index[u] * 4; j < std::min<int64_t>(seen.index[u] * 4 + 4, count); ++j)
                        line[j] = !seen.partial[u] || (seen.row[0][j / 64] >> (j % 64) & 1);
            }
        }
    });
}

extern "C" heedful_status heedful_schedule_tiles(const heedful_schedule *source, int64_t batch, int64_t batch_index,
                                                 int64_t head_index, int64_t q_length, int64_t k_length, int64_t tile_q,
                                                 int64_t tile_k, uint8_t *tiles) {
    return guarded([&] {
        REQUIRE(tile_q >= 1 && tile_q <= MAX_TILE_ROWS, "tile_q: takes 1 to " + std::to_string(MAX_TILE_ROWS));
        REQUIRE(tile_k >= 4 && KEY_BLOCK % tile_k == 0 && tile_k <= 64, "tile_k: takes 4, 8, 16, 32 or 64");
        check_place(batch, batch_index, head_index);
        const Schedule schedule(*source, batch, head_index + 1, q_length, k_length);
        const int64_t columns = (k_length + tile_k - 1) / tile_k;
        Expansion seen;
        for (int64_t i = 0; i < q_length; i += tile_q) {
            const int rows = int(std::min(tile_q, q_length - i));
            uint8_t *line = tiles + i / tile_q * columns;
            std::memset(line, 0, columns);
            const AtomSelection selection(schedule, batch_index, i, i + rows);
            for (int64_t k = 0; k < k_length; k += KEY_BLOCK) {
                selection.expand(head_index, 1, i, rows, k, KEY_BLOCK, int(tile_k), seen);
                for (int u = 0; u < seen.unit_count; ++u) line[k / tile_k + seen.index[u]] = seen.partial[u] ? 1 : 2;
            }
        }
    });
}
