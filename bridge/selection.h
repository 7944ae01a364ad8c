/* What PyTorch's attention is told by is_causal and a mask, as the engine takes it. */
#ifndef HEEDFUL_BRIDGE_SELECTION_H
#define HEEDFUL_BRIDGE_SELECTION_H

#include <memory>
#include <vector>

#include "heedful.h"

namespace heedful {

/* What a selection turned out to be. */
enum class Seen : int64_t { full = 0, causal = 1, band = 2, padded_band = 3, tiles = 4, mask = 5, bias = 6 };

/* A schedule and perhaps a bias, with the memory that they refer to. The mask is (B, H, Lq, Lk), bool or float, sizes
 * of 1 allowed, without data for none, and is read here. is_causal is PyTorch's: the first query meets the first key.
 */
class Selection {
  public:
    Selection(const heedful_tensor &mask, bool is_causal, int64_t q_length, int64_t k_length,
              const heedful_threads &threads);
    Selection(const Selection &) = delete;
    Selection &operator=(const Selection &) = delete;

    heedful_schedule schedule() const {
        return {code_.data(), static_cast<int64_t>(code_.size()), operands_.data(),
                static_cast<int64_t>(operands_.size())};
    }
    const heedful_tensor &bias() const { return bias_; }
    Seen seen() const { return seen_; }

  private:
    bool read_band(const heedful_tensor &mask, int64_t q_length, int64_t k_length, const heedful_threads &threads);
    bool read_tiles(const heedful_tensor &mask, int64_t q_length, int64_t k_length, const heedful_threads &threads);
    int64_t add_operand(const heedful_tensor &operand);
    void add_atom(const std::vector<std::vector<int64_t>> &terms);

    std::vector<int64_t> code_;
    std::vector<heedful_tensor> operands_;
    heedful_tensor bias_ = {};
    Seen seen_ = Seen::full;
    bool is_causal_;
    std::vector<int32_t> ends_;
    std::unique_ptr<uint8_t[]> maps_;
};

} // namespace heedful

#endif
