#include "kernels/host/isa.h"

namespace moed {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

constexpr Isa kIsas[] = {
    {"avx512_bf16", &avx512_bf16_kernels, &has_avx512_bf16, true},
    {"avx512", &avx512_kernels, &has_avx512, false},
    {"avx2", &avx2_kernels, &has_avx2, false},
    {"portable", &portable_kernels, [] { return true; }, false},
};

}  // namespace

IsaList isas() { return {kIsas, sizeof(kIsas) / sizeof(kIsas[0])}; }

}  // namespace moed
