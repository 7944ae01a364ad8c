// One source per operation, compiled once for every tier, where HEEDFUL_TIER names it, and once without for the entry
// points. The tiers' part sees vectors and no standard library: the linker would keep one copy of an inline function of
// the library for everybody. The other part sees the loops over arrays, and finds the kernels of the tier in use.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#define HEEDFUL_FOR_TIERS(what, Type, name)                                                                            \
    what(portable, Type, name) what(avx2, Type, name) what(avx512, Type, name) what(avx512_bf16, Type, name)
#elif defined(__aarch64__)
#define HEEDFUL_FOR_TIERS(what, Type, name) what(portable, Type, name) what(neon, Type, name)
#else
#define HEEDFUL_FOR_TIERS(what, Type, name) what(portable, Type, name)
#endif

#define HEEDFUL_DECLARE_IN_TIER(tier, Type, name)                                                                      \
    namespace tier {                                                                                                   \
    extern const Type name;                                                                                            \
    }

// After the definition of Type, an aggregate of function pointers: declares tier::name for every tier, which each
// defines as `const Type HEEDFUL_TIER::name = {...};`. Entry points call in_use_name().
#if defined(HEEDFUL_TIER)
#define HEEDFUL_KERNELS(Type, name) HEEDFUL_FOR_TIERS(HEEDFUL_DECLARE_IN_TIER, Type, name)
#else
#define HEEDFUL_ADDRESS_IN_TIER(tier, Type, name) &tier::name,
#define HEEDFUL_KERNELS(Type, name)                                                                                    \
    HEEDFUL_FOR_TIERS(HEEDFUL_DECLARE_IN_TIER, Type, name)                                                             \
    static inline const Type &in_use_##name() {                                                                        \
        static const Type *const all[] = {HEEDFUL_FOR_TIERS(HEEDFUL_ADDRESS_IN_TIER, Type, name)};                     \
        return *all[heedful_isa_selected()];                                                                           \
    }
#endif

#if defined(HEEDFUL_TIER)

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace heedful {
namespace {
// clang-format off: each needs the ones before it.
#include "../kernels/simd.h"
#include "functions.h"
// clang-format on
} // namespace
} // namespace heedful

#else

#include "heedful_ops/array.h"
#include "loop.h"

#endif
